"""The demo's material: the shipped float model and the photographs of scikit-image's wheel."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from . import inference
from .data import Pair, load_pair
from .images import Picture, imresize
from .quantizers import quant_spec

WEIGHTS = Path(__file__).parent / "assets" / "swinir_nano_x2.safetensors"
METHODS = ("dobi", "2dquant", "compsrt")
BITS = (4, 3, 2)
RECIPE = "compsrt-best"  # its rows are the last
# Small enough for minutes on two cores.
OPTIONS = {
    "output": Path("runs/demo"),
    "steps": 100,
    "calibration_count": 16,
    "validation_count": 3,
    "validation_crops": 12,
    "validate_every": 25,
}
# Of the recipe's hundreds of steps the demo takes a few.
RECIPE_OPTIONS = {"steps": 60, "warmup": 6, "average": 0.95, "validate_every": 30}
TRAINING = (
    "astronaut.png",
    "rocket.jpg",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "camera.png",
    "grass.png",
    "gravel.png",
    "brick.png",
    "coins.png",
    "moon.png",
    "ihc.png",
    "retina.jpg",
)
TEST = ("coffee.png", "chelsea.png")


def _photographs(names: tuple[str, ...]) -> list[Pair]:
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ValueError(
            "the demo's photographs are those of scikit-image, which is not installed:"
            " pip install 'compsrt[demo]', or give --train and --test"
        )
    folder = Path(spec.origin).parent / "data"
    found = [folder / name for name in names if (folder / name).exists()]
    if len(found) < min(len(names), 6):
        raise ValueError(f"{folder}: scikit-image's photographs are not there")
    return [Pair(path.stem, path, None) for path in found]


def training_pairs() -> list[Pair]:
    """Photographs to calibrate and distil on."""
    return _photographs(TRAINING)


def test_pairs() -> list[Pair]:
    """Two photographs that nothing is learned from."""
    return _photographs(TEST)


def side_by_side(
    model: Any,
    packed: dict[str, nn.Module],
    sets: dict[str, list[Pair]],
    path: Path,
) -> Path | None:
    """Bicubic, float, 4 and 2 bits and the original of the first test picture, with a crop enlarged.

    packed: the quantized models by name; of those without pruning the last of the most and of the
    fewest bits are shown. Returns the path, or None, and says
    so, where matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed (pip install 'compsrt[demo]')")
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    from . import metrics

    pair = next(iter(sets.values()))[0]
    scale = model.scale
    lr, hr = load_pair(pair, scale)
    panels: list[tuple[str, Picture]] = [
        ("bicubic", imresize(lr, scale)),
        ("float, 32 bits", inference.enlarge(model, lr)),
    ]
    last: dict[int, tuple[str, nn.Module]] = {}
    for name, quantized in packed.items():
        spec = quant_spec(quantized)
        assert spec is not None
        if not spec.pruning:
            last[spec.bits] = name, quantized
    for bits in dict.fromkeys((max(last), min(last))) if last else ():
        name, quantized = last[bits]
        panels.append((name, inference.enlarge(quantized, lr)))
    panels.append(("original", hr))
    top, left, side = _busiest(hr, 96)
    figure = Figure(figsize=(2.6 * len(panels), 5.1), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(panels), height_ratios=(hr.shape[0] / hr.shape[1], 1))
    for (title, image), whole, crop in zip(panels, *axes, strict=True):
        if title != "original":
            title += f"\n{metrics.psnr(image, hr, crop=scale):.2f} dB"
        whole.set_title(title, fontsize=10)
        whole.imshow(image)
        whole.add_patch(Rectangle((left, top), side, side, fill=False, color="yellow", lw=1))
        crop.imshow(image[top : top + side, left : left + side], interpolation="nearest")
        for axis in (whole, crop):
            axis.set_axis_off()
    figure.savefig(path)
    return path


def _busiest(image: Picture, side: int) -> tuple[int, int, int]:
    """Top, left and side of the square crop with the most detail."""
    grey = image.astype(np.float64).mean(-1)
    detail = np.abs(np.diff(grey, axis=0))[:, :-1] + np.abs(np.diff(grey, axis=1))[:-1]
    side = min(side, *detail.shape)
    sums = np.pad(detail, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    boxes = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    top, left = np.unravel_index(int(boxes.argmax()), boxes.shape)
    return int(top), int(left), side
