"""Small quantized layers that the tests of masked_matmul, quant_linear and quant_mlp share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from shapes import UNIT, error, four_scalars, leaves, randn
from torch import Tensor

from compsrt import transforms
from compsrt.kernels import reference
from compsrt.kernels.reference import Grid, LayerNormWeights, QuantLayer, QuantWeight

SCALARS = ("lower", "upper", "alpha", "beta")


class Kind(NamedTuple):
    """A layer but for its numbers; bits 0: the operand is not quantized."""

    size: int = 12
    out: int = 20
    transform: str | None = "hadamard"
    bits: int = 4
    weight_bits: int = 3
    codes: str = "clamped"
    channels: bool = False
    masked: bool = True
    norm: bool = False
    bias: bool = True
    activation: str | None = None
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def rotation(self) -> Tensor | None:
        if self.transform is None:
            return None
        matrix = transforms.transform_matrix(self.transform, self.size)
        return matrix if matrix is None else matrix.to(self.dtype)

    def order(self) -> int:
        rotation = self.rotation()
        return self.size if rotation is None else rotation.shape[1]

    def mask(self) -> Tensor | None:
        return randn(self.out, self.order(), seed=self.seed + 5) > -0.3 if self.masked else None

    def tensors(self) -> dict[str, Tensor]:
        """All but x and the residual that get gradients; weights are clear of their quantizer's ties."""
        found, dtype = {}, self.dtype
        if self.norm:
            found["norm_weight"] = 1 + randn(self.size, seed=self.seed + 1, dtype=dtype) / 4
            found["norm_bias"] = randn(self.size, seed=self.seed + 2, dtype=dtype) / 4
        if self.bits:
            scalars = four_scalars((), self.bits, self.codes, self.seed)
            found.update(zip(SCALARS, scalars, strict=True))
        shape = (self.out, 1) if self.channels else ()
        scalars = four_scalars(shape, self.weight_bits, self.codes, self.seed + 3)
        draws = [randn(self.out, self.order(), seed=self.seed + i, dtype=dtype) for i in (6, 7, 8)]
        grid = Grid(*scalars, self.weight_bits, self.codes)
        found["weight"] = draws[0]
        for draw in draws[1:]:
            found["weight"] = torch.where(
                clear_of_ties(found["weight"], grid), found["weight"], draw
            )
        assert clear_of_ties(found["weight"], grid).all()
        found.update((f"weight_{name}", s) for name, s in zip(SCALARS, scalars, strict=True))
        if self.bias:
            found["bias"] = randn(self.out, seed=self.seed + 9, dtype=dtype)
        return found

    def grid(self, tensors: dict[str, Tensor]) -> Grid:
        return Grid(*(tensors[name] for name in SCALARS), self.bits, self.codes)

    def weight(self, tensors: dict[str, Tensor]) -> QuantWeight:
        scalars = (tensors[f"weight_{name}"] for name in SCALARS)
        mask = self.mask()
        mask = mask if mask is None else mask.to(tensors["weight"].device)
        return QuantWeight(tensors["weight"], Grid(*scalars, self.weight_bits, self.codes), mask)

    def normalization(self, tensors: dict[str, Tensor]) -> LayerNormWeights | None:
        if not self.norm:
            return None
        return LayerNormWeights(tensors["norm_weight"], tensors["norm_bias"], 1e-3)

    def layer(self, tensors: dict[str, Tensor]) -> QuantLayer:
        weight, rotation = self.weight(tensors), self.rotation()
        rotation = rotation if rotation is None else rotation.to(weight.values)
        return QuantLayer(self.grid(tensors), weight, tensors.get("bias"), rotation)


def quant_linear(function: Callable, kind: Kind, x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    layer = kind.layer(tensors)
    return function(
        x,
        *layer[:2],
        norm=kind.normalization(tensors),
        rotation=layer.rotation,
        bias=layer.bias,
        activation=kind.activation,
        residual=tensors.get("residual"),
    )


def clear_of_ties(v: Tensor, grid: Grid, margin: float = 1e-3) -> Tensor:
    """Where v is clear of where a code or a side changes: there rounding decides."""
    v, scalars = v.double(), [s.double() for s in grid[:4]]
    scale, zero = reference.step_and_zero(*scalars, grid.bits)
    w = (v - zero) / scale
    edges = [(w - w.floor() - 0.5).abs()]
    edges += [(w - (bound - zero) / scale).abs() for bound in scalars[:2]]
    return (torch.stack(torch.broadcast_tensors(*edges)) > margin).all(0)


def operand(kind: Kind, x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """What the quantizer of a layer sees, in float64."""
    x, tensors = x.double(), {name: t.double() for name, t in tensors.items()}
    norm, rotation = kind.normalization(tensors), kind.rotation()
    x = x if norm is None else reference.linear.layer_norm(x, norm)
    return x if rotation is None else x @ rotation.double()


def run(
    call: Callable[[Tensor, dict[str, Tensor]], Tensor],
    x: Tensor,
    tensors: dict[str, Tensor],
    grad: Tensor,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The output as "y" and the gradients of x and all tensors, computed on a device in a type."""
    x_leaf, *values = leaves([x, *tensors.values()], device, dtype)
    y = call(x_leaf, dict(zip(tensors, values, strict=True)))
    grads = torch.autograd.grad(y, [x_leaf, *values], grad.to(y))
    return {"y": y, "x": grads[0], **dict(zip(tensors, grads[1:], strict=True))}


def assert_all_as_good(
    found: dict[str, Tensor],
    by_torch: dict[str, Tensor],
    exact: dict[str, Tensor],
    dtype: torch.dtype,
    terms: float,
) -> None:
    """Errors are at most twice those of torch in the same type, plus the type's unit.

    terms: the size of the terms that a scalar's gradient is the sum of; that sum may nearly vanish.
    """
    assert list(found) == list(exact)
    for name, right in exact.items():
        ours, theirs = found[name], by_torch[name]
        assert ours.shape == right.shape, name
        assert ours.dtype == theirs.dtype, name
        size = error(right, torch.zeros(()))
        if name.endswith(SCALARS):
            size = max(size, terms)
        limit = 2 * error(theirs, right) + 4 * UNIT[dtype] * size
        assert error(ours, right) <= limit, (name, error(ours, right), limit)
