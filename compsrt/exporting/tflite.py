"""A SESR as a TFLite file: full int8 with the learned scales from 8 bits, float32 from a float network.

Luma in, luma out, (1, H, W, 1) to (1, scale H, scale W, 1); H and W are written into the file, and
the interpreter's `resize_tensor_input` changes them. Operators:

    CONV_2D and PRELU (or RELU), once a layer   ADD (the long residual)   CONV_2D
    ADD (the picture, to each of the scale^2 channels)   DEPTH_TO_SPACE

In int8 every tensor is int8 but the biases, which are int32, and every scale is the network's own.
Only PReLU slopes, which the network keeps real, are rounded here: 8 bits, one scale a layer.

The flat buffer is written directly, with the schema that the runtime package brings along. A
converter was tried first: litert-torch 0.10 on a network of explicit quantize and dequantize ops.
With its PT2E configuration it does carry learned scales, but splits PReLU into RELU, MUL and SUB,
which then run in float32 between DEQUANTIZE and QUANTIZE, so that not every tensor is int8; it turns
the pixel shuffle into six transpositions and reshapes; and it brings 55 packages (jax, torchao,
transformers, ...) where a dozen operators need one. Formats: TFLite schema 3, and the specification
of 8-bit quantization (ai.google.dev/edge/litert/conversion/tensorflow/quantization/quantization_spec).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..models.sesr import SESR
from . import End, ExportedFile, metadata, package
from .sesr_graph import Affine, Convolution, Layer, graph_of

INPUT, OUTPUT = "luma", "enlarged"
SIGNATURE = "serving_default"  # what runtimes look for
LARGEST = 2**31 - 1  # elements of a tensor: runtimes count them in an int32


def tflite_file(network: SESR, height: int, width: int) -> ExportedFile:
    """The file for pictures of height x width pixels.

    network: narrow, float or quantized to 8 bits. Raises ValueError for other networks and bits, for
    sides below 1 or too large for a tensor of LARGEST elements, and where the package ai-edge-litert is
    missing.
    """
    if not isinstance(network, SESR):
        raise ValueError(
            f"model: {type(network).__name__} has no TFLite form, only SESR has; every network"
            " has an ONNX form"
        )
    if min(height, width) < 1:
        raise ValueError(f"height and width: {height} x {width}; both must be at least 1")
    graph = graph_of(network)
    channels = max(graph.scale**2, *(len(layer.convolution.bias) for layer in graph.layers))
    if height * width * channels > LARGEST:
        raise ValueError(
            f"height and width: {height} x {width} pixels of {channels} channels are more than the"
            f" {LARGEST} elements of a tensor; give at most {LARGEST // channels} pixels"
        )
    writer = _Writer(network, height, width)
    sides = height, width
    picture = writer.tensor(INPUT, (1, *sides, 1), graph.picture)
    y = first = picture
    for number, layer in enumerate(graph.layers):
        y = writer.layer(f"layer{number}", y, layer)
        first = y if number == 0 else first
    y = writer.sum("long", y, first, graph.long)
    y = writer.convolution("last", y, graph.last)
    y = writer.sum("residual", y, picture, graph.enlarged)
    enlarged = writer.shuffle(OUTPUT, y, graph.scale, graph.enlarged)
    content = writer.finish(picture, enlarged)
    kind = "float32" if graph.picture is None else "int8"
    factor = graph.scale
    shapes = (1, height, width, 1), (1, height * factor, width * factor, 1)
    return ExportedFile(
        content,
        kind,
        End(INPUT, kind, shapes[0], *_plain(graph.picture)),
        End(OUTPUT, kind, shapes[1], *_plain(graph.enlarged)),
    )


def _plain(affine: Affine | None) -> tuple[float | None, int | None]:
    return (None, None) if affine is None else (float(affine.scale), affine.zero_point)


class _Writer:
    """Tensors are numbers (their place in the file); an operator's method returns its output's."""

    def __init__(self, network: SESR, height: int, width: int):
        self.schema = package("ai_edge_litert.schema_py_generated")
        self.sides = height, width
        self.subgraph = self.schema.SubGraphT()
        self.subgraph.name = "main"
        self.subgraph.tensors, self.subgraph.operators = [], []
        self.model = self.schema.ModelT()
        self.model.version = 3
        self.model.buffers, self.model.operatorCodes = [], []
        self.model.metadata = []
        self._buffer(b"")  # the one of all tensors without data
        texts = metadata(network)
        self.model.description = "; ".join(f"{key} {text}" for key, text in texts.items())
        for name, text in texts.items():
            entry = self.schema.MetadataT()
            entry.name, entry.buffer = name, self._buffer(text.encode())
            self.model.metadata.append(entry)

    # --- Operators ---

    def layer(self, name: str, x: int, layer: Layer) -> int:
        """A convolution and its activation."""
        channels = len(layer.convolution.bias)
        y = self.convolution(name, x, layer.convolution)
        output = self._picture(f"{name}/activated", channels, layer.output)
        if layer.slopes is None:
            version = 1 if layer.output is None else 2
            return self._operator("RELU", version, [y], output)
        values, affine = layer.slopes, None
        if layer.output is not None:
            values, affine = _rounded(layer.slopes)
        # As many axes as the picture has without its batch.
        slopes = self.tensor(f"{name}/slopes", (1, 1, channels), affine, values)
        return self._operator("PRELU", 1, [y, slopes], output)

    def convolution(self, name: str, x: int, convolution: Convolution) -> int:
        weight, bias = convolution.weight, convolution.bias
        channels = len(bias)
        scales = convolution.weight_scale, convolution.bias_scale
        kernel = weight.transpose(0, 2, 3, 1)  # (C_out, k, k, C_in)
        inputs = [
            x,
            self.tensor(f"{name}/weight", kernel.shape, scales[0], kernel),
            self.tensor(f"{name}/bias", bias.shape, scales[1], bias),
        ]
        options = self.schema.Conv2DOptionsT()
        options.padding = self.schema.Padding.SAME
        options.strideH = options.strideW = 1
        version = 1 if convolution.output is None else 3
        output = self._picture(f"{name}/products", channels, convolution.output)
        return self._operator("CONV_2D", version, inputs, output, options)

    def sum(self, name: str, x: int, y: int, affine: Affine | None) -> int:
        """x + y, y of as many channels or of one."""
        output = self._picture(name, int(self.subgraph.tensors[x].shape[-1]), affine)
        options = self.schema.AddOptionsT()
        return self._operator("ADD", 1 if affine is None else 2, [x, y], output, options)

    def shuffle(self, name: str, x: int, scale: int, affine: Affine | None) -> int:
        height, width = self.sides
        output = self.tensor(name, (1, height * scale, width * scale, 1), affine)
        options = self.schema.DepthToSpaceOptionsT()
        options.blockSize = scale
        return self._operator("DEPTH_TO_SPACE", 1, [x], output, options)

    # --- Parts of the file ---

    def _picture(self, name: str, channels: int, affine: Affine | None) -> int:
        return self.tensor(name, (1, *self.sides, channels), affine)

    def tensor(
        self,
        name: str,
        shape: tuple[int, ...],
        scale: Affine | np.ndarray | None = None,
        values: np.ndarray | None = None,
    ) -> int:
        """scale: an array has one a channel, along the first axis, with all zero points 0."""
        tensor = self.schema.TensorT()
        tensor.name, tensor.shape, tensor.buffer = name, list(shape), 0
        real = scale is None
        kind = np.dtype(np.float32 if real else np.int8) if values is None else values.dtype
        tensor.type = getattr(self.schema.TensorType, kind.name.upper())
        if values is not None:
            little = values.astype(kind.newbyteorder("<"))
            tensor.buffer = self._buffer(little.tobytes())
        if not real:
            quantization = self.schema.QuantizationParametersT()
            if isinstance(scale, Affine):
                quantization.scale = [float(scale.scale)]
                quantization.zeroPoint = [scale.zero_point]
            else:
                quantization.scale = scale.tolist()
                quantization.zeroPoint = [0] * len(scale)
            tensor.quantization = quantization
        self.subgraph.tensors.append(tensor)
        return len(self.subgraph.tensors) - 1

    def _buffer(self, data: bytes) -> int:
        buffer = self.schema.BufferT()
        buffer.data = np.frombuffer(data, np.uint8) if data else None
        self.model.buffers.append(buffer)
        return len(self.model.buffers) - 1

    def _operator(
        self, name: str, version: int, inputs: list[int], output: int, options: Any = None
    ) -> int:
        """version: the oldest of the operator that takes these types, as runtimes count them."""
        code = getattr(self.schema.BuiltinOperator, name)
        codes = self.model.operatorCodes
        known = [entry.builtinCode for entry in codes]
        if code not in known:
            entry = self.schema.OperatorCodeT()
            entry.builtinCode = entry.deprecatedBuiltinCode = code
            entry.version = version
            codes.append(entry)
            known.append(code)
        operator = self.schema.OperatorT()
        operator.opcodeIndex = known.index(code)
        operator.inputs, operator.outputs = inputs, [output]
        if options is not None:
            kind = type(options).__name__.removesuffix("T")
            operator.builtinOptionsType = getattr(self.schema.BuiltinOptions, kind)
            operator.builtinOptions = options
        self.subgraph.operators.append(operator)
        return output

    def finish(self, picture: int, enlarged: int) -> bytes:
        self.subgraph.inputs, self.subgraph.outputs = [picture], [enlarged]
        self.model.subgraphs = [self.subgraph]
        signature = self.schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = SIGNATURE, 0
        signature.inputs = [self._named(INPUT, picture)]
        signature.outputs = [self._named(OUTPUT, enlarged)]
        self.model.signatureDefs = [signature]
        builder = package("flatbuffers").Builder(1024)
        builder.Finish(self.model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _named(self, name: str, tensor: int) -> Any:
        entry = self.schema.TensorMapT()
        entry.name, entry.tensorIndex = name, tensor
        return entry


def _rounded(slopes: np.ndarray) -> tuple[np.ndarray, Affine]:
    """Slopes as int8 with one scale, 0 among the levels."""
    lower, upper = min(slopes.min(), 0.0), max(slopes.max(), 0.0)
    scale = np.float32((upper - lower) / 255 or 1.0)
    zero_point = round(-lower / scale) - 128
    codes = np.clip(np.rint(slopes / scale) + zero_point, -128, 127).astype(np.int8)
    return codes, Affine(scale, zero_point)
