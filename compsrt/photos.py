"""Photographs as files: pixels of 8 or 16 bits, transparency, colour profile and EXIF, kept together.

`images` reads what a network is trained and scored on: 8 bits, RGB. A photograph that somebody wants
enlarged has more to lose. What becomes of it:

* grey stays grey; a palette becomes the colours (or greys) it stands for, because an enlarged picture
  has shades between them; CMYK becomes RGB, by its own profile if it has one;
* 16 bits stay 16 in PNG and TIFF files, for grey and colours; other formats get 8, with a warning;
* the EXIF orientation is applied and then removed; sizes and whatever else describes the old file are
  removed from EXIF too;
* of several frames or pages the first one is taken, with a warning.

Pillow decodes 16-bit colours into their high bytes. Asked for the other byte order it gives the low
ones, which is how they are read here; to write them takes the few lines below.
"""

from __future__ import annotations

import io
import math
import re
import struct
import sys
import warnings
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin

from .images import SAVE_OPTIONS, UnsuitableError, is_negative, opened

Plane = npt.NDArray[Any]  # uint8 or uint16

WITH_ALPHA = ("PNG", "WEBP", "TIFF")
WITH_16_BITS = ("PNG", "TIFF")
WITH_METADATA = ("PNG", "JPEG", "WEBP", "TIFF")
LONGEST_SIDE = {"JPEG": 65_500, "WEBP": 16_383}
LONGEST_EXIF = {"JPEG": 65_533}  # bytes of one segment of a JPEG file

# Tags that say how the pixels lie in the file they come from (in a TIFF file they stand among the
# others), or that are copied apart: orientation, XMP, IPTC, Photoshop's, ICC profile.
_ABOUT_THE_FILE = {
    *(254, 255, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 317, 320, 322, 323),
    *(324, 325, 330, 338, 339, 347, 513, 514, 529, 530, 531, 532, 700, 33723, 34377, 34675),
}
_DETAILS, _GPS, _INTEROPERABILITY = 0x8769, 0x8825, 0xA005  # directories of their own
_WIDTH, _HEIGHT = 0xA002, 0xA003
_COLOURS_OF_16_BITS = {f"{mode};16{order}" for mode in ("RGB", "RGBA") for order in "BLN"} | {
    "LA;16B"
}
_OTHER_BYTE = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}


@dataclass(frozen=True)
class Photo:
    """An upright picture. colours: (H, W, 3) RGB or (H, W) grey; alpha: (H, W), 0 transparent, or
    None; both uint8 or both uint16. icc_profile and exif as files hold them, or None."""

    colours: Plane
    alpha: Plane | None = None
    icc_profile: bytes | None = None
    exif: bytes | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)"""
        return self.colours.shape[1], self.colours.shape[0]

    @property
    def is_deep(self) -> bool:
        """Whether it has 16 bits a channel."""
        return self.colours.dtype == np.uint16

    def reduced(self) -> Photo:
        """The same in 8 bits."""
        if not self.is_deep:
            return self
        alpha = None if self.alpha is None else _to_8_bits(self.alpha)
        return replace(self, colours=_to_8_bits(self.colours), alpha=alpha)


# --- Reading --------------------------------------------------------------------------------------


def read_photo(path: Path) -> Photo:
    """The first frame of a PNG, JPEG, WebP, BMP or TIFF file, with all that is kept of it.

    Raises FileNotFoundError, and ValueError for a damaged file, another format, floating-point
    pictures and what Pillow takes for an attack, in one line that names the file.
    """
    with opened(path) as image:
        # The second picture in a camera's JPEG file is a preview or a map of brightness.
        frames = 1 if image.format in ("JPEG", "MPO") else getattr(image, "n_frames", 1)
        rawmodes = {_rawmode(tile) for tile in image.tile}
        deep = any(re.fullmatch(r"(?!I;).+;16[BLN]", rawmode) for rawmode in rawmodes)
        tags: Any = getattr(image, "tag_v2", {})  # of TIFF: bits a sample, planar configuration
        if 16 in tags.get(258, ()) and tags.get(284) == 2:
            raise UnsuitableError("16 bits a channel and one plane after another; interleave them")
        photo = from_image(image)
    if frames > 1:
        warnings.warn(f"{path}: the first of its {frames} frames is taken", stacklevel=2)
    if not deep:
        return photo
    if not rawmodes <= _COLOURS_OF_16_BITS:
        kind = ", ".join(sorted(rawmodes))
        warnings.warn(f"{path}: 16 bits a channel ({kind}) reduced to 8 bits", stacklevel=2)
        return photo
    with opened(path) as image:
        image.tile = [_with_low_bytes(tile) for tile in image.tile]
        key = image.info.get("transparency")
        low = np.asarray(ImageOps.exif_transpose(image)).astype(np.uint16)
    if "LA;16B" in rawmodes:  # the four bytes of its two channels, as they lie in the file
        grey, alpha = (low[:, :, i] << 8 | low[:, :, i + 1] for i in (0, 2))
        return replace(photo, colours=grey, alpha=alpha)
    deep_colours = photo.colours.astype(np.uint16) << 8 | low[:, :, :3]
    alpha = None
    if low.shape[2] == 4:
        assert photo.alpha is not None
        alpha = photo.alpha.astype(np.uint16) << 8 | low[:, :, 3]
    elif key is not None:
        alpha = _all_but(deep_colours, key)
    return replace(photo, colours=deep_colours, alpha=alpha)


def from_image(image: Image.Image) -> Photo:
    """A PIL picture of any mode, as a viewer shows it. ValueError for floating point."""
    exif = _exif(image)
    profile = image.info.get("icc_profile") or None
    key = image.info.get("transparency")
    upright = ImageOps.exif_transpose(image)
    mode = upright.mode
    if mode == "F":
        raise UnsuitableError("floating-point pictures have no fixed white; convert it to 8 bits")
    if mode.startswith("I"):
        values = np.asarray(upright)
        if values.min() < 0 or values.max() > 65535:
            raise UnsuitableError(
                f"its values {values.min()}..{values.max()} do not fit into 16 bits"
            )
        grey = values.astype(np.uint16)
        grey = 65535 - grey if is_negative(image) else grey
        return Photo(grey, None if key is None else _all_but(grey, key), profile, exif)
    if mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        upright, profile = _to_rgb(upright, profile), None
    clear = upright.has_transparency_data
    shown = upright.convert("RGBA" if clear else "RGB")
    colours = np.asarray(shown)
    alpha = colours[:, :, 3] if clear else None
    colours = colours[:, :, :3]
    # Of a palette with a profile the greys would need another profile.
    grey = mode in ("1", "L", "LA", "La") or (mode in ("P", "PA") and profile is None)
    if grey and (colours == colours[:, :, :1]).all():
        colours = colours[:, :, 0]
    return Photo(colours, alpha, profile, exif)


def _rawmode(tile: Any) -> str:
    """How the samples of a part of an opened picture are stored, in Pillow's words."""
    arguments = tile[3]
    return str(arguments if isinstance(arguments, str) else arguments and arguments[0])


