"""A network on a picture of any size: whole or in tiles, several at a time, within the memory.

Tiles begin at multiples of the network's window, so it sees the windows that it sees in the whole
picture; only a tile's border lacks its surroundings. All tiles of a picture have one size: as many
as are needed are spread evenly over each side, and made no larger than they have to be. Where two
meet they share at least OVERLAP pixels, over whose middle half one fades linearly into the other,
so that what lies at a border counts nothing.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .cli import is_out_of_memory
from .models.swinir import mirror_to_multiple

# Pixels of the input that neighbouring tiles share. 128 x 128 pixels of butterfly x2 in tiles of 48
# pixels beside the overlap agree with the whole picture within 61, 71, 83 and 98 dB for overlaps of
# 8, 16, 24 and 32 (nano SwinIR; SESR-M5: 72, 93, 117, 150). Fading over the whole overlap instead of
# its middle half gave 60, 66, 71 and 75.
OVERLAP = 16
# Bytes that a pixel of the input takes at the peak in float32, weights not counted. Measured on a
# CPU (growth of the resident memory) with 128 x 128 pixels: SESR-M5 1.1 kB, EDSR of 64 channels 2.4
# (11.6 at x4 with its upsampler), SwinIR x2 of 4 blocks 8.7 (at 4 bits 8.3), SwinIR-light x4 10.0
# (10.2), SwinIR x4 of width 180 20.1 (19.8); with 256 x 256 it is 0.3 to 0.9 of that.
BYTES_PER_PIXEL = 20_000
# Of the free memory: what was measured may be wrong by a factor of two.
SHARE = 0.5

Advance = Callable[[int], Any]


class NotFiniteError(ValueError):
    """A model returned NaN or infinity, as half precision does when it overflows."""


class Tiled:
    """A model that takes pictures of any size, (1, 3, H, W) -> (1, 3, scale H, scale W).

    tile: the most pixels of the input that a tile has a side, rounded up to whole windows; None
    takes pictures whole; "auto" does so where half of the free memory is enough for it, by
    BYTES_PER_PIXEL, and else takes the largest tiles that it is enough for. Where the memory is not
    enough after all, the tile is halved, with a warning, for this picture and those that follow.
    batch: how many tiles are on the device at a time. self_ensemble: as `self_ensemble`. Raises
    ValueError for tiles smaller than twice the overlap and a batch below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        tile: int | str | None = None,
        *,
        batch: int = 1,
        self_ensemble: bool = False,
    ):
        window = int(getattr(model, "window_size", 1))
        self.model, self.batch = model, batch
        self.scale, self.window = int(getattr(model, "scale", 1)), window
        self.overlap = round_up(OVERLAP, window)
        self.self_ensemble = self_ensemble
        if not (tile is None or tile == "auto" or isinstance(tile, int)):
            raise ValueError(f"tile: {tile!r} is neither 'auto' nor a number of pixels nor None")
        if isinstance(tile, int) and round_up(tile, window) < 2 * self.overlap:
            least = 2 * self.overlap
            raise ValueError(f"tile: {tile} pixels are fewer than {least}, twice the overlap")
        if batch < 1:
            raise ValueError(f"batch: {batch} is less than 1")
        self.tile = tile

    @torch.no_grad()  # no inference mode: what models cache must serve a later training step too
    def __call__(self, x: Tensor, advance: Advance | None = None) -> Tensor:
        """x: (1, 3, H, W) on any device; returns float32 on the CPU. advance: is called with the
        number of pixels of the result that were computed since its last call."""
        done: list[int] = []

        def count(pixels: int) -> None:
            done.append(pixels)
            if advance is not None:
                advance(pixels)

        tile = self._side(*x.shape[-2:])
        while True:
            try:
                return self._run(x, tile, count)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or tile <= 2 * self.overlap:
                    raise
            # Here, not in the handler: the error holds on to what the attempt had allocated.
            count(-sum(done))
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            smaller = max(round_up(tile // 2, self.window), 2 * self.overlap)
            warnings.warn(
                f"out of memory with tiles of {tile} x {tile} pixels; going on with {smaller} x"
                f" {smaller}",
                stacklevel=2,
            )
            self.tile = tile = smaller

    def _side(self, height: int, width: int) -> int:
        """The tile for a picture of this size, in whole windows."""
        tile = self.tile
        if tile == "auto":
            parameter = next(self.model.parameters())
            size = max(BYTES_PER_PIXEL, 640 * self.scale**2) * parameter.element_size() / 4
            pixels = SHARE * free_memory(parameter.device) / size
            if height * width > pixels:
                side = math.isqrt(int(pixels / self.batch)) // self.window * self.window
                return max(side, 2 * self.overlap)
        longest = max(height, width)
        return round_up(min(tile, longest) if isinstance(tile, int) else longest, self.window)

    def _run(self, x: Tensor, tile: int, advance: Advance) -> Tensor:
        height, width = x.shape[-2:]
        scale, window = self.scale, self.window
        parameter = next(self.model.parameters())
        if max(height, width) <= tile:
            out = self._forward(x.to(parameter.device, parameter.dtype))
            advance(out.shape[-2] * out.shape[-1])
            return out
        x = mirror_to_multiple(x, window)
        down, across = (_spans(side, tile, self.overlap, window, scale) for side in x.shape[-2:])
        out = torch.zeros(1, 3, x.shape[2] * scale, x.shape[3] * scale)
        places = [(d, a) for d in down for a in across]
        for first in range(0, len(places), self.batch):
            chosen = places[first : first + self.batch]
            parts = [x[..., d.begin : d.end, a.begin : a.end] for d, a in chosen]
            parts = self._forward(torch.cat(parts).to(parameter.device, parameter.dtype))
            for (d, a), part in zip(chosen, parts, strict=True):
                inside = out[..., d.begin * scale : d.end * scale, a.begin * scale : a.end * scale]
                inside += part * d.weights[:, None] * a.weights
            share = height * width * scale**2
            n = len(places)
            advance(share * (first + len(chosen)) // n - share * first // n)
        return out[..., : height * scale, : width * scale]

    def _forward(self, x: Tensor) -> Tensor:
        y = (self_ensemble(self.model, x) if self.self_ensemble else self.model(x)).float().cpu()
        if not torch.isfinite(y).all():
            raise NotFiniteError(f"the model returned NaN or infinity in {str(x.dtype)[6:]}")
        return y


class Span(NamedTuple):
    """A tile along one side: begin to end in the input, and a weight for each enlarged pixel."""

    begin: int
    end: int
    weights: Tensor


def _spans(size: int, tile: int, overlap: int, window: int, scale: int) -> list[Span]:
    """Equal tiles that cover a side of `size` pixels, whole windows; their weights sum to 1."""
    if size <= tile:
        return [Span(0, size, torch.ones(size * scale))]
    count = math.ceil((size - overlap) / (tile - overlap))
    tile = round_up(math.ceil((size + (count - 1) * overlap) / count), window)
    begins = [(size - tile) // window * i // (count - 1) * window for i in range(count)]
    shared = overlap * scale
    rising = ((torch.arange(tile * scale) + 0.5 - shared / 4) / (shared / 2)).clamp(0, 1)
    total = torch.zeros(size * scale)
    weights = []
    for begin in begins:
        weight = torch.ones(tile * scale)
        if begin > 0:
            weight *= rising
        if begin + tile < size:
            weight *= rising.flip(0)
        weights.append(weight)
        total[begin * scale : (begin + tile) * scale] += weight
    return [
        Span(begin, begin + tile, weight / total[begin * scale : (begin + tile) * scale])
        for begin, weight in zip(begins, weights, strict=True)
    ]


def self_ensemble(model: nn.Module, x: Tensor) -> Tensor:
    """The mean of what a model makes of x (B, 3, H, W) in the eight positions of a square, each
    turned back; float32 (Timofte et al., Seven ways to improve example-based single image super
    resolution, CVPR 2016)."""
    total: Any = 0
    for turn in range(8):
        turned = torch.rot90(x, turn % 4, (2, 3))
        turned = turned.flip(3) if turn > 3 else turned
        y = model(turned).float()
        y = y.flip(3) if turn > 3 else y
        total = total + torch.rot90(y, -(turn % 4), (2, 3))
    return total / 8


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device, by the driver or by Linux and its cgroup; of
    other systems half of the memory."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    installed = 4 << 30  # a guess for Windows, whose Python does not say
    if hasattr(os, "sysconf"):
        installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(_free_memory_of_linux(), default=installed // 2)


def _free_memory_of_linux() -> Iterator[int]:
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        if found:
            yield 1024 * int(found[1])
        limit = Path("/sys/fs/cgroup/memory.max").read_text()
        if limit.strip() != "max":
            yield int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text())
    except OSError:
        return


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
