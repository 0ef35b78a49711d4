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

With `spec.convolution_bits` the weights of the convolutions are quantized too, their inputs are not,
and the relative-position tables.

So a network is trained and its levels are counted. What is only run is folded (`set_arithmetic`): all
that does not depend on the tokens becomes a few matrices, and a block one op,
`kernels.quant_swin_block`.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..kernels.reference.attention import attend, rotate
from ..kernels.reference.linear import padded, project
from ..learned_rotation import LearnedRotation
from ..quantization import METHODS, QuantSpec
from ..quantizers import (
    Quantizer,
    SymmetricWeightQuantizer,
    WeightQuantizer,
    named_quantizers,
    round_to_storage,
)
from ..transforms import next_power_of_two, transform_matrix
from . import swinir
from .layers import HALVES, Conv2d, as_read, convolve, wide, widened
from .quant_sesr import QuantConv2d
from .replay import Replay, said

# How a block computes. "reference": quantizer by quantizer, as it is trained; "fold": codes times
# matrices that hold everything else; "integer": codes times codes, exact; "auto": folded where that
# can be; on a GPU with matrices of float16, whatever type the weights have: bfloat16 errs more, takes
# two products where float16 takes one, and is no faster. A block that errs too much so, on the device
# where it is, computes in integers, which took an H200 2.5 times as long, or in float32, or as trained.
ARITHMETICS = ("auto", "fold", "integer", "reference")
# Of what a block adds. Codes at ties that float16 rounds the other way stay below it: blocks of
# compsrt-best at 4 and 2 bits err by 0.03 to 0.11 on random tokens. A wrong kernel errs by more.
LARGEST_ERROR = 0.25

# Of relative-position tables. On the nano model, everything else float, its picture is then 98.8 dB
# from the float network's: nothing is lost, and 5.4 kB of 288 are saved.
TABLE_BITS = 8


class QuantLinear(nn.Module):
    """y = fq(x T) W^^T + bias; W^ as its WeightQuantizer gives it, T `rotation` or None."""

    start: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        transform: str,
        spec: QuantSpec,
        turn: LearnedRotation | None = None,
    ):
        super().__init__()
        out, size = weight.shape
        matrix = transform_matrix(transform, size, spec.seed)
        matrix = None if matrix is None else matrix.to(weight.device)
        rotated = weight.double() if matrix is None else weight.double() @ matrix
        padded = matrix is not None and matrix.shape[0] != matrix.shape[1]
        self.input = Quantizer(spec.bits_of_activations, spec, searched=size if padded else None)
        self.input.products = out
        self.weight = WeightQuantizer(
            rotated.to(weight.dtype),
            spec.bits_of_weights,
            spec,
            next_power_of_two(out) if padded else None,
        )
        self.bias = None if bias is None else nn.Parameter(bias, METHODS[spec.method].weights)
        matrix = None if matrix is None else matrix.to(weight.dtype).contiguous()
        self.register_buffer("start", matrix, persistent=False)
        object.__setattr__(self.weight, "turn", turn)

    @property
    def rotation(self) -> Tensor | None:
        """What x is rotated with; it requires gradients while it is learned."""
        if self.start is None or self.weight.turn is None:
            return self.start
        return self.start @ self.weight.turn()

    def layer(self) -> kernels.QuantLayer:
        """The arguments of `kernels.quant_linear`."""
        site = self.weight
        if site.lower.dim() and len(site.lower) != site.size[0]:
            # Scales finer than a row are in no kernel's reach: it takes the quantized weight.
            weight = kernels.QuantWeight(site(), None, None)
        else:
            weight = kernels.QuantWeight(site.held, site.grid(), site.mask)
        return kernels.QuantLayer(self.input.grid(), weight, self.bias, self.rotation)

    def operand(self, x: Tensor) -> Tensor:
        """What the weight is multiplied with, as rows (N, K'). x: (..., K'), rotated."""
        if self.rotation is not None and padded(self.rotation):
            x = project(x, self.rotation)
        return x.flatten(0, -2)

    def observed(self, x: Tensor) -> Tensor:
        """The same in pieces, so that the sites see their inputs. x: (..., K), rotated."""
        weight = self.weight()
        if self.rotation is not None and padded(self.rotation):
            weight = project(weight, self.rotation)
        return F.linear(self.input(x), weight, self.bias)


