"""DOBI: the bounds with the least squared error among a number of shrunken ranges.

    candidate i:  l_i = min + i d,  u_i = max - i d,  d = (max - min)/(2 candidates)
    one-sided:    l_i = min,        u_i = max - 2 i d
    error_i = sum_x (x - fq_i(x))^2 = s_i^2 sum_x (t - clamp(round(t), 0, L))^2,  t = (x - l_i)/s_i

A program holds a piece of a row in registers and sums (t - r)^2 for a block of candidates: about
eight operations for an element and a candidate, and no sort. The reference does less work (one
sort and prefix sums serve all candidates) and runs on a device too, COMPSRT_KERNELS=reference;
which is faster for which size is not measured yet.

Rounding: the terms are positive, and a lane adds up at most STEPS of them in float32 before the
lanes are added two by two, and the programs' parts in float64. So a sum is off by less than
(STEPS + 8) 2^-24 = 4.3e-6 of itself, and the better of two candidates is taken unless they are
within 1e-5 of each other.

x: (R, N), a search for every row. Source: 2DQuant (NeurIPS 2024), section 3.2, Algorithm 1.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

import torch
from torch import Tensor

from . import reference, tiles
from .dispatch import on_device_of, tl, triton, use_triton

BLOCK = 256  # entries of a row that a program takes at a time
STEPS = 64  # times that it does
CANDIDATES = 16  # with 100 of them seven blocks, 12 % of the work for nobody


@triton.jit
def _search_bounds_kernel(
    x_ptr,
    lower_ptr,
    step_ptr,
    parts_ptr,
    columns,
    candidates,
    parts,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """x: (rows, columns); lower, step: (rows, candidates); parts: (rows, parts, candidates).

    This program sums the squared error of one block of candidates over one part of a row, in
    units of their steps.
    """
    program = tl.program_id(0).to(tl.int64)
    row = program // parts
    part = program % parts
    candidate = tl.program_id(1) * CANDIDATES + tl.arange(0, CANDIDATES)
    known = candidate < candidates
    at = row * candidates + candidate
    lower = tl.load(lower_ptr + at, mask=known, other=0.0)[None, :]
    step = tl.load(step_ptr + at, mask=known, other=1.0)[None, :]
    # A constant row has no step and no error, whatever it is divided by.
    inverse = tl.div_rn(1.0, tl.where(step == 0.0, 1.0, step))
    total = tl.zeros((BLOCK, CANDIDATES), tl.float32)
    first = part * STEPS * BLOCK
    for start in range(first, tl.minimum(first + STEPS * BLOCK, columns), BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        x = tl.load(x_ptr + row * columns + column, mask=inside, other=0.0).to(tl.float32)
        t = (x[:, None] - lower) * inverse
        code = tiles.round_half_even(tiles.clamp(t, 0.0, 2**BITS - 1.0))
        off = tl.where(inside[:, None], t - code, 0.0)
        total += off * off
    tl.store(parts_ptr + program * candidates + candidate, tl.sum(total, axis=0), mask=known)


def _ranges(x: Tensor, one_sided: bool | None, candidates: int) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds of all candidates, (R, candidates) or twice as many, float64."""
    least, greatest = (end.double()[:, None] for end in x.aminmax(dim=1))
    shrink = torch.arange(candidates, dtype=torch.float64, device=x.device)
    shrink = shrink * (greatest - least) / (2 * candidates)
    kinds = []
    if one_sided is not True:
        kinds.append((least + shrink, greatest - shrink))
    if one_sided is not False:
        kinds.append((least.expand_as(shrink), greatest - 2 * shrink))
    lower, upper = zip(*kinds, strict=True)
    return torch.cat(lower, 1), torch.cat(upper, 1)


def _search(
    x: Tensor, bits: int, one_sided: bool | None, candidates: int
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    rows, columns = x.shape
    lower, upper = _ranges(x, one_sided, candidates)
    step = (upper - lower) / (2**bits - 1)
    block = min(triton.next_power_of_2(columns), BLOCK)
    parts = x.new_empty(
        (rows, triton.cdiv(columns, block * STEPS), lower.shape[1]), dtype=torch.float32
    )
    with on_device_of(x):
        _search_bounds_kernel[(rows * parts.shape[1], triton.cdiv(lower.shape[1], CANDIDATES))](
            x,
            lower.float(),
            step.float(),
            parts,
            columns,
            lower.shape[1],
            parts.shape[1],
            BITS=bits,
            BLOCK=block,
            STEPS=STEPS,
            CANDIDATES=CANDIDATES,
        )
    error = parts.sum(1, dtype=torch.float64) * step.square()
    best = error.argmin(1, keepdim=True)  # the first of equals
    return (
        lower.gather(1, best)[:, 0].to(x.dtype),
        upper.gather(1, best)[:, 0].to(x.dtype),
        error.gather(1, best)[:, 0],
    )


@torch.library.custom_op("compsrt::search_bounds", mutates_args=(), device_types=("cpu", "cuda"))
def _search_bounds(
    x: Tensor, bits: int, one_sided: bool | None, candidates: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _search(x, bits, one_sided, candidates)


@_search_bounds.register_fake
def _(x, bits, one_sided, candidates):
    rows = x.shape[0]
    return x.new_empty(rows), x.new_empty(rows), x.new_empty(rows, dtype=torch.float64)


def search_bounds(
    x: Tensor,
    bits: int,
    *,
    one_sided: bool | None = False,
    candidates: int = 100,
    asymmetric: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The bounds with the least squared error among `candidates` shrunken ranges of each row.

    x: (R, N), N >= 1, float32, float16 or bfloat16 (float64 by the reference). one_sided: whether
    only the upper bound shrinks; None tries both kinds. asymmetric: then both bounds move on their
    own, by the reference on every device. Returns lower, upper (in x's type) and the
    squared error (float64), each (R,); of equal candidates the first wins. A row with NaN gives
    NaN. Raises ValueError for another shape, no candidates, and bits outside 1 to 8.
    """
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"x: shape {tuple(x.shape)} is not (R, N) with N of at least 1")
    if candidates < 1:
        raise ValueError(f"candidates: {candidates} is below 1")
    if asymmetric or not use_triton(x):
        return reference.search_bounds(
            x, bits, one_sided=one_sided, candidates=candidates, asymmetric=asymmetric
        )
    reference.check_quantizer(bits, "clamped")
    return _search_bounds(x.detach(), bits, one_sided, candidates)


def examples():
    """Calls that `aot.py` compiles the kernel of."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.empty(1, 65536, dtype=dtype)
        yield str(dtype).removeprefix("torch."), lambda x=x: _search(x, 4, False, 100)
