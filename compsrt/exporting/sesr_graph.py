"""A SESR as numpy arrays: what a file format of convolutions, PReLU and sums has to hold.

Of a quantized network everything is an integer, with the learned scales as they are:

    weights      int8, symmetric, a scale s_w for each output channel
    biases       int32 in units of s_x s_w, s_x the scale of what the convolution reads
    activations  (q - z) s, q an integer from -128 to 127, z one of them, a scale for each tensor
    PReLU        slopes stay real: a format that has to round them does so itself

The picture is added to each of the scale^2 channels before they become pixels. PyTorch shuffles
pixels by 2, for x4 twice; the order of channels for one shuffle by `scale`, where channel y * scale
+ x is the pixel (y, x) of its block, is found by shuffling the channels' numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from ..models.quant_sesr import QuantConv2d, QuantSESRBody
from ..models.sesr import SESR
from ..quantizers import AffineQuantizer
from . import bits_of

BITS = (8, 8)  # of weights and activations: the only integers that files of this kind have
LARGEST_BIAS = 2**30  # half of what an int32 holds: sums of products need a little room above it


class Affine(NamedTuple):
    """Real values (q - zero_point) * scale of int8 numbers q."""

    scale: np.float32
    zero_point: int


class Convolution(NamedTuple):
    """Stride 1, sides kept, zeros around; output: its integers, None where values are real.

    weight: (C_out, C_in, k, k), int8 or float32; bias: (C_out,), int32 or float32; weight_scale:
    (C_out,) float32, bias_scale: the same, in real numbers one unit of bias.
    """

    weight: np.ndarray
    bias: np.ndarray
    weight_scale: np.ndarray | None
    bias_scale: np.ndarray | None
    output: Affine | None


class Layer(NamedTuple):
    """A convolution and its activation: PReLU with slopes (C_out,), or ReLU (None)."""

    convolution: Convolution
    slopes: np.ndarray | None
    output: Affine | None


class SESRGraph(NamedTuple):
    """y = layers[0](picture); y + layers[n](... layers[1](y)) = long; last(long) + picture; pixels."""

    scale: int
    picture: Affine | None
    layers: tuple[Layer, ...]
    long: Affine | None
    last: Convolution
    enlarged: Affine | None


@torch.no_grad()
def graph_of(network: SESR) -> SESRGraph:
    """The arrays of a narrow SESR, float or quantized to 8 bits throughout.

    Raises ValueError for other bits and for a network of wide blocks.
    """
    bits = bits_of(network)
    if bits not in (None, BITS):
        raise ValueError(
            f"model: {bits[0]}-bit weights and {bits[1]}-bit activations; integer kernels take 8"
            " bits of both: quantize it with python -m compsrt.train --method qat --bits 8"
        )
    body: Any = network.body
    order = _order_of_channels(body)
    if isinstance(body, QuantSESRBody):
        return _integers(body, order)
    if not all(isinstance(block, torch.nn.Conv2d) for block in body.blocks):
        raise ValueError("model: its blocks are wide; export network.collapsed()")
    convolutions = [_real(convolution) for convolution in (body.first, *body.blocks)]
    last = _real(body.last)
    return SESRGraph(
        scale=network.scale,
        picture=None,
        layers=tuple(
            Layer(convolution, _slopes(activation), None)
            for convolution, activation in zip(convolutions, body.activations, strict=True)
        ),
        long=None,
        last=last._replace(weight=last.weight[order], bias=last.bias[order]),
        enlarged=None,
    )


def _order_of_channels(body: Any) -> np.ndarray:
    """For each pixel of a block, row by row, the channel that PyTorch's shuffles put there."""
    numbers = torch.arange(body.config.scale**2, dtype=torch.float32)
    return body.shuffle(numbers.view(1, -1, 1, 1)).flatten().long().numpy()


def _real(convolution: torch.nn.Conv2d) -> Convolution:
    assert convolution.bias is not None
    return Convolution(_array(convolution.weight), _array(convolution.bias), None, None, None)


def _slopes(activation: torch.nn.Module) -> np.ndarray | None:
    return _array(activation.weight) if isinstance(activation, torch.nn.PReLU) else None


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().float().numpy()


# --- Integers ------------------------------------------------------------------------------------


def _integers(body: Any, order: np.ndarray) -> SESRGraph:
    picture = _affine(body.image)
    x, layers = picture, []
    parts = zip(body.convolutions, body.sums, body.activations, body.activated, strict=True)
    for convolution, products, activation, activated in parts:
        layer = Layer(
            _convolution(convolution, x, products), _slopes(activation), _affine(activated)
        )
        layers.append(layer)
        x = _affine(activated)
    long = _affine(body.long)
    return SESRGraph(
        scale=body.config.scale,
        picture=picture,
        layers=tuple(layers),
        long=long,
        last=_convolution(body.last, long, body.last_sum, order),
        enlarged=_affine(body.output),
    )


def _affine(quantizer: AffineQuantizer) -> Affine:
    """The grid of a quantizer, whose lower bound is the level -128."""
    grid = quantizer.grid()
    step = quantizer.step
    code_of_zero = int((-grid.lower / step).round())
    assert grid.bits == 8 and 0 <= code_of_zero <= 255
    return Affine(np.float32(step.item()), code_of_zero - 128)


def _convolution(
    convolution: QuantConv2d,
    x: Affine,
    products: AffineQuantizer,
    order: np.ndarray | slice = slice(None),
) -> Convolution:
    """A quantized convolution that reads x, its output channels in the given order."""
    quantizer = convolution.weight
    # Codes count from 0 at the lower bound -upper; pruned weights have code 0 but are 0.
    codes = quantizer.to_integers().cpu().numpy().astype(np.int64) - 127
    if quantizer.mask is not None:
        codes *= quantizer.mask.cpu().numpy()
    scale = quantizer.step.flatten().cpu().double().numpy()
    bias = convolution.bias.detach().cpu().double().numpy()
    # A channel of weights near zero beside a large bias: coarser units, where the bias fits. What
    # the weights lose is less than the products of all of them, which are far below the bias.
    excess = np.abs(bias) / (x.scale * scale) / LARGEST_BIAS
    coarser = 2.0 ** np.ceil(np.log2(np.maximum(excess, 1)))
    codes, scale = np.rint(codes / coarser[:, None]), scale * coarser
    weight_scale = scale.astype(np.float32)
    bias_scale = x.scale * weight_scale
    weight = codes.astype(np.int8).reshape(-1, *convolution.shape)
    whole = np.rint(bias / bias_scale.astype(np.float64)).astype(np.int32)
    return Convolution(
        weight[order], whole[order], weight_scale[order], bias_scale[order], _affine(products)
    )
