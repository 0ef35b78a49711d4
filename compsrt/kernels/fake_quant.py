"""Fake quantization with learnable bounds: x to 2^bits levels and back.

    s = (u - l)/L + alpha        Z = l + beta        L = 2^bits - 1
    c = clamp(v, l, u)    t = (c - Z)/s    r = clamp(round_half_even(t), 0, L)    v_hat = s r + Z

x has any shape. The scalars l, u, alpha, beta have one value for the whole of x, or one for each
of its leading entries, such as (C, 1) for x (C, K). Both are one case to the kernels: x is rows
(rows, columns), with one quantizer a row.

The forward is one read and one write of x. The backward reads x and the gradient, writes dx, and
in the same pass sums up what the scalars need (three sums a row, see `reference/`): every
program keeps its part in registers and writes it to its own place, and a second, small kernel
adds the parts up in a fixed order. No atomics, so two runs give the same bits; no value is read
by the host, so a CUDA graph can capture both.

Codes and v_hat are meant to be those of the reference (on a CPU) bit for bit: `tiles.divide` is a
true division, and the launches ask the compiler to leave s r + Z two operations.

Sources: 2DQuant (NeurIPS 2024) for bounds and their gradients, CompSRT (2026) for alpha and beta.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference, tiles
from .dispatch import on_device_of, processors, tl, triton, use_triton

# For programs of four warps; not measured yet.
BYTES_FORWARD = 4096  # of x that a program takes: two vector loads a thread
ENTRIES_BACKWARD = 1024  # that a program takes at a time
PROGRAMS_BACKWARD = 8  # for each processor: as many as have room at once (occupancy 0.5)


# --- Kernels -------------------------------------------------------------------------------------


@triton.jit
def _fake_quantize_fwd_kernel(
    x_ptr,
    out_ptr,
    scalars,
    columns,
    blocks,
    BITS: tl.constexpr,
    CLAMPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x, out: (rows, columns); scalars: four of (rows,). This program does one block of a row."""
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    at = row * columns + column
    quantizer = tiles.load_quantizer(scalars, row, BITS, CLAMPED)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    out = tiles.fake_quantize(x, quantizer)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _fake_quantize_bwd_kernel(
    grad_ptr,
    x_ptr,
    dx_ptr,
    parts_ptr,
    scalars,
    columns,
    parts,
    BITS: tl.constexpr,
    CLAMPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad, x, dx: (rows, columns); parts: (rows, 3, parts); scalars: four of (rows,).

    This program takes every parts-th block of a row: it writes dx and its part of the three sums.
    """
    program = tl.program_id(0).to(tl.int64)
    row = program // parts
    part = program % parts
    quantizer = tiles.load_quantizer(scalars, row, BITS, CLAMPED)
    for_scale = tl.zeros((BLOCK,), tl.float32)
    for_low = tl.zeros((BLOCK,), tl.float32)
    for_high = tl.zeros((BLOCK,), tl.float32)
    for start in range(part * BLOCK, columns, parts * BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        at = row * columns + column
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dx, scale, low, high = tiles.fake_quantize_backward(grad, x, quantizer)
        for_scale += scale
        for_low += low
        for_high += high
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    to = parts_ptr + row * 3 * parts + part
    tl.store(to, tl.sum(for_scale))
    tl.store(to + parts, tl.sum(for_low))
    tl.store(to + 2 * parts, tl.sum(for_high))


@triton.jit
def _scalar_gradients_kernel(
    parts_ptr,
    out_ptr,
    grids,
    rows,
    parts,
    BITS: tl.constexpr,
    CLAMPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """parts: (grids, rows, 3, parts); out: (grids, 4, rows); grids: the scalars of each, (rows,).

    This program adds up the parts of one row of one grid.
    """
    row = tl.program_id(0).to(tl.int64)
    grid = tl.program_id(1)
    parts_ptr += (grid * rows + row) * 3 * parts
    out_ptr += grid * 4 * rows + row
    for_scale = tl.zeros((BLOCK,), tl.float32)
    for_low = tl.zeros((BLOCK,), tl.float32)
    for_high = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        at = parts_ptr + part
        for_scale += tl.load(at, mask=part < parts, other=0.0)
        for_low += tl.load(at + parts, mask=part < parts, other=0.0)
        for_high += tl.load(at + 2 * parts, mask=part < parts, other=0.0)
    for k in tl.static_range(len(BITS)):
        if grid == k:
            quantizer = tiles.load_quantizer(grids[k], row, BITS[k], CLAMPED[k])
            d_lower, d_upper, d_alpha, d_beta = tiles.scalar_gradients(
                tl.sum(for_scale), tl.sum(for_low), tl.sum(for_high), quantizer, BITS[k]
            )
            tl.store(out_ptr, d_lower)
            tl.store(out_ptr + rows, d_upper)
            tl.store(out_ptr + 2 * rows, d_alpha)
            tl.store(out_ptr + 3 * rows, d_beta)


# --- Host ----------------------------------------------------------------------------------------


def _forward(x: Tensor, scalars: Sequence[Tensor], bits: int, clamped: bool) -> Tensor:
    out = x.new_empty(x.shape)
    if x.numel() == 0:
        return out
    x = x.contiguous()
    rows = scalars[0].numel()
    columns = x.numel() // rows
    block = min(triton.next_power_of_2(columns), BYTES_FORWARD // x.element_size())
    blocks = triton.cdiv(columns, block)
    with on_device_of(x):
        _fake_quantize_fwd_kernel[(rows * blocks,)](
            x,
            out,
            tuple(s.contiguous() for s in scalars),
            columns,
            blocks,
            BITS=bits,
            CLAMPED=clamped,
            BLOCK=block,
            enable_fp_fusion=False,
        )
    return out


def _backward(
    grad: Tensor, x: Tensor, scalars: Sequence[Tensor], bits: int, clamped: bool
) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(x.shape)
    scalars = tuple(s.contiguous() for s in scalars)
    rows = scalars[0].numel()
    if x.numel() == 0:
        return dx, x.new_zeros((4, rows), dtype=torch.float32)
    grad, x = grad.contiguous(), x.contiguous()
    columns = x.numel() // rows
    block = min(triton.next_power_of_2(columns), ENTRIES_BACKWARD)
    enough = triton.cdiv(PROGRAMS_BACKWARD * processors(x.device), rows)
    parts = x.new_empty((1, rows, 3, min(triton.cdiv(columns, block), enough)), dtype=torch.float32)
    with on_device_of(x):
        _fake_quantize_bwd_kernel[(rows * parts.shape[-1],)](
            grad,
            x,
            dx,
            parts,
            scalars,
            columns,
            parts.shape[-1],
            BITS=bits,
            CLAMPED=clamped,
            BLOCK=block,
            enable_fp_fusion=False,
        )
    return dx, sum_parts(parts, [scalars], [bits], [clamped])[0]


def sum_parts(
    parts: Tensor, grids: Sequence[Sequence[Tensor]], bits: Sequence[int], clamped: Sequence[bool]
) -> Tensor:
    """Gradients (grids, 4, rows), float32, of the scalars from the programs' parts of three sums.

    parts: (grids, rows, 3, programs), of g (r - clamped w), of g on the low side, on the high side.
    """
    _, rows, _, programs = parts.shape
    out = parts.new_empty((len(grids), 4, rows))
    with on_device_of(parts):
        _scalar_gradients_kernel[(rows, len(grids))](
            parts,
            out,
            tuple(tuple(s.contiguous() for s in scalars) for scalars in grids),
            rows,
            programs,
            BITS=tuple(bits),
            CLAMPED=tuple(clamped),
            BLOCK=min(triton.next_power_of_2(programs), 1024),
        )
    return out


# --- Operators -----------------------------------------------------------------------------------


@torch.library.custom_op("compsrt::fake_quantize", mutates_args=(), device_types=("cpu", "cuda"))
def _fake_quantize(
    x: Tensor, lower: Tensor, upper: Tensor, alpha: Tensor, beta: Tensor, bits: int, clamped: bool
) -> Tensor:
    return _forward(x, (lower, upper, alpha, beta), bits, clamped)


@_fake_quantize.register_fake
def _(x, lower, upper, alpha, beta, bits, clamped):
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "compsrt::fake_quantize_backward", mutates_args=(), device_types=("cpu", "cuda")
)
def _fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    lower: Tensor,
    upper: Tensor,
    alpha: Tensor,
    beta: Tensor,
    bits: int,
    clamped: bool,
) -> tuple[Tensor, Tensor]:
    return _backward(grad, x, (lower, upper, alpha, beta), bits, clamped)


@_fake_quantize_backward.register_fake
def _(grad, x, lower, upper, alpha, beta, bits, clamped):
    return x.new_empty(x.shape), x.new_empty((4, lower.numel()), dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    *tensors, bits, clamped = inputs
    ctx.save_for_backward(*tensors)
    ctx.settings = bits, clamped


def _differentiate(ctx, grad):
    x, *scalars = ctx.saved_tensors
    dx, gradients = _fake_quantize_backward(grad, x, *scalars, *ctx.settings)
    return (dx, *give_back(gradients, scalars), None, None)


def give_back(gradients: Tensor, scalars: Sequence[Tensor]) -> list[Tensor]:
    """Gradients (4, rows) in the shapes and types of the four scalars."""
    return [g.reshape(s.shape).to(s.dtype) for g, s in zip(gradients, scalars, strict=True)]


_fake_quantize.register_autograd(_differentiate, setup_context=_setup_context)


def check_scalars(
    x: Tensor, lower: Tensor, upper: Tensor, alpha: Tensor | None, beta: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The scalars with zeros for those that are None.

    Raises ValueError for scalars of different shapes or elsewhere than x, and for a shape that is
    neither one value nor one for each of x's leading entries.
    """
    shape = lower.shape
    leading = 0
    while leading < min(len(shape), x.dim()) and shape[leading] == x.shape[leading]:
        leading += 1
    if lower.numel() != 1 and (lower.dim() != x.dim() or shape[leading:].numel() != 1):
        raise ValueError(
            f"lower: no kernel for shape {tuple(shape)} with x of shape {tuple(x.shape)}; use one"
            " value, one for each leading entry such as (C, 1), or COMPSRT_KERNELS=reference"
        )
    for name, scalar in (("lower", lower), ("upper", upper), ("alpha", alpha), ("beta", beta)):
        if scalar is not None and scalar.shape != shape:
            raise ValueError(
                f"{name}: shape {tuple(scalar.shape)} is not that of lower, {tuple(shape)}"
            )
        if scalar is not None and scalar.device != x.device:
            raise ValueError(f"{name}: it is on {scalar.device}; move it to x's {x.device}")
    zeros = torch.zeros_like(lower) if alpha is None or beta is None else lower
    return lower, upper, zeros if alpha is None else alpha, zeros if beta is None else beta


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

    x: any shape, float32, float16 or bfloat16 (float64 by the reference). lower, upper, alpha,
    beta: one value, shape (), or one for each of x's leading entries, such as (C_out, 1) for a
    scale per output channel of a weight (C_out, C_in), or (copying x) of an inner axis, such as
    (heads, 1, 1) for x (B, heads, M, K); alpha and beta may be None. codes:
    "clamped" (at most 2^bits levels) or "unclamped" (the published code, which does not bound its
    codes). Returns x's shape and type. Raises ValueError for bits outside 1 to 8, unknown codes,
    and scalars of another shape.
    """
    if not use_triton(x):
        return reference.fake_quantize(x, lower, upper, alpha, beta, bits=bits, codes=codes)
    reference.check_quantizer(bits, codes)
    axis = x.dim() - lower.dim()
    if lower.numel() > 1 and lower.dim() > 1 and axis > 0 and len(lower) == x.shape[axis]:
        rows = x.movedim(axis, 0)
        shape = (-1, *[1] * (x.dim() - 1))
        more = (None if s is None else s.view(shape) for s in (alpha, beta))
        bounds = lower.view(shape), upper.view(shape)
        return fake_quantize(rows, *bounds, *more, bits=bits, codes=codes).movedim(0, axis)
    scalars = check_scalars(x, lower, upper, alpha, beta)
    return _fake_quantize(x, *scalars, bits, codes == "clamped")


def examples():
    """Calls that `aot.py` compiles the kernels of."""
    for dtype in (torch.float32, torch.bfloat16):
        for shape, channels in (((65536, 60), ()), ((120, 60), (120, 1))):
            x = torch.empty(shape, dtype=dtype)
            scalars = [torch.empty(channels)] * 4
            label = f"{str(dtype).removeprefix('torch.')}" + " a channel" * bool(channels)
            yield label, lambda x=x, s=scalars: _forward(x, s, 4, True)
            yield label, lambda x=x, s=scalars: _backward(x, x, s, 4, True)
