"""Rotation, fake quantization, products of quantized operands and DOBI in plain PyTorch.

The quantizer (b bits, L = 2^b - 1; bounds l, u; scalar decomposition alpha, beta):

    s = (u - l)/L + alpha        Z = l + beta
    c = clamp(v, l, u)    t = (c - Z)/s    r = clamp(round_half_even(t), 0, L)    v_hat = s r + Z

Gradients go straight through the rounding. Subtraction, division by s > 0 and rounding are
monotone in floating point too, so every element falls on one of three sides, and one clamp of
w = (v - Z)/s to [w_low, w_high] does the work of both clamps above:

    low side     below l, or rounding below 0     r = clamp(round((l - Z)/s), 0, L)
    inside       dv_hat/dv = 1                    r = round(w)
    high side    above u, or rounding above L     r = clamp(round((u - Z)/s), 0, L)

A side is saturated, or merely clipped, as a whole; so the gradients of the four scalars need
only three sums over the tensor: of g (r - clamped w), and of g over the low and the high side.
That is what the Triton kernels accumulate as well.

Everything here works in float64, which is where whole networks are compared; half types are
computed in float32. Sources: 2DQuant (NeurIPS 2024) for bounds and their gradients, CompSRT
(2026) for alpha and beta; codes bounded to [0, L] and the gradient of beta are this package's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ... import transforms

CODES = ("clamped", "unclamped")


# --- Hadamard transform --------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _hadamard_matrix(size: int, order: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return transforms.hadamard(order)[:size].to(device=device, dtype=dtype).contiguous()


def hadamard_transform(x: Tensor, order: int | None = None) -> Tensor:
    """Orthonormal Hadamard transform of the last axis, differentiable.

    x: (..., n), any floating type. order: None for n itself; above n, x is zero-padded at the
    end. Returns (..., order) in x's type. Raises ValueError for an order below n or one that no
    Hadamard matrix is known for.
    """
    size = x.shape[-1]
    order = size if order is None else order
    if order < size:
        raise ValueError(f"order: {order} is below the {size} entries of x's last axis")
    return x @ _hadamard_matrix(size, order, x.device, x.dtype)


# --- Fake quantization ---------------------------------------------------------------------------


def check_quantizer(bits: int, codes: str) -> None:
    """Raise ValueError unless bits is 1 to 8 and codes is known."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"bits: {bits!r} is not a whole number from 1 to 8")
    if codes not in CODES:
        raise ValueError(f"codes: {codes!r} is unknown; one of {', '.join(CODES)}")


def step_and_zero(
    lower: Tensor, upper: Tensor, alpha: Tensor | None, beta: Tensor | None, bits: int
) -> tuple[Tensor, Tensor]:
    """Step s = (u - l)/L + alpha and zero point Z = l + beta."""
    scale = (upper - lower) / (2**bits - 1)
    return (
        scale if alpha is None else scale + alpha,
        lower if beta is None else lower + beta,
    )


