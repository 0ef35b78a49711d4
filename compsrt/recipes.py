"""Named configurations: what `python -m compsrt.train --recipe NAME` sets unless an option says otherwise."""

from __future__ import annotations

import dataclasses
from typing import Any

from .models.edsr import EDSRConfig
from .models.sesr import SIZES, SESRConfig
from .models.swinir import SwinIRConfig
from .quantization import TRAINED_KINDS


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Defaults for the options of the train command. None leaves the command's own default.

    architecture: of a network trained from scratch (method "float").
    """

    summary: str
    method: tuple[str, ...] = ("compsrt",)
    architecture: Any = None
    bits: tuple[int, ...] | None = None
    steps: int | None = None
    batch: int | None = None
    patch: tuple[int, ...] | None = None
    learning_rate: float | None = None
    weight_learning_rate: float | None = None
    train_weights: tuple[str, ...] | None = None
    per_channel: bool | None = None
    per_head: bool | None = None
    transform: str | None = None
    average_bits: tuple[float, ...] | None = None
    convolution_bits: int | None = None
    calibration: str | None = None
    rounding: str | None = None
    feature_weight: float | None = None
    picture_weight: float | None = None
    average: float | None = None
    target: str | None = None
    warmup: int | None = None
    validate_every: int | None = None
    save_every: int | None = None
    ratio: tuple[str, ...] | None = None
    skip_layers: tuple[str, ...] | None = None
    penalty_growth: str | None = None
    penalty_start: float | None = None
    penalty_step: float | None = None
    penalty_every: int | None = None
    penalty_limit: float | None = None
    stabilize: int | None = None
    prune_learning_rate: float | None = None
    finetune_steps: int | None = None
    finetune_learning_rate: float | None = None

    def options(self) -> dict:
        """The options that the recipe sets, by their names in the command."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("summary", "architecture"):
            del fields[name]
        plain = {key: list(v) if isinstance(v, tuple) else v for key, v in fields.items()}
        return {key: value for key, value in plain.items() if value is not None}


def _light(scale: int) -> Recipe:
    return Recipe(
        f"SwinIR-light x{scale} from scratch (or from another scale: --weights), on a GPU",
        method=("float",),
        architecture=SwinIRConfig(scale=scale),
        steps=200_000,
        batch=32,
        patch=(32, 48, 64),
        learning_rate=1e-3,
        warmup=1000,
        validate_every=2000,
        save_every=500,
    )


def _sesr(size: str, scale: int) -> Recipe:
    blocks, features = SIZES[size]
    return Recipe(
        f"SESR-{size.upper()} x{scale} from scratch"
        + (", or better from x2: --weights" if scale == 4 else "")
        + ", about an hour on one CPU core",
        method=("float",),
        architecture=SESRConfig(scale=scale, blocks=blocks, features=features),
        steps=80_000 if scale == 2 else 20_000,
        batch=16,
        patch=(32, 48) if scale == 2 else (32,),
        learning_rate=2e-3,
        warmup=500,
        validate_every=1000,
        save_every=1000,
    )


def _srpn_lite(scale: int) -> Recipe:
    return Recipe(
        f"SRPN-Lite x{scale}: 16 blocks, 256 channels cut to 45, penalty as published; on a GPU",
        method=("srp",),
        architecture=EDSRConfig(scale=scale),
        steps=300_000,
        batch=16,
        patch=(48,),
        learning_rate=2e-4,
        warmup=1000,
        validate_every=2000,
        save_every=1000,
        ratio=("*:0.82421875",),
        skip_layers=("tail*",),
        finetune_steps=300_000,
        finetune_learning_rate=2e-4,
    )


def _srpn_mini(method: tuple[str, ...], channels: int) -> Recipe:
    """The published penalty grows 100 times longer; this one does it geometrically (see srp.py)."""
    srp = method == ("srp",)
    return Recipe(
        "SRP on a CPU: 8 blocks, 32 channels cut to 16"
        if srp
        else "the network that it leaves, from scratch, for comparison",
        method=method,
        architecture=EDSRConfig.uniform(2, blocks=8, channels=channels),
        steps=10_000 if srp else 20_000,
        batch=8,
        patch=(32,),
        learning_rate=1e-3,
        warmup=200,
        validate_every=500,
        save_every=200,
        ratio=("*:0.5",),
        skip_layers=("tail*",),
        penalty_growth="geometric",
        penalty_start=1e-3,
        penalty_step=0.0167,
        penalty_every=6,
        penalty_limit=4.0,
        stabilize=994,
        prune_learning_rate=5e-4,
        finetune_steps=6000,
        finetune_learning_rate=1e-3,
    )


RECIPES = {
    "swinir-nano-x2": Recipe(
        "the network of the demo from scratch: 2 layers of 2 blocks, 80 minutes on 2 CPU cores",
        method=("float",),
        architecture=SwinIRConfig(scale=2, depths=(2, 2), num_heads=(6, 6), mlp_hidden=(120, 120)),
        steps=18_000,
        batch=8,
        patch=(32,),
        learning_rate=1.2e-3,
        warmup=300,
        validate_every=500,
        save_every=200,
    ),
    **{f"swinir-light-x{scale}": _light(scale) for scale in (2, 3, 4)},
    **{f"sesr-{size}-x{scale}": _sesr(size, scale) for size in SIZES for scale in (2, 4)},
    "srpn-mini-x2": _srpn_mini(("srp",), 32),
    "srpn-mini-scratch-x2": _srpn_mini(("float",), 16),
    **{f"srpn-lite-x{scale}": _srpn_lite(scale) for scale in (2, 3, 4)},
    "sesr-qat": Recipe(
        "SESR weights (--weights) at 8, 6 and 4 bits, trained on; 3 minutes each on a CPU core",
        method=("qat",),
        bits=(8, 6, 4),
        steps=2500,
        batch=4,
        patch=(32,),
        learning_rate=0.05,
        weight_learning_rate=1e-3,
        target="float",
        warmup=100,
        validate_every=250,
        save_every=250,
    ),
    "compsrt-best": Recipe(
        "mixed bits, rounded for outputs, all trained, 6-bit convolutions; 10 minutes a CPU core",
        bits=(4, 3, 2),
        average_bits=(4.0, 3.0, 2.0),
        calibration="dobi-asymmetric",
        rounding="output",
        convolution_bits=6,
        steps=600,
        batch=4,
        patch=(32,),
        learning_rate=0.03,
        weight_learning_rate=8e-3,
        average=0.99,
        warmup=30,
        train_weights=TRAINED_KINDS,
        validate_every=100,
        save_every=100,
    ),
    "dqc": Recipe(
        "DOBI, 2DQuant and CompSRT at 4, 3 and 2 bits on the given weights, in one table",
        method=("dobi", "2dquant", "compsrt"),
        bits=(4, 3, 2),
    ),
}
