"""Any network as the ONNX graph of its PyTorch operations, traced by torch.onnx.

float32, (B, C, H, W) to (B, C, scale H, scale W), with free batch, height and width. SESR is traced
on luma alone. Of a quantized network the file computes what the packed model computes: each
quantizer as Sub, Div, Clip, Round, Mul and Add, weights at their levels, but as float32, so that it
is no smaller than the float network's file. A trace of SwinIR-light takes 52 s, of a 4-bit one 164 s
(processor time of one core of an AMD EPYC, torch 2.13).

What a trace with free sizes needs beside the network:

- SwinIR pads to whole windows where a side is no multiple of them. `if` on a free size cannot be
  traced, so `_Padded` pads always, by the same mirror, before the network, which then finds
  nothing to pad: 8 ceil(H/8) is a multiple of 8 whatever H is.
- The quantizer clips just below L + 1/2 by `nextafter`, which ONNX does not have: `_next_below`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import End, ExportedFile, metadata, package

OPSET = 18
OUTPUT = "enlarged"
_FREE = {0: "batch", 2: "height", 3: "width"}


def traced_onnx_file(network: Any) -> ExportedFile:
    """The file of a float or quantized network on the CPU, in float32; it is put in eval mode.

    Raises ValueError where the packages onnx and onnxscript are missing.
    """
    onnx = package("onnx")
    luma_only = getattr(network, "luma_only", False)
    name = "luma" if luma_only else "image"
    channels = 1 if luma_only else getattr(network.config, "in_channels", 3)
    traced = _Padded(network.body if luma_only else network, network.scale, network.window_size)
    # Sizes that are no multiple of a window, all different: a trace keeps apart what differs.
    example = torch.rand(2, channels, 2 * network.window_size + 4, 3 * network.window_size + 5)
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            traced.eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=(_FREE,),
            input_names=[name],
            output_names=[OUTPUT],
            custom_translation_table={torch.ops.aten.nextafter.default: _next_below()},
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    _clear(model)
    _name_output(model, network.scale)
    onnx.helper.set_model_props(model, metadata(network))
    onnx.checker.check_model(model)
    file = io.BytesIO()
    onnx.save(model, file)
    sizes = "batch", channels, f"{network.scale}*height", f"{network.scale}*width"
    return ExportedFile(
        file.getvalue(),
        "float32",
        End(name, "float32", ("batch", channels, "height", "width")),
        End(OUTPUT, "float32", sizes),
    )


class _Padded(nn.Module):
    """A network behind its padding to whole windows by the mirror image, its output cut back."""

    def __init__(self, network: nn.Module, scale: int, window: int):
        super().__init__()
        self.network, self.scale, self.window = network, scale, window

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[2:]
        if self.window == 1:
            return self.network(image)
        x = image
        for dim in (2, 3):
            size = x.shape[dim]
            # Not -(-size // window): ONNX divides integers towards zero.
            i = torch.arange((size + self.window - 1) // self.window * self.window)
            i = torch.remainder(i, torch.full_like(i, 2 * size))
            x = x.index_select(dim, torch.where(i < size, i, 2 * size - 1 - i))
        return self.network(x)[..., : height * self.scale, : width * self.scale]


def _next_below() -> Any:
    """ONNX's form of nextafter(x, anything lower) for x = 2^b - 1/2, which is all that is asked for.

    Below a power of two by less than one part in two, the next float32 is x (1 - 2^-24), rounded.
    """
    op = package("onnxscript").opset18

    def next_below(x, lower):
        return op.Mul(x, op.Constant(value_float=1 - 2.0**-24))

    return next_below


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks about packages and deprecations that concern nobody here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _clear(model: Any) -> None:
    """Take out what the exporter notes about each node: stack traces, with the paths of this machine."""
    del model.metadata_props[:]
    graph = model.graph
    parts = [model.functions, graph.node, graph.input, graph.output, graph.value_info]
    for part in (graph, *(entry for entries in (*parts, graph.initializer) for entry in entries)):
        del part.metadata_props[:]
        part.doc_string = ""
    del graph.value_info[:]


def _name_output(model: Any, scale: int) -> None:
    """Sizes of the output by those of the input, which the trace states as it found them."""
    sizes = [*model.graph.input[0].type.tensor_type.shape.dim]
    free = [place for place, size in enumerate(sizes) if size.dim_param]
    assert free == list(_FREE), f"sizes that the trace has fixed: {model.graph.input[0]}"
    for place in (2, 3):
        side = model.graph.output[0].type.tensor_type.shape.dim[place]
        side.dim_param = f"{scale}*{_FREE[place]}"
