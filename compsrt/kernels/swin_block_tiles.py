"""Tile code of `swin_block.py`: what a folded block does with the tokens a program holds.

Codes are tiles of the type that products of codes take: int8 where weights are codes, else the type
of the floating matrices. Lanes beyond an axis hold 0.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

from typing import NamedTuple

from . import tiles
from .dispatch import tl, triton


class Constants(NamedTuple):
    """What a kernel is compiled for; the widths of tiles are powers of two."""

    heads: int
    window: int
    shift: int
    size: int  # C
    inner: int  # heads * d
    hidden: int
    d: int
    width: int  # tile sizes: of C, heads * d, a head, hidden
    width_inner: int
    width_head: int
    width_hidden: int  # of the rotated hidden tokens that are made at a time
    rows: int  # tokens of a program
    slice: int  # coefficients of the rotated probabilities at a time
    chunk: int  # of hidden channels at a time
    integer: bool
    shared: bool  # all heads have the grids of the first
    eps1: float
    eps2: float


@triton.jit
def to_codes(t, low, high, inside, TYPE):
    """The codes of a tile t in float32, 0 outside."""
    codes = tiles.round_half_even(tiles.clamp(t, low, high))
    return tl.where(inside, codes, 0.0).to(TYPE)


@triton.jit
def load_vector(ptr, first, COUNT: tl.constexpr, end):
    """Entries first to first + COUNT, (1, COUNT) in float32, 0 from `end` on."""
    n = tl.arange(0, COUNT)[None, :]
    return tl.load(ptr + first + n, mask=n < end - first, other=0.0).to(tl.float32)


@triton.jit
def load_matrix(ptr, n, k, stride, rows_end, columns_end):
    """Rows n (N, 1) and columns k (1, K) of a matrix, 0 from the two ends on."""
    return tl.load(ptr + n * stride + k, mask=(n < rows_end) & (k < columns_end), other=0)


@triton.jit
def spread(ptr, ROWS: tl.constexpr, first, COUNT: tl.constexpr, end):
    """The same as `load_vector` in every row of (ROWS, COUNT): what a sum that has a bias starts with."""
    return tl.zeros((ROWS, COUNT), tl.float32) + load_vector(ptr, first, COUNT, end)


@triton.jit
def times(a, b):
    """a b in float32, of a type that is not of integers."""
    return add_product(a, b, tl.zeros((a.shape[0], b.shape[1]), tl.float32))


@triton.jit
def split(x):
    """A float32 tile as the sum of three of bf16."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def add_product(a, b, total):
    """total + a b in float32. One of them may hold codes in bf16 where the other is float32.

    Codes are exact in bf16, so that three products are as exact as float32, where two of float32
    take six: as "bf16x6" of `tiles.dot`, but added to the total itself and in an order in which each
    part of b is read for all products with it, for fewer registers at a time.
    """
    if a.dtype == tl.float32 and b.dtype == tl.float32:
        high, middle, low = split(a)
        high_b, middle_b, low_b = split(b)
        total = tiles.dot(high, low_b, total)
        total = tiles.dot(high, middle_b, tiles.dot(middle, middle_b, total))
        total = tiles.dot(middle, high_b, tiles.dot(low, high_b, total))
        total = tiles.dot(high, high_b, total)
    elif a.dtype == b.dtype:
        total = tiles.dot(a, b, total)
    elif a.dtype == tl.float32:
        high, middle, low = split(a)
        total = tiles.dot(high, b, tiles.dot(middle, b, tiles.dot(low, b, total)))
    else:
        high, middle, low = split(b)
        total = tiles.dot(a, high, tiles.dot(a, middle, tiles.dot(a, low, total)))
    return total


@triton.jit
def count(a, b):
    """a b of int8 tiles, exact, in float32."""
    zeros = tl.zeros((a.shape[0], b.shape[1]), tl.int32)
    return tl.dot(a, b, zeros, out_dtype=tl.int32).to(tl.float32)


