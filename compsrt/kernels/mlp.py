"""The multilayer perceptron of a transformer block in one launch: fc2(GELU(fc1(norm(x)))) + x.

    x1^ = fq1(norm(x) R1)    z = x1^ W1^^T + b1    x2^ = fq2(GELU(z) R2)    y = x2^ W2^^T + b2 + x

x: (..., K); hidden z: (..., H); y: (..., N). A program takes some rows and holds x1^ and the tile
v2 = GELU(z) R2, which it sums up over chunks of H: some columns of z, GELU, times those rows of
R2. So the hidden tokens never exist as a whole, neither in memory nor in registers. Without R2
the chunks are put side by side by a product with rows of the identity.

Only x, the weights and the scalars are kept. The backward is that of the two layers one after the
other, in the kernels of `linear_kernels.py`, nine launches: GELU(z) is computed again, as a tensor
of its own that lives no longer than the backward; then, for each layer, one for dx, one for the
weight and two that add parts up. In one kernel both weights' gradients and R2 would be held at once:
R2 alone, (128, 128) in float32, is the 64 KiB of shared memory that gfx942 has, and its columns
cannot be taken in chunks, because dW1 wants every one of GELU's gradients. The gradient of `+ x` is
added where dx is written.

K, H and the rotated widths are at most 128; what else `quant_linear` composes is composed of it
here too, as is the definition in `reference/`.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import linear, linear_kernels, linear_tiles, reference, tiles
from .dispatch import on_device_of, tl, triton, use_triton
from .linear import fits, layer_of, quant_linear, unflatten
from .linear_kernels import Wanted
from .linear_tiles import Constants, Layer, Rules
from .reference import Grid, LayerNormWeights, QuantLayer, QuantWeight
from .reference.linear import check_linear, shape_of

# --- Kernel --------------------------------------------------------------------------------------


@triton.jit
def _mlp_fwd_kernel(
    x_ptr, out_ptr, layer1, layer2, rows, C1: tl.constexpr, C2: tl.constexpr, RESIDUAL: tl.constexpr
):
    """x: (rows, K), rows apart by C1.stride; out: (rows, N). This program does C1.rows rows."""
    ROWS: tl.constexpr = C1.rows
    WIDTH: tl.constexpr = C2.width
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows -= first
    x_ptr += first * C1.stride
    out_ptr += first * C2.out
    dtype = out_ptr.dtype.element_ty
    v, _, _ = linear_tiles.load_operand(x_ptr, layer1, rows, C1)
    x = linear_tiles.quantize_operand(v, layer1, C1).to(dtype)
    v = tl.zeros((ROWS, WIDTH), tl.float32)
    for n in tl.range(0, C1.out, C1.chunk):
        weight = linear_tiles.load_weight(layer1, n, C1.chunk, C1).to(dtype)
        # Beyond H it is GELU(0) = 0.
        hidden = tiles.gelu(linear_tiles.multiply(x, weight, layer1, n, C1.chunk, C1)).to(dtype)
        rotation = linear_tiles.load_rotation(layer2, n, C1.chunk, C2).to(dtype)
        v = tiles.dot(hidden, rotation, v)
    x = linear_tiles.quantize_operand(v, layer2, C2).to(dtype)
    row = tl.arange(0, ROWS)[:, None]
    for n in tl.range(0, C2.out, C2.chunk):
        weight = linear_tiles.load_weight(layer2, n, C2.chunk, C2).to(dtype)
        y = linear_tiles.multiply(x, weight, layer2, n, C2.chunk, C2)
        column = n + tl.arange(0, C2.chunk)[None, :]
        inside = (row < rows) & (column < C2.out)
        if RESIDUAL:
            y += tl.load(x_ptr + row * C1.stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * C2.out + column, y.to(dtype), mask=inside)


# --- Host ----------------------------------------------------------------------------------------


def _constants(
    x: Tensor, layers: Sequence[Layer], rules: Sequence[Rules], eps: float
) -> tuple[Constants, Constants]:
    """Of both layers, with as many rows a program."""
    hidden = x.new_empty((0, len(layers[0].weight)))
    first = linear_tiles.constants(x, layers[0], rules[0], eps, again=False)
    second = linear_tiles.constants(hidden, layers[1], rules[1], eps, again=False)
    return first, second


def _forward(
    x: Tensor, layers: Sequence[Layer], rules: Sequence[Rules], eps: float, residual: bool
) -> Tensor:
    out = x.new_empty((*x.shape[:-1], len(layers[1].weight)))
    if out.numel() == 0:
        return out
    x = linear_tiles.as_rows(x)
    layers = [linear_tiles.for_kernels(layer) for layer in layers]
    first, second = _constants(x, layers, rules, eps)
    with on_device_of(x):
        _mlp_fwd_kernel[(triton.cdiv(len(x), first.rows),)](
            x,
            out,
            *layers,
            len(x),
            C1=first,
            C2=second,
            RESIDUAL=residual,
            num_warps=8 if first.rows * max(first.width, second.width) > 4096 else 4,
        )
    return out


def _backward(
    grad: Tensor,
    x: Tensor,
    layers: Sequence[Layer],
    rules: Sequence[Rules],
    eps: float,
    residual: bool,
    wanted: Sequence[Wanted],
) -> tuple[linear_kernels.Gradients, linear_kernels.Gradients]:
    hidden = linear_kernels.forward(x, layers[0], rules[0], eps)
    second = linear_kernels.backward(grad, hidden, layers[1], rules[1], eps, wanted[1])
    if second.x is None:
        return linear_kernels.empty_gradients(x, layers[0], wanted[0]), second
    plus = grad if residual else None
    first = linear_kernels.backward(second.x, x, layers[0], rules[0], eps, wanted[0], plus)
    return first, second._replace(x=None)


# --- Operators -----------------------------------------------------------------------------------


def _layers(tensors: Sequence[Tensor], present: Sequence[bool]) -> tuple[Layer, Layer]:
    half = len(Layer._fields)
    count = sum(present[:half])
    return unflatten(tensors[:count], present[:half]), unflatten(tensors[count:], present[half:])


def _rules(numbers: Sequence[int]) -> tuple[Rules, Rules]:
    half = len(Rules._fields)
    return Rules(*numbers[:half]), Rules(*numbers[half:])


def _wanted(flags: Sequence[bool]) -> tuple[Wanted, Wanted]:
    half = len(Wanted._fields)
    return Wanted(*flags[:half]), Wanted(*flags[half:])


@torch.library.custom_op("compsrt::quant_mlp", mutates_args=(), device_types=("cpu", "cuda"))
def _quant_mlp(
    x: Tensor,
    tensors: Sequence[Tensor],
    present: Sequence[bool],
    rules: Sequence[int],
    eps: float,
    residual: bool,
) -> Tensor:
    return _forward(x, _layers(tensors, present), _rules(rules), eps, residual)


@_quant_mlp.register_fake
def _(x, tensors, present, rules, eps, residual):
    return x.new_empty((*x.shape[:-1], len(_layers(tensors, present)[1].weight)))


@torch.library.custom_op(
    "compsrt::quant_mlp_backward", mutates_args=(), device_types=("cpu", "cuda")
)
def _quant_mlp_backward(
    grad: Tensor,
    x: Tensor,
    tensors: Sequence[Tensor],
    present: Sequence[bool],
    rules: Sequence[int],
    eps: float,
    residual: bool,
    wanted: Sequence[bool],
) -> list[Tensor]:
    layers = _layers(tensors, present)
    found = _backward(grad, x, layers, _rules(rules), eps, residual, _wanted(wanted))
    return [t for gradients in found for t in linear.to_tensors(gradients, x)]


@_quant_mlp_backward.register_fake
def _(grad, x, tensors, present, rules, eps, residual, wanted):
    layers = _layers(tensors, present)
    found = []
    for layer, want in zip(layers, _wanted(wanted), strict=True):
        want = want._replace(x=want.x and layer is layers[0])
        gradients = linear_kernels.empty_gradients(x, layer, want)
        found += linear.to_tensors(gradients, x)
    return found


def _setup_context(ctx, inputs, output):
    x, tensors, *ctx.settings = inputs
    ctx.save_for_backward(x, *tensors)


def _differentiate(ctx, grad):
    x, *tensors = ctx.saved_tensors
    present, rules, eps, residual = ctx.settings
    needs = ctx.needs_input_grad
    layers, wants = _layers(tensors, present), _layers(needs[1], present)
    first = linear.wanted_of(needs[0], wants[0])
    second = linear.wanted_of(any(first), wants[1])
    found = _quant_mlp_backward(grad, x, tensors, present, rules, eps, residual, [*first, *second])
    half = len(found) // 2
    of_tensors = linear.give_back(found[:half], layers[0], wants[0], first)
    of_tensors += linear.give_back(found[half:], layers[1], wants[1], second)
    return found[0] if first.x else None, of_tensors, None, None, None, None


_quant_mlp.register_autograd(_differentiate, setup_context=_setup_context)


def quant_mlp(
    x: Tensor,
    fc1: QuantLayer,
    fc2: QuantLayer,
    *,
    norm: LayerNormWeights | None = None,
    residual: bool = False,
) -> Tensor:
    """fc2(GELU(fc1(norm(x)))), plus x with `residual`.

    x: (..., K), float32, float16 or bfloat16 (float64 by the reference); fc1, fc2: layers to
    (..., H) and (..., N), each with what `quant_linear` takes under the same names. Returns
    (..., N) in x's type. Only the arguments are kept for the backward, which gives gradients to
    all of them but the rotations. Raises ValueError for arguments that do not fit.
    """
    if not use_triton(x):
        return reference.quant_mlp(x, fc1, fc2, norm=norm, residual=residual)
    of_fc1: Any = {"norm": norm, "rotation": fc1.rotation, "bias": fc1.bias, "activation": "gelu"}
    of_fc2: Any = {"rotation": fc2.rotation, "bias": fc2.bias}
    check_linear(x, fc1.weight, grid=fc1.grid, **of_fc1)
    hidden = x.new_empty((*x.shape[:-1], shape_of(fc1.weight)[0]), device="meta")
    check_linear(hidden, fc2.weight, grid=fc2.grid, **of_fc2, residual=x if residual else None)
    if not (
        fits(x, fc1.grid, fc1.rotation, fc1.weight)
        and fits(hidden, fc2.grid, fc2.rotation, fc2.weight)
    ):
        y = quant_linear(x, fc1.grid, fc1.weight, **of_fc1)
        rest = x if residual else None
        return quant_linear(y, fc2.grid, fc2.weight, **of_fc2, residual=rest)
    first, first_rules = layer_of(x, fc1.weight, grid=fc1.grid, **of_fc1)
    second, second_rules = layer_of(x, fc2.weight, grid=fc2.grid, **of_fc2)
    tensors, present = linear.flatten(first)
    more_tensors, more_present = linear.flatten(second)
    return _quant_mlp(
        x,
        tensors + more_tensors,
        present + more_present,
        [*first_rules, *second_rules],
        0.0 if norm is None else norm.eps,
        residual,
    )


def examples():
    """Calls that `aot.py` compiles the kernels of: those of SwinIR-light."""
    one, rows = torch.empty(()), 65536
    grid = Grid(one, one, one, one, 4)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.empty(rows, 60, dtype=dtype)
        layers, rules = [], []
        for size, out in ((60, 120), (120, 60)):
            weight = QuantWeight(
                torch.empty(out, size), grid, torch.empty(out, size, dtype=torch.bool)
            )
            layer, rule = layer_of(
                torch.empty(0, size, dtype=dtype),
                weight,
                grid=grid,
                norm=LayerNormWeights(torch.empty(60), torch.empty(60)) if size == 60 else None,
                rotation=torch.empty(size, size),
                bias=torch.empty(out),
                activation="gelu" if size == 60 else None,
            )
            layers.append(layer)
            rules.append(rule)
        arguments = layers, rules, 1e-5, True
        yield str(dtype).removeprefix("torch."), lambda x=x, a=arguments: _forward(x, *a)
