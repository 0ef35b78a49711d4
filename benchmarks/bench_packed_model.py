"""Whole pictures on a device: packed SwinIR-light against the float network and the fake-quantized one.

SwinIR-light x4 to 1280x720 and x2 to 1920x1080, batch 1 and 16, random weights (time does not depend
on their values). "packed" is what `compsrt.load(file).to("cuda")` runs. `extra_info` has the device
time, a picture's share of it, the operations and bytes that there are at the least, the launches and
the peak memory beyond input and output in token grids; for batch 1 the last two have limits.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from bench_dqc import launches_of, seconds_of

import compsrt
from compsrt import models
from compsrt.models.swinir import SwinIR, SwinIRConfig
from compsrt.quantization import QuantSpec

SIZES = {"x4 to 1280x720": (4, 180, 320), "x2 to 1920x1080": (2, 540, 960)}
BLOCKS, OTHERS, GRIDS = 24, 12, 8  # launches and token grids that a picture may take
FORMS = {
    "packed": ("auto", torch.float32),
    "packed, fp16": ("fold", torch.float16),
    "packed, bf16": ("fold", torch.bfloat16),
    "packed, integer": ("integer", torch.float32),
    "fake-quantized": ("reference", torch.float32),
}


@functools.cache
def networks(scale: int) -> tuple[SwinIR, torch.nn.Module]:
    """The float network and its quantized form, on the CPU."""
    torch.manual_seed(0)
    network = SwinIR(SwinIRConfig(scale=scale)).eval().requires_grad_(False)
    quantized = compsrt.quantize(network, QuantSpec(bits=4), torch.rand(1, 3, 32, 32))
    return network, quantized.requires_grad_(False)


def model_of(form: str, scale: int, device: torch.device):
    network, quantized = networks(scale)
    if form in FORMS:
        arithmetic, dtype = FORMS[form]
        model = copy.deepcopy(quantized)
        models.set_arithmetic(model, arithmetic)
        return model.to(device, dtype)
    model = copy.deepcopy(network).to(device)
    return torch.compile(model.bfloat16(), dynamic=False) if "compiled" in form else model


@pytest.mark.parametrize("form", [*FORMS, "float, eager fp32", "float, compiled bf16"])
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("size", SIZES)
def test_whole_pictures(benchmark, size, batch, form):
    scale, height, width = SIZES[size]
    x = torch.rand(batch, 3, height, width, device="cuda")
    model = model_of(form, scale, x.device)
    with torch.no_grad():
        # A recorded picture holds its memory for good, so what it takes is looked at before.
        direct = getattr(model, "_enlarge", model)
        direct(x)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        output = direct(x)
        torch.cuda.synchronize()
        beyond = torch.cuda.max_memory_allocated() - held - output.nbytes
        for _ in range(3):  # compiles, records, replays
            model(x)
        seconds = seconds_of(lambda: model(x))
        launches = launches_of(lambda: model(x))
    rows = -(-height // 8) * 8 * (-(-width // 8) * 8)
    grid = 4 * batch * rows * 60
    counted = compsrt.count(networks(scale)[0], height * scale, width * scale)
    benchmark.extra_info.update(
        device_seconds=seconds,
        milliseconds_a_picture=1e3 * seconds / batch,
        operations=2 * batch * counted.macs,
        bytes_moved=2 * grid * (BLOCKS + 6) + x.nbytes + output.nbytes,
        launches=launches,
        token_grids_beyond=beyond / grid,
    )

    def to_the_end():
        with torch.no_grad():
            model(x)
        torch.cuda.synchronize()

    benchmark.pedantic(to_the_end, rounds=5, warmup_rounds=1)
    torch.compiler.reset()
    if form == "packed" and batch == 1:
        assert launches <= BLOCKS + OTHERS, launches
        assert beyond <= GRIDS * grid, beyond / grid
