"""Window attention of quantized operands: windows, shift, mask and bias by index arithmetic.

For every window and head, N = window^2 tokens, with constant rotations Rh, Rv, T (orthonormal rows):

    q^ = fq_q((scale q) Rh)    k^ = fq_k(k Rh)    v^ = fq_v(v Rv)
    P = softmax(q^ k^^T + relative bias + shift mask)    A^ = fq_a(P T)    out = A^ (T^T v^) Rv^T

q, k, v, out: (B, H, W, heads * d), read and written at the tokens' own places; Rh, Rv: (d, n);
T: (N, N'). The kernels take every rotation back before the product it would have to survive:
out = P^ V with P^ = A^ T^T and V = v^ Rv^T; and where Rh is padded (n > d), q^ Rh^T and k^ Rh^T
are multiplied instead of q^ and k^. P T and its way back go through SLICE columns of T at a time,
so that rotated probabilities are never held as a whole.

A cyclic shift by s takes the token at (y, x) of the shifted grid from ((y + s) mod H, (x + s) mod W).
In the last windows it brings together what the picture separates: two tokens of a window see
each other (else -100) if y >= H - s holds for both or for neither, and so for x.

The grids are persistent: a program does every so-manieth window of one head. Kept for the backward
are q, k, v, the table and the scalars; it computes all else again, with g the gradient of out:

    dP^ = g V^T    dV = P^^T g    dA^ = dP^ T    dP = dA T^T    dS = P (dP - rowsum(P dP))
    dq^ = dS k^    dk^ = dS^T q^    dv^ = dV Rv

and dq, dk, dv, dA through the quantizers (and scale, Rh^T, Rv^T). Every program sums its part of
what the scalars need (three sums a quantizer, as in `fake_quant.py`) and of dS, whose (N, N) parts
a second kernel gathers by relative position into the gradient of the table. No atomics, no value
read by the host.

The kernels hold heads of up to 32 entries (16 in float32 where anything is rotated) in windows of 4
or 8. All else is
composed of products and the kernels of `fake_quant.py` and `hadamard_fake_quant.py`, in the words
of `reference.attention.attend`. Source: SwinIR (2021) for the attention, CompSRT (2026) for its
rotated and quantized operands.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..transforms import next_power_of_two
from . import reference, tiles
from .attention_tiles import (
    load_bias,
    load_head,
    load_rotation,
    probabilities,
    quantize,
    quantize_backward,
    quantize_rotated,
    quantize_rotated_backward,
    quantizer_of,
    rotate,
    rotate_back,
    store_head,
    times,
)
from .dispatch import on_device_of, processors, tl, triton, use_triton
from .fake_quant import check_scalars, fake_quantize, give_back, sum_parts
from .hadamard_fake_quant import hadamard_fake_quantize
from .reference import Grid
from .reference.attention import attend, check_attention

WINDOWS = (4, 8)  # with as many tokens as a tile can have
LARGEST = 32  # entries of a head, rotated or not
LARGEST_ROTATED = 16  # of a float32 one where anything is rotated
# Warps, rows and slices are those that spill (nearly) no register on any target of aot.py, and so
# is the order of some lines below: the products in a loop share a layout, that of the last one.
# The speed of none of this is measured yet.
WARPS = 4  # twice as many for float32 with scalars a head, which would spill 56 bytes
ROWS_FORWARD = 32  # of the scores that a program holds
ROWS_BACKWARD = 16
SLICE = 16  # coefficients of the rotated probabilities at a time
ENTRIES = 8  # of the table whose gradients a program adds up
PARTS = 8  # of theirs that it reads at a time
PROGRAMS_FORWARD = 4  # for each processor: as many as have room at once
PROGRAMS_BACKWARD = 2


# --- Kernels -------------------------------------------------------------------------------------


@triton.jit
def _quant_window_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    strides,
    table_ptr,
    rotations,
    grids,
    scale,
    height,
    width,
    heads,
    windows,
    WINDOW: tl.constexpr,
    SHIFT: tl.constexpr,
    SIZE: tl.constexpr,
    ORDER: tl.constexpr,
    VALUE_ORDER: tl.constexpr,
    TOKEN_ORDER: tl.constexpr,
    WIDTHS: tl.constexpr,
    ROWS: tl.constexpr,
    SLICE: tl.constexpr,
    BITS: tl.constexpr,
    CLAMPED: tl.constexpr,
    PER_HEAD: tl.constexpr,
):
    """q, k, v, out: (B, height, width, heads * SIZE), the first three with strides of three axes;
    table: ((2 WINDOW - 1)^2, heads); rotations: of query and key (SIZE, ORDER), value (SIZE,
    VALUE_ORDER) and token (N, TOKEN_ORDER), or None; grids: four scalars each, or PER_HEAD four
    vectors (heads,); WIDTHS: of tiles for SIZE, ORDER and VALUE_ORDER.

    This program does every so-manieth of all windows, for one head and ROWS of its queries.
    """
    N: tl.constexpr = WINDOW * WINDOW
    WIDTH: tl.constexpr = WIDTHS[0]
    TYPE: tl.constexpr = q_ptr.dtype.element_ty
    program = tl.program_id(0)
    head = program % heads
    grid_row = head if PER_HEAD else 0
    token = program // heads % (N // ROWS) * ROWS + tl.arange(0, ROWS)
    first = program // heads // (N // ROWS)
    step = tl.num_programs(0) // heads // (N // ROWS)
    bias = load_bias(table_ptr, token, head, heads, WINDOW)
    head_rotation = rotations[0]
    if head_rotation is not None:
        head_rotation = load_rotation(head_rotation, SIZE, ORDER, WIDTH, WIDTHS[1], TYPE)
    value_rotation = rotations[1]
    if value_rotation is not None:
        value_rotation = load_rotation(value_rotation, SIZE, VALUE_ORDER, WIDTH, WIDTHS[2], TYPE)
    query = quantizer_of(grids, 0, grid_row, BITS, CLAMPED)
    key = quantizer_of(grids, 1, grid_row, BITS, CLAMPED)
    value = quantizer_of(grids, 2, grid_row, BITS, CLAMPED)
    attention = quantizer_of(grids, 3, grid_row, BITS, CLAMPED)
    for window in tl.range(first, windows, step, num_stages=1, disable_licm=True):
        tokens = tiles.locate(tl.arange(0, N), window, height, width, WINDOW, SHIFT)
        k = rotate(load_head(k_ptr, strides[1], tokens, head, SIZE, WIDTH), head_rotation)
        k = quantize(k, key, ORDER, TYPE)
        v = rotate(load_head(v_ptr, strides[2], tokens, head, SIZE, WIDTH), value_rotation)
        v = rotate_back(quantize(v, value, VALUE_ORDER, TYPE), value_rotation)
        rows = tiles.locate(token, window, height, width, WINDOW, SHIFT)
        q = rotate(load_head(q_ptr, strides[0], rows, head, SIZE, WIDTH), head_rotation) * scale
        q = quantize(q, query, ORDER, TYPE)
        if ORDER > SIZE:
            q = rotate_back(q, head_rotation)
            k = rotate_back(k, head_rotation)
        p = probabilities(q, k, bias, rows.region, tokens.region, SHIFT)
        p = quantize_rotated(p, rotations[2], attention, TOKEN_ORDER, SLICE, TYPE)
        store_head(out_ptr, rows.number, head, heads, times(v, tl.trans(p)), SIZE)


@triton.jit
def _quant_window_attention_bwd_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    strides,
    table_ptr,
    rotations,
    grids,
    parts_ptr,
    table_parts_ptr,
    scale,
    height,
    width,
    heads,
    windows,
    WINDOW: tl.constexpr,
    SHIFT: tl.constexpr,
    SIZE: tl.constexpr,
    ORDER: tl.constexpr,
    VALUE_ORDER: tl.constexpr,
    TOKEN_ORDER: tl.constexpr,
    WIDTHS: tl.constexpr,
    ROWS: tl.constexpr,
    SLICE: tl.constexpr,
    BITS: tl.constexpr,
    CLAMPED: tl.constexpr,
    PER_HEAD: tl.constexpr,
):
    """grad, dq, dk, dv: as out, q, k, v of the forward, the first four with strides; parts: (4, 3,
    programs), or PER_HEAD (4, heads, 3, programs / heads); table_parts: (programs / heads, heads, N,
    N) or None; all others: as in the forward.

    This program does every so-manieth of all windows, for one head. Quantizers are loaded and
    operands quantized where they are needed: held, they would spill.
    """
    N: tl.constexpr = WINDOW * WINDOW
    WIDTH: tl.constexpr = WIDTHS[0]
    TYPE: tl.constexpr = q_ptr.dtype.element_ty
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    head = program % heads
    grid_row = head if PER_HEAD else 0
    head_rotation = rotations[0]
    if head_rotation is not None:
        head_rotation = load_rotation(head_rotation, SIZE, ORDER, WIDTH, WIDTHS[1], TYPE)
    value_rotation = rotations[1]
    if value_rotation is not None:
        value_rotation = load_rotation(value_rotation, SIZE, VALUE_ORDER, WIDTH, WIDTHS[2], TYPE)
    totals = tl.zeros((16,), tl.float32)
    first = program // heads
    step = programs // heads
    for window in tl.range(first, windows, step, num_stages=1, disable_licm=True):
        tokens = tiles.locate(tl.arange(0, N), window, height, width, WINDOW, SHIFT)
        k = rotate(load_head(k_ptr, strides[2], tokens, head, SIZE, WIDTH), head_rotation)
        v = rotate(load_head(v_ptr, strides[3], tokens, head, SIZE, WIDTH), value_rotation)
        dk = tl.zeros((WIDTH, N), tl.float32)
        dv = tl.zeros((WIDTH, N), tl.float32)
        for row in tl.range(0, N, ROWS, num_stages=1, disable_licm=True):
            token = row + tl.arange(0, ROWS)
            rows = tiles.locate(token, window, height, width, WINDOW, SHIFT)
            q = load_head(q_ptr, strides[1], rows, head, SIZE, WIDTH)
            q = rotate(q, head_rotation) * scale
            query = quantizer_of(grids, 0, grid_row, BITS, CLAMPED)
            q_hat = quantize(q, query, ORDER, TYPE)
            key = quantizer_of(grids, 1, grid_row, BITS, CLAMPED)
            k_hat = quantize(k, key, ORDER, TYPE)
            if ORDER > SIZE:
                q_hat = rotate_back(q_hat, head_rotation)
                k_hat = rotate_back(k_hat, head_rotation)
            bias = load_bias(table_ptr, token, head, heads, WINDOW)
            p = probabilities(q_hat, k_hat, bias, rows.region, tokens.region, SHIFT)
            value = quantizer_of(grids, 2, grid_row, BITS, CLAMPED)
            v_hat = rotate_back(quantize(v, value, VALUE_ORDER, TYPE), value_rotation)
            grad = load_head(grad_ptr, strides[0], rows, head, SIZE, WIDTH)
            dp = times(tl.trans(grad), v_hat)
            attention = quantizer_of(grids, 3, grid_row, BITS, CLAMPED)
            p_hat, dp, totals = quantize_rotated_backward(
                dp, p, rotations[2], attention, totals, 3, TOKEN_ORDER, SLICE, TYPE
            )
            grad = load_head(grad_ptr, strides[0], rows, head, SIZE, WIDTH)
            dv = tiles.dot(grad, p_hat, dv)
            ds = tiles.softmax_backward(dp, p)
            if table_parts_ptr is not None:
                to = table_parts_ptr + program.to(tl.int64) * (N * N)
                to += token[:, None] * N + tl.arange(0, N)[None, :]
                tl.store(to, ds + tl.load(to, mask=window != first, other=0.0))
            ds = ds.to(TYPE)
            key = quantizer_of(grids, 1, grid_row, BITS, CLAMPED)
            k_hat = quantize(k, key, ORDER, TYPE)
            if ORDER > SIZE:
                k_hat = rotate_back(k_hat, head_rotation)
            dq = times(k_hat, tl.trans(ds))
            if ORDER > SIZE:
                dq = rotate(dq.to(TYPE), head_rotation)
            query = quantizer_of(grids, 0, grid_row, BITS, CLAMPED)
            dq, totals = quantize_backward(dq, q, query, totals, 0, 0)
            dq = rotate_back((dq * scale).to(TYPE), head_rotation)
            store_head(dq_ptr, rows.number, head, heads, dq, SIZE)
            dk = tiles.dot(q_hat, ds, dk)  # last: its layout is the one that spills least
        if ORDER > SIZE:
            dk = rotate(dk.to(TYPE), head_rotation)
        key = quantizer_of(grids, 1, grid_row, BITS, CLAMPED)
        dk, totals = quantize_backward(dk, k, key, totals, 1, 0)
        dk = rotate_back(dk.to(TYPE), head_rotation)
        store_head(dk_ptr, tokens.number, head, heads, dk, SIZE)
        dv = rotate(dv.to(TYPE), value_rotation)
        value = quantizer_of(grids, 2, grid_row, BITS, CLAMPED)
        dv, totals = quantize_backward(dv, v, value, totals, 2, 0)
        dv = rotate_back(dv.to(TYPE), value_rotation)
        store_head(dv_ptr, tokens.number, head, heads, dv, SIZE)
        tl.debug_barrier()  # what one thread wrote to table_parts another may read
    row = tl.arange(0, 16)
    if PER_HEAD:
        to = ((row // 3 * heads + head) * 3 + row % 3) * step + first
    else:
        to = row * programs + program
    tl.store(parts_ptr + to, totals, mask=row < 12)


@triton.jit
def _bias_table_bwd_kernel(
    parts_ptr,
    out_ptr,
    heads,
    parts,
    WINDOW: tl.constexpr,
    PARTS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """parts: (parts, heads, N, N); out: ((2 WINDOW - 1)^2, heads).

    This program adds up, for one head and ENTRIES of the table, all pairs of tokens at an entry's
    relative position: at most one for each second token.
    """
    N: tl.constexpr = WINDOW * WINDOW
    SIDE: tl.constexpr = 2 * WINDOW - 1
    program = tl.program_id(0).to(tl.int64)
    head = program % heads
    entry = program // heads * ENTRIES + tl.arange(0, ENTRIES)
    row = tl.arange(0, ENTRIES * PARTS)  # of one entry and every PARTS-th part
    offset = (program // heads * ENTRIES + row // PARTS)[:, None]
    token = tl.arange(0, N)[None, :]
    y = token // WINDOW + offset // SIDE - (WINDOW - 1)
    x = token % WINDOW + offset % SIDE - (WINDOW - 1)
    pair = (y >= 0) & (y < WINDOW) & (x >= 0) & (x < WINDOW)
    at = parts_ptr + head * (N * N) + (y * WINDOW + x) * N + token
    total = tl.zeros((ENTRIES * PARTS, N), tl.float32)
    for start in range(0, parts, PARTS):
        part = (start + row % PARTS)[:, None]
        total += tl.load(at + part * heads * (N * N), mask=pair & (part < parts), other=0.0)
    sums = tl.sum(tl.reshape(tl.sum(total, 1), (ENTRIES, PARTS)), 1)
    tl.store(out_ptr + entry * heads + head, sums, mask=entry < SIDE * SIDE)


# --- Host ----------------------------------------------------------------------------------------


def _settings(q, heads, window, shift, rotations, scalars, bits, clamped, rows) -> dict:
    """The constants of both kernels."""
    size, tokens = q.shape[3] // heads, window * window
    orders = [
        n if r is None else r.shape[1] for r, n in zip(rotations, (size, size, tokens), strict=True)
    ]
    return {
        "WINDOW": window,
        "SHIFT": shift,
        "SIZE": size,
        "ORDER": orders[0],
        "VALUE_ORDER": orders[1],
        "TOKEN_ORDER": orders[2],
        "WIDTHS": tuple(max(16, next_power_of_two(n)) for n in (size, *orders[:2])),
        "ROWS": min(rows, tokens),
        "SLICE": SLICE,
        "BITS": tuple(bits),
        "CLAMPED": tuple(clamped),
        "PER_HEAD": scalars[0].numel() > 1,
        "num_warps": WARPS * (1 + (scalars[0].numel() > 1 and q.dtype == torch.float32)),
    }


def _programs(q: Tensor, columns: int, windows: int, processor: int) -> int:
    """A multiple of columns: about so many for each processor, but none without a window."""
    return columns * min(windows, triton.cdiv(processor * processors(q.device), columns))


def _readable(*tensors: Tensor) -> tuple[list[Tensor], tuple]:
    """The tensors with entries of a token side by side, and their other strides."""
    dense = [x if x.stride(3) == 1 else x.contiguous() for x in tensors]
    return dense, tuple(x.stride()[:3] for x in dense)


def _in_fours(scalars: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], ...]:
    scalars = [scalar.contiguous() for scalar in scalars]
    return tuple(tuple(scalars[i : i + 4]) for i in range(0, len(scalars), 4))


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    scalars: Sequence[Tensor],
    head_rotation: Tensor | None,
    value_rotation: Tensor | None,
    token_rotation: Tensor | None,
    heads: int,
    window: int,
    shift: int,
    scale: float,
    bits: Sequence[int],
    clamped: Sequence[bool],
) -> Tensor:
    out = q.new_empty(q.shape)
    if q.numel() == 0:
        return out
    batch, height, width, _ = q.shape
    windows = batch * (height // window) * (width // window)
    rotations = head_rotation, value_rotation, token_rotation
    settings = _settings(q, heads, window, shift, rotations, scalars, bits, clamped, ROWS_FORWARD)
    columns = heads * (window * window // settings["ROWS"])
    inputs, strides = _readable(q, k, v)
    with on_device_of(q):
        _quant_window_attention_fwd_kernel[(_programs(q, columns, windows, PROGRAMS_FORWARD),)](
            *inputs,
            out,
            strides,
            table.contiguous(),
            tuple(r if r is None else r.contiguous() for r in rotations),
            _in_fours(scalars),
            float(scale),
            height,
            width,
            heads,
            windows,
            **settings,
        )
    return out


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    scalars: Sequence[Tensor],
    head_rotation: Tensor | None,
    value_rotation: Tensor | None,
    token_rotation: Tensor | None,
    heads: int,
    window: int,
    shift: int,
    scale: float,
    bits: Sequence[int],
    clamped: Sequence[bool],
    with_table: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    d_table = table.new_empty(table.shape if with_table else (0,), dtype=torch.float32)
    if q.numel() == 0:
        none = q.new_zeros((4, 4, scalars[0].numel()), dtype=torch.float32)
        return dq, dk, dv, none, d_table.zero_()
    batch, height, width, _ = q.shape
    windows = batch * (height // window) * (width // window)
    rotations = head_rotation, value_rotation, token_rotation
    programs = _programs(q, heads, windows, PROGRAMS_BACKWARD)
    rows = scalars[0].numel()
    parts = q.new_empty((4, rows, 3, programs // rows), dtype=torch.float32)
    table_parts = None
    if with_table:
        table_parts = parts.new_empty((programs // heads, heads, window**2, window**2))
    inputs, strides = _readable(grad, q, k, v)
    grids = _in_fours(scalars)
    with on_device_of(q):
        _quant_window_attention_bwd_kernel[(programs,)](
            *inputs,
            dq,
            dk,
            dv,
            strides,
            table.contiguous(),
            tuple(r if r is None else r.contiguous() for r in rotations),
            grids,
            parts,
            table_parts,
            float(scale),
            height,
            width,
            heads,
            windows,
            **_settings(q, heads, window, shift, rotations, scalars, bits, clamped, ROWS_BACKWARD),
        )
        if table_parts is not None:
            _bias_table_bwd_kernel[(triton.cdiv(len(table), ENTRIES) * heads,)](
                table_parts,
                d_table,
                heads,
                programs // heads,
                WINDOW=window,
                PARTS=PARTS,
                ENTRIES=ENTRIES,
            )
    return dq, dk, dv, sum_parts(parts, grids, bits, clamped), d_table


# --- Operators -----------------------------------------------------------------------------------


_quant_window_attention = torch.library.custom_op(
    "compsrt::quant_window_attention", _forward, mutates_args=(), device_types=("cpu", "cuda")
)
_quant_window_attention_backward = torch.library.custom_op(
    "compsrt::quant_window_attention_backward",
    _backward,
    mutates_args=(),
    device_types=("cpu", "cuda"),
)


@_quant_window_attention.register_fake
def _(q, *_arguments):
    return q.new_empty(q.shape)


@_quant_window_attention_backward.register_fake
def _(grad, q, k, v, table, scalars, *arguments):
    with_table = arguments[-1]
    return (
        *(q.new_empty(q.shape) for _ in range(3)),
        q.new_empty((4, 4, scalars[0].numel()), dtype=torch.float32),
        table.new_empty(table.shape if with_table else (0,), dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output):
    q, k, v, table, scalars, *rotations = inputs[:8]
    ctx.save_for_backward(q, k, v, table, *rotations, *scalars)
    ctx.settings = inputs[8:]


def _differentiate(ctx, grad):
    q, k, v, table, *others = ctx.saved_tensors
    rotations, scalars = others[:3], others[3:]
    with_table = ctx.needs_input_grad[3]
    dq, dk, dv, gradients, d_table = _quant_window_attention_backward(
        grad, q, k, v, table, scalars, *rotations, *ctx.settings, with_table
    )
    d_scalars = give_back(gradients.flatten(0, 1), scalars)
    d_table = d_table.to(table.dtype) if with_table else None
    return dq, dk, dv, d_table, d_scalars, *[None] * 9


_quant_window_attention.register_autograd(_differentiate, setup_context=_setup_context)


def _quantize_tensor(x: Tensor, rotation: Tensor | None, grid: Grid) -> Tensor:
    if rotation is not None and grid.lower.numel() > 1:
        x, rotation = x @ rotation, None
    if rotation is None:
        return fake_quantize(x, *grid[:4], bits=grid.bits, codes=grid.codes)
    return hadamard_fake_quantize(x, rotation, [grid])[0]


def _multiply(
    a: Tensor, b: Tensor, a_grid: Grid, b_grid: Grid | None = None, *, rotation: Tensor | None
) -> Tensor:
    """`reference.quant_matmul` of kernels."""
    b = b if b_grid is None else _quantize_tensor(b, None, b_grid)
    return _quantize_tensor(a, rotation, a_grid) @ b


def quant_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    grids: Sequence[Grid],
    *,
    heads: int,
    window: int,
    shift: int,
    scale: float,
    head_rotation: Tensor | None = None,
    value_rotation: Tensor | None = None,
    token_rotation: Tensor | None = None,
) -> Tensor:
    """Attention inside shifted windows of quantized queries, keys, values and probabilities.

    q, k, v: (B, H, W, heads * d), H and W multiples of the window, float32, float16 or bfloat16
    (float64 by the reference), of any strides, such as the thirds of one tensor, but read as they
    are only if those of the last axis are one; table: relative-position bias ((2 window - 1)^2,
    heads); grids: of query, key, value and attention, as arguments of `fake_quantize` with one
    value a scalar; shift: of the windows, down and right, below the window; scale: what q is
    multiplied by. Constants with orthonormal rows, which get no gradient, None for the identity:
    head_rotation (of query and key) and value_rotation (d, n), token_rotation (N, N'), N = window^2.

    Returns (B, H, W, heads * d) in q's type, the tokens at their own places. Gradients for q, k, v,
    the table and the scalars. Raises ValueError for arguments that do not fit each other.
    """
    arguments = q, k, v, table, grids, heads, window, shift, scale
    rotations = head_rotation, value_rotation, token_rotation
    check_attention(*arguments, *rotations)
    if not use_triton(q):
        return reference.quant_window_attention(
            q,
            k,
            v,
            table,
            grids,
            heads=heads,
            window=window,
            shift=shift,
            scale=scale,
            head_rotation=head_rotation,
            value_rotation=value_rotation,
            token_rotation=token_rotation,
        )
    widths = [q.shape[3] // heads, *(r.shape[1] for r in rotations[:2] if r is not None)]
    rotated = any(r is not None for r in rotations)
    # Wide float32 heads with a rotation would spill up to 368 bytes a thread.
    largest = LARGEST_ROTATED if rotated and q.dtype == torch.float32 else LARGEST
    if window not in WINDOWS or max(widths) > largest:
        return attend(*arguments, *rotations, quantize=_quantize_tensor, multiply=_multiply)
    a_head = q.new_empty((heads, 1, 1))  # what has scalars of its own
    scalars = [scalar for grid in grids for scalar in check_scalars(a_head, *grid[:4])]
    if any(scalar.numel() > 1 for scalar in scalars):
        scalars = [scalar.expand(a_head.shape) for scalar in scalars]
    if q.shape[:3].numel() >= 2**31:
        raise ValueError(
            f"q: no kernel for {q.shape[:3].numel()} tokens; split the batch below 2^31 tokens"
        )
    constants = [r if r is None else r.detach() for r in rotations]
    bits, clamped = [g.bits for g in grids], [g.codes == "clamped" for g in grids]
    return _quant_window_attention(
        q, k, v, table, scalars, *constants, heads, window, shift, float(scale), bits, clamped
    )


def examples():
    """Calls that `aot.py` compiles the kernels of."""
    for dtype in (torch.float32, torch.bfloat16):
        for size, order, head_rotated, token_rotated, shift, per_head in (
            (10, 10, False, True, 0, False),
            (10, 10, False, True, 4, True),
            (10, 10, True, True, 4, False),
            (10, 16, True, True, 4, False),
            (32, 32, False, False, 4, False),
        ):
            q = torch.empty(16, 64, 64, 6 * size, dtype=dtype)
            head = torch.empty(size, order) if head_rotated else None
            token = torch.empty(64, 64) if token_rotated else None
            scalars = [torch.empty((6, 1, 1) if per_head else ())] * 16
            arguments = q, q, q, torch.empty(225, 6), scalars, head, head, token
            settings = 6, 8, shift, size**-0.5, [4] * 4, [True] * 4
            label = f"{str(dtype).removeprefix('torch.')} {size}" + f" to {order}" * head_rotated
            label += " mixed" * token_rotated + " a head" * per_head
            yield label, lambda a=arguments, s=settings: _forward(*a, *s)
            yield label, lambda q=q, a=arguments, s=settings: _backward(q, *a, *s, with_table=True)
