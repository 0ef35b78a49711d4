"""Rotation and fake quantization in one pass: x P to 2^bits levels, and back if asked for.

    v = x P    v_hat_i = fq_i(v)    y_i = v_hat_i  or  v_hat_i P^T        i = 1, 2, 3

x: (..., K); P: (K, K'), any matrix with orthonormal rows: Hadamard, exact or padded, DCT, learned.
One to three quantizers (q, k and v have one each) share the read of x and the product. Only x and
the scalars are kept for the backward, which computes v again:

    g_i  the gradient of v_hat_i: that of y_i, or that times P        dx = (sum_i dv_i) P^T

where dv_i and the three sums of each quantizer are those of `fake_quant.py`, and so is the
second kernel that adds up the programs' parts.

The kernels hold rows of up to 128 entries, K and K', in registers. Wider ones, and a scale for
each channel, are composed of a product and the kernel of `fake_quant.py`; the reference is the
same composition of `reference.fake_quantize`:

    rotated = x @ rotation
    outputs = [fake_quantize(rotated, *grid[:4], bits=grid.bits, codes=grid.codes) ...]
    outputs = [y @ rotation.mT for y in outputs]        # with back

Source: CompSRT (2026), which rotates every operand before it is quantized, and back after. Left out,
the way back goes into the next product: (X P)(W P)^T = X W^T.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..transforms import next_power_of_two
from . import reference, tiles
from .dispatch import on_device_of, tl, triton, use_triton
from .fake_quant import check_scalars, fake_quantize, give_back, sum_parts
from .reference import Grid

LARGEST = 128  # entries of a row
# Block sizes and warps are those that spill (nearly) no register on any target of aot.py; their
# speed is not measured yet. Float32 rows of 128 come 32 at a time because 64 would need more
# tensor memory than sm_100 has.
ENTRIES = 4096  # of x that a program holds, if that is 64 rows
BYTES = 16384  # that it holds at most


# --- Kernels -------------------------------------------------------------------------------------


@triton.jit
def _load_rotation(
    rotation_ptr,
    first,
    SIZE: tl.constexpr,
    ORDER: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Rows first to first + DEPTH of the rotation (SIZE, ORDER) as a tile (DEPTH, WIDTH)."""
    row = first + tl.arange(0, DEPTH)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (row < SIZE) & (column < ORDER)
    return tl.load(rotation_ptr + row * ORDER + column, mask=inside, other=0.0)


