"""What the kernels of `linear_kernels.py` and `mlp.py` share: a layer's tensors, sizes and tile code.

A kernel gets a Layer of pointers and its Constants; a tile function takes what it needs from them.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..transforms import next_power_of_two
from . import tiles
from .dispatch import tl, triton

LARGEST = 128  # K and K'
# The forms of a weight.
FLOATS = tl.constexpr(0)
CODES = tl.constexpr(1)
PACKED = tl.constexpr(2)
PACKED_2_4 = tl.constexpr(3)


class Layer(NamedTuple):
    """The tensors of a layer (their pointers in a kernel), None for what it lacks."""

    norm_weight: Any = None  # (K,)
    norm_bias: Any = None  # (K,)
    rotation: Any = None  # (K, K')
    lower: Any = None  # of the operand's quantizer: one value each
    upper: Any = None
    alpha: Any = None
    beta: Any = None
    weight: Any = None  # (N, K') or packed (N, bytes)
    weight_lower: Any = None  # of the weight's: one value each, or N
    weight_upper: Any = None
    weight_alpha: Any = None
    weight_beta: Any = None
    mask: Any = None  # (N, K') of bytes or packed (N, bytes)
    bias: Any = None  # (N,)


class Rules(NamedTuple):
    """What else defines a layer, in whole numbers for the sake of operators' schemas."""

    bits: int  # 0: the operand is not quantized
    clamped: int
    weight_bits: int
    weight_clamped: int
    form: int
    order: int  # K'
    gelu: int


class Constants(NamedTuple):
    """What the kernels of one layer are compiled for; sizes of tiles are powers of two."""

    bits: int  # these seven: Rules, since a kernel's constants do not nest
    clamped: int
    weight_bits: int
    weight_clamped: int
    form: int
    order: int
    gelu: int
    stride: int  # from one row of x to the next
    size: int  # K
    out: int  # N
    width_in: int  # tile sizes: K, K'
    width: int
    depth: int  # of K at a time
    chunk: int  # of N at a time
    block: int  # of N that a program of the weight's gradient takes
    rows: int
    eps: float
    channels: bool  # the weight has a scale for each of N
    value_bytes: int  # of a row of a packed weight
    mask_bytes: int


# --- Tile code -----------------------------------------------------------------------------------


@triton.jit
def _load_codes(stream_ptr, row, column, inside, BITS: tl.constexpr, BYTES: tl.constexpr):
    """Codes of so many bits from rows of BYTES bytes, in the order of `packing.py`."""
    bit = column * BITS
    byte = bit // 8
    at = stream_ptr + row * BYTES + byte
    low = tl.load(at, mask=inside, other=0).to(tl.int32)
    high = tl.load(at + 1, mask=inside & (byte + 1 < BYTES), other=0).to(tl.int32)
    return (((high << 8) | low) >> (bit % 8)) & ((1 << BITS) - 1)


