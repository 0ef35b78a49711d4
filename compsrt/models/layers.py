"""Layers of half precision whose inputs and outputs may stay float32.

The residual stream of a transformer outgrows float16 (above 65,504 it becomes infinite, and the
picture black) and its sum outgrows bfloat16's 8 bits. So the stream stays float32, whatever type the
weights have, and only what enters a product is narrowed. Where input and weights have one type, and
under autocast, these are the layers of `torch.nn`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    """A convolution of half weights with an input (B, C, H, W) of any range, in the input's type.

    For float16 every picture is divided by a power of two that brings it within [-1, 1], which
    changes nothing but the exponents, and the result multiplied by it.
    """

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.weight.dtype
        if dtype not in HALVES or x.dtype == dtype:
            return super().forward(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)[:, None, None]
        if dtype == torch.float16:
            peak = x.abs().amax((1, 2, 3), keepdim=True).clamp_min(1.0)
            unit = torch.exp2(torch.ceil(torch.log2(peak)))
            y = self._conv_forward((x / unit).to(dtype), self.weight, None).to(x.dtype) * unit
        else:
            y = self._conv_forward(x.to(dtype), self.weight, None).to(x.dtype)
        return y if bias is None else y + bias


class LastConv2d(nn.Conv2d):
    """The convolution that makes the picture, in the input's type whatever type its weights have.

    Its result rounded to bfloat16 costs 0.005 dB (nano model, 64x64 crops of Set5).
    """

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self._conv_forward(x, self.weight.to(x.dtype), bias)
