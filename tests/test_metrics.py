"""PSNR and SSIM: the published functions' values, an independent definition, and bad arguments."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compsrt.data import imresize, read_image
from compsrt.metrics import psnr, ssim, y_channel


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def ssim_of_planes(a: np.ndarray, b: np.ndarray) -> float:
    """The definition, window by window."""
    offset = np.arange(11) - 5
    window = np.exp(-(offset[:, None] ** 2 + offset**2) / (2 * 1.5**2))
    window /= window.sum()
    scores = []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
            mean_p, mean_q = (window * p).sum(), (window * q).sum()
            var_p, var_q = (window * (p - mean_p) ** 2).sum(), (window * (q - mean_q) ** 2).sum()
            both = (window * (p - mean_p) * (q - mean_q)).sum()
            scores.append(
                (2 * mean_p * mean_q + 6.5025)
                / (mean_p**2 + mean_q**2 + 6.5025)
                * (2 * both + 58.5225)
                / (var_p + var_q + 58.5225)
            )
    return float(np.mean(scores))


# --- values ---------------------------------------------------------------------------------------


def test_golden(shared: Path) -> None:
    with np.load(shared / "golden/metrics.npz") as golden:
        a, b = golden["a"], golden["b"]
        for crop, db, similarity in zip(
            golden["crop"], golden["psnr_y"], golden["ssim_y"], strict=True
        ):
            assert psnr(a, b, crop=int(crop)) == pytest.approx(float(db), abs=1e-5)
            assert ssim(a, b, crop=int(crop)) == pytest.approx(float(similarity), abs=1e-6)
            # BGR by mistake is far away: the test can tell.
            assert abs(psnr(a[..., ::-1], b[..., ::-1], crop=int(crop)) - float(db)) > 1


@pytest.mark.parametrize(("scale", "expected"), [(2, 33.673), (3, 30.403), (4, 28.429)])
def test_bicubic_enlargement_of_set5(shared: Path, scale: int, expected: float) -> None:
    scores = []
    for path in sorted((shared / "data/Set5/HR").glob("*.png")):
        hr = read_image(path)
        lr = read_image(shared / f"data/Set5/LR_bicubic/X{scale}/{path.stem}x{scale}.png")
        enlarged = imresize(lr, scale)
        scores.append(psnr(enlarged, hr[: len(enlarged), : enlarged.shape[1]], crop=scale))
    assert len(scores) == 5
    assert np.mean(scores) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize(
    ("colour", "luma"),
    [((0, 0, 0), 16), ((255, 255, 255), 235), ((255, 0, 0), 81.481), ((0, 0, 255), 40.966)],
)
def test_luma(colour: tuple[int, int, int], luma: float) -> None:
    y = y_channel(np.full((2, 3, 3), colour, np.uint8))
    assert y.shape == (2, 3)
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, luma, atol=1e-12)


def test_psnr_by_hand() -> None:
    a = np.full((8, 9, 3), 100, np.uint8)
    b = a.copy()
    b[..., 1] += 3
    assert psnr(a, b, crop=1, y_channel=False) == pytest.approx(10 * math.log10(255**2 / 3))
    step = 3 * 128.553 / 255
    assert psnr(a, b, crop=1) == pytest.approx(20 * math.log10(255 / step))


@given(
    height=st.integers(11, 14),
    width=st.integers(11, 15),
    crop=st.integers(0, 3),
    seed=st.integers(0, 99),
    spread=st.integers(1, 128),
)
def test_ssim_is_its_definition(height: int, width: int, crop: int, seed: int, spread: int) -> None:
    a = noise(height + 2 * crop, width + 2 * crop, 3, seed=seed)
    b = np.clip(a.astype(int) + noise(*a.shape, seed=seed + 1) % spread, 0, 255).astype(np.uint8)
    inside = np.s_[crop : crop + height, crop : crop + width]
    luma = ssim_of_planes(y_channel(a)[inside], y_channel(b)[inside])
    assert ssim(a, b, crop=crop) == pytest.approx(luma, abs=1e-9)
    colours = [
        ssim_of_planes(a[inside][..., c].astype(float), b[inside][..., c].astype(float))
        for c in range(3)
    ]
    assert ssim(a, b, crop=crop, y_channel=False) == pytest.approx(np.mean(colours), abs=1e-9)


@pytest.mark.parametrize("luma", [True, False])
def test_identical_and_symmetric(luma: bool) -> None:
    a, b = noise(20, 23, 3), noise(20, 23, 3, seed=1)
    assert psnr(a, a, crop=2, y_channel=luma) == math.inf
    assert ssim(a, a, crop=2, y_channel=luma) == pytest.approx(1)
    assert psnr(a, b, crop=2, y_channel=luma) == psnr(b, a, crop=2, y_channel=luma)
    assert ssim(a, b, crop=2, y_channel=luma) == pytest.approx(ssim(b, a, crop=2, y_channel=luma))


@pytest.mark.parametrize("luma", [True, False])
def test_what_is_cropped_does_not_count(luma: bool) -> None:
    a, b = noise(20, 23, 3), noise(20, 23, 3, seed=1)
    other = 255 - a
    other[3:-3, 3:-3] = a[3:-3, 3:-3]
    for score in (psnr, ssim):
        assert score(a, b, crop=3, y_channel=luma) == score(other, b, crop=3, y_channel=luma)
        assert score(a, b, crop=2, y_channel=luma) != score(other, b, crop=2, y_channel=luma)


def test_views_and_untouched_arguments() -> None:
    a, b = noise(24, 20, 3), noise(24, 20, 3, seed=1)
    before = a.copy(), b.copy()
    view = np.ascontiguousarray(a.transpose(1, 0, 2)).transpose(1, 0, 2)
    assert psnr(view, b, crop=1) == psnr(a, b, crop=1)
    assert ssim(view, b, crop=1) == pytest.approx(ssim(a, b, crop=1), abs=1e-12)
    np.testing.assert_array_equal(a, before[0])
    np.testing.assert_array_equal(b, before[1])


# --- bad arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [psnr, ssim])
def test_bad_arguments(score) -> None:
    a = noise(20, 23, 3)
    with pytest.raises(ValueError, match="a must be uint8, got float64"):
        score(a / 255, a, crop=0)
    with pytest.raises(ValueError, match="b must be uint8"):
        score(a, a.astype(np.int16), crop=0)
    with pytest.raises(ValueError, match=r"a must have the shape \(H, W, 3\), got \(20, 23\)"):
        score(a[..., 0], a, crop=0)
    with pytest.raises(ValueError, match=r"\(20, 23, 3\) and \(20, 22, 3\)"):
        score(a, a[:, 1:], crop=0)
    with pytest.raises(ValueError, match="crop must not be negative"):
        score(a, a, crop=-1)
    with pytest.raises(ValueError, match="crop=10 leaves 0 x 3 of 20 x 23"):
        score(a, a, crop=10)
    with pytest.raises(ValueError, match="image must be uint8"):
        y_channel(a.astype(np.float32))  # pyright: ignore[reportArgumentType]


def test_smallest_pictures() -> None:
    a, b = noise(13, 14, 3), noise(13, 14, 3, seed=1)
    assert math.isfinite(ssim(a, b, crop=1))
    with pytest.raises(ValueError, match="at least 11 x 11"):
        ssim(a, b, crop=2)
    assert math.isfinite(psnr(a, b, crop=6))
