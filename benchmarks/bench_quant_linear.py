"""quant_linear: norm, rotation, quantizers, product, bias and GELU in one read of x and one write."""

from __future__ import annotations

import pytest
import torch
from layers import SCALARS, Kind, quant_linear
from shapes import LARGE, TYPES, leaves

from compsrt import kernels
from compsrt.kernels import reference

# The layers of SwinIR-light; q, k and v as one.
LAYERS = {
    "qkv": ("tokens", Kind(60, 180, norm=True)),
    "proj": ("tokens", Kind(60, 60)),
    "fc1": ("tokens", Kind(60, 120, norm=True, activation="gelu")),
    "fc2": ("hidden", Kind(120, 60)),
    "cold": ("cold", Kind(60, 60)),
}
on_each_layer = pytest.mark.parametrize("name", LAYERS)
on_each_type = pytest.mark.parametrize("dtype", TYPES[::2], ids=str)


def prepare(implementation, name, dtype):
    """The call, x and the scalars, and the bytes of x and of y."""
    shape, kind = LAYERS[name]
    function = implementation(kernels.quant_linear, reference.quant_linear)
    tensors = kind.tensors()
    rows, size = LARGE[shape]
    x, *values = leaves([torch.randn(rows, size).to(dtype), *tensors.values()], "cuda")
    there = dict(zip(tensors, values, strict=True))
    learned = [t for name, t in there.items() if name.removeprefix("weight_") in SCALARS]
    out = rows * kind.out * x.element_size()
    return lambda: quant_linear(function, kind, x, there), (x, *learned), x.nbytes, out


def operations(name):
    """Of the rotation and of the product."""
    shape, kind = LAYERS[name]
    return 2 * LARGE[shape][0] * kind.size * (kind.size + kind.out)


@on_each_layer
@on_each_type
def test_forward(implementation, measure, name, dtype):
    call, _, size, out = prepare(implementation, name, dtype)
    with torch.no_grad():
        measure(call, bytes_moved=size + out, operations=operations(name))


@on_each_layer
@on_each_type
def test_backward(implementation, measure, name, dtype):
    call, inputs, size, out = prepare(implementation, name, dtype)
    y = call()
    grad = torch.randn_like(y)
    measure(
        lambda: torch.autograd.grad(y, inputs, grad, retain_graph=True),
        bytes_moved=2 * size + out,
        operations=2 * operations(name),
    )
