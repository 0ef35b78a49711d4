"""layer_norm: one read and one write of tokens that are narrow for PyTorch's kernel."""

from __future__ import annotations

import pytest
import torch
from shapes import LARGE, TYPES

from compsrt import kernels
from compsrt.kernels import reference
from compsrt.kernels.reference import LayerNormWeights


@pytest.mark.parametrize("shape", [(57600, 60), LARGE["cold"], (57600, 180)], ids=str)
@pytest.mark.parametrize("dtype", TYPES[::2], ids=str)
def test_forward(implementation, measure, shape, dtype):
    function = implementation(kernels.layer_norm, reference.layer_norm)
    x = torch.randn(shape, device="cuda").to(dtype)
    norm = LayerNormWeights(*torch.randn(2, shape[-1], device="cuda"), 1e-5)
    measure(lambda: function(x, norm), bytes_moved=2 * x.numel() * x.element_size())