@triton.jit
def multiply(
    x, layer, total, first, end, first_in, IN: tl.constexpr, head=0, D: tl.constexpr = 0, later=0
):
    """total (M, COUNT) plus x (M, K) times columns first_in to first_in + K of rows first to first +
    COUNT, but none from `end` on, of a FoldedLinear with IN columns, without its bias.

    head, D: which head the rows are and how many it has, where a head is rotated. later: 0, see the
    kernel.
    """
    COUNT: tl.constexpr = total.shape[1]
    # What a loop moves is one pointer then, not those of all entries, which would not fit.
    at = first * IN + first_in
    n = later + tl.arange(0, COUNT)[:, None]
    k = tl.arange(0, x.shape[1])[None, :]
    weight = tl.trans(load_matrix(layer.weight + at, n, k, IN, end - first, IN - first_in))
    if layer.scale is None:
        return add_product(x, weight, total)
    else:
        if layer.mask is None:
            kept = tl.sum(x.to(tl.int32), 1)[:, None].to(tl.float32)
        else:
            kept = count(
                x, tl.trans(load_matrix(layer.mask + at, n, k, IN, end - first, IN - first_in))
            )
        y = count(x, weight) * load_vector(layer.scale, first, COUNT, end)
        y += kept * load_vector(layer.zero, first, COUNT, end)
        if layer.rotation is not None:
            row = tl.arange(0, COUNT)[:, None]
            column = tl.arange(0, COUNT)[None, :]
            y = times(y, load_matrix(layer.rotation + head * (D * D), row, column, D, D, D))
        return total + y


@triton.jit
def linear(x, layer, OUT: tl.constexpr, WIDTH_OUT: tl.constexpr, IN: tl.constexpr, later=0):
    """x (M, K) through a whole FoldedLinear of OUT rows: (M, WIDTH_OUT) in float32."""
    bias = spread(layer.bias, x.shape[0], 0, WIDTH_OUT, OUT)
    return multiply(x, layer, bias, 0, OUT, 0, IN, later=later)


@triton.jit
def normalize(x, SIZE: tl.constexpr, EPS: tl.constexpr):
    """The layer norm of the rows of x (M, WIDTH), without weight and bias."""
    inside = tl.arange(0, x.shape[1])[None, :] < SIZE
    mean, inverse = tiles.layer_norm_statistics(x, inside, SIZE, EPS)
    return tl.where(inside, (x - mean) * inverse, 0.0)


@triton.jit
def to_codes_of(t, limits_ptr, i: tl.constexpr, end, CODES):
    """The codes of t (M, K) as input i of the linear layers, 0 from lane `end` on."""
    low, high = tl.load(limits_ptr + 2 * i), tl.load(limits_ptr + 2 * i + 1)
    return to_codes(t, low, high, tl.arange(0, t.shape[1])[None, :] < end, CODES)


@triton.jit
def input_codes(t, inputs_ptr, limits_ptr, i: tl.constexpr, C: tl.constexpr, CODES):
    """The codes of t as inputs of q, k or v."""
    t = t * tl.load(inputs_ptr + 2 * i) - tl.load(inputs_ptr + 2 * i + 1)
    return to_codes_of(t, limits_ptr, i, C.size, CODES)


@triton.jit
def head_codes(x, layer, scalars, head, i: tl.constexpr, C: tl.constexpr, CODES):
    """The codes (M, WIDTH_HEAD) of a head's queries, keys or values from those of its inputs x."""
    first = head * C.d
    M: tl.constexpr = x.shape[0]
    WIDTH_HEAD: tl.constexpr = C.width_head
    zeros = tl.zeros((M, WIDTH_HEAD), tl.float32)
    y = multiply(x, layer, zeros, first, first + C.d, 0, C.size, head, C.d)
    y += load_vector(layer.bias, first, C.width_head, first + C.d)
    low, high = head_range(scalars, head, i, C)
    return to_codes(y, low, high, tl.arange(0, C.width_head)[None, :] < C.d, CODES)


@triton.jit
def head_range(scalars, head, i: tl.constexpr, C: tl.constexpr):
    """The lowest and highest code of a head's queries, keys, values or probabilities."""
    at = i if C.shared else i * C.heads + head
    return tl.load(scalars.low + at), tl.load(scalars.high + at)


