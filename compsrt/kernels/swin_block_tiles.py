"""Tile code of `swin_block.py`: what a folded block does with the tokens a program holds.

Codes are tiles of the type that products of codes take: int8 where weights are codes, else the type
of the floating matrices. Lanes beyond an axis hold anything finite, but 0 in int8; matrices have zeros
there. What units and lanes of ones are is told in `reference/folded.py`.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

from typing import NamedTuple

from . import tiles
from .dispatch import libdevice, tl, triton


class Constants(NamedTuple):
    """What a kernel is compiled for; the widths of tiles are powers of two."""

    heads: int
    window: int
    shift: int
    size: int  # C
    inner: int  # heads * d
    hidden: int
    d: int
    width: int  # tile sizes: of C, heads * d, hidden
    width_inner: int
    width_hidden: int  # of the rotated hidden tokens that are made at a time
    columns_hidden: int  # of all of them
    end_hidden: int  # the last of these that is not 0
    rows: int  # tokens of a program
    slice: int  # coefficients of the rotated probabilities at a time
    chunk: int  # of hidden channels at a time
    unroll: int  # of the loop over these: with two a matrix is loaded before it is needed
    stages: int  # of the loop over heads: with two a bias is loaded while the head before is done
    unit: float  # what a code of 1 is,
    raised: float  # and how much more a 1 is of what codes and a zero point sum up to
    ones: bool  # biases come of ones after the channels of numbers that are no codes
    fast: bool  # with instructions of NVIDIA devices that are as exact as half types
    shared: bool  # all heads have the grids of the first
    eps1: float
    eps2: float


LOG2_E = tl.constexpr(1.4426950408889634)  # log2(e)


@triton.jit
def exp2(x):
    """2^x; what a float32 holds with fewer bits only, below 2^-126, may be 0."""
    if tiles.INTERPRETED:
        y = tl.exp2(x)
    else:
        y = libdevice.exp2(x)
    return y


@triton.jit
def instruction(x, NAME: tl.constexpr):
    """What an instruction of NVIDIA devices makes of x, float32 both."""
    return tl.inline_asm_elementwise(
        NAME + " $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def tanh(x):
    """tanh(x) to 11 bits, in one instruction of an NVIDIA device."""
    if tiles.INTERPRETED:
        y = (1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2_E)))).to(tl.float16).to(tl.float32)
    else:
        y = instruction(x, "tanh.approx.f32")
    return y


@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    """1 / x of a normal x. FAST: off by one of float32's last bits, in one instruction."""
    if tiles.INTERPRETED or not FAST:
        y = 1.0 / x
    else:
        y = instruction(x, "rcp.approx.ftz.f32")
    return y


