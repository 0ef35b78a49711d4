"""Weights that are rounded for the least error of their layer's output instead of their own.

With X^ (N, K) the operand that a quantized layer gets, centred, the output's error is

    |X^ (W^ - W)^T|^2  =  sum over rows d of W^ - W of  d H d^T        H = X^^T X^

Columns are rounded one after the other, and those to come take over what each rounding costs: with U
the upper Cholesky factor of H^-1, rounding column j by e_j changes the columns k > j by
-e_j U_jk / U_jj. Neighbours that rise and fall together, as pixels under a convolution do, so cancel
each other's errors. The bias makes up for the mean of what is left, and for the mean of the operand's
own error. Layers are treated in the order in which they run, each on what those before it, quantized,
give it. What is left behind is a float weight whose nearest codes are the ones found; training goes
on from there.

On the nano model (rotated, calibrated on 4 to 8 crops of 48x48; PSNR of its picture against the float
network's, 12 other crops of 48x48): 4 bits 47.37 -> 47.46 dB, 3 bits 43.15 -> 43.66, 2 bits 39.71 ->
40.16; 4 bits with 8-bit convolutions 46.87 -> 47.76, with 6-bit ones 47.68, with 5-bit ones 47.10.
Choosing W by least squares of X^ W^T against the float layer's X W^T first was better at 2 bits (40.48)
and worse at 4 (47.10), and is left out.

Source: GPTQ (Frantar et al., ICLR 2023) for the rule; the bias is this package's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .blockwise import Outputs, recorded, skipped
from .quantizers import Quantizer, WeightQuantizer, named_quantizers, observed, round_to_storage

ROWS = 16_384  # of an operand that are looked at: 30 for each column of the widest layer, 540
RIDGE = 0.01  # added to H, in parts of its mean diagonal entry


class _Enough(Exception):
    """All operands that were looked for have been seen."""


@torch.no_grad()
def round_for_outputs(model: nn.Module, pictures: Tensor) -> None:
    """Move the weights and biases of a calibrated model so that their codes serve the outputs.

    pictures: (B, 3, H, W) in [0, 1]. One forward pass to each group of layers that share their input,
    from its block on: the blocks before it are what they will be.
    """
    layers = [m for m in model.modules() if isinstance(getattr(m, "weight", None), WeightQuantizer)]
    every = [site for _, site in named_quantizers(model)]
    activations = [site for site in every if not isinstance(site, WeightQuantizer)]
    targets = _operands(model, pictures, layers, every, lambda site, x: None)
    groups: list[list[Any]] = []
    for layer, x in targets.items():
        if not groups or targets[groups[-1][-1]] is not x:
            groups.append([])
        groups[-1].append(layer)
    outputs: Outputs = {}
    for group in groups:
        with recorded(model, outputs), skipped(dict(outputs)):
            operands = _operands(
                model, pictures, group, activations, lambda site, x: site.quantize(x)
            )
        for layer in group:
            _fit(layer, targets.pop(layer).double().mean(0), operands[layer].double())
    round_to_storage(model)


def _operands(
    model: nn.Module,
    pictures: Tensor,
    layers: list[Any],
    sites: list[Quantizer],
    act: Callable[[Quantizer, Tensor], Tensor | None],
) -> dict[Any, Tensor]:
    """Rows (N, K) of what each layer's weight is multiplied with, in the order of the network.

    act: what the sites do. Rows of layers with the same input are the same tensor.
    """
    owners = {layer.input: layer for layer in layers if hasattr(layer, "input")}
    found: dict[Any, Tensor] = {}
    last: list[tuple[Tensor, Tensor]] = []

    def see(layer: Any, x: Tensor) -> None:
        if not last or last[0][0] is not x:
            last[:] = [(x, _some_rows(layer.operand(x)))]
        found[layer] = last[0][1]
        if len(found) == len(layers):
            raise _Enough

    def observe(site: Quantizer, x: Tensor) -> Tensor | None:
        replaced = act(site, x)
        if site in owners:
            see(owners[site], x if replaced is None else replaced)
        return replaced

    hooks = [
        layer.register_forward_pre_hook(lambda module, inputs: see(module, inputs[0]))
        for layer in layers
        if not hasattr(layer, "input")
    ]
    try:
        with observed(sites, observe):
            model(pictures)
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _some_rows(x: Tensor) -> Tensor:
    """At most ROWS rows of (N, K), always the same ones of one N."""
    if len(x) <= ROWS:
        return x
    generator = torch.Generator().manual_seed(len(x))
    return x[torch.randperm(len(x), generator=generator)[:ROWS].to(x.device)]


def _fit(layer: Any, target_mean: Tensor, operand: Tensor) -> None:
    """Set a layer's float weight and its bias. target_mean: of X, (K,); operand: X^, (N, K)."""
    site: WeightQuantizer = layer.weight
    assert site.rotated is not None
    bias: Tensor | None = layer.bias
    weight = site.rotated.double()
    mean = operand.mean(0)
    centred = operand if bias is None else operand - mean
    gram = centred.mT @ centred / len(operand)
    gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp_min(1e-12))
    site.rotated.copy_(_rounded(weight, gram, site))
    if bias is not None:
        bias.copy_(bias + weight @ target_mean - site().double() @ mean)


def _rounded(weight: Tensor, gram: Tensor, site: WeightQuantizer) -> Tensor:
    """The weight (N, K) whose nearest codes are those of column-wise rounding; float64."""
    factor = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    weight, kept = weight.clone(), site.mask
    for j in range(weight.shape[1]):
        rounded = site.quantize_column(weight[:, j].to(site.lower), j).double()
        if kept is not None:
            rounded = rounded * kept[:, j]
        error = (weight[:, j] - rounded) / factor[j, j]
        weight[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
    return weight
