"""Orthonormal Hadamard transform of the last axis, differentiable.

    y = scale x H,    H (n, n) with entries +-1/sqrt(n) and orthogonal rows

x: (..., size), size <= n; what is missing to n counts as zero and is never read. Returns
(..., n). H is that of `transforms.hadamard`: Sylvester's for powers of two, Paley's for orders
such as 12, 20, 28, 60 and 180, and for twice a known order [[H, H], [H, -H]].

By that last rule n = PARTS x BASE with PARTS a power of two and BASE at most 128 (or 256 where
there is no half, as for 180). A row of x is PARTS pieces of BASE entries; each piece is one product
with the signs of the base matrix on tensor cores, and between the pieces go butterflies, sums and
differences of whole tiles that stay in registers. The signs are exact in half types, so that a
float32 x needs three products, of its three bf16 pieces, and loses nothing. One read and one
write of x. The gradient is the same transform with the transposed base, cropped to size.

Sources: J. J. Sylvester, 1867; R. E. A. C. Paley, 1933. Products with a small constant matrix in
place of butterflies alone: the tensor cores are idle while the row comes from memory.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .. import transforms
from . import reference, tiles
from .dispatch import on_device_of, tl, triton, use_triton

LARGEST_ORDER = 1024
LARGEST_BASE = 128  # with 64, the 16 pieces of order 1024 spill registers on gfx942
# Rows, warps and depth of a program are those that spill no register on any target of aot.py;
# their speed is not measured yet.
BYTES = 4096  # of x for each warp


# --- Kernels -------------------------------------------------------------------------------------


@triton.jit
def _times_signs(x, signs, total):
    """total + x times signs; a float32 x goes through in three bf16 pieces, without loss."""
    if x.dtype == tl.float32:
        high, middle, low = tiles.split(x)
        total = tiles.dot(high, signs, tiles.dot(middle, signs, tiles.dot(low, signs, total)))
    else:  # Triton 3.6 compiles what comes after a return too
        total = tiles.dot(x, signs, total)
    return total


@triton.jit
def _butterflies(pieces, PARTS: tl.constexpr):
    """Sylvester's transform, without its factor, between the tiles of a tuple."""
    if PARTS == 1:
        return pieces
    else:
        HALF: tl.constexpr = PARTS // 2
        sums = ()
        differences = ()
        for i in tl.static_range(HALF):
            sums += (pieces[i] + pieces[i + HALF],)
            differences += (pieces[i] - pieces[i + HALF],)
        return _butterflies(sums, HALF) + _butterflies(differences, HALF)


