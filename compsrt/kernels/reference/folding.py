"""What `quant_swin_block` needs of a quantized Swin block, all transforms folded into matrices, once.

The mathematics is in `swin_block.py` beside this file. Everything is derived from quantized weights,
grids and orthonormal matrices, whatever these matrices are, in float64. How it is stored is told in `folded.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .folded import SITES, FoldedBlock, FoldedLinear, HeadScalars, stored
from .linear import LayerNormWeights, QuantLayer, QuantWeight, check_weight, shape_of
from .quantize import Grid, _sides, check_quantizer, quantize_codes, step_and_zero
from .windows import relative_bias, shift_mask

MODES = ("fold", "integer")


class _Site(NamedTuple):
    """A quantizer in float64: v is about scale * (code + zero), codes low to high."""

    scale: Tensor
    zero: Tensor
    low: Tensor
    high: Tensor
    bits: int


def _site(grid: Grid, name: str, shape: Sequence[int] = (), *, signed: bool = True) -> _Site:
    """A grid whose codes count from the middle of all that its bits can say, or from its lowest code."""
    check_quantizer(grid.bits, grid.codes)
    if grid.codes != "clamped":
        raise ValueError(f"{name}: unclamped codes cannot be folded; use clamped ones")
    for field, scalar in zip(Grid._fields, grid[:4], strict=False):
        if scalar is not None and scalar.numel() not in (1, math.prod(shape)):
            raise ValueError(
                f"{name}: {field} has shape {tuple(scalar.shape)}; use ()"
                + (f" or {tuple(shape)}" if shape else "")
            )
    lower, upper, alpha, beta = (_flat(s) for s in grid[:4])
    assert lower is not None and upper is not None
    scale, zero = step_and_zero(lower, upper, alpha, beta, grid.bits)
    low, high, _, _ = _sides(lower, upper, scale, zero, grid.bits, grid.codes)
    start = 2 ** (grid.bits - 1) if signed else low.round()
    parts = scale, zero / scale + start, low.round() - start, high.round() - start
    scale, zero, low, high = torch.broadcast_tensors(*parts)
    return _Site(scale, zero, low, high, grid.bits)


def _flat(scalar: Tensor | None) -> Tensor | None:
    return None if scalar is None else scalar.detach().double().flatten()


def _square(rotation: Tensor | None, size: int, name: str, like: Tensor) -> Tensor:
    """A rotation in float64; the identity for None."""
    if rotation is None:
        return torch.eye(size, dtype=torch.float64, device=like.device)
    if tuple(rotation.shape) != (size, size):
        raise ValueError(
            f"{name}: {tuple(rotation.shape)} is not ({size}, {size}); only a transform of exact"
            " order can be folded, a padded one runs as the ops of a block"
        )
    return rotation.detach().double()


def _weight(weight: QuantWeight, name: str, shape: tuple[int, int]) -> Tensor:
    """W^ in float64."""
    check_weight(weight, name)
    if shape_of(weight) != shape:
        raise ValueError(f"{name}: its weight is {shape_of(weight)}; it needs {shape}")
    return weight.quantized().detach().double()


def _linear(
    layer: QuantLayer,
    site: _Site,
    name: str,
    shape: tuple[int, int],
    dtype: torch.dtype | None,
    *,
    rotation: Tensor | None = None,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
) -> FoldedLinear:
    """A layer of the codes of `site`, in float64: y = (W^ x + bias) by head times rotation, over
    scale, less zero. rotation: (heads, d, d); scale, zero: (N,).

    Of codes, or, with a dtype, of numbers of that type: then the bias has the share of the site's zero
    point in the rounded weight, so that roundings are multiplied with values and not with codes.
    """
    weight = _weight(layer.weight, name, shape) * site.scale
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().double()
    turned = weight
    if rotation is not None:
        by_head = (t.unflatten(0, rotation.shape[:2]) for t in (weight, bias[:, None]))
        turned, bias = ((rotation.mT @ t).flatten(0, 1) for t in by_head)
        bias = bias[:, 0]
    scale = torch.ones_like(bias) if scale is None else scale
    bias = bias / scale - (0 if zero is None else zero)
    turned = turned / scale[:, None]
    if dtype is not None:
        turned = turned.to(dtype).double()
    bias = bias + turned.sum(1) * site.zero
    if dtype is not None:
        return FoldedLinear(turned, bias)
    codes, of_weight, mask = _codes_of(layer.weight, name)
    step = (of_weight.scale * site.scale).expand(len(codes))
    start = step * of_weight.zero
    if rotation is None:
        step, start = step / scale, start / scale
    else:
        rotation = rotation / scale.unflatten(0, rotation.shape[:2])[:, None]
    return FoldedLinear(codes, bias, step, start, mask, rotation)


def _codes_of(weight: QuantWeight, name: str) -> tuple[Tensor, _Site, Tensor | None]:
    """A weight's signed codes (int8), 0 where it is pruned; its grid; its mask (int8)."""
    values, grid, mask = weight
    if grid is None:
        raise ValueError(f"{name}: integers need a scale for a tensor or a channel; use fold")
    site = _site(grid, name, (len(values), 1))
    if values.is_floating_point():
        values = quantize_codes(values, *grid[:4], bits=grid.bits)
    codes = (values.to(torch.int16) - 2 ** (grid.bits - 1)).to(torch.int8)
    if mask is None or bool(mask.all()):
        return codes, site, None
    return codes * mask, site, mask.to(torch.int8)


