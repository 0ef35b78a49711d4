"""hadamard_transform: one read and one write of x; the backward is the same kernel."""

from __future__ import annotations

import pytest
import torch
from shapes import LARGE, TYPES

from compsrt import kernels, transforms
from compsrt.kernels import reference

on_each_type = pytest.mark.parametrize("dtype", TYPES[::2], ids=str)


@pytest.mark.parametrize("name", LARGE)
@on_each_type
def test_forward(implementation, measure, name, dtype):
    size = LARGE[name][-1]
    order = size if transforms.has_hadamard(size) else transforms.next_power_of_two(size)
    compare(implementation, measure, LARGE[name], order, dtype)


@pytest.mark.parametrize("order", [128, 180, 256, 1024])
@on_each_type
def test_wide_rows(implementation, measure, order, dtype):
    compare(implementation, measure, ((1 << 26) // order, order), order, dtype)


def compare(implementation, measure, shape, order, dtype):
    function = implementation(kernels.hadamard_transform, reference.hadamard_transform)
    x = torch.randn(shape, device="cuda").to(dtype)
    rows, size = shape
    measure(
        lambda: function(x, order),
        bytes_moved=rows * (size + order) * x.element_size(),
        operations=2 * rows * size * order,
    )
