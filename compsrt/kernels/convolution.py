"""Convolutions of a token grid at inference, one launch with what surrounds them.

    y = leaky_relu(conv(x - mean, weight) + bias, slope) + residual
    out = depth_to_space(y, shuffle) + offset                                all but conv optional

x: (B, H, W, K); weight: (N, K, k, k); y: (B, H, W, N); zeros outside the grid, after the mean is
subtracted. An implicit matrix product: a program takes a rectangle of tokens and some of the N
channels, and adds up over the k^2 taps the product of the shifted rectangle, read anew (from the
first-level cache but for its rim), with the tap's (K, N) slice of the weight.

Range and precision. SwinIR's residual stream outgrows float16, so float32 tokens do not become
that. A product on tensor cores takes bfloat16, which has the range of float32 and 8 bits; a
float32 operand enters as two of them, t = high + low, the first cut off, which is faster than
rounding, and the product of the two low parts is left out:

    x w = x_high w_high + x_high w_low + x_low w_high

Where an operand is exact in bfloat16 (int8 codes, bfloat16 tokens and weights) it has no low part.
Where `allow_tf32` says so and tensor cores know it, a float32 operand enters as TF32 instead, which
has the range of float32 too and 11 bits, as many as float16: one product, and nothing to be split.
Tensor cores cut off what TF32 does not hold, always towards zero. A weight is rounded before; the
tokens, whose bits go straight to shared memory, are cut off, and the sum is made larger by what that
takes on average, `OF_CUTTING`. Relative error of sums of 540 products of normal numbers, root of the
mean square, each way of rounding emulated on a CPU against float64:

    float32 2.4e-7    as above 1.3e-5    float16 operands 2.9e-4    TF32 as above 3.0e-4

Half tokens whose result is half too are multiplied in their own type.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..transforms import next_power_of_two
from . import reference, tiles
from .dispatch import capability, on_device_of, tl, triton, use_triton
from .reference.convolution import check_convolution

# The bits of a float32 that TF32 does not hold, and half of the last one that it does.
BEYOND_TF32 = tl.constexpr(0x1FFF)
HALF_OF_TF32 = tl.constexpr(0x1000)
# A cut takes 2^-11 of the power of two below a number on average, which is 1/(2 ln 2) of the number
# where all sizes are alike. It is for devices that cut; one that rounded would be off by so much.
OF_CUTTING = tl.constexpr(2.0**-11 * 0.7213475204444817)


class Extras(NamedTuple):
    """The tensors beside x and weight (their pointers in the kernel), None for what is not wanted."""

    bias: Any = None  # (N,)
    scale: Any = None  # (N,)
    mean: Any = None  # (K,)
    residual: Any = None  # (B, H, W, N)
    offset: Any = None  # (N / shuffle^2,)


class Constants(NamedTuple):
    """What the kernel is compiled for; sizes of tiles are powers of two."""

    size: int  # K
    out: int  # N
    side: int  # k
    shuffle: int
    down: int  # tokens of a program
    across: int
    depth: int  # tile sizes: of K at a time,
    block: int  # of N in a program
    stride: int  # of x from one token to the next in a row
    stride_n: int  # of the weight
    stride_k: int
    stride_down: int
    stride_across: int
    wide: bool  # products as exact as the module says for float32
    tf32: bool  # of that type
    split_x: bool  # has a part beyond the narrower type
    split_weight: bool
    slope: float


# --- Tile code -----------------------------------------------------------------------------------


@triton.jit
def _dot(a, b, total):
    """total + a b in float32. Under the interpreter, whose product of bf16 tiles is wrong, too."""
    if tiles.INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total)


@triton.jit
def _high(t, TYPE: tl.constexpr, SPLIT: tl.constexpr):
    """A float32 tile in a half type; cut off, where the rest follows."""
    if SPLIT:
        y = tiles.leading(t)
    else:
        y = t.to(TYPE)
    return y


@triton.jit
def _low(t, high, TYPE: tl.constexpr):
    """What a float32 tile has beyond its high part."""
    return (t - high.to(tl.float32)).to(TYPE)


@triton.jit
def _cut(t):
    """What tensor cores take of a float32 tile as TF32. On a device they do that themselves."""
    if tiles.INTERPRETED:
        bits = t.to(tl.int32, bitcast=True)
        t = (bits - (bits & BEYOND_TF32)).to(tl.float32, bitcast=True)
    return t


@triton.jit
def _rounded(t):
    """A tile in float32 of which `_cut` leaves the nearest that TF32 holds."""
    if t.dtype == tl.float32:
        t = (t.to(tl.int32, bitcast=True) + HALF_OF_TF32).to(tl.float32, bitcast=True)
    else:
        t = t.to(tl.float32)
    return t


@triton.jit
def _multiply(x, weight, total, TYPE: tl.constexpr, C: tl.constexpr):
    """total + x weight^T. x: (ROWS, DEPTH), weight: (BLOCK, DEPTH)."""
    if C.tf32:
        weight = tl.trans(_cut(_rounded(weight)))
        total = tl.dot(_cut(x.to(tl.float32)), weight, total, input_precision="tf32")
    else:
        x, weight = x.to(tl.float32), weight.to(tl.float32)
        x_high, weight_high = _high(x, TYPE, C.split_x), _high(weight, TYPE, C.split_weight)
        if C.split_x:
            total = _dot(_low(x, x_high, TYPE), tl.trans(weight_high), total)
        if C.split_weight:
            total = _dot(x_high, tl.trans(_low(weight, weight_high, TYPE)), total)
        total = _dot(x_high, tl.trans(weight_high), total)
    return total


@triton.jit
def _load_vector(ptr, k, SIZE: tl.constexpr):
    """Entries k of a vector in float32, 0 from SIZE on."""
    return tl.load(ptr + k, mask=k < SIZE, other=0.0).to(tl.float32)


@triton.jit
def _within(i, end):
    """Whether 0 <= i < end, in one comparison."""
    return i.to(tl.uint32) < tl.cast(end, tl.uint32)  # an end of 1 is no tensor


# --- Kernel --------------------------------------------------------------------------------------


@triton.jit
def _convolve_kernel(
    x_ptr, weight_ptr, out_ptr, extras, height, width, stride_b, stride_y, stride_k, C: tl.constexpr
):
    """x: (B, H, W, K) by strides; weight: (N, K, k, k) by strides; out: (B, H, W, N) or, shuffled,
    (B, N / shuffle^2, shuffle H, shuffle W). This program does `down` by `across` tokens."""
    ROWS: tl.constexpr = C.down * C.across
    BLOCK: tl.constexpr = C.block
    REACH: tl.constexpr = C.side // 2
    TYPE: tl.constexpr = tl.bfloat16 if C.wide else x_ptr.dtype.element_ty
    tile = tl.program_id(0)
    columns = tl.cdiv(width, C.across)
    rows = tl.cdiv(height, C.down)
    b = (tile // (columns * rows)).to(tl.int64)
    token = tl.arange(0, ROWS)[:, None]
    y = tile // columns % rows * C.down + token // C.across
    x = tile % columns * C.across + token % C.across
    n = tl.program_id(1) * C.block + tl.arange(0, C.block)
    lane = tl.arange(0, C.depth)[None, :]
    # What the loops move are these by a whole number each, not every entry by its own.
    at = x_ptr + b * stride_b + y.to(tl.int64) * stride_y + x.to(tl.int64) * C.stride
    step = tl.cast(stride_k, tl.int64)
    at += lane * step
    at_weight = weight_ptr + n[:, None] * C.stride_n + lane * C.stride_k
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for tap in tl.range(0, C.side * C.side):
        down = tap // C.side - REACH
        across = tap % C.side - REACH
        inside = _within(y + down, height) & _within(x + across, width)
        to_tap = down.to(tl.int64) * stride_y + across * C.stride
        to_weight = tap // C.side * C.stride_down + tap % C.side * C.stride_across
        for first in tl.range(0, C.size, C.depth):
            there = inside & (lane < C.size - first)
            tokens = tl.load(at + (to_tap + first * step), mask=there, other=0.0)
            if extras.mean is not None:
                tokens = tokens.to(tl.float32) - _load_vector(extras.mean, first + lane, C.size)
                tokens = tl.where(there, tokens, 0.0)
            weight = tl.load(
                at_weight + (to_weight + first * C.stride_k),
                mask=(n[:, None] < C.out) & (lane < C.size - first),
                other=0,
            )
            total = _multiply(tokens, weight, total, TYPE, C)
    n = n[None, :]
    if C.tf32 and C.split_x:
        total *= 1 + OF_CUTTING
    if extras.scale is not None:
        total *= _load_vector(extras.scale, n, C.out)
    if extras.bias is not None:
        total += _load_vector(extras.bias, n, C.out)
    if C.slope != 1.0:
        total = tl.where(total < 0, total * C.slope, total)
    inside = (y < height) & (x < width) & (n < C.out)
    picture = b * height
    if extras.residual is not None:
        to = ((picture + y) * width + x) * C.out + n
        total += tl.load(extras.residual + to, mask=inside, other=0.0).to(tl.float32)
    AREA: tl.constexpr = C.shuffle * C.shuffle
    if extras.offset is not None:
        total += tl.load(extras.offset + n // AREA, mask=n < C.out, other=0.0).to(tl.float32)
    if C.shuffle == 1:
        to = ((picture + y) * width + x) * C.out + n
    else:
        columns = width * C.shuffle
        channel = b * (C.out // AREA) + n // AREA
        to = (channel * height * C.shuffle + n % AREA // C.shuffle) * columns + n % C.shuffle
        to += (y * C.shuffle).to(tl.int64) * columns + x * C.shuffle
    tl.store(out_ptr + to, total.to(out_ptr.dtype.element_ty), mask=inside)


# --- Host ----------------------------------------------------------------------------------------


def _shape(x: Tensor, weight: Tensor, shuffle: int) -> tuple[int, int, int, int]:
    """Of the result."""
    b, height, width, _ = x.shape
    n = len(weight)
    if shuffle == 1:
        return b, height, width, n
    return b, n // shuffle**2, shuffle * height, shuffle * width


def _constants(
    x: Tensor,
    weight: Tensor,
    extras: Extras,
    slope: float,
    shuffle: int,
    dtype: torch.dtype,
    allow_tf32: bool,
) -> Constants:
    n, k, side, _ = weight.shape
    wide = torch.promote_types(x.dtype, dtype) == torch.float32
    tf32 = wide and allow_tf32 and (capability(x.device) or 0) >= 8
    width, block = (max(16, next_power_of_two(size)) for size in (k, n))
    narrow = (torch.bfloat16, torch.float16) if tf32 else (torch.bfloat16,)
    exact = extras.mean is None and x.dtype in narrow
    # With these sizes and 8 warps nothing spills on any target of aot.py, and sm_80 has twice the
    # occupancy that 64 channels at a time leave it for two parts of float32.
    return Constants(
        size=k,
        out=n,
        side=side,
        shuffle=shuffle,
        down=8,
        across=16,
        depth=min(width, 32 if wide and not tf32 else 64),
        block=min(block, 64),
        stride=x.stride(2),
        stride_n=weight.stride(0),
        stride_k=weight.stride(1),
        stride_down=weight.stride(2),
        stride_across=weight.stride(3),
        wide=wide,
        tf32=tf32,
        split_x=wide and not exact,
        split_weight=wide and weight.dtype not in (torch.bfloat16, torch.int8),
        slope=slope,
    )


def _forward(
    x: Tensor,
    weight: Tensor,
    extras: Extras,
    slope: float,
    shuffle: int,
    dtype: torch.dtype,
    allow_tf32: bool,
) -> Tensor:
    out = x.new_empty(_shape(x, weight, shuffle), dtype=dtype)
    if out.numel() == 0:
        return out
    extras = Extras(*(t if t is None else t.contiguous() for t in extras))
    c = _constants(x, weight, extras, slope, shuffle, dtype, allow_tf32)
    b, height, width, _ = x.shape
    tokens = b * triton.cdiv(height, c.down) * triton.cdiv(width, c.across)
    with on_device_of(x):
        _convolve_kernel[(tokens, triton.cdiv(c.out, c.block))](
            x,
            weight,
            out,
            extras,
            height,
            width,
            x.stride(0),
            x.stride(1),
            x.stride(3),
            C=c,
            num_warps=8,
            num_stages=1,  # loads that are not pipelined go through the first-level cache
        )
    return out


# --- Operator ------------------------------------------------------------------------------------


@torch.library.custom_op("compsrt::convolve", mutates_args=(), device_types=("cpu", "cuda"))
def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    mean: Tensor | None,
    residual: Tensor | None,
    offset: Tensor | None,
    slope: float,
    shuffle: int,
    dtype: torch.dtype,
    allow_tf32: bool,
) -> Tensor:
    extras = Extras(bias, scale, mean, residual, offset)
    return _forward(x, weight, extras, slope, shuffle, dtype, allow_tf32)


@_convolve.register_fake
def _(x, weight, *rest):
    *_, shuffle, dtype, _ = rest
    return x.new_empty(_shape(x, weight, shuffle), dtype=dtype)


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
    """leaky_relu(conv(x - mean, weight) + bias, slope) + residual, as tokens or as a picture.

    x: (B, H, W, K), float32, float16 or bfloat16 (float64 by the reference), of any strides: a
    picture (B, K, H, W) comes as `picture.permute(0, 2, 3, 1)`. weight: (N, K, k, k), k odd,
    floating, or int8 codes with `scale` (N,); it is read where it lies, fastest in channels-last
    memory format. bias: (N,). mean: (K,), subtracted from x before it is padded with zeros by
    k // 2. slope: of a leaky ReLU; None for none. residual: (B, H, W, N), of any floating type.

    Returns (B, H, W, N) or, with shuffle = r > 1, what `F.pixel_shuffle` makes of it, (B, N / r^2,
    r H, r W), contiguous both; offset (N / r^2,) is added to it last. dtype: of the result, x's by
    default; where it is float32, the products are as exact as for float32 tokens. allow_tf32: those
    may be of operands rounded to TF32, 11 bits, where tensor cores have that, which is faster.

    For inference: where a gradient is wanted, of any argument and on any device, the reference
    runs, which has them. Raises ValueError for arguments that do not fit.
    """
    options: Any = {"scale": scale, "mean": mean, "residual": residual}
    options |= {"shuffle": shuffle, "offset": offset, "dtype": dtype}
    extras = Extras(bias, scale, mean, residual, offset)
    gradients = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, *extras)
    )
    wanted = x.dtype if dtype is None else dtype
    if gradients or torch.float64 in (weight.dtype, wanted) or not use_triton(x):
        return reference.convolve(x, weight, bias, slope=slope, **options)
    check_convolution(x, weight, bias, **options)
    slope = 1.0 if slope is None else slope
    return _convolve(x, weight, *extras, slope, shuffle, wanted, allow_tf32)


def examples():
    """Calls that `aot.py` compiles the kernel of: the convolutions of SwinIR-light."""
    for dtype, tf32 in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
        for name, size, out, shuffle in (
            ("first", 3, 60, 1),
            ("single token", 60, 60, 1),
            ("layer", 60, 60, 1),
            ("layer int8", 60, 60, 1),
            ("wide layer", 180, 180, 1),
            ("x4", 60, 48, 4),
            ("x2", 60, 12, 2),
        ):
            height, width = (1, 1) if name == "single token" else (184, 320)  # 1 is no tensor
            x = torch.empty(1, height, width, size, dtype=dtype)
            weight = torch.empty(out, size, 3, 3).to(memory_format=torch.channels_last)
            extras = Extras(bias=torch.empty(out))
            if name == "first":
                x = torch.empty(1, size, 184, 320).permute(0, 2, 3, 1)
                extras = extras._replace(mean=torch.empty(size))
            elif shuffle == 1:
                extras = extras._replace(residual=torch.empty(1, height, width, out, dtype=dtype))
            else:
                extras = extras._replace(offset=torch.empty(3))
            if name == "layer int8":
                weight = weight.to(torch.int8)
                extras = extras._replace(scale=torch.empty(out))
            target = torch.float32 if shuffle > 1 else dtype
            arguments = x, weight, extras, 1.0, shuffle, target, tf32
            label = "tf32" if tf32 else str(dtype).removeprefix("torch.")
            left_out = {"hip:gfx942": None} if tf32 else {}  # which has none: the same as float32
            yield f"{label} {name}", lambda a=arguments: _forward(*a), left_out
