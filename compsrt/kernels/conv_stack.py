"""A whole small convolutional network in one launch: a collapsed SESR, one channel in and out.

    y0 = act(conv5x5(x))    yi = act(conv3x3(y(i-1))), i = 1 .. M    out = pixels(conv5x5(yM + y0) + x)

x: (B, 1, H, W); y: F channels; zeros around every picture; act: PReLU, a slope a channel (0: ReLU);
pixels: the S^2 channels become S x S pixels by pixel shuffles of 2, for S = 4 one after another.
Source: Bhardwaj et al., MLSys 2022, whose short residuals are in the 3x3 kernels already.

Layer by layer the features go to memory and back M + 1 times; for a picture of 1920 x 1080 and F = 16
in half precision that is 66 MB a time. Here a program takes a tile of ROWS x (WIDTH - 2 (M + 2)) pixels
and computes all that the tile depends on: y0 with M + 2 rows more on each side, and every next layer
with one row less (halo recomputation), always over the full WIDTH, whose outer columns are wrong by
then and are not used. So programs need nothing of each other. Triton cannot shift a tile that is in
registers, so a program keeps its features in a scratch of its own in global memory, (3, rows, WIDTH,
F): y0, and two that take turns. A barrier of the program separates layers. There are PROGRAMS programs
for each processor, which go on from tile to tile with the same scratch; all of them together hold 49 MB
for M5 on 132 processors, about the second-level cache. Some rows of a tile are a product for each of
the 9 or 25 taps, (PIXELS, F) by (F, F), read shifted from the scratch. For M5 the halo costs 1.9 times
the multiply-adds. A launch a layer, the other way that compiles, moves 0.9 GB for that picture.

Inference in half precision only; all else is composed of PyTorch's convolutions. So is everything on
AMD, where the kernel compiles, but the barrier that Triton 3.7 makes waits for shared memory alone and
not for what went to global memory. In float32 the products of three bf16 pieces spill registers.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

import torch
from torch import Tensor

from . import reference, tiles
from .dispatch import on_device_of, processors, tl, triton, use_triton
from .reference import ConvStack
from .reference.conv_stack import check_stack

# Rows of a tile, pixels of a product, programs of a processor. Compiled without spills; their speed is
# not measured yet. Products of 256 pixels end in a trap on sm_100.
ROWS, PIXELS, PROGRAMS = 16, 128, 2
LARGEST_HALO = 32  # of columns on each side: half of the largest WIDTH is left
LARGEST_FEATURES = 64
HALF_TYPES = (torch.float16, torch.bfloat16)


# --- Kernel --------------------------------------------------------------------------------------


@triton.jit
def _first_layer(x_ptr, first_ptr, y, x, height, width, F: tl.constexpr, CHANNELS: tl.constexpr):
    """Products of the 5x5 convolution of x (H, W) at the pixels (y, x), (PIXELS,) -> (PIXELS, CHANNELS)."""
    tap = tl.arange(0, 32)  # 25 of them
    channel = tl.arange(0, CHANNELS)
    weight = tl.load(
        first_ptr + channel[None, :] * 25 + tap[:, None],
        mask=(tap[:, None] < 25) & (channel[None, :] < F),
        other=0.0,
    )
    y = y[:, None] + (tap // 5 - 2)[None, :]
    x = x[:, None] + (tap % 5 - 2)[None, :]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & (tap < 25)[None, :]
    pixels = tl.load(x_ptr + y * width + x, mask=inside, other=0.0)
    total = tl.zeros((y.shape[0], CHANNELS), tl.float32)
    return tiles.dot(pixels, weight.to(pixels.dtype), total)


@triton.jit
def _next_layer(
    features_ptr,
    weight_ptr,
    row,
    column,
    out,
    SIDE: tl.constexpr,
    OUT: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    F: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Products of a SIDE x SIDE convolution of features (rows, WIDTH, CHANNELS) at (row, column).

    weight: (OUT, F, SIDE, SIDE). row, column: (PIXELS,); all rows around them exist, columns count as
    0 where there are none. Returns (PIXELS, OUT_CHANNELS).
    """
    channel = tl.arange(0, CHANNELS)
    known = (channel[:, None] < F) & (out[None, :] < OUT)
    weight_ptr += (out[None, :] * F + channel[:, None]) * (SIDE * SIDE)
    total = tl.zeros((row.shape[0], OUT_CHANNELS), tl.float32)
    for tap in tl.static_range(SIDE * SIDE):
        weight = tl.load(weight_ptr + tap, mask=known, other=0.0)
        x = column + (tap % SIDE - SIDE // 2)
        place = (row + (tap // SIDE - SIDE // 2)) * WIDTH + x
        inside = (x >= 0) & (x < WIDTH)
        features = tl.load(
            features_ptr + place[:, None] * CHANNELS + channel[None, :],
            mask=inside[:, None],
            other=0.0,
        )
        total = tiles.dot(features, weight.to(features.dtype), total)
    return total


@triton.jit
def _activate(total, bias_ptr, slope_ptr, F: tl.constexpr, CHANNELS: tl.constexpr):
    """act(total + bias)"""
    channel = tl.arange(0, CHANNELS)
    bias = tl.load(bias_ptr + channel, mask=channel < F, other=0.0).to(tl.float32)
    slope = tl.load(slope_ptr + channel, mask=channel < F, other=0.0).to(tl.float32)
    total += bias[None, :]
    return tl.where(total > 0, total, total * slope[None, :])


@triton.jit
def _conv_stack_kernel(
    x_ptr,
    out_ptr,
    scratch_ptr,
    stack,
    pictures,
    height,
    width,
    F: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """x: (pictures, H, W); out: (pictures, S H, S W); scratch: (programs, 3, rows, WIDTH, CHANNELS);
    stack: pointers to the tensors of a ConvStack. This program does every tile whose number is its own
    modulo the number of programs. CHANNELS: F rounded up, the rest zeros.
    """
    HALO: tl.constexpr = BLOCKS + 2
    HIGH: tl.constexpr = ROWS + 2 * HALO
    COLUMNS: tl.constexpr = WIDTH - 2 * HALO
    SIZE: tl.constexpr = HIGH * WIDTH * CHANNELS
    CHUNK: tl.constexpr = PIXELS // WIDTH
    LAST: tl.constexpr = 16  # columns of the last product, SCALE^2 of them used
    pixel = tl.arange(0, PIXELS)
    channel = tl.arange(0, CHANNELS)
    column = pixel % WIDTH
    out = tl.arange(0, LAST)
    # Where the pixel of a channel is in its block: a shuffle by 2, for scale 4 of a shuffle by 2.
    down = (out % 4) // 2 if SCALE == 2 else 2 * ((out % 4) // 2) + out // 8
    right = out % 2 if SCALE == 2 else 2 * (out % 2) + (out // 4) % 2
    dtype = scratch_ptr.dtype.element_ty
    scratch_ptr += tl.program_id(0).to(tl.int64) * (3 * SIZE)
    across = tl.cdiv(width, COLUMNS)
    each = across * tl.cdiv(height, ROWS)
    for tile in tl.range(tl.program_id(0), pictures * each, tl.num_programs(0), num_stages=1):
        picture = (tile // each).to(tl.int64) * height * width
        top = (tile % each) // across * ROWS - HALO
        x = tile % across * COLUMNS - HALO + column
        in_width = (x >= 0) & (x < width)

        for first in tl.range(0, HIGH, CHUNK, num_stages=1):
            row = first + pixel // WIDTH
            y = top + row
            total = _first_layer(x_ptr + picture, stack[0], y, x, height, width, F, CHANNELS)
            total = _activate(total, stack[3], stack[4], F, CHANNELS)
            inside = in_width & (y >= 0) & (y < height)
            total = tl.where(inside[:, None], total, 0.0)
            place = (row * WIDTH + column)[:, None] * CHANNELS + channel[None, :]
            tl.store(scratch_ptr + place, total.to(dtype), mask=(row < HIGH)[:, None])
        tl.debug_barrier()

        for block in tl.range(0, BLOCKS, num_stages=1):
            features_ptr = scratch_ptr + tl.where(block == 0, 0, 1 + (block + 1) % 2) * SIZE
            next_ptr = scratch_ptr + (1 + block % 2) * SIZE
            end = HIGH - 1 - block
            for first in tl.range(block + 1, end, CHUNK, num_stages=1):
                row = first + pixel // WIDTH
                y = top + row
                total = _next_layer(
                    features_ptr, stack[1] + block * (F * F * 9), tl.minimum(row, end - 1), column,
                    channel, 3, F, CHANNELS, F, CHANNELS, WIDTH,
                )  # fmt: skip
                biases = (block + 1) * F
                total = _activate(total, stack[3] + biases, stack[4] + biases, F, CHANNELS)
                place = (row * WIDTH + column)[:, None] * CHANNELS + channel[None, :]
                known = (row < end)[:, None]
                if block == BLOCKS - 1:
                    total += tl.load(scratch_ptr + place, mask=known, other=0.0).to(tl.float32)
                inside = in_width & (y >= 0) & (y < height)
                total = tl.where(inside[:, None], total, 0.0)
                tl.store(next_ptr + place, total.to(dtype), mask=known)
            tl.debug_barrier()

        features_ptr = scratch_ptr + (1 + (BLOCKS - 1) % 2) * SIZE
        bias = tl.load(stack[5] + out, mask=out < SCALE * SCALE, other=0.0).to(tl.float32)
        for first in tl.range(HALO, HALO + ROWS, CHUNK, num_stages=1):
            row = first + pixel // WIDTH
            y = top + row
            total = _next_layer(
                features_ptr, stack[2], tl.minimum(row, HALO + ROWS - 1), column,
                out, 5, SCALE * SCALE, LAST, F, CHANNELS, WIDTH,
            )  # fmt: skip
            inside = in_width & (column >= HALO) & (column < WIDTH - HALO)
            inside &= (row < HALO + ROWS) & (y < height)
            total += bias[None, :]
            total += tl.load(x_ptr + picture + y * width + x, mask=inside, other=0.0)[:, None]
            place = (y * SCALE)[:, None] + down[None, :]
            place = place * (width * SCALE) + (x * SCALE)[:, None] + right[None, :]
            known = inside[:, None] & (out < SCALE * SCALE)[None, :]
            there = out_ptr + picture * (SCALE * SCALE) + place
            tl.store(there, total.to(out_ptr.dtype.element_ty), mask=known)
        tl.debug_barrier()  # before the next tile overwrites the scratch


# --- Host ----------------------------------------------------------------------------------------


def _enlarge(x: Tensor, stack: ConvStack) -> Tensor:
    pictures, _, height, width = x.shape
    scale = stack.scale
    out = x.new_empty((pictures, 1, height * scale, width * scale))
    if out.numel() == 0:
        return out
    blocks, features = stack.blocks.shape[:2]
    halo, channels = blocks + 2, max(16, triton.next_power_of_2(features))
    wide = 64 if halo <= 16 else 128
    count = pictures * triton.cdiv(height, ROWS) * triton.cdiv(width, wide - 2 * halo)
    programs = min(PROGRAMS * processors(x.device), count)
    scratch = x.new_empty((programs, 3, ROWS + 2 * halo, wide, channels))
    with on_device_of(x):
        _conv_stack_kernel[(programs,)](
            x.contiguous(),
            out,
            scratch,
            tuple(tensor.contiguous() for tensor in stack),
            pictures,
            height,
            width,
            F=features,
            CHANNELS=channels,
            BLOCKS=blocks,
            SCALE=scale,
            ROWS=ROWS,
            WIDTH=wide,
            PIXELS=PIXELS,
            num_warps=PIXELS // 32,
        )
    return out


# --- Operator ------------------------------------------------------------------------------------


@torch.library.custom_op("compsrt::conv_stack", mutates_args=(), device_types=("cpu", "cuda"))
def _conv_stack(x: Tensor, stack: list[Tensor]) -> Tensor:
    return _enlarge(x, ConvStack(*stack))


@_conv_stack.register_fake
def _(x, stack):
    scale = ConvStack(*stack).scale
    return x.new_empty((x.shape[0], 1, x.shape[2] * scale, x.shape[3] * scale))


def _fits(x: Tensor, stack: ConvStack) -> bool:
    """Whether the kernel is for this."""
    blocks, features = stack.blocks.shape[:2]
    small = features <= LARGEST_FEATURES and blocks + 2 <= LARGEST_HALO
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *stack))
    return small and not wanted and x.dtype in HALF_TYPES and not torch.version.hip


def enlarge_by_convolutions(x: Tensor, stack: ConvStack) -> Tensor:
    """A picture of one channel enlarged by a stack of convolutions.

    x: (B, 1, H, W), any type, the stack's tensors of the same one. Returns (B, 1, S H, S W). The kernel
    is for float16 and bfloat16, keeps features in x's type and sums in float32. What is of another type,
    wants gradients, has more than 64 features or 30 blocks, or runs on AMD is composed of PyTorch's
    convolutions. Raises ValueError for shapes that do not fit.
    """
    if not _fits(x, stack) or not use_triton(x):
        return reference.enlarge_by_convolutions(x, stack)
    check_stack(x, stack)
    return _conv_stack(x, list(stack))


def examples():
    """Calls that `aot.py` compiles the kernel of: SESR-M5 and XL x2 on 1920 x 1080."""
    for blocks, features in ((5, 16), (11, 32)):
        stack = ConvStack(
            torch.empty(features, 1, 5, 5, dtype=torch.float16),
            torch.empty(blocks, features, features, 3, 3, dtype=torch.float16),
            torch.empty(4, features, 5, 5, dtype=torch.float16),
            torch.empty(blocks + 1, features, dtype=torch.float16),
            torch.empty(blocks + 1, features, dtype=torch.float16),
            torch.empty(4, dtype=torch.float16),
        )
        x = torch.empty(1, 1, 1080, 1920, dtype=torch.float16)
        yield f"float16 {blocks} of {features}", lambda x=x, stack=stack: _enlarge(x, stack)
