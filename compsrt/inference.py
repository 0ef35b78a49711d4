"""Pictures through a model: one enlarged, or a test set enlarged and scored."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import distance_transform_edt
from torch import nn

from . import metrics, photos
from .cli import progress
from .data import Pair, load_pair
from .distributed import Ranks
from .images import Picture, imresize, read_image, to_image, to_tensor, write_image
from .photos import Photo, Plane
from .tiling import Advance, Tiled

# ITU-R BT.601 in its full range, as Pillow makes grey of colours.
_LUMA = (0.299, 0.587, 0.114)


def enlarge(
    model: nn.Module,
    lr: Picture,
    tile: int | str | None = None,
    *,
    batch: int = 1,
    self_ensemble: bool = False,
) -> Picture:
    """A picture (H, W, 3) uint8 through a model: (scale H, scale W, 3) uint8.

    Any size: the model pads to whole windows by itself and crops again. tile, batch, self_ensemble:
    as in `tiling.Tiled`. Raises ValueError for another shape or type, a tile that is too small, and
    a model that returns NaN or infinity.
    """
    run = Tiled(model, tile, batch=batch, self_ensemble=self_ensemble)
    return to_image(run(to_tensor(lr)))


def super_resolve(
    model: nn.Module,
    image: Image.Image,
    tile: int | str | None = None,
    *,
    batch: int = 1,
    self_ensemble: bool = False,
) -> Image.Image:
    """Enlarge a picture by the scale of a model (`compsrt.load`).

    image: a PIL picture of any size and mode, which is turned upright if its EXIF data say so. Grey
    stays grey ("L", or "I;16" of 16 bits); palettes, CMYK and the like become RGB, transparency an
    alpha channel, enlarged bicubically. The colour profile and EXIF are in the result's `info`;
    `save` writes EXIF only if it is given to it.
    tile: the most pixels of the input that a tile has a side, which bounds the memory; None takes
    the picture whole, "auto" decides by the free memory. batch: tiles at a time. self_ensemble: the
    mean of the eight flips and rotations, at eight times the work. Raises ValueError for
    floating-point pictures, tiles below 32 and a model that returns NaN or infinity; TypeError for
    an image that is no PIL picture.
    """
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"image: {type(image).__name__!r} is not a PIL picture; open it with PIL.Image.open"
        )
    photo = photos.from_image(image)
    run = Tiled(model, tile, batch=batch, self_ensemble=self_ensemble)
    large = enlarge_photo(run, photo)
    result = photos.as_image(large)
    kept = {"icc_profile": large.icc_profile, "exif": large.exif}
    result.info |= {name: data for name, data in kept.items() if data is not None}
    return result


def enlarge_photo(run: Tiled, photo: Photo, advance: Advance | None = None) -> Photo:
    """A photo through a model, with as many bits as it has; advance as in `Tiled`."""
    colours = photo.colours
    if photo.alpha is not None:
        colours = _under_transparency(colours, photo.alpha)
    if colours.ndim == 2:
        colours = np.repeat(colours[:, :, None], 3, axis=2)
    y = run(to_tensor(colours), advance)
    if photo.colours.ndim == 2:
        y = y.clamp(0, 1) * y.new_tensor(_LUMA)[:, None, None]
        y = y.sum(1, keepdim=True).expand(-1, 3, -1, -1)
    large = to_image(y, photo.colours.dtype)
    return replace(
        photo,
        colours=large[:, :, 0] if photo.colours.ndim == 2 else large,
        alpha=None if photo.alpha is None else imresize(photo.alpha, run.scale),
    )


def _under_transparency(colours: Plane, alpha: Plane) -> Plane:
    """What nobody sees takes the colour of the nearest pixel that is seen: whatever an editor left
    there, black mostly, would bleed into the visible edge when it is enlarged."""
    hidden = alpha == 0
    if not hidden.any() or hidden.all():
        return colours
    nearest: Any = distance_transform_edt(hidden, return_distances=False, return_indices=True)
    return colours[tuple(nearest)]


def evaluate_pairs(
    model: nn.Module | None,
    pairs: Sequence[Pair],
    scale: int,
    *,
    ranks: Ranks | None = None,
    save: Path | None = None,
    against: Path | None = None,
    self_ensemble: bool = False,
    description: str = "",
) -> list[dict[str, Any]]:
    """Enlarge the LR picture of every pair and compare it with HR (PSNR and SSIM on luma).

    model: None enlarges bicubically. ranks: shares the pairs out among processes, and every one
    returns the whole list. save: a folder for the enlarged pictures, as `{name}.png`. against: such
    a folder of another model, to compare with. Returns one dictionary a pair, in their order: name,
    psnr (dB), ssim, milliseconds (of the enlargement, its way to the device and back included) and,
    with `against`, agreement: the PSNR in dB between the two models' pictures, over all pixels and
    colours. Raises FileNotFoundError, ValueError as `load_pair`, and
    ValueError for pictures too small to compare.
    """
    ranks = ranks or Ranks(torch.device("cpu"))  # one process; the model knows its device
    mine = pairs[ranks.rank :: ranks.world]
    scores = []
    for pair in progress(mine, description=description, unit="image") if ranks.is_main else mine:
        lr, hr = load_pair(pair, scale)
        start = time.perf_counter()
        if model is None:
            enlarged = imresize(lr, scale)
        else:
            enlarged = enlarge(model, lr, self_ensemble=self_ensemble)
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
        score = {"name": pair.name, "psnr": psnr, "ssim": ssim, "milliseconds": 1000 * seconds}
        if against is not None:
            other = read_image(against / f"{pair.name}.png")
            score["agreement"] = metrics.psnr(enlarged, other, crop=0, y_channel=False)
        scores.append(score)
    shares = ranks.gather(scores)
    return [shares[number % ranks.world][number // ranks.world] for number in range(len(pairs))]
