"""quant_mlp: the hidden tokens, twice as wide as x, never reach memory in the forward."""

from __future__ import annotations

import pytest
import torch
from layers import SCALARS, Kind
from shapes import LARGE, TYPES, leaves

from compsrt import kernels
from compsrt.kernels import reference

KINDS = Kind(60, 120, norm=True), Kind(120, 60, seed=9)  # of SwinIR-light
on_each_size = pytest.mark.parametrize("name", ["tokens", "cold"])
on_each_type = pytest.mark.parametrize("dtype", TYPES[::2], ids=str)


def prepare(implementation, name, dtype):
    """The call, and x and the scalars of both layers."""
    function = implementation(kernels.quant_mlp, reference.quant_mlp)
    (x,) = leaves([torch.randn(LARGE[name]).to(dtype)], "cuda")
    layers, learned = [], []
    for kind in KINDS:
        tensors = kind.tensors()
        there = dict(zip(tensors, leaves(list(tensors.values()), "cuda"), strict=True))
        layers.append(kind.layer(there))
        learned += [t for n, t in there.items() if n.removeprefix("weight_") in SCALARS]
        if kind.norm:
            norm = kind.normalization(there)
    return lambda: function(x, *layers, norm=norm, residual=True), (x, *learned)


def operations(name):
    """Of both rotations and both products."""
    return 2 * LARGE[name][0] * (60 * 60 + 60 * 120 + 120 * 120 + 120 * 60)


@on_each_size
@on_each_type
def test_forward(implementation, measure, name, dtype):
    call, (x, *_) = prepare(implementation, name, dtype)
    with torch.no_grad():
        measure(call, bytes_moved=2 * x.nbytes, operations=operations(name))


@on_each_size
@on_each_type
def test_backward(implementation, measure, name, dtype):
    call, inputs = prepare(implementation, name, dtype)
    y = call()
    grad = torch.randn_like(y)
    measure(
        lambda: torch.autograd.grad(y, inputs, grad, retain_graph=True),
        bytes_moved=3 * y.nbytes,
        operations=2 * operations(name),
    )
