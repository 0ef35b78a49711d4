"""The layer norm of narrow tokens at inference, one launch.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias                  over the last axis

x: (..., K). PyTorch gives each token a block of threads, of which tokens of 60 channels leave most
idle; here a program takes ROWS whole tokens. Everything is float32 in registers. Most norms of a
compressed network are part of another launch (`quant_linear`, `quant_swin_block`); this is for those
that are not: its first and last one, and all of an eager float network. (As part of the convolution
after the last it was made anew for each of nine taps: 12,071 instructions of a warp instead of
4,566.) No gradients: where they are wanted PyTorch's runs.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

import torch
from torch import Tensor

from ..transforms import next_power_of_two
from . import reference, tiles
from .dispatch import on_device_of, tl, triton, use_triton
from .reference import LayerNormWeights

LARGEST = 1024  # K
ENTRIES = 2048  # that a program of four warps holds, 16 a thread


@triton.jit
def _layer_norm_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    EPS: tl.constexpr,
):
    """x, out: (tokens, SIZE), both contiguous. This program does ROWS tokens."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    lane = tl.arange(0, WIDTH)[None, :]
    inside = (row < tokens) & (lane < SIZE)
    x = tl.load(x_ptr + row * SIZE + lane, mask=inside, other=0.0).to(tl.float32)
    mean, inverse = tiles.layer_norm_statistics(x, lane < SIZE, SIZE, EPS)
    weight = tl.load(weight_ptr + lane, mask=lane < SIZE, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + lane, mask=lane < SIZE, other=0.0).to(tl.float32)
    y = (x - mean) * inverse * weight + bias
    tl.store(out_ptr + row * SIZE + lane, y.to(out_ptr.dtype.element_ty), mask=inside)


def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    size = x.shape[-1]
    tokens, width = x.numel() // size, next_power_of_two(size)
    rows = max(1, ENTRIES // width)
    with on_device_of(x):
        _layer_norm_kernel[(triton.cdiv(tokens, rows),)](
            x,
            weight.contiguous(),
            bias.contiguous(),
            out,
            tokens,
            SIZE=size,
            WIDTH=width,
            ROWS=rows,
            EPS=eps,
        )
    return out


@torch.library.custom_op("compsrt::layer_norm", mutates_args=(), device_types=("cpu", "cuda"))
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _forward(x, weight, bias, eps)


@_layer_norm.register_fake
def _(x, weight, bias, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def layer_norm(x: Tensor, norm: LayerNormWeights) -> Tensor:
    """The layer norm of the last axis of x, in x's type.

    x: (..., K), any floating type and strides; norm: weight and bias, (K,), of any floating type, and
    eps. PyTorch's own runs where a gradient is wanted, under `torch.compile`, which fuses it with what
    surrounds it, and for more than 1024 channels. Raises ValueError for weights of another size or device.
    """
    for name, vector in (("weight", norm.weight), ("bias", norm.bias)):
        if vector.shape != x.shape[-1:]:
            raise ValueError(
                f"{name}: its shape is {tuple(vector.shape)}; x of {tuple(x.shape)} needs"
                f" {tuple(x.shape[-1:])}"
            )
        if vector.device != x.device:
            raise ValueError(f"{name}: it is on {vector.device}; move it to x's {x.device}")
    gradients = torch.is_grad_enabled() and any(
        t.requires_grad for t in (x, norm.weight, norm.bias)
    )
    others = gradients or torch.compiler.is_compiling() or x.shape[-1] > LARGEST
    if others or not use_triton(x):
        return reference.layer_norm(x, norm)
    return _layer_norm(x, *norm)


def examples():
    """Calls that `aot.py` compiles the kernel of."""
    for dtype in (torch.float32, torch.bfloat16):
        x, vector = torch.empty(1, 184, 320, 60, dtype=dtype), torch.empty(60)
        label = str(dtype).removeprefix("torch.")
        yield label, lambda x=x, vector=vector: _forward(x, vector, vector, 1e-5)
