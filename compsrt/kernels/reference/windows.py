"""Windows of a token grid: partition and cyclic shift, relative-position bias, shift mask.

Everything depends only on sizes. Source: Swin Transformer (Liu et al., ICCV 2021), section 3.2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_CACHES: list[Any] = []


def _kept(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keeps the last results by their arguments; not while a graph is traced, where they are no data, nor
    while launches are recorded, whose addresses a recording reads for as long as it is there."""

    @functools.lru_cache(maxsize=16)
    def kept(*arguments) -> Tensor:
        with torch.inference_mode(False):  # a later step of training may need it too
            return function(*arguments)

    @functools.wraps(function)
    def call(*arguments) -> Tensor:
        direct = torch.compiler.is_compiling() or is_recording()
        return (function if direct else kept)(*arguments)

    _CACHES.append(kept)
    return call


def is_recording() -> bool:
    """Whether the launches of this thread go into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def forget() -> None:
    """Drop what is kept."""
    for cache in _CACHES:
        cache.cache_clear()


def to_windows(x: Tensor, window: int, shift: int) -> Tensor:
    """(B, H, W, C) -> (B * windows, window * window, C), after a cyclic shift up and left."""
    if shift:
        x = x.roll((-shift, -shift), dims=(1, 2))
    b, h, w, c = x.shape
    x = x.view(b, h // window, window, w // window, window, c).transpose(2, 3)
    return x.reshape(-1, window * window, c)


def from_windows(x: Tensor, height: int, width: int, window: int, shift: int) -> Tensor:
    """The inverse of `to_windows`: (B * windows, window * window, C) -> (B, H, W, C)."""
    c = x.shape[-1]
    x = x.view(-1, height // window, width // window, window, window, c).transpose(2, 3)
    x = x.reshape(-1, height, width, c)
    return x.roll((shift, shift), dims=(1, 2)) if shift else x


def kinds_of_windows(
    batch: int, height: int, width: int, window: int, shift: int
) -> tuple[int, int, int, int]:
    """How many windows need no mask, the mask of the last column, of the last row, and of both."""
    down, across = height // window, width // window
    if not shift:
        return batch * down * across, 0, 0, 0
    right, bottom = batch * (down - 1), batch * (across - 1)
    return right * (across - 1), right, bottom, batch


@_kept
def window_order(
    batch: int, height: int, width: int, window: int, shift: int, device: torch.device
) -> Tensor:
    """(B * H * W) the numbers of all tokens, window by window, after a cyclic shift up and left.

    The windows of a kind, as `kinds_of_windows` counts them, go together.
    """
    number = torch.arange(batch * height * width, device=device).view(batch, height, width, 1)
    number = to_windows(number, window, shift).view(batch, height // window, -1, window * window)
    if not shift:
        return number.flatten()
    parts = number[:, :-1, :-1], number[:, :-1, -1], number[:, -1, :-1], number[:, -1, -1]
    return torch.cat([part.flatten() for part in parts])


@_kept
def relative_position_index(window: int, device: torch.device) -> Tensor:
    """(N, N) row of the bias table for each pair of the N = window^2 tokens of a window."""
    position = torch.arange(window, device=device)
    y, x = (axis.flatten() for axis in torch.meshgrid(position, position, indexing="ij"))
    dy = y[:, None] - y[None, :] + window - 1
    dx = x[:, None] - x[None, :] + window - 1
    return dy * (2 * window - 1) + dx


def relative_bias(table: Tensor, window: int) -> Tensor:
    """(heads, N, N) from the bias table ((2 window - 1)^2, heads)."""
    index = relative_position_index(window, table.device)
    return table[index.flatten()].unflatten(0, index.shape).permute(2, 0, 1)


@_kept
def shift_mask(
    height: int, width: int, window: int, shift: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """(windows, N, N): 0 where two tokens of a shifted window are neighbours in the picture, else -100.

    The cyclic shift brings up to four regions of the picture into one window.
    """

    def region(size: int) -> Tensor:
        i = torch.arange(size, device=device)
        return (i >= size - window).int() + (i >= size - shift).int()

    regions = (3 * region(height)[:, None] + region(width)[None, :])[None, :, :, None]
    regions = to_windows(regions, window, 0)[..., 0]
    other = regions[:, None, :] != regions[:, :, None]
    return torch.zeros(other.shape, device=device, dtype=dtype).masked_fill_(other, -100.0)


def add_bias(scores: Tensor, table: Tensor, size: tuple[int, int, int, int]) -> Tensor:
    """scores (B, windows, heads, N, N) plus the relative bias and the shift mask, overwriting scores.

    table: ((2 window - 1)^2, heads); size: height, width, window, shift of the token grid.
    """
    terms = [relative_bias(table, size[2])]
    if size[3]:
        terms.append(shift_mask(*size, scores.device, scores.dtype)[:, None])
    for term in terms:
        # torch.compile fuses the sum by itself, and cannot differentiate the overwriting form.
        scores = scores + term if torch.compiler.is_compiling() else scores.add_(term)
    return scores
