"""Pictures: reading, writing, resizing, and the way to a tensor and back.

A picture in memory is a uint8 array (H, W, 3), RGB. A tensor is (1, 3, H, W) in [0, 1].

`imresize` is MATLAB's `imresize(image, scale, 'bicubic')`, bit for bit, because the benchmarks of
super-resolution were made with it and a network notices the difference to every other bicubic. One
dimension is resized by a sparse matrix: output sample i lies at u = (i + 1/2)/scale - 1/2 of the
input and is a weighted mean of the samples around it. The weights are Keys' cubic (a = -1/2),
widened by 1/scale when reducing (antialiasing) and not when enlarging, and divided by their sum;
beyond a border the picture is mirrored with its edge sample repeated. Height comes first, then
width, and after each of the two the result is rounded half up to 8 bits (to 16 in a
picture of 16). These two roundings are part of the definition: without the first one, a tenth of
all samples differ.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from scipy.sparse import csr_array

from .files import atomic_write

__all__ = [
    "IMAGE_SUFFIXES",
    "header_size",
    "imresize",
    "read_image",
    "to_image",
    "to_tensor",
    "write_image",
]

Picture = npt.NDArray[np.uint8]


class UnsuitableError(ValueError):
    """A sound picture of a kind that nothing here can be done with."""


IMAGE_SUFFIXES = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
_FORMATS = tuple(sorted(set(IMAGE_SUFFIXES.values())))
SAVE_OPTIONS = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}

# Columns resized at a time: keeps the float64 copies at a few MB whatever the picture's size, and
# costs no time (1 megapixel x 1/2 takes 8 ms with 1024 to 8192, 9 ms in one piece).
_COLUMNS_AT_ONCE = 4096


# --- resizing -------------------------------------------------------------------------------------


def imresize(image: Picture, scale: float) -> Picture:
    """Resizes a picture as MATLAB's antialiased bicubic `imresize` does, bit for bit.

    Args:
        image: (H, W, 3) or (H, W), uint8 or uint16.
        scale: size of the output over size of the input: 0.5 halves, 1 / 3 makes LR for x3.

    Returns:
        (ceil(H * scale), ceil(W * scale), 3) or without the last dimension, of the same type, a
        new array.

    Raises:
        ValueError: image of another type or shape or empty; scale not positive and finite.
    """
    if image.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"image must be uint8 or uint16, got {image.dtype}")
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3) or 0 in image.shape:
        raise ValueError(
            f"image must have the shape (H, W, 3) or (H, W), not empty, got {image.shape}"
        )
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    image = _resize_rows(image, scale).swapaxes(0, 1)
    return np.ascontiguousarray(_resize_rows(image, scale).swapaxes(0, 1))


def _resize_rows(image: Picture, scale: float) -> Picture:
    """Resizes the first axis and rounds half up to integers."""
    size = math.ceil(len(image) * scale)
    matrix = _bicubic_matrix(len(image), size, scale)
    columns = np.ascontiguousarray(image).reshape(len(image), -1)
    resized = np.empty((size, columns.shape[1]), image.dtype)
    for start in range(0, columns.shape[1], _COLUMNS_AT_ONCE):
        block = np.s_[:, start : start + _COLUMNS_AT_ONCE]
        values = matrix @ columns[block].astype(np.float64)
        # Assigning to integers cuts the fraction off; with the half added that is floor(v + 1/2).
        resized[block] = np.clip(values + 0.5, 0, np.iinfo(image.dtype).max)
    return resized.reshape(-1, *image.shape[1:])


def _bicubic_matrix(length: int, size: int, scale: float) -> csr_array:
    """The (size, length) matrix that resizes one dimension; each row sums to 1."""
    shrink = min(scale, 1.0)
    reach = 2 / shrink
    center = ((np.arange(size) + 0.5) / scale - 0.5)[:, np.newaxis]
    # From the first sample inside the kernel's support; ceil(2 * reach) of them cover it.
    sample = np.floor(center - reach) + 1 + np.arange(math.ceil(2 * reach))
    weight = _cubic((center - sample) * shrink)
    weight /= weight.sum(axis=1, keepdims=True)
    # Mirrored with the edge repeated, any number of times: ... 1 0 | 0 1 2 ... n-1 | n-1 n-2 ...
    phase = sample.astype(np.int64) % (2 * length)
    index = np.minimum(phase, 2 * length - 1 - phase)
    row_ends = np.arange(size + 1) * index.shape[1]
    return csr_array((weight.ravel(), index.ravel(), row_ends), shape=(size, length))


def _cubic(distance: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
    """Keys, Cubic Convolution Interpolation for Digital Image Processing (1981), with a = -1/2."""
    t = np.abs(distance)
    near = (1.5 * t - 2.5) * t * t + 1
    far = ((-0.5 * t + 2.5) * t - 4) * t + 2
    return np.where(t <= 1, near, np.where(t < 2, far, 0.0))


# --- files ----------------------------------------------------------------------------------------


def read_image(path: str | os.PathLike[str]) -> Picture:
    """Reads a PNG, JPEG, WebP, BMP or TIFF file as a viewer would show it: (H, W, 3) uint8 RGB.

    EXIF orientation is applied; grey, palette, 1-bit and CMYK pictures become RGB; transparent ones
    are laid on white; of several frames the first is taken. Colour profiles are ignored, as
    everywhere in super-resolution. Pictures of 16 bits a channel are reduced to 8, with a warning.

    Raises:
        FileNotFoundError: no such file.
        ValueError: empty, truncated or damaged, of another format, or so large that Pillow takes it
            for an attack; one line that names the file.
    """
    path = Path(path)
    with opened(path) as image:
        # "RGB;16B" and its kin: Pillow decodes them straight into 8 bits, and says nothing.
        deep = any(re.search(r";16[BLN]\b", str(tile[3])) for tile in image.tile)
        negative = is_negative(image)
        image.load()
        upright = ImageOps.exif_transpose(image)
    try:
        if upright.mode.startswith("I"):
            deep, pixels = True, _from_16_bits(upright)
            pixels = 255 - pixels if negative else pixels
        elif upright.mode == "F":
            raise ValueError("floating-point pictures have no fixed white, convert it to 8 bits")
        elif upright.has_transparency_data:
            white = Image.new("RGBA", upright.size, "white")
            pixels = np.array(Image.alpha_composite(white, upright.convert("RGBA")).convert("RGB"))
        else:
            pixels = np.array(upright.convert("RGB"))
    except ValueError as error:
        raise ValueError(f"{path}: cannot be shown as RGB: {_one_line(error)}") from error
    if deep:
        warnings.warn(f"{path}: 16 bits a channel, reduced to 8 bits", stacklevel=2)
    return pixels


def write_image(path: str | os.PathLike[str], image: Picture) -> None:
    """Writes a picture, whole or not at all: a crash never leaves half a file under `path`.

    Args:
        path: the suffix says the format (.png, .jpg, .jpeg, .webp, .bmp, .tif, .tiff), none means
            PNG. JPEG is written with quality 95 and full colour resolution, everything else without
            loss.
        image: (H, W, 3) or grey (H, W), uint8.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: an unknown suffix, or an image of another type or shape.
    """
    path = Path(path)
    if path.suffix and path.suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"{path}: cannot write {path.suffix}, use one of {_suffix_list()}")
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
        raise ValueError(
            f"image must be uint8 (H, W, 3) or (H, W), got {image.dtype} {image.shape}"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder, cannot write {path.name} there")
    file_format = IMAGE_SUFFIXES.get(path.suffix.lower(), "PNG")
    picture, options = (
        Image.fromarray(np.ascontiguousarray(image)),
        SAVE_OPTIONS.get(file_format, {}),
    )
    atomic_write(path, lambda file: picture.save(file, format=file_format, **options))


def header_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """The two sides of a picture by its header, without decoding the pixels.

    (height, width), or (width, height) if EXIF turns the picture by 90 degrees: some formats count
    before the turn and some after it.

    Raises:
        FileNotFoundError, ValueError: as `read_image`.
    """
    with opened(Path(path)) as image:
        return image.height, image.width


@contextmanager
def opened(path: Path) -> Iterator[ImageFile.ImageFile]:
    """The opened picture; what goes wrong, here or inside, becomes one line naming the file."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():
        raise ValueError(f"{path}: a folder or device, not a picture")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: an empty file, not a picture")
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if 0 in image.size:
                raise ValueError(f"it has {image.width} x {image.height} pixels")
            yield image
    except (MemoryError, PermissionError):
        raise
    except UnsuitableError as error:
        raise ValueError(f"{path}: {error}") from None
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: not a {', '.join(_FORMATS)} picture") from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{path}: refused, it claims too many pixels: {_one_line(error)}"
        ) from error
    except Exception as error:
        # Decoders of damaged files raise nearly anything: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"{path}: truncated or damaged picture: {_one_line(error)}") from error


