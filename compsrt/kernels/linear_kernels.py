"""The kernels of linear layers with quantized, pruned weights; `linear.py` has the public functions.

    h = norm(x)    v = h R    x^ = fq(v)    W^ = mask * fq(W~)
    z = x^ W^^T + bias    y = GELU(z) + residual          all but the product optional

x: (rows, K); R: (K, K'); W~: (N, K'). A program of the forward takes some rows: v is summed up
over chunks of K, and y is written in chunks of N, for each of which the weight is quantized, or
unpacked, on the fly. So a program holds no more than the tile v (rows, K') and one chunk.

Only x, the weights and the scalars are kept for the backward. With g the gradient of y:

    g_z = g GELU'(z)    dv^ = g_z W^    dv, sums = those of fq    dh = dv R^T    dx = that of norm
    dW^ = g_z^T x^    dbias = sum g_z    dW~, sums = those of fq

The first line is one kernel with the grid of the forward, which computes v and z again. The way
back through the norm, dx = (gamma dh - c1 - x~ c2)/sigma with x~ = (x - mean)/sigma, needs two
means over a row of dh, which is written in chunks; but both are sums over the tile dv as well,

    c1 = mean(gamma dh) = dv . (gamma R)/K        c2 = mean(gamma dh x~) = dv . (v - beta R)/K

The second line is a persistent kernel: a program holds one block of dW^ (some of N, K') in registers
while it loops over its share of the rows, with v and z computed again, and writes its part. A third
kernel adds the parts up and goes through the weight's quantizer, and that of `fake_quant.py` adds
up the sums of both quantizers. No atomics and a fixed order everywhere, so two runs give the same
bits; no value is read by the host, so a CUDA graph can capture all.
One kernel for both lines would hold dW^, the weight and three tiles at once: in float32, three
bf16 parts a product, that is more than the 64 KiB of shared memory of gfx942.

K and K' are at most 128; N is any.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import tiles
from .dispatch import on_device_of, processors, tl, triton
from .fake_quant import sum_parts
from .linear_tiles import (
    FLOATS,
    Layer,
    Rules,
    as_rows,
    constants,
    for_kernels,
    load_operand,
    load_quantizer,
    load_rotation,
    load_rows,
    load_vector,
    load_weight,
    multiply,
    quantize_operand,
)

# Not measured yet.
PROGRAMS = 2  # of the weight's gradient for each processor: one alone would wait for memory
PARTS = 16  # that a program adds up at a time


# --- Kernels -------------------------------------------------------------------------------------


@triton.jit
def _linear_fwd_kernel(x_ptr, residual_ptr, out_ptr, layer, rows, C: tl.constexpr):
    """x: (rows, K), rows apart by C.stride; residual, or None, and out: (rows, N). This program
    does C.rows rows.
    """
    first = tl.program_id(0).to(tl.int64) * C.rows
    rows -= first
    v, _, _ = load_operand(x_ptr + first * C.stride, layer, rows, C)
    x = quantize_operand(v, layer, C).to(out_ptr.dtype.element_ty)
    row = tl.arange(0, C.rows)[:, None]
    for n in tl.range(0, C.out, C.chunk):
        weight = load_weight(layer, n, C.chunk, C).to(x.dtype)
        y = multiply(x, weight, layer, n, C.chunk, C)
        if C.gelu:
            y = tiles.gelu(y)
        if residual_ptr is not None:
            y += load_rows(residual_ptr + first * C.out, n, rows, C.chunk, C.out, C)
        column = n + tl.arange(0, C.chunk)[None, :]
        to = out_ptr + first * C.out + row * C.out + column
        tl.store(to, y.to(x.dtype), mask=(row < rows) & (column < C.out))


@triton.jit
def _load_gradient(grad_ptr, x, weight, layer, first, rows, COUNT: tl.constexpr, C: tl.constexpr):
    """g_z (ROWS, COUNT) in grad's type, columns first to first + COUNT."""
    grad = load_rows(grad_ptr, first, rows, COUNT, C.out, C)
    if C.gelu:
        z = multiply(x, weight, layer, first, COUNT, C)
        grad = (grad.to(tl.float32) * tiles.gelu_derivative(z)).to(grad.dtype)
    return grad


