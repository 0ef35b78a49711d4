"""Masks in the rotated domain: which of a quantized model's weights are exactly zero.

The mask of a weight is computed once, from the exact magnitudes of its rotated values, and is
part of the model from then on. Padding has no weights and is never counted.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..quantizers import WeightQuantizer, named_quantizers


def magnitude_mask(weight: Tensor, fraction: float, pattern: str = "unstructured") -> Tensor:
    """Boolean mask (C_out, K) of the weights that stay: the largest in magnitude.

    "unstructured" removes exactly round(fraction * count) of all; "2:4" keeps the two largest of
    every four neighbours of a row. Ties go to the weight that comes first. Raises ValueError for
    a fraction outside [0, 1) and a row length that 2:4 does not divide.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"pruning: {fraction} is not at least 0 and below 1")
    magnitude = weight.detach().abs()
    if pattern == "2:4":
        if weight.shape[-1] % 4:
            raise ValueError(
                f"pruning_pattern: 2:4 needs rows of 4 n weights, not {weight.shape[-1]}"
            )
        order = magnitude.unflatten(-1, (-1, 4)).sort(dim=-1, descending=True, stable=True).indices
        mask = torch.zeros_like(order, dtype=torch.bool)
        return mask.scatter_(-1, order[..., :2], True).flatten(-2)
    if pattern != "unstructured":
        raise ValueError(f"pruning_pattern: {pattern!r} is unknown; one of unstructured, 2:4")
    kept = weight.numel() - round(fraction * weight.numel())
    order = magnitude.flatten().sort(descending=True, stable=True).indices
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[order[:kept]] = True
    return mask.view_as(weight)


def prune(model: nn.Module, fraction: float, pattern: str = "unstructured") -> None:
    """Give every weight site of a quantized model its mask; fraction 0 removes the masks."""
    for name, quantizer in named_quantizers(model):
        if isinstance(quantizer, WeightQuantizer) and quantizer.prunable:
            if quantizer.rotated is None:
                raise ValueError(
                    f"{name}: a packed weight cannot be pruned; start from the float one"
                )
            quantizer.mask = (
                magnitude_mask(quantizer.rotated, fraction, pattern) if fraction else None
            )
