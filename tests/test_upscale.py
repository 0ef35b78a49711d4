"""The command that enlarges pictures: what it writes, what it refuses, what it survives."""

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import compsrt
from compsrt import inference, tiling, upscale
from compsrt.checkpoint import load, save_float, save_packed
from compsrt.cli import run
from compsrt.inference import super_resolve
from compsrt.models.edsr import EDSR, EDSRConfig
from compsrt.models.swinir import SwinIR, SwinIRConfig


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    torch.manual_seed(0)
    config = SwinIRConfig(
        scale=2, depths=(2,), embed_dim=12, num_heads=(2,), window_size=4, mlp_hidden=(24,)
    )
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_float(SwinIR(config), path)
    return str(path)


@pytest.fixture
def photos(tmp_path) -> Path:
    """a.png, a.jpg, grey.bmp and below/clear.png, 9 x 7 pixels."""
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8))
    image.save(folder / "a.png")
    image.save(folder / "a.jpg")
    image.convert("L").save(folder / "grey.bmp")
    image.convert("RGBA").save(folder / "below" / "clear.png")
    return folder


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def facts(path: Path) -> tuple[str, tuple[int, int]]:
    with Image.open(path) as image:
        return image.mode, image.size


def enlarge(*words: object) -> int:
    return run(upscale.main, [str(word) for word in words], name="compsrt.upscale")


def test_a_folder_becomes_a_folder(weights, photos, tmp_path, capsys):
    output = tmp_path / "large"
    assert enlarge(weights, photos, "--output", output) == 0
    names = ["a.jpg_x2.png", "a.png_x2.png", "below/clear_x2.png", "grey_x2.png"]
    assert files(output) == names
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert sorted(report["pictures"]) == [str(output / name) for name in names]
    assert report["megapixels"] == 4 * 18 * 14 / 1e6
    with Image.open(photos / "a.png") as image, Image.open(output / "a.png_x2.png") as large:
        expected = super_resolve(load(weights), image)
        assert np.array_equal(np.asarray(large), np.asarray(expected))
    assert facts(output / "below" / "clear_x2.png") == ("RGBA", (18, 14))
    assert facts(output / "grey_x2.png") == ("L", (18, 14))


@pytest.mark.parametrize(
    ("name", "kind"), [("b.png", "PNG"), ("b.JPG", "JPEG"), ("b.webp", "WEBP"), ("b.tif", "TIFF")]
)
def test_a_file_becomes_a_file_of_the_format_asked_for(name, kind, weights, photos, tmp_path):
    assert enlarge(weights, photos / "a.png", "--output", tmp_path / name, "--tile", 32) == 0
    with Image.open(tmp_path / name) as image:
        assert (image.format, image.size, image.mode) == (kind, (18, 14), "RGB")


def test_orientation_is_applied_once_and_the_rest_of_exif_and_profile_kept(weights, tmp_path):
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    exif[0x8769] = {0xA002: 9, 0xA003: 7, 0x9003: "2026:01:02 03:04:05"}
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGB", (9, 7)).save(turned, exif=exif, icc_profile=profile)
    for name in ("b.png", "b.jpg", "b.webp", "b.tif"):
        assert enlarge(weights, turned, "--output", tmp_path / name) == 0
        with Image.open(tmp_path / name) as large:
            assert large.size == (14, 18)
            assert large.info["icc_profile"] == profile
            kept = large.getexif()
            assert 0x0112 not in kept
            assert kept[0x010F] == "Maker"
            assert dict(kept.get_ifd(0x8769)) == {0x9003: "2026:01:02 03:04:05"}


@pytest.mark.parametrize(("name", "dtype"), [("b.png", "uint16"), ("b.webp", "uint8")])
def test_16_bits_are_kept_where_the_format_allows(name, dtype, weights, tmp_path, capsys):
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((7, 9), 40_000, np.uint16)).save(deep)
    assert enlarge(weights, deep, "--output", tmp_path / name) == 0
    with Image.open(tmp_path / name) as large:
        assert np.asarray(large).dtype == dtype
    err = capsys.readouterr().err
    expected = f"compsrt.upscale: warning: {deep}: WEBP holds 8 bits a channel: 16 are reduced to 8"
    assert err.splitlines() == [expected] * (dtype == "uint8")


def test_a_suffix_may_be_chosen(weights, photos):
    assert enlarge(weights, photos / "a.png", "--output", photos, "--suffix", "_large") == 0
    assert "a_large.png" in files(photos)
    # One picture may go to any folder, one above it too.
    assert enlarge(weights, photos / "below" / "clear.png", "--output", photos) == 0
    assert "clear_x2.png" in files(photos)


