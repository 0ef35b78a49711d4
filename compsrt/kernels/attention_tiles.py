"""Tile code of the kernels in `attention.py`, on one window of one head.

Tiles of q, k, v and out are (d, tokens): so every product has 16 or 32 rows. With 64 it would go
through the tensor memory of sm_100, which holds less than one window in float32 needs.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

from . import tiles
from .dispatch import tl, triton


@triton.jit
def load_head(ptr, strides, tokens, head, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """One head of some tokens, (WIDTH, M)."""
    lane = tl.arange(0, WIDTH)[:, None]
    token = tokens.batch.to(tl.int64) * strides[0] + tokens.y.to(tl.int64) * strides[1]
    token += tokens.x.to(tl.int64) * strides[2]
    return tl.load(ptr + token[None, :] + (head * SIZE + lane), mask=lane < SIZE, other=0.0)


@triton.jit
def store_head(ptr, number, head, heads, x, SIZE: tl.constexpr):
    """Write a tile x (WIDTH, M) as one head of the tokens with these numbers of a dense tensor."""
    lane = tl.arange(0, x.shape[0])[:, None]
    ptr += number.to(tl.int64)[None, :] * (heads * SIZE) + (head * SIZE + lane)
    tl.store(ptr, x.to(ptr.dtype.element_ty), mask=lane < SIZE)


@triton.jit
def load_bias(table_ptr, token, head, heads, WINDOW: tl.constexpr):
    """The relative-position bias (M, N) of a head for some tokens and all others."""
    other = tl.arange(0, WINDOW * WINDOW)[None, :]
    token = token[:, None]
    down = token // WINDOW - other // WINDOW + (WINDOW - 1)
    across = token % WINDOW - other % WINDOW + (WINDOW - 1)
    entry = down * (2 * WINDOW - 1) + across
    return tl.load(table_ptr + entry * heads + head).to(tl.float32)


@triton.jit
def load_rotation(
    ptr, SIZE: tl.constexpr, ORDER: tl.constexpr, WIDTH: tl.constexpr, WIDTH_OUT: tl.constexpr, TYPE
):
    """A rotation (SIZE, ORDER) as a tile (WIDTH, WIDTH_OUT). Kernels ask whether there is one: Triton 3.6
    has no function that returns None, alone or in a tuple."""
    row = tl.arange(0, WIDTH)[:, None]
    column = tl.arange(0, WIDTH_OUT)[None, :]
    inside = (row < SIZE) & (column < ORDER)
    return tl.load(ptr + row * ORDER + column, mask=inside, other=0.0).to(TYPE)


@triton.jit
def load_columns(ptr, first, N: tl.constexpr, ORDER: tl.constexpr, SLICE: tl.constexpr, TYPE):
    """Columns first to first + SLICE of the rotation of tokens (N, ORDER), as rows (SLICE, N)."""
    column = first + tl.arange(0, SLICE)[:, None]
    row = tl.arange(0, N)[None, :]
    return tl.load(ptr + row * ORDER + column, mask=column < ORDER, other=0.0).to(TYPE)


@triton.jit
def times(a, b):
    """a b in float32; a: (M, K), b: (K, N), of one type."""
    return tiles.dot(a, b, tl.zeros((a.shape[0], b.shape[1]), tl.float32))


@triton.jit
def rotate(x, rotation):
    """A tile x (d, M) times the rotation (d, n), if there is one: (n, M) in float32."""
    if rotation is None:
        return x.to(tl.float32)
    else:
        return times(tl.trans(rotation), x)


@triton.jit
def rotate_back(x, rotation):
    """A tile x (n, M) times the rotation (d, n) transposed, if there is one: (d, M) in x's type."""
    if rotation is None:
        return x
    else:
        return times(rotation, x).to(x.dtype)


@triton.jit
def quantizer_of(grids, i: tl.constexpr, row, BITS: tl.constexpr, CLAMPED: tl.constexpr):
    return tiles.load_quantizer(grids[i], row, BITS[i], CLAMPED[i])


@triton.jit
def quantize(v, quantizer, ORDER: tl.constexpr, TYPE):
    """v_hat of a tile v (n, M): zero beyond ORDER, which that of a padding zero is not."""
    lane = tl.arange(0, v.shape[0])[:, None]
    return tl.where(lane < ORDER, tiles.fake_quantize(v, quantizer), 0.0).to(TYPE)


