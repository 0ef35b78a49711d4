"""Convolutions of a token grid at inference, with what surrounds them, in plain PyTorch.

    y = leaky_relu(conv(x - mean, weight) + bias, slope) + residual
    out = depth_to_space(y, shuffle) + offset                                all but conv optional

Tokens (B, H, W, K) are a picture in channels-last order, which PyTorch convolves without a copy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def check_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    mean: Tensor | None = None,
    residual: Tensor | None = None,
    shuffle: int = 1,
    offset: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise ValueError unless the arguments of `convolve` fit each other."""
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(
            f"x: {x.dtype} of shape {tuple(x.shape)} is no token grid; floats (B, H, W, K) are needed"
        )
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3] or weight.shape[2] % 2 == 0:
        raise ValueError(
            f"weight: its shape is {tuple(weight.shape)}; it needs (N, K, k, k) with an odd k"
        )
    n, k = weight.shape[:2]
    if k != x.shape[3]:
        raise ValueError(f"weight: it takes {k} channels; x has {x.shape[3]}")
    if weight.dtype == torch.int8 and scale is None:
        raise ValueError("scale: codes need one, (N,); or pass a floating weight")
    if weight.is_floating_point() and scale is not None:
        raise ValueError(f"scale: a weight of {weight.dtype} has none; pass int8 codes or no scale")
    if weight.dtype != torch.int8 and not weight.is_floating_point():
        raise ValueError(f"weight: {weight.dtype} is neither floating nor int8 codes")
    if shuffle < 1 or n % shuffle**2:
        raise ValueError(f"shuffle: {n} channels are not a multiple of {shuffle}^2")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype: {dtype} is not floating")
    wanted = {
        "bias": (bias, (n,)),
        "scale": (scale, (n,)),
        "mean": (mean, (k,)),
        "residual": (residual, (*x.shape[:3], n)),
        "offset": (offset, (n // shuffle**2,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: its shape is {tuple(tensor.shape)}; it needs {shape}")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: it is on {tensor.device}; move it to x's {x.device}")
    if weight.device != x.device:
        raise ValueError(f"weight: it is on {weight.device}; move it to x's {x.device}")


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    mean: Tensor | None = None,
    slope: float | None = None,
    residual: Tensor | None = None,
    shuffle: int = 1,
    offset: Tensor | None = None,
    dtype: torch.dtype | None = None,
    allow_tf32: bool = False,
) -> Tensor:
    """The definition of `kernels.convolve`, which see; with gradients, float64 too.

    allow_tf32 changes nothing here: PyTorch's own switch for CUDA devices holds.
    """
    check_convolution(
        x,
        weight,
        bias,
        scale=scale,
        mean=mean,
        residual=residual,
        shuffle=shuffle,
        offset=offset,
        dtype=dtype,
    )
    dtype = x.dtype if dtype is None else dtype
    wide = torch.promote_types(x.dtype, dtype)
    x, weight = x.to(wide), weight.to(wide)
    if scale is not None:
        weight = weight * scale.to(wide)[:, None, None, None]
    if mean is not None:
        x = x - mean.to(wide)
    picture = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.to(wide)
    y = F.conv2d(picture, weight, bias, padding=weight.shape[2] // 2)
    if slope is not None:
        y = F.leaky_relu(y, slope)
    if residual is not None:
        y = y + residual.permute(0, 3, 1, 2)
    if shuffle > 1:
        y = F.pixel_shuffle(y, shuffle)
    if offset is not None:
        y = y + offset.to(wide)[:, None, None]
    y = y.to(dtype)
    return (y if shuffle > 1 else y.permute(0, 2, 3, 1)).contiguous()
