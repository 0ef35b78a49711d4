"""The whole network: SwinIR-light x4 on one 64x64 LR picture, float against quantized.

Ratios to this project's own eager float forward, which is what the targets are stated in. All
rounds are interleaved, so that whatever else the machine does falls on all of them alike, and the
medians are compared. Random weights: time does not depend on their values.
"""

from __future__ import annotations

import copy
import multiprocessing
import resource
import statistics
import time

import pytest
import torch

import compsrt
from compsrt import models
from compsrt.calibration import calibrate
from compsrt.distillation import Distillation
from compsrt.models.swinir import SwinIR, SwinIRConfig
from compsrt.quantization import QuantSpec

ROUNDS = 9


def network() -> SwinIR:
    torch.manual_seed(0)
    return SwinIR(SwinIRConfig(scale=4)).eval().requires_grad_(False)


def _ratios(method: str) -> dict[str, float]:
    model, picture = network(), torch.rand(1, 3, 64, 64)
    quantized = compsrt.quantize(model, QuantSpec(bits=4, method=method), picture)
    packed = copy.deepcopy(quantized).requires_grad_(False)
    models.set_arithmetic(packed, "auto")
    objective = Distillation(quantized, model)
    target = model(picture)

    def forward():
        with torch.no_grad():
            quantized(picture)

    def packed_forward():
        with torch.no_grad():
            packed(picture)

    def forward_and_backward():
        objective.optimizer.zero_grad()
        (quantized(picture) - target).abs().mean().backward()

    def whole_step():
        objective.optimizer.zero_grad()
        objective.losses(picture)["loss"].backward()
        objective.optimizer.step()

    work = {
        "float forward": lambda: model(picture),
        "packed forward": packed_forward,
        "fake-quant forward": forward,
        "forward and backward": forward_and_backward,
        "whole DQC step, teacher included": whole_step,
        "calibration": lambda: calibrate(quantized, picture),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for call in work.values():
        call()
    for _ in range(ROUNDS):
        for name, call in work.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    base = medians["float forward"]
    return {"float forward, s": base, **{k: v / base for k, v in medians.items() if v != base}}


@pytest.mark.parametrize("method", ["compsrt", "2dquant"])
def test_ratios_to_the_float_forward(benchmark, method):
    torch.set_num_threads(2)
    report = benchmark.pedantic(_ratios, args=(method,), rounds=1)
    benchmark.extra_info.update({**report, "torch": torch.__version__, "threads": 2})
    print(f"\n{method}: " + ", ".join(f"{key} {value:.2f}" for key, value in report.items()))


def _step_in_this_process(batch: int, parts: int, queue) -> None:
    torch.set_num_threads(2)
    model, pictures = network(), torch.rand(batch, 3, 64, 64)
    quantized = compsrt.quantize(model, QuantSpec(bits=4), pictures[:1])
    objective = Distillation(quantized, model)
    for part in pictures.chunk(parts):
        (objective.losses(part)["loss"] / parts).backward()
    queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)


@pytest.mark.parametrize("parts", [1, 4])
def test_memory_of_a_dqc_step(benchmark, parts):
    """Peak resident memory of a step at batch 16 of 64x64; the published code takes 48 GB.

    parts: as --accumulate; the gradients are the same.
    """

    def measure():
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=_step_in_this_process, args=(16, parts, queue))
        process.start()
        result = queue.get(timeout=600)
        process.join()
        return result

    peak = benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info.update({"peak_gb": peak, "parts": parts})
    print(f"\nDQC step, batch 16 of 64x64 in {parts} parts: {peak:.1f} GB at the peak")
