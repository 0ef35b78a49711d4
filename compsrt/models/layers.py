"""Layers of half precision whose inputs and outputs may stay float32.

The residual stream of a transformer outgrows float16 (above 65,504 it becomes infinite, and the
picture black) and its sum outgrows bfloat16's 8 bits. So the stream stays float32, whatever type the
weights have, and only what enters a product is narrowed; norms, and what quantized layers are scaled
with, stay float32 too (`widened`). A convolution is `kernels.convolve`, which may take in what
surrounds it; with gradients, or on a CPU, that is PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..kernels import LayerNormWeights

HALVES = (torch.float16, torch.bfloat16)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of the stream in a network that computes in dtype."""
    return torch.float32 if dtype in HALVES else dtype


def widened(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """For `Module._apply`: fn, which moves or converts, with float32 where that gives a half type."""

    def moved(tensor: Tensor) -> Tensor:
        found = fn(tensor)
        return tensor.to(found.device, wide(found.dtype)) if found.dtype in HALVES else found

    return moved


class LayerNorm(nn.LayerNorm):
    """A layer norm whose weights are float32 at least, in any network; see `kernels.layer_norm`."""

    def _apply(self, fn, recurse=True):
        return super()._apply(widened(fn), recurse)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.layer_norm(x, LayerNormWeights(self.weight, self.bias, self.eps))


class Conv2d(nn.Conv2d):
    """A convolution whose weights may be narrower than what it reads and returns; see `convolve`.

    With half weights, or where `allow_tf32` says so, it multiplies as TF32 on a GPU that has it.
    """

    allow_tf32 = False

    def forward(self, x: Tensor, **fused: Any) -> Tensor:
        tf32 = self.allow_tf32 or self.weight.dtype in HALVES
        return convolve(x, self.weight, self.bias, allow_tf32=tf32, **fused)


def as_read(weight: Tensor) -> Tensor:
    """A convolution's weight in the order in which a token is multiplied with it: channels last."""
    return weight.contiguous(memory_format=torch.channels_last)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, residual: Tensor | None = None, **fused: Any
) -> Tensor:
    """`kernels.convolve` of pictures (B, C, H, W) instead of tokens, in channels-last order."""
    if residual is not None:
        residual = residual.permute(0, 2, 3, 1)
    y = kernels.convolve(x.permute(0, 2, 3, 1), weight, bias, residual=residual, **fused)
    return y if fused.get("shuffle", 1) > 1 else y.permute(0, 3, 1, 2)