@triton.jit
def _norm_means(dv, v, layer, C: tl.constexpr):
    """c1 and c2 of the norm's way back, (ROWS, 1) each."""
    if layer.rotation is None:
        weight = load_vector(layer.norm_weight, 0, C.width, C.size)
        bias = load_vector(layer.norm_bias, 0, C.width, C.size)
    else:
        WIDTH: tl.constexpr = C.width
        weight = tl.zeros((1, WIDTH), tl.float32)
        bias = tl.zeros((1, WIDTH), tl.float32)
        for first in tl.range(0, C.width_in, C.depth):
            k = first + tl.arange(0, C.depth)[:, None]
            rotation = load_rotation(layer, first, C.depth, C).to(tl.float32)
            gamma = tl.load(layer.norm_weight + k, mask=k < C.size, other=0.0).to(tl.float32)
            beta = tl.load(layer.norm_bias + k, mask=k < C.size, other=0.0).to(tl.float32)
            weight += tl.sum(gamma * rotation, 0, keep_dims=True)
            bias += tl.sum(beta * rotation, 0, keep_dims=True)
    c1 = tl.sum(dv * weight, 1, keep_dims=True) / C.size
    c2 = tl.sum(dv * (v - bias), 1, keep_dims=True) / C.size
    return c1, c2


