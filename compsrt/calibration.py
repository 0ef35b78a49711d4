"""First bounds of every quantizer from one float forward pass over a calibration set."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from . import kernels, models
from .allocation import allocate
from .kernels.reference import sort_rows
from .pruning import prune
from .quantization import CALIBRATIONS, METHODS, QuantSpec
from .quantizers import (
    Quantizer,
    WeightQuantizer,
    looks_one_sided,
    named_quantizers,
    observed,
    quant_spec,
)
from .rounding import round_for_outputs
from .transform_search import choose_transforms


def search_bounds(
    x: Tensor,
    bits: int,
    *,
    method: str = "dobi",
    one_sided: bool | None = False,
    candidates: int = 100,
    percentile: float = 99.9,
    per_row: bool = False,
) -> tuple[Tensor, Tensor]:
    """Bounds (lower, upper) to quantize x with.

    x: any shape with at least one element. method: "minmax", "percentile" (the given percentile
    and its mirror), or "dobi" (`kernels.search_bounds`: least squared error; one_sided None tries
    both kinds of range). Returns scalars, or with per_row two tensors (R, 1) for x of shape
    (R, ...). Raises ValueError for an empty or non-finite x and unknown methods.
    """
    if method not in CALIBRATIONS:
        raise ValueError(f"method: {method!r} is unknown; one of {', '.join(CALIBRATIONS)}")
    if x.numel() == 0:
        raise ValueError("x: it has no elements to search bounds on")
    rows = x.detach().flatten(1) if per_row else x.detach().reshape(1, -1)
    if method in ("dobi", "dobi-asymmetric"):
        lower, upper, _ = kernels.search_bounds(
            rows, bits, one_sided=one_sided, candidates=candidates, asymmetric=method != "dobi"
        )
    elif method == "minmax":
        lower, upper = rows.aminmax(dim=1)
    else:
        ordered = sort_rows(rows)
        last = rows.shape[1] - 1
        skip = min(round(last * (1 - percentile / 100)), last // 2)
        lower, upper = ordered[:, skip], ordered[:, last - skip]
    if not torch.isfinite(lower + upper).all():
        raise ValueError("x: it holds NaN or infinite values")
    shape = (-1, 1) if per_row else ()
    return lower.reshape(shape), upper.reshape(shape)


class _Observer:
    """Sets the bounds of every quantizer that it is shown an input of."""

    def __init__(self, spec: QuantSpec):
        self.spec = spec
        self.method = spec.calibration or METHODS[spec.method].calibration
        self.last: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def __call__(self, quantizer: Quantizer, x: Tensor) -> None:
        # q, k and v quantize one tensor with one rule: search it once.
        if self.last is not None and self.last[0] is x:
            quantizer.set_bounds(*self.last[1])
            return
        searched = quantizer.searched(x)
        per_row = quantizer.lower.dim() > 0
        if quantizer.lower.dim() == 3:  # (heads, 1, 1), of x (..., heads, tokens, channels)
            searched = searched.movedim(-3, 0)
        if isinstance(quantizer, WeightQuantizer) and quantizer.mask is not None:
            if per_row:
                kept = quantizer.rows(quantizer.mask)
                # A pruned weight is no level of its row: replace it by one that is kept.
                some = searched.gather(1, kept.int().argmax(1, keepdim=True))
                searched = torch.where(kept, searched, some)
            else:
                searched = searched[: len(quantizer.mask)][quantizer.mask]
        one_sided = None if self.spec.one_sided == "auto" and looks_one_sided(searched) else False
        try:
            lower, upper = search_bounds(
                searched,
                quantizer.bits,
                method=self.method,
                one_sided=one_sided,
                percentile=self.spec.percentile,
                per_row=per_row,
            )
        except ValueError as error:
            raise ValueError(f"calibration of {quantizer.site}: {error}") from None
        # A bound exactly on a value that occurs often (the first coefficient of every softmax row
        # is 1/sqrt(N)) would leave it to rounding noise which of them are clipped.
        margin = 1e-6 * (upper - lower)
        bounds = lower - margin, upper + margin
        quantizer.set_bounds(*bounds)
        if not isinstance(quantizer, WeightQuantizer):
            self.last = x, bounds


def _check_pictures(pictures: Tensor) -> None:
    found = type(pictures).__name__
    if isinstance(pictures, Tensor):
        if pictures.dim() == 4 and pictures.numel() and pictures.is_floating_point():
            return
        found = f"a {str(pictures.dtype)[6:]} tensor of shape {tuple(pictures.shape)}"
    raise ValueError(
        f"pictures: {found}; give a floating-point tensor (B, C, H, W) of at least one picture"
    )


@torch.no_grad()
def calibrate(model: nn.Module, pictures: Tensor) -> None:
    """Set the bounds of all quantizers of a quantized model, by its method's rule.

    pictures: (B, 3, H, W) in [0, 1]. One forward pass shows every site the input it has in the
    float network; the whole set counts as one tensor. alpha and beta start at 0. Raises ValueError
    for a float model and pictures of another form.
    """
    spec = quant_spec(model)
    if spec is None:
        raise ValueError("model: it is a float model; compsrt.quantize makes a quantized one of it")
    _check_pictures(pictures)
    observer = _Observer(spec)
    with observed((site for _, site in named_quantizers(model)), observer):
        model(pictures)
    if spec.rounding == "output":
        round_for_outputs(model, pictures)


def quantize(model: nn.Module, spec: QuantSpec, pictures: Tensor | None = None) -> nn.Module:
    """A quantized copy of a float model: blocks swapped, pruned, and calibrated on `pictures`.

    pictures: (B, 3, H, W) in [0, 1], the calibration set; without it, call `calibrate` before use
    (until then every output is NaN). The public name of this is `compsrt.quantize`. Raises ValueError
    for pictures of another form.
    """
    if pictures is not None:
        _check_pictures(pictures)
    # What is searched first is searched on the plain form: equal bits, nearest codes.
    plain = {"average_bits": None, "rounding": "nearest"}
    if spec.transform == "auto":
        if pictures is None:
            raise ValueError('transform: "auto" is chosen on pictures; give a calibration set')

        def trial(candidate: QuantSpec) -> nn.Module:
            return quantize(model, dataclasses.replace(candidate, **plain), pictures)

        spec = choose_transforms(trial, model, spec, pictures)
    if spec.average_bits is not None and not spec.site_bits:
        if pictures is None:
            raise ValueError("average_bits: it needs pictures to tell which sites matter")
        equal = dataclasses.replace(spec, **plain)
        spec = allocate(quantize(model, equal, pictures), spec, pictures)
    quantized = models.quantized(model, spec)
    if spec.pruning:
        prune(quantized, spec.pruning, spec.pruning_pattern)
    if pictures is not None:
        calibrate(quantized, pictures)
    return quantized