@torch.no_grad()
def fold_block(
    qkv: Sequence[QuantLayer],
    proj: QuantLayer,
    fc1: QuantLayer,
    fc2: QuantLayer,
    table: Tensor,
    grids: Sequence[Grid],
    *,
    norms: tuple[LayerNormWeights, LayerNormWeights],
    heads: int,
    window: int,
    shift: int,
    scale: float,
    rotation: Tensor | None = None,
    head_rotation: Tensor | None = None,
    value_rotation: Tensor | None = None,
    token_rotation: Tensor | None = None,
    mode: str = "fold",
    dtype: torch.dtype = torch.float32,
) -> FoldedBlock:
    """Everything of a quantized Swin block that does not depend on its tokens.

    qkv: the layers of queries, keys and values, whose inputs share `rotation`; proj, fc1, fc2: with
    their own. table, grids, heads, window, shift, scale and the other rotations: as in
    `quant_window_attention`, but a grid may have a value for each head too. norms: the two layer
    norms. mode: "fold" or "integer"; dtype: of the matrices that stay floating.

    Computed in float64 on the CPU, so that all devices get the same matrices, also those without
    float64, and returned on the device of `table`. Raises ValueError for what a folded block cannot
    be: padded transforms (more columns than rows), unclamped codes, and, as integers, weights with a
    scale for less than an output channel.
    """
    if mode not in MODES:
        raise ValueError(f"mode: {mode!r} is unknown; one of {', '.join(MODES)}")
    if mode == "integer" and dtype.itemsize < 4:
        raise ValueError(f"dtype: {dtype} is too coarse for codes that are exact; use float32")
    if len(qkv) != 3 or len(grids) != 4:
        raise ValueError("qkv, grids: pass three layers and four grids")
    device = table.device
    qkv, proj, fc1, fc2, table, grids, norms = moved(
        (qkv, proj, fc1, fc2, table, grids, norms), torch.device("cpu")
    )
    rotation, head_rotation, value_rotation, token_rotation = moved(
        (rotation, head_rotation, value_rotation, token_rotation), torch.device("cpu")
    )
    size, tokens = len(norms[0].weight), window * window
    inner, hidden = shape_of(qkv[0].weight)[0], shape_of(fc1.weight)[0]
    if inner % heads or table.shape != ((2 * window - 1) ** 2, heads):
        raise ValueError(
            f"heads: {heads} does not fit {inner} channels and a table {tuple(table.shape)}"
        )
    d = inner // heads
    enter = _square(rotation, size, "rotation", table)
    head = _square(head_rotation, d, "head_rotation", table)
    of_value = _square(value_rotation, d, "value_rotation", table)
    token = _square(token_rotation, tokens, "token_rotation", table)
    before_proj = _square(proj.rotation, inner, "rotation of proj", table)
    before_fc1 = _square(fc1.rotation, size, "rotation of fc1", table)
    before_fc2 = _square(fc2.rotation, hidden, "rotation of fc2", table)

    signed = dtype != torch.float16
    layers = (*qkv, proj, fc1, fc2)
    names = (*SITES[:3], *SITES[7:])
    of_layers = [
        _site(layer.grid, name, signed=signed) for layer, name in zip(layers, names, strict=True)
    ]
    inputs, last = of_layers[:3], of_layers[3:]
    sites = [
        _site(grid, name, (heads,), signed=signed)
        for grid, name in zip(grids, SITES[3:7], strict=True)
    ]
    query, key, value, attention = sites
    rounded = dtype if mode == "fold" else None

    def by_channel(of_heads: Tensor) -> Tensor:
        return of_heads.expand(heads).repeat_interleave(d)

    of_heads = []
    for i, (turn, turned) in enumerate(
        ((head, head_rotation), (head, head_rotation), (of_value, value_rotation))
    ):
        of_heads.append(
            _linear(
                qkv[i],
                inputs[i],
                SITES[i],
                (inner, size),
                rounded,
                rotation=None if turned is None else turn.expand(heads, d, d),
                scale=by_channel(sites[i].scale) / (scale if i == 0 else 1.0),
                zero=by_channel(sites[i].zero),
            )
        )
    scalars = HeadScalars(
        query.zero,
        query.scale * key.scale,
        value.zero,
        attention.scale,
        1 / attention.scale,
        attention.zero,
        torch.stack(torch.broadcast_tensors(*(s.low for s in sites))),
        torch.stack(torch.broadcast_tensors(*(s.high for s in sites))),
    )
    count = 1 if all(len(s.scale) == 1 for s in sites) else heads
    scalars = HeadScalars._make(t.expand(*t.shape[:-1], count) for t in scalars)
    merge = (of_value.mT @ before_proj.unflatten(0, (heads, d))).flatten(0, 1)
    merge = by_channel(value.scale)[:, None] * merge

    def to_codes(matrix: Tensor, bias: Tensor | float, site: _Site) -> FoldedLinear:
        bias = torch.as_tensor(bias) / site.scale - site.zero
        return FoldedLinear((matrix / site.scale).mT, bias.expand(matrix.shape[1]))

    gammas = [norm.weight.detach().double() for norm in norms]
    betas = [norm.bias.detach().double() for norm in norms]
    block = FoldedBlock(
        enter=FoldedLinear((gammas[0][:, None] * enter).mT, betas[0] @ enter),
        inputs=torch.stack([torch.cat([1 / s.scale, s.zero]) for s in inputs]),
        limits=torch.stack([torch.cat([s.low, s.high]) for s in (*inputs, *last)]),
        query=of_heads[0],
        key=of_heads[1],
        value=of_heads[2],
        bias=_bias(table.detach().double(), window, shift) / scalars.scores[:, None, None],
        token=None if token_rotation is None else token.mT,
        scalars=scalars,
        merge=to_codes(merge, 0.0, last[0]),
        proj=_linear(proj, last[0], "proj", (size, inner), rounded),
        middle=to_codes(gammas[1][:, None] * before_fc1, betas[1] @ before_fc1, last[1]),
        fc1=_linear(fc1, last[1], "fc1", (hidden, size), rounded),
        hidden=to_codes(before_fc2, 0.0, last[2]),
        fc2=_linear(fc2, last[2], "fc2", (size, hidden), rounded),
        mode=mode,
        sizes=(size, inner, hidden),
        heads=heads,
        window=window,
        shift=shift,
        eps=(norms[0].eps, norms[1].eps),
        bits=tuple(s.bits for s in (*inputs, *sites, *last)),
        ranges=tuple((int(s.low.min()), int(s.high.max())) for s in (*inputs, *sites, *last)),
    )
    return moved(stored(block, dtype), device)


def moved(value: Any, device: torch.device) -> Any:
    """Tensors, in tuples and lists of any depth, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, list | tuple):
        parts = [moved(part, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _bias(table: Tensor, window: int, shift: int) -> Tensor:
    """Relative-position bias and shift mask of each kind of windows in turn, see `kinds_of_windows`."""
    bias = relative_bias(table, window)[None]
    if shift:  # a picture of two by two windows has one of each
        side = 2 * window
        bias = bias + shift_mask(side, side, window, shift, table.device, table.dtype)[:, None]
    return bias
