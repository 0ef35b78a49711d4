"""Products with quantized, pruned weights: `masked_matmul` and `quant_linear`.

    W^ = mask * fq(W~)
    masked_matmul    y = x W^^T + bias + residual
    quant_linear     y = GELU(fq(norm(x) R) W^^T + bias) + residual

x: (..., K); R: (K, K') with orthonormal rows; W~: (N, K'), rotated. Both are one operator, whose
kernels and gradients `linear_kernels.py` has: one launch forward, the weight quantized, or
unpacked from b-bit codes and a bit mask, as it is read. What they do not hold is composed of the
kernels of `hadamard_fake_quant.py` and `fake_quant.py` and PyTorch's product: K or K' above 128, a
scale for each entry of the operand, and a padded rotation (K' > K), for which R^T R stands between
the two quantized operands:

    y = fq(x R) (R^T R) W^^T

Sources: 2DQuant (NeurIPS 2024) for the quantizer, CompSRT (2026) for rotation and pruning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .dispatch import use_triton
from .fake_quant import check_scalars, fake_quantize
from .hadamard_fake_quant import hadamard_fake_quantize
from .linear_kernels import Gradients, Wanted, backward, empty_gradients, forward
from .linear_tiles import CODES, FLOATS, LARGEST, PACKED, PACKED_2_4, Layer, Rules
from .reference import Grid, LayerNormWeights, PackedWeight, QuantLayer, QuantWeight
from .reference.linear import check_layers, check_linear, layer_norm, padded, project, shape_of

# --- Operators -----------------------------------------------------------------------------------


def flatten(layer: Layer) -> tuple[list[Tensor], list[bool]]:
    """The tensors that a layer has, and which they are: arguments of an operator."""
    return [t for t in layer if t is not None], [t is not None for t in layer]


def unflatten(tensors: Sequence[Tensor], present: Sequence[bool]) -> Layer:
    """The inverse of `flatten`."""
    remaining = iter(tensors)
    return Layer(*(next(remaining) if is_there else None for is_there in present))


def wanted_of(x: bool, layer: Layer) -> Wanted:
    """From a layer with True for each tensor whose gradient is wanted."""
    operand = layer.lower, layer.upper, layer.alpha, layer.beta
    weight = layer.weight_lower, layer.weight_upper, layer.weight_alpha, layer.weight_beta
    norm = layer.norm_weight, layer.norm_bias
    flags = x, any(norm), any(operand), layer.weight, any(weight), layer.bias
    return Wanted(*map(bool, flags))


def to_tensors(found: Gradients, x: Tensor) -> list[Tensor]:
    """What an operator can return: an empty tensor for each None."""
    return [x.new_empty(0) if t is None else t for t in found]


def give_back(
    found: Sequence[Tensor], layer: Layer, wants: Layer, wanted: Wanted
) -> list[Tensor | None]:
    """Gradients of the tensors of a layer, in their shapes and types, None where not wanted."""
    _, norm, scalars, values, bias = found
    nothing = (None, None, None, None)
    gradients: tuple[Any, ...] = (
        *(norm if wanted.norm else (None, None)),
        None,
        *(scalars[:4] if wanted.scalars else nothing),
        values,
        *(scalars[4 * wanted.scalars :].view(4, -1) if wanted.weight_scalars else nothing),
        None,
        bias,
    )
    return [
        gradient.reshape(tensor.shape).to(tensor.dtype) if want else None
        for gradient, tensor, want in zip(gradients, layer, wants, strict=True)
        if tensor is not None
    ]


@torch.library.custom_op("compsrt::linear", mutates_args=(), device_types=("cpu", "cuda"))
def _linear(
    x: Tensor,
    tensors: Sequence[Tensor],
    residual: Tensor | None,
    present: Sequence[bool],
    rules: Sequence[int],
    eps: float,
) -> Tensor:
    """x: (..., K); tensors, present: `flatten` of a Layer; rules: Rules; residual: (..., N)."""
    return forward(x, unflatten(tensors, present), Rules(*rules), eps, residual)


@_linear.register_fake
def _(x, tensors, residual, present, rules, eps):
    return x.new_empty((*x.shape[:-1], len(unflatten(tensors, present).weight)))


@torch.library.custom_op("compsrt::linear_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _linear_backward(
    grad: Tensor,
    x: Tensor,
    tensors: Sequence[Tensor],
    present: Sequence[bool],
    rules: Sequence[int],
    eps: float,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients, one tensor each, an empty one for what is not wanted."""
    layer = unflatten(tensors, present)
    found = backward(grad, x, layer, Rules(*rules), eps, Wanted(*wanted))
    return to_tensors(found, x)


@_linear_backward.register_fake
def _(grad, x, tensors, present, rules, eps, wanted):
    layer = unflatten(tensors, present)
    return to_tensors(empty_gradients(x, layer, Wanted(*wanted)), x)


