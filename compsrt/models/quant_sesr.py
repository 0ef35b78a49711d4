"""SESR in integers: every tensor that a device would hold in 8 bits or fewer is quantized.

Weights are symmetric, a scale for each output channel. Activations are asymmetric with 0 among their
levels, a scale for each tensor: the picture, the output of every convolution, of every PReLU and of
both sums, and the enlarged picture. What enters a convolution has `spec` bits; what does not (the
sums of products before a PReLU, the last convolution's output, pictures) has 8, or more bits would be
lost there than any multiplier saves. The two pictures have the fixed range [0, 1], and the last
convolution's output has their step, 1/255, from -128 to 127 of it: so its sum with the picture is a
whole number of steps and is not rounded again.

One scale a tensor serves its widest channel best. So `equalized` first gives the float network, whose
output stays what it was, channels of one range.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quantization import METHODS, QuantSpec
from ..quantizers import (
    AffineQuantizer,
    SymmetricWeightQuantizer,
    named_quantizers,
    round_to_storage,
)
from . import sesr

PICTURE_BITS = 8  # of pictures, and of what no convolution reads


class QuantConv2d(nn.Module):
    """A convolution, stride 1 and sides kept, with quantized weights (as (C_out, C_in k k))."""

    bias: nn.Parameter

    def __init__(self, convolution: nn.Conv2d, spec: QuantSpec, bits: int | None = None):
        super().__init__()
        kernel = convolution.weight.detach()
        self.shape = kernel.shape[1:]
        self.weight = SymmetricWeightQuantizer(
            kernel.flatten(1).clone(), bits or spec.bits_of_weights, spec
        )
        assert convolution.bias is not None
        self.bias = nn.Parameter(
            convolution.bias.detach().clone(), requires_grad=METHODS[spec.method].weights
        )

    def operand(self, x: Tensor) -> Tensor:
        """What the weight is multiplied with, as rows (N, C_in k k). x: (B, C_in, H, W)."""
        side = self.shape[-1]
        return F.unfold(x, side, padding=side // 2).mT.flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight().unflatten(1, self.shape)
        return F.conv2d(x, kernel, self.bias, padding=kernel.shape[-1] // 2)


class QuantSESRBody(nn.Module):
    """A `SESRBody` with its quantizers, on luma: (B, 1, H, W) -> (B, 1, scale H, scale W)."""

    def __init__(self, body: sesr.SESRBody, spec: QuantSpec):
        super().__init__()
        self.config = body.config
        inner, bits = PICTURE_BITS, spec.bits_of_activations
        count = body.config.blocks + 1
        self.image = AffineQuantizer(inner, spec, fixed=(0.0, 1.0))
        convolutions: list[Any] = [body.first, *body.blocks]
        self.convolutions = nn.ModuleList(QuantConv2d(c, spec) for c in convolutions)
        self.sums = nn.ModuleList(AffineQuantizer(inner, spec) for _ in range(count))
        self.activations = copy.deepcopy(body.activations)
        self.activations.requires_grad_(METHODS[spec.method].weights)
        self.activated = nn.ModuleList(AffineQuantizer(bits, spec) for _ in range(count))
        self.long = AffineQuantizer(bits, spec)
        self.last = QuantConv2d(body.last, spec)
        self.last_sum = AffineQuantizer(inner, spec, fixed=(-128 / 255, 127 / 255))
        self.output = AffineQuantizer(inner, spec, fixed=(0.0, 1.0))
        self.shuffle = body.shuffle

    def forward(self, x: Tensor) -> Tensor:
        x = self.image(x)
        y, first = x, x
        layers = zip(self.convolutions, self.sums, self.activations, self.activated, strict=True)
        for i, (convolution, products, activation, activated) in enumerate(layers):
            y = activated(activation(products(convolution(y))))
            first = y if i == 0 else first
        y = self.last_sum(self.last(self.long(y + first)))
        return self.shuffle(self.output(y + x))


# Of a channel's inputs to its PReLU on the calibration set, the share that may be above 0 where it
# counts as always below, and what its range counts as at least beside the widest channel's.
SELDOM, LEAST_RANGE = 1e-3, 1 / 64


@torch.no_grad()
def equalized(model: sesr.SESR, pictures: Tensor) -> sesr.SESR:
    """A float copy that computes the same on `pictures` (B, 3, H, W), its channels of one range.

    PReLU commutes with positive factors: a channel's weights and bias are multiplied by one, and the
    weights that read it divided. The long residual adds the first layer's output to the last block's,
    so these two share their factors. Where the inputs of a PReLU are always negative, it is a factor
    alone, often a small one: it moves into the weights, which shrinks the sums before it (on the
    shipped M5 x2 that is true of 17 of 96 channels, and halves the error that rounding these sums makes).
    """
    model = copy.deepcopy(model)
    body: Any = model.body
    layers = [body.first, *body.blocks]
    y, ranges = sesr.luma(pictures), []
    first = y
    for i, (convolution, activation) in enumerate(zip(layers, body.activations, strict=True)):
        sums = convolution(y).transpose(0, 1).flatten(1)  # (C_out, pixels)
        if isinstance(activation, nn.PReLU):
            linear = (sums > 0).float().mean(1) <= SELDOM
            factors = torch.where(linear, activation.weight, 1.0)
            _scale_outputs(convolution, factors)
            activation.weight[linear] = 1.0
            sums = sums * factors[:, None]
        ranges.append(_relative_range(sums))
        y = activation(convolution(y))
        first = y if i == 0 else first
    long = _relative_range((y + first).transpose(0, 1).flatten(1))
    ranges[0] = ranges[-1] = torch.maximum(long, torch.maximum(ranges[0], ranges[-1]))
    for convolution, after, channels in zip(layers, [*layers[1:], body.last], ranges, strict=True):
        _scale_outputs(convolution, 1 / channels)
        after.weight.mul_(channels[:, None, None])
    return model


def _relative_range(x: Tensor) -> Tensor:
    """The largest absolute value of every row, over that of all."""
    largest = x.abs().amax(1)
    return (largest / largest.max()).clamp_min(LEAST_RANGE)


def _scale_outputs(convolution: nn.Conv2d, factors: Tensor) -> None:
    assert convolution.bias is not None
    convolution.weight.mul_(factors[:, None, None, None])
    convolution.bias.mul_(factors)


def swap_body(model: sesr.SESR, spec: QuantSpec) -> nn.Module:
    """A copy of a float SESR with its body in the quantized form, not calibrated; it has `.spec`.

    All that stays float is rounded to spec.storage. Raises ValueError for a method or a transform
    that this network has no use for.
    """
    learned = METHODS[spec.method].learn
    if "alpha" in learned or spec.transform not in (None, "none") or spec.site_transforms:
        fit = [name for name, method in METHODS.items() if "alpha" not in method.learn]
        raise ValueError(
            f"method: {spec.method!r} rotates or shifts its codes, which SESR's integer"
            f" convolutions cannot; use one of {', '.join(fit)}, without a transform"
        )
    if spec.codes != "clamped":
        raise ValueError("codes: SESR's integers are clamped; unclamped codes are for SwinIR")
    model = copy.deepcopy(model).requires_grad_(False)
    quantized: Any = model
    quantized.body = QuantSESRBody(model.body, spec)
    first = next(model.parameters())
    for name, quantizer in named_quantizers(model):
        quantizer.to(first.device, first.dtype).site = name
        quantizer.bits = spec.bits_of(name, quantizer.bits)
    quantized.spec = spec
    round_to_storage(model)
    return model
