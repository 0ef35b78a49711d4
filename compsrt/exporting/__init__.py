"""Networks as files for other runtimes: TFLite for SESR, ONNX for every network.

    sesr_graph.py    a SESR, float or of 8 bits, as arrays and scales: what both integer formats hold
    tflite.py        of that, a TFLite file
    onnx_integer.py  of that, an ONNX file of QuantizeLinear and DequantizeLinear pairs
    onnx_traced.py   any network, float or quantized, as the ONNX graph of the PyTorch operations

Each takes a loaded network and returns a file's content, so nothing is written before all is well.
The packages that they need are the extra `export`; they are imported when a file is asked for.
"""

from __future__ import annotations

import importlib
import json
from typing import Any, NamedTuple

from torch import nn

from ..quantization import QuantSpec
from ..quantizers import quant_spec


class End(NamedTuple):
    """An input or output of a file. shape: numbers, and names of sizes that are free.

    scale and zero_point: real value = (integer - zero_point) * scale, None without integers. Where
    type is float32, the grid that the file rounds it to.
    """

    name: str
    type: str
    shape: tuple[int | str, ...]
    scale: float | None = None
    zero_point: int | None = None


class ExportedFile(NamedTuple):
    """A file to be written. weights: the type that it holds them as."""

    content: bytes
    weights: str
    input: End
    output: End


def package(name: str) -> Any:
    """A package of the extra, or a module of one. ValueError names the remedy where it is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        top = name.partition(".")[0]
        if (error.name or "").partition(".")[0] != top:
            raise
        raise ValueError(
            f"{top.replace('_', '-')} is not installed; it comes with the extra 'export':"
            ' pip install "compsrt[export]"'
        ) from None


def bits_of(network: nn.Module) -> tuple[int, int] | None:
    """Bits of weights and of activations, None for a float network."""
    spec: QuantSpec | None = quant_spec(network)
    return None if spec is None else (spec.bits_of_weights, spec.bits_of_activations)


def description(network: Any) -> dict[str, Any]:
    """What a file says about itself, of what JSON can hold."""
    bits = bits_of(network)
    return {
        "network": type(network).__name__,
        "scale": network.scale,
        "weight_bits": None if bits is None else bits[0],
        "activation_bits": None if bits is None else bits[1],
        "picture": picture(network),
    }


def picture(network: Any) -> str:
    """What the input and the output of an exported file are."""
    if getattr(network, "luma_only", False):
        return "luma: Y of ITU-R BT.601 in its narrow range, divided by 255 (16/255 to 235/255)"
    channels = getattr(network.config, "in_channels", 3)
    return ("RGB" if channels == 3 else "grey") + " in [0, 1]"


def metadata(network: nn.Module) -> dict[str, str]:
    """`description` under the one key that the files of this package have."""
    return {"compsrt": json.dumps(description(network))}
