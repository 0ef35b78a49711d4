"""Window attention of quantized operands in plain PyTorch.

For every window and head, N = window^2 tokens, with constant rotations Rh, Rv, T (orthonormal rows):

    q^ = fq_q((scale q) Rh)    k^ = fq_k(k Rh)    v^ = fq_v(v Rv)
    P = softmax(q^ k^^T + relative bias + shift mask)    A^ = fq_a(P T)    out = A^ (T^T v^) Rv^T

A padded rotation (more columns than rows) is no rotation of the coefficients it adds: between q^
and k^ stands the projection Rh^T Rh then, which is the identity for a square one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .quantize import Grid, check_quantizer, fake_quantize, quant_matmul
from .windows import add_bias


def split_heads(x: Tensor, heads: int, window: int, shift: int) -> Tensor:
    """(B, H, W, heads * d) -> (B, windows, heads, N, d), after a cyclic shift up and left."""
    if shift:
        x = x.roll((-shift, -shift), dims=(1, 2))
    b, h, w, c = x.shape
    down, across = h // window, w // window
    x = x.reshape(b, down, window, across, window, heads, c // heads)
    return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(
        b, down * across, heads, window * window, c // heads
    )


def merge_heads(x: Tensor, height: int, width: int, window: int, shift: int) -> Tensor:
    """The inverse of `split_heads`: (B, windows, heads, N, d) -> (B, H, W, heads * d)."""
    b, _, heads, _, d = x.shape
    x = x.reshape(b, height // window, width // window, heads, window, window, d)
    x = x.permute(0, 1, 4, 2, 5, 3, 6).reshape(b, height, width, heads * d)
    return x.roll((shift, shift), dims=(1, 2)) if shift else x


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    grids: Sequence[Grid],
    heads: int,
    window: int,
    shift: int,
    scale: float,
    head_rotation: Tensor | None,
    value_rotation: Tensor | None,
    token_rotation: Tensor | None,
) -> None:
    """Raise ValueError for arguments of `quant_window_attention` that do not fit each other."""
    for name, count, least in (("heads", heads, 1), ("window", window, 1), ("shift", shift, 0)):
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise ValueError(f"{name}: {count!r} is not a whole number of at least {least}")
    if shift >= window:
        raise ValueError(f"shift: {shift} is not below the window of {window}")
    if isinstance(scale, Tensor) or not math.isfinite(scale):
        raise ValueError(f"scale: {scale!r} is not a finite number")
    if q.dim() != 4 or q.shape[3] == 0 or q.shape[3] % heads or not q.is_floating_point():
        raise ValueError(
            f"q: {tuple(q.shape)} of {q.dtype} is not (B, H, W, heads * d) in a floating type"
            f" with {heads} heads"
        )
    if q.shape[1] % window or q.shape[2] % window:
        raise ValueError(
            f"q: a height of {q.shape[1]} and width of {q.shape[2]} are not both multiples of the"
            f" window of {window}; pad the picture"
        )
    for name, other in (("k", k), ("v", v)):
        if other.shape != q.shape or other.dtype != q.dtype:
            raise ValueError(
                f"{name}: {tuple(other.shape)} of {other.dtype} is not as q,"
                f" {tuple(q.shape)} of {q.dtype}"
            )
    entries = (2 * window - 1) ** 2
    if table.shape != (entries, heads) or not table.is_floating_point():
        raise ValueError(
            f"table: {tuple(table.shape)} of {table.dtype} is not ((2 window - 1)^2, heads),"
            f" {(entries, heads)}, in a floating type"
        )
    if len(grids) != 4:
        raise ValueError(f"grids: {len(grids)} of them; pass those of query, key, value, attention")
    here = [("k", k), ("v", v), ("table", table)]
    for grid in grids:
        check_quantizer(grid.bits, grid.codes)
        for name, scalar in zip(Grid._fields, grid[:4], strict=False):
            if scalar is not None and scalar.numel() != 1 and scalar.shape != (heads, 1, 1):
                raise ValueError(
                    f"{name}: shape {tuple(scalar.shape)}; attention takes one value a quantizer,"
                    f" or one a head, {(heads, 1, 1)}"
                )
            here += [] if scalar is None else [(name, scalar)]
    for name, rotation, size in (
        ("head_rotation", head_rotation, q.shape[3] // heads),
        ("value_rotation", value_rotation, q.shape[3] // heads),
        ("token_rotation", token_rotation, window * window),
    ):
        if rotation is None:
            continue
        if rotation.dim() != 2 or rotation.shape[0] != size or rotation.shape[1] < size:
            raise ValueError(
                f"{name}: {tuple(rotation.shape)} is not ({size}, n) with n of at least {size}"
            )
        here.append((name, rotation))
    for name, tensor in here:
        if tensor.device != q.device:
            raise ValueError(f"{name}: it is on {tensor.device}; move it to q's {q.device}")


def _quantize(x: Tensor, rotation: Tensor | None, grid: Grid) -> Tensor:
    return fake_quantize(rotate(x, rotation), *grid[:4], bits=grid.bits, codes=grid.codes)


def rotate(x: Tensor, rotation: Tensor | None) -> Tensor:
    return x if rotation is None else x @ rotation


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    grids: Sequence[Any],
    heads: int,
    window: int,
    shift: int,
    scale: float,
    head_rotation: Tensor | None,
    value_rotation: Tensor | None,
    token_rotation: Tensor | None,
    quantize: Callable = _quantize,
    multiply: Callable = quant_matmul,
) -> Tensor:
    """The definition, put together of `quantize` (x, rotation, grid) and `multiply`, by default
    `quant_matmul`; grids: four of what these two take, in the order query, key, value, attention."""
    query, key, value, attention = grids
    size = q.shape[1], q.shape[2], window, shift
    rotations = head_rotation, value_rotation, token_rotation
    dtype = q.dtype
    head_rotation, value_rotation, token_rotation = (
        r if r is None else r.detach().to(dtype) for r in rotations
    )
    # What is no longer needed goes at once: a third of the most memory held on a CPU.
    q, k = (split_heads(x, heads, window, shift) for x in (q, k))
    q = q if scale == 1 else q * scale
    if head_rotation is None or head_rotation.shape[0] == head_rotation.shape[1]:
        k = rotate(k, head_rotation).mT
        scores = multiply(q, k, query, key, rotation=head_rotation)
    else:
        k = quantize(k, head_rotation, key) @ (head_rotation.mT @ head_rotation)
        scores = multiply(q, k.mT, query, rotation=head_rotation)
    del q, k
    scores = add_bias(scores, table.to(scores.dtype), size).softmax(-1)
    # T^T v^ as (v^^T T)^T: one product of many rows is four times as fast as one a window.
    v = quantize(split_heads(v, heads, window, shift), value_rotation, value)
    v = rotate(v.mT, token_rotation).mT
    out = multiply(scores, v, attention, rotation=token_rotation)
    del scores, v
    return merge_heads(rotate(out, None if value_rotation is None else value_rotation.mT), *size)


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

    q, k, v: (B, H, W, heads * d), any floating type; table: relative-position bias
    ((2 window - 1)^2, heads); grids: of query, key, value and attention, one value a scalar, or one
    a head, (heads, 1, 1);
    head_rotation (of query and key), value_rotation: constants (d, n); token_rotation: (N, N').
    Returns (B, H, W, heads * d), the tokens at their own places. Gradients for q, k, v, table and
    the scalars. Raises ValueError for arguments that do not fit each other.
    """
    arguments = q, k, v, table, grids, heads, window, shift, scale
    rotations = head_rotation, value_rotation, token_rotation
    check_attention(*arguments, *rotations)
    return attend(*arguments, *rotations)
