"""A SESR of 8 bits as an ONNX file of QuantizeLinear and DequantizeLinear pairs (QDQ).

Luma in [0, 1] in and out, float32, (B, 1, H, W) to (B, 1, scale H, scale W), all three sizes free.
Every tensor passes a pair with its learned scale, weights are stored as int8 with a scale a channel
and biases as int32, so a runtime replaces DequantizeLinear - Conv - QuantizeLinear by one integer
kernel. PReLU slopes stay real, as in the network. Activations are uint8: the numbers of the TFLite
file and 128.

onnxruntime multiplies uint8 by int8 on an x86 processor without VNNI by an instruction that adds
pairs in 16 bits, which saturate; there `session.x64quantprecision` of its session has to be "1".

Sources: ONNX, QuantizeLinear and DequantizeLinear; onnxruntime, "Quantize ONNX models". Written with
onnx.helper, because tracing PyTorch would spell out what a pair does.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..models.sesr import SESR
from . import End, ExportedFile, metadata, package
from .sesr_graph import Affine, Convolution, Layer, graph_of

OPSET = 18
IR_VERSION = 10  # of ONNX 1.16: any later runtime reads it
INPUT, OUTPUT = "luma", "enlarged"
SIZES = ("batch", 1, "height", "width")


def integer_onnx_file(network: SESR) -> ExportedFile:
    """The file of a SESR with 8-bit weights and activations.

    Raises ValueError for a float network and other bits, and where the package onnx is missing.
    """
    onnx = package("onnx")
    graph = graph_of(network)
    if graph.picture is None:
        raise ValueError("model: it is a float model and has no integers; trace it instead")
    writer = _Writer()
    picture = writer.pair("picture", INPUT, graph.picture)
    y = first = picture
    for number, layer in enumerate(graph.layers):
        y = writer.layer(f"layer{number}", y, layer)
        first = y if number == 0 else first
    y = writer.pair("long", writer.node("Add", [y, first], "long/sum"), graph.long)
    y = writer.convolution("last", y, graph.last)
    y = writer.pair("residual", writer.node("Add", [y, picture], "residual/sum"), graph.enlarged)
    writer.node("DepthToSpace", [y], OUTPUT, blocksize=graph.scale)
    model = writer.finish(graph.scale)
    onnx.helper.set_model_props(model, metadata(network))
    onnx.checker.check_model(model, full_check=True)
    return ExportedFile(
        model.SerializeToString(),
        "int8",
        End(INPUT, "float32", SIZES, *_plain(graph.picture)),
        End(OUTPUT, "float32", enlarged_sizes(graph.scale), *_plain(graph.enlarged)),
    )


def _plain(affine: Affine | None) -> tuple[float, int]:
    assert affine is not None
    return float(affine.scale), affine.zero_point + 128


def enlarged_sizes(scale: int) -> tuple[int | str, ...]:
    return ("batch", 1, f"{scale}*height", f"{scale}*width")


class _Writer:
    """Tensors are names; what adds nodes returns the name of their output."""

    def __init__(self):
        self.onnx = package("onnx")
        self.nodes, self.constants = [], []

    def layer(self, name: str, x: str, layer: Layer) -> str:
        """A convolution and its activation."""
        y = self.convolution(name, x, layer.convolution)
        if layer.slopes is None:
            y = self.node("Relu", [y], f"{name}/relu")
        else:
            slopes = self.constant(f"{name}/slopes", layer.slopes[:, None, None])
            y = self.node("PRelu", [y, slopes], f"{name}/prelu")
        return self.pair(f"{name}/activated", y, layer.output)

    def convolution(self, name: str, x: str, convolution: Convolution) -> str:
        weight, bias, weight_scale, bias_scale, output = convolution
        inputs = [
            x,
            self.dequantized(f"{name}/weight", weight, weight_scale),
            self.dequantized(f"{name}/bias", bias, bias_scale),
        ]
        border = weight.shape[-1] // 2
        y = self.node("Conv", inputs, f"{name}/convolved", pads=[border] * 4)
        return self.pair(f"{name}/products", y, output)

    def pair(self, name: str, x: str, affine: Affine | None) -> str:
        """x as the levels of a scale."""
        assert affine is not None
        grid = [
            self.constant(f"{name}/scale", affine.scale),
            self.constant(f"{name}/zero_point", np.uint8(affine.zero_point + 128)),
        ]
        integers = self.node("QuantizeLinear", [x, *grid], f"{name}/integers")
        return self.node("DequantizeLinear", [integers, *grid], name)

    def dequantized(self, name: str, integers: np.ndarray, scale: np.ndarray | None) -> str:
        """Integers with one scale for each entry of the first axis, 0 for 0."""
        assert scale is not None
        inputs = [
            self.constant(f"{name}/integers", integers),
            self.constant(f"{name}/scale", scale),
            self.constant(f"{name}/zero_point", np.zeros(len(scale), integers.dtype)),
        ]
        return self.node("DequantizeLinear", inputs, name, axis=0)

    def constant(self, name: str, value: np.ndarray | np.generic) -> str:
        self.constants.append(self.onnx.numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, kind: str, inputs: list[str], name: str, **options: object) -> str:
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [name], name=name, **options))
        return name

    def finish(self, scale: int) -> Any:
        """The model: one picture in, one out."""
        helper, real = self.onnx.helper, self.onnx.TensorProto.FLOAT
        inputs, outputs = (
            [helper.make_tensor_value_info(name, real, sizes)]
            for name, sizes in ((INPUT, SIZES), (OUTPUT, enlarged_sizes(scale)))
        )
        graph = helper.make_graph(self.nodes, "SESR", inputs, outputs, self.constants)
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="compsrt",
        )