def is_negative(image: Image.Image) -> bool:
    """Whether an opened TIFF file calls 0 white (PhotometricInterpretation); Pillow inverts such a
    picture in 8 bits or fewer, and not in 16."""
    tags: Any = getattr(image, "tag_v2", {})
    return image.mode.startswith("I") and tags.get(262) == 0


def _from_16_bits(image: Image.Image) -> Picture:
    """A grey picture of integers 0..65535 as RGB: 65535 becomes 255, rounded to the nearest."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its values {values.min()}..{values.max()} do not fit into 16 bits")
    grey = ((values + 128) // 257).astype(np.uint8)
    return np.repeat(grey[:, :, np.newaxis], 3, axis=2)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _suffix_list() -> str:
    return ", ".join(IMAGE_SUFFIXES)


# --- tensors --------------------------------------------------------------------------------------


def to_tensor(
    image: Picture, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """A picture (H, W, 3), uint8 or uint16, as a network's input: (1, 3, H, W) in [0, 1] on
    `device`, a copy.

    Raises:
        ValueError: another shape or type.
    """
    if image.dtype not in (np.uint8, np.uint16) or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"image must be uint8 or uint16 (H, W, 3), got {image.dtype} {image.shape}"
        )
    pixels = torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C")).to(device)
    if image.dtype == np.uint16:  # half precision does not reach 65535
        return (pixels.unsqueeze(0).float() / 65535).to(dtype)
    return pixels.unsqueeze(0).to(dtype) / 255


def to_image(tensor: torch.Tensor, dtype: Any = np.uint8) -> npt.NDArray[Any]:
    """A network's output as a picture: clipped to [0, 1], times 255 (65535), rounded; (H, W, 3).

    Args:
        tensor: (1, 3, H, W) or (3, H, W), floating point, on any device.
        dtype: of the picture, np.uint8 or np.uint16.

    Raises:
        ValueError: another shape, not floating point, or a NaN inside (half precision overflows in
            some networks, and the picture would silently be black).
    """
    single = tensor.squeeze(0) if tensor.ndim == 4 else tensor
    if single.ndim != 3 or single.shape[0] != 3 or not tensor.is_floating_point():
        raise ValueError(
            "tensor must be floating point (1, 3, H, W) or (3, H, W), "
            f"got {tensor.dtype} {tuple(tensor.shape)}"
        )
    # Half precision cannot hold all of 0..255 after the point: round in at least float32.
    values = single.detach().to(torch.promote_types(tensor.dtype, torch.float32))
    if torch.isnan(values).any():
        raise ValueError("tensor holds NaN, it is no picture (did half precision overflow?)")
    levels = (values.clamp(0, 1) * np.iinfo(dtype).max).round()
    levels = levels.to(torch.uint8 if dtype == np.uint8 else torch.int32)
    return levels.permute(1, 2, 0).contiguous().cpu().numpy().astype(dtype, copy=False)
