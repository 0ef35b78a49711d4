"""Products with quantized, pruned weights, and the linear layers built of them, in plain PyTorch.

    W^ = mask * fq(W~)                                                  (N, K')
    masked_matmul    y = x W^^T + bias + residual
    quant_linear     y = GELU(fq(norm(x) R) W^^T + bias) + residual     all but fq(..) W^^T optional
    quant_mlp        y = fc2(GELU(fc1(norm(x)))) + x                    fc1, fc2 such layers

A padded rotation R (K, K'), K' > K, is no rotation of the coefficients it adds, so there R^T R
stands between the two quantized operands. Sources: 2DQuant (NeurIPS 2024) for the quantizer,
CompSRT (2026) for rotation and pruning; that a pruned weight contributes exactly 0 is this package's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packing import pack_mask, packed_size, unpack_mask
from .quantize import (
    Grid,
    check_quantizer,
    dequantize,
    fake_quantize,
    quant_matmul,
    quantize_codes,
    step_and_zero,
)

PATTERNS = ("unstructured", "2:4")
ACTIVATIONS = (None, "gelu")


# --- Weights -------------------------------------------------------------------------------------


class QuantWeight(NamedTuple):
    """A weight and what quantizes it.

    values: (N, K'), rotated float weights, or their codes, uint8, one a byte; grid: scalars of
    shape () or (N, 1), or None for float values that are quantized already; mask: (N, K') bool,
    False where a weight is pruned, or None.
    """

    values: Tensor
    grid: Grid | None
    mask: Tensor | None = None

    def quantized(self) -> Tensor:
        """W^ (N, K'), with gradients for float values and the scalars."""
        if self.grid is None:
            weight = self.values
        elif self.values.is_floating_point():
            weight = fake_quantize(
                self.values, *self.grid[:4], bits=self.grid.bits, codes=self.grid.codes
            )
        else:
            scale, zero = step_and_zero(*self.grid[:4], self.grid.bits)
            weight = dequantize(self.values.to(scale.dtype), scale, zero)
        return weight if self.mask is None else weight * self.mask


class PackedWeight(NamedTuple):
    """A weight in as many bits as it has, every row in whole bytes (see `packing.py` for their order).

    codes: (N, bytes), a row's codes; grid: as in QuantWeight; size: K'. pattern "unstructured":
    a code for each weight, and mask: None or (N, bytes) with one bit a weight. pattern "2:4": two
    codes for each four weights, and mask: (N, bytes) with four bits for each four: where the first
    of the two is, then where the second is.
    """

    codes: Tensor
    grid: Grid
    mask: Tensor | None
    size: int
    pattern: str = "unstructured"

    def unpacked(self) -> QuantWeight:
        """The same weight with one code a byte."""
        bits, size, mask = self.grid.bits, self.size, None
        if self.pattern == "unstructured":
            codes = _unpack_rows(self.codes, bits, size)
            if self.mask is not None:
                mask = _unpack_rows(self.mask, 1, size).bool()
            return QuantWeight(codes, self.grid, mask)
        assert self.mask is not None
        kept = _unpack_rows(self.codes, bits, size // 2).unflatten(1, (-1, 2))
        places = _unpack_rows(self.mask, 2, size // 2).unflatten(1, (-1, 2)).long()
        codes = kept.new_zeros((*kept.shape[:2], 4)).scatter(2, places, kept)
        mask = torch.zeros_like(codes, dtype=torch.bool).scatter(2, places, True)
        return QuantWeight(codes.flatten(1), self.grid, mask.flatten(1))

    @torch.no_grad()
    def quantized(self) -> Tensor:
        """W^ (N, K'), without gradients."""
        return self.unpacked().quantized()


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    """(N, K) uint8 -> (N, bytes): `pack_codes` of each row."""
    places = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    stream = (codes[..., None] >> places & 1).bool().flatten(1)
    size = packed_size(stream.shape[1])
    return pack_mask(F.pad(stream, (0, 8 * size - stream.shape[1]))).view(-1, size)


def _unpack_rows(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `_pack_rows`: (N, bytes) -> (N, count) uint8."""
    stream = unpack_mask(packed.flatten(), 8 * packed.numel()).view(len(packed), -1)
    places = torch.arange(bits, dtype=torch.uint8, device=packed.device)
    stream = stream[:, : count * bits].unflatten(1, (count, bits)).to(torch.uint8)
    return (stream << places).sum(-1, dtype=torch.uint8)


@torch.no_grad()
def pack_weight(weight: QuantWeight, pattern: str = "unstructured") -> PackedWeight:
    """The packed form of a weight; what is pruned loses its code.

    pattern: "unstructured", or "2:4" for a mask that keeps two of every four neighbours of a row.
    Raises ValueError for an unknown pattern, for unclamped codes, which need not fit their bits,
    and for a mask that is not of the pattern.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"pattern: {pattern!r} is unknown; one of {', '.join(PATTERNS)}")
    check_weight(weight)
    values, grid, mask = weight
    if grid is None:
        raise ValueError("weight: it has no grid, so no codes; its scales are finer than a row")
    if grid.codes != "clamped":
        raise ValueError("codes: unclamped codes need not fit their bits; use clamped ones")
    codes = values
    if values.is_floating_point():
        codes = quantize_codes(values, *grid[:4], bits=grid.bits).to(torch.uint8)
    elif values.numel() and int(values.max()) >= 2**grid.bits:
        raise ValueError(f"weight: the code {int(values.max())} does not fit {grid.bits} bits")
    size = values.shape[1]
    if pattern == "unstructured":
        if mask is None:
            return PackedWeight(_pack_rows(codes, grid.bits), grid, None, size, pattern)
        packed = _pack_rows(codes * mask, grid.bits)
        return PackedWeight(packed, grid, _pack_rows(mask.to(torch.uint8), 1), size, pattern)
    if mask is None or size % 4 or (mask.unflatten(1, (-1, 4)).sum(-1) != 2).any():
        raise ValueError(
            f"mask: 2:4 needs one that keeps two of every four of the {size} weights of each row;"
            " use compsrt.pruning.magnitude_mask, or the pattern unstructured"
        )
    places = mask.nonzero()[:, 1].view(len(mask), -1)
    packed = _pack_rows(codes.gather(1, places), grid.bits)
    places = _pack_rows((places % 4).to(torch.uint8), 2)
    return PackedWeight(packed, grid, places, size, pattern)


# --- Layers --------------------------------------------------------------------------------------


class LayerNormWeights(NamedTuple):
    """Of a layer norm over the last axis: weight (K,), bias (K,), and eps added to the variance."""

    weight: Tensor
    bias: Tensor
    eps: float = 1e-5


class QuantLayer(NamedTuple):
    """One layer of `quant_mlp`: what `quant_linear` takes under the same names."""

    grid: Grid
    weight: QuantWeight
    bias: Tensor | None = None
    rotation: Tensor | None = None


def check_weight(weight: QuantWeight | PackedWeight, name: str = "weight") -> None:
    """Raise ValueError unless the parts of a weight fit each other."""
    if weight.grid is not None:
        check_quantizer(weight.grid.bits, weight.grid.codes)
    elif not weight.values.is_floating_point():
        raise ValueError(f"{name}: codes need a grid; pass one, or float values")
    if isinstance(weight, PackedWeight):
        if weight.pattern not in PATTERNS:
            raise ValueError(
                f"{name}: pattern {weight.pattern!r} is unknown; one of {', '.join(PATTERNS)}"
            )
        if weight.pattern == "2:4" and (weight.size % 4 or weight.mask is None):
            raise ValueError(
                f"{name}: 2:4 needs positions and 4 n weights a row, not {weight.size}"
            )
        count = weight.size // (2 if weight.pattern == "2:4" else 1)
        streams = [(weight.codes, count * weight.grid.bits), (weight.mask, weight.size)]
        for stream, bits in streams:
            size = packed_size(bits)
            if stream is not None and (
                stream.dtype != torch.uint8 or stream.dim() != 2 or stream.shape[1] != size
            ):
                raise ValueError(
                    f"{name}: a packed stream is {stream.dtype} {tuple(stream.shape)}, not uint8"
                    f" (N, {size}); use pack_weight"
                )
        values, mask = weight.codes, weight.mask
        same = mask is None or len(mask) == len(values)
    else:
        values, mask = weight.values, weight.mask
        if values.dim() != 2 or not (values.is_floating_point() or values.dtype == torch.uint8):
            raise ValueError(
                f"{name}: values are {values.dtype} {tuple(values.shape)}; they need two axes"
                " (N, K'), floating-point weights or uint8 codes"
            )
        same = mask is None or (mask.shape == values.shape and mask.dtype == torch.bool)
    if mask is not None and not same:
        raise ValueError(
            f"{name}: mask is {mask.dtype} {tuple(mask.shape)}; it needs bool {tuple(values.shape)}"
        )
    if 0 in shape_of(weight):
        raise ValueError(f"{name}: its shape is {shape_of(weight)}; it needs one entry at least")
    for scalar in () if weight.grid is None else weight.grid[:4]:
        if scalar is not None and tuple(scalar.shape) not in ((), (len(values), 1)):
            raise ValueError(
                f"{name}: a scalar of its grid has shape {tuple(scalar.shape)}; use () or"
                f" ({len(values)}, 1)"
            )


def shape_of(weight: QuantWeight | PackedWeight) -> tuple[int, int]:
    """N and K'."""
    if isinstance(weight, PackedWeight):
        return len(weight.codes), weight.size
    return weight.values.shape[0], weight.values.shape[1]


def check_linear(
    x: Tensor,
    weight: QuantWeight | PackedWeight,
    *,
    grid: Grid | None = None,
    norm: LayerNormWeights | None = None,
    rotation: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> None:
    """Raise ValueError, naming the argument, unless all fit x and each other."""
    if not x.is_floating_point() or x.dim() == 0:
        raise ValueError(
            f"x: it is {x.dtype} {tuple(x.shape)}; it needs a floating type and (..., K)"
        )
    check_weight(weight)
    if grid is not None:
        check_quantizer(grid.bits, grid.codes)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: {activation!r} is unknown; one of None, 'gelu'")
    out, order = shape_of(weight)
    size = x.shape[-1]
    if rotation is not None and (rotation.dim() != 2 or rotation.shape[0] != size):
        raise ValueError(
            f"rotation: {tuple(rotation.shape)} does not fit x {tuple(x.shape)};"
            f" it needs two axes, the first of {size}"
        )
    rotated = size if rotation is None else rotation.shape[1]
    if order != rotated:
        raise ValueError(
            f"weight: {out} rows of {order} do not fit operands of {rotated}, x's last axis"
            + (" rotated" if rotation is not None else "")
        )
    wanted = [("bias", bias, (out,)), ("residual", residual, (*x.shape[:-1], out))]
    if norm is not None:
        wanted += [("norm", norm.weight, (size,)), ("norm", norm.bias, (size,))]
    for name, tensor, shape in wanted:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: its shape is {tuple(tensor.shape)}; it needs {shape}")
    if residual is not None and residual.dtype != x.dtype:
        raise ValueError(f"residual: it is {residual.dtype}; convert it to x's {x.dtype}")


def padded(rotation: Tensor | None) -> bool:
    """Whether a rotation has more columns than rows, so that it cannot be left out."""
    return rotation is not None and rotation.shape[0] != rotation.shape[1]


def project(weight: Tensor, rotation: Tensor) -> Tensor:
    """W^ (N, K') times R^T R, for a padded rotation R (K, K')."""
    return weight @ rotation.mT @ rotation


def masked_matmul(
    x: Tensor,
    weight: QuantWeight | PackedWeight,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x @ W^^T + bias + residual.

    x: (..., K'), any floating type; weight: (N, K'); bias: (N,); residual: (..., N), in x's type.
    Returns (..., N) in x's type. Gradients: of x, bias, residual, the weight's scalars and, straight
    through the quantizer, its float values, exactly 0 for a pruned one. Raises ValueError for
    arguments that do not fit.
    """
    check_linear(x, weight, bias=bias, residual=residual)
    y = F.linear(x, weight.quantized().to(x.dtype), None if bias is None else bias.to(x.dtype))
    return y if residual is None else y + residual


def layer_norm(x: Tensor, norm: LayerNormWeights) -> Tensor:
    """Layer norm of the last axis of x, in x's type."""
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    return F.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)


def quant_linear(
    x: Tensor,
    grid: Grid,
    weight: QuantWeight,
    *,
    norm: LayerNormWeights | None = None,
    rotation: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """GELU(fq(norm(x) @ rotation) @ W^^T + bias) + residual, all but the product optional.

    x: (..., K), any floating type; grid: the quantizer of the rotated x; weight: (N, K'); norm: a
    layer norm of x; rotation: a constant (K, K') with orthonormal rows, which gets no gradient;
    bias: (N,); activation: None or "gelu", the exact one; residual: (..., N), in x's type. Returns
    (..., N) in x's type. Raises ValueError for arguments that do not fit.
    """
    check_linear(
        x,
        weight,
        grid=grid,
        norm=norm,
        rotation=rotation,
        bias=bias,
        activation=activation,
        residual=residual,
    )
    x = x if norm is None else layer_norm(x, norm)
    right = weight.quantized().to(x.dtype)
    if rotation is not None:
        # Not by the product's own argument, which would rotate once more in the backward.
        rotation = rotation.detach().to(x.dtype)
        x = x @ rotation
        right = project(right, rotation) if padded(rotation) else right
    bias = None if bias is None else bias.to(x.dtype)
    y = quant_matmul(x if x.dim() > 1 else x[None], right.mT, grid, bias=bias)
    y = y if x.dim() > 1 else y[0]
    y = F.gelu(y) if activation == "gelu" else y
    return y if residual is None else y + residual


def check_layers(layers: Sequence[QuantLayer]) -> None:
    """Raise ValueError unless there are layers, and none with a rotation of its own."""
    if not layers or any(layer.rotation is not None for layer in layers):
        raise ValueError(
            "layers: pass at least one, without rotations: they share the argument rotation"
        )


def quant_linears(
    x: Tensor,
    layers: Sequence[QuantLayer],
    *,
    norm: LayerNormWeights | None = None,
    rotation: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`quant_linear` of one x by each of several layers, which share norm and rotation.

    Queries, keys and values are made so. Returns a tuple, (..., N) each. Raises ValueError for no
    layers, layers with rotations of their own, and as `quant_linear`.
    """
    check_layers(layers)
    x = x if norm is None else layer_norm(x, norm)
    if rotation is not None and not padded(rotation):
        x, rotation = x @ rotation.detach().to(x.dtype), None  # once for all
    return tuple(
        quant_linear(x, layer.grid, layer.weight, bias=layer.bias, rotation=rotation)
        for layer in layers
    )


def quant_mlp(
    x: Tensor,
    fc1: QuantLayer,
    fc2: QuantLayer,
    *,
    norm: LayerNormWeights | None = None,
    residual: bool = False,
) -> Tensor:
    """fc2(GELU(fc1(norm(x)))), plus x with `residual`.

    x: (..., K), any floating type; fc1, fc2: layers to (..., H) and (..., N), as in `quant_linear`.
    Returns (..., N) in x's type. Raises ValueError for arguments that do not fit.
    """
    hidden = quant_linear(
        x,
        fc1.grid,
        fc1.weight,
        norm=norm,
        rotation=fc1.rotation,
        bias=fc1.bias,
        activation="gelu",
    )
    return quant_linear(
        hidden,
        fc2.grid,
        fc2.weight,
        rotation=fc2.rotation,
        bias=fc2.bias,
        residual=x if residual else None,
    )
