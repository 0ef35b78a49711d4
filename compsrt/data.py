"""Folders of pictures, pairs of high and low resolution, and random crops of them for training.

`find_pairs` understands three kinds of folders:

    Set5/HR/baby.png                             with  Set5/LR_bicubic/X2/babyx2.png
    DIV2K/DIV2K_train_HR/0001.png                with  DIV2K/DIV2K_train_LR_bicubic/X2/0001x2.png
    photographs/anything/below/it.jpg            alone: the low resolution is made by `imresize`

`PatchSampler` keeps all pictures in memory as bytes, on the training device, and cuts batches out
of them with one gather each for LR and HR: no worker processes, no decoding in the loop, no
synchronisation with a GPU. Which crops a batch holds is no state but a function of (seed, step,
number of the sample). So a resumed run sees what an uninterrupted one would have seen, and eight
processes together see what a single one would have.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from compsrt.images import (
    IMAGE_SUFFIXES,
    header_size,
    imresize,
    read_image,
    to_image,
    to_tensor,
    write_image,
)

__all__ = [
    "IMAGE_SUFFIXES",
    "Pair",
    "PatchSampler",
    "find_images",
    "find_pairs",
    "header_size",
    "hold_out",
    "imresize",
    "load_pair",
    "read_image",
    "to_image",
    "to_tensor",
    "write_image",
]

Integers = npt.NDArray[np.int64]

# How published data sets call the low-resolution version of a picture.
_LR_NAMES = ("{name}x{scale}", "{name}", "{name}_LRBI_x{scale}")


# --- folders --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A picture to learn from or to test on; `lr` None means that `load_pair` makes it."""

    name: str
    hr: Path
    lr: Path | None


def find_images(folder: str | os.PathLike[str]) -> list[Path]:
    """All pictures below a folder, sorted.

    Args:
        folder: a folder, or one picture file. Hidden files and folders in it are skipped, links are
            followed.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is no picture in it.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder or picture")
    found = [folder] if folder.is_file() else files_below(folder)
    pictures = [path for path in found if path.suffix.lower() in IMAGE_SUFFIXES]
    if not pictures:
        kind = "not a picture" if folder.is_file() else "no pictures in this folder"
        raise ValueError(f"{folder}: {kind}, looked for {', '.join(IMAGE_SUFFIXES)}")
    return sorted(pictures)


def files_below(folder: Path) -> list[Path]:
    found: list[Path] = []
    visited: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        # Data sets are often links to another disk; but a link to a folder above would never end.
        place = os.path.realpath(parent)
        if place in visited:
            folders.clear()
            continue
        visited.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    return found


def find_pairs(folder: str | os.PathLike[str], scale: int) -> list[Pair]:
    """The pictures of a folder as pairs, in the order of their paths.

    A folder that holds `HR` or `*_HR` is a layout of pairs: the LR pictures are looked for in
    `LR_bicubic/X{scale}` or `*_LR_bicubic/X{scale}` beside it, under the names `{name}x{scale}`,
    `{name}` or `{name}_LRBI_x{scale}`; where that folder is missing, LR is made on the fly. Of any
    other folder every picture is an HR picture, however deep it lies, but those of low-resolution
    folders (`LR_*`, `*_LR_*`) are left out.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no pictures; or an HR picture without its LR picture in a layout of pairs.
    """
    _check_scale(scale)
    folder = Path(folder)
    layouts = sorted(
        path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.is_dir() and (path.name == "HR" or path.name.endswith("_HR"))
    )
    pairs: list[Pair] = []
    for high in layouts:
        low = folder / f"{high.name.removesuffix('HR')}LR_bicubic" / f"X{scale}"
        names = _names(find_images(high), high)
        partners = _partners(list(names), low, scale) if low.is_dir() else {}
        prefix = f"{high.name}/" if len(layouts) > 1 else ""
        pairs += [Pair(prefix + name, path, partners.get(name)) for name, path in names.items()]
    if not layouts:
        names = _names(find_images(folder), folder)
        pairs = [Pair(name, path, None) for name, path in names.items() if not _is_low(name)]
        if not pairs:
            raise ValueError(f"{folder}: only low-resolution pictures in this folder")
    return pairs


def hold_out(pairs: Sequence[Pair], count: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Splits pairs at random into (training, held out), both sorted by name.

    The split depends on the names, `count` and `seed` only, not on the order of `pairs`.

    Raises:
        ValueError: count negative, or nothing would be left for training.
    """
    if not 0 <= count < len(pairs):
        raise ValueError(
            f"count must be at least 0 and less than the {len(pairs)} pictures, "
            f"so that some are left for training, got {count}"
        )
    ordered = sorted(pairs, key=lambda pair: (pair.name, pair.hr))
    chosen = set(_shuffled(len(ordered), seed)[:count].tolist())
    training = [pair for number, pair in enumerate(ordered) if number not in chosen]
    return training, [ordered[number] for number in sorted(chosen)]