@triton.jit
def load_weight(layer, first, COUNT: tl.constexpr, C: tl.constexpr):
    """Rows first to first + COUNT of W^, (COUNT, WIDTH) in float32; 0 where pruned and outside."""
    n = first + tl.arange(0, COUNT)[:, None]
    k = tl.arange(0, C.width)[None, :]
    inside = (n < C.out) & (k < C.order)
    scalars = (layer.weight_lower, layer.weight_upper, layer.weight_alpha, layer.weight_beta)
    row = tl.minimum(n, C.out - 1) if C.channels else 0
    BITS: tl.constexpr = C.weight_bits
    quantizer = tiles.load_quantizer(scalars, row, BITS, C.weight_clamped)
    at = n * C.order + k
    kept = inside
    if C.form == FLOATS:
        values = tl.load(layer.weight + at, mask=inside, other=0.0).to(tl.float32)
        weight = tiles.fake_quantize(values, quantizer)
    else:
        if C.form == CODES:
            codes = tl.load(layer.weight + at, mask=inside, other=0)
        elif C.form == PACKED:
            codes = _load_codes(layer.weight, n, k, inside, BITS, C.value_bytes)
        else:
            places = _load_codes(layer.mask, n, k // 4, inside, 4, C.mask_bytes)
            second = (places >> 2) == k % 4
            kept = inside & (((places & 3) == k % 4) | second)
            number = 2 * (k // 4) + second.to(tl.int32)
            codes = _load_codes(layer.weight, n, number, kept, BITS, C.value_bytes)
        weight = codes.to(tl.float32) * quantizer.scale + quantizer.zero
    if layer.mask is not None and C.form != PACKED_2_4:
        if C.form == PACKED:
            kept = _load_codes(layer.mask, n, k, inside, 1, C.mask_bytes) != 0
        else:
            kept = tl.load(layer.mask + at, mask=inside, other=0) != 0
    return tl.where(kept, weight, 0.0)


@triton.jit
def load_rotation(layer, first, DEPTH: tl.constexpr, C: tl.constexpr):
    """Rows first to first + DEPTH of R, (DEPTH, WIDTH); without one, of the identity."""
    row = first + tl.arange(0, DEPTH)[:, None]
    column = tl.arange(0, C.width)[None, :]
    if layer.rotation is None:
        rotation = tl.where((row == column) & (column < C.order), 1.0, 0.0)
    else:
        inside = (row < C.size) & (column < C.order)
        rotation = tl.load(layer.rotation + row * C.order + column, mask=inside, other=0.0)
    return rotation


@triton.jit
def load_vector(vector_ptr, first, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """Entries first to first + COUNT, (1, COUNT) in float32, 0 from SIZE on."""
    k = first + tl.arange(0, COUNT)[None, :]
    return tl.load(vector_ptr + k, mask=k < SIZE, other=0.0).to(tl.float32)


@triton.jit
def load_rows(x_ptr, first, rows, COUNT: tl.constexpr, SIZE: tl.constexpr, C: tl.constexpr):
    """Columns first to first + COUNT of rows of SIZE entries, (ROWS, COUNT), 0 outside."""
    row = tl.arange(0, C.rows)[:, None]
    k = first + tl.arange(0, COUNT)[None, :]
    return tl.load(x_ptr + row * SIZE + k, mask=(row < rows) & (k < SIZE), other=0.0)


@triton.jit
def _load_x(x_ptr, layer, mean, inverse, first, rows, COUNT: tl.constexpr, C: tl.constexpr):
    """Columns first to first + COUNT of h, (ROWS, COUNT), in x's type."""
    row = tl.arange(0, C.rows)[:, None]
    k = first + tl.arange(0, COUNT)[None, :]
    x = tl.load(x_ptr + row * C.stride + k, mask=(row < rows) & (k < C.size), other=0.0)
    if layer.norm_weight is not None:
        weight = load_vector(layer.norm_weight, first, COUNT, C.size)
        bias = load_vector(layer.norm_bias, first, COUNT, C.size)
        x = ((x.to(tl.float32) - mean) * inverse * weight + bias).to(x.dtype)
    return x


@triton.jit
def load_operand(x_ptr, layer, rows, C: tl.constexpr):
    """v (ROWS, WIDTH) in float32 of the rows that x_ptr points to; mean and 1/sigma (ROWS, 1)."""
    ROWS: tl.constexpr = C.rows  # a shape takes no bare number, which is what C.rows is here
    WIDTH: tl.constexpr = C.width
    mean = tl.zeros((ROWS, 1), tl.float32)
    inverse = tl.zeros((ROWS, 1), tl.float32)
    if layer.norm_weight is not None:
        row = tl.arange(0, C.rows)[:, None]
        k = tl.arange(0, C.width_in)[None, :]
        x = tl.load(x_ptr + row * C.stride + k, mask=(row < rows) & (k < C.size), other=0.0)
        mean, inverse = tiles.layer_norm_statistics(x.to(tl.float32), k < C.size, C.size, C.eps)
    if layer.rotation is None:
        v = _load_x(x_ptr, layer, mean, inverse, 0, rows, C.width, C).to(tl.float32)
    else:
        v = tl.zeros((ROWS, WIDTH), tl.float32)
        for first in tl.range(0, C.width_in, C.depth):
            h = _load_x(x_ptr, layer, mean, inverse, first, rows, C.depth, C)
            rotation = load_rotation(layer, first, C.depth, C)
            v = tiles.dot(h, rotation.to(h.dtype), v)
    return v, mean, inverse


@triton.jit
def load_quantizer(layer, C: tl.constexpr):
    """The quantizer of the operand."""
    scalars = (layer.lower, layer.upper, layer.alpha, layer.beta)
    return tiles.load_quantizer(scalars, 0, C.bits, C.clamped)


@triton.jit
def quantize_operand(v, layer, C: tl.constexpr):
    """x^ of a tile v, both in float32. Columns beyond K' need not be 0, but those of W^ are."""
    if C.bits != 0:
        v = tiles.fake_quantize(v, load_quantizer(layer, C))
    return v


@triton.jit
def multiply(x, weight, layer, first, COUNT: tl.constexpr, C: tl.constexpr):
    """z (ROWS, COUNT) in float32 from x^ and the weight's rows from `first` on, both of x's type."""
    ROWS: tl.constexpr = C.rows
    z = tl.zeros((ROWS, COUNT), tl.float32)
    if layer.bias is not None:
        z += load_vector(layer.bias, first, COUNT, C.out)
    return tiles.dot(x, tl.trans(weight), z)


# --- Host ----------------------------------------------------------------------------------------


def constants(x: Tensor, layer: Layer, rules: Rules, eps: float, *, again: bool) -> Constants:
    """Of a layer whose x is (rows, K), to compute it, or to compute it again for the backward."""
    size, out = x.shape[1], len(layer.weight)
    width_in, width = (max(16, next_power_of_two(n)) for n in (size, rules.order))
    half = x.element_size() == 2
    # Sizes with which (nearly) no register spills on any target of aot.py; their speed is not
    # measured yet. Float32 has 32 rows in the forward too: 64 of 128 entries would need more tensor
    # memory than sm_100 has.
    rows = 64 if half and not again else 32
    if again and rules.gelu and width == LARGEST:
        rows = 16
    return Constants(
        *rules,
        stride=x.stride(0),
        size=size,
        out=out,
        width_in=width_in,
        width=width,
        depth=min(width_in, 32 if half else 16),
        chunk=min(max(16, next_power_of_two(out)), 32 if half else 16),
        block=min(max(16, next_power_of_two(out)), 64 if half else 32),
        rows=rows,
        eps=eps,
        channels=layer.weight_lower.numel() > 1,
        value_bytes=layer.weight.shape[1],
        mask_bytes=0 if layer.mask is None else layer.mask.shape[1],
    )


def as_rows(x: Tensor) -> Tensor:
    """(..., K) -> (rows, K), a view where there is one whose rows are contiguous."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def for_kernels(layer: Layer) -> Layer:
    """The layer as the kernels read it: contiguous, the mask in bytes."""
    layer = Layer(*(t if t is None else t.contiguous() for t in layer))
    return layer if layer.mask is None else layer._replace(mask=layer.mask.view(torch.uint8))
