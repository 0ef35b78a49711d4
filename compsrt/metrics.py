"""PSNR and SSIM by one protocol, so that two numbers are comparable whoever computed them.

Both take uint8 RGB pictures of shape (H, W, 3). `crop` pixels are cut off each of the four sides
first (the scale of the super-resolution, because a network knows less at a border). By default both
look at the luma of ITU-R BT.601,

    Y = 16 + (65.481 R + 128.553 G + 24.966 B) / 255,

in float64 and never rounded to 8 bits (some published tables round it, and are not comparable).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.ndimage import correlate1d

__all__ = ["psnr", "ssim", "y_channel"]

PEAK = 255.0
LUMA_OFFSET = 16.0
LUMA_WEIGHTS = np.array([65.481, 128.553, 24.966]) / PEAK

# Wang, Bovik, Sheikh, Simoncelli: Image Quality Assessment: From Error Visibility to Structural
# Similarity (2004).
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_C1 = (0.01 * PEAK) ** 2
SSIM_C2 = (0.03 * PEAK) ** 2


def psnr(
    a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8], *, crop: int, y_channel: bool = True
) -> float:
    """Peak signal-to-noise ratio of two pictures in dB, with peak 255.

    Args:
        a, b: the two pictures, (H, W, 3) uint8 RGB. Their order does not matter.
        crop: pixels ignored along each side, usually the scale.
        y_channel: compare the luma (default), or all three colours together.

    Returns:
        10 log10(255^2 / mean squared error); infinity for identical pictures.

    Raises:
        ValueError: not (H, W, 3) uint8, different sizes, or nothing left inside the crop.
    """
    planes_a, planes_b = _planes(a, b, crop, y_channel, smallest=1)
    error = float(np.mean(np.square(planes_a - planes_b)))
    return 10.0 * math.log10(PEAK**2 / error) if error > 0 else math.inf


def ssim(
    a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8], *, crop: int, y_channel: bool = True
) -> float:
    """Mean structural similarity of two pictures, 1 for identical ones.

    The window is an 11 x 11 Gaussian of sigma 1.5, and only positions where all of it fits into the
    picture count.

    Args:
        a, b: the two pictures, (H, W, 3) uint8 RGB. Their order does not matter.
        crop: pixels ignored along each side, usually the scale.
        y_channel: compare the luma (default), or each of the three colours and take the mean.

    Raises:
        ValueError: not (H, W, 3) uint8, different sizes, or fewer than 11 pixels a side left inside
            the crop.
    """
    planes_a, planes_b = _planes(a, b, crop, y_channel, smallest=SSIM_WINDOW)
    mean_a, mean_b = _window_mean(planes_a), _window_mean(planes_b)
    variance_a = _window_mean(planes_a * planes_a) - mean_a * mean_a
    variance_b = _window_mean(planes_b * planes_b) - mean_b * mean_b
    covariance = _window_mean(planes_a * planes_b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + SSIM_C1) / (mean_a * mean_a + mean_b * mean_b + SSIM_C1)
    structure = (2 * covariance + SSIM_C2) / (variance_a + variance_b + SSIM_C2)
    return float(np.mean(luminance * structure))


def y_channel(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """The luma of an (H, W, 3) uint8 RGB picture: (H, W) float64 between 16 and 235, not rounded.

    Raises:
        ValueError: not (H, W, 3) uint8.
    """
    _check_picture("image", image)
    return LUMA_OFFSET + image @ LUMA_WEIGHTS


def _planes(
    a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8], crop: int, luma: bool, smallest: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Both pictures checked, cropped, and as float64 planes (1 or 3, H', W')."""
    _check_picture("a", a)
    _check_picture("b", b)
    if a.shape != b.shape:
        raise ValueError(f"a and b must have one shape, got {a.shape} and {b.shape}")
    if crop < 0:
        raise ValueError(f"crop must not be negative, got {crop}")
    height, width = a.shape[0] - 2 * crop, a.shape[1] - 2 * crop
    if min(height, width) < smallest:
        raise ValueError(
            f"crop={crop} leaves {max(height, 0)} x {max(width, 0)} "
            f"of {a.shape[0]} x {a.shape[1]} pixels, at least {smallest} x {smallest} are needed"
        )
    inside = np.s_[crop : crop + height, crop : crop + width]
    if luma:
        return y_channel(a[inside])[np.newaxis], y_channel(b[inside])[np.newaxis]
    return (
        np.moveaxis(a[inside], -1, 0).astype(np.float64),
        np.moveaxis(b[inside], -1, 0).astype(np.float64),
    )


def _check_picture(name: str, image: npt.NDArray[np.uint8]) -> None:
    if image.dtype != np.uint8:
        raise ValueError(f"{name} must be uint8, got {image.dtype}")
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"{name} must have the shape (H, W, 3), got {image.shape}")


def _window_mean(planes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Gaussian mean of (planes, H, W) over every window that fits: (planes, H - 10, W - 10)."""
    reach = SSIM_WINDOW // 2
    weights = np.exp(-np.square(np.arange(-reach, reach + 1) / SSIM_SIGMA) / 2)
    weights /= weights.sum()
    rows = correlate1d(planes, weights, axis=1)[:, reach:-reach]
    return correlate1d(rows, weights, axis=2)[:, :, reach:-reach]
