"""masked_matmul: one read of x, one write of y; the weight is small, in any form."""

from __future__ import annotations

import pytest
import torch
from layers import SCALARS, Kind
from shapes import LARGE, TYPES, leaves

from compsrt import kernels
from compsrt.kernels import reference

# x and N: proj and fc2 of SwinIR-light.
on_each_size = pytest.mark.parametrize(
    ("name", "out"), [("tokens", 60), ("hidden", 60), ("cold", 60)]
)
on_each_type = pytest.mark.parametrize("dtype", TYPES[::2], ids=str)


def prepare(name, out, dtype, form="float"):
    """x, the tensors that get gradients, and the weight."""
    rows, size = LARGE[name]
    kind = Kind(size, out, None, 0, 4, bias=False)
    tensors = kind.tensors()
    x, *values = leaves([torch.randn(rows, size).to(dtype), *tensors.values()], "cuda")
    weight = kind.weight(dict(zip(tensors, values, strict=True)))
    if form == "2:4":
        mask = torch.arange(size, device="cuda").expand(out, size) % 4 < 2
        weight = weight._replace(mask=mask)
    # What a calibrated model learns: not the float weight, but the scalars of its quantizer.
    scalars = [
        t for n, t in zip(tensors, values, strict=True) if n.removeprefix("weight_") in SCALARS
    ]
    if form != "float":
        weight = kernels.pack_weight(weight, form)
        scalars = []
    return x, scalars, weight


def operations(name, out):
    rows, size = LARGE[name]
    return 2 * rows * size * out


@on_each_size
@on_each_type
@pytest.mark.parametrize("form", ["float", "unstructured", "2:4"])
def test_forward(implementation, measure, name, out, dtype, form):
    function = implementation(kernels.masked_matmul, reference.masked_matmul)
    x, _, weight = prepare(name, out, dtype, form)
    moved = x.nbytes + len(x) * out * x.element_size()
    with torch.no_grad():
        measure(lambda: function(x, weight), bytes_moved=moved, operations=operations(name, out))


@on_each_size
@on_each_type
def test_backward(implementation, measure, name, out, dtype):
    function = implementation(kernels.masked_matmul, reference.masked_matmul)
    x, scalars, weight = prepare(name, out, dtype)
    y = function(x, weight)
    grad = torch.randn_like(y)
    measure(
        lambda: torch.autograd.grad(y, (x, *scalars), grad, retain_graph=True),
        bytes_moved=2 * x.nbytes + grad.nbytes,
        operations=2 * operations(name, out),
    )