@triton.jit
def to_half_above_zero(x, FAST: tl.constexpr):
    """max(x, 0) in float16, NaN where x is. FAST: in one instruction for two entries."""
    if tiles.INTERPRETED or not FAST:
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float16)
    else:
        y = tl.inline_asm_elementwise(
            "cvt.rn.relu.f16x2.f32 $0, $2, $1;",
            "=r,f,f",
            [x],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    return y


@triton.jit
def gelu_of_half(x, UNIT: tl.constexpr):
    """The GELU of x / UNIT for a half type, of tanh. Its two numbers are those of the least error, 2.7e-4;
    the last bit of `tanh` adds up to 2^-12 of x."""
    of_half = x * (0.5 / UNIT)
    inner = x * (0.80015708 / UNIT + (0.03470089 / (UNIT * UNIT * UNIT)) * (x * x))
    return of_half + of_half * tanh(inner)


@triton.jit
def gelu(x):
    """The GELU. Of erf, 7.1.26 in Abramowitz and Stegun, Handbook of Mathematical Functions, with an
    error below 1.5e-7: it takes half of the instructions of the exact one."""
    size = tl.abs(x)
    of_one = 1.0 + 0.23164189 * size  # 0.3275911 / sqrt(2)
    if tiles.INTERPRETED:
        t = 1.0 / of_one
    else:
        t = libdevice.fast_dividef(1.0, of_one)
    y = 0.5 * 1.061405429 * t - 0.5 * 1.453152027
    y = (y * t + 0.5 * 1.421413741) * t - 0.5 * 0.284496736
    y = (y * t + 0.5 * 0.254829592) * t
    y *= exp2(x * x * (-0.5 * LOG2_E))  # 1 - Phi(|x|)
    return x * tl.where(x < 0, y, 1.0 - y)


@triton.jit
def to_codes(t, low, high, CODES, FAST):
    """The codes low to high of a tile t in float32. In float16 low is 0, and all is in the unit of codes,
    of which this type has no fractions: to become one is to be rounded, half to even."""
    if tl.float16 == CODES:
        codes = to_half_above_zero(t, FAST)
        codes = tl.minimum(codes, high.to(CODES), propagate_nan=tl.PropagateNan.ALL)
    elif tl.int8 == CODES:  # the last bits of what rounds a float32
        bits = (tiles.clamp(t, low, high) + tiles.ROUNDER).to(tl.int32, bitcast=True)
        codes = bits.to(tl.int8)
    else:
        codes = tiles.round_half_even(tiles.clamp(t, low, high)).to(CODES)
    return codes


@triton.jit
def locate(token, left, height, width, C: tl.constexpr):
    """The `tiles.Tokens` of this program's window, whose place in the launch is its place in the batch."""
    batch, top = tl.program_id(2), tl.program_id(1)
    return tiles.locate_at(token, batch, top, left, height, width, C.window, C.shift)


@triton.jit
def with_zero_point(codes, zero, C: tl.constexpr):
    """codes + zero in the codes' type; zero is in the unit of such sums already."""
    if C.raised != 1:
        codes = codes * C.raised
    return codes + zero.to(codes.dtype)


@triton.jit
def load_vector(ptr, first, COUNT: tl.constexpr):
    """Entries first to first + COUNT, (1, COUNT) in float32."""
    return tl.load(ptr + first + tl.arange(0, COUNT)[None, :]).to(tl.float32)


@triton.jit
def biases(ptr, first, ROWS: tl.constexpr, COUNT: tl.constexpr):
    """What a sum (ROWS, COUNT) starts with: entries first to first + COUNT of a bias, or zeros."""
    if ptr is None:
        y = tl.zeros((ROWS, COUNT), tl.float32)
    else:
        y = tl.broadcast_to(load_vector(ptr, first, COUNT), (ROWS, COUNT))
    return y


@triton.jit
def with_ones(x, size, C: tl.constexpr):
    """x (M, WIDTH) with ones after its `size` channels, where they make biases."""
    if C.ones:
        x = tl.where(tl.arange(0, x.shape[1])[None, :] < size, x, 1.0)
    return x


@triton.jit
def times(a, b):
    """a b in float32, of a type that is not of integers."""
    return add_product(a, b, tl.zeros((a.shape[0], b.shape[1]), tl.float32))


@triton.jit
def add_product(a, b, total):
    """total + a b in float32. One may be bf16 where the other is float32: codes, or a matrix that is exact.

    They are exact in bf16, so that three products are as exact as float32, where two of float32
    take six: as "bf16x6" of `tiles.dot`, but added to the total itself and in an order in which each
    part of b is read for all products with it, for fewer registers at a time.
    """
    if a.dtype == tl.float32 and b.dtype == tl.float32:
        high, middle, low = tiles.split(a)
        high_b, middle_b, low_b = tiles.split(b)
        total = tiles.dot(high, low_b, total)
        total = tiles.dot(high, middle_b, tiles.dot(middle, middle_b, total))
        total = tiles.dot(middle, high_b, tiles.dot(low, high_b, total))
        total = tiles.dot(high, high_b, total)
    elif a.dtype == b.dtype:
        total = tiles.dot(a, b, total)
    elif a.dtype == tl.float32:
        high, middle, low = tiles.split(a)
        total = tiles.dot(high, b, tiles.dot(middle, b, tiles.dot(low, b, total)))
    else:
        high, middle, low = tiles.split(b)
        total = tiles.dot(a, high, tiles.dot(a, middle, tiles.dot(a, low, total)))
    return total


@triton.jit
def count(a, b):
    """a b of int8 tiles, exact, in float32."""
    zeros = tl.zeros((a.shape[0], b.shape[1]), tl.int32)
    return tl.dot(a, b, zeros, out_dtype=tl.int32).to(tl.float32)


@triton.jit
def multiply(x, layer, total, first, first_in, IN: tl.constexpr, later=0):
    """total (M, COUNT) plus x (M, K) times columns first_in to first_in + K of rows first to first +
    COUNT of a FoldedLinear with IN columns, without its bias. later: 0, see the kernel.
    """
    COUNT: tl.constexpr = total.shape[1]
    # What a loop moves is one pointer then, not those of all entries, which would not fit.
    at = first * IN + first_in
    entry = (later + tl.arange(0, COUNT)[:, None]) * IN + tl.arange(0, x.shape[1])[None, :]
    weight = tl.trans(tl.load(layer.weight + at + entry))
    if layer.scale is None:
        return add_product(x, weight, total)
    else:
        if layer.mask is None:
            kept = tl.sum(x.to(tl.int32), 1)[:, None].to(tl.float32)
        else:
            kept = count(x, tl.trans(tl.load(layer.mask + at + entry)))
        y = count(x, weight) * load_vector(layer.scale, first, COUNT)
        y += kept * load_vector(layer.zero, first, COUNT)
        return total + y


@triton.jit
def linear(x, layer, OUT: tl.constexpr, IN: tl.constexpr, later=0, UNIT: tl.constexpr = 1.0):
    """x (M, IN) through a whole FoldedLinear: (M, OUT) in float32, times UNIT but for the bias."""
    if UNIT == 1:
        start = biases(layer.bias, 0, x.shape[0], OUT)
        y = multiply(x, layer, start, 0, 0, IN, later=later)
    else:
        y = tl.zeros((x.shape[0], OUT), tl.float32)
        y = multiply(x, layer, y, 0, 0, IN, later=later) * UNIT
        if layer.bias is not None:
            y += load_vector(layer.bias, 0, OUT)
    return y


@triton.jit
def normalize(x, EPS: tl.constexpr, C: tl.constexpr):
    """The layer norm of the rows of x (M, WIDTH), without weight and bias."""
    inside = tl.arange(0, x.shape[1])[None, :] < C.size
    mean, inverse = tiles.layer_norm_statistics(x, inside, C.size, EPS, C.fast)
    return tl.where(inside, (x - mean) * inverse, 1.0 if C.ones else 0.0)


@triton.jit
def to_codes_of(t, limits_ptr, i: tl.constexpr, end, CODES, FAST):
    """The codes of t (M, K) as input i of the linear layers, int8 ones 0 from lane `end` on.

    In other types matrices have zeros there, and `multiply` does not sum up the codes.
    """
    low, high = tl.load(limits_ptr + 2 * i), tl.load(limits_ptr + 2 * i + 1)
    codes = to_codes(t, low, high, CODES, FAST)
    if tl.int8 == CODES:
        codes = tl.where(tl.arange(0, t.shape[1])[None, :] < end, codes, 0)
    return codes


@triton.jit
def input_codes(t, inputs_ptr, limits_ptr, i: tl.constexpr, C: tl.constexpr, CODES):
    """The codes of t as inputs of q, k or v."""
    t = t * tl.load(inputs_ptr + 2 * i) - tl.load(inputs_ptr + 2 * i + 1)
    return to_codes_of(t, limits_ptr, i, C.size, CODES, C.fast)


@triton.jit
def heads_codes(x, layer, scalars, i: tl.constexpr, C: tl.constexpr, CODES):
    """The codes (M, WIDTH_INNER) of all heads' queries, keys or values from those of its inputs x."""
    INNER: tl.constexpr = C.width_inner
    if layer.rotation is None:
        y = linear(x, layer, INNER, C.width)
    else:  # each head has its own, in a block of one matrix
        M: tl.constexpr = x.shape[0]
        zeros = tl.zeros((M, INNER), tl.float32)
        y = multiply(x, layer, zeros, 0, 0, C.width)
        row = tl.arange(0, INNER)[:, None]
        lane = tl.arange(0, INNER)[None, :]
        inside = (row // C.d == lane // C.d) & (row < C.inner)
        at = layer.rotation + row * C.d + lane % C.d
        rotation = tl.load(at, mask=inside, other=0.0)
        y = add_product(y, rotation, biases(layer.bias, 0, M, INNER))
    low, high = load_lanes(scalars.low, i, C), load_lanes(scalars.high, i, C)
    return to_codes(y, low, high, CODES, C.fast)


@triton.jit
def load_lanes(ptr, i: tl.constexpr, C: tl.constexpr):
    """The i-th scalar of each lane's head, (1, WIDTH_INNER), or the one of all heads."""
    if C.shared:
        return tl.load(ptr + i)
    else:
        lane = tl.arange(0, C.width_inner)[None, :]
        return tl.load(ptr + i * C.heads + lane // C.d, mask=lane < C.inner, other=0.0)


@triton.jit
def load_scalar(ptr, i: tl.constexpr, head, C: tl.constexpr):
    """The i-th scalar of a head."""
    return tl.load(ptr + (i if C.shared else i * C.heads + head))


@triton.jit
def chosen(codes, inside):
    """Codes where `inside` is 1, 0 where it is 0: two at a time on a device, where a choice is not."""
    if tiles.INTERPRETED:  # its products of bf16 are wrong
        y = (codes.to(tl.float32) * inside).to(codes.dtype)
    else:
        y = codes * inside.to(codes.dtype)
    return y


@triton.jit
def parts(x, TYPE: tl.constexpr):
    """A float32 tile as tiles of 16 bits that sum up to it: to 11 bits in float16, to 16 in bf16, and
    for a TYPE of float32 to all, in bf16."""
    if tl.float16 == TYPE:
        found = (x.to(tl.float16),)
    else:
        high, middle, low = tiles.split(x)
        if tl.bfloat16 == TYPE:
            found = (middle, high)
        else:
            found = (low, middle, high)
    return found


@triton.jit
def softmax(s, scale, FAST):
    """exp(scale s) over exp(scale highest s of a row), (M, N), and 1 over each row's sum, (M, 1)."""
    scale *= LOG2_E
    powers = exp2(s * scale - tl.max(s, 1)[:, None] * scale)
    return powers, reciprocal(tl.sum(powers, 1)[:, None], FAST)


@triton.jit
def load_rotation(token_ptr, first, C: tl.constexpr):
    """Rows first to first + SLICE of T^T, (SLICE, N)."""
    N: tl.constexpr = C.window * C.window
    row = tl.arange(0, C.slice)[:, None]
    return tl.load(token_ptr + first * N + row * N + tl.arange(0, N)[None, :])


@triton.jit
def turn(token, v, scalars, C: tl.constexpr):
    """Rows of T^T v^ of all heads but for v's scale, (SLICE, WIDTH_INNER) in float32: v are codes
    (N, WIDTH_INNER), token are rows of T^T or None, where these are all rows of v^."""
    zero = load_lanes(scalars.value_zero, 0, C)
    if token is None:
        return v.to(tl.float32) * C.raised + zero
    elif v.dtype == tl.float16 and C.width_inner <= 64:
        return times(token, with_zero_point(v, zero, C))
    else:  # v^ in bfloat16 would lose too much; of more channels it spills 128 bytes on sm_90
        SLICE: tl.constexpr = C.slice
        INNER: tl.constexpr = C.width_inner
        zeros = tl.zeros((SLICE, INNER), tl.float32)
        sums = tl.sum(token.to(tl.float32), 1)[:, None]
        return add_product(token, v, zeros) * C.raised + sums * zero


@triton.jit
def add_row_sum(turned, y):
    """y (M, WIDTH_INNER) plus the sum of turned's rows, which is what zero points of probabilities are
    multiplied with. Of a half type a product with ones, faster than a sum across a program's threads."""
    if turned.dtype == tl.float32:
        y += tl.sum(turned, 0)[None, :]
    else:
        ones = tl.full((y.shape[0], turned.shape[0]), 1.0, tl.float32).to(turned.dtype)
        y = add_product(ones, turned, y)
    return y


@triton.jit
def rotated_codes(p, share, token, scalars, head, C: tl.constexpr, TYPE, CODES):
    """The codes (M, SLICE) of probabilities p (M, N), times share, rotated by token, which are rows of
    T^T, or None."""
    inverse = share * load_scalar(scalars.attention_inverse, 0, head, C)
    zero = load_scalar(scalars.attention_zero, 0, head, C)
    low, high = load_scalar(scalars.low, 3, head, C), load_scalar(scalars.high, 3, head, C)
    if token is None:
        t = p
    else:
        t = times(p.to(TYPE), tl.trans(token))
    return to_codes(t * inverse - zero, low, high, CODES, C.fast)


@triton.jit
def hidden_tokens(codes, fc1, start, C: tl.constexpr, TYPE):
    """Channels start to start + CHUNK of GELU(fc1), (M, CHUNK)."""
    h = multiply(codes, fc1, biases(fc1.bias, start, C.rows, C.chunk), start, 0, C.width)
    h = gelu_of_half(h, C.unit) if C.fast else gelu(h * (1 / C.unit))
    return h.to(TYPE)


@triton.jit
def mlp(x, middle, fc1, hidden, fc2, limits_ptr, C: tl.constexpr, TYPE, CODES, later):
    """Tokens x (M, WIDTH) in float32 and what the MLP adds to them.

    The rotated hidden tokens are made WIDTH_HIDDEN channels at a time. Where a chunk is not the whole, all
    of fc1 is done for each.
    """
    ROWS: tl.constexpr = C.rows
    WIDTH_HIDDEN: tl.constexpr = C.width_hidden
    WHOLE: tl.constexpr = C.chunk == C.columns_hidden
    t = normalize(x, C.eps2, C).to(TYPE)
    t = linear(t, middle, C.width, C.width, 2 * later, UNIT=C.unit)
    codes = to_codes_of(t, limits_ptr, 4, C.size, CODES, C.fast)
    if WHOLE:
        h = hidden_tokens(codes, fc1, 0, C, TYPE)
    for first in tl.range(
        0,
        C.end_hidden,
        C.width_hidden,
        num_stages=1,
        disable_licm=True,
        loop_unroll_factor=C.unroll,
    ):
        zeros = tl.zeros((ROWS, WIDTH_HIDDEN), tl.float32)
        if WHOLE:
            turned = multiply(h, hidden, zeros, first, 0, C.columns_hidden)
        else:
            turned = zeros
            for start in tl.range(0, C.end_hidden, C.chunk, num_stages=C.stages, disable_licm=True):
                h = hidden_tokens(codes, fc1, start, C, TYPE)
                # Zeros: with sums that go on integers spill 400 bytes on sm_80.
                turned += multiply(h, hidden, zeros, first, start, C.columns_hidden)
        turned *= C.unit
        if hidden.bias is not None:
            turned += load_vector(hidden.bias, first, C.width_hidden)
        of_fc2 = to_codes_of(turned, limits_ptr, 5, C.hidden - first, CODES, C.fast)
        x = multiply(of_fc2, fc2, x * C.unit, 0, first, C.columns_hidden) * (1 / C.unit)
    if fc2.bias is not None:
        x += load_vector(fc2.bias, 0, C.width) * (1 / C.unit)
    return x
