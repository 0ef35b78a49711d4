"""A quantized Swin block at inference, all its transforms folded into matrices beforehand.

`fold_block` does in float64, once, what does not depend on the tokens; `quant_swin_block` is what is left:

    t = n(x) E + e            n: layer norm without weight and bias; E = diag(gamma) P, e = beta P
    a_i = code(t / s_i - z_i)                    i = q, k, v: one rotated tensor, three quantizers
    q, k, v = code(a_i Wi + bi)                  also Rh, Rv, head_dim^-0.5 and the grids of q, k, v
    S = s_qk (q + z_q) k^T + bias + mask         a head; k's zero point moves whole rows of S: no softmax sees it
    A = code(softmax(S) T / s_A - z_A)
    O = s_A (A + z_A) (T^T (v + z_v))
    p = code(sum over heads of O_h M_h + m)      M_h: rows of blockdiag(Rv^T) P_proj with s_v and 1/s
    x = x + p Wp + bp
    x = x + code(GELU(code(n(x) E' + e') W1 + b1) P' + p') W2 + b2

code(t) = clamp(round_half_even(t), low, high). A code is signed here: 2^(bits - 1) less than that of
the quantizer, so that those of all widths fit an int8; zero points z = Z/s count from there. low and
high are what the bounds leave of the range where alpha and beta are not 0. W is what the quantized,
masked weight comes to, times all that an input's scale, a head's rotation or an output's grid add.

"fold" keeps every matrix in a floating type. "integer" keeps the weights' codes as int8: with a the
codes of an input, c of a weight, m its mask (c is 0 where m is) and out channels n,

    a Wn + bn = scale_n (a . c_n) + zero_n (a . m_n) + bn

whose products are whole numbers; a head's rotation then follows as a product of its own.

On a CPU the windows go through the block some at a time, so that what lies between two products
stays in the cache; windows that need the same mask go together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import LayerNormWeights, QuantLayer, QuantWeight, check_weight, shape_of
from .quantize import Grid, _sides, check_quantizer, quantize_codes, step_and_zero
from .windows import kinds_of_windows, relative_bias, shift_mask, window_order

MODES = ("fold", "integer")
HEAD_SITES = ("query", "key", "value", "attention")
SITES = ("q", "k", "v", "query", "key", "value", "attention", "proj", "fc1", "fc2")
# Of the scores on a CPU that are held at a time, times the number of threads.
SCORES_AT_ONCE = 2**19


class FoldedLinear(NamedTuple):
    """x -> x weight^T + bias, or, with a weight of codes, what the module says of "integer".

    weight: (N, K), floating or int8; bias: (N,). Of codes alone: scale, zero: (N,); mask: (N, K)
    int8, None where nothing is pruned; rotation: (heads, d, d), what each head is multiplied by
    before the bias is added, or None.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    mask: Tensor | None = None
    rotation: Tensor | None = None

    def floating(self, dtype: torch.dtype) -> FoldedLinear:
        """The same with a floating weight and no more than that and a bias."""
        weight = self.weight.to(dtype)
        if self.scale is not None:
            assert self.zero is not None
            mask = 1 if self.mask is None else self.mask.to(dtype)
            weight = weight * self.scale.to(dtype)[:, None] + mask * self.zero.to(dtype)[:, None]
            if self.rotation is not None:
                by_head = weight.unflatten(0, self.rotation.shape[:2])
                weight = (self.rotation.to(dtype).mT @ by_head).flatten(0, 1)
        return FoldedLinear(weight, self.bias.to(dtype))


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
    """All that `quant_swin_block` needs beside its tokens; `fold_block` makes it."""

    enter: FoldedLinear  # (C, C), of normalized tokens
    inputs: Tensor  # (3, 2): 1/s and z of the inputs of q, k and v
    limits: Tensor  # (6, 2): lowest and highest code of the inputs of q, k, v, proj, fc1 and fc2
    query: FoldedLinear  # (heads * d, C)
    key: FoldedLinear
    value: FoldedLinear
    table: Tensor  # (heads, (2 window - 1)^2), the relative-position bias
    token: Tensor | None  # (N, N): T^T
    scalars: HeadScalars
    merge: FoldedLinear  # (C', heads * d), to the codes of proj's input
    proj: FoldedLinear  # (C, C')
    middle: FoldedLinear  # (C, C), of normalized tokens, to the codes of fc1's input
    fc1: FoldedLinear  # (hidden, C)
    hidden: FoldedLinear  # (hidden, hidden), to the codes of fc2's input
    fc2: FoldedLinear  # (C, hidden)
    mode: str
    heads: int
    window: int
    shift: int
    eps: tuple[float, float]  # of the two layer norms
    bits: tuple[int, ...]  # of SITES
    ranges: tuple[tuple[int, int], ...]  # lowest and highest code of SITES, of any head