def test_nothing_is_overwritten_without_force(weights, photos, tmp_path, capsys):
    output = tmp_path / "large"
    output.mkdir()
    for name in ("grey_x2.png", "a.png_x2.png"):
        (output / name).write_bytes(b"mine")
    assert enlarge(weights, photos, "--output", output) == 2
    err = capsys.readouterr().err
    assert "a.png_x2.png and 1 more: exists; --force overwrites" in err
    assert err.count("\n") == 1
    assert files(output) == ["a.png_x2.png", "grey_x2.png"]
    assert (output / "grey_x2.png").read_bytes() == b"mine"
    assert enlarge(weights, photos, "--output", output, "--force") == 0
    assert len(files(output)) == 4
    assert facts(output / "grey_x2.png") == ("L", (18, 14))


def test_results_below_the_input_folder_are_no_input(weights, photos):
    assert enlarge(weights, photos, "--output", photos / "large") == 0
    assert enlarge(weights, photos, "--output", photos / "large", "--force") == 0
    assert len(files(photos / "large")) == 4


def test_a_broken_picture_does_not_stop_the_rest(weights, photos, tmp_path, capsys):
    (photos / "a.png").write_bytes((photos / "a.png").read_bytes()[:60])
    (photos / "bad.png").write_bytes(b"no picture")
    output = tmp_path / "large"
    assert enlarge(weights, photos, "--output", output) == 2
    out, err = capsys.readouterr()
    assert out == ""
    first, second, summary = err.splitlines()
    start = "compsrt.upscale: error: "
    assert first.startswith(f"{start}{photos / 'a.png'}: truncated or damaged picture")
    assert second.startswith(f"{start}{photos / 'bad.png'}: not a ")
    assert summary == f"{start}2 of 5 pictures failed, 3 are done"
    assert files(output) == ["a.jpg_x2.png", "below/clear_x2.png", "grey_x2.png"]


