"""Bits of every site under a budget: what matters more for the picture gets more of them.

Sensitivity: with one site quantized at the reference bits and all others float, the picture's mean
squared difference from the float network's is measured, one forward pass a site, from its block on; at
b bits it is taken to change as the least squared error of the site's tensor does, which `search_bounds`
gives exactly.

Budget: the least sum of these differences whose mean number of bits is at most the average asked for,
an exact dynamic program over whole numbers of bits. The mean is counted twice: weights, by their
number; activations, by the multiply-adds that they enter, so that what a multiplier saves on one
layer can be spent on another. Both averages are met exactly wherever the sizes of the layers allow
it, and never exceeded. Convolutions and position tables, where they are quantized, have a budget of
their own, with the average spec.convolution_bits.

On the nano model at 3 bits on average, calibrated only, rotated, sensitivity from 2 crops of 48x48:
the picture is 52.9 dB from the float network's where equal bits leave 46.0 (6 held-out crops), and
Set5's butterfly has 32.74 dB for 31.17 (float 32.92). The first layer's blocks get 3 to 6 bits, those
of the last 1 to 3. So an average is no b-bit network in the papers' sense, and must be called an average.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import kernels
from .blockwise import Outputs, recorded, skipped
from .quantization import QuantSpec
from .quantizers import Quantizer, WeightQuantizer, looks_one_sided, named_quantizers, observed

CHOICES = tuple(range(1, 9))
ENTRIES = 1 << 17  # of a tensor that its errors are computed from
PIXELS = 8192  # of pictures that sensitivity is measured on, one forward pass a site


def spend(errors: np.ndarray, sizes: Sequence[int], average: float) -> list[int]:
    """The choice of bits with the least sum of errors under a budget, exactly.

    errors: (sites, 8), of each site at 1 to 8 bits; sizes: how much one bit of each costs; average:
    the most that sum(sizes bits) / sum(sizes) may be, 1 to 8. Of equal sums the cheapest. Raises
    ValueError for an average that even one bit everywhere exceeds.
    """
    unit = int(np.gcd.reduce(np.asarray(sizes, dtype=np.int64)))
    costs = [size // unit for size in sizes]
    budget = int(average * sum(costs) + 1e-9)
    if budget < sum(costs):
        raise ValueError(f"average_bits: {average} is below 1")
    # best[c]: the least sum of errors of the sites so far that cost exactly c.
    best = np.full(budget + 1, np.inf)
    best[0] = 0
    chosen = []
    for row, cost in zip(np.asarray(errors, dtype=np.float64), costs, strict=True):
        options = np.full((len(CHOICES), budget + 1), np.inf)
        for option, bits in enumerate(CHOICES):
            spent = bits * cost
            if spent <= budget:
                options[option, spent:] = best[: budget + 1 - spent] + row[option]
        chosen.append(options.argmin(0))
        best = options.min(0)
    at, bits = int(best.argmin()), []
    for choice, cost in zip(reversed(chosen), reversed(costs), strict=True):
        bits.append(CHOICES[choice[at]])
        at -= bits[-1] * cost
    return bits[::-1]


@torch.no_grad()
def allocate(model: nn.Module, spec: QuantSpec, pictures: Tensor) -> QuantSpec:
    """The spec with `site_bits` for its `average_bits`.

    model: a quantized, calibrated model by this spec, whose bits are the reference. pictures: (B, 3,
    H, W) in [0, 1]. Sites that are in no budget (convolutions, all but the weights of SESR) keep
    the spec's bits.
    """
    assert spec.average_bits is not None
    sites = dict(named_quantizers(model))
    every = {n: s for n, s in sites.items() if isinstance(s, WeightQuantizer)}
    weights = {n: s for n, s in every.items() if s.prunable}
    activations = {n: s for n, s in sites.items() if s.products}
    budgets: list[tuple[dict[str, Any], float]] = [
        (weights, spec.average_bits),
        (activations, spec.average_bits),
    ]
    if spec.convolution_bits is not None:
        budgets.append(
            ({n: s for n, s in every.items() if n not in weights}, spec.convolution_bits)
        )
    some = pictures[: max(1, PIXELS // pictures[0, 0].numel())]
    wanted = {name: site for group, _ in budgets for name, site in group.items()}
    errors, sizes = _errors(model, sites, wanted, some)
    found = []
    for group, average in budgets:
        if group:
            bits = spend(np.stack([errors[n] for n in group]), [sizes[n] for n in group], average)
            found += zip(group, bits, strict=True)
    return dataclasses.replace(spec, site_bits=(*spec.site_bits, *found))


def _errors(
    model: nn.Module, sites: dict[str, Quantizer], wanted: dict[str, Quantizer], pictures: Tensor
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The picture's error at 1 to 8 bits, and the cost of a bit, of each wanted site."""
    local: dict[Quantizer, np.ndarray] = {}
    sizes: dict[Quantizer, int] = {}
    outputs: Outputs = {}
    before: dict[Quantizer, Outputs] = {}  # what has run when a site is met
    named = set(wanted.values())

    def look(site: Quantizer, x: Tensor) -> None:
        if site in named:
            weight = isinstance(site, WeightQuantizer)
            sizes[site] = x.numel() * (1 if weight else site.products)
            local[site] = _local_errors(site, x)
            before[site] = dict(outputs)

    def only(this: Quantizer) -> Any:
        return lambda site, x: site.quantize(x) if site is this else None

    with observed(sites.values(), look), recorded(model, outputs):
        target = model(pictures)
    errors = {}
    for name, site in wanted.items():
        with observed(sites.values(), only(site)), skipped(before[site]):
            error = float((model(pictures) - target).square().mean())
        reference = max(local[site][site.bits - 1], 1e-30)
        errors[name] = error * local[site] / reference
    return errors, {name: sizes[site] for name, site in wanted.items()}


def _local_errors(site: Quantizer, x: Tensor) -> np.ndarray:
    """Least squared errors (8,) of a tensor at 1 to 8 bits."""
    rows = site.rows(x) if isinstance(site, WeightQuantizer) else x.reshape(1, -1)
    rows = rows if site.lower.dim() else rows.reshape(1, -1)
    if rows.shape[1] > ENTRIES:
        generator = torch.Generator().manual_seed(0)
        rows = rows[:, torch.randint(rows.shape[1], (ENTRIES,), generator=generator).to(x.device)]
    one_sided = None if looks_one_sided(rows) else False
    return np.array(
        [float(kernels.search_bounds(rows, b, one_sided=one_sided)[2].sum()) for b in CHOICES]
    )
