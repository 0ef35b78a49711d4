"""SwinIR with quantized Swin blocks.

A Swin block is swapped as a whole (a block is what one fused kernel replaces). Its 16 quantizers:
inputs and weights of q, k, v, proj, fc1, fc2, and the four operands of attention (query times
d^-0.5, key, value, softmax). Each operand is rotated once on its last axis, quantized, and
multiplied in the rotated domain, because (X T)(W T)^T = X W^T. Four ops of `kernels` make a block:

    q, k, v = quant_linears(norm1(x))      one rotation of the normalized tokens serves all three
    y = quant_window_attention(q, k, v)
    x = quant_linear(y) + x
    x = quant_mlp(norm2(x)) + x

A padded transform (order > size) is no rotation of the coefficients it adds, so there the
projection T^T T stands between two quantized operands; the ops see to it.

So a block is trained and its levels are counted. What is only run is folded (`set_arithmetic`): all
that does not depend on the tokens becomes a few matrices, and a block one op,
`kernels.quant_swin_block`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..kernels.reference.attention import attend, rotate
from ..kernels.reference.linear import padded, project
from ..quantization import (
    METHODS,
    Quantizer,
    QuantSpec,
    WeightQuantizer,
    named_quantizers,
    round_to_storage,
)
from ..transforms import next_power_of_two, transform_matrix
from . import swinir
from .layers import HALVES, wide
from .replay import Replay

# How a block computes. "reference": quantizer by quantizer, as it is trained; "fold": codes times
# matrices that hold everything else; "integer": codes times codes, exact; "auto": folded where that
# can be, in the way that suits device and type.
ARITHMETICS = ("auto", "fold", "integer", "reference")


class QuantLinear(nn.Module):
    """y = fq(x T) W^^T + bias; W^ as its WeightQuantizer gives it, T `rotation` or None."""

    rotation: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, transform: str, spec: QuantSpec):
        super().__init__()
        out, size = weight.shape
        matrix = transform_matrix(transform, size, spec.seed)
        matrix = None if matrix is None else matrix.to(weight.device)
        rotated = weight.double() if matrix is None else weight.double() @ matrix
        padded = matrix is not None and matrix.shape[0] != matrix.shape[1]
        self.input = Quantizer(spec.bits_of_activations, spec, searched=size if padded else None)
        self.weight = WeightQuantizer(
            rotated.to(weight.dtype),
            spec.bits_of_weights,
            spec,
            next_power_of_two(out) if padded else None,
        )
        self.bias = None if bias is None else nn.Parameter(bias, METHODS[spec.method].weights)
        matrix = None if matrix is None else matrix.to(weight.dtype).contiguous()
        self.register_buffer("rotation", matrix, persistent=False)

    def layer(self) -> kernels.QuantLayer:
        """The arguments of `kernels.quant_linear`."""
        held = self.weight.rotated if self.weight.integers is None else self.weight.integers
        assert held is not None
        weight = kernels.QuantWeight(held, self.weight.grid(), self.weight.mask)
        return kernels.QuantLayer(self.input.grid(), weight, self.bias, self.rotation)

    def observed(self, x: Tensor) -> Tensor:
        """The same in pieces, so that the sites see their inputs. x: (..., K), rotated."""
        weight = self.weight()
        if self.rotation is not None and padded(self.rotation):
            weight = project(weight, self.rotation)
        return F.linear(self.input(x), weight, self.bias)


class QuantSwinBlock(nn.Module):
    """A Swin block with its 16 quantizers; tokens (B, H, W, C) in and out, like the float block."""

    rotate_head: Tensor | None
    rotate_value: Tensor | None
    rotate_token: Tensor | None

    def __init__(self, block: swinir.SwinBlock, spec: QuantSpec, name: str):
        super().__init__()
        attention, mlp = block.attn, block.mlp
        self.window, self.shift = block.window, block.shift
        self.heads, self.head_dim = attention.heads, attention.head_dim
        first = attention.qkv.weight

        def linear(layer: nn.Linear, group: str, part: int | None = None) -> QuantLinear:
            tensors = [layer.weight, layer.bias]
            if part is not None:
                tensors = [None if t is None else t.chunk(3)[part] for t in tensors]
            weight, bias = (None if t is None else t.detach().clone() for t in tensors)
            assert weight is not None
            return QuantLinear(weight, bias, spec.transform_of(name, group), spec)

        def activation(key: str, group: str, size: int) -> Quantizer:
            """The site of an operand of attention; its rotation is the buffer of that key."""
            matrix = transform_matrix(spec.transform_of(name, group), size, spec.seed)
            padded = matrix is not None and matrix.shape[0] != matrix.shape[1]
            matrix = None if matrix is None else matrix.to(first).contiguous()
            self.register_buffer(key, matrix, persistent=False)
            return Quantizer(spec.bits_of_activations, spec, searched=size if padded else None)

        self.norm1 = block.norm1
        self.q = linear(attention.qkv, "qkv", 0)
        self.k = linear(attention.qkv, "qkv", 1)
        self.v = linear(attention.qkv, "qkv", 2)
        self.query = activation("rotate_head", "query_key", self.head_dim)
        self.key = activation("rotate_head", "query_key", self.head_dim)
        self.value = activation("rotate_value", "value", self.head_dim)
        self.attention = activation("rotate_token", "attention", self.window**2)
        self.relative_position_bias_table = attention.relative_position_bias_table
        self.proj = linear(attention.proj, "proj")
        self.norm2 = block.norm2
        self.fc1 = linear(mlp.fc1, "fc1")
        self.fc2 = linear(mlp.fc2, "fc2")
        self.arithmetic = "reference"
        self.dtype = first.dtype  # what folded matrices of a CUDA device are rounded to
        self._folded: kernels.FoldedBlock | None = None

    def _apply(self, fn, recurse=True):
        # Scalars rounded to a half type would move the bounds, so a block is float32 at least.
        def widened(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.is_floating_point():
                self.dtype = moved.dtype
            return tensor.to(moved.device, wide(moved.dtype)) if moved.dtype in HALVES else moved

        super()._apply(widened, recurse)
        self.set_arithmetic(self.arithmetic)
        return self

    def set_arithmetic(self, arithmetic: str) -> None:
        """How the block computes from now on, one of ARITHMETICS; its values are folded as they are now.

        Raises ValueError for "fold" and "integer" where a block cannot be folded (padded transforms,
        unclamped codes; for "integer" scales finer than a channel too); "auto" then is "reference".
        """
        device = self.relative_position_bias_table.device
        self.arithmetic, self._folded = arithmetic, None
        if arithmetic == "reference" or device.type == "meta":
            return
        mode = arithmetic if arithmetic != "auto" else "fold"
        dtype = wide(self.dtype)
        if device.type == "cuda":
            if arithmetic == "auto" and self.dtype == torch.float32:
                mode = "integer"
            elif mode == "fold" and self.dtype in HALVES:
                dtype = self.dtype
        try:
            self._folded = self.folded(mode, dtype)
        except ValueError:
            if arithmetic != "auto":
                raise

    def forward(self, x: Tensor) -> Tensor:
        if self.query.observer is not None:
            return self._observed(x)
        if self._folded is not None and not (x.requires_grad and torch.is_grad_enabled()):
            return kernels.quant_swin_block(x, self._folded)
        layers = [linear.layer()._replace(rotation=None) for linear in (self.q, self.k, self.v)]
        q, k, v = kernels.quant_linears(x, layers, norm=_norm(self.norm1), rotation=self.q.rotation)
        y = kernels.quant_window_attention(
            q,
            k,
            v,
            self.relative_position_bias_table,
            [site.grid() for site in self._attention_sites()],
            heads=self.heads,
            window=self.window,
            shift=self.shift,
            scale=self.head_dim**-0.5,
            head_rotation=self.rotate_head,
            value_rotation=self.rotate_value,
            token_rotation=self.rotate_token,
        )
        x = kernels.quant_linear(y, **self.proj.layer()._asdict(), residual=x)
        layers = self.fc1.layer(), self.fc2.layer()
        return kernels.quant_mlp(x, *layers, norm=_norm(self.norm2), residual=True)

    def folded(self, mode: str = "fold", dtype: torch.dtype = torch.float32) -> kernels.FoldedBlock:
        """The block as `kernels.quant_swin_block` runs it at inference; see `kernels.fold_block` for errors."""
        return kernels.fold_block(
            [linear.layer() for linear in (self.q, self.k, self.v)],
            self.proj.layer(),
            self.fc1.layer(),
            self.fc2.layer(),
            self.relative_position_bias_table,
            [site.grid() for site in self._attention_sites()],
            norms=(_norm(self.norm1), _norm(self.norm2)),
            heads=self.heads,
            window=self.window,
            shift=self.shift,
            scale=self.head_dim**-0.5,
            rotation=self.q.rotation,
            head_rotation=self.rotate_head,
            value_rotation=self.rotate_value,
            token_rotation=self.rotate_token,
            mode=mode,
            dtype=dtype,
        )

    def _attention_sites(self) -> tuple[Quantizer, ...]:
        return self.query, self.key, self.value, self.attention

    def _observed(self, x: Tensor) -> Tensor:
        """The block in pieces, so that every site sees its input."""
        tokens = rotate(self.norm1(x), self.q.rotation)
        q, k, v = (linear.observed(tokens) for linear in (self.q, self.k, self.v))
        y = attend(
            q,
            k,
            v,
            self.relative_position_bias_table,
            self._attention_sites(),
            self.heads,
            self.window,
            self.shift,
            self.head_dim**-0.5,
            self.rotate_head,
            self.rotate_value,
            self.rotate_token,
            quantize=_observe,
            multiply=_multiply_observed,
        )
        x = x + self.proj.observed(rotate(y, self.proj.rotation))
        hidden = F.gelu(self.fc1.observed(rotate(self.norm2(x), self.fc1.rotation)))
        return x + self.fc2.observed(rotate(hidden, self.fc2.rotation))


def set_arithmetic(model: nn.Module, arithmetic: str) -> None:
    """`QuantSwinBlock.set_arithmetic` of all blocks of a model; of models without them, nothing.

    On a CUDA device a folded model is captured and replayed (`Replay`).
    """
    if arithmetic not in ARITHMETICS:
        raise ValueError(f"arithmetic: {arithmetic!r} is unknown; one of {', '.join(ARITHMETICS)}")
    blocks = [module for module in model.modules() if isinstance(module, QuantSwinBlock)]
    for block in blocks:
        block.set_arithmetic(arithmetic)
    if blocks:
        assert isinstance(model, swinir.SwinIR)
        model.replay = None if arithmetic == "reference" else Replay()


def _norm(norm: nn.LayerNorm) -> kernels.LayerNormWeights:
    return kernels.LayerNormWeights(norm.weight, norm.bias, norm.eps)


def _observe(x: Tensor, rotation: Tensor | None, site: Quantizer) -> Tensor:
    return site(rotate(x, rotation))


def _multiply_observed(
    a: Tensor, b: Tensor, a_site: Quantizer, b_site: Quantizer | None = None, *, rotation=None
) -> Tensor:
    # A site sees (..., tokens, channels); keys arrive the other way round.
    return _observe(a, rotation, a_site) @ (b if b_site is None else b_site(b.mT).mT)


def swap_blocks(model: swinir.SwinIR, spec: QuantSpec) -> nn.Module:
    """A copy of a float model with every Swin block replaced by its quantized form, not calibrated.

    Everything that stays float is rounded to spec.storage here, so that what is trained and
    measured is what the file holds. Only the scalars that spec.method learns require gradients.
    The copy has `.spec`.
    """
    model = copy.deepcopy(model).requires_grad_(False)
    for name, parent, position, block in list(model.named_blocks()):
        assert isinstance(block, swinir.SwinBlock)
        parent[position] = QuantSwinBlock(block, spec, name)
    first = next(model.parameters())
    for name, quantizer in named_quantizers(model):
        quantizer.to(first.device, first.dtype).site = name
    quantized: Any = model
    quantized.spec = spec
    round_to_storage(model)
    return model