def _with_low_bytes(tile: Any) -> Any:
    """The part of an opened picture with the other byte of every sample of 16 bits."""
    rawmode, arguments = _rawmode(tile), tile[3]
    other = "RGBA" if rawmode == "LA;16B" else rawmode[:-1] + _OTHER_BYTE[rawmode[-1]]
    arguments = other if isinstance(arguments, str) else (other, *arguments[1:])
    return tile._replace(args=arguments)


def _all_but(colours: Plane, key: Any) -> Plane:
    """The alpha channel where one colour, or grey, is transparent."""
    clear = colours == np.array(key)
    clear = clear.all(axis=-1) if colours.ndim == 3 else clear
    return np.where(clear, 0, 65535).astype(np.uint16)


def _to_rgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """CMYK and the like as sRGB: by the picture's profile, or else as Pillow does it."""
    if profile is not None:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            target = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
            assert converted is not None
            return converted
        except ImageCms.PyCMSError:
            warnings.warn(f"its profile does not fit a {image.mode} picture: ignored", stacklevel=3)
    return image.convert("RGB")


def _exif(image: Image.Image) -> bytes | None:
    """EXIF without what is true of the old file only; None if there is none, or none readable."""
    try:
        exif, kept = image.getexif(), Image.Exif()
        for tag in set(exif) - _ABOUT_THE_FILE - {_DETAILS, _GPS}:
            kept[tag] = exif[tag]
        for tag in (_DETAILS, _GPS):
            if exif.get_ifd(tag):
                kept[tag] = exif.get_ifd(tag)
        if _DETAILS in kept:
            details = {k: v for k, v in kept[_DETAILS].items() if k not in (_WIDTH, _HEIGHT)}
            if _INTEROPERABILITY in details:
                details[_INTEROPERABILITY] = exif.get_ifd(_INTEROPERABILITY)
            kept[_DETAILS] = details
        return kept.tobytes() if kept else None
    except Exception as error:  # whatever a damaged one makes Pillow trip over
        reason = " ".join(str(error).split()) or type(error).__name__
        warnings.warn(f"EXIF is damaged and not copied ({reason})", stacklevel=3)
        return None