@triton.jit
def probabilities(q, k, bias, region, other, SHIFT: tl.constexpr):
    """softmax(q^T k + bias + shift mask), (M, N) in float32; q: (d, M), k: (d, N), regions of both."""
    scores = tiles.dot(tl.trans(q), k, bias)
    if SHIFT > 0:
        scores += tl.where(region[:, None] == other[None, :], 0.0, tiles.APART)
    return tiles.softmax(scores)


@triton.jit
def add_sums(totals, scale, low, high, GRID: tl.constexpr):
    """Totals (16,) of four grids, three each, with those of the three (M,) of one grid added.

    As one tile they take one reduction across warps, and in one vector the least registers.
    """
    row = tl.arange(0, 16)[:, None] - 3 * GRID
    sums = tl.where(row == 1, low[None, :], tl.where(row == 2, high[None, :], 0.0))
    return totals + tl.sum(tl.where(row == 0, scale[None, :], sums), 1)


@triton.jit
def quantize_backward(g, v, quantizer, totals, GRID: tl.constexpr, AXIS: tl.constexpr):
    """The gradient of a tile v from that of v_hat, and the totals with its sums added."""
    dv, scale, low, high = tiles.fake_quantize_backward(g, v, quantizer)
    sums = tl.sum(scale, AXIS), tl.sum(low, AXIS), tl.sum(high, AXIS)
    return dv, add_sums(totals, sums[0], sums[1], sums[2], GRID)


@triton.jit
def quantize_rotated(p, rotation_ptr, quantizer, ORDER: tl.constexpr, SLICE: tl.constexpr, TYPE):
    """fq(p T) T^T of a tile p (M, N), SLICE of the coefficients at a time.

    Where a column of T is padding, so is the coefficient's way back: zero, whatever fq(0) is.
    """
    if rotation_ptr is None:
        return tiles.fake_quantize(p, quantizer).to(TYPE)
    else:
        p_hat = tl.zeros(p.shape, tl.float32)
        for first in tl.range(0, ORDER, SLICE, num_stages=1, disable_licm=True):
            columns = load_columns(rotation_ptr, first, p.shape[1], ORDER, SLICE, TYPE)
            a = times(columns, tl.trans(p.to(TYPE)))
            a = tiles.fake_quantize(a, quantizer).to(TYPE)
            p_hat = tiles.dot(tl.trans(a), columns, p_hat)
        return p_hat.to(TYPE)


@triton.jit
def quantize_rotated_backward(
    g,
    p,
    rotation_ptr,
    quantizer,
    totals,
    GRID: tl.constexpr,
    ORDER: tl.constexpr,
    SLICE: tl.constexpr,
    TYPE,
):
    """What `quantize_rotated` returned, the gradient of p from that of it, and the totals."""
    if rotation_ptr is None:
        dp, totals = quantize_backward(g, p, quantizer, totals, GRID, 1)
        return tiles.fake_quantize(p, quantizer).to(TYPE), dp, totals
    else:
        p_hat = tl.zeros(p.shape, tl.float32)
        dp = tl.zeros(p.shape, tl.float32)
        for_scale = tl.zeros((p.shape[0],), tl.float32)
        for_low = tl.zeros((p.shape[0],), tl.float32)
        for_high = tl.zeros((p.shape[0],), tl.float32)
        for first in tl.range(0, ORDER, SLICE, num_stages=1, disable_licm=True):
            columns = load_columns(rotation_ptr, first, p.shape[1], ORDER, SLICE, TYPE)
            a = times(columns, tl.trans(p.to(TYPE)))
            da = times(columns, tl.trans(g.to(TYPE)))
            da, scale, low, high = tiles.fake_quantize_backward(da, a, quantizer)
            for_scale += tl.sum(scale, 0)
            for_low += tl.sum(low, 0)
            for_high += tl.sum(high, 0)
            a = tiles.fake_quantize(a, quantizer).to(TYPE)
            p_hat = tiles.dot(tl.trans(a), columns, p_hat)
            dp = tiles.dot(tl.trans(da.to(TYPE)), columns, dp)
        return p_hat.to(TYPE), dp, add_sums(totals, for_scale, for_low, for_high, GRID)
