"""Compressed super-resolution: quantized and pruned networks, trained, packed and run.

    import compsrt
    from PIL import Image

    model = compsrt.load("swinir_x2_4bit.safetensors")
    compsrt.super_resolve(model, Image.open("small.png")).save("large.png")

Importing this package is cheap: its names are imported where they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import (
        calibration,
        checkpoint,
        data,
        inference,
        kernels,
        metrics,
        models,
        pruning,
        quantization,
        transforms,
    )
    from .calibration import quantize
    from .checkpoint import load
    from .counting import count
    from .inference import super_resolve
    from .quantization import QuantSpec

__version__ = "0.1.0"

# name -> the module that defines it; modules are here under their own names
_HOMES = {
    "QuantSpec": "quantization",
    "count": "counting",
    "load": "checkpoint",
    "quantize": "calibration",
    "super_resolve": "inference",
}
_MODULES = (
    "calibration",
    "checkpoint",
    "data",
    "inference",
    "kernels",
    "metrics",
    "models",
    "pruning",
    "quantization",
    "transforms",
)

__all__ = [
    "QuantSpec",
    "__version__",
    "calibration",
    "checkpoint",
    "count",
    "data",
    "inference",
    "kernels",
    "load",
    "metrics",
    "models",
    "pruning",
    "quantization",
    "quantize",
    "super_resolve",
    "transforms",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
