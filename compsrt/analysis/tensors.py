"""What a quantizer sees: the operands of a float model, before and after a transform.

One float forward pass shows every quantization site its operand (`Quantizer.observer`); a
transform is one matrix on the last axis, so everything after it follows from the rows before it.
Memory stays bounded because of each tensor only a number of whole rows is kept, drawn at random
with a seed; whole rows, so that "before" and "after" are the same tokens. Only the two extremes are
taken over all values, since those of a sample would be too small, and more so for heavier tails.

The q, k and v projections quantize one and the same tensor. It is one tensor here, not three:
counted thrice it would make every test look surer than it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from compsrt import models
from compsrt.models.swinir import SwinIR
from compsrt.quantization import QuantSpec
from compsrt.quantizers import Quantizer, WeightQuantizer, named_quantizers, observed
from compsrt.transforms import next_power_of_two, transform_matrix

VALUES = 200_000

Floats = npt.NDArray[np.float64]
Ends = tuple[float, float]

# Rows rotated at a time when the extremes are looked for: a few MB whatever the tensor.
_ROWS_AT_ONCE = 65_536


@dataclass(frozen=True)
class TensorPair:
    """One tensor before (R, size) and after (R, order) a transform, the same R rows of both.

    kind: "weight" or "activation". role: the site without its block, "fc1.weight". ends: least and
    greatest value of the whole tensor. count, count_after: values of the whole tensor, without
    padding. padding: zeros that the published code has in `after` besides, because it pads every
    axis to a power of two; rows of such zeros stay zeros under the transform.
    """

    site: str
    kind: str
    role: str
    transform: str
    before: Floats
    after: Floats
    before_ends: Ends
    after_ends: Ends
    count: int
    count_after: int
    padding: int = 0


@dataclass(frozen=True)
class Operand:
    """A sampled tensor as it reaches its quantizer in the float model.

    shape: of the whole tensor (..., size). rows: the rows kept (R, size), float32. ends: the
    extremes of the whole tensor by transform, "none" among them, where they were looked for.
    """

    site: str
    kind: str
    role: str
    shape: tuple[int, ...]
    rows: Tensor
    ends: Mapping[str, Ends] = field(default_factory=dict)

    def pair(self, transform: str, seed: int = 0) -> TensorPair:
        """The tensor before and after a transform; seed is that of the transform "random".

        Extremes are the whole tensor's if both are known, else those of the rows.
        """
        before = self.rows.double()
        matrix = transform_matrix(transform, self.shape[-1], seed)
        after = before if matrix is None else before @ matrix
        known = {"none", transform} <= set(self.ends)
        leading, order = math.prod(self.shape[:-1]), after.shape[-1]
        published = math.prod(next_power_of_two(n) for n in self.shape[:-1])
        return TensorPair(
            site=self.site,
            kind=self.kind,
            role=self.role,
            transform=transform,
            before=before.numpy(),
            after=after.numpy(),
            before_ends=self.ends["none"] if known else ends_of(before),
            after_ends=self.ends[transform] if known else ends_of(after),
            count=math.prod(self.shape),
            count_after=leading * order,
            padding=(published - leading) * order if transform == "hadamard-padded" else 0,
        )


@torch.no_grad()
def observe(
    model: nn.Module,
    pictures: Tensor,
    transforms: Sequence[str] = (),
    *,
    values: int = VALUES,
    seed: int = 0,
) -> list[Operand]:
    """The operands of all quantization sites of a float model, in the order of the forward pass.

    pictures: (B, 3, H, W) in [0, 1]. transforms: those whose extremes are wanted over the whole
    tensor. values: how many values of a tensor are kept, 0 for all. seed: of that choice and of
    the transform "random". Raises ValueError for a model without sites and for a tensor that holds
    NaN or infinite values, by its name.
    """
    spec = QuantSpec(bits=8, method="minmax", transform="none", storage="float32")
    if not isinstance(model, SwinIR):
        raise ValueError(
            f"model: statistics of a {type(model).__name__} are not made, only SwinIR's"
        )
    swapped = models.quantized(model, spec).eval()
    names = {id(quantizer): name for name, quantizer in named_quantizers(swapped)}
    operands: dict[str, Operand] = {}
    sharing: dict[str, list[str]] = {}
    last: tuple[Tensor, str] | None = None

    def see(quantizer: Quantizer, x: Tensor) -> None:
        nonlocal last
        site = names[id(quantizer)]
        if last is not None and last[0] is x:
            sharing[last[1]].append(site)
            return
        weight = isinstance(quantizer, WeightQuantizer)
        kind = "weight" if weight else "activation"
        operands[site] = sample(site, kind, role_of(site), x, transforms, values=values, seed=seed)
        if not weight:
            last = x, site
            sharing[site] = [site]

    with observed((quantizer for _, quantizer in named_quantizers(swapped)), see):
        swapped(pictures)
    for site, sites in sharing.items():
        if len(sites) > 1:  # q.input, k.input and v.input become qkv.input
            first, _, rest = operands[site].role.partition(".")
            others = "".join(role_of(other).partition(".")[0] for other in sites[1:])
            operands[site] = replace(operands[site], role=f"{first}{others}.{rest}")
    return list(operands.values())


def sample(
    site: str,
    kind: str,
    role: str,
    x: Tensor,
    transforms: Sequence[str] = (),
    *,
    values: int = VALUES,
    seed: int = 0,
) -> Operand:
    """An operand of at most `values` values of x (..., size), and of x's own extremes."""
    check_finite(site, x)
    flat = x.detach().reshape(-1, x.shape[-1]).cpu()
    ends = {}
    for transform in ("none", *transforms) if transforms else ():
        matrix = transform_matrix(transform, flat.shape[1], seed)
        ends[transform] = _ends_after(flat, matrix)
    rows = flat[kept_rows(*flat.shape, values=values, seed=seed)].float().clone()
    return Operand(site, kind, role, tuple(x.shape), rows, ends)


def kept_rows(count: int, size: int, *, values: int, seed: int) -> npt.NDArray[np.int64]:
    """Which of `count` rows of `size` values are kept, in their order: about `values` values."""
    wanted = max(1, values // size) if values else count
    if wanted >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, wanted, replace=False))


def ends_of(x: Tensor) -> Ends:
    """Least and greatest value."""
    low, high = torch.aminmax(x)
    return float(low), float(high)


def role_of(site: str) -> str:
    """What follows the last number: `layers.0.residual_group.blocks.3.fc1.input` is `fc1.input`."""
    parts = site.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[numbers[-1] + 1 :] if numbers else parts) or site


def check_finite(name: str, x: Tensor) -> None:
    """Raise ValueError, naming the tensor, if it is empty or holds NaN or infinite values."""
    if x.numel() == 0:
        raise ValueError(f"{name}: the tensor is empty")
    wrong = x.numel() - int(torch.isfinite(x).sum())
    if wrong:
        raise ValueError(f"{name}: {wrong} of {x.numel()} values are NaN or infinite")


def _ends_after(flat: Tensor, matrix: Tensor | None) -> Ends:
    if matrix is None:
        return ends_of(flat)
    matrix = matrix.to(flat.dtype)
    ends = [ends_of(rows @ matrix) for rows in flat.split(_ROWS_AT_ONCE)]
    return min(low for low, _ in ends), max(high for _, high in ends)
