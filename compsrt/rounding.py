"""Weights that are rounded for the least error of their layer's output instead of their own.

A quantized layer sees other inputs than the float one did: rounded, and with the errors of all layers
before it. With X (rows, K) the float layer's operand and X^ the quantized one's, W^ and a bias are
chosen to make

    |(X^ - mean X^) W^^T  -  (X - mean X) W^T|^2        bias^ = bias + W mean X - W^ mean X^

small. First without a grid, which is least squares (kept near W by a ridge); then the bounds of the
weight are searched anew, and its columns are rounded one after the other, the columns to come taking
over what each rounding costs: with H = (X^ - mean X^)^T (X^ - mean X^) and U the upper Cholesky
factor of H^-1, rounding column j by e_j changes the columns k > j by -e_j U_jk / U_jj. Layers are
treated in the order in which they run, so each makes up for those before it as well. What is left
behind is a float weight whose nearest codes are the ones found; training goes on from there.

Source of the column rule: GPTQ (Frantar et al., ICLR 2023). The least squares against a float operand
that differs from the quantized one, and the bias, are this package's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .quantization import Quantizer, WeightQuantizer, named_quantizers, observed, round_to_storage

ROWS = 16_384  # of an operand that are looked at: 30 for each column of the widest layer, 540
RIDGE = 0.01  # of the mean square of a column of X^


class _Enough(Exception):
    """All operands that were looked for have been seen."""


@torch.no_grad()
def round_for_outputs(
    model: nn.Module, pictures: Tensor, search: Callable[[Quantizer, Tensor], None]
) -> None:
    """Move the weights and biases of a calibrated model so that their codes serve the outputs.

    pictures: (B, 3, H, W) in [0, 1]. search: sets the bounds of a weight's quantizer for a weight.
    One forward pass to each group of layers that share their input.
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
    for group in groups:
        operands = _operands(model, pictures, group, activations, lambda site, x: site.quantize(x))
        for layer in group:
            _fit(layer, targets.pop(layer), operands[layer], search)
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


def _fit(
    layer: Any, target: Tensor, operand: Tensor, search: Callable[[Quantizer, Tensor], None]
) -> None:
    """Set a layer's float weight, its bounds and its bias. target: X; operand: X^; (N, K) each."""
    site: WeightQuantizer = layer.weight
    assert site.rotated is not None
    bias: Tensor | None = layer.bias
    weight = site.rotated.double()
    x, found = target.double(), operand.double()
    x_mean, mean = (x.mean(0), found.mean(0)) if bias is not None else (0 * x[0], 0 * x[0])
    x, found = x - x_mean, found - mean
    gram = found.mT @ found / len(x)
    ridge = RIDGE * gram.diagonal().mean().clamp_min(1e-12)
    gram.diagonal().add_(ridge)
    moment = found.mT @ (x @ weight.mT) / len(x) + ridge * weight.mT
    best = torch.linalg.solve(gram, moment).mT
    search(site, best.to(site.rotated))
    site.rotated.copy_(_rounded(best, gram, site))
    if bias is not None:
        bias.copy_(bias + weight @ x_mean - site().double() @ mean)


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
