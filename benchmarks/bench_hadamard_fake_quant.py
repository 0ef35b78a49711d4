"""hadamard_fake_quantize: x is read once for all quantizers, whatever their number."""

from __future__ import annotations

import pytest
import torch
from shapes import LARGE, TYPES, four_scalars, leaves

from compsrt import kernels, transforms
from compsrt.kernels import hadamard_fake_quant, reference
from compsrt.kernels.reference import Grid

on_each_type = pytest.mark.parametrize("dtype", TYPES[::2], ids=str)
on_each_use = pytest.mark.parametrize(
    ("name", "count", "back"),
    [
        ("tokens", 1, False),
        ("tokens", 3, False),
        ("tokens", 1, True),
        ("hidden", 1, False),
        ("heads", 1, False),
        ("softmax", 1, False),
        ("cold", 1, False),
        ("cold", 3, False),
    ],
)


def composed(x, rotation, grids, back):
    return hadamard_fake_quant._composed(x, rotation, grids, back, reference.fake_quantize)


def prepare(implementation, name, count, back, dtype):
    """The call, its leaves, and the bytes of x and of all outputs."""
    function = implementation(kernels.hadamard_fake_quantize, composed)
    size = LARGE[name][-1]
    transform = "hadamard" if transforms.has_hadamard(size) else "dct"
    rotation = transforms.transform_matrix(transform, size).to("cuda", dtype)
    x = torch.randn(LARGE[name], device="cuda").to(dtype)
    scalars = [four_scalars((), 4, "clamped", i) for i in range(count)]
    x, *scalars = leaves([x, *(s for four in scalars for s in four)], "cuda")
    grids = [Grid(*scalars[4 * i : 4 * i + 4], 4) for i in range(count)]
    return lambda: function(x, rotation, grids, back), (x, *scalars), x.nbytes


@on_each_use
@on_each_type
def test_forward(implementation, measure, name, count, back, dtype):
    call, _, size = prepare(implementation, name, count, back, dtype)
    width = LARGE[name][-1]
    products = 1 + count * back
    with torch.no_grad():
        measure(
            call,
            bytes_moved=(1 + count) * size,
            operations=2 * products * LARGE[name][0] * width * width,
        )


@on_each_use
@on_each_type
def test_backward(implementation, measure, name, count, back, dtype):
    call, inputs, size = prepare(implementation, name, count, back, dtype)
    outs = call()
    grads = [torch.randn_like(out) for out in outs]
    width = LARGE[name][-1]
    products = 2 + count * back
    measure(
        lambda: torch.autograd.grad(outs, inputs, grads, retain_graph=True),
        bytes_moved=(2 + count) * size,
        operations=2 * products * LARGE[name][0] * width * width,
    )
