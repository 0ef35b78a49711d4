"""A DQC step and a calibration of SwinIR-light x4 on a device, batch 16 of 64x64 LR.

"kernel" runs the Triton ops, "eager" and "compiled" this project's reference. `extra_info` has the
device time, the peak memory, and how many kernels a block launches forward (12 is the limit).
"""

from __future__ import annotations

import pytest
import torch

import compsrt
from compsrt.calibration import calibrate
from compsrt.distillation import Distillation
from compsrt.models.swinir import SwinIR, SwinIRConfig
from compsrt.quantization import QuantSpec

BATCH, PATCH = 16, 64


def student_and_teacher(device: str):
    torch.manual_seed(0)
    teacher = SwinIR(SwinIRConfig(scale=4)).eval().requires_grad_(False).to(device)
    pictures = torch.rand(BATCH, 3, PATCH, PATCH, device=device)
    return compsrt.quantize(teacher, QuantSpec(bits=4), pictures[:4]), teacher, pictures


def seconds_of(call) -> float:
    from triton.testing import do_bench

    return 1e-3 * do_bench(call, warmup=200, rep=800, return_mode="median")


def launches_of(call) -> int:
    """How many kernels a call launches; copies and fills of memory are not counted."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset", "Activity Buffer")) for name in events)


def set_implementation(monkeypatch, implementation: str) -> None:
    monkeypatch.setenv("COMPSRT_KERNELS", "triton" if implementation == "kernel" else "reference")


@pytest.mark.parametrize("which", ["kernel", "eager", "compiled"])
def test_dqc_step(benchmark, monkeypatch, which):
    set_implementation(monkeypatch, which)
    student, teacher, pictures = student_and_teacher("cuda")
    distillation = Distillation(student, teacher)
    if which == "compiled":
        for _, parent, position, block in list(student.named_blocks()):
            parent[position] = torch.compile(block, dynamic=False)

    def step():
        distillation.optimizer.zero_grad()
        distillation.losses(pictures)["loss"].backward()
        distillation.update()

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    tokens = torch.randn(BATCH, PATCH, PATCH, 60, device="cuda")
    block = next(iter(student.named_blocks()))[3]
    with torch.no_grad():
        block(tokens)
        launches = launches_of(lambda: block(tokens))
    benchmark.extra_info.update(
        device_seconds=seconds_of(step),
        peak_bytes=torch.cuda.max_memory_allocated(),
        launches_of_a_block=launches,
        batch=BATCH,
        patch=PATCH,
    )
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
    torch.compiler.reset()


@pytest.mark.parametrize("which", ["kernel", "eager"])
def test_calibration(benchmark, monkeypatch, which):
    set_implementation(monkeypatch, which)
    student, _, pictures = student_and_teacher("cuda")

    def run():
        calibrate(student, pictures)
        torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
