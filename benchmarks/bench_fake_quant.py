"""fake_quantize: one read and one write of x forward; two reads and one write backward."""

from __future__ import annotations

import pytest
import torch
from shapes import LARGE, TYPES, four_scalars, leaves

from compsrt import kernels
from compsrt.kernels import reference

on_each_size = pytest.mark.parametrize("name", LARGE)
on_each_type = pytest.mark.parametrize("dtype", TYPES[::2], ids=str)


def prepare(name, dtype):
    x = torch.randn(LARGE[name], device="cuda").to(dtype)
    return leaves([x], "cuda")[0], leaves(four_scalars((), 4, "clamped"), "cuda")


@on_each_size
@on_each_type
def test_forward(implementation, measure, name, dtype):
    function = implementation(kernels.fake_quantize, reference.fake_quantize)
    x, scalars = prepare(name, dtype)
    with torch.no_grad():
        measure(lambda: function(x, *scalars, bits=4), bytes_moved=2 * x.nbytes)


@on_each_size
@on_each_type
def test_backward(implementation, measure, name, dtype):
    function = implementation(kernels.fake_quantize, reference.fake_quantize)
    x, scalars = prepare(name, dtype)
    out = function(x, *scalars, bits=4)
    grad = torch.randn_like(out)
    measure(
        lambda: torch.autograd.grad(out, (x, *scalars), grad, retain_graph=True),
        bytes_moved=3 * x.nbytes,
    )
