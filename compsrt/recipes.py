"""Named configurations: what `python -m compsrt.train --recipe NAME` sets unless an option says otherwise."""

from __future__ import annotations

import dataclasses

from .models.swinir import SwinIRConfig


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Defaults for the options of the train command. None leaves the command's own default.

    architecture: of a network trained from scratch (method "float").
    """

    summary: str
    method: tuple[str, ...] = ("compsrt",)
    architecture: SwinIRConfig | None = None
    bits: tuple[int, ...] | None = None
    steps: int | None = None
    batch: int | None = None
    patch: tuple[int, ...] | None = None
    learning_rate: float | None = None
    warmup: int | None = None
    validate_every: int | None = None
    save_every: int | None = None

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
    "dqc": Recipe(
        "DOBI, 2DQuant and CompSRT at 4, 3 and 2 bits on the given weights, in one table",
        method=("dobi", "2dquant", "compsrt"),
        bits=(4, 3, 2),
    ),
}
