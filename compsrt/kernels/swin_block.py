"""A whole quantized Swin block in one launch; see `reference/swin_block.py` for the mathematics.

A program does the tokens of one window (of 16 x 16: 32 of its 256), from the residual stream to the
residual stream, at their own places in x and out (B, H, W, C). Between the two it writes nothing:

    norm, E -> codes for q, k, v -> codes q, k, v of all heads          (tokens, heads * d)
    V = T^T v^, of all heads
    for each head: q in its lanes, k -> S -> softmax -> T -> codes, V -> o, kept in its lanes
    o -> M -> codes -> proj;  x += ...                                  x in float32
    norm, E' -> codes -> fc1 -> GELU -> P' -> codes -> fc2; x += ...

So no tile is ever cut into heads: what a head's product has beyond its lanes is multiplied by zeros,
which tensor cores do in less time than it takes to make a tile of d lanes. And k, T and V stay in shared
memory for all heads, so that a head has no operand to bring there, and hardly anything to wait for.

"fold" multiplies codes, exact in each half type, with matrices of that type, and sums in float32; S is
of q^ = q + z in as many tiles of the type as hold it (`parts`). "integer" multiplies codes with codes in
int8 and sums in int32: q, k, v, proj, fc1 and fc2; S in bf16, which holds codes, in three parts for q^,
so just as exactly. What has no codes on one side stays a product of floats, in float32 (of bf16, see
`add_product`): the rotations E, T, M, E', P', a head's own, and A^ times T^T v^, since a rotated v^ has
no codes.

Its time goes into issuing instructions and waiting for one, not into products or memory: so what a
program does to each of its entries is what counts. In float16 a code is made of two numbers at a time by
two instructions, and biases come with the products (`reference/folded.py`); masks are part of the bias
of each kind of windows; sums over a program's threads are products with ones; in float16 and bf16 the
GELU is one of tanh.

On an H200, SwinIR-light, fold in float16, a block of one picture of 320 x 180 took 83 us (shifted 87),
of sixteen 69 (74) each, when a warp had 9,510 instructions for a window (shifted 9,678) instead of 5,382
(5,401); with tiles of heads it was 200, and 164 of sixteen. Registers are scarce: with 168 of a thread
three programs share a processor instead of two. (With 128 and without `unroll` four do, for 5 % more
instructions and a spill of 72 bytes: not measured.) So x is read again after the heads, and addresses
are computed again there (`later`). Integers are slower than fold: their rotations are six products of
bf16 each, three where the matrix is exact in bf16.

Windows are counted in 32 bits. No gradients: for inference.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference, swin_block_tiles
from .dispatch import capability, flushes_halves, on_device_of, tl, triton, use_triton
from .reference import FoldedBlock, Grid, LayerNormWeights, QuantLayer, QuantWeight
from .reference.folded import LANES, TILE, flatten, tile_size, unflatten, units
from .reference.swin_block import check_block
from .swin_block_tiles import Constants

# Of `examples`: mode, type of matrices, C, heads, hidden, window, shift.
EXAMPLES = (
    ("fold", torch.float16, 60, 6, 120, 8, 0),
    ("fold", torch.float16, 60, 6, 120, 8, 4),
    ("fold", torch.float16, 32, 2, 128, 8, 4),
    ("fold", torch.float16, 96, 6, 192, 8, 4),
    ("fold", torch.float16, 60, 6, 120, 16, 8),
    ("integer", torch.float32, 60, 6, 120, 8, 0),
    ("integer", torch.float32, 60, 6, 120, 8, 4),
)
# Spills in bytes that are accepted for examples, None where one is not compiled. On sm_80 and sm_120
# operands in shared memory are read into registers before the loop over heads; integers spill 432 and
# 992 bytes there at most. The widths and windows beside SwinIR-light's are compiled for sm_90 alone, to keep
# the table short.
_SM_90_ALONE = {"cuda:80": None, "cuda:100": None, "cuda:120": None, "hip:gfx942": None}
SPILLS = {
    "fold 60 shifted": {"cuda:120": 48},
    "integer 60": {"cuda:80": None, "cuda:120": None},
    "integer 60 shifted": {"cuda:80": None, "cuda:120": None},
    "fold 32 to 128 shifted": _SM_90_ALONE,
    "fold 96 shifted": {**_SM_90_ALONE, "cuda:90": 88},
    "fold 60 shifted, windows of 16": _SM_90_ALONE,
}
WINDOWS = (4, 8, 16)
MOST_DOWN = 2**16 - 1  # of programs along the second and third axis of a launch
# Tokens of a program in windows of 16 x 16. 64 would spill 648 bytes at a width of 32 already.
ROWS_OF_16 = 32


@triton.jit
def _load_tokens(x_ptr, tokens, C: tl.constexpr):
    """Some tokens (M, WIDTH) in float32."""
    lane = tl.arange(0, C.width)[None, :]
    at = x_ptr + tokens.number.to(tl.int64)[:, None] * C.size + lane
    return tl.load(at, mask=lane < C.size, other=0.0).to(tl.float32)


@triton.jit
def _quant_swin_block_fwd_kernel(
    x_ptr,
    out_ptr,
    enter,
    inputs_ptr,
    limits_ptr,
    query,
    key,
    value,
    bias_ptr,
    token_ptr,
    scalars,
    merge,
    proj,
    middle,
    fc1,
    hidden,
    fc2,
    height,
    width,
    later,
    C: tl.constexpr,
):
    """x, out: (B, H, W, C); enter to fc2: as in FoldedBlock. This program does C.rows tokens of a
    window, whose others it needs for keys and values alone. later: 0, of which the compiler does not
    know; so it computes addresses again where they are needed, and has their registers until then."""
    TYPE: tl.constexpr = enter.weight.dtype.element_ty
    # Codes are exact in each of these; int8 and int8 make int32.
    HEAD_CODES: tl.constexpr = TYPE if TYPE.primitive_bitwidth == 16 else tl.bfloat16
    QUERY: tl.constexpr = tl.float16 if tl.float16 == TYPE else tl.float32
    CODES: tl.constexpr = tl.int8 if query.weight.dtype.element_ty == tl.int8 else HEAD_CODES
    N: tl.constexpr = C.window * C.window
    ROWS: tl.constexpr = C.rows
    INNER: tl.constexpr = C.width_inner
    PARTS: tl.constexpr = N // ROWS
    SLICES: tl.constexpr = N // C.slice
    left = tl.program_id(0) // PARTS
    token = tl.arange(0, N)
    row = tl.program_id(0) % PARTS * ROWS + tl.arange(0, ROWS)
    tokens = swin_block_tiles.locate(token, left, height, width, C)
    rows = swin_block_tiles.locate(row, left, height, width, C)

    x = swin_block_tiles.normalize(_load_tokens(x_ptr, tokens, C), C.eps1, C)
    t = swin_block_tiles.linear(x.to(TYPE), enter, C.width, C.width)
    k_in = swin_block_tiles.input_codes(t, inputs_ptr, limits_ptr, 1, C, CODES)
    v_in = swin_block_tiles.input_codes(t, inputs_ptr, limits_ptr, 2, C, CODES)
    if PARTS > 1:
        x = swin_block_tiles.normalize(_load_tokens(x_ptr, rows, C), C.eps1, C)
        t = swin_block_tiles.linear(x.to(TYPE), enter, C.width, C.width)
    q_in = swin_block_tiles.input_codes(t, inputs_ptr, limits_ptr, 0, C, CODES)

    k = swin_block_tiles.heads_codes(k_in, key, scalars, 1, C, HEAD_CODES)
    v = swin_block_tiles.heads_codes(v_in, value, scalars, 2, C, HEAD_CODES)
    q = swin_block_tiles.heads_codes(q_in, query, scalars, 0, C, QUERY)
    query_zero = swin_block_tiles.load_lanes(scalars.query_zero, 0, C)
    q = swin_block_tiles.parts(swin_block_tiles.with_zero_point(q, query_zero, C), TYPE)
    y = tl.zeros((ROWS, INNER), tl.float32)
    if SLICES == 1:
        rotation = token_ptr
        if rotation is not None:
            rotation = swin_block_tiles.load_rotation(token_ptr, 0, C)
        turned = swin_block_tiles.turn(rotation, v, scalars, C).to(TYPE)
        y = swin_block_tiles.add_row_sum(turned, y)
    else:
        for first in tl.range(0, N, C.slice, num_stages=1, disable_licm=True):
            rotation = swin_block_tiles.load_rotation(token_ptr, first, C)
            turned = swin_block_tiles.turn(rotation, v, scalars, C).to(TYPE)
            y = swin_block_tiles.add_row_sum(turned, y)
    y *= swin_block_tiles.load_lanes(scalars.attention_zero, 0, C)

    if C.shift > 0:
        bias_ptr += tokens.kind * (C.heads * N * N)
    lane = tl.arange(0, INNER)[None, :]
    for head in tl.range(0, C.heads, num_stages=C.stages, disable_licm=True):
        scale = swin_block_tiles.load_scalar(scalars.scores, 0, head, C)
        s = tl.load(bias_ptr + head * N * N + row[:, None] * N + token[None, :])
        inside = tl.where(lane // C.d == head, 1.0, 0.0)
        for part in tl.static_range(len(q)):
            s = swin_block_tiles.add_product(
                swin_block_tiles.chosen(q[part], inside), tl.trans(k), s
            )
        p, share = swin_block_tiles.softmax(s, scale, C.fast)
        o = tl.zeros((ROWS, INNER), tl.float32)
        if SLICES == 1:
            codes = swin_block_tiles.rotated_codes(
                p, share, rotation, scalars, head, C, TYPE, HEAD_CODES
            )
            o = swin_block_tiles.add_product(codes, turned, o)
        else:
            for first in tl.range(0, N, C.slice, num_stages=1, disable_licm=True):
                rotation = swin_block_tiles.load_rotation(token_ptr, first, C)
                codes = swin_block_tiles.rotated_codes(
                    p, share, rotation, scalars, head, C, TYPE, HEAD_CODES
                )
                turned = swin_block_tiles.turn(rotation, v, scalars, C)
                o = swin_block_tiles.add_product(codes, turned.to(TYPE), o)
        y += o * inside

    y *= swin_block_tiles.load_lanes(scalars.attention, 0, C)
    y = swin_block_tiles.with_ones(y, C.inner, C)
    y = swin_block_tiles.linear(y.to(TYPE), merge, INNER, INNER, UNIT=C.unit)
    codes = swin_block_tiles.to_codes_of(y, limits_ptr, 3, C.inner, CODES, C.fast)
    # Read again, so that the loop above has more registers.
    rows = swin_block_tiles.locate(row + later, left, height, width, C)
    x = _load_tokens(x_ptr, rows, C)
    x += swin_block_tiles.linear(codes, proj, C.width, INNER, later) * (1 / C.unit)
    x = swin_block_tiles.mlp(x, middle, fc1, hidden, fc2, limits_ptr, C, TYPE, CODES, later)
    rows = swin_block_tiles.locate(row + 2 * later, left, height, width, C)
    column = tl.arange(0, C.width)[None, :]
    to = out_ptr + rows.number.to(tl.int64)[:, None] * C.size + column
    tl.store(to, x.to(out_ptr.dtype.element_ty), mask=column < C.size)


# --- Host ----------------------------------------------------------------------------------------


def _constants(folded: FoldedBlock, capability: int | None) -> Constants:
    size, inner, hidden = folded.sizes
    integer, half = folded.mode == "integer", folded.enter.weight.dtype.itemsize == 2
    unit, of_value = units(folded)
    ones = folded.enter.bias is None
    # All hidden channels at once, where their registers allow it.
    width, columns = tile_size(size), tile_size(hidden)
    whole = half and columns <= max(TILE, 2 * width)
    return Constants(
        heads=folded.heads,
        window=folded.window,
        shift=folded.shift,
        size=size,
        inner=inner,
        hidden=hidden,
        d=inner // folded.heads,
        width=width,
        width_inner=tile_size(inner),
        width_hidden=min(columns, 64 if whole else TILE),
        columns_hidden=columns,
        end_hidden=hidden + LANES * ones,
        rows=folded.window**2 if folded.window < 16 else ROWS_OF_16,
        slice=folded.window**2 if folded.token is None else min(64, folded.window**2),
        # With more integers spill 128 bytes on sm_90.
        chunk=columns if whole else 16 if integer else 32,
        # With more channels, or biases in vectors, more spills then.
        unroll=2 if ones and size <= 64 else 1,
        stages=2 if half and folded.window < 16 else 1,
        unit=unit,
        raised=of_value / unit,
        ones=ones,
        fast=half and (capability or 0) >= 8,
        shared=len(folded.scalars.scores) == 1,
        eps1=folded.eps[0],
        eps2=folded.eps[1],
    )


def _options(constants: Constants, capability: int | None) -> dict[str, int]:
    """Four warps, one group of wgmma: eight are slower (a window takes 1.6 times as long on an H200). A
    window of 16 x 16 has four times the keys and values and needs eight."""
    if constants.window == 16:
        return {"num_warps": 8}
    three = capability == 9 and constants.fast and constants.width <= 64
    return {"num_warps": 4, **({"maxnreg": 168} if three else {})}


def _forward(x: Tensor, folded: FoldedBlock) -> Tensor:
    out = x.new_empty(x.shape)
    if out.numel() == 0:
        return out
    x = x.contiguous()
    batch, height, width, _ = x.shape
    of_device = capability(x.device)
    constants = _constants(folded, of_device)
    across = width // folded.window * (folded.window**2 // constants.rows)
    with on_device_of(x):
        _quant_swin_block_fwd_kernel[(across, height // folded.window, batch)](
            x,
            out,
            folded.enter,
            folded.inputs,
            folded.limits,
            folded.query,
            folded.key,
            folded.value,
            folded.bias,
            folded.token,
            folded.scalars,
            folded.merge,
            folded.proj,
            folded.middle,
            folded.fc1,
            folded.hidden,
            folded.fc2,
            height,
            width,
            0,
            C=constants,
            **_options(constants, of_device),
        )
    return out


# --- Operator ------------------------------------------------------------------------------------


@torch.library.custom_op("compsrt::quant_swin_block", mutates_args=(), device_types=("cpu", "cuda"))
def _quant_swin_block(
    x: Tensor,
    tensors: Sequence[Tensor],
    present: Sequence[bool],
    numbers: Sequence[int],
    eps: Sequence[float],
) -> Tensor:
    folded = unflatten(tensors, present, numbers, eps)
    try:
        return _forward(x, folded)
    except triton.OutOfResources as error:
        # Known once it is compiled, before anything is launched.
        warnings.warn(
            f"quant_swin_block: {error.required} bytes of {error.name} for {x.shape[3]} channels are"
            f" more than the {error.limit} of {x.device}; such blocks run as PyTorch's products",
            stacklevel=2,
        )
        _TOO_LARGE.add(_launch(folded))
        return reference.quant_swin_block(x, folded)


@_quant_swin_block.register_fake
def _(x, tensors, present, numbers, eps):
    return x.new_empty(x.shape)


_TOO_LARGE: set[tuple[torch.device, torch.dtype, Constants]] = set()  # for these devices


def _launch(folded: FoldedBlock) -> tuple[torch.device, torch.dtype, Constants]:
    """What the size of a launch depends on."""
    device = folded.bias.device
    return device, folded.enter.weight.dtype, _constants(folded, capability(device))


def fits(folded: FoldedBlock) -> bool:
    """Whether the kernel holds such a block, on the device where it is, as far as is known."""
    if _TOO_LARGE and not torch.compiler.is_compiling() and _launch(folded) in _TOO_LARGE:
        return False
    if folded.enter.weight.dtype == torch.float16 and flushes_halves(folded.bias.device):
        return False
    return folded.window in WINDOWS and max(folded.sizes[:2]) <= TILE


def has_kernel(x: Tensor, folded: FoldedBlock) -> bool:
    """Whether the kernel does a block of such tokens, and not the reference."""
    return use_triton(x) and fits(folded)


def quant_swin_block(x: Tensor, folded: FoldedBlock) -> Tensor:
    """A whole quantized Swin block at inference.

    x: (B, H, W, C), the residual stream, H and W multiples of the window, float32, float16 or
    bfloat16 (float64 by the reference); folded: what `fold_block` made of the block. Returns x's
    shape and type. What the kernel does not hold, windows other than 4, 8 and 16 and more than 128
    channels, the reference does. Raises ValueError for an x that does not fit or needs gradients.
    """
    check_block(x, folded)
    if not has_kernel(x, folded):
        return reference.quant_swin_block(x, folded)
    down = x.shape[1] // folded.window
    if x.shape[:3].numel() >= 2**31 or max(x.shape[0], down) > MOST_DOWN:
        raise ValueError(
            f"x: no kernel for {tuple(x.shape)}; split it below 2^31 tokens, and {MOST_DOWN + 1} pictures"
            " and rows of windows"
        )
    return _quant_swin_block(x, *flatten(folded))


def examples():
    """Calls that `aot.py` compiles the kernel of, and the targets that it leaves out."""
    one = torch.ones(())
    grid = Grid(-one, one, None, None, 4)

    def layer(size: int, out: int, transform: bool = True) -> QuantLayer:
        mask = torch.ones(out, size, dtype=torch.bool)
        mask[0, 0] = False
        weight = QuantWeight(torch.zeros(out, size), grid, mask)
        return QuantLayer(grid, weight, torch.zeros(out), torch.eye(size) if transform else None)

    for mode, dtype, size, heads, hidden, window, shift in EXAMPLES:
        norm = LayerNormWeights(torch.ones(size), torch.zeros(size))
        folded = reference.fold_block(
            [layer(size, size, False)] * 3,
            layer(size, size),
            layer(size, hidden),
            layer(hidden, size),
            torch.zeros((2 * window - 1) ** 2, heads),
            [grid] * 4,
            norms=(norm, norm),
            heads=heads,
            window=window,
            shift=shift,
            scale=(size // heads) ** -0.5,
            rotation=torch.eye(size),
            token_rotation=torch.eye(window**2),
            mode=mode,
            dtype=dtype,
        )
        x = torch.empty(1, 64, 64, size)
        ratio = hidden // size
        label = f"{mode} {size}" + f" to {hidden}" * (ratio != 2) + " shifted" * (shift > 0)
        label += f", windows of {window}" * (window != 8)
        yield label, lambda x=x, folded=folded: _forward(x, folded), SPILLS.get(label, {})
