"""Pictures of any size, mode and tiling through a model, and the scores of a test set."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import compsrt
from compsrt.checkpoint import load
from compsrt.data import Pair, find_pairs, imresize, read_image, to_image, to_tensor, write_image
from compsrt.distributed import Ranks, setup
from compsrt.inference import enlarge, evaluate_pairs, super_resolve
from compsrt.metrics import psnr
from compsrt.models.swinir import SwinIR, SwinIRConfig

TINY = SwinIRConfig(
    scale=2, depths=(2,), embed_dim=12, num_heads=(2,), window_size=4, mlp_hidden=(24,)
)


@pytest.fixture(scope="module")
def model() -> SwinIR:
    torch.manual_seed(0)
    return SwinIR(TINY).eval()


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


class Repeat(nn.Module):
    """Every pixel three by three times: what a pixel becomes depends on no other."""

    scale, window_size = 3, 8

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return (self.gain * x).repeat_interleave(3, dim=2).repeat_interleave(3, dim=3)


# --- one picture ----------------------------------------------------------------------------------


@given(height=st.integers(1, 21), width=st.integers(1, 21))
def test_any_size_is_enlarged(height, width, model):
    lr = picture(height, width)
    result = enlarge(model, lr)
    assert result.shape == (2 * height, 2 * width, 3)
    assert result.dtype == np.uint8
    with torch.no_grad():
        assert np.array_equal(result, to_image(model(to_tensor(lr))))


def test_a_model_can_be_trained_after_it_was_used(model):
    enlarge(model, picture(12, 16))
    model(torch.rand(1, 3, 12, 16)).sum().backward()
    model.zero_grad()


@given(
    height=st.integers(1, 90), width=st.integers(1, 90), tile=st.sampled_from([32, 33, 40, 48, 200])
)
def test_tiles_cover_every_pixel_with_weight_1(height, width, tile):
    lr = picture(height, width)
    assert np.array_equal(enlarge(Repeat(), lr, tile), enlarge(Repeat(), lr))


def test_tiles_leave_no_seams(shared):
    nano = load(shared / "assets/swinir_nano_x2.safetensors")
    lr = read_image(shared / "data/Set5/LR_bicubic/X2/butterflyx2.png")[:100, :72]
    assert psnr(enlarge(nano, lr, 48), enlarge(nano, lr), crop=0) > 50


def test_tiles_too_small_to_overlap_are_refused(model):
    with pytest.raises(ValueError, match="tile: 28 pixels are fewer than 32"):
        enlarge(model, picture(8, 8), 25)


def test_a_model_that_overflows_is_an_error(model):
    class Broken(Repeat):
        def forward(self, x):
            return super().forward(x) * torch.nan

    with pytest.raises(ValueError, match="NaN"):
        enlarge(Broken(), picture(8, 8))


# --- modes of pictures ----------------------------------------------------------------------------


def with_transparency(image: Image.Image, value) -> Image.Image:
    image.info["transparency"] = value
    return image


RGB = Image.fromarray(picture(10, 13))


@pytest.mark.parametrize(
    ("image", "mode"),
    [
        (RGB, "RGB"),
        (RGB.convert("RGBA"), "RGBA"),
        (with_transparency(RGB.copy(), (1, 2, 3)), "RGBA"),
        (RGB.convert("L"), "L"),
        (RGB.convert("1"), "L"),
        (RGB.convert("LA"), "LA"),
        (with_transparency(RGB.convert("L"), 7), "LA"),
        (RGB.convert("P"), "RGB"),
        (with_transparency(RGB.convert("P"), 3), "RGBA"),
        (RGB.convert("CMYK"), "RGB"),
        (RGB.convert("YCbCr"), "RGB"),
    ],
    ids=lambda value: getattr(value, "mode", value),
)
def test_every_mode_keeps_what_it_shows(image, mode, model):
    result = super_resolve(model, image)
    assert (result.mode, result.size) == (mode, (26, 20))
    expected = enlarge(model, np.asarray(image.convert("RGB")))
    if mode[0] == "R":
        assert np.array_equal(np.asarray(result.convert("RGB")), expected)
    else:
        assert np.array_equal(
            np.asarray(result.convert("L")), np.asarray(Image.fromarray(expected).convert("L"))
        )


def test_transparency_is_enlarged_bicubically(model):
    image = RGB.copy()
    alpha = picture(10, 13)[:, :, 0]
    image.putalpha(Image.fromarray(alpha))
    result = super_resolve(model, image, tile=32)
    assert np.array_equal(np.asarray(result.getchannel("A")), imresize(alpha, 2))


def test_16_bits_are_reduced_and_floats_refused(model):
    deep = picture(9, 9)[:, :, 0].astype(np.uint16)
    with pytest.warns(UserWarning, match="16 bits"):
        result = super_resolve(model, Image.fromarray(deep * 257 + 40))
    expected = super_resolve(model, Image.fromarray(deep.astype(np.uint8)))
    assert np.array_equal(np.asarray(result), np.asarray(expected))
    with pytest.raises(ValueError, match="floating-point"):
        super_resolve(model, Image.new("F", (8, 8)))


# --- test sets ------------------------------------------------------------------------------------


def test_bicubic_scores_are_those_of_the_protocol(shared):
    scores = evaluate_pairs(None, find_pairs(shared / "data/Set5", 2), 2)
    assert [score["name"] for score in scores] == ["baby", "bird", "butterfly", "head", "woman"]
    assert sum(score["psnr"] for score in scores) / 5 == pytest.approx(33.673, abs=5e-4)


@pytest.fixture
def pairs(tmp_path) -> list[Pair]:
    for name, height in (("b", 41), ("a", 50), ("c/d", 36)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_image(tmp_path / f"{name}.png", picture(height, 38))
    return find_pairs(tmp_path, 2)


def test_pictures_are_scored_and_saved(pairs, model, tmp_path):
    folder = tmp_path / "out"
    scores = evaluate_pairs(model, pairs, 2, save=folder)
    assert [score["name"] for score in scores] == ["a", "b", "c/d"]
    for pair, score in zip(pairs, scores, strict=True):
        hr = read_image(pair.hr)[: len(read_image(pair.hr)) // 2 * 2]
        saved = read_image(folder / f"{pair.name}.png")
        assert np.array_equal(saved, enlarge(model, imresize(hr, 0.5)))
        assert score["psnr"] == psnr(saved, hr, crop=2)
        assert score["milliseconds"] > 0
        assert 0 < score["ssim"] < 1


def test_a_picture_too_small_to_score_is_named(tmp_path, model):
    write_image(tmp_path / "small.png", picture(12, 40))
    with pytest.raises(ValueError, match=r"small\.png: crop=2 leaves 8 x 36"):
        evaluate_pairs(model, find_pairs(tmp_path, 2), 2)


def test_each_process_takes_every_other_picture(pairs, model):
    class Pretended(Ranks):
        def gather(self, item):
            shares[self.rank] = item
            return shares

    shares = [[{"name": "?"}] * 2] * 2
    for rank in range(2):
        cpu = torch.device("cpu")
        gathered = evaluate_pairs(model, pairs, 2, ranks=Pretended(cpu, rank, 2))
    assert [[score["name"] for score in share] for share in shares] == [["a", "c/d"], ["b"]]
    assert [score["name"] for score in gathered] == ["a", "b", "c/d"]


# --- processes ------------------------------------------------------------------------------------


def test_a_single_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = setup("cpu")
    assert ranks == Ranks(torch.device("cpu"), 0, 1)
    assert ranks.is_main
    assert ranks.gather("x") == ["x"]
    ranks.close()
    assert not torch.distributed.is_initialized()


def test_several_processes_cannot_share_a_named_device(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="cuda:1 cannot be that of 2 processes"):
        setup("cuda:1")


# --- the package ----------------------------------------------------------------------------------


def test_every_public_name_is_there():
    assert set(compsrt.__all__) <= set(dir(compsrt))
    for name in compsrt.__all__:
        assert getattr(compsrt, name) is not None
    assert compsrt.super_resolve is super_resolve
    with pytest.raises(AttributeError, match="no attribute 'upscael'"):
        compsrt.upscael  # noqa: B018