@triton.jit
def _store_dx(
    dh,
    x_ptr,
    plus_ptr,
    dx_ptr,
    norm_parts_ptr,
    layer,
    mean,
    inverse,
    c1,
    c2,
    first,
    rows,
    COUNT: tl.constexpr,
    C: tl.constexpr,
):
    """From dh, (ROWS, COUNT) in float32: dx and the parts of dgamma and dbeta of these columns."""
    row = tl.arange(0, C.rows)[:, None]
    k = first + tl.arange(0, COUNT)[None, :]
    inside = (row < rows) & (k < C.size)
    if layer.norm_weight is not None:
        x = tl.load(x_ptr + row * C.stride + k, mask=inside, other=0.0).to(tl.float32)
        x = (x - mean) * inverse
        if norm_parts_ptr is not None:
            # dh is 0 outside, x is not.
            to = norm_parts_ptr + first + tl.arange(0, COUNT)
            column = first + tl.arange(0, COUNT)
            tl.store(to, tl.sum(dh * x, 0), mask=column < C.size)
            tl.store(to + C.size, tl.sum(dh, 0), mask=column < C.size)
        dh = (dh * load_vector(layer.norm_weight, first, COUNT, C.size) - c1 - x * c2) * inverse
    if plus_ptr is not None:
        dh += load_rows(plus_ptr, first, rows, COUNT, C.size, C)
    to = dx_ptr + row * C.size + k
    tl.store(to, dh.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _linear_bwd_kernel(
    grad_ptr,
    x_ptr,
    plus_ptr,
    dx_ptr,
    parts_ptr,
    norm_parts_ptr,
    layer,
    rows,
    parts,
    C: tl.constexpr,
):
    """grad: (rows, N); x as in the forward; plus, or None, is added to dx: (rows, K), or None.

    parts: (3, parts) of the operand's quantizer, or None; norm_parts: (programs, 2, K), or None.
    This program does C.rows rows and its part of the sums; a program beyond the rows adds zeros.
    """
    program = tl.program_id(0).to(tl.int64)
    first = program * C.rows
    rows -= first
    grad_ptr += first * C.out
    x_ptr += first * C.stride
    v, mean, inverse = load_operand(x_ptr, layer, rows, C)
    x = v.to(x_ptr.dtype.element_ty)
    if C.gelu:
        x = quantize_operand(v, layer, C).to(x.dtype)
    ROWS: tl.constexpr = C.rows
    WIDTH: tl.constexpr = C.width
    DEPTH: tl.constexpr = C.depth
    dv = tl.zeros((ROWS, WIDTH), tl.float32)
    for n in tl.range(0, C.out, C.chunk):
        weight = load_weight(layer, n, C.chunk, C).to(x.dtype)
        grad = _load_gradient(grad_ptr, x, weight, layer, n, rows, C.chunk, C)
        dv = tiles.dot(grad, weight, dv)
    if C.bits != 0:
        dv, scale, low, high = tiles.fake_quantize_backward(dv, v, load_quantizer(layer, C))
        if parts_ptr is not None:
            to = parts_ptr + program
            tl.store(to, tl.sum(scale))
            tl.store(to + parts, tl.sum(low))
            tl.store(to + 2 * parts, tl.sum(high))
    if dx_ptr is not None:
        dx_ptr += first * C.size
        plus_to = None if plus_ptr is None else plus_ptr + first * C.size
        norm_to = None if norm_parts_ptr is None else norm_parts_ptr + program * 2 * C.size
        c1, c2 = mean, mean
        if layer.norm_weight is not None:
            c1, c2 = _norm_means(dv, v, layer, C)
        if layer.rotation is None:
            _store_dx(
                dv, x_ptr, plus_to, dx_ptr, norm_to, layer, mean, inverse, c1, c2, 0, rows,
                C.width, C,
            )  # fmt: skip
        else:
            dv = dv.to(x.dtype)
            for k in tl.range(0, C.width_in, C.depth):
                back = tl.trans(load_rotation(layer, k, C.depth, C).to(x.dtype))
                dh = tiles.dot(dv, back, tl.zeros((ROWS, DEPTH), tl.float32))
                _store_dx(
                    dh, x_ptr, plus_to, dx_ptr, norm_to, layer, mean, inverse, c1, c2, k, rows,
                    C.depth, C,
                )  # fmt: skip


@triton.jit
def _linear_weight_kernel(grad_ptr, x_ptr, parts_ptr, bias_parts_ptr, layer, rows, C: tl.constexpr):
    """grad: (rows, N); x as in the forward; parts: (programs, N, K') of dW^, or None; bias_parts:
    (programs, N), or None. This program does C.block of N and every programs-th tile of rows.
    """
    part = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0) * C.rows
    n = tl.program_id(1) * C.block
    BLOCK: tl.constexpr = C.block
    WIDTH: tl.constexpr = C.width
    total = tl.zeros((BLOCK, WIDTH), tl.float32)
    bias = tl.zeros((BLOCK,), tl.float32)
    dtype = x_ptr.dtype.element_ty
    weight = tl.zeros((BLOCK, WIDTH), dtype)
    if C.gelu:
        weight = load_weight(layer, n, C.block, C).to(dtype)
    for first in range(part * C.rows, rows, step):
        v, _, _ = load_operand(x_ptr + first * C.stride, layer, rows - first, C)
        x = quantize_operand(v, layer, C).to(dtype)
        grad = _load_gradient(
            grad_ptr + first * C.out, x, weight, layer, n, rows - first, C.block, C
        )
        if parts_ptr is not None:
            total = tiles.dot(tl.trans(grad), x, total)
        bias += tl.sum(grad.to(tl.float32), 0)
    row = n + tl.arange(0, C.block)
    if bias_parts_ptr is not None:
        tl.store(bias_parts_ptr + part * C.out + row, bias, mask=row < C.out)
    if parts_ptr is not None:
        k = tl.arange(0, C.width)[None, :]
        to = parts_ptr + (part * C.out + row[:, None]) * C.order + k
        tl.store(to, total, mask=(row[:, None] < C.out) & (k < C.order))


