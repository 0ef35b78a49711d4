"""How a float model becomes a quantized one: the specification, the quantizers, the swapped blocks.

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
import dataclasses
import fnmatch
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .models import swinir
from .transforms import TRANSFORMS, next_power_of_two, transform_matrix

TRANSFORM_GROUPS = ("qkv", "query_key", "value", "attention", "proj", "fc1", "fc2")
PRUNING_PATTERNS = ("unstructured", "2:4")
STORAGE = {"float16": torch.float16, "float32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Method:
    """What a named method does: its transform, first bounds, and the scalars that distillation learns."""

    transform: str
    calibration: str
    learn: tuple[str, ...] = ()
    moving_clip: bool = False
    summary: str = ""


METHODS = {
    "minmax": Method("none", "minmax", summary="bounds at the extremes; no training"),
    "percentile": Method("none", "percentile", summary="bounds at percentiles; no training"),
    "dobi": Method("none", "dobi", summary="bounds of least squared error; no training"),
    "2dquant": Method("none", "dobi", ("lower", "upper"), summary="DOBI, then DQC on the bounds"),
    "lsq+": Method(
        "none", "dobi", ("alpha", "beta"), True, summary="DOBI, then DQC on scale and offset"
    ),
    "compsrt": Method(
        "hadamard",
        "dobi",
        ("lower", "upper", "alpha", "beta"),
        summary="rotation, DOBI, then DQC on bounds, alpha and beta",
    ),
}


def _one_of(argument: str, value: str, known) -> None:
    if value not in known:
        raise ValueError(f"{argument}: {value!r} is unknown; one of {', '.join(known)}")


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """All choices of a quantized model, stored in its file.

    bits: 1 to 8, for weights and activations unless weight_bits or activation_bits say otherwise.
    method: one of METHODS. transform: one of TRANSFORMS, or None for the method's own;
    site_transforms: (pattern, transform) pairs that override it, the pattern matched against a
    group of TRANSFORM_GROUPS or "{block}.{group}". codes: "clamped", or "unclamped" for the
    published arithmetic. pruning: share of the rotated weights set to zero, 0 to 0.99, by
    pruning_pattern. per_channel: weight scales per output channel. one_sided: whether DOBI may
    choose a one-sided range ("auto", by error, or "never"). percentile: of the method of that
    name, per cent. seed: of the random transform. storage: type of all that stays float.
    """

    bits: int = 4
    weight_bits: int | None = None
    activation_bits: int | None = None
    method: str = "compsrt"
    transform: str | None = None
    site_transforms: tuple[tuple[str, str], ...] = ()
    codes: str = "clamped"
    pruning: float = 0.0
    pruning_pattern: str = "unstructured"
    per_channel: bool = False
    one_sided: str = "auto"
    percentile: float = 99.9
    seed: int = 0
    storage: str = "float16"

    def __post_init__(self):
        for name in ("bits", "weight_bits", "activation_bits"):
            value = getattr(self, name)
            if name == "bits" or value is not None:
                if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 8:
                    raise ValueError(f"{name}: {value!r} is not a whole number from 1 to 8")
        _one_of("method", self.method, METHODS)
        if self.transform is not None:
            _one_of("transform", self.transform, TRANSFORMS)
        object.__setattr__(
            self, "site_transforms", tuple((str(p), str(t)) for p, t in self.site_transforms)
        )
        for _, transform in self.site_transforms:
            _one_of("transform", transform, TRANSFORMS)
        _one_of("codes", self.codes, ("clamped", "unclamped"))
        _one_of("one_sided", self.one_sided, ("auto", "never"))
        _one_of("storage", self.storage, STORAGE)
        _one_of("pruning_pattern", self.pruning_pattern, PRUNING_PATTERNS)
        if not 0 <= self.pruning <= 0.99:
            raise ValueError(f"pruning: {self.pruning} is not between 0 and 0.99")
        if self.pruning_pattern == "2:4" and self.pruning not in (0, 0.5):
            raise ValueError(f"pruning: the pattern 2:4 prunes 0.5 of the weights, not {self.pruning}")
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile: {self.percentile} is not above 50 and at most 100")

    @property
    def bits_of_weights(self) -> int:
        return self.bits if self.weight_bits is None else self.weight_bits

    @property
    def bits_of_activations(self) -> int:
        return self.bits if self.activation_bits is None else self.activation_bits

    def transform_of(self, block: str, group: str) -> str:
        """The transform of one group of a block: the last matching pattern, else the default."""
        for pattern, transform in reversed(self.site_transforms):
            if any(fnmatch.fnmatchcase(name, pattern) for name in (group, f"{block}.{group}")):
                return transform
        return METHODS[self.method].transform if self.transform is None else self.transform

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict) -> QuantSpec:
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(f"spec: unknown field {unknown[0]!r}; known: {', '.join(sorted(known))}")
        return cls(**fields)


# --- Quantizers ------------------------------------------------------------------------------------


class Quantizer(nn.Module):
    """One quantization site: four scalars (or one each per channel) and the rule that applies them.

    Until `set_bounds` or a loaded state the bounds are NaN, and so is every output. While
    `observer` is set, the quantizer passes its input to it and returns it unchanged, so one
    forward pass of the model shows every site its float input.
    """

    lower: nn.Parameter
    upper: nn.Parameter
    alpha: nn.Parameter
    beta: nn.Parameter

    def __init__(
        self, bits: int, spec: QuantSpec, shape: tuple[int, ...] = (), searched: int | None = None
    ):
        super().__init__()
        method = METHODS[spec.method]
        self.bits, self.codes, self.moving_clip = bits, spec.codes, method.moving_clip
        self.searched_size = searched
        self.site = ""  # its name in the model, for error messages
        self.observer: Callable[[Quantizer, Tensor], None] | None = None
        for name in ("lower", "upper", "alpha", "beta"):
            start = torch.zeros(shape) if name in ("alpha", "beta") else torch.full(shape, torch.nan)
            self.register_parameter(name, nn.Parameter(start, requires_grad=name in method.learn))

    @property
    def calibrated(self) -> bool:
        return bool(torch.isfinite(self.lower).all())

    @property
    def step(self) -> Tensor:
        """The distance s of two levels, detached."""
        grid = self.grid()
        return kernels.step_and_zero(*grid[:4], grid.bits)[0].detach()

    def grid(self) -> kernels.Grid:
        """The arguments of the fake-quantization as it is now."""
        if not self.moving_clip:
            return kernels.Grid(
                self.lower, self.upper, self.alpha, self.beta, self.bits, self.codes
            )
        # LSQ+: scale and offset are learned, and the clipping range moves along with them.
        levels = 2**self.bits - 1
        scale, zero = kernels.step_and_zero(
            self.lower, self.upper, self.alpha, self.beta, self.bits
        )
        return kernels.Grid(zero, zero + levels * scale, None, None, self.bits, self.codes)

    def searched(self, x: Tensor) -> Tensor:
        """The part of the input that the bounds are searched on."""
        return x if self.searched_size is None else x[..., : self.searched_size]

    @torch.no_grad()
    def set_bounds(self, lower: Tensor, upper: Tensor) -> None:
        """Start from these bounds with alpha = beta = 0. A constant tensor gets a range around it."""
        upper = torch.maximum(upper, lower + 1e-6 + 1e-6 * lower.abs())
        self.lower.copy_(lower.view_as(self.lower))
        self.upper.copy_(upper.view_as(self.upper))
        self.alpha.zero_()
        self.beta.zero_()

    @torch.no_grad()
    def project_(self, smallest_range: Tensor) -> None:
        """Move the scalars back to where the step is positive and finite.

        smallest_range: what upper - lower may not fall below (a thousandth of its first value).
        The step stays within 1/8 and 8 times (upper - lower)/L and the zero point within half the
        range of lower.
        """
        middle = (self.lower + self.upper) / 2
        smallest_range = torch.maximum(smallest_range, 1e-5 * middle.abs())
        half = (self.upper - self.lower).clamp_min(smallest_range) / 2
        crossed = self.upper - self.lower < smallest_range
        self.lower.copy_(torch.where(crossed, middle - half, self.lower))
        self.upper.copy_(torch.where(crossed, middle + half, self.upper))
        step = 2 * half / (2**self.bits - 1)
        self.alpha.clamp_(-7 / 8 * step, 7 * step)
        self.beta.clamp_(-half, half)

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer(self, x)
            return x
        return kernels.fake_quantize(x, *self.grid()[:4], bits=self.bits, codes=self.codes)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, codes={self.codes}, shape={tuple(self.lower.shape)}"


class WeightQuantizer(Quantizer):
    """A quantizer and the rotated weight (C_out, order) it belongs to.

    Holds either the rotated float weight, or, packed, its codes (uint8) alone. mask (C_out,
    order) is False where a weight is pruned: such a weight contributes exactly 0.
    """

    rotated: Tensor | None
    integers: Tensor | None
    mask: Tensor | None

    def __init__(self, rotated: Tensor, bits: int, spec: QuantSpec, searched_rows: int | None):
        super().__init__(bits, spec, (rotated.shape[0], 1) if spec.per_channel else ())
        self.searched_rows = searched_rows
        self.register_buffer("rotated", rotated)
        self.register_buffer("mask", None)
        self.register_buffer("integers", None)

    @property
    def size(self) -> torch.Size:
        """(C_out, order)"""
        return (self.rotated if self.integers is None else self.integers).shape

    def searched(self, x: Tensor) -> Tensor:
        if self.searched_rows is not None and self.lower.dim() == 0:
            return F.pad(x, (0, 0, 0, self.searched_rows - x.shape[0]))
        return x

    @torch.no_grad()
    def to_integers(self) -> Tensor:
        """The codes (uint8) of the weight, 0 where it is pruned."""
        if self.integers is not None:
            return self.integers
        grid = self.grid()
        integers = kernels.quantize_codes(
            self.rotated, *grid[:4], bits=self.bits, codes=self.codes
        )
        return (integers if self.mask is None else integers * self.mask).to(torch.uint8)

    def freeze(self, integers: Tensor | None = None) -> None:
        """Keep the codes and drop the float weight."""
        self.integers = self.to_integers() if integers is None else integers
        self.rotated = None

    def forward(self) -> Tensor:
        """The quantized weight (C_out, order), in the rotated domain."""
        if self.integers is not None:
            grid = self.grid()
            scale, zero = kernels.step_and_zero(*grid[:4], grid.bits)
            weight = kernels.dequantize(self.integers.to(scale.dtype), scale, zero)
        else:
            weight = super().forward(self.rotated)
        return weight if self.mask is None else weight * self.mask


class QuantLinear(nn.Module):
    """y = fq(x T) W^^T + bias, x already rotated; W^ as its WeightQuantizer gives it.

    after: a constant (C_out, C_out') that the output is multiplied by, folded into W^ and bias.
    """

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


# --- Swin block ------------------------------------------------------------------------------------


def _per_head(matrix: Tensor | None, heads: int) -> Tensor | None:
    return None if matrix is None else torch.block_diag(*[matrix] * heads)


def _projection(matrix: Tensor | None) -> Tensor | None:
    """T^T T where it is not the identity."""
    return None if matrix is None or matrix.shape[0] == matrix.shape[1] else matrix.mT @ matrix


class QuantSwinBlock(nn.Module):
    """A Swin block with its 16 quantizers; tokens (B, H, W, C) in and out, like the float block."""

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

        def linear(layer: nn.Linear, group: str, part: int | None = None, after=None) -> QuantLinear:
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
        mixed = self.value(v)
        if self.rotate_attention is not None:
            mixed = self.rotate_attention.mT @ mixed
        out = multiply(
            scores.softmax(-1), mixed, self.attention, rotation=self.rotate_attention
        )
        return self.proj(_rotate(out.transpose(2, 3).flatten(0, 1).flatten(2), self.rotate_proj))

    def _split(self, x: Tensor, windows: int) -> Tensor:
        """(B * windows, N, heads * d) -> (B, windows, heads, N, d)"""
        return x.unflatten(-1, (self.heads, -1)).unflatten(0, (-1, windows)).transpose(2, 3)


def _rotate(x: Tensor, matrix: Tensor | None) -> Tensor:
    return x if matrix is None else x @ matrix


# --- Whole models ----------------------------------------------------------------------------------


def swap_blocks(model: nn.Module, spec: QuantSpec) -> nn.Module:
    """A copy of a float model with every Swin block replaced by its quantized form, not calibrated.

    Everything that stays float is rounded to spec.storage here, so that what is trained and
    measured is what the file holds. Only the scalars that spec.method learns require gradients.
    The copy has `.spec`. Raises ValueError for a model without blocks to quantize.
    """
    if quant_spec(model) is not None:
        raise ValueError("model: it is quantized already; start from the float model")
    if not isinstance(model, swinir.SwinIR):
        raise ValueError(f"model: {type(model).__name__} has no quantized form; only SwinIR has one")
    model = copy.deepcopy(model).requires_grad_(False)
    for name, parent, position, block in list(model.named_blocks()):
        parent[position] = QuantSwinBlock(block, spec, name)
    first = next(model.parameters())
    for name, quantizer in named_quantizers(model):
        quantizer.to(first.device, first.dtype).site = name
    for tensor in stored_as_float(model).values():
        tensor.copy_(tensor.to(STORAGE[spec.storage]))
    model.spec = spec
    return model


def stored_as_float(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and persistent buffers by name that are neither a quantizer's nor integers."""
    sites = tuple(f"{name}." for name, _ in named_quantizers(model))
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(sites) and tensor.is_floating_point()
    }


def quant_spec(model: nn.Module) -> QuantSpec | None:
    """The specification of a quantized model, None for a float one."""
    return getattr(model, "spec", None)


def named_quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """(site name, quantizer) of every site, in the order in which the forward pass meets them."""
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            yield name, module


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """All sites by name, such as `layers.0.residual_group.blocks.0.q.weight`."""
    return dict(named_quantizers(model))
