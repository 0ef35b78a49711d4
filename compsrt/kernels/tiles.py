"""Tile functions that several kernels share: arithmetic on what a program holds in registers.

They work on float32; half types are widened before and narrowed after (bf16 arithmetic with
literals fails in the interpreter, and its sums would be useless anyway). The quantizer and its
three sums are those of `reference/`, where they are explained.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

from typing import Any, NamedTuple

from . import dispatch
from .dispatch import tl, triton

INTERPRETED = tl.constexpr(dispatch.INTERPRETED)
# Adding and subtracting 1.5 * 2^23 rounds a float32 below 2^22 to an integer, half to even.
# (There is no rint that both the compiler and the interpreter know.)
ROUNDER = tl.constexpr(1.5 * 2**23)
LARGEST = tl.constexpr(2.0**22)
# float32 operands as three bf16 each and the six largest of their products: nearly as exact as
# float32, on tensor cores, on NVIDIA and AMD alike. "ieee" would not use them, and 64 multiply-adds
# an element (width 64) are by count more than fit into the time that memory takes.
FLOAT32_PRODUCT = tl.constexpr("bf16x6")


# --- Products ------------------------------------------------------------------------------------


@triton.jit
def dot(a, b, total):
    """total + a b in float32. a: (M, K), b: (K, N), both of one type; total: (M, N)."""
    if INTERPRETED:  # its product of bf16 tiles is wrong
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    return tl.dot(a, b, total, input_precision=FLOAT32_PRODUCT)


@triton.jit
def leading(x):
    """The upper half of the bits of a float32 tile: x cut off to bf16, for far less than its rounding."""
    bits = x.to(tl.int32, bitcast=True) >> 16
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def split(x):
    """A float32 tile as the exact sum of three of bf16, of 8 bits each."""
    high = leading(x)
    rest = x - high.to(tl.float32)
    middle = leading(rest)
    return high, middle, leading(rest - middle.to(tl.float32))


# --- Windows --------------------------------------------------------------------------------------

APART = tl.constexpr(-100.0)  # added to the score of two tokens that the picture separates


class Tokens(NamedTuple):
    """Where tokens are: batch, y and x in the picture, number in the batch, region of the window; and
    the kind of the window, see `reference.windows.kinds_of_windows`."""

    batch: Any
    y: Any
    x: Any
    number: Any
    region: Any
    kind: Any


@triton.jit
def locate(token, window, height, width, WINDOW: tl.constexpr, SHIFT: tl.constexpr):
    """The Tokens with these numbers in a window. Two of them see each other in the same region.

    Windows and tokens are counted in 32 bits, of which the host makes sure; offsets take 64.
    """
    down = height // WINDOW
    across = width // WINDOW
    batch = window // (down * across)
    top = window // across % down
    return locate_at(token, batch, top, window % across, height, width, WINDOW, SHIFT)


@triton.jit
def locate_at(token, batch, top, left, height, width, WINDOW: tl.constexpr, SHIFT: tl.constexpr):
    """The same of the window `top` from above and `left` from the left in a picture."""
    bottom, right = top == height // WINDOW - 1, left == width // WINDOW - 1
    region = 2 * (bottom & (token // WINDOW >= WINDOW - SHIFT)).to(tl.int32)
    region += (right & (token % WINDOW >= WINDOW - SHIFT)).to(tl.int32)
    kind = 2 * bottom.to(tl.int32) + right.to(tl.int32)
    y = top * WINDOW + token // WINDOW
    x = left * WINDOW + token % WINDOW
    y += SHIFT
    x += SHIFT
    y = tl.where(y < height, y, y - height)
    x = tl.where(x < width, x, x - width)
    return Tokens(batch, y, x, (batch * height + y) * width + x, region, kind)


# --- Softmax -------------------------------------------------------------------------------------


@triton.jit
def softmax(scores):
    """The softmax of every row of a tile (M, N); one entry a row at least is above -inf."""
    powers = tl.exp(scores - tl.max(scores, 1)[:, None])
    return powers * (1.0 / tl.sum(powers, 1))[:, None]


@triton.jit
def softmax_backward(g, probabilities):
    """The gradient of the scores from that of their softmax, all (M, N)."""
    return probabilities * (g - tl.sum(probabilities * g, 1)[:, None])


# --- Fake quantization ---------------------------------------------------------------------------


class Quantizer(NamedTuple):
    """What one quantizer's four scalars come to; each a scalar in a register."""

    scale: Any
    inverse: Any  # 1/scale
    zero: Any
    low: Any  # w = (v - zero)/scale is clamped to [low, high]
    high: Any
    low_saturated: Any  # whether what is below is outside the codes, not only outside the bounds
    high_saturated: Any


