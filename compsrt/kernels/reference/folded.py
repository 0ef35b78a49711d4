"""A folded Swin block: its fields, and how a kernel wants them stored.

Matrices and vectors end with zeros, up to the size of a tile (`tile_size`), so that no load needs a mask.
In float16 there is more:

- Codes count from the lowest one, in a unit of 2^-24, the least that float16 holds. There it has no
  fractions: to become a float16 is to be rounded to a code, half to even, and devices can limit by 0 in
  the same instruction. Tensor cores multiply such numbers as all others (Fasi et al., Numerical
  behavior of NVIDIA tensor cores, 2021). What codes and a zero point sum up to has a unit of 2^-9.
- Tokens have homogeneous coordinates, where there is room: after its channels a tile has a constant in
  its lanes, and each matrix two columns for these, which make the bias, in two parts for twice the bits,
  and two rows that make the constant of the next matrix (`_with_biases_in`).

`plain` undoes all that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...transforms import next_power_of_two

HEAD_SITES = ("query", "key", "value", "attention")
SITES = ("q", "k", "v", "query", "key", "value", "attention", "proj", "fc1", "fc2")
# The linear layers of a block and which of its sizes their weights have: rows, columns.
_SIZE, _INNER, _HIDDEN = range(3)  # FoldedBlock.sizes
LINEARS = {
    "enter": (_SIZE, _SIZE),
    "query": (_INNER, _SIZE),
    "key": (_INNER, _SIZE),
    "value": (_INNER, _SIZE),
    "merge": (_INNER, _INNER),
    "proj": (_SIZE, _INNER),
    "middle": (_SIZE, _SIZE),
    "fc1": (_HIDDEN, _SIZE),
    "hidden": (_HIDDEN, _HIDDEN),
    "fc2": (_SIZE, _HIDDEN),
}
TILE = 128  # what is wider is done so much at a time
LANES = 2  # of a constant, see above
# Of hidden channels: large enough to be its own GELU. A little more is made, so that what is a little less
# than that becomes this as float16, whose numbers are 2^-8 apart below it and 2^-7 above.
HIDDEN_CONSTANT = 8.0
HIDDEN_MADE = 8.0 * (1 + 2**-12)
# Values of up to 255 codes, turned by 64 tokens, stay finite in the second.
HALF_UNITS = 2.0**-24, 2.0**-9


class FoldedLinear(NamedTuple):
    """x -> x weight^T + bias, or, with a weight of codes, what `swin_block.py` says of "integer".

    weight: (N, K), floating or int8; bias: (N,), None where columns of the weight make it. Of codes
    alone: scale, zero: (N,); mask: (N, K) int8, None where nothing is pruned; rotation: (heads, d, d),
    what each head is multiplied by before the bias is added, or None. N and K are of `tile_size`.
    """

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None = None
    zero: Tensor | None = None
    mask: Tensor | None = None
    rotation: Tensor | None = None


class HeadScalars(NamedTuple):
    """One value a head, each (heads,), or (1,) where all heads share them."""

    query_zero: Tensor  # z_q
    scores: Tensor  # s_qk
    value_zero: Tensor  # z_v
    attention: Tensor  # s_A
    attention_inverse: Tensor
    attention_zero: Tensor  # z_A
    low: Tensor  # (4, heads): of query, key, value, attention
    high: Tensor


class FoldedBlock(NamedTuple):
    """All that `quant_swin_block` needs beside its tokens; `fold_block` makes it.

    Shapes are those without padding. Codes, zero points, steps and biases are in units where matrices
    are float16, see `_in_units`.
    """

    enter: FoldedLinear  # (C, C), of normalized tokens
    inputs: Tensor  # (3, 2): 1/s and z of the inputs of q, k and v
    limits: Tensor  # (6, 2): lowest and highest code of the inputs of q, k, v, proj, fc1 and fc2
    query: FoldedLinear  # (heads * d, C)
    key: FoldedLinear
    value: FoldedLinear
    bias: Tensor  # (4 kinds of windows or, without a shift, 1, heads, N, N): what is added to S / s_qk
    token: Tensor | None  # (N, N): T^T; where the mode is "integer" in bfloat16 if that is exact
    scalars: HeadScalars
    merge: FoldedLinear  # (C', heads * d), to the codes of proj's input
    proj: FoldedLinear  # (C, C')
    middle: FoldedLinear  # (C, C), of normalized tokens, to the codes of fc1's input
    fc1: FoldedLinear  # (hidden, C)
    hidden: FoldedLinear  # (hidden, hidden), to the codes of fc2's input
    fc2: FoldedLinear  # (C, hidden)
    mode: str
    sizes: tuple[int, int, int]  # C, heads * d, hidden
    heads: int
    window: int
    shift: int
    eps: tuple[float, float]  # of the two layer norms
    bits: tuple[int, ...]  # of SITES
    ranges: tuple[tuple[int, int], ...]  # lowest and highest code of SITES, of any head


def tile_size(size: int) -> int:
    """What an axis of a matrix ends at: a power of two from 32 on, above 128 a multiple of that."""
    return max(32, next_power_of_two(size)) if size <= TILE else -(-size // TILE) * TILE


def units(block: FoldedBlock) -> tuple[float, float]:
    """What a code of 1 is, and what a 1 is of numbers made of codes and a zero point."""
    return HALF_UNITS if block.enter.weight.dtype == torch.float16 else (1.0, 1.0)


def stored(block: FoldedBlock, dtype: torch.dtype) -> FoldedBlock:
    """A block in float64 as a kernel wants it: matrices in dtype, vectors in float32 at least, codes as
    they are; in float16 codes start at 0 already."""
    wide = torch.float32 if dtype.itemsize < 4 else dtype

    def linear(_: str, part: FoldedLinear, rows: int, columns: int) -> FoldedLinear:
        rows, columns = tile_size(rows), tile_size(columns)
        weight, mask = (
            t if t is None else F.pad(t, (0, columns - t.shape[1], 0, rows - len(t))).contiguous()
            for t in (part.weight, part.mask)
        )
        bias, scale, zero = (
            t if t is None else F.pad(t.to(wide), (0, rows - len(t))).contiguous()
            for t in (part.bias, part.scale, part.zero)
        )
        assert weight is not None
        rotation = None if part.rotation is None else part.rotation.to(wide).contiguous()
        weight = weight.to(dtype if weight.is_floating_point() else torch.int8)
        return FoldedLinear(weight, bias, scale, zero, mask, rotation)

    block = block._replace(
        **_linears(block, linear),
        inputs=block.inputs.to(wide),
        limits=block.limits.to(wide),
        bias=block.bias.to(wide).contiguous(),
        token=None if block.token is None else _rotation(block.token, block.mode, dtype),
        scalars=HeadScalars._make(t.to(wide).contiguous() for t in block.scalars),
    )
    if dtype == torch.float16:
        block = _in_units(_with_biases_in(block), *units(block))
    return block


def plain(
    block: FoldedBlock, dtype: torch.dtype
) -> tuple[FoldedBlock, dict[str, tuple[Tensor, Tensor]]]:
    """A block without units, and floating weight and bias of each of its linear layers, without padding."""
    code, value = units(block)
    if code != 1:
        block = _in_units(block, 1 / code, 1 / value)

    def linear(name: str, part: FoldedLinear, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        weight = part.weight[:rows, :columns].to(dtype)
        if part.bias is None:
            lanes = part.weight[:rows, columns : columns + LANES].to(dtype)
            bias = lanes.sum(1) * _constants(block)[name][0]
        else:
            bias = part.bias[:rows].to(dtype)
        if part.scale is not None:
            assert part.zero is not None
            scale, zero = (t[:rows, None].to(dtype) for t in (part.scale, part.zero))
            mask = 1 if part.mask is None else part.mask[:rows, :columns].to(dtype)
            weight = weight * scale + mask * zero
            if part.rotation is not None:
                by_head = weight.unflatten(0, part.rotation.shape[:2])
                weight = (part.rotation.to(dtype).mT @ by_head).flatten(0, 1)
        return weight, bias

    return block, _linears(block, linear)


def _linears(
    block: FoldedBlock, change: Callable[[str, FoldedLinear, int, int], Any]
) -> dict[str, Any]:
    """By name, what a function makes of each linear layer: of its name, itself, its rows and columns."""
    sizes = block.sizes
    return {
        name: change(name, getattr(block, name), sizes[rows], sizes[columns])
        for name, (rows, columns) in LINEARS.items()
    }


def _rotation(matrix: Tensor, mode: str, dtype: torch.dtype) -> Tensor:
    """T^T as it is stored: for "integer" in bfloat16 if that is exact, as of a Hadamard matrix of order
    4^k, which halves the products."""
    narrow = matrix.to(torch.bfloat16)
    exact = mode == "integer" and torch.equal(narrow.to(matrix.dtype), matrix)
    return (narrow if exact else matrix.to(dtype)).contiguous()


def _in_units(block: FoldedBlock, code: float, value: float) -> FoldedBlock:
    """A block with codes times `code` and with what codes and a zero point sum up to times `value`, both
    powers of two; weights stay, so that sums of codes' products are in the unit of codes too."""
    scalars = block.scalars

    def linear(name: str, part: FoldedLinear, *_: int) -> FoldedLinear:
        if part.bias is None or name == "enter":
            return part
        return part._replace(bias=part.bias * code)

    return block._replace(
        **_linears(block, linear),
        inputs=block.inputs * code,
        limits=block.limits * code,
        bias=block.bias * (code * value),
        scalars=HeadScalars(
            query_zero=scalars.query_zero * value,
            scores=scalars.scores / (code * value),
            value_zero=scalars.value_zero * value,
            attention=scalars.attention / (code * value),
            attention_inverse=scalars.attention_inverse * code,
            attention_zero=scalars.attention_zero * code,
            low=scalars.low * code,
            high=scalars.high * code,
        ),
    )


