"""SwinIR with quantized Swin blocks.

A Swin block is swapped as a whole (a block is what one fused kernel replaces). Its 16 quantizers:
inputs and weights of q, k, v, proj, fc1, fc2, and the four operands of attention (query times
d^-0.5, key, value, softmax). Each operand is rotated once on its last axis, quantized, and
multiplied in the rotated domain, because (X T)(W T)^T = X W^T. What can be folded is folded:

- one rotation of the normalized tokens serves q, k and v;
- the rotations of query, key and value on the head axis go into the q, k and v weights;
- softmax(S) is rotated over its 64 tokens, so V^ is mixed by T^T before the product;
- the way back from the value's rotation and the rotation before proj are one matrix.

A padded transform (order > size) is no rotation of the coefficients it adds, so there the
projection T^T T stands between two quantized operands.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..quantization import (
    STORAGE,
    Quantizer,
    QuantSpec,
    WeightQuantizer,
    named_quantizers,
    quant_spec,
    stored_as_float,
)
from ..transforms import next_power_of_two, transform_matrix
from . import swinir


class QuantLinear(nn.Module):
    """y = fq(x T) W^^T + bias, x already rotated; W^ as its WeightQuantizer gives it.

    after: a constant (C_out, C_out') that the output is multiplied by, folded into W^ and bias.
    """

    bias: Tensor | None
    after: Tensor | None
    projection: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        transform: str,
        spec: QuantSpec,
        after: Tensor | None = None,
    ):
        super().__init__()
        out, size = weight.shape
        matrix = transform_matrix(transform, size, spec.seed)
        rotated = weight.double() if matrix is None else weight.double() @ matrix.to(weight.device)
        padded = matrix is not None and matrix.shape[0] != matrix.shape[1]
        self.input = Quantizer(spec.bits_of_activations, spec, searched=size if padded else None)
        self.weight = WeightQuantizer(
            rotated.to(weight.dtype),
            spec.bits_of_weights,
            spec,
            next_power_of_two(out) if padded else None,
        )
        self.register_buffer("bias", bias)
        self.register_buffer("after", after, persistent=False)
        projection = _projection(matrix)
        projection = None if projection is None else projection.to(weight)
        self.register_buffer("projection", projection, persistent=False)

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """Weight (order, C_out') and bias (C_out') with everything constant folded in."""
        weight, bias = self.weight().mT, self.bias
        if self.projection is not None:
            weight = self.projection @ weight
        if self.after is not None:
            weight = weight @ self.after
            bias = bias if bias is None else bias @ self.after
        return weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., order), rotated. Returns (..., C_out')."""
        weight, bias = self.effective()
        return multiply(x, weight, self.input, bias=bias)


def multiply(
    a: Tensor,
    b: Tensor,
    quantizer: Quantizer,
    *,
    bias: Tensor | None = None,
    rotation: Tensor | None = None,
) -> Tensor:
    """quantizer(a @ rotation) @ b + bias, as one op unless the quantizer is being observed."""
    if quantizer.observer is None:
        return kernels.quant_matmul(a, b, quantizer.grid(), bias=bias, rotation=rotation)
    product = quantizer(a if rotation is None else a @ rotation) @ b
    return product if bias is None else product + bias


def _per_head(matrix: Tensor | None, heads: int) -> Tensor | None:
    return None if matrix is None else torch.block_diag(*[matrix] * heads)


def _projection(matrix: Tensor | None) -> Tensor | None:
    """T^T T where it is not the identity."""
    return None if matrix is None or matrix.shape[0] == matrix.shape[1] else matrix.mT @ matrix


class QuantSwinBlock(nn.Module):
    """A Swin block with its 16 quantizers; tokens (B, H, W, C) in and out, like the float block."""

    rotate_qkv: Tensor | None
    rotate_attention: Tensor | None
    rotate_proj: Tensor | None
    rotate_fc1: Tensor | None
    rotate_fc2: Tensor | None
    project_key: Tensor | None

    def __init__(self, block: swinir.SwinBlock, spec: QuantSpec, name: str):
        super().__init__()
        attention, mlp = block.attn, block.mlp
        dim, heads = attention.proj.in_features, attention.heads
        head, tokens = dim // heads, attention.window**2
        self.heads, self.window, self.shift = heads, block.window, block.shift
        weight = attention.qkv.weight
        device, dtype = weight.device, weight.dtype

        def matrix(group: str, size: int) -> Tensor | None:
            found = transform_matrix(spec.transform_of(name, group), size, spec.seed)
            return None if found is None else found.to(device)

        head_matrix, value_matrix = matrix("query_key", head), matrix("value", head)
        token_matrix = matrix("attention", tokens)
        identity = torch.eye(dim, dtype=torch.float64, device=device)
        after_qk = _per_head(head_matrix, heads)
        after_q = (identity if after_qk is None else after_qk) * head**-0.5
        after_v = _per_head(value_matrix, heads)
        rotate_proj = matrix("proj", dim)
        back = None if after_v is None else after_v.mT
        if back is not None and rotate_proj is not None:
            rotate_proj = back @ rotate_proj
        elif rotate_proj is None:
            rotate_proj = back

        def linear(
            layer: nn.Linear, group: str, part: int | None = None, after: Tensor | None = None
        ) -> QuantLinear:
            weight, bias = layer.weight.detach(), layer.bias
            bias = None if bias is None else bias.detach()
            if part is not None:
                weight = weight.chunk(3)[part]
                bias = None if bias is None else bias.chunk(3)[part]
            after = None if after is None else after.to(dtype)
            return QuantLinear(weight.clone(), bias, spec.transform_of(name, group), spec, after)

        def activation(size: int, found: Tensor | None) -> Quantizer:
            padded = found is not None and found.shape[0] != found.shape[1]
            return Quantizer(spec.bits_of_activations, spec, searched=size if padded else None)

        self.norm1 = block.norm1
        self.q = linear(attention.qkv, "qkv", 0, after_q)
        self.k = linear(attention.qkv, "qkv", 1, after_qk)
        self.v = linear(attention.qkv, "qkv", 2, after_v)
        self.query = activation(head, head_matrix)
        self.key = activation(head, head_matrix)
        self.value = activation(head, value_matrix)
        self.attention = activation(tokens, token_matrix)
        self.relative_position_bias_table = attention.relative_position_bias_table
        self.proj = linear(attention.proj, "proj")
        self.norm2 = block.norm2
        self.fc1 = linear(mlp.fc1, "fc1")
        self.fc2 = linear(mlp.fc2, "fc2")
        constants = {
            "rotate_qkv": matrix("qkv", dim),
            "rotate_attention": token_matrix,
            "rotate_proj": rotate_proj,
            "rotate_fc1": matrix("fc1", dim),
            "rotate_fc2": matrix("fc2", mlp.fc1.out_features),
            "project_key": _projection(head_matrix),
        }
        for key, value in constants.items():
            value = None if value is None else value.to(dtype).contiguous()
            self.register_buffer(key, value, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        size = height, width, self.window, self.shift
        windows = swinir.to_windows(self.norm1(x), self.window, self.shift)
        x = x + swinir.from_windows(self._attend(windows, size), *size)
        hidden = F.gelu(self.fc1(_rotate(self.norm2(x), self.rotate_fc1)))
        return x + self.fc2(_rotate(hidden, self.rotate_fc2))

    def _attend(self, x: Tensor, size: tuple[int, int, int, int]) -> Tensor:
        """x: (B * windows, N, C). Returns the same shape, after proj."""
        x = _rotate(x, self.rotate_qkv)
        windows = size[0] // self.window * (size[1] // self.window)
        q, k, v = (self._split(linear(x), windows) for linear in (self.q, self.k, self.v))
        if self.project_key is None and self.query.observer is None:
            scores = kernels.quant_matmul(q, k.mT, self.query.grid(), self.key.grid())
        else:
            scores = multiply(q, _rotate(self.key(k), self.project_key).mT, self.query)
        scores = swinir.add_bias(scores, self.relative_position_bias_table, size)
        # T^T V^ as (V^^T T)^T: one product of many rows is four times as fast as one a window.
        mixed = _rotate(self.value(v).mT, self.rotate_attention).mT
        out = multiply(scores.softmax(-1), mixed, self.attention, rotation=self.rotate_attention)
        tokens = out.transpose(2, 3).flatten(0, 1).flatten(2)
        return self.proj(_rotate(tokens, self.rotate_proj))

    def _split(self, x: Tensor, windows: int) -> Tensor:
        """(B * windows, N, heads * d) -> (B, windows, heads, N, d)"""
        return x.unflatten(-1, (self.heads, -1)).unflatten(0, (-1, windows)).transpose(2, 3)


def _rotate(x: Tensor, matrix: Tensor | None) -> Tensor:
    return x if matrix is None else x @ matrix


def swap_blocks(model: nn.Module, spec: QuantSpec) -> nn.Module:
    """A copy of a float model with every Swin block replaced by its quantized form, not calibrated.

    Everything that stays float is rounded to spec.storage here, so that what is trained and
    measured is what the file holds. Only the scalars that spec.method learns require gradients.
    The copy has `.spec`. Raises ValueError for a model without blocks to quantize.
    """
    if quant_spec(model) is not None:
        raise ValueError("model: it is quantized already; start from the float model")
    if not isinstance(model, swinir.SwinIR):
        raise ValueError(
            f"model: {type(model).__name__} has no quantized form; only SwinIR has one"
        )
    model = copy.deepcopy(model).requires_grad_(False)
    for name, parent, position, block in list(model.named_blocks()):
        assert isinstance(block, swinir.SwinBlock)
        parent[position] = QuantSwinBlock(block, spec, name)
    first = next(model.parameters())
    for name, quantizer in named_quantizers(model):
        quantizer.to(first.device, first.dtype).site = name
    for tensor in stored_as_float(model).values():
        tensor.copy_(tensor.to(STORAGE[spec.storage]))
    quantized: Any = model
    quantized.spec = spec
    return model