@triton.jit
def load_quantizer(scalars, row, BITS: tl.constexpr, CLAMPED: tl.constexpr):
    """The Quantizer of a row. scalars: pointers to lower, upper, alpha, beta, each (rows,)."""
    lower = tl.load(scalars[0] + row).to(tl.float32)
    upper = tl.load(scalars[1] + row).to(tl.float32)
    LEVELS: tl.constexpr = 2**BITS - 1
    scale = tl.div_rn(upper - lower, LEVELS * 1.0) + tl.load(scalars[2] + row).to(tl.float32)
    zero = lower + tl.load(scalars[3] + row).to(tl.float32)
    inverse = tl.div_rn(1.0, scale)
    low = divide(lower - zero, scale, inverse)
    high = divide(upper - zero, scale, inverse)
    # The first and last value that round to a code; the float32 before LEVELS + 0.5 is last.
    # "unclamped" ends where a float32 has no halves left to round.
    FIRST: tl.constexpr = -0.5 if CLAMPED else -LARGEST
    LAST: tl.constexpr = LEVELS + 0.5 - (LEVELS + 1) * 2.0**-24 if CLAMPED else LARGEST
    return Quantizer(
        scale,
        inverse,
        zero,
        clamp(low, FIRST, LAST),
        clamp(high, FIRST, LAST),
        (low < FIRST) | (low > LAST),
        (high < FIRST) | (high > LAST),
    )


@triton.jit
def divide(a, b, inverse):
    """a / b as a true division rounds it, from inverse = 1/b, without the cost of one.

    The residual of the first quotient is exact in a fused multiply-add; a quotient of 2^24 and
    above, infinity among them, is good enough as it is. The interpreter does not fuse.
    """
    if INTERPRETED:
        return tl.div_rn(a, b)
    quotient = a * inverse
    better = tl.fma(tl.fma(-quotient, b, a), inverse, quotient)
    return tl.where(tl.abs(quotient) < 16777216.0, better, quotient)


@triton.jit
def clamp(x, low, high):
    """x limited to [low, high]; NaN stays NaN."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def round_half_even(x):
    """x rounded to an integer, for |x| up to 2^22."""
    return (x + ROUNDER) - ROUNDER


@triton.jit
def fake_quantize(v, q):
    """v_hat of a tile v in float32 under a Quantizer q."""
    w = clamp(divide(v - q.zero, q.scale, q.inverse), q.low, q.high)
    return round_half_even(w) * q.scale + q.zero


@triton.jit
def fake_quantize_backward(g, v, q):
    """The gradient of v, and what the three sums add: for the scale, the low and the high side."""
    w = divide(v - q.zero, q.scale, q.inverse)
    clamped = clamp(w, q.low, q.high)
    below = tl.where(q.low_saturated, w < q.low, w <= q.low)
    above = tl.where(q.high_saturated, w > q.high, w >= q.high)
    return (
        tl.where(clamped == w, g, 0.0),
        g * (round_half_even(clamped) - clamped),
        tl.where(below, g, 0.0),
        tl.where(above, g, 0.0),
    )


@triton.jit
def scalar_gradients(for_scale, for_low, for_high, q, BITS: tl.constexpr):
    """Gradients of lower, upper, alpha and beta from the three sums."""
    saturated_low = tl.where(q.low_saturated, for_low, 0.0)
    saturated_high = tl.where(q.high_saturated, for_high, 0.0)
    d_scale = for_scale + q.low * saturated_low + q.high * saturated_high
    d_zero = saturated_low + saturated_high
    share = d_scale / (2**BITS - 1)
    d_lower = for_low - saturated_low - share + d_zero
    d_upper = for_high - saturated_high + share
    return d_lower, d_upper, d_scale, d_zero


# --- Layer norm and GELU -------------------------------------------------------------------------

HALF_ROOT = tl.constexpr(0.7071067811865476)  # 1/sqrt(2)
DENSITY = tl.constexpr(0.3989422804014327)  # 1/sqrt(2 pi), the normal density at 0


@triton.jit
def layer_norm_statistics(
    x, inside, SIZE: tl.constexpr, EPS: tl.constexpr, FAST: tl.constexpr = False
):
    """Mean and 1/sqrt(variance + EPS), each (M, 1), of the rows of x (M, K).

    inside: which of the K columns count, SIZE of them; x is 0 in the others. FAST: the root may be off
    by two of float32's last bits.
    """
    mean = tl.sum(x, 1, keep_dims=True) / SIZE
    centred = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(centred * centred, 1, keep_dims=True) / SIZE
    if FAST:
        inverse = tl.rsqrt(variance + EPS)
    else:
        inverse = tl.div_rn(1.0, tl.sqrt_rn(variance + EPS))
    return mean, inverse


@triton.jit
def gelu(x):
    """The exact GELU, x times the normal distribution function."""
    return 0.5 * x * (1.0 + tl.erf(x * HALF_ROOT))


@triton.jit
def gelu_derivative(x):
    """The derivative of `gelu` at x."""
    return 0.5 * (1.0 + tl.erf(x * HALF_ROOT)) + x * (DENSITY * tl.exp(-0.5 * x * x))