@triton.jit
def _weight_gradient_kernel(
    parts_ptr,
    bias_parts_ptr,
    dvalues_ptr,
    dbias_ptr,
    sums_ptr,
    layer,
    parts,
    row_stride,
    sum_stride,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """parts: (parts, N, K'), bias_parts: (parts, N); dvalues: (N, K'), dbias: (N,); sums: three of
    each row of the weight; each None if it is not wanted. This program does one row of the
    weight; a program beyond the rows adds zeros to the sums.
    """
    n = tl.program_id(0)
    part = tl.arange(0, BLOCK)[:, None]
    if bias_parts_ptr is not None:
        bias = tl.zeros((BLOCK, 1), tl.float32)
        for first in range(0, parts, BLOCK):
            inside = (first + part < parts) & (n < C.out)
            bias += tl.load(bias_parts_ptr + (first + part) * C.out + n, mask=inside, other=0.0)
        tl.store(dbias_ptr + n, tl.sum(bias), mask=n < C.out)
    if parts_ptr is not None:
        k = tl.arange(0, C.width)[None, :]
        inside = (k < C.order) & (n < C.out)
        WIDTH: tl.constexpr = C.width
        total = tl.zeros((BLOCK, WIDTH), tl.float32)
        for first in range(0, parts, BLOCK):
            at = ((first + part).to(tl.int64) * C.out + n) * C.order + k
            total += tl.load(parts_ptr + at, mask=inside & (first + part < parts), other=0.0)
        grad = tl.sum(total, 0, keep_dims=True)
        at = n * C.order + k
        if layer.mask is not None:
            grad = tl.where(tl.load(layer.mask + at, mask=inside, other=0) != 0, grad, 0.0)
        if C.form == FLOATS:
            scalars = (
                layer.weight_lower,
                layer.weight_upper,
                layer.weight_alpha,
                layer.weight_beta,
            )
            row = tl.minimum(n, C.out - 1) if C.channels else 0
            quantizer = tiles.load_quantizer(scalars, row, C.weight_bits, C.weight_clamped)
            values = tl.load(layer.weight + at, mask=inside, other=0.0).to(tl.float32)
            d, scale, low, high = tiles.fake_quantize_backward(grad, values, quantizer)
            if dvalues_ptr is not None:
                to = dvalues_ptr + at
                tl.store(to, d.to(dvalues_ptr.dtype.element_ty), mask=inside)
        else:  # of codes: for the scale, for the zero point, nothing
            scale = grad * tl.load(layer.weight + at, mask=inside, other=0).to(tl.float32)
            low, high = grad, tl.zeros_like(grad)
        to = sums_ptr + n * row_stride
        tl.store(to, tl.sum(scale))
        tl.store(to + sum_stride, tl.sum(low))
        tl.store(to + 2 * sum_stride, tl.sum(high))


# --- Host ----------------------------------------------------------------------------------------


def forward(
    x: Tensor, layer: Layer, rules: Rules, eps: float, residual: Tensor | None = None
) -> Tensor:
    """y (..., N) of x (..., K)."""
    out = x.new_empty((*x.shape[:-1], len(layer.weight)))
    if out.numel() == 0:
        return out
    x, layer = as_rows(x), for_kernels(layer)
    c = constants(x, layer, rules, eps, again=False)
    residual = None if residual is None else residual.contiguous()
    with on_device_of(x):
        _linear_fwd_kernel[(triton.cdiv(len(x), c.rows),)](
            x, residual, out, layer, len(x), C=c, num_warps=8 if c.rows * c.width > 4096 else 4
        )
    return out


class Wanted(NamedTuple):
    """Which gradients of a layer are wanted."""

    x: bool
    norm: bool
    scalars: bool
    values: bool
    weight_scalars: bool
    bias: bool


class Gradients(NamedTuple):
    """Of a layer; None for what is not wanted."""

    x: Any  # (..., K)
    norm: Any  # (2, K), of weight and bias
    scalars: Any  # (4,) of the operand's, then (4,) or (4 N,) of the weight's; those wanted
    values: Any  # (N, K')
    bias: Any  # (N,)


def _float32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def empty_gradients(x: Tensor, layer: Layer, wanted: Wanted) -> Gradients:
    """Uninitialized."""
    out = len(layer.weight)
    count = 4 * (wanted.scalars + wanted.weight_scalars * layer.weight_lower.numel())
    return Gradients(
        x=x.new_empty(x.shape) if wanted.x else None,
        norm=_float32(x, 2, x.shape[-1]) if wanted.norm else None,
        scalars=_float32(x, count) if count else None,
        values=layer.weight.new_empty(layer.weight.shape) if wanted.values else None,
        bias=_float32(x, out) if wanted.bias else None,
    )


def backward(
    grad: Tensor,
    x: Tensor,
    layer: Layer,
    rules: Rules,
    eps: float,
    wanted: Wanted,
    plus: Tensor | None = None,
) -> Gradients:
    """Gradients of a layer from that of y; plus (..., K) is added to that of x."""
    if grad.numel() == 0:
        found = empty_gradients(x, layer, wanted)
        return Gradients(*(t if t is None else t.zero_() for t in found))
    # The others are what adding up parts gives.
    found = empty_gradients(
        x,
        layer,
        wanted._replace(x=wanted.x or wanted.norm, norm=False, scalars=False, weight_scalars=False),
    )
    grad, plus = grad.contiguous(), None if plus is None else plus.contiguous()
    x, layer = as_rows(x), for_kernels(layer)
    c = constants(x, layer, rules, eps, again=True)
    settings = {"C": c, "num_warps": 4}
    programs = triton.cdiv(len(x), c.rows)
    of_weight = wanted.values or wanted.weight_scalars
    # One launch adds up the sums of both quantizers where it can: those of the weight, one part a
    # row, are made up with zeros to as many parts as those of the operand.
    alike = not c.channels and rules.form == FLOATS.value and programs >= c.out
    together = wanted.scalars and wanted.weight_scalars and alike
    sums = _float32(x, 2, 1, 3, programs)
    weight_sums = sums[1:]
    if not together:
        shape = (1, c.out, 3, 1) if c.channels else (1, 1, 3, c.out)
        weight_sums = _float32(x, *shape)
    norm_parts = _float32(x, programs, 2, c.size) if wanted.norm else None
    with on_device_of(x):
        if wanted.x or wanted.norm or wanted.scalars:
            scalar_sums = sums if wanted.scalars else None
            _linear_bwd_kernel[(programs,)](
                grad, x, plus, found.x, scalar_sums, norm_parts, layer, len(x), programs, **settings
            )
        if of_weight or wanted.bias:
            blocks = triton.cdiv(c.out, c.block)
            count = min(programs, max(1, PROGRAMS * processors(x.device) // blocks))
            parts = _float32(x, count, c.out, c.order) if of_weight else None
            bias_parts = _float32(x, count, c.out) if wanted.bias else None
            _linear_weight_kernel[(count, blocks)](
                grad, x, parts, bias_parts, layer, len(x), **settings
            )
            _weight_gradient_kernel[(programs if together else c.out,)](
                parts,
                bias_parts,
                found.values,
                found.bias,
                weight_sums,
                layer,
                count,
                weight_sums.stride(1) if c.channels else 1,
                weight_sums.stride(2),
                C=c,
                BLOCK=PARTS,
            )
    operand = layer.lower, layer.upper, layer.alpha, layer.beta
    weight = layer.weight_lower, layer.weight_upper, layer.weight_alpha, layer.weight_beta
    bits = rules.bits, rules.weight_bits
    clamped = bool(rules.clamped), bool(rules.weight_clamped)
    if together:
        scalars = [sum_parts(sums, (operand, weight), bits, clamped).flatten()]
    else:
        scalars = []
        if wanted.scalars:
            scalars += [sum_parts(sums[:1], (operand,), bits[:1], clamped[:1]).flatten()]
        if wanted.weight_scalars and rules.form == FLOATS.value:
            scalars += [sum_parts(weight_sums, (weight,), bits[1:], clamped[1:]).flatten()]
        elif wanted.weight_scalars:
            d_scale, d_zero, _ = weight_sums[0].sum(-1).unbind(1)
            share = d_scale / (2**rules.weight_bits - 1)
            scalars += [torch.cat((d_zero - share, share, d_scale, d_zero))]
    return found._replace(
        x=found.x if wanted.x else None,
        norm=None if norm_parts is None else norm_parts.sum(0),
        scalars=torch.cat(scalars) if len(scalars) > 1 else scalars[0] if scalars else None,
    )