def test_transparency_is_not_dropped(weights, photos, tmp_path, capsys, monkeypatch):
    clear = photos / "below" / "clear.png"
    # An alpha channel that hides nothing is no transparency.
    assert enlarge(weights, clear, "--output", tmp_path / "opaque.jpg") == 0
    with Image.open(clear) as image:
        image.putpixel((3, 3), (0, 0, 0, 254))
        image.save(clear)
    monkeypatch.setattr(inference, "enlarge_photo", None)  # no work is done before
    assert enlarge(weights, clear, "--output", tmp_path / "b.jpg") == 2
    assert f"{clear}: JPEG holds no transparency" in capsys.readouterr().err
    assert not (tmp_path / "b.jpg").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(weights, photos, tmp_path, capsys, monkeypatch):
    def no_space(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", no_space)
    assert enlarge(weights, photos / "a.png", "--output", tmp_path / "b.png") == 2
    assert "b.png: no space left on device" in capsys.readouterr().err
    assert files(tmp_path) == [f"photos/{name}" for name in files(photos)]


def test_a_write_that_fails_stops_the_run_and_says_what_is_done(
    weights, photos, tmp_path, capsys, monkeypatch
):
    output = tmp_path / "large"
    write = upscale.atomic_write

    def room_for_two(path, content):
        if len(files(output)) == 2:
            raise OSError(28, os.strerror(28), str(path))
        write(path, content)

    monkeypatch.setattr(upscale, "atomic_write", room_for_two)
    assert enlarge(weights, photos, "--output", output) == 2
    first, summary = capsys.readouterr().err.splitlines()
    assert first.endswith("clear_x2.png: no space left on device")
    assert summary.endswith("1 of 4 pictures failed, 2 are done, 1 were not tried")
    assert len(files(output)) == 2


@pytest.mark.parametrize("appears", ["file", "folder"])
def test_a_target_that_appears_meanwhile_fails_alone(
    appears, weights, photos, tmp_path, capsys, monkeypatch
):
    output = tmp_path / "large"
    work = upscale._Enlarger.__call__

    def slow(self, source, target, advance):
        if source.name == "clear.png" and appears == "file":
            target.parent.mkdir(parents=True)
            target.write_bytes(b"mine")
        elif source.name == "clear.png":
            target.parent.write_bytes(b"mine")
        return work(self, source, target, advance)

    monkeypatch.setattr(upscale._Enlarger, "__call__", slow)
    assert enlarge(weights, photos, "--output", output) == 2
    first, summary = capsys.readouterr().err.splitlines()
    message = "clear_x2.png: exists by now; --force overwrites"
    assert (message if appears == "file" else "below: ") in first
    assert summary.endswith("error: 1 of 4 pictures failed, 3 are done")
    mine = output / "below" / "clear_x2.png" if appears == "file" else output / "below"
    assert mine.read_bytes() == b"mine"


def test_files_of_a_folder_that_are_left_out_are_counted(weights, photos, tmp_path, capsys):
    assert enlarge(weights, photos, "--output", tmp_path / "1") == 0
    assert capsys.readouterr().err == ""
    start = f"compsrt.upscale: warning: {photos}: "
    (photos / "below" / "a.GIF").touch()
    assert enlarge(weights, photos, "--output", tmp_path / "2") == 0
    assert capsys.readouterr().err == f"{start}1 file is no picture that is read here: .gif\n"
    for name in ("b.gif", "notes.txt", ".hidden", "README"):
        (photos / name).touch()
    assert enlarge(weights, photos, "--output", tmp_path / "3") == 0
    line = "4 files are no pictures that are read here: no suffix, .gif, .txt"
    assert capsys.readouterr().err == f"{start}{line}\n"


def test_warnings_about_a_header_name_the_picture(weights, photos, tmp_path, capsys, monkeypatch):
    opened = Image.open

    def warned(*arguments, **options):
        warnings.warn("Truncated File Read", stacklevel=2)
        return opened(*arguments, **options)

    monkeypatch.setattr(Image, "open", warned)
    assert enlarge(weights, photos / "a.jpg", "--output", tmp_path / "b.png") == 0
    line = f"compsrt.upscale: warning: {photos / 'a.jpg'}: Truncated File Read\n"
    assert capsys.readouterr().err == line


def test_patterns_name_pictures_below_their_folder(weights, photos, tmp_path, capsys):
    (photos / "notes.txt").write_text("no picture")
    (photos / "[odd].png").write_bytes((photos / "a.png").read_bytes())
    assert enlarge(weights, photos / "**" / "*a*", "--output", tmp_path / "1") == 0
    assert files(tmp_path / "1") == ["a.jpg_x2.png", "a.png_x2.png", "below/clear_x2.png"]
    assert enlarge(weights, photos / "[odd].png", "--output", tmp_path / "2") == 0
    assert files(tmp_path / "2") == ["[odd]_x2.png"]
    capsys.readouterr()
    for pattern, message in (("*.jxl", "matches nothing"), ("*.txt", "no picture among")):
        assert enlarge(weights, photos / pattern, "--output", tmp_path / "3") == 2
        assert message in capsys.readouterr().err


def test_out_of_memory_halves_the_tile_with_a_line_that_says_so(
    weights, photos, tmp_path, capsys, monkeypatch
):
    picture = photos / "a.png"
    noise = np.random.default_rng(0).integers(0, 256, (70, 150, 3), dtype=np.uint8)
    Image.fromarray(noise).save(picture)
    forward = SwinIR.forward

    def limited(self, x):
        if x.shape[0] * x.shape[2] * x.shape[3] > 4 * 48 * 48:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return forward(self, x)

    monkeypatch.setattr(SwinIR, "forward", limited)
    assert enlarge(weights, picture, photos / "grey.bmp", "--output", tmp_path / "out") == 0
    assert capsys.readouterr().err.splitlines() == [
        "compsrt.upscale: warning: out of memory with tiles of 152 x 152 pixels; going on with 76 x 76",
        "compsrt.upscale: warning: out of memory with tiles of 76 x 76 pixels; going on with 40 x 40",
    ]
    monkeypatch.undo()
    with Image.open(tmp_path / "out" / "a_x2.png") as large, Image.open(picture) as image:
        expected = np.asarray(super_resolve(load(weights), image, 40)).astype(int)
        assert abs(np.asarray(large) - expected).max() <= 1  # four tiles at a time there, one here


def test_a_picture_too_large_for_any_tile_is_reported_and_the_rest_done(
    weights, photos, tmp_path, capsys, monkeypatch
):
    forward = SwinIR.forward

    def limited(self, x):
        if x.shape[3] == 30:
            raise MemoryError
        return forward(self, x)

    Image.new("RGB", (30, 30)).save(photos / "a.png")
    monkeypatch.setattr(SwinIR, "forward", limited)
    assert enlarge(weights, photos, "--output", tmp_path / "out") == 2
    first, summary = capsys.readouterr().err.splitlines()
    assert f"{photos / 'a.png'}: out of memory" in first
    assert summary.endswith("1 of 4 pictures failed, 3 are done")


def test_half_precision_that_overflows_goes_on_in_float32(
    weights, photos, tmp_path, capsys, monkeypatch
):
    forward = SwinIR.forward

    def overflowing(self, x):
        return forward(self, x) * (torch.inf if x.dtype == torch.float16 else 1)

    monkeypatch.setattr(SwinIR, "forward", overflowing)
    assert enlarge(weights, photos, "--output", tmp_path / "half", "--dtype", "float16") == 0
    line = f"{photos / 'a.jpg'}: float16 overflows in this model; going on in float32"
    assert capsys.readouterr().err.splitlines() == [f"compsrt.upscale: warning: {line}"]
    assert enlarge(weights, photos, "--output", tmp_path / "float") == 0
    for name in files(tmp_path / "float"):
        expected = (tmp_path / "float" / name).read_bytes()
        assert (tmp_path / "half" / name).read_bytes() == expected


@pytest.fixture(scope="module")
def networks(weights, tmp_path_factory) -> dict[str, str]:
    """A file of every family, float, and packed where there is such a form."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    edsr = EDSR(EDSRConfig.uniform(2, blocks=2, channels=8))
    save_float(edsr, folder / "edsr.safetensors")
    packed = compsrt.quantize(load(weights), compsrt.QuantSpec(bits=4), torch.rand(1, 3, 16, 16))
    save_packed(packed, folder / "packed.safetensors")
    names = {name: str(folder / f"{name}.safetensors") for name in ("edsr", "packed")}
    assets = Path(compsrt.__file__).parent / "assets"
    names |= {
        name: str(assets / f"{name}.safetensors") for name in ("sesr_m3_x2", "sesr_m5_x2_8bit")
    }
    return {"swinir": weights, **names}


@pytest.mark.parametrize("name", ["edsr", "packed", "sesr_m3_x2", "sesr_m5_x2_8bit"])
def test_every_family_goes_through_the_same_command(name, networks, photos, tmp_path):
    picture = photos / "a.png"
    noise = np.random.default_rng(0).integers(0, 256, (50, 61, 3), dtype=np.uint8)
    Image.fromarray(noise).save(picture)
    words = [networks[name], picture, "--tile", "40", "--output"]
    assert enlarge(*words, tmp_path / "b.png") == 0
    assert enlarge(*words, tmp_path / "c.png", "--self-ensemble") == 0
    assert facts(tmp_path / "b.png") == facts(tmp_path / "c.png") == ("RGB", (122, 100))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["swinir", "edsr", "sesr_m3_x2"])
def test_half_precision_is_close(name, dtype, networks, photos, tmp_path):
    words = ["--output", tmp_path / "b.png", "--dtype", dtype]
    assert enlarge(networks[name], photos / "a.png", *words) == 0
    with Image.open(tmp_path / "b.png") as large, Image.open(photos / "a.png") as image:
        expected = np.asarray(super_resolve(load(networks[name]), image)).astype(int)
        assert abs(np.asarray(large) - expected).max() <= 4


def test_auto_takes_tiles_where_the_memory_is_small(weights, photos, tmp_path, monkeypatch):
    Image.new("RGB", (150, 150)).save(photos / "a.png")
    seen = []
    forward = SwinIR.forward

    def watched(self, x):
        seen.append(tuple(x.shape))
        return forward(self, x)

    monkeypatch.setattr(SwinIR, "forward", watched)
    for free, shapes in (
        (150 * 150 * tiling.BYTES_PER_PIXEL * 2, [(1, 3, 150, 150)]),
        (4 * 56 * 56 * tiling.BYTES_PER_PIXEL * 2, [(4, 3, 52, 52)] * 4),
        (1000, [(4, 3, 32, 32)] * 20 + [(1, 3, 32, 32)]),
    ):
        monkeypatch.setattr(tiling, "free_memory", lambda device, free=free: free)
        words = ["--output", tmp_path / "b.png", "--force"]
        assert enlarge(weights, photos / "a.png", *words) == 0
        assert seen == shapes
        seen.clear()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing.png", "--output", "out"], "nothing.png: no such folder or picture"),
        (["photos/empty", "--output", "out"], "no pictures in this folder"),
        (["photos/a.png", "photos/a.jpg", "--output", "b.png"], "one file for several pictures"),
        (["photos", "--output", "b.png"], "one file for several pictures"),
        (["photos/a.png", "--output", "b.gif"], "neither a folder nor a picture file"),
        (["photos/a.png", "--output", "weights"], "neither a folder nor a picture file"),
        (["photos/a.png", "photos/a.jpg", "--output", "out"], "would be written for"),
        (["photos/a.png", "--output", "photos/a.png", "--force"], "that is read"),
        (["photos", "--output", "photos", "--suffix", "", "--force"], "that is read"),
        (["photos/a.png", "--output", "b.png", "--batch", "0"], "--batch: 0 is less than 1"),
        (["", "--output", "out"], "INPUT: an empty name"),
        (["photos/a.png", "--output", "weights/b.png"], "weights: not a folder"),
        (["photos/a.png", "--output", "out", "--suffix", "a/b"], "--suffix a/b"),
        (
            ["photos/a.png", "--output", "b.png", "--tile", "8"],
            "--tile: 8 pixels are fewer than 32",
        ),
    ],
    ids=" ".join,
)
def test_mistakes_are_one_line_and_nothing_is_written(
    words, message, weights, photos, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (photos / "empty").mkdir()
    (tmp_path / "weights").write_bytes(b"mine")
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    assert enlarge(weights, *words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
