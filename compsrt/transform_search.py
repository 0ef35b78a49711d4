"""`transform="auto"`: for every block and group of sites the transform of least output error.

Every candidate is put everywhere, pruned and calibrated as the model itself will be. Then one group
of one block at a time quantizes its operands while everything else stays float, and the squared
difference of the block's output from the float one is what the candidate costs there.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from .models.quant_swinir import QuantSwinBlock
from .models.swinir import SwinIR
from .quantization import TRANSFORM_GROUPS, QuantSpec
from .quantizers import Quantizer, WeightQuantizer, named_quantizers, observed

CANDIDATES = ("none", "hadamard", "block-hadamard", "dct")
PICTURES = 4  # of the calibration set, that errors are measured on


def group_of(site: str) -> str:
    """One of TRANSFORM_GROUPS, from the name of a site within its block."""
    first = site.partition(".")[0]
    return {"q": "qkv", "k": "qkv", "v": "qkv", "query": "query_key", "key": "query_key"}.get(
        first, first
    )


@torch.no_grad()
def choose_transforms(
    calibrated: Any, model: nn.Module, spec: QuantSpec, pictures: Tensor
) -> QuantSpec:
    """spec with its "auto" replaced by what serves each group of each block best.

    calibrated: (QuantSpec) -> quantized, pruned and calibrated model. The transform that most groups
    chose becomes spec.transform, the others site_transforms, before those that spec already has.
    """
    if not isinstance(model, SwinIR):
        raise ValueError('transform: "auto" is for networks with Swin blocks')
    kept = _outputs(model, pictures[:PICTURES])
    errors: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for candidate in CANDIDATES:
        trial = calibrated(dataclasses.replace(spec, transform=candidate))
        blocks = {n: m for n, m in trial.named_modules() if isinstance(m, QuantSwinBlock)}
        for name, block in blocks.items():
            x, y = kept[name]
            for group in TRANSFORM_GROUPS:
                ours = _with_one_group(block, group, x)
                errors[name, group][candidate] = float((ours - y).double().square().sum())
    chosen = {place: min(costs, key=costs.__getitem__) for place, costs in errors.items()}
    common = Counter(chosen.values()).most_common(1)[0][0]
    exceptions = [(f"{block}.{g}", t) for (block, g), t in chosen.items() if t != common]
    for group in TRANSFORM_GROUPS:  # said once where all blocks agree
        of_group = {t for (_, g), t in chosen.items() if g == group}
        if len(of_group) == 1 and of_group != {common}:
            exceptions = [(p, t) for p, t in exceptions if not p.endswith(f".{group}")]
            exceptions.append((group, of_group.pop()))
    sites = (*exceptions, *spec.site_transforms)
    return dataclasses.replace(spec, transform=common, site_transforms=sites)


def _outputs(model: SwinIR, pictures: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of every block of a float network, by the block's name."""
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    hooks: list[Any] = []
    for name, _, _, block in model.named_blocks():

        def keep(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
            kept[name] = inputs[0], output

        hooks.append(block.register_forward_hook(keep))
    try:
        model(pictures)
    finally:
        for hook in hooks:
            hook.remove()
    return kept


def _pass(quantizer: Quantizer, x: Tensor) -> None:
    """An observer that looks away: the site hands on its input as it is."""


def _with_one_group(block: QuantSwinBlock, group: str, x: Tensor) -> Tensor:
    """The output of a block in which the sites of one group alone quantize and prune."""
    others = [site for name, site in named_quantizers(block) if group_of(name) != group]
    masks = [site.mask if isinstance(site, WeightQuantizer) else None for site in others]
    try:
        for site in others:
            if isinstance(site, WeightQuantizer):
                site.mask = None
        with observed(others, _pass):
            return block.observed(x)
    finally:
        for site, mask in zip(others, masks, strict=True):
            if isinstance(site, WeightQuantizer):
                site.mask = mask