# --- Homogeneous coordinates -----------------------------------------------------------------------


def _constants(block: FoldedBlock) -> dict[str, tuple[float, float]]:
    """The constant of each linear layer's input and of what it makes, 0 where it makes none.

    Codes have their highest one for it: what makes them may make any number that is no less. What `enter`
    makes, `_with_biases_in` alone knows.
    """
    top = {site: float(high) for site, (_, high) in zip(SITES, block.ranges, strict=True)}
    return {
        "enter": (1.0, math.nan),
        "query": (top["q"], 0.0),
        "key": (top["k"], 0.0),
        "value": (top["v"], 0.0),
        "merge": (1.0, top["proj"]),
        "proj": (top["proj"], 0.0),
        "middle": (1.0, top["fc1"]),
        "fc1": (top["fc1"], HIDDEN_MADE),
        "hidden": (HIDDEN_CONSTANT, top["fc2"]),
        "fc2": (top["fc2"], 0.0),
    }


def _with_biases_in(block: FoldedBlock) -> FoldedBlock:
    """A block with its biases in its matrices, or as it is where it has no room, or where a number would
    leave the range of the matrices' type."""
    if any(tile_size(size) - size < LANES for size in block.sizes):
        return block
    constants = _constants(block)
    if min(constant for constant, _ in constants.values()) <= 0:  # an input has a single code
        return block
    inverse, zero = block.inputs.double().T
    most = float(((block.limits[:3, 1] + 1 + zero) / inverse).max())
    constants["enter"] = 1.0, 2.0 ** math.ceil(math.log2(max(most, 1.0)))

    def linear(name: str, part: FoldedLinear, rows: int, columns: int) -> FoldedLinear:
        assert part.bias is not None
        constant, made = constants[name]
        share = part.bias.double() / constant
        share[rows : rows + LANES] = made / constant
        weight = part.weight.clone()
        for column in range(columns, columns + LANES):
            weight[:, column] = share
            share = share - weight[:, column].double()
        return FoldedLinear(weight, None)

    parts = _linears(block, linear)
    fits = all(part.weight.isfinite().all() for part in parts.values())
    return block._replace(**parts) if fits else block