# --- Folding -------------------------------------------------------------------------------------


class _Site(NamedTuple):
    """A quantizer in float64: v is about scale * (code + zero), codes low to high."""

    scale: Tensor
    zero: Tensor
    low: Tensor
    high: Tensor
    bits: int


def _site(grid: Grid, name: str, shape: Sequence[int] = ()) -> _Site:
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
    middle = 2 ** (grid.bits - 1)
    parts = scale, zero / scale + middle, low.round() - middle, high.round() - middle
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
    mode: str,
    *,
    rotation: Tensor | None = None,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
) -> FoldedLinear:
    """A layer of the codes of `site`, in float64: y = (W^ x + bias) by head times rotation, over
    scale, less zero. rotation: (heads, d, d); scale, zero: (N,)."""
    weight = _weight(layer.weight, name, shape)
    bias = weight.sum(1) * (site.scale * site.zero)
    if layer.bias is not None:
        bias = bias + layer.bias.detach().double()
    weight = weight * site.scale
    if rotation is not None:
        bias = (bias.unflatten(0, rotation.shape[:2])[:, None] @ rotation).flatten()
    scale = torch.ones_like(bias) if scale is None else scale
    bias = bias / scale - (0 if zero is None else zero)
    if mode == "fold":
        if rotation is not None:
            by_head = weight.unflatten(0, rotation.shape[:2])
            weight = (rotation.mT @ by_head).flatten(0, 1)
        return FoldedLinear(weight / scale[:, None], bias)
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

    Computed in float64. Raises ValueError for what a folded block cannot be: padded transforms
    (more columns than rows), unclamped codes, and, as integers, weights with a scale for less than
    an output channel.
    """
    if mode not in MODES:
        raise ValueError(f"mode: {mode!r} is unknown; one of {', '.join(MODES)}")
    if mode == "integer" and dtype.itemsize < 4:
        raise ValueError(f"dtype: {dtype} is too coarse for codes that are exact; use float32")
    if len(qkv) != 3 or len(grids) != 4:
        raise ValueError("qkv, grids: pass three layers and four grids")
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

    inputs = [_site(layer.grid, name) for layer, name in zip(qkv, SITES, strict=False)]
    sites = [_site(grid, name, (heads,)) for grid, name in zip(grids, SITES[3:7], strict=True)]
    query, key, value, attention = sites
    last = [_site(layer.grid, f) for layer, f in zip((proj, fc1, fc2), SITES[7:], strict=True)]

    def by_channel(of_heads: Tensor) -> Tensor:
        return of_heads.expand(heads).repeat_interleave(d)

    layers = []
    for i, (turn, turned) in enumerate(
        ((head, head_rotation), (head, head_rotation), (of_value, value_rotation))
    ):
        layers.append(
            _linear(
                qkv[i],
                inputs[i],
                SITES[i],
                (inner, size),
                mode,
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
        bias = torch.as_tensor(bias, device=table.device) / site.scale - site.zero
        return FoldedLinear((matrix / site.scale).mT, bias.expand(matrix.shape[1]))

    gammas = [norm.weight.detach().double() for norm in norms]
    betas = [norm.bias.detach().double() for norm in norms]
    block = FoldedBlock(
        enter=FoldedLinear((gammas[0][:, None] * enter).mT, betas[0] @ enter),
        inputs=torch.stack([torch.cat([1 / s.scale, s.zero]) for s in inputs]),
        limits=torch.stack([torch.cat([s.low, s.high]) for s in (*inputs, *last)]),
        query=layers[0],
        key=layers[1],
        value=layers[2],
        table=table.detach().mT,
        token=None if token_rotation is None else token.mT,
        scalars=scalars,
        merge=to_codes(merge, 0.0, last[0]),
        proj=_linear(proj, last[0], "proj", (size, inner), mode),
        middle=to_codes(gammas[1][:, None] * before_fc1, betas[1] @ before_fc1, last[1]),
        fc1=_linear(fc1, last[1], "fc1", (hidden, size), mode),
        hidden=to_codes(before_fc2, 0.0, last[2]),
        fc2=_linear(fc2, last[2], "fc2", (size, hidden), mode),
        mode=mode,
        heads=heads,
        window=window,
        shift=shift,
        eps=(norms[0].eps, norms[1].eps),
        bits=tuple(s.bits for s in (*inputs, *sites, *last)),
        ranges=tuple((int(s.low.min()), int(s.high.max())) for s in (*inputs, *sites, *last)),
    )
    return _stored(block, dtype)


def _stored(block: FoldedBlock, dtype: torch.dtype) -> FoldedBlock:
    """Matrices in dtype, vectors in float32 at least, codes as they are."""
    wide = torch.float32 if dtype.itemsize < 4 else dtype

    def linear(part: FoldedLinear) -> FoldedLinear:
        weight = part.weight.to(dtype if part.weight.is_floating_point() else torch.int8)
        vectors = (part.bias, part.scale, part.zero, part.rotation)
        vectors = [t if t is None else t.to(wide).contiguous() for t in vectors]
        bias, scale, zero, rotation = vectors
        assert bias is not None
        return FoldedLinear(weight.contiguous(), bias, scale, zero, part.mask, rotation)

    linears = {k: linear(v) for k, v in block._asdict().items() if isinstance(v, FoldedLinear)}
    return block._replace(
        **linears,
        inputs=block.inputs.to(wide),
        limits=block.limits.to(wide),
        table=block.table.to(wide).contiguous(),
        token=None if block.token is None else block.token.to(dtype).contiguous(),
        scalars=HeadScalars._make(t.to(wide).contiguous() for t in block.scalars),
    )


# --- Running -------------------------------------------------------------------------------------


def check_block(x: Tensor, folded: FoldedBlock) -> None:
    """Raise ValueError unless x is tokens of this block."""
    size = len(folded.fc2.bias)
    if x.dim() != 4 or x.shape[3] != size or not x.is_floating_point():
        raise ValueError(
            f"x: {tuple(x.shape)} of {x.dtype} is not (B, H, W, {size}) in a floating type"
        )
    if x.shape[1] % folded.window or x.shape[2] % folded.window:
        raise ValueError(
            f"x: a height of {x.shape[1]} and width of {x.shape[2]} are not both multiples of the"
            f" window of {folded.window}; pad the picture"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "x: a folded block has no gradients; call it under torch.no_grad(), or train the block"
            " that it was made of"
        )
    if x.device != folded.table.device:
        raise ValueError(f"folded: it is on {folded.table.device}; move it to x's {x.device}")


class _Operands(NamedTuple):
    """What a call makes of a FoldedBlock once for all windows, in the type it computes in."""

    folded: FoldedBlock  # with floating weights
    enter: Tensor  # (3, C, C) and (3, 1, C), for inputs of q, k and v
    enter_bias: Tensor
    turn: Tensor | None  # T, and what makes codes of probabilities, but for grids of each head
    token: Tensor | None
    scalars: list[Tensor]  # as in HeadScalars, to be multiplied with (windows, heads, ...)
    score_shift: Tensor


def _prepare(folded: FoldedBlock, dtype: torch.dtype) -> _Operands:
    turn = token = None if folded.token is None else folded.token.to(dtype).mT
    linears = {
        k: v.floating(dtype) for k, v in folded._asdict().items() if isinstance(v, FoldedLinear)
    }
    inverse, zero = folded.inputs.to(dtype).T[..., None]
    scalars = [t.to(dtype).view(*t.shape[:-1], -1, 1, 1) for t in folded.scalars]
    query_zero, scores, _, _, inverse_attention, attention_zero = scalars[:6]
    if token is not None and attention_zero.numel() == 1:
        # The rows of a softmax sum to 1: a zero point is as well taken from T.
        token = token * inverse_attention[0] - attention_zero[0]
    enter = linears["enter"]
    return _Operands(
        folded._replace(**linears),
        (enter.weight * inverse[..., None]).mT,
        (enter.bias * inverse - zero)[:, None],
        turn,
        token,
        scalars,
        query_zero * scores,
    )


def _to_codes(t: Tensor, operands: _Operands, site: str) -> Tensor:
    """The codes of t, overwriting it. t: (windows, heads, ..., ...) where heads have ranges."""
    if site in HEAD_SITES and operands.scalars[0].numel() > 1:
        low, high = (bound[HEAD_SITES.index(site)] for bound in operands.scalars[6:])
        return t.round_().clamp_(low, high)
    return t.round_().clamp_(*operands.folded.ranges[SITES.index(site)])


def _windows(x: Tensor, operands: _Operands, bias: Tensor) -> Tensor:
    """The block on the tokens of whole windows, (windows * N, C); bias (heads, N, N) of scores.

    q, k, v and what attention makes of them are (windows, heads, d, N): a product of a window's
    tokens with a weight gives them so, and no head is ever copied.
    """
    folded = operands.folded
    heads, n, size = folded.heads, folded.window**2, x.shape[1]
    count = len(x) // n
    _, scores, value_zero, attention, inverse, attention_zero = operands.scalars[:6]
    normed = F.layer_norm(x, (size,), eps=folded.eps[0])
    codes = torch.baddbmm(operands.enter_bias, normed.expand(3, -1, -1), operands.enter)
    of_heads = []
    for i, layer in enumerate((folded.query, folded.key, folded.value)):
        tokens = _to_codes(codes[i], operands, SITES[i]).view(count, n, size)
        weight = layer.weight.expand(count, -1, -1)
        y = torch.baddbmm(layer.bias[:, None], weight, tokens.mT)
        y = y.view(count, heads, -1, n)
        of_heads.append(_to_codes(y, operands, HEAD_SITES[i]))
    q, k, v = of_heads
    q = q.mul_(scores).add_(operands.score_shift)
    p = torch.bmm(q.flatten(0, 1).mT, k.flatten(0, 1)).view(count, heads, n, n)
    p = p.add_(bias).softmax(-1)
    v = v.add_(value_zero).mul_(attention)
    if operands.token is None:
        p = p.mul_(inverse).sub_(attention_zero)
    else:
        v = v @ operands.turn
        p = p @ operands.token
        if attention_zero.numel() > 1:
            p = p.mul_(inverse).sub_(attention_zero)
    p = _to_codes(p, operands, "attention").flatten(0, 1)
    v = v.flatten(0, 1)
    # The zero point of A adds so much of the sum of each row of v to every token.
    rest = (v.sum(-1, keepdim=True).view(count, heads, -1, 1) * attention_zero).flatten(0, 1)
    y = torch.baddbmm(rest, v, p.mT).view(count, -1, n).mT  # (windows, N, heads * d)
    merge = folded.merge.weight.mT
    y = torch.baddbmm(folded.merge.bias, y, merge.expand(count, -1, -1)).flatten(0, 1)
    x = x.add_(folded.proj.bias).addmm_(_to_codes(y, operands, "proj"), folded.proj.weight.mT)
    y = F.linear(F.layer_norm(x, (size,), eps=folded.eps[1]), *folded.middle[:2])
    y = F.gelu(F.linear(_to_codes(y, operands, "fc1"), *folded.fc1[:2]))
    y = _to_codes(F.linear(y, *folded.hidden[:2]), operands, "fc2")
    return x.add_(folded.fc2.bias).addmm_(y, folded.fc2.weight.mT)


@torch.no_grad()
def quant_swin_block(x: Tensor, folded: FoldedBlock) -> Tensor:
    """A quantized Swin block, x (B, H, W, C) in any floating type; returns x's shape and type.

    Half types are computed in float32. No gradients. Raises ValueError for an x that does not fit.
    """
    check_block(x, folded)
    dtype = torch.float32 if x.dtype.itemsize < 4 else x.dtype
    operands = _prepare(folded, dtype)
    window, shift, n = folded.window, folded.shift, folded.window**2
    batch, height, width, size = x.shape
    order = window_order(batch, height, width, window, shift, x.device)
    counts = kinds_of_windows(batch, height, width, window, shift)
    tokens = x.reshape(-1, size)
    out = torch.empty_like(tokens)
    bias = relative_bias(folded.table.mT.to(dtype), window)
    biases = [bias]
    if shift:  # of the four kinds of windows
        biases = bias + shift_mask(2 * window, 2 * window, window, shift, x.device, dtype)[:, None]
    most = len(order)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        most = max(1, SCORES_AT_ONCE * torch.get_num_threads() // (folded.heads * n * n))
    start = 0
    for kind, count in enumerate(counts):
        for first in range(start, start + count, most):
            rows = order[first * n : min(first + most, start + count) * n]
            done = _windows(tokens.index_select(0, rows).to(dtype), operands, biases[kind])
            out.index_copy_(0, rows, done.to(x.dtype))
        start += count
    return out.view(x.shape)