def _setup_context(ctx, inputs, output):
    x, tensors, _, *ctx.settings = inputs
    ctx.save_for_backward(x, *tensors)


def _differentiate(ctx, grad):
    x, *tensors = ctx.saved_tensors
    present, rules, eps = ctx.settings
    needs = ctx.needs_input_grad
    layer, wants = unflatten(tensors, present), unflatten(needs[1], present)
    wanted = wanted_of(needs[0], wants)
    found = _linear_backward(grad, x, tensors, present, rules, eps, wanted)
    dx = found[0] if wanted.x else None
    return dx, give_back(found, layer, wants, wanted), grad if needs[2] else None, None, None, None


_linear.register_autograd(_differentiate, setup_context=_setup_context)


# --- Functions -----------------------------------------------------------------------------------


def check_device(x: Tensor, layer: Layer, residual: Tensor | None = None) -> None:
    """Raise ValueError unless all tensors are where x is."""
    for name, tensor in (*layer._asdict().items(), ("residual", residual)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: it is on {tensor.device}; move it to x's {x.device}")


def _scalars(name: str, of: Tensor, grid: Grid) -> dict[str, Tensor]:
    names = ("lower", "upper", "alpha", "beta")
    return {name + n: s for n, s in zip(names, check_scalars(of, *grid[:4]), strict=True)}


def layer_of(
    x: Tensor,
    weight: QuantWeight | PackedWeight,
    *,
    grid: Grid | None = None,
    norm: LayerNormWeights | None = None,
    rotation: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Layer, Rules]:
    """What the kernels take, of arguments that fit each other."""
    if isinstance(weight, PackedWeight):
        values, form = weight.codes, PACKED if weight.pattern == "unstructured" else PACKED_2_4
    else:
        values, form = weight.values, FLOATS if weight.values.is_floating_point() else CODES
    assert weight.grid is not None
    of_weight = _scalars("weight_", values, weight.grid)
    if isinstance(weight, PackedWeight):
        of_weight = {name: scalar.detach() for name, scalar in of_weight.items()}
    layer = Layer(
        norm_weight=None if norm is None else norm.weight,
        norm_bias=None if norm is None else norm.bias,
        rotation=None if rotation is None else rotation.detach(),
        weight=values,
        mask=weight.mask,
        bias=bias,
        **({} if grid is None else _scalars("", x, grid)),
        **of_weight,
    )
    check_device(x, layer)
    return layer, Rules(
        bits=0 if grid is None else grid.bits,
        clamped=int(grid is not None and grid.codes == "clamped"),
        weight_bits=weight.grid.bits,
        weight_clamped=int(weight.grid.codes == "clamped"),
        form=form.value,
        order=shape_of(weight)[1],
        gelu=int(activation == "gelu"),
    )


def fits(
    x: Tensor,
    grid: Grid | None,
    rotation: Tensor | None,
    weight: QuantWeight | PackedWeight,
) -> bool:
    """Whether the kernels hold a layer."""
    if weight.grid is None:
        return False
    if rotation is not None and (padded(rotation) or rotation.shape[1] > LARGEST):
        return False
    return x.shape[-1] <= LARGEST and (grid is None or grid.lower.numel() == 1)


def _run(x: Tensor, layer: Layer, rules: Rules, eps: float, residual: Tensor | None) -> Tensor:
    check_device(x, layer, residual)
    tensors, present = flatten(layer)
    return _linear(x, tensors, residual, present, list(rules), eps)


def _weight(weight: QuantWeight | PackedWeight, dtype: torch.dtype) -> Tensor:
    """W^ (N, K'), by kernels where it has gradients."""
    grid = weight.grid
    if isinstance(weight, PackedWeight) or grid is None or not weight.values.is_floating_point():
        return weight.quantized().to(dtype)
    found = fake_quantize(weight.values, *grid[:4], bits=grid.bits, codes=grid.codes)
    return (found if weight.mask is None else found * weight.mask).to(dtype)


def masked_matmul(
    x: Tensor,
    weight: QuantWeight | PackedWeight,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x @ W^^T + bias + residual, W^ quantized, or unpacked, on the fly.

    x: (..., K'), float32, float16 or bfloat16 (float64 by the reference); weight: (N, K'), float
    values, codes or packed; bias: (N,); residual: (..., N), in x's type. Returns (..., N) in x's
    type. Gradients: of x, bias and residual, and, unless the weight is packed, of its scalars and,
    straight through the quantizer, of its float values, exactly 0 for a pruned one. Raises
    ValueError for arguments that do not fit.
    """
    if not use_triton(x):
        return reference.masked_matmul(x, weight, bias=bias, residual=residual)
    check_linear(x, weight, bias=bias, residual=residual)
    if not fits(x, None, None, weight):
        y = F.linear(x, _weight(weight, x.dtype), None if bias is None else bias.to(x.dtype))
        return y if residual is None else y + residual
    layer, rules = layer_of(x, weight, bias=bias)
    return _run(x, layer, rules, 0.0, residual)


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

    x: (..., K), float32, float16 or bfloat16 (float64 by the reference); grid: the quantizer of the
    rotated x; weight: (N, K'), float values or codes; norm: a layer norm of x; rotation: a constant
    (K, K') with orthonormal rows, which gets no gradient; bias: (N,); activation: None or "gelu",
    the exact one; residual: (..., N), in x's type. Returns (..., N) in x's type. Only the
    arguments are kept for the backward, which gives gradients to all of them but the rotation.
    Raises ValueError for arguments that do not fit.
    """
    layers: Any = {"norm": norm, "rotation": rotation, "bias": bias, "activation": activation}
    if not use_triton(x):
        return reference.quant_linear(x, grid, weight, **layers, residual=residual)
    check_linear(x, weight, grid=grid, **layers, residual=residual)
    if fits(x, grid, rotation, weight):
        layer, rules = layer_of(x, weight, grid=grid, **layers)
        return _run(x, layer, rules, 0.0 if norm is None else norm.eps, residual)
    return _composed(x, grid, weight, **layers, residual=residual)


def quant_linears(
    x: Tensor,
    layers: Sequence[QuantLayer],
    *,
    norm: LayerNormWeights | None = None,
    rotation: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`quant_linear` of one x by each of several layers, which share norm and rotation.

    Queries, keys and values are made so. Returns a tuple, (..., N) each. One launch a layer: to
    normalize and rotate again costs less than to write and read what they would share. Raises
    ValueError for no layers, layers with rotations of their own, and as `quant_linear`.
    """
    if not use_triton(x):
        return reference.quant_linears(x, layers, norm=norm, rotation=rotation)
    check_layers(layers)
    return tuple(
        quant_linear(x, layer.grid, layer.weight, bias=layer.bias, norm=norm, rotation=rotation)
        for layer in layers
    )


def _composed(x, grid, weight, *, norm, rotation, bias, activation, residual):
    x = x if norm is None else layer_norm(x, norm)
    right = _weight(weight, x.dtype)
    if rotation is None:
        left = fake_quantize(x, *grid[:4], bits=grid.bits, codes=grid.codes)
    else:
        (left,) = hadamard_fake_quantize(x, rotation, [grid])
        right = project(right, rotation.detach().to(x.dtype)) if padded(rotation) else right
    y = F.linear(left, right, None if bias is None else bias.to(x.dtype))
    y = F.gelu(y) if activation == "gelu" else y
    return y if residual is None else y + residual


def examples():
    """Calls that `aot.py` compiles the kernels of: the layers of SwinIR-light."""
    one, rows = torch.empty(()), 65536
    grid = Grid(one, one, one, one, 4)
    every = Wanted(*[True] * len(Wanted._fields))
    for dtype in (torch.float32, torch.bfloat16):
        for name, size, out in (
            ("fc1", 60, 120),
            ("fc2", 120, 60),
            ("proj", 60, 60),
            ("masked", 60, 60),
            ("packed", 60, 60),
            ("2:4", 60, 60),
        ):
            x, y = torch.empty(rows, size, dtype=dtype), torch.empty(rows, out, dtype=dtype)
            mask = torch.empty(out, size, dtype=torch.bool)
            weight, settings = QuantWeight(torch.empty(out, size), grid, mask), {}
            if name in ("packed", "2:4"):
                codes = torch.empty(out, 30 if name == "packed" else 15, dtype=torch.uint8)
                mask = torch.empty(out, 8, dtype=torch.uint8)
                pattern = "unstructured" if name == "packed" else name
                weight = PackedWeight(codes, grid, mask, size, pattern)
            elif name != "masked":
                settings = {"grid": grid, "rotation": torch.empty(size, size)}
            if name == "fc1":
                settings["norm"] = LayerNormWeights(torch.empty(size), torch.empty(size))
                settings["activation"] = "gelu"
            layer, rules = layer_of(x, weight, bias=torch.empty(out), **settings)
            residual = None if name == "fc1" else y
            wanted = every._replace(norm=name == "fc1", scalars="grid" in settings)
            if isinstance(weight, PackedWeight):
                wanted = wanted._replace(values=False, weight_scalars=False, bias=False)
            label = f"{str(dtype).removeprefix('torch.')} {name}"
            both = layer, rules, 1e-5
            yield label, lambda x=x, b=both, r=residual: forward(x, *b, residual=r)
            yield label, lambda y=y, x=x, b=both, w=wanted: backward(y, x, *b, wanted=w)
