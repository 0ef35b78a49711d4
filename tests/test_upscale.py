"""The command that enlarges pictures: what it writes, what it refuses, what it survives."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from compsrt import upscale
from compsrt.checkpoint import load, save_float
from compsrt.cli import run
from compsrt.inference import super_resolve
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


def test_orientation_and_16_bits(weights, tmp_path, capsys):
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (9, 7)).save(turned, exif=exif)
    Image.fromarray(np.full((7, 9), 40_000, np.uint16)).save(tmp_path / "deep.png")
    assert enlarge(weights, turned, tmp_path / "deep.png", "--output", tmp_path / "out") == 0
    assert facts(tmp_path / "out" / "turned_x2.png") == ("RGB", (14, 18))
    assert facts(tmp_path / "out" / "deep_x2.png") == ("L", (18, 14))
    assert capsys.readouterr().err.count("16 bits") == 1


def test_a_suffix_may_be_chosen(weights, photos):
    assert enlarge(weights, photos / "a.png", "--output", photos, "--suffix", "_large") == 0
    assert "a_large.png" in files(photos)


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
    assert err.count("\n") == 1
    assert str(photos / "a.png") in err
    assert str(photos / "bad.png") in err
    assert err.endswith("(the other 3 of 5 pictures are done)\n")
    assert files(output) == ["a.jpg_x2.png", "below/clear_x2.png", "grey_x2.png"]


def test_transparency_is_not_dropped(weights, photos, tmp_path, capsys):
    clear = photos / "below" / "clear.png"
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
        (["photos/a.png", "--output", "b.png", "--tile", "8"], "--tile 8: at least 32 pixels"),
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
