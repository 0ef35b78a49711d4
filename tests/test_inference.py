"""Pictures of any size, mode and tiling through a model, and the scores of a test set."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import compsrt
from compsrt import tiling
from compsrt.checkpoint import load
from compsrt.data import Pair, find_pairs, imresize, read_image, to_image, to_tensor, write_image
from compsrt.distributed import Ranks, setup
from compsrt.inference import _under_transparency, enlarge, evaluate_pairs, super_resolve
from compsrt.metrics import psnr
from compsrt.models.swinir import SwinIR, SwinIRConfig
from compsrt.tiling import Tiled

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


def assert_tiles_agree(model, lr: np.ndarray, *, least: float) -> None:
    """Tiles of at most 48 agree with the whole picture within `least` dB, and there is no step
    along their borders: between no two columns or rows does the mean difference grow by more than
    a fifth of what it varies by in the whole picture."""
    whole, tiled = enlarge(model, lr), enlarge(model, lr, 48)
    assert psnr(tiled, whole, crop=0, y_channel=False) >= least
    for axis in (0, 1):
        before, after = (
            np.abs(np.diff(image.astype(float), axis=axis)).mean((1 - axis, 2))
            for image in (whole, tiled)
        )
        grown = np.abs(after - before).max() / before.std()
        assert grown < 0.2, f"a step that is {grown:.2f} of the variation elsewhere"


@pytest.fixture(scope="module")
def butterfly(shared) -> np.ndarray:
    return read_image(shared / "data/Set5/LR_bicubic/X2/butterflyx2.png")[20:100, 20:100]


@pytest.fixture(scope="module")
def nano(shared) -> nn.Module:
    return load(shared / "assets/swinir_nano_x2.safetensors")


def test_tiles_leave_no_seams(nano, butterfly):
    assert_tiles_agree(nano, butterfly, least=60)


def test_tiles_leave_no_seams_in_a_low_bit_model(nano, butterfly):
    spec = compsrt.QuantSpec(bits=4, method="minmax")
    model = compsrt.quantize(nano, spec, to_tensor(butterfly[:64, :64]))
    assert_tiles_agree(model, butterfly, least=45)


def test_tiles_leave_no_seams_in_sesr(butterfly):
    assets = Path(compsrt.__file__).parent / "assets"
    assert_tiles_agree(load(assets / "sesr_m5_x2.safetensors"), butterfly, least=60)


def test_tiles_without_overlap_would_leave_seams(butterfly, monkeypatch):
    """What the tests above look for is there to be found."""
    model = load(Path(compsrt.__file__).parent / "assets/sesr_m5_x2.safetensors")
    monkeypatch.setattr(tiling, "OVERLAP", 1)
    with pytest.raises(AssertionError, match="a step"):
        assert_tiles_agree(model, butterfly, least=0)


@given(windows=st.integers(1, 40), window=st.sampled_from([1, 4, 8, 16]), tiles=st.integers(2, 9))
def test_spans_are_equal_overlap_and_begin_at_windows(windows, window, tiles):
    size, overlap = windows * window, tiling.round_up(tiling.OVERLAP, window)
    tile = max(tiles * window, 2 * overlap)
    spans = tiling._spans(size, tile, overlap, window, 2)
    assert (spans[0].begin, spans[-1].end) == (0, size)
    assert len({span.end - span.begin for span in spans}) == 1
    assert spans[0].end <= tile
    assert all(span.begin % window == 0 for span in spans)
    total = torch.zeros(2 * size)
    for before, span in pairwise(spans):
        assert before.end - span.begin >= overlap
    for span in spans:
        total[2 * span.begin : 2 * span.end] += span.weights
    torch.testing.assert_close(total, torch.ones(2 * size))


def test_batches_of_tiles_are_equal_and_moved_a_few_at_a_time(model):
    shapes = []

    class Watched(Repeat):
        def forward(self, x):
            shapes.append(tuple(x.shape))
            return super().forward(x)

    lr = picture(70, 101)
    seen = []
    run = Tiled(Watched(), 48, batch=4)
    assert np.array_equal(to_image(run(to_tensor(lr), seen.append)), enlarge(Repeat(), lr))
    assert shapes == [(4, 3, 48, 48), (2, 3, 48, 48)]
    assert sum(seen) == 9 * 70 * 101


def test_the_self_ensemble_is_the_mean_of_eight_positions(model):
    lr = picture(12, 20)
    positions = [lr, lr[::-1], lr[:, ::-1], lr[::-1, ::-1]]
    positions += [image.swapaxes(0, 1) for image in positions]
    outputs = []
    with torch.no_grad():
        for number, image in enumerate(positions):
            y = model(to_tensor(np.ascontiguousarray(image)))
            y = y.mT if number >= 4 else y
            flips = [axis for axis, bit in ((2, 1), (3, 2)) if number % 4 & bit]
            outputs.append(y.flip(flips))
    expected = to_image(torch.stack(outputs).mean(0))
    result = enlarge(model, lr, self_ensemble=True)
    assert abs(result.astype(int) - expected).max() <= 1
    # Turning the picture turns the result.
    turned = enlarge(model, np.ascontiguousarray(np.rot90(lr)), self_ensemble=True)
    assert abs(np.rot90(result).astype(int) - turned).max() <= 1


def test_only_a_lack_of_memory_makes_tiles_smaller():
    class Wrong(Repeat):
        def forward(self, x):
            raise RuntimeError("The size of tensor a must match")

    with pytest.raises(RuntimeError, match="size of tensor"):
        enlarge(Wrong(), picture(90, 90), 80)


def test_memory_of_this_machine_is_known():
    assert 1 << 20 < tiling.free_memory(torch.device("cpu")) < 1 << 50


@pytest.mark.parametrize("has_sysconf", [True, False], ids=["macOS", "Windows"])
def test_other_systems_say_less_of_their_memory(has_sysconf, monkeypatch):
    monkeypatch.setattr(tiling, "_free_memory_of_linux", lambda: iter(()))
    if not has_sysconf:
        monkeypatch.delattr(tiling.os, "sysconf")
    assert 1 << 28 < tiling.free_memory(torch.device("cpu")) < 1 << 50


def test_tiles_too_small_to_overlap_are_refused(model):
    with pytest.raises(ValueError, match="tile: 25 pixels are fewer than 32"):
        enlarge(model, picture(8, 8), 25)


@pytest.mark.parametrize("tile", [64.0, "64", (64, 64)])
def test_a_tile_is_a_whole_number(tile, model):
    with pytest.raises(ValueError, match=r"tile: .* is neither 'auto' nor a number of pixels"):
        super_resolve(model, RGB, tile=tile)


@pytest.mark.parametrize("image", ["photo.jpg", Path("photo.jpg"), picture(8, 8)])
def test_what_is_no_pil_picture_is_named(image, model):
    message = rf"^image: '{type(image).__name__}' is not a PIL picture; open it with PIL.Image.open"
    with pytest.raises(TypeError, match=message):
        super_resolve(model, image)


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
    colours = np.asarray(image.convert("RGB"))
    if mode.endswith("A"):
        colours = _under_transparency(colours, np.asarray(image.convert("RGBA"))[:, :, 3])
    expected = enlarge(model, colours)
    if mode[0] == "R":
        assert np.array_equal(np.asarray(result.convert("RGB")), expected)
    else:
        grey = np.asarray(Image.fromarray(expected).convert("L")).astype(int)
        # Grey is made before rounding here and after it there.
        assert abs(np.asarray(result.convert("L")) - grey).max() <= 1


def test_transparency_is_enlarged_bicubically(model):
    image = RGB.copy()
    alpha = picture(10, 13)[:, :, 0]
    image.putalpha(Image.fromarray(alpha))
    result = super_resolve(model, image, tile=32)
    assert np.array_equal(np.asarray(result.getchannel("A")), imresize(alpha, 2))


def test_16_bits_are_kept_and_floats_refused(model):
    grey = picture(9, 9)[:, :, 0]
    result = super_resolve(model, Image.fromarray(grey.astype(np.uint16) * 257))
    assert result.mode == "I;16"
    expected = np.asarray(super_resolve(model, Image.fromarray(grey)))
    assert abs(np.asarray(result) / 257 - expected).max() <= 0.51
    assert (np.asarray(result) % 257).any()
    with pytest.raises(ValueError, match="floating-point"):
        super_resolve(model, Image.new("F", (8, 8)))


def test_what_nobody_sees_does_not_bleed_into_the_edge(model):
    colours = np.full((16, 16, 3), 200, np.uint8)
    alpha = np.zeros((16, 16), np.uint8)
    alpha[:, 8:] = 255
    images = []
    for hidden in (0, 200):
        colours[:, :8] = hidden
        image = Image.fromarray(colours)
        image.putalpha(Image.fromarray(alpha))
        images.append(np.asarray(super_resolve(model, image)))
    assert np.array_equal(*images)


def test_a_turned_picture_is_upright_and_keeps_its_profile(model):
    image = RGB.copy()
    image.getexif()[0x0112] = 6
    image.info["icc_profile"] = b"profile"
    result = super_resolve(model, image)
    assert result.size == (20, 26)
    assert result.info["icc_profile"] == b"profile"


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