@triton.jit
def _rotate(
    x_ptr,
    rotation_ptr,
    rows,
    STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    ORDER: tl.constexpr,
    WIDTH_IN: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """x (rows, SIZE) times the rotation, a tile (ROWS, WIDTH) in float32."""
    row = tl.arange(0, ROWS)[:, None]
    rotated = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in tl.range(0, WIDTH_IN, DEPTH, num_stages=3):
        k = first + tl.arange(0, DEPTH)[None, :]
        x = tl.load(x_ptr + row * STRIDE + k, mask=(row < rows) & (k < SIZE), other=0.0)
        rotation = _load_rotation(rotation_ptr, first, SIZE, ORDER, DEPTH, WIDTH)
        rotated = tiles.dot(x, rotation.to(x.dtype), rotated)
    return rotated


@triton.jit
def _rotate_back(
    v,
    rotation_ptr,
    out_ptr,
    rows,
    SIZE: tl.constexpr,
    ORDER: tl.constexpr,
    WIDTH_IN: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A tile v (ROWS, WIDTH) times the rotation transposed, to out (rows, SIZE)."""
    row = tl.arange(0, ROWS)[:, None]
    v = v.to(out_ptr.dtype.element_ty)
    for first in tl.range(0, WIDTH_IN, DEPTH, num_stages=1):
        k = first + tl.arange(0, DEPTH)[None, :]
        rotation = _load_rotation(rotation_ptr, first, SIZE, ORDER, DEPTH, WIDTH)
        back = tl.trans(rotation.to(v.dtype))
        out = tiles.dot(v, back, tl.zeros((ROWS, DEPTH), tl.float32)).to(v.dtype)
        tl.store(out_ptr + row * SIZE + k, out, mask=(row < rows) & (k < SIZE))


@triton.jit
def _hadamard_fake_quantize_fwd_kernel(
    x_ptr,
    rotation_ptr,
    outs,
    grids,
    rows,
    STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    ORDER: tl.constexpr,
    WIDTH_IN: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    BACK: tl.constexpr,
    BITS: tl.constexpr,
    CLAMPED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """x: (rows, SIZE), rows STRIDE apart; rotation: (SIZE, ORDER); outs, one a grid: (rows, ORDER),
    or (rows, SIZE) for the way back; grids: four scalars each. This program does ROWS rows.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows -= first
    x_ptr += first * STRIDE
    v = _rotate(x_ptr, rotation_ptr, rows, STRIDE, SIZE, ORDER, WIDTH_IN, WIDTH, DEPTH, ROWS)
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    for i in tl.static_range(len(BITS)):
        quantizer = tiles.load_quantizer(grids[i], 0, BITS[i], CLAMPED[i])
        out = tiles.fake_quantize(v, quantizer)
        if BACK:
            # Entries beyond ORDER are not zero any more, but the rotation's columns there are.
            out_ptr = outs[i] + first * SIZE
            _rotate_back(
                out, rotation_ptr, out_ptr, rows, SIZE, ORDER, WIDTH_IN, WIDTH, DEPTH, ROWS
            )
        else:
            out_ptr = outs[i] + first * ORDER + row * ORDER + column
            inside = (row < rows) & (column < ORDER)
            tl.store(out_ptr, out.to(outs[i].dtype.element_ty), mask=inside)


@triton.jit
def _hadamard_fake_quantize_bwd_kernel(
    grads,
    x_ptr,
    rotation_ptr,
    dx_ptr,
    parts_ptr,
    grids,
    rows,
    STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    ORDER: tl.constexpr,
    WIDTH_IN: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    BACK: tl.constexpr,
    BITS: tl.constexpr,
    CLAMPED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """grads, one a grid: as outs of the forward; x, rotation, grids: as there; dx: (rows, SIZE);
    parts: (grids, 3, programs). This program does ROWS rows and its part of the sums of each grid.
    """
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    first = program * ROWS
    rows -= first
    x_ptr += first * STRIDE
    v = _rotate(x_ptr, rotation_ptr, rows, STRIDE, SIZE, ORDER, WIDTH_IN, WIDTH, DEPTH, ROWS)
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (column < ORDER)
    dv = tl.zeros((ROWS, WIDTH), tl.float32)
    for i in tl.static_range(len(BITS)):
        if BACK:
            grad_ptr = grads[i] + first * SIZE
            grad = _rotate(
                grad_ptr, rotation_ptr, rows, SIZE, SIZE, ORDER, WIDTH_IN, WIDTH, DEPTH, ROWS
            )
        else:
            grad_ptr = grads[i] + first * ORDER + row * ORDER + column
            grad = tl.load(grad_ptr, mask=inside, other=0.0).to(tl.float32)
        quantizer = tiles.load_quantizer(grids[i], 0, BITS[i], CLAMPED[i])
        d, scale, low, high = tiles.fake_quantize_backward(grad, v, quantizer)
        dv += d
        to = parts_ptr + i * 3 * programs + program
        tl.store(to, tl.sum(scale))
        tl.store(to + programs, tl.sum(low))
        tl.store(to + 2 * programs, tl.sum(high))
    dx_ptr += first * SIZE
    _rotate_back(dv, rotation_ptr, dx_ptr, rows, SIZE, ORDER, WIDTH_IN, WIDTH, DEPTH, ROWS)


# --- Host ----------------------------------------------------------------------------------------


def _settings(x: Tensor, rotation: Tensor, back: bool, bits, clamped) -> dict:
    """The constants of both kernels; x: (rows, K)."""
    size, order = rotation.shape
    widths = [max(16, next_power_of_two(n)) for n in (size, order)]
    width = max(widths)
    rows = min(BYTES // (width * x.element_size()), max(64, ENTRIES // width))
    return {
        "STRIDE": x.stride(0),
        "SIZE": size,
        "ORDER": order,
        "WIDTH_IN": widths[0],
        "WIDTH": widths[1],
        "DEPTH": 16 if x.dtype == torch.float32 else min(widths[0], 32),
        "BACK": back,
        "BITS": tuple(bits),
        "CLAMPED": tuple(clamped),
        "ROWS": rows,
        "num_warps": min(8, rows // 8),
    }


def _in_fours(scalars: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], ...]:
    return tuple(tuple(scalars[i : i + 4]) for i in range(0, len(scalars), 4))


def _rows(x: Tensor) -> Tensor:
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _forward(
    x: Tensor,
    rotation: Tensor,
    scalars: Sequence[Tensor],
    bits: Sequence[int],
    clamped: Sequence[bool],
    back: bool,
) -> list[Tensor]:
    width = rotation.shape[0 if back else 1]
    outs = [x.new_empty((*x.shape[:-1], width)) for _ in bits]
    if x.numel() == 0:
        return outs
    x, rotation = _rows(x), rotation.contiguous()
    settings = _settings(x, rotation, back, bits, clamped)
    with on_device_of(x):
        _hadamard_fake_quantize_fwd_kernel[(triton.cdiv(len(x), settings["ROWS"]),)](
            x, rotation, tuple(outs), _in_fours(scalars), len(x), **settings
        )
    return outs


def _backward(
    grads: Sequence[Tensor],
    x: Tensor,
    rotation: Tensor,
    scalars: Sequence[Tensor],
    bits: Sequence[int],
    clamped: Sequence[bool],
    back: bool,
) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(x.shape)
    if x.numel() == 0:
        return dx, x.new_zeros((len(bits), 4, 1), dtype=torch.float32)
    x, rotation = _rows(x), rotation.contiguous()
    settings = _settings(x, rotation, back, bits, clamped)
    programs = triton.cdiv(len(x), settings["ROWS"])
    parts = x.new_empty((len(bits), 1, 3, programs), dtype=torch.float32)
    grids = _in_fours(scalars)
    with on_device_of(x):
        _hadamard_fake_quantize_bwd_kernel[(programs,)](
            tuple(g.contiguous() for g in grads), x, rotation, dx, parts, grids, len(x), **settings
        )
    return dx, sum_parts(parts, grids, bits, clamped)


# --- Operators -----------------------------------------------------------------------------------


@torch.library.custom_op(
    "compsrt::hadamard_fake_quantize", mutates_args=(), device_types=("cpu", "cuda")
)
def _hadamard_fake_quantize(
    x: Tensor,
    rotation: Tensor,
    scalars: Sequence[Tensor],
    bits: Sequence[int],
    clamped: Sequence[bool],
    back: bool,
) -> list[Tensor]:
    return _forward(x, rotation, scalars, bits, clamped, back)


@_hadamard_fake_quantize.register_fake
def _(x, rotation, scalars, bits, clamped, back):
    width = rotation.shape[0 if back else 1]
    return [x.new_empty((*x.shape[:-1], width)) for _ in bits]


@torch.library.custom_op(
    "compsrt::hadamard_fake_quantize_backward", mutates_args=(), device_types=("cpu", "cuda")
)
def _hadamard_fake_quantize_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    rotation: Tensor,
    scalars: Sequence[Tensor],
    bits: Sequence[int],
    clamped: Sequence[bool],
    back: bool,
) -> tuple[Tensor, Tensor]:
    return _backward(grads, x, rotation, scalars, bits, clamped, back)


@_hadamard_fake_quantize_backward.register_fake
def _(grads, x, rotation, scalars, bits, clamped, back):
    return x.new_empty(x.shape), x.new_empty((len(bits), 4, 1), dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    x, rotation, scalars, *ctx.settings = inputs
    ctx.save_for_backward(x, rotation, *scalars)


def _differentiate(ctx, grads):
    x, rotation, *scalars = ctx.saved_tensors
    dx, gradients = _hadamard_fake_quantize_backward(grads, x, rotation, scalars, *ctx.settings)
    return dx, None, give_back(gradients.flatten(0, 1), scalars), None, None, None


_hadamard_fake_quantize.register_autograd(_differentiate, setup_context=_setup_context)


def _composed(
    x: Tensor, rotation: Tensor, grids: Sequence[Grid], back: bool, quantize: Callable
) -> tuple[Tensor, ...]:
    rotated = x @ rotation
    outputs = (quantize(rotated, *g[:4], bits=g.bits, codes=g.codes) for g in grids)
    return tuple(y @ rotation.mT if back else y for y in outputs)


def hadamard_fake_quantize(
    x: Tensor, rotation: Tensor, grids: Sequence[Grid], back: bool = False
) -> tuple[Tensor, ...]:
    """Rotate x once, quantize it by each grid, and rotate each back if `back`.

    x: (..., K), float32, float16 or bfloat16 (float64 by the reference); rotation: a constant
    (K, K') with orthonormal rows, which gets no gradient; grids: one to three, as arguments of
    `fake_quantize` for x @ rotation. Returns a tuple, one tensor a grid: (..., K'), or (..., K)
    with back. Raises ValueError for a rotation or a number of grids that do not fit.
    """
    if rotation.dim() != 2 or rotation.shape[0] != x.shape[-1]:
        raise ValueError(
            f"rotation: {tuple(rotation.shape)} does not fit x {tuple(x.shape)};"
            f" it needs two axes, the first of {x.shape[-1]}"
        )
    if not 1 <= len(grids) <= 3:
        raise ValueError(f"grids: {len(grids)} of them; pass one to three")
    rotation = rotation.detach()
    if not use_triton(x):
        return _composed(x, rotation.to(x.dtype), grids, back, reference.fake_quantize)
    if rotation.device != x.device:
        raise ValueError(f"rotation: it is on {rotation.device}; move it to x's {x.device}")
    if max(rotation.shape) > LARGEST or any(grid.lower.numel() > 1 for grid in grids):
        return _composed(x, rotation.to(x.dtype), grids, back, fake_quantize)
    scalars = []
    for grid in grids:
        reference.check_quantizer(grid.bits, grid.codes)
        scalars += check_scalars(x, *grid[:4])
    bits, clamped = [g.bits for g in grids], [g.codes == "clamped" for g in grids]
    return tuple(_hadamard_fake_quantize(x, rotation, scalars, bits, clamped, back))


def examples():
    """Calls that `aot.py` compiles the kernels of."""
    for dtype in (torch.float32, torch.bfloat16):
        for size, order, count, back in (
            (60, 60, 3, False),
            (60, 64, 1, True),
            (120, 120, 1, False),
            (10, 16, 1, True),
        ):
            x = torch.empty(65536, size, dtype=dtype)
            outs = [torch.empty(65536, size if back else order, dtype=dtype)] * count
            arguments = (
                torch.empty(size, order),
                [torch.empty(())] * 4 * count,
                [4] * count,
                [True] * count,
                back,
            )
            label = f"{str(dtype).removeprefix('torch.')} {size}" + " back" * back
            yield label, lambda x=x, a=arguments: _forward(x, *a)
            yield label, lambda x=x, a=arguments, outs=outs: _backward(outs, x, *a)