class QuantSwinBlock(nn.Module):
    """A Swin block with its 16 quantizers; tokens (B, H, W, C) in and out, like the float block."""

    start_head: Tensor | None
    start_value: Tensor | None
    rotate_token: Tensor | None

    def __init__(self, block: swinir.SwinBlock, spec: QuantSpec, name: str):
        super().__init__()
        attention, mlp = block.attn, block.mlp
        self.window, self.shift = block.window, block.shift
        self.heads, self.head_dim = attention.heads, attention.head_dim
        first = attention.qkv.weight

        self.turns = nn.ModuleDict()

        def turn(group: str, size: int) -> LearnedRotation | None:
            """What one group's rotation is turned by while it is learned."""
            if spec.transform_of(name, group) != "learned":
                return None
            if group not in self.turns:
                turn = LearnedRotation(size, bool(METHODS[spec.method].learn))
                self.turns[group] = turn.to(first.device, first.dtype)
            turn: Any = self.turns[group]
            return turn

        def linear(layer: nn.Linear, group: str, part: int | None = None) -> QuantLinear:
            tensors = [layer.weight, layer.bias]
            if part is not None:
                tensors = [None if t is None else t.chunk(3)[part] for t in tensors]
            weight, bias = (None if t is None else t.detach().clone() for t in tensors)
            assert weight is not None
            transform = spec.transform_of(name, group)
            return QuantLinear(weight, bias, transform, spec, turn(group, weight.shape[1]))

        def activation(key: str, group: str, size: int) -> Quantizer:
            """The site of an operand of attention; its rotation is the buffer of that key."""
            matrix = transform_matrix(spec.transform_of(name, group), size, spec.seed)
            padded = matrix is not None and matrix.shape[0] != matrix.shape[1]
            matrix = None if matrix is None else matrix.to(first).contiguous()
            self.register_buffer(key, matrix, persistent=False)
            shape = (self.heads, 1, 1) if spec.per_head else ()
            searched = size if padded else None
            return Quantizer(spec.bits_of_activations, spec, shape, searched)

        self.norm1 = block.norm1
        self.q = linear(attention.qkv, "qkv", 0)
        self.k = linear(attention.qkv, "qkv", 1)
        self.v = linear(attention.qkv, "qkv", 2)
        turn("query_key", self.head_dim)
        turn("value", self.head_dim)
        self.query = activation("start_head", "query_key", self.head_dim)
        self.key = activation("start_head", "query_key", self.head_dim)
        self.value = activation("start_value", "value", self.head_dim)
        self.attention = activation("rotate_token", "attention", self.window**2)
        for site in (self.query, self.key, self.value):
            site.products = self.window**2
        self.attention.products = self.head_dim
        self.relative_position_bias_table: Any = attention.relative_position_bias_table
        if spec.convolution_bits is not None:
            table = attention.relative_position_bias_table.detach().T.clone()
            del self.relative_position_bias_table
            self.relative_position_bias_table = SymmetricWeightQuantizer(table, TABLE_BITS, spec)
            self.relative_position_bias_table.kind = "tables"
        self.proj = linear(attention.proj, "proj")
        self.norm2 = block.norm2
        self.fc1 = linear(mlp.fc1, "fc1")
        self.fc2 = linear(mlp.fc2, "fc2")
        self.arithmetic = "reference"
        self.dtype = first.dtype  # what folded matrices of a CUDA device are rounded to
        self._folded: kernels.FoldedBlock | None = None

    def _apply(self, fn, recurse=True):
        self.dtype = fn(self.norm1.weight.new_empty(0, dtype=self.dtype)).dtype
        super()._apply(widened(fn), recurse)
        self.set_arithmetic(self.arithmetic)
        return self

    def set_arithmetic(self, arithmetic: str) -> None:
        """How the block computes from now on, one of ARITHMETICS; its values are folded as they are now.

        Raises ValueError for "fold" and "integer" where a block cannot be folded (padded transforms,
        unclamped codes; for "integer" scales finer than a channel too); "auto" then is "reference".
        """
        device = self.norm1.weight.device
        self.arithmetic, self._folded = arithmetic, None
        if arithmetic == "reference" or device.type == "meta":
            return
        if arithmetic == "auto":
            self._folded = self._chosen(device.type == "cuda")
            return
        exact = wide(self.dtype)
        narrow = arithmetic == "fold" and device.type == "cuda"
        self._folded = self.folded(arithmetic, self.dtype if narrow else exact)

    def _chosen(self, on_gpu: bool) -> kernels.FoldedBlock | None:
        """The fastest folded form that errs little enough; None where there is none."""
        exact = wide(self.dtype)
        try:
            folded = self.folded("fold", exact)
        except ValueError:
            return None
        if not on_gpu:
            return folded
        from ..kernels.swin_block import has_kernel  # which loads Triton

        norm, wrong = self.norm1.weight, []
        for name, mode, dtype in (
            ("float16", "fold", torch.float16),
            ("integers", "integer", exact),
            ("float32", "fold", exact),
        ):
            try:
                found = self.folded(mode, dtype)
            except ValueError:  # some weights have no integers
                continue
            if not has_kernel(norm, found):
                continue
            error = said("first block", norm.device, error_of, found, folded)
            if not has_kernel(norm, found):  # too large for the device, as it turned out
                continue
            if error <= LARGEST_ERROR:
                break
            wrong.append(name)
        else:
            if not wrong:
                return folded
            name, found = "the ops it was trained with", None
        if wrong:
            warnings.warn(
                f"a Swin block on {norm.device} errs too much in {' and '.join(wrong)}; it computes in"
                f" {name}, which is slower",
                stacklevel=2,
            )
        return found

    def forward(self, x: Tensor) -> Tensor:
        if self.query.observer is not None:
            return self.observed(x)
        if self._folded is not None and not (x.requires_grad and torch.is_grad_enabled()):
            return kernels.quant_swin_block(x, self._folded)
        tokens, norm, rotation = _rotated(x, self.norm1, self.q.rotation)
        layers = [linear.layer()._replace(rotation=None) for linear in (self.q, self.k, self.v)]
        q, k, v = kernels.quant_linears(tokens, layers, norm=norm, rotation=rotation)
        y = self._attend(q, k, v)
        tokens, _, rotation = _rotated(y, None, self.proj.rotation)
        layer = self.proj.layer()._replace(rotation=rotation)
        x = kernels.quant_linear(tokens, **layer._asdict(), residual=x)
        if not self._learns("fc1", "fc2"):
            layers = self.fc1.layer(), self.fc2.layer()
            return kernels.quant_mlp(x, *layers, norm=_norm(self.norm2), residual=True)
        tokens, norm, rotation = _rotated(x, self.norm2, self.fc1.rotation)
        layer = self.fc1.layer()._replace(rotation=rotation)
        hidden = kernels.quant_linear(tokens, **layer._asdict(), norm=norm, activation="gelu")
        tokens, _, rotation = _rotated(hidden, None, self.fc2.rotation)
        layer = self.fc2.layer()._replace(rotation=rotation)
        return kernels.quant_linear(tokens, **layer._asdict(), residual=x)

    def _learns(self, *groups: str) -> bool:
        """Whether gradients of any of these rotations are asked for: no op gives them."""
        learned = [self.turns[group] for group in groups if group in self.turns]
        asked = any(p.requires_grad for turn in learned for p in turn.parameters())
        return asked and torch.is_grad_enabled()

    @property
    def rotate_head(self) -> Tensor | None:
        """What queries and keys are rotated with, as it is now."""
        return self._turned(self.start_head, "query_key")

    @property
    def rotate_value(self) -> Tensor | None:
        """What values are rotated with, as it is now."""
        return self._turned(self.start_value, "value")

    def _turned(self, start: Tensor | None, group: str) -> Tensor | None:
        return start if start is None or group not in self.turns else start @ self.turns[group]()

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        head, value = self.rotate_head, self.rotate_value
        back = None
        if self._learns("query_key"):
            q, k = (_rotate_heads(x, head, self.heads) for x in (q, k))
            head = None
        if self._learns("value"):
            assert value is not None
            v, back, value = _rotate_heads(v, value, self.heads), value.mT, None
        y = kernels.quant_window_attention(
            q,
            k,
            v,
            self._table(),
            [site.grid() for site in self._attention_sites()],
            heads=self.heads,
            window=self.window,
            shift=self.shift,
            scale=self.head_dim**-0.5,
            head_rotation=head,
            value_rotation=value,
            token_rotation=self.rotate_token,
        )
        return _rotate_heads(y, back, self.heads)

    @torch.no_grad()
    def folded(self, mode: str = "fold", dtype: torch.dtype = torch.float32) -> kernels.FoldedBlock:
        """The block as `kernels.quant_swin_block` runs it at inference; see `kernels.fold_block` for errors."""
        return kernels.fold_block(
            [linear.layer() for linear in (self.q, self.k, self.v)],
            self.proj.layer(),
            self.fc1.layer(),
            self.fc2.layer(),
            self._table(),
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

    def _table(self) -> Tensor:
        """Relative-position bias ((2 window - 1)^2, heads)."""
        table = self.relative_position_bias_table
        return table().T.contiguous() if isinstance(table, SymmetricWeightQuantizer) else table

    def _attention_sites(self) -> tuple[Quantizer, ...]:
        return self.query, self.key, self.value, self.attention

    def observed(self, x: Tensor) -> Tensor:
        """The block in pieces, so that every site sees its input; one without observer quantizes."""
        tokens = rotate(self.norm1(x), self.q.rotation)
        q, k, v = (linear.observed(tokens) for linear in (self.q, self.k, self.v))
        y = attend(
            q,
            k,
            v,
            self._table(),
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


@torch.no_grad()
def error_of(folded: kernels.FoldedBlock, exact: kernels.FoldedBlock) -> float:
    """The norm of the difference that a folded form of a block makes, over that of what the block adds.

    Measured on random tokens of 8 x 8 windows against the exact form in PyTorch's products.
    """
    side, size = 8 * exact.window, exact.sizes[0]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, side, side, size, generator=generator).to(exact.enter.bias)
    want = kernels.reference.quant_swin_block(tokens, exact)
    got = kernels.quant_swin_block(tokens, folded)
    return float((got - want).norm() / (want - tokens).norm())


def set_arithmetic(model: nn.Module, arithmetic: str) -> None:
    """`QuantSwinBlock.set_arithmetic` of all blocks of a model; of models without them, nothing.

    The weights of the model's convolutions are laid out channels last, quantized ones dequantized once;
    with "auto" they may multiply as TF32. Blocks and quantized convolutions are run as they are now:
    after loading other values, call it again.
    On a CUDA device a folded model is captured and replayed (`Replay`).
    """
    if arithmetic not in ARITHMETICS:
        raise ValueError(f"arithmetic: {arithmetic!r} is unknown; one of {', '.join(ARITHMETICS)}")
    blocks = [module for module in model.modules() if isinstance(module, QuantSwinBlock)]
    for block in blocks:
        block.set_arithmetic(arithmetic)
    if not blocks:
        return
    assert isinstance(model, swinir.SwinIR)
    model.replay = None if arithmetic == "reference" else Replay()
    for module in model.modules():
        if isinstance(module, _WeightConv2d):
            module.set_arithmetic(arithmetic)
        elif isinstance(module, Conv2d):
            module.allow_tf32 = arithmetic == "auto"
            if arithmetic != "reference":
                module.weight.data = as_read(module.weight.data)


def _norm(norm: nn.LayerNorm) -> kernels.LayerNormWeights:
    return kernels.LayerNormWeights(norm.weight, norm.bias, norm.eps)


def _rotated(
    x: Tensor, norm: nn.LayerNorm | None, rotation: Tensor | None
) -> tuple[Tensor, kernels.LayerNormWeights | None, Tensor | None]:
    """What an op is given: x, its norm and rotation, or, if that is being learned, the product."""
    if rotation is not None and rotation.requires_grad:
        return (x if norm is None else norm(x)) @ rotation, None, None
    return x, None if norm is None else _norm(norm), rotation


def _rotate_heads(x: Tensor, rotation: Tensor | None, heads: int) -> Tensor:
    """Every head of x (B, H, W, heads * d) times the rotation (d, d)."""
    return x if rotation is None else rotate(x.unflatten(-1, (heads, -1)), rotation).flatten(-2)


def _observe(x: Tensor, rotation: Tensor | None, site: Quantizer) -> Tensor:
    return site(rotate(x, rotation))


def _multiply_observed(
    a: Tensor, b: Tensor, a_site: Quantizer, b_site: Quantizer | None = None, *, rotation=None
) -> Tensor:
    # A site sees (..., tokens, channels); keys arrive the other way round.
    return _observe(a, rotation, a_site) @ (b if b_site is None else b_site(b.mT).mT)


class _WeightConv2d(QuantConv2d):
    """A convolution with quantized weights and a float input, fused as `layers.convolve` is."""

    def __init__(self, convolution: nn.Conv2d, spec: QuantSpec, bits: int):
        super().__init__(convolution, spec, bits)
        self.arithmetic = "reference"
        self.dtype = convolution.weight.dtype  # what the model is said to be
        self._run: tuple[Tensor, Tensor | None] | None = None

    def _apply(self, fn, recurse=True):
        self.dtype = fn(self.weight.lower.new_empty(0, dtype=self.dtype)).dtype
        super()._apply(widened(fn), recurse)
        self.set_arithmetic(self.arithmetic)
        return self

    @torch.no_grad()
    def set_arithmetic(self, arithmetic: str) -> None:
        """From now on run with the weight as it is now: dequantized, or for a kernel as int8 codes.

        "reference": quantized anew at every call, as it is trained.
        """
        from ..kernels.dispatch import use_triton  # which loads Triton

        self.arithmetic, self._run = arithmetic, None
        site = self.weight
        if arithmetic == "reference" or site.lower.is_meta:
            return
        scale = None
        if site.integers is not None and site.bits > 1 and use_triton(site.lower):
            grid = site.grid()
            scale = kernels.step_and_zero(*grid[:4], grid.bits)[0].flatten()
            # The middle of the codes is 0: they are stored as they are and centred here.
            weight = (site.integers.to(torch.int16) - (2 ** (site.bits - 1) - 1)).to(torch.int8)
        else:
            weight = site()
        self._run = as_read(weight.unflatten(1, self.shape)), scale

    def forward(self, x: Tensor, **fused: Any) -> Tensor:
        gradients = x.requires_grad and torch.is_grad_enabled()
        if self._run is None or self.weight.observer is not None or gradients:
            return convolve(x, self.weight().unflatten(1, self.shape), self.bias, **fused)
        weight, scale = self._run
        tf32 = self.arithmetic == "auto" or self.dtype in HALVES
        return convolve(x, weight, self.bias, scale=scale, allow_tf32=tf32, **fused)


def _swap_convolutions(model: nn.Module, spec: QuantSpec, bits: int) -> None:
    """Quantize the weights of all convolutions, a scale for each output channel, never pruned.

    Their inputs stay float, so this saves bytes and no multiplier.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d):
            convolution = _WeightConv2d(module, spec, bits)
            convolution.weight.kind = "convolutions"
            model.set_submodule(name, convolution)


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
    if spec.convolution_bits is not None:
        _swap_convolutions(model, spec, spec.convolution_bits)
    first = next(model.parameters())
    for name, quantizer in named_quantizers(model):
        quantizer.to(first.device, first.dtype).site = name
        quantizer.bits = spec.bits_of(name, quantizer.bits)
    quantized: Any = model
    quantized.spec = spec
    round_to_storage(model)
    return model