def _to_8_bits(plane: Plane) -> npt.NDArray[np.uint8]:
    return ((plane.astype(np.uint32) + 128) // 257).astype(np.uint8)


# --- Writing --------------------------------------------------------------------------------------


def check(photo: Photo, scale: int, file_format: str) -> Photo:
    """The picture as it has to be before it is enlarged into a file of a format.

    An alpha channel without any transparency is dropped where the format has none. Raises
    ValueError for transparency that the format cannot hold, and for too many pixels.
    """
    if photo.alpha is not None and file_format not in WITH_ALPHA:
        if photo.alpha.min() < np.iinfo(photo.alpha.dtype).max:
            raise ValueError(f"{file_format} holds no transparency: write a PNG file instead")
        photo = replace(photo, alpha=None)
    width, height = (scale * side for side in photo.size)
    longest = LONGEST_SIDE.get(file_format)
    if longest is not None and max(width, height) > longest:
        raise ValueError(
            f"{width} x {height} pixels are too many for {file_format}, which holds {longest} a"
            " side: write a PNG file instead"
        )
    return photo


def encode(photo: Photo, file_format: str) -> bytes:
    """A file of one of the formats of `images`; what it cannot hold is left out with a warning."""
    if photo.is_deep and file_format not in WITH_16_BITS:
        warnings.warn(f"{file_format} holds 8 bits a channel: 16 are reduced to 8", stacklevel=2)
        photo = photo.reduced()
    kept: dict[str, bytes] = {}
    for name, data in (("icc_profile", photo.icc_profile), ("exif", photo.exif)):
        longest = LONGEST_EXIF.get(file_format, math.inf) if name == "exif" else math.inf
        if data is None:
            continue
        if file_format in WITH_METADATA and len(data) <= longest:
            kept[name] = data
        else:
            what = "EXIF" if name == "exif" else "colour profile"
            warnings.warn(f"{file_format} cannot hold the {what}: left out", stacklevel=2)
    if photo.is_deep and (photo.colours.ndim == 3 or photo.alpha is not None):
        return _deep_png(photo, kept) if file_format == "PNG" else _deep_tiff(photo, kept)
    file = io.BytesIO()
    as_image(photo).save(file, file_format, **SAVE_OPTIONS.get(file_format, {}), **kept)
    return file.getvalue()


def as_image(photo: Photo) -> Image.Image:
    """A PIL picture: L, LA, RGB or RGBA, or I;16 for grey of 16 bits; other 16 bits become 8."""
    if photo.is_deep and (photo.colours.ndim == 3 or photo.alpha is not None):
        warnings.warn("Pillow holds no such pictures of 16 bits: reduced to 8", stacklevel=2)
        photo = photo.reduced()
    image = Image.fromarray(np.ascontiguousarray(photo.colours))
    if photo.alpha is not None:
        image.putalpha(Image.fromarray(np.ascontiguousarray(photo.alpha)))
    return image


def _channels(photo: Photo) -> npt.NDArray[np.uint16]:
    """(H, W, channels), alpha last."""
    colours = photo.colours if photo.colours.ndim == 3 else photo.colours[:, :, None]
    planes = [colours] if photo.alpha is None else [colours, photo.alpha[:, :, None]]
    return np.concatenate(planes, axis=2).astype(np.uint16, copy=False)


def _deep_png(photo: Photo, kept: dict[str, bytes]) -> bytes:
    """A PNG file (W3C, third edition) of 16 bits a channel."""
    channels = _channels(photo)
    height, width, count = channels.shape
    kind = {2: 4, 3: 2, 4: 6}[count]  # grey and alpha, colours, colours and alpha
    rows = channels.astype(">u2").view(np.uint8).reshape(height, -1)
    # Filter 2: every byte less the one above it.
    differences = np.concatenate([rows[:1], rows[1:] - rows[:-1]])
    filters = np.full((height, 1), 2, np.uint8)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))]
    if "icc_profile" in kept:
        chunks.append((b"iCCP", b"ICC Profile\0\0" + zlib.compress(kept["icc_profile"])))
    if "exif" in kept:
        chunks.append((b"eXIf", kept["exif"].removeprefix(b"Exif\0\0")))
    pixels = zlib.compress(np.concatenate([filters, differences], axis=1).tobytes())
    size = 1 << 30  # a chunk holds less than 2^31 bytes
    chunks += [(b"IDAT", pixels[i : i + size]) for i in range(0, len(pixels), size)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in [*chunks, (b"IEND", b"")]
    )


def _deep_tiff(photo: Photo, kept: dict[str, bytes]) -> bytes:
    """A TIFF file (revision 6.0) of 16 bits a channel, one strip without compression."""
    channels = _channels(photo)
    height, width, count = channels.shape
    tags = TiffImagePlugin.ImageFileDirectory_v2()  # little-endian
    if "exif" in kept:
        exif = Image.Exif()
        exif.load(kept["exif"])
        for tag, value in exif.items():
            tags[tag] = exif.get_ifd(tag) if tag in (_DETAILS, _GPS) else value
    if "icc_profile" in kept:
        tags[34675] = kept["icc_profile"]
        tags.tagtype[34675] = 7
    tags[256], tags[257] = width, height
    tags[258] = (16,) * count
    tags[259] = 1  # no compression
    tags[262] = 2 if count > 2 else 1  # RGB, or black is zero
    tags[273] = 0  # the strip begins behind the tags
    tags[277] = count
    tags[278] = height
    tags[279] = channels.nbytes
    if photo.alpha is not None:
        tags[338] = 2  # alpha that the colours are not multiplied by
    file = io.BytesIO()
    tags.save(file)
    file.write(channels.astype("<u2").tobytes())
    return file.getvalue()
