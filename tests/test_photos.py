"""Photographs as files: what is kept of a picture, in 8 and 16 bits, and what is refused."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, TiffImagePlugin

from compsrt.images import read_image
from compsrt.photos import Photo, as_image, check, encode, from_image, read_photo

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def noise(*shape: int, dtype=np.uint16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape, dtype)


def exif() -> Image.Exif:
    made = Image.Exif()
    made[0x010F] = "Maker"
    made[0x8769] = {0x9003: "2026:01:02 03:04:05"}
    made[0x8825] = {1: "N"}
    return made


def png_of_16_bits(pixels: np.ndarray, kind: int, *extra: tuple[bytes, bytes]) -> bytes:
    """Without any filter, as no writer here makes it."""
    height, width = pixels.shape[:2]
    rows = pixels.astype(">u2").view(np.uint8).reshape(height, -1)
    rows = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def reread(photo: Photo, file_format: str, folder: Path) -> Photo:
    path = folder / f"again.{file_format.lower()}"
    path.write_bytes(encode(photo, file_format))
    return read_photo(path)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("shape", [(7, 9), (7, 9, 3)], ids=["grey", "colours"])
def test_16_bits_come_back_as_they_were(shape, alpha, file_format, tmp_path):
    transparency = noise(7, 9)[::-1] if alpha else None
    photo = Photo(noise(*shape), transparency, PROFILE, exif().tobytes())
    if transparency is not None and len(shape) == 2 and file_format == "TIFF":
        # Which Pillow does not read.
        tifffile = pytest.importorskip("tifffile")
        pixels = tifffile.imread(io.BytesIO(encode(photo, file_format)))
        assert np.array_equal(pixels, np.stack([photo.colours, transparency], axis=2))
        return
    again = reread(photo, file_format, tmp_path)
    assert np.array_equal(again.colours, photo.colours)
    assert again.colours.dtype == np.uint16
    assert (again.alpha is None) == (not alpha)
    if alpha:
        assert np.array_equal(again.alpha, transparency)
    assert again.icc_profile == PROFILE
    kept = Image.Exif()
    kept.load(again.exif)
    assert kept[0x010F] == "Maker"
    assert kept.get_ifd(0x8769) == {0x9003: "2026:01:02 03:04:05"}
    assert kept.get_ifd(0x8825) == {1: "N"}


@pytest.mark.parametrize(("channels", "kind"), [(2, 4), (3, 2), (4, 6)])
def test_16_bits_of_other_writers_are_read(channels, kind, tmp_path):
    pixels = noise(5, 6, channels)
    (tmp_path / "a.png").write_bytes(png_of_16_bits(pixels, kind))
    photo = read_photo(tmp_path / "a.png")
    assert np.array_equal(photo.colours, pixels[:, :, 0] if channels == 2 else pixels[:, :, :3])
    if channels != 3:
        assert np.array_equal(photo.alpha, pixels[:, :, -1])


def test_a_transparent_colour_of_16_bits_becomes_alpha(tmp_path):
    pixels = noise(5, 6, 3)
    key = pixels[2, 3].astype(">u2").tobytes()
    (tmp_path / "a.png").write_bytes(png_of_16_bits(pixels, 2, (b"tRNS", key)))
    alpha = read_photo(tmp_path / "a.png").alpha
    assert alpha is not None
    assert np.argwhere(alpha == 0).tolist() == [[2, 3]]


def test_16_bits_are_turned_upright_byte_by_byte(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    pixels = noise(5, 6, 3)
    chunk = (b"eXIf", turned.tobytes().removeprefix(b"Exif\0\0"))
    (tmp_path / "a.png").write_bytes(png_of_16_bits(pixels, 2, chunk))
    photo = read_photo(tmp_path / "a.png")
    assert np.array_equal(photo.colours, np.rot90(pixels, -1))
    assert photo.exif is None


def test_16_bits_become_8_where_the_format_has_no_more(tmp_path):
    photo = Photo(noise(7, 9, 3))
    with pytest.warns(UserWarning, match="WEBP holds 8 bits a channel"):
        again = reread(photo, "WEBP", tmp_path)
    assert abs(again.colours - photo.colours / 257).max() <= 0.5


def test_exif_of_a_tiff_is_not_its_layout(tmp_path):
    Image.fromarray(noise(7, 9, 3, dtype=np.uint8)).save(tmp_path / "a.tif", exif=exif().tobytes())
    photo = read_photo(tmp_path / "a.tif")
    kept = Image.Exif()
    kept.load(photo.exif)
    assert set(kept) == {0x010F, 0x8769, 0x8825}


@pytest.mark.filterwarnings("ignore:.*EXIF")
def test_damaged_exif_costs_no_picture(tmp_path):
    image = Image.fromarray(noise(7, 9, 3, dtype=np.uint8))
    for number, data in enumerate(
        (b"", b"nonsense", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"\0" * 60000)
    ):
        file = io.BytesIO()
        image.save(file, "PNG", exif=data or exif().tobytes()[:-9])
        (tmp_path / f"{number}.png").write_bytes(file.getvalue())
        assert np.array_equal(read_photo(tmp_path / f"{number}.png").colours, np.asarray(image))


def test_a_cmyk_picture_becomes_rgb_and_its_profile_does_not_come_along():
    image = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    image.info["icc_profile"] = PROFILE  # of another colour space
    with pytest.warns(UserWarning, match="profile does not fit a CMYK picture"):
        photo = from_image(image)
    assert photo.icc_profile is None
    assert photo.colours[0, 0].tolist() == [255, 0, 0]


def test_palettes_become_colours_and_greys_stay_grey():
    grey = Image.fromarray(noise(4, 5, dtype=np.uint8))
    assert from_image(grey.convert("P")).colours.ndim == 2
    colours = Image.fromarray(noise(4, 5, 3, dtype=np.uint8))
    palette = colours.quantize(7)
    assert np.array_equal(from_image(palette).colours, np.asarray(palette.convert("RGB")))
    palette.info["transparency"] = 2
    alpha = from_image(palette).alpha
    assert np.array_equal(alpha == 0, np.asarray(palette) == 2)


def test_the_picture_of_the_caller_is_not_changed():
    file = io.BytesIO()
    turned = exif()
    turned[0x0112] = 3
    Image.new("RGB", (4, 5)).save(file, "JPEG", exif=turned)
    with Image.open(file) as image:
        from_image(image)
        assert image.getexif()[0x0112] == 3


def test_several_frames_are_a_warning(tmp_path):
    frames = [Image.fromarray(noise(4, 5, 3, dtype=np.uint8) // n) for n in (1, 2, 3)]
    for name in ("a.png", "a.webp", "a.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        with pytest.warns(UserWarning, match="the first of its 3 frames"):
            photo = read_photo(tmp_path / name)
        assert np.array_equal(photo.colours, np.asarray(frames[0]))


@pytest.mark.parametrize(
    ("photo", "file_format", "message"),
    [
        (Photo(noise(4, 4), noise(4, 4) // 2), "JPEG", "JPEG holds no transparency"),
        (Photo(noise(4, 4), noise(4, 4) // 2), "BMP", "BMP holds no transparency"),
        (Photo(noise(1, 8192)), "WEBP", "16384 x 2 pixels are too many for WEBP"),
        (Photo(noise(40000, 1)), "JPEG", "2 x 80000 pixels are too many for JPEG"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(photo, file_format, message):
    with pytest.raises(ValueError, match=message):
        check(photo, 2, file_format)


def test_metadata_that_a_format_cannot_hold_is_left_out_with_a_warning(tmp_path):
    photo = Photo(noise(4, 4, 3, dtype=np.uint8), None, PROFILE, exif().tobytes() + bytes(70_000))
    with pytest.warns(UserWarning, match="JPEG cannot hold the EXIF"):
        assert reread(photo, "JPEG", tmp_path).icc_profile == PROFILE
    with pytest.warns(UserWarning, match="BMP cannot hold the (EXIF|colour profile)") as caught:
        encode(photo, "BMP")
    assert len(caught) == 2


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_white_is_zero_is_no_negative(compression, dtype, tmp_path):
    values = noise(7, 9, dtype=dtype)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "TIFF", compression=compression)
    tag, path = b"\x06\x01\x03\x00\x01\x00\x00\x00", tmp_path / "negative.tif"
    assert file.getvalue().count(tag + b"\x01") == 1
    path.write_bytes(file.getvalue().replace(tag + b"\x01", tag + b"\x00"))
    white = np.iinfo(dtype).max
    assert np.array_equal(read_photo(path).colours, white - values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 16 bits are reduced
        pixels = read_image(path)
    expected = (white - values.astype(int) + white // 510) // (white // 255)
    assert np.array_equal(pixels, np.repeat(expected[:, :, None], 3, axis=2))


def test_planes_of_16_bits_are_refused(tmp_path):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in ((256, 2), (257, 2), (258, (16, 16, 16)), (259, 1), (262, 2), (277, 3)):
        tags[tag] = value
    tags[284], tags[278] = 2, 2
    tags[273], tags[279] = (0, 8, 16), (8, 8, 8)
    file = io.BytesIO()
    tags.save(file)
    (tmp_path / "a.tif").write_bytes(file.getvalue() + bytes(24))
    with pytest.raises(ValueError, match=r"a\.tif: .*one plane after another"):
        read_photo(tmp_path / "a.tif")


def test_pillow_gets_16_bits_of_grey_and_8_of_the_rest():
    assert as_image(Photo(noise(4, 5))).mode == "I;16"
    with pytest.warns(UserWarning, match="reduced to 8"):
        assert as_image(Photo(noise(4, 5, 3))).mode == "RGB"