def load_pair(pair: Pair, scale: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Reads a pair as (lr, hr), uint8 RGB of (H, W, 3) and (H * scale, W * scale, 3).

    HR loses up to scale - 1 rows at the bottom and columns at the right, to become a multiple of
    the scale. LR is read, or made from that by `imresize`.

    Raises:
        FileNotFoundError, ValueError: as `read_image`; or the two sizes do not belong together.
    """
    _check_scale(scale)
    whole = read_image(pair.hr)
    height, width = whole.shape[0] // scale, whole.shape[1] // scale
    if 0 in (height, width):
        raise ValueError(f"{pair.hr}: {_size(whole)} pixels are too few for scale {scale}")
    hr = np.ascontiguousarray(whole[: height * scale, : width * scale])
    if pair.lr is None:
        return imresize(hr, 1 / scale), hr
    lr = read_image(pair.lr)
    if lr.shape[:2] != (height, width):
        fits = [
            other
            for other in range(1, 17)
            if lr.shape[:2] == (whole.shape[0] // other, whole.shape[1] // other)
        ]
        hint = f", it looks like x{fits[0]}" if fits else ""
        raise ValueError(
            f"{pair.lr}: {_size(lr)} pixels do not fit {pair.hr} "
            f"of {_size(whole)} pixels at scale {scale}, which needs {width} x {height}{hint}"
        )
    return lr, hr


def _names(paths: list[Path], folder: Path) -> dict[str, Path]:
    """Unique names: the path below the folder, with the suffix only where two would be equal."""
    root = folder if folder.is_dir() else folder.parent
    short = [path.relative_to(root).with_suffix("").as_posix() for path in paths]
    times = Counter(short)
    return {
        name if times[name] == 1 else path.relative_to(root).as_posix(): path
        for name, path in zip(short, paths, strict=True)
    }


def _partners(names: list[str], low: Path, scale: int) -> dict[str, Path]:
    """The LR picture of every HR name, by the one way of naming that finds most of them."""
    pictures = _names(find_images(low), low)
    attempts = [
        {
            name: pictures[partner]
            for name in names
            if (partner := pattern.format(name=name, scale=scale)) in pictures
        }
        for pattern in _LR_NAMES
    ]
    best = max(attempts, key=len)
    missing = [name for name in names if name not in best]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        tried = ", ".join(p.format(name=Path(missing[0]).name, scale=scale) for p in _LR_NAMES)
        raise ValueError(f"{low}: no LR picture for HR {missing[0]}{more}, tried {tried}")
    return best


def _is_low(name: str) -> bool:
    """Whether a picture lies in a folder such as LR_bicubic, and would spoil a training set."""
    return any(part.startswith("LR_") or "_LR_" in part for part in name.split("/")[:-1])


def _check_scale(scale: int) -> None:
    if not isinstance(scale, (int, np.integer)) or scale < 1:
        raise ValueError(f"scale must be a positive integer, got {scale!r}")


def _size(image: npt.NDArray[np.uint8]) -> str:
    return f"{image.shape[1]} x {image.shape[0]}"


# --- random numbers -------------------------------------------------------------------------------


def _random_words(*keys: int | Integers) -> npt.NDArray[np.uint64]:
    """64 random bits for every combination of keys, integers or arrays that broadcast.

    A function, not a stream: each key is added and then mixed by the finalizer of splitmix64
    (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014). The bits are the
    same on every machine and with every NumPy; a batch takes some 20 us.
    """
    state = np.zeros(1, np.uint64)
    for key in keys:
        word = key.astype(np.uint64) if isinstance(key, np.ndarray) else np.uint64(int(key) % 2**64)
        state = state + word + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def _shuffled(count: int, seed: int) -> Integers:
    """A random order of 0..count-1."""
    return np.argsort(_random_words(seed, np.arange(count)), kind="stable")


# --- crops ----------------------------------------------------------------------------------------


class _Crops(NamedTuple):
    """Where to cut, one entry a sample. y and x count LR pixels."""

    picture: Integers
    y: Integers
    x: Integers
    turn: Integers


class _Places(NamedTuple):
    """All crops of one size, numbered through: those of `picture[i]` end before number `end[i]`."""

    picture: Integers
    columns: Integers
    end: Integers


class PatchSampler:
    """Random, aligned LR and HR crops of pictures that lie in the memory of a device.

    Args:
        pairs: what to sample from; LR pictures that are missing are made once, here.
        scale: side of HR over side of LR.
        device: where the pictures are kept and the crops are cut.
        cache_bytes: the most that the pictures may take. If they need more, a random choice of them
            that fits is kept, and a warning says how many.
        seed: of that choice and of all crops.

    Raises:
        FileNotFoundError, ValueError: as `load_pair`; no pairs; or not one picture fits into
            `cache_bytes`.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        scale: int,
        device: str | torch.device = "cpu",
        cache_bytes: int = 4 << 30,
        seed: int = 0,
    ) -> None:
        _check_scale(scale)
        if not pairs:
            raise ValueError("pairs is empty, there is nothing to sample from")
        self.scale = scale
        self.device = torch.device(device)
        self.seed = seed
        self._places: dict[int, _Places] = {}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            sizes = np.array(list(pool.map(lambda pair: header_size(pair.hr), pairs)), np.int64)
            # Pixels of each LR picture; a rotation by EXIF does not change them.
            pixels = (sizes // scale).prod(axis=1)
            kept = self._within(cache_bytes, pixels)
            self._pairs = [pairs[number] for number in kept]
            # Picture i holds LR pixels start[i] to start[i + 1]; in HR, scale^2 times these.
            self._start = np.concatenate([[0], np.cumsum(pixels[kept])])
            lr = np.empty((self._start[-1], 3), np.uint8)
            hr = np.empty((self._start[-1] * scale**2, 3), np.uint8)

            def load(number: int) -> tuple[int, ...]:
                low, high = load_pair(self._pairs[number], scale)
                inside = slice(self._start[number], self._start[number + 1])
                lr[inside] = low.reshape(-1, 3)
                hr[inside.start * scale**2 : inside.stop * scale**2] = high.reshape(-1, 3)
                return low.shape[:2]

            self._sizes = np.array(list(pool.map(load, range(len(kept)))), np.int64)
        self._lr = torch.from_numpy(lr).to(self.device)
        self._hr = torch.from_numpy(hr).to(self.device)

    def __len__(self) -> int:
        return len(self._pairs)

    @property
    def names(self) -> list[str]:
        """Names of the pictures that are kept."""
        return [pair.name for pair in self._pairs]

    @property
    def identity(self) -> str:
        """Tells other pictures from these, by names, sizes and some of the pixels."""
        named = json.dumps([self.names, self._sizes.tolist()]).encode()
        some = self._lr[:: max(1, len(self._lr) // 2**16)].cpu().numpy().tobytes()
        return f"{len(self)} pictures ({hashlib.sha256(named + some).hexdigest()[:12]})"

    def sample(
        self, count: int, patch: int, *, step: int, first: int = 0, augment: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The samples number `first` to `first + count - 1` of a step, as (lr, hr) on the device.

        Every crop of every picture is equally likely. The same arguments always give the same
        samples; process r of N asks for `first=r * count`.

        Args:
            count: number of samples B.
            patch: side of the LR crop P, in pixels.
            step: number of the training step, >= 0.
            first: number of the first sample in the step, >= 0.
            augment: flip and turn each sample in one of the eight ways of a square.

        Returns:
            (B, 3, P, P) and (B, 3, P * scale, P * scale), float32 in [0, 1].

        Raises:
            ValueError: an argument out of range, or every picture smaller than the patch. Those
                that are smaller while others are not are left out, with a warning.
        """
        crops = self._draw(count, patch, step, first, augment)
        walks = np.stack([self._walks(crops, patch, zoom) for zoom in (1, self.scale)])
        host = torch.from_numpy(walks)
        if self.device.type == "cuda":
            # Only a copy from pinned memory lets the host go on.
            host = host.pin_memory()
        lr_walks, hr_walks = host.to(self.device, non_blocking=True)
        lr = _gather(self._lr, lr_walks, patch)
        return lr, _gather(self._hr, hr_walks, patch * self.scale)

    def describe(
        self, count: int, patch: int, *, step: int, first: int = 0, augment: bool = True
    ) -> list[dict[str, Any]]:
        """What `sample` cuts for the same arguments, to be kept with a result.

        Returns:
            One dictionary a sample: `name` of the picture, `y` and `x` of the crop's corner in LR
            pixels, and `turn`: the crop is mirrored upside down if turn & 2, then left to right if
            turn & 4, then transposed if turn & 1.

        Raises:
            ValueError: as `sample`.
        """
        crops = self._draw(count, patch, step, first, augment)
        rows = zip(*(column.tolist() for column in crops), strict=True)
        return [
            {"name": self._pairs[picture].name, "y": y, "x": x, "turn": turn}
            for picture, y, x, turn in rows
        ]

    def _within(self, cache_bytes: int, pixels: Integers) -> Integers:
        """Numbers of the pictures to keep, in their order: all, or a random choice that fits."""
        sizes = 3 * pixels * (1 + self.scale**2)
        if sizes.sum() <= cache_bytes:
            return np.arange(len(pixels))
        kept: list[int] = []
        free = cache_bytes
        for number in _shuffled(len(pixels), self.seed).tolist():
            if sizes[number] <= free:
                kept.append(number)
                free -= int(sizes[number])
        if not kept:
            raise ValueError(
                f"cache_bytes={cache_bytes} holds not one picture, the smallest needs {sizes.min()}"
            )
        warnings.warn(
            f"kept {len(kept)} of {len(pixels)} pictures: all need {sizes.sum()} bytes, "
            f"cache_bytes is {cache_bytes}",
            stacklevel=3,
        )
        return np.array(sorted(kept))

    def _draw(self, count: int, patch: int, step: int, first: int, augment: bool) -> _Crops:
        """Chooses the crops: one number among all crops of all pictures says picture, y and x."""
        if min(count, patch) < 1 or min(step, first) < 0:
            raise ValueError(
                "count and patch must be at least 1, step and first at least 0, "
                f"got count={count}, patch={patch}, step={step}, first={first}"
            )
        if patch not in self._places:
            self._places[patch] = self._find_places(patch)
        places = self._places[patch]
        sample = np.arange(first, first + count)
        # The remainder favours low numbers by less than 1e-8: 2^64 words, hardly 2^36 crops.
        words = _random_words(self.seed, step, sample, 0)
        number = (words % np.uint64(places.end[-1])).astype(np.int64)
        row = np.searchsorted(places.end, number, side="right")
        number -= np.concatenate([[0], places.end])[row]
        y, x = np.divmod(number, places.columns[row])
        turn = (_random_words(self.seed, step, sample, 1) >> np.uint64(61)).astype(np.int64)
        return _Crops(places.picture[row], y, x, turn if augment else np.zeros_like(turn))

    def _find_places(self, patch: int) -> _Places:
        free = self._sizes - patch + 1
        picture = np.flatnonzero((free > 0).all(axis=1))
        if not len(picture):
            height, width = self._sizes.max(axis=0)
            raise ValueError(
                f"patch={patch} is larger than every LR picture, "
                f"they reach {height} rows and {width} columns"
            )
        if len(picture) < len(self):
            warnings.warn(
                f"left out {len(self) - len(picture)} of {len(self)} pictures: "
                f"their LR is smaller than the patch of {patch}",
                stacklevel=4,
            )
        return _Places(picture, free[picture, 1], np.cumsum(free[picture].prod(axis=1)))

    def _walks(self, crops: _Crops, patch: int, zoom: int) -> Integers:
        """How to walk through the flat pixels: first pixel, step down, step right, (3, B).

        Flips and turns of a square only change these three. zoom is 1 for LR and the scale for HR.
        """
        side = patch * zoom
        down = self._sizes[crops.picture, 1] * zoom
        right = np.ones_like(down)
        start = self._start[crops.picture] * zoom**2 + crops.y * zoom * down + crops.x * zoom
        upside_down, mirrored, transposed = ((crops.turn & bit) > 0 for bit in (2, 4, 1))
        start += np.where(upside_down, (side - 1) * down, 0) + np.where(mirrored, side - 1, 0)
        down = np.where(upside_down, -down, down)
        right = np.where(mirrored, -right, right)
        return np.stack(
            [start, np.where(transposed, right, down), np.where(transposed, down, right)]
        )


def _gather(pixels: torch.Tensor, walks: torch.Tensor, side: int) -> torch.Tensor:
    """Cuts squares out of flat pixels (N, 3) uint8 along their walks (3, B).

    Returns (B, 3, side, side) float32 in [0, 1].
    """
    start, down, right = walks[:, :, None, None]
    ramp = torch.arange(side, device=pixels.device)
    index = start + down * ramp[:, None] + right * ramp
    squares = pixels.index_select(0, index.flatten()).view(-1, side, side, 3).permute(0, 3, 1, 2)
    # Rearranged as bytes: on a CPU four times as fast as in one go with the conversion.
    return squares.contiguous().to(torch.float32) / 255