@triton.jit
def _hadamard_kernel(
    x_ptr,
    signs_ptr,
    out_ptr,
    rows,
    factor,
    STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_OUT: tl.constexpr,
    PARTS: tl.constexpr,
    BASE: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """x: (rows, SIZE), rows STRIDE apart; signs: (WIDTH, WIDTH), BASE rounded up and filled with
    zeros; out: (rows, SIZE_OUT). This program transforms ROWS rows.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    x_ptr += first * STRIDE
    out_ptr += first * SIZE_OUT
    row = tl.arange(0, ROWS)[:, None]
    known = row < rows - first
    column = tl.arange(0, WIDTH)[None, :]
    pieces = ()
    for part in tl.static_range(PARTS):
        piece = tl.zeros((ROWS, WIDTH), tl.float32)
        for start in tl.range(0, WIDTH, DEPTH, num_stages=3):
            k = start + tl.arange(0, DEPTH)
            entry = part * BASE + k[None, :]
            inside = known & (k[None, :] < BASE) & (entry < SIZE)
            x = tl.load(x_ptr + row * STRIDE + entry, mask=inside, other=0.0)
            signs = tl.load(signs_ptr + k[:, None] * WIDTH + column)
            piece = _times_signs(x, signs, piece)
        pieces += (piece,)
    pieces = _butterflies(pieces, PARTS)
    for part in tl.static_range(PARTS):
        entry = part * BASE + column
        inside = known & (column < BASE) & (entry < SIZE_OUT)
        out = (pieces[part] * factor).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * SIZE_OUT + entry, out, mask=inside)


# --- Host ----------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _factors(order: int) -> tuple[int, int]:
    """PARTS and BASE of an order. Raises ValueError for one without a matrix or a kernel."""
    if not transforms.has_hadamard(order):
        transforms.hadamard(order)  # says so, and what to use instead
    parts, base = 1, order
    while base > LARGEST_BASE and base % 2 == 0 and transforms.has_hadamard(base // 2):
        parts, base = 2 * parts, base // 2
    if order > LARGEST_ORDER or base > 256:
        raise ValueError(
            f"order: no kernel for {order}; use one up to {LARGEST_ORDER},"
            " or COMPSRT_KERNELS=reference"
        )
    return parts, base


@torch.compiler.assume_constant_result  # nothing for a compiler to trace
def _check(order: int) -> None:
    _factors(order)


@functools.lru_cache(maxsize=64)
def _signs(base: int, transposed: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    width = max(16, transforms.next_power_of_two(base))
    signs = transforms.hadamard(base).sign()
    padded = torch.zeros(width, width, dtype=dtype)
    padded[:base, :base] = signs.mT if transposed else signs
    return padded.to(device)


def _transform(x: Tensor, order: int, size_out: int, transposed: bool, scale: float) -> Tensor:
    out = x.new_empty((*x.shape[:-1], size_out))
    if out.numel() == 0:
        return out
    x = x.reshape(-1, x.shape[-1])
    x = x if x.stride(1) == 1 else x.contiguous()
    parts, base = _factors(order)
    signs_type = torch.float16 if x.dtype == torch.float16 else torch.bfloat16
    signs = _signs(base, transposed, x.device, signs_type)
    width = signs.shape[0]
    warps = 4 if parts * width <= 128 else 8
    block = min(128, warps * BYTES // (width * x.element_size())) if parts == 1 else 16
    with on_device_of(x):
        _hadamard_kernel[(triton.cdiv(len(x), block),)](
            x,
            signs,
            out,
            len(x),
            scale / math.sqrt(order),
            STRIDE=x.stride(0),
            SIZE=x.shape[1],
            SIZE_OUT=size_out,
            PARTS=parts,
            BASE=base,
            WIDTH=width,
            DEPTH=min(width, 32 if parts == 1 else 8192 // width),
            ROWS=block,
            num_warps=warps,
        )
    return out


# --- Operator ------------------------------------------------------------------------------------


@torch.library.custom_op("compsrt::hadamard", mutates_args=(), device_types=("cpu", "cuda"))
def _hadamard(x: Tensor, order: int, size_out: int, transposed: bool, scale: float) -> Tensor:
    return _transform(x, order, size_out, transposed, scale)


@_hadamard.register_fake
def _(x, order, size_out, transposed, scale):
    return x.new_empty((*x.shape[:-1], size_out))


def _setup_context(ctx, inputs, output):
    x, order, _, transposed, scale = inputs
    ctx.settings = order, x.shape[-1], not transposed, scale


def _differentiate(ctx, grad):
    return _hadamard(grad, *ctx.settings), None, None, None, None


_hadamard.register_autograd(_differentiate, setup_context=_setup_context)


def hadamard_transform(x: Tensor, order: int | None = None, *, scale: float = 1.0) -> Tensor:
    """Orthonormal Hadamard transform of the last axis, times scale, differentiable.

    x: (..., n), float32, float16 or bfloat16 (float64 by the reference). order: None for n itself;
    above n, x is zero-padded at the end. Returns (..., order) in x's type. Raises ValueError for
    an order below n, one that no Hadamard matrix is known for, and one without a kernel.
    """
    if not use_triton(x):
        out = reference.hadamard_transform(x, order)
        return out if scale == 1 else out * scale
    size = x.shape[-1]
    order = size if order is None else order
    if order < size:
        raise ValueError(f"order: {order} is below the {size} entries of x's last axis")
    _check(order)
    return _hadamard(x, order, order, False, float(scale))


def examples():
    """Calls that `aot.py` compiles the kernels of."""
    for dtype in (torch.float32, torch.bfloat16):
        for size, order in ((10, 16), (60, 60), (60, 64), (120, 120), (180, 180), (1024, 1024)):
            x = torch.empty(4096, size, dtype=dtype)
            label = f"{str(dtype).removeprefix('torch.')} {size} to {order}"
            yield label, lambda x=x, order=order: _transform(x, order, order, False, 1.0)
