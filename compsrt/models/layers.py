"""Layers of half precision whose inputs and outputs may stay float32.

The residual stream of a transformer outgrows float16 (above 65,504 it becomes infinite, and the
picture black) and its sum outgrows bfloat16's 8 bits. So the stream stays float32, whatever type the
weights have, and only what enters a product is narrowed. A convolution is `kernels.convolve`, which
may take in what surrounds it; with gradients, or on a CPU, that is PyTorch's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels

HALVES = (torch.float16, torch.bfloat16)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of the stream in a network that computes in dtype."""
    return torch.float32 if dtype in HALVES else dtype


class LayerNorm(nn.LayerNorm):
    """A layer norm of half weights with a wider input, in the input's type."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype not in HALVES or x.dtype == self.weight.dtype:
            return super().forward(x)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class Conv2d(nn.Conv2d):
    """A convolution whose weights may be narrower than what it reads and returns; see `convolve`."""

    def forward(self, x: Tensor, **fused: Any) -> Tensor:
        return convolve(x, self.weight, self.bias, **fused)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, residual: Tensor | None = None, **fused: Any
) -> Tensor:
    """`kernels.convolve` of pictures (B, C, H, W) instead of tokens, in channels-last order."""
    if residual is not None:
        residual = residual.permute(0, 2, 3, 1)
    y = kernels.convolve(x.permute(0, 2, 3, 1), weight, bias, residual=residual, **fused)
    return y if fused.get("shuffle", 1) > 1 else y.permute(0, 3, 1, 2)
