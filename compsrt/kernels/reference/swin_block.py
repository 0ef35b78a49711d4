"""A quantized Swin block at inference, all its transforms folded into matrices beforehand.

`fold_block` (folding.py) does in float64, once, what does not depend on the tokens; what is left is
`quant_swin_block`:

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
the quantizer, so that those of all widths fit an int8; where matrices are float16 it counts from low.
Zero points z = Z/s count from there. low and high are what the bounds leave of the range where alpha and
beta are not 0. W is what the quantized, masked weight comes to, times all that an input's scale, a
head's rotation or an output's grid add.

"fold" keeps every matrix in a floating type. "integer" keeps the weights' codes as int8: with a the
codes of an input, c of a weight, m its mask (c is 0 where m is) and out channels n,

    a Wn + bn = scale_n (a . c_n) + zero_n (a . m_n) + bn

whose products are whole numbers; a head's rotation then follows as a product of its own.

On a CPU the windows go through the block some at a time, so that what lies between two products
stays in the cache; windows that need the same mask lie together.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .folded import HEAD_SITES, SITES, FoldedBlock, plain
from .windows import kinds_of_windows, window_order

# Of the scores on a CPU that are held at a time, for each thread. Of 2^16 to 2^22 this and 2^19 were
# fastest (60 channels, 6 heads, 96 x 160 tokens; one thread of a busy AMD EPYC with 1 MiB of L2).
SCORES_AT_ONCE = 2**20


def check_block(x: Tensor, folded: FoldedBlock) -> None:
    """Raise ValueError unless x is tokens of this block."""
    size = folded.sizes[0]
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
    if x.device != folded.bias.device:
        raise ValueError(f"folded: it is on {folded.bias.device}; move it to x's {x.device}")


class _Operands(NamedTuple):
    """What a call makes of a FoldedBlock once for all windows, in the type it computes in."""

    folded: FoldedBlock  # without units
    linears: dict[str, tuple[Tensor, Tensor]]  # weight and bias of each of LINEARS
    inverse: Tensor  # 1/s and -z of the inputs of q, k and v, each (3, 1, 1)
    zero: Tensor
    turn: Tensor | None  # T, and what makes codes of probabilities, but for grids of each head
    token: Tensor | None
    scalars: list[Tensor]  # as in HeadScalars, to be multiplied with (windows, heads, ...)
    score_shift: Tensor


def _prepare(folded: FoldedBlock, dtype: torch.dtype) -> _Operands:
    folded, linears = plain(folded, dtype)
    turn = token = None if folded.token is None else folded.token.to(dtype).mT
    inverse, zero = folded.inputs.to(dtype).T[..., None, None]
    scalars = [t.to(dtype).view(*t.shape[:-1], -1, 1, 1) for t in folded.scalars]
    query_zero, scores, _, _, inverse_attention, attention_zero = scalars[:6]
    if token is not None and attention_zero.numel() == 1:
        # The rows of a softmax sum to 1: a zero point is as well taken from T.
        token = token * inverse_attention[0] - attention_zero[0]
    return _Operands(
        folded,
        linears,
        inverse,
        -zero,
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


def _windows(x: Tensor, operands: _Operands, biases: list[tuple[slice, Tensor]]) -> Tensor:
    """The block on the tokens of whole windows, (windows * N, C); biases: of scores, (heads, N, N),
    each with the windows that it is for.

    q, k, v and what attention makes of them are (windows, heads, d, N): a product of a window's
    tokens with a weight gives them so, and no head is ever copied.
    """
    folded, linears = operands.folded, operands.linears
    heads, n, size = folded.heads, folded.window**2, x.shape[1]
    count = len(x) // n
    _, scores, value_zero, attention, inverse, attention_zero = operands.scalars[:6]
    normed = F.layer_norm(x, (size,), eps=folded.eps[0])
    codes = torch.addcmul(operands.zero, F.linear(normed, *linears["enter"]), operands.inverse)
    of_heads = []
    for i, name in enumerate(HEAD_SITES[:3]):
        tokens = _to_codes(codes[i], operands, SITES[i]).view(count, n, size)
        weight, bias = linears[name]
        y = torch.baddbmm(bias[:, None], weight.expand(count, -1, -1), tokens.mT)
        y = y.view(count, heads, -1, n)
        of_heads.append(_to_codes(y, operands, name))
    q, k, v = of_heads
    q = q.mul_(scores).add_(operands.score_shift)
    p = torch.bmm(q.flatten(0, 1).mT, k.flatten(0, 1)).view(count, heads, n, n)
    for some, bias in biases:
        p[some].add_(bias)
    p = p.softmax(-1)
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
    weight, bias = linears["merge"]
    y = torch.baddbmm(bias, y, weight.mT.expand(count, -1, -1)).flatten(0, 1)
    weight, bias = linears["proj"]
    x = x.add_(bias).addmm_(_to_codes(y, operands, "proj"), weight.mT)
    y = F.linear(F.layer_norm(x, (size,), eps=folded.eps[1]), *linears["middle"])
    y = F.gelu(F.linear(_to_codes(y, operands, "fc1"), *linears["fc1"]))
    y = _to_codes(F.linear(y, *linears["hidden"]), operands, "fc2")
    weight, bias = linears["fc2"]
    return x.add_(bias).addmm_(y, weight.mT)


@torch.no_grad()
def quant_swin_block(x: Tensor, folded: FoldedBlock) -> Tensor:
    """A quantized Swin block, x (B, H, W, C) in any floating type; returns x's shape and type.

    Half types are computed in float32, under autocast too. No gradients. Raises ValueError for an x
    that does not fit.
    """
    check_block(x, folded)
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return quant_swin_block(x, folded)
    dtype = torch.float32 if x.dtype.itemsize < 4 else x.dtype
    operands = _prepare(folded, dtype)
    window, shift, n = folded.window, folded.shift, folded.window**2
    batch, height, width, size = x.shape
    order = window_order(batch, height, width, window, shift, x.device)
    counts = kinds_of_windows(batch, height, width, window, shift)
    tokens = x.reshape(-1, size)
    out = torch.empty_like(tokens)
    biases = operands.folded.bias.to(dtype) * operands.scalars[1]
    total = len(order) // n
    most = total
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        most = max(1, SCORES_AT_ONCE * torch.get_num_threads() // (folded.heads * n * n))
    most = -(-total // -(-total // most)) if total else 1  # as even as can be
    ends = list(itertools.accumulate(counts))
    for first in range(0, total, most):
        last = min(first + most, total)
        inside = [
            (slice(max(end - count, first) - first, min(end, last) - first), bias)
            for end, count, bias in zip(ends, counts, biases, strict=False)
            if end > first and end - count < last
        ]
        rows = order[first * n : last * n]
        done = _windows(tokens.index_select(0, rows).to(dtype), operands, inside)
        out.index_copy_(0, rows, done.to(x.dtype))
    return out.view(x.shape)
