"""Pictures through a model: one enlarged, or a test set enlarged and scored."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from . import metrics
from .cli import progress
from .data import Pair, load_pair
from .distributed import Ranks
from .images import Picture, imresize, to_image, to_tensor, write_image

# Pixels of LR that neighbouring tiles share. Measured on butterfly x2 with the nano model and tiles
# of 48 pixels beside the overlap: 8, 16, 24 and 32 agree with the whole picture within 60, 65, 66
# and 71 dB, while each pixel is computed 1.4, 1.8, 2.3 and 2.8 times.
OVERLAP = 16


def enlarge(model: nn.Module, lr: Picture, tile: int | None = None) -> Picture:
    """A picture (H, W, 3) uint8 through a model: (scale H, scale W, 3) uint8.

    Any size: the model pads to whole windows by itself and crops again. tile as in
    `super_resolve`. Raises ValueError for another shape or type, a tile that is too small, and a
    model that returns NaN.
    """
    parameter = next(model.parameters())
    # No inference mode: what models cache (masks, indices) must serve a later training step too.
    with torch.no_grad():
        x = to_tensor(lr, parameter.device, parameter.dtype)
        return to_image(model(x) if tile is None else _in_tiles(model, x, tile))


def _in_tiles(model: Any, x: Tensor, tile: int) -> Tensor:
    """(1, 3, H, W) -> (1, 3, scale H, scale W) on the CPU, in overlapping tiles blended linearly.

    Tiles begin at multiples of the window, so the network sees the windows it sees in the whole.
    """
    scale, window = model.scale, model.window_size
    overlap = -(-OVERLAP // window) * window
    tile = -(-tile // window) * window
    if tile < 2 * overlap:
        raise ValueError(f"tile: {tile} pixels are fewer than {2 * overlap}, twice the overlap")
    height, width = x.shape[-2:]
    out = torch.zeros(1, 3, height * scale, width * scale)
    for top, bottom, down in _spans(height, tile, overlap, scale):
        for left, right, across in _spans(width, tile, overlap, scale):
            part = model(x[..., top:bottom, left:right]).float().cpu()
            inside = out[..., top * scale : bottom * scale, left * scale : right * scale]
            inside += part * down[:, None] * across
    return out


def _spans(size: int, tile: int, overlap: int, scale: int) -> list[tuple[int, int, Tensor]]:
    """(begin, end, weights of the enlarged pixels) of the tiles along a side; weights sum to 1."""
    ramp = (torch.arange(overlap * scale) + 0.5) / (overlap * scale)
    begins = range(0, max(size - overlap, 1), tile - overlap)
    spans = []
    for begin in begins:
        end = min(begin + tile, size)
        weights = torch.ones((end - begin) * scale)
        if begin > 0:
            weights[: len(ramp)] = ramp
        if end < size:
            weights[-len(ramp) :] = 1 - ramp
        spans.append((begin, end, weights))
    return spans


def super_resolve(model: nn.Module, image: Image.Image, tile: int | None = None) -> Image.Image:
    """Enlarge a picture by the scale of a model (`compsrt.load`).

    image: a PIL picture of any size and mode. Grey stays grey ("L"); palette, CMYK and the like
    become RGB; transparency is kept as an alpha channel, enlarged bicubically; 16 bits are reduced
    to 8, with a warning. tile: side of the tiles of LR pixels to work in, which bounds the memory
    (overlapping and blended linearly; rounded up to whole windows); None takes the picture whole.
    Raises ValueError for floating-point pictures, tiles below 32 and a model that returns NaN.
    """
    image = _plain(image)
    colours = np.asarray(image.convert("RGB"))
    result = Image.fromarray(enlarge(model, colours, tile))
    if image.mode.startswith("L"):
        result = result.convert("L")
    if image.mode.endswith("A"):
        alpha = imresize(np.asarray(image.getchannel("A")), result.width // image.width)
        result.putalpha(Image.fromarray(alpha))
    return result


def _plain(image: Image.Image) -> Image.Image:
    """The same picture as L, LA, RGB or RGBA."""
    if image.mode == "F":
        raise ValueError("image: floating-point pictures have no fixed white; convert it to 8 bits")
    if image.mode.startswith("I"):
        warnings.warn("16 bits a channel, reduced to 8 bits", stacklevel=3)
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    grey = image.mode in ("1", "L", "LA", "La")
    return image.convert(("L" if grey else "RGB") + "A" * image.has_transparency_data)


def evaluate_pairs(
    model: nn.Module | None,
    pairs: Sequence[Pair],
    scale: int,
    *,
    ranks: Ranks | None = None,
    save: Path | None = None,
    description: str = "",
) -> list[dict[str, Any]]:
    """Enlarge the LR picture of every pair and compare it with HR (PSNR and SSIM on luma).

    model: None enlarges bicubically. ranks: shares the pairs out among processes, and every one
    returns the whole list. save: a folder for the enlarged pictures, as `{name}.png`. Returns one
    dictionary a pair, in their order: name, psnr (dB), ssim, milliseconds (of the enlargement, its
    way to the device and back included). Raises FileNotFoundError, ValueError as `load_pair`, and
    ValueError for pictures too small to compare.
    """
    ranks = ranks or Ranks(torch.device("cpu"))  # one process; the model knows its device
    mine = pairs[ranks.rank :: ranks.world]
    scores = []
    for pair in progress(mine, description=description, unit="image") if ranks.is_main else mine:
        lr, hr = load_pair(pair, scale)
        start = time.perf_counter()
        enlarged = imresize(lr, scale) if model is None else enlarge(model, lr)
        seconds = time.perf_counter() - start
        try:
            psnr = metrics.psnr(enlarged, hr, crop=scale)
            ssim = metrics.ssim(enlarged, hr, crop=scale)
        except ValueError as error:
            raise ValueError(f"{pair.hr}: {error}") from None
        if save is not None:
            path = save / f"{pair.name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_image(path, enlarged)
        scores.append(
            {"name": pair.name, "psnr": psnr, "ssim": ssim, "milliseconds": 1000 * seconds}
        )
    shares = ranks.gather(scores)
    return [shares[number % ranks.world][number // ranks.world] for number in range(len(pairs))]