def _sides(
    lower: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, bits: int, codes: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w_low, w_high, and whether the low and the high side are saturated."""
    low, high = (lower - zero) / scale, (upper - zero) / scale
    if codes == "unclamped":
        never = torch.zeros_like(low, dtype=torch.bool)
        return low, high, never, never
    levels = 2**bits - 1
    # Half to even: -0.5 rounds to 0 and is inside, levels + 0.5 (levels is odd) rounds out.
    first = torch.full_like(low, -0.5)
    last = torch.nextafter(torch.full_like(low, levels + 0.5), first)
    low_saturated = (low < first) | (low > last)
    high_saturated = (high < first) | (high > last)
    return low.clamp(first, last), high.clamp(first, last), low_saturated, high_saturated


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """v_hat = s r + Z, rounded after the product: the packed file restores the very same bits."""
    return codes.mul(scale).add_(zero)


def quantize_codes(
    x: Tensor,
    lower: Tensor,
    upper: Tensor,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    bits: int,
    codes: str = "clamped",
) -> Tensor:
    """The codes r of x as floating-point integers, in x's shape; arguments as in `fake_quantize`."""
    check_quantizer(bits, codes)
    scale, zero = step_and_zero(lower, upper, alpha, beta, bits)
    low, high, _, _ = _sides(lower, upper, scale, zero, bits, codes)
    return _wide(x).sub(zero).div_(scale).clamp_min_(low).clamp_max_(high).round_()


def _forward(x: Tensor, scalars: tuple, bits: int, codes: str, *, owned: bool = False) -> Tensor:
    """The quantized x; overwrites x if it is owned. Fresh memory costs more here than arithmetic."""
    lower, upper, alpha, beta = scalars
    scale, zero = step_and_zero(lower, upper, alpha, beta, bits)
    low, high, _, _ = _sides(lower, upper, scale, zero, bits, codes)
    w = _wide(x)
    w = w.sub_(zero) if owned else w.sub(zero)
    w.div_(scale).clamp_min_(low).clamp_max_(high).round_()
    return w.mul_(scale).add_(zero).to(x.dtype)


def _backward(
    grad: Tensor,
    x: Tensor,
    scalars: tuple,
    bits: int,
    codes: str,
    *,
    owned: bool = False,
    with_output: bool = False,
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Gradients of x and of the four scalars; the quantized x again if asked for.

    Masks are floats and buffers are used again: comparing in place is ten times as fast on a CPU
    as comparing into booleans.
    """
    lower, upper, alpha, beta = scalars
    levels = 2**bits - 1
    scale, zero = step_and_zero(lower, upper, alpha, beta, bits)
    low, high, low_saturated, high_saturated = _sides(lower, upper, scale, zero, bits, codes)
    g = _wide(grad)
    w = _wide(x)
    w = (w.sub_(zero) if owned else w.sub(zero)).div_(scale)

    def total(values: Tensor) -> Tensor:
        # A copy, also where there is nothing to sum: `values` is used again below.
        return values.sum() if lower.dim() == 0 else values.sum_to_size(lower.shape).clone()

    # A value on a bound is inside and counts for the bound too (the published rule), but one
    # that rounds to a saturated code is on its side alone.
    down, up = torch.full_like(low, -torch.inf), torch.full_like(high, torch.inf)
    edge = torch.where(low_saturated, torch.nextafter(low, down), low)
    scratch = w.clone()
    g_low = total(scratch.le_(edge).mul_(g))
    edge = torch.where(high_saturated, torch.nextafter(high, up), high)
    g_high = total(scratch.copy_(w).ge_(edge).mul_(g))
    clamped = w.clamp_min(low).clamp_max_(high)
    inside = w.eq_(clamped)
    rounded = scratch.copy_(clamped).round_()
    d_scale = total(clamped.neg_().add_(rounded).mul_(g))
    d_scale = d_scale + low_saturated * low * g_low + high_saturated * high * g_high
    d_zero = low_saturated * g_low + high_saturated * g_high
    d_lower = torch.where(low_saturated, 0, g_low) - d_scale / levels + d_zero
    d_upper = torch.where(high_saturated, 0, g_high) + d_scale / levels
    output = rounded.mul_(scale).add_(zero).to(x.dtype) if with_output else None
    return inside.mul_(g).to(x.dtype), [d_lower, d_upper, d_scale, d_zero], output


def _scalar_gradients(scalars: tuple, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients in the shapes and types of the scalars, None for those that are None."""
    return [
        None
        if scalar is None or gradient is None
        else gradient.reshape(scalar.shape).to(scalar.dtype)
        for scalar, gradient in zip(scalars, gradients, strict=True)
    ]


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, lower, upper, alpha, beta, bits, codes):
        ctx.save_for_backward(x, lower, upper, alpha, beta)
        ctx.settings = bits, codes
        return _forward(x, (lower, upper, alpha, beta), bits, codes)

    @staticmethod
    def backward(ctx, grad):
        x, *scalars = ctx.saved_tensors
        d_x, d_scalars, _ = _backward(grad, x, tuple(scalars), *ctx.settings)
        return (d_x, *_scalar_gradients(tuple(scalars), d_scalars), None, None)


def fake_quantize(
    x: Tensor,
    lower: Tensor,
    upper: Tensor,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    bits: int,
    codes: str = "clamped",
) -> Tensor:
    """Quantize x to 2^bits levels and back, with gradients for x and the four scalars.

    x: any shape. lower, upper, alpha, beta: one value a tensor, shape (), or shapes that broadcast
    to x, such as (C_out, 1) for a scale per output channel of a weight (C_out, C_in); alpha and
    beta may be None. codes: "clamped" (at most 2^bits levels) or "unclamped" (the published code,
    which does not bound its codes). Returns x's shape and type. Raises ValueError for bits
    outside 1 to 8 and unknown codes.
    """
    check_quantizer(bits, codes)
    return _FakeQuantize.apply(x, lower, upper, alpha, beta, bits, codes)


# --- Products of quantized operands --------------------------------------------------------------


def _narrow(b: Tensor) -> bool:
    """Whether a @ b is taken as (b^T a^T)^T: of many small products on a CPU in half of the time."""
    return b.dim() > 2 and b.shape[-1] < b.shape[-2]


class _QuantMatmul(torch.autograd.Function):
    """fq(a T) @ fq(b), transposed if `_narrow(b)`; keeps only a and b, and quantizes again in the backward."""

    @staticmethod
    def forward(ctx, a, b, bias, rotation, a_settings, b_settings, *scalars):
        rotated = a if rotation is None else a @ rotation
        left = _forward(rotated, scalars[:4], *a_settings, owned=rotated is not a)
        right = b if b_settings is None else _forward(b, scalars[4:], *b_settings)
        ctx.save_for_backward(a, b, rotation, *scalars)
        ctx.settings = a_settings, b_settings
        if bias is None:
            return right.mT @ left.mT if _narrow(b) else left @ right
        return torch.addmm(bias, left.flatten(0, -2), right).unflatten(0, left.shape[:-1])

    @staticmethod
    def backward(ctx, grad):
        a, b, rotation, *scalars = ctx.saved_tensors
        a_settings, b_settings = ctx.settings
        grad = grad.mT if _narrow(b) else grad
        a_scalars, b_scalars = tuple(scalars[:4]), tuple(scalars[4:])
        need_a = ctx.needs_input_grad[0] or any(ctx.needs_input_grad[6:10])
        need_b = ctx.needs_input_grad[1] or any(ctx.needs_input_grad[10:])
        rotated = a if rotation is None else a @ rotation
        right = b if b_settings is None else _forward(b, b_scalars, *b_settings)
        d_a = d_b = left = None
        d_a_scalars: Sequence[Tensor | None] = [None] * 4
        d_b_scalars: Sequence[Tensor | None] = [None] * len(b_scalars)
        if need_a:
            d_left = grad @ right.mT
            d_a, d_a_scalars, left = _backward(
                d_left, rotated, a_scalars, *a_settings, owned=rotated is not a, with_output=need_b
            )
            d_a = d_a if rotation is None else d_a @ rotation.mT
        if need_b:
            left = _forward(rotated, a_scalars, *a_settings) if left is None else left
            if b.dim() == 2:  # a weight, shared by all leading axes of a
                d_right = left.flatten(0, -2).mT @ grad.flatten(0, -2)
            else:
                d_right = (grad.mT @ left).mT if _narrow(grad) else left.mT @ grad
            if b_settings is None:
                d_b = d_right
            else:
                d_b, d_b_scalars, _ = _backward(d_right, b, b_scalars, *b_settings)
        d_scalars = (
            *_scalar_gradients(a_scalars, d_a_scalars),
            *_scalar_gradients(b_scalars, d_b_scalars),
        )
        d_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return (d_a, d_b, d_bias, None, None, None, *d_scalars)


class Grid(NamedTuple):
    """What one `fake_quantize` needs beside its input: the four scalars, the bits, the code rule."""

    lower: Tensor
    upper: Tensor
    alpha: Tensor | None
    beta: Tensor | None
    bits: int
    codes: str = "clamped"


def quant_matmul(
    a: Tensor,
    b: Tensor,
    a_grid: Grid,
    b_grid: Grid | None = None,
    *,
    bias: Tensor | None = None,
    rotation: Tensor | None = None,
) -> Tensor:
    """fq(a @ rotation) @ fq(b) + bias, keeping only a and b for the backward.

    a: (..., M, K); rotation: a constant (K, K') or None; b: (K', N), or (..., K', N) with a's
    leading axes, quantized by b_grid or, where that is None, taken as it is; bias: (N,), with a
    two-dimensional b only. Returns (..., M, N).
    """
    check_quantizer(a_grid.bits, a_grid.codes)
    if b_grid is not None:
        check_quantizer(b_grid.bits, b_grid.codes)
    scalars = (*a_grid[:4], *(() if b_grid is None else b_grid[:4]))
    settings = a_grid[4:], None if b_grid is None else b_grid[4:]
    product = _QuantMatmul.apply(a, b, bias, rotation, *settings, *scalars)
    return product.mT if _narrow(b) else product


# --- DOBI ----------------------------------------------------------------------------------------


def sort_rows(x: Tensor) -> Tensor:
    """x (R, N) with every row in ascending order."""
    # NumPy sorts float32 with vector instructions: 12 times as fast as torch.sort on a CPU.
    return (
        torch.from_numpy(np.sort(x.numpy(), axis=-1)) if x.device.type == "cpu" else x.sort().values
    )


def _prefix_sums(rows: Tensor) -> Tensor:
    """The sums of the first 0 to N entries of every row (R, N): (R, N + 1) in float64."""
    sums = rows.new_zeros(len(rows), rows.shape[1] + 1, dtype=torch.float64)
    if rows.device.type == "cpu":  # NumPy takes a third of the time of torch.cumsum
        np.cumsum(rows.numpy(), axis=1, dtype=np.float64, out=sums.numpy()[:, 1:])
    else:
        torch.cumsum(rows, 1, dtype=torch.float64, out=sums[:, 1:])
    return sums


def search_bounds(
    x: Tensor,
    bits: int,
    *,
    one_sided: bool | None = False,
    candidates: int = 100,
    asymmetric: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """DOBI: the bounds with the least squared error among `candidates` shrunken ranges, exactly.

    x: (R, N), a search for every row. Candidate i is [min + i d, max - i d], d = (max - min) /
    (2 candidates); one-sided [min, max - 2 i d]; one_sided=None tries both kinds. asymmetric: from
    there both bounds move on their own, by 8 d down to d/4, as long as the error falls: no pair of
    bounds d/4 away is better (2 to 14 % less error at 2 to 4 bits on normal, GELU, softmax and
    log-normal samples of 200,000, in 1.2 to 2 times the time). Returns lower, upper (in x's type)
    and the squared error (float64), each (R,); of equal candidates the first wins.

    One sort and two prefix sums serve all candidates: the values that a candidate rounds to one
    level lie side by side in the sorted row, so that with their number n and sum S the error is
    sum v^2 - 2 sum_r v_hat_r S_r + sum_r v_hat_r^2 n_r. The published loop quantizes the
    whole tensor once a candidate instead. Source: 2DQuant, section 3.2, Algorithm 1.
    """
    check_quantizer(bits, "clamped")
    rows = sort_rows(_wide(x.detach())).contiguous()
    levels = 2**bits
    least, greatest = rows[:, :1].double(), rows[:, -1:].double()
    unit = (greatest - least) / (2 * candidates)
    shrink = torch.arange(candidates, dtype=torch.float64, device=x.device) * unit
    two_sided = least + shrink, greatest - shrink
    from_below = least.expand_as(shrink), greatest - 2 * shrink
    kinds = {False: [two_sided], True: [from_below], None: [two_sided, from_below]}[one_sided]
    code = torch.arange(levels, dtype=torch.float64, device=x.device)
    all_sums = _prefix_sums(rows)
    squares = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()

    def best_of(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best candidate of (R, candidates): its bounds and error, each (R, 1)."""
        step = (upper - lower) / (levels - 1)
        values = lower[..., None] + step[..., None] * code  # (R, candidates, levels)
        edges = ((values[..., :-1] + values[..., 1:]) / 2).to(rows.dtype)
        cuts = torch.searchsorted(rows, edges.flatten(1).contiguous()).unflatten(1, edges.shape[1:])
        cuts = torch.nn.functional.pad(cuts, (1, 0))
        cuts = torch.nn.functional.pad(cuts, (0, 1), value=rows.shape[1])
        sums = all_sums.gather(1, cuts.flatten(1)).unflatten(1, cuts.shape[1:]).diff(dim=-1)
        error = squares[:, None] + (values * (values * cuts.diff(dim=-1) - 2 * sums)).sum(-1)
        best = error.argmin(1, keepdim=True)
        return lower.gather(1, best), upper.gather(1, best), error.gather(1, best)

    found = best_of(*(torch.cat(ends, dim=1) for ends in zip(*kinds, strict=True)))
    if asymmetric:
        found = _move_bounds(best_of, found, unit)
    lower, upper, error = (part[:, 0] for part in found)
    return lower.to(x.dtype), upper.to(x.dtype), error.clamp_min(0)


def _move_bounds(best_of, found: tuple[Tensor, ...], unit: Tensor) -> tuple[Tensor, ...]:
    """A search by pattern: nine pairs of bounds around the best one, which is among them."""
    sides = torch.tensor([0.0, -1.0, 1.0], dtype=torch.float64, device=unit.device)
    down, up = (grid.flatten() for grid in torch.meshgrid(sides, sides, indexing="ij"))
    for factor in (8, 4, 2, 1, 0.5, 0.25):
        for _ in range(32):
            lower = found[0] + factor * unit * down
            upper = torch.maximum(found[1] + factor * unit * up, lower + unit / 8)
            moved = best_of(lower, upper)
            better = moved[2] < found[2] * (1 - 1e-9)
            if not better.any():
                break
            found = tuple(torch.where(better, *pair) for pair in zip(moved, found, strict=True))
    return found