# --- As arguments -----------------------------------------------------------------------------------


def flatten(block: FoldedBlock) -> tuple[list[Tensor], list[bool], list[int], list[float]]:
    """A block as arguments of an operator: its tensors, which of them it has, numbers, epsilons."""
    slots = [t for name in LINEARS for t in getattr(block, name)]
    slots += [block.inputs, block.limits, block.bias, block.token, *block.scalars]
    ranges = [end for pair in block.ranges for end in pair]
    numbers = [int(block.mode == "integer"), *block.sizes]
    numbers += [block.heads, block.window, block.shift]
    return (
        [t for t in slots if t is not None],
        [t is not None for t in slots],
        [*numbers, *block.bits, *ranges],
        list(block.eps),
    )


def unflatten(
    tensors: Sequence[Tensor], present: Sequence[bool], numbers: Sequence[int], eps: Sequence[float]
) -> FoldedBlock:
    """The inverse of `flatten`."""
    remaining = iter(tensors)
    slots = iter([next(remaining) if is_there else None for is_there in present])

    def take(count: int) -> list:
        return [next(slots) for _ in range(count)]

    linears = {name: FoldedLinear(*take(len(FoldedLinear._fields))) for name in LINEARS}
    inputs, limits, bias, token = take(4)
    integer, size, inner, hidden, heads, window, shift, *rest = numbers
    ranges = rest[len(SITES) :]
    return FoldedBlock(
        **linears,
        inputs=inputs,
        limits=limits,
        bias=bias,
        token=token,
        scalars=HeadScalars(*take(len(HeadScalars._fields))),
        mode="integer" if integer else "fold",
        sizes=(size, inner, hidden),
        heads=heads,
        window=window,
        shift=shift,
        eps=(eps[0], eps[1]),
        bits=tuple(rest[: len(SITES)]),
        ranges=tuple(zip(ranges[::2], ranges[1::2], strict=True)),
    )