@triton.jit
def load_bias(table_ptr, row, column, head, WINDOW: tl.constexpr):
    """The relative-position bias (M, N) of a head for the tokens `row` and `column` of a window."""
    SIDE: tl.constexpr = 2 * WINDOW - 1
    first = row // WINDOW * SIDE + row % WINDOW + (WINDOW - 1) * (SIDE + 1)
    entry = first[:, None] - (column // WINDOW * SIDE + column % WINDOW)[None, :]
    return tl.load(table_ptr + head * (SIDE * SIDE) + entry).to(tl.float32)


@triton.jit
def scores(q, k, scalars, at):
    """s_qk (q + z_q) k^T of codes q (M, WIDTH_HEAD) and k (N, WIDTH_HEAD), whose product is exact."""
    sums = tl.sum(k.to(tl.float32), 1)[None, :]
    s = times(q, tl.trans(k)) + tl.load(scalars.query_zero + at) * sums
    return s * tl.load(scalars.scores + at)


@triton.jit
def attend(p, v, token_ptr, scalars, head, C: tl.constexpr, TYPE):
    """A^ (M, N), probabilities p rotated and quantized, times T^T v^ but for v's scale.

    v: (N, WIDTH_HEAD), the codes. Returns (M, WIDTH_HEAD) in float32. Slices of coefficients go
    through both products before the next are made.
    """
    N: tl.constexpr = C.window * C.window
    M: tl.constexpr = C.rows
    WIDTH_HEAD: tl.constexpr = C.width_head
    at = 0 if C.shared else head
    inverse = tl.load(scalars.attention_inverse + at)
    zero = tl.load(scalars.attention_zero + at)
    low, high = head_range(scalars, head, 3, C)
    # The zero point of v, where it has lanes.
    inside = tl.arange(0, C.width_head)[None, :] < C.d
    value_zero = tl.where(inside, tl.load(scalars.value_zero + at), 0.0)
    y = tl.zeros((M, WIDTH_HEAD), tl.float32)
    if token_ptr is None:
        turned = (v.to(tl.float32) + value_zero).to(TYPE)
        y = add_product(to_codes(p * inverse - zero, low, high, True, v.dtype), turned, y)
        rest = tl.sum(turned.to(tl.float32), 0)[None, :]
    else:
        SLICE: tl.constexpr = C.slice
        p = p.to(TYPE)
        rest = tl.zeros((1, WIDTH_HEAD), tl.float32)
        for first in tl.range(0, N, C.slice, num_stages=1, disable_licm=C.integer):
            row = tl.arange(0, C.slice)[:, None]
            token = tl.load(token_ptr + first * N + row * N + tl.arange(0, N)[None, :])
            t = times(p, tl.trans(token)) * inverse - zero
            codes = to_codes(t, low, high, True, v.dtype)
            turned = add_product(token, v, tl.zeros((SLICE, WIDTH_HEAD), tl.float32))
            turned += tl.sum(token.to(tl.float32), 1)[:, None] * value_zero
            rest += tl.sum(turned, 0)[None, :]
            y = add_product(codes, turned.to(TYPE), y)
    return (y + rest * zero) * tl.load(scalars.attention + at)


@triton.jit
def mlp(x, middle, fc1, hidden, fc2, limits_ptr, C: tl.constexpr, TYPE, CODES, later):
    """Tokens x (M, WIDTH) in float32 and what the MLP adds to them.

    The rotated hidden tokens are made WIDTH_HIDDEN channels at a time, all of fc1 for each.
    """
    ROWS: tl.constexpr = C.rows
    WIDTH_HIDDEN: tl.constexpr = C.width_hidden
    t = normalize(x, C.size, C.eps2).to(TYPE)
    t = linear(t, middle, C.size, C.width, C.size, 2 * later)
    codes = to_codes_of(t, limits_ptr, 4, C.size, CODES)
    for first in tl.range(0, C.hidden, C.width_hidden, num_stages=1, disable_licm=C.integer):
        turned = tl.zeros((ROWS, WIDTH_HIDDEN), tl.float32)
        for start in tl.range(0, C.hidden, C.chunk, num_stages=1, disable_licm=C.integer):
            h = spread(fc1.bias, C.rows, start, C.chunk, C.hidden)
            h = tiles.gelu(multiply(codes, fc1, h, start, C.hidden, 0, C.size)).to(TYPE)
            # Zeros and the biases afterwards: with sums that go on integers spill 400 bytes on sm_80.
            zeros = tl.zeros((ROWS, WIDTH_HIDDEN), tl.float32)
            turned += multiply(h, hidden, zeros, first, C.hidden, start, C.hidden)
        turned += load_vector(hidden.bias, first, C.width_hidden, C.hidden)
        of_fc2 = to_codes_of(turned, limits_ptr, 5, C.hidden - first, CODES)
        x = multiply(of_fc2, fc2, x, 0, C.size, first, C.hidden)
    return x + load_vector(fc2.bias, 0, C.width, C.size)
