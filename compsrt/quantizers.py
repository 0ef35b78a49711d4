"""The sites of a quantized model: each a module with its scalars, and what is done with all of them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .quantization import METHODS, SCALARS, STORAGE, QuantSpec


class Quantizer(nn.Module):
    """One quantization site: four scalars (or one each per channel) and the rule that applies them.

    Until `set_bounds` or a loaded state the bounds are NaN, and so is every output. While
    `observer` is set, the quantizer passes its input to it and returns what it gives back, or for
    None its input unchanged, so one forward pass of the model shows every site its float input.
    """

    lower: nn.Parameter
    upper: nn.Parameter
    alpha: nn.Parameter
    beta: nn.Parameter
    stored: tuple[str, ...] = SCALARS  # those that the others follow from, in a packed file
    scale_type: torch.dtype | None = None  # what compact scales are stored in; None: not compact
    products = 0  # multiplications that each of its values enters; 0: not part of a budget

    def __init__(
        self, bits: int, spec: QuantSpec, shape: tuple[int, ...] = (), searched: int | None = None
    ):
        super().__init__()
        method = METHODS[spec.method]
        self.bits, self.codes, self.moving_clip = bits, spec.codes, method.moving_clip
        self.searched_size = searched
        self.site = ""  # its name in the model, for error messages
        self.observer: Callable[[Quantizer, Tensor], Tensor | None] | None = None
        for name in SCALARS:
            start = (
                torch.zeros(shape) if name in ("alpha", "beta") else torch.full(shape, torch.nan)
            )
            learned = name in method.learn and name in self.stored
            self.register_parameter(name, nn.Parameter(start, requires_grad=learned))

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

    def restore(self) -> None:
        """Set what follows from the `stored` scalars, after these were loaded."""

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

    def quantize(self, x: Tensor) -> Tensor:
        return kernels.fake_quantize(x, *self.grid()[:4], bits=self.bits, codes=self.codes)

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            replaced = self.observer(self, x)
            return x if replaced is None else replaced
        return self.quantize(x)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, codes={self.codes}, shape={tuple(self.lower.shape)}"


class WeightQuantizer(Quantizer):
    """A quantizer and the rotated weight (C_out, order) it belongs to.

    Holds either the rotated float weight, or, packed, its codes (uint8) alone. mask (C_out,
    order) is False where a weight is pruned: such a weight contributes exactly 0. turn: where the
    rotation is learned, what it has become beyond the one that `rotated` is in.
    """

    turn: Callable[[], Tensor] | None

    rotated: Tensor | None
    integers: Tensor | None
    mask: Tensor | None
    kind = "weights"  # of TRAINED_KINDS; only weights of linear layers are pruned and have a budget
    compact_form: tuple[str, ...] = ("lower", "alpha")  # what is stored of compact scales

    def __init__(self, rotated: Tensor, bits: int, spec: QuantSpec, searched_rows: int | None):
        fine = spec.per_channel or spec.weight_groups is not None
        self.group = (spec.weight_groups or rotated.shape[1]) if fine else None
        if fine and rotated.shape[1] % (self.group or 1):
            raise ValueError(
                f"weight_groups: {spec.weight_groups} does not divide the {rotated.shape[1]} weights"
                " of a row; use a divisor of all layers' rows, or per_channel"
            )
        super().__init__(
            bits, spec, () if self.group is None else (rotated.numel() // self.group, 1)
        )
        self.searched_rows = searched_rows
        object.__setattr__(self, "turn", None)  # shared, and so no module of this one
        self.register_buffer("rotated", rotated)
        self.register_buffer("mask", None)
        self.register_buffer("integers", None)

    @property
    def prunable(self) -> bool:
        return self.kind == "weights"

    @property
    def size(self) -> torch.Size:
        """(C_out, order)"""
        held = self.rotated if self.integers is None else self.integers
        assert held is not None
        return held.shape

    @property
    def held(self) -> Tensor:
        """The rotated float weight, or its codes."""
        held = self.rotated if self.integers is None else self.integers
        assert held is not None
        return held if self.turn is None or held is self.integers else held @ self.turn()

    def rows(self, x: Tensor) -> Tensor:
        """x of the weight's shape with one row for each scale: (C_out groups, order / groups)."""
        return x if self.group is None else x.reshape(-1, self.group)

    def searched(self, x: Tensor) -> Tensor:
        if self.searched_rows is not None and self.group is None:
            return F.pad(x, (0, 0, 0, self.searched_rows - x.shape[0]))
        return self.rows(x)

    def quantize(self, x: Tensor) -> Tensor:
        return super().quantize(self.rows(x)).view(x.shape)

    @torch.no_grad()
    def to_integers(self) -> Tensor:
        """The codes (uint8) of the weight, 0 where it is pruned."""
        if self.integers is not None:
            return self.integers
        if self.codes != "clamped":
            raise ValueError("codes: unclamped codes need not fit 8 bits; they have no packed form")
        grid, held = self.grid(), self.held
        integers = kernels.quantize_codes(
            self.rows(held), *grid[:4], bits=self.bits, codes=self.codes
        ).view(held.shape)
        return (integers if self.mask is None else integers * self.mask).to(torch.uint8)

    def train_weight(self) -> None:
        """Make the rotated float weight a parameter: gradients go straight through the rounding."""
        if not isinstance(self.rotated, nn.Parameter):
            rotated = self.rotated
            if rotated is None:
                raise ValueError(
                    f"{self.site}: a packed weight cannot be trained; start from the float one"
                )
            del self.rotated
            self.rotated = nn.Parameter(rotated)

    def quantize_column(self, column: Tensor, j: int) -> Tensor:
        """The quantized form of values (C_out,) of column j of the weight."""
        grid = self.grid()
        if self.group is not None:
            at = slice(j // self.group, None, self.size[1] // self.group)
            lower, upper, *moved = grid[:4]
            alpha, beta = (None if scalar is None else scalar[at] for scalar in moved)
            grid = kernels.Grid(lower[at], upper[at], alpha, beta, grid.bits, grid.codes)
        found = kernels.fake_quantize(column[:, None], *grid[:4], bits=grid.bits, codes=grid.codes)
        return found[:, 0]

    @torch.no_grad()
    def compact(self, storage: torch.dtype) -> None:
        """Freeze, and keep of the scalars the step and the zero point alone, in a storage type.

        Four float32 numbers a row of 60 weights are 2.1 bits a weight; these two in float16 are 0.5.
        """
        lower, upper, _, _, _, _ = grid = self.grid()
        step, zero = kernels.step_and_zero(*grid[:4], grid.bits)
        moved_step, moved_zero = (t.to(storage).to(t.dtype) for t in (step, zero))
        alpha = moved_step - (upper - lower) / (2**grid.bits - 1)
        for scalar, value in zip(SCALARS, (lower, upper, alpha, moved_zero - lower), strict=True):
            getattr(self, scalar).copy_(value)
        self.moving_clip = False
        self.freeze()
        self.set_compact(storage)
        self.lower.copy_(moved_zero)
        self.alpha.copy_(moved_step)
        self.restore()

    def set_compact(self, storage: torch.dtype) -> None:
        """What a file holds of this site is its compact form."""
        self.scale_type, self.stored = storage, self.compact_form

    @torch.no_grad()
    def restore(self) -> None:
        if self.scale_type is not None:
            # Bounds matter to float weights alone: (upper - lower)/L + alpha is alpha, exactly.
            self.moving_clip = False
            self.upper.copy_(self.lower)
            self.beta.zero_()

    def freeze(self, integers: Tensor | None = None) -> None:
        """Keep the codes and drop the float weight."""
        self.integers = self.to_integers() if integers is None else integers
        self.rotated = None

    def forward(self) -> Tensor:
        """The quantized weight (C_out, order), in the rotated domain."""
        if self.integers is not None:
            grid = self.grid()
            scale, zero = kernels.step_and_zero(*grid[:4], grid.bits)
            weight = kernels.dequantize(self.rows(self.integers).to(scale.dtype), scale, zero)
            weight = weight.view(self.integers.shape)
        else:
            weight = super().forward(self.held)
        return weight if self.mask is None else weight * self.mask


class AffineQuantizer(Quantizer):
    """A quantizer of activations as integer hardware has it: 0 is one of its levels.

    Its zero point is a whole number of steps, so the zeros that a convolution pads with are exact.
    Of the four scalars it uses lower and upper; the gradient goes straight through the rounding
    of the zero point. fixed: bounds that neither calibration nor training changes.
    """

    stored = ("lower", "upper")

    def __init__(self, bits: int, spec: QuantSpec, fixed: tuple[float, float] | None = None):
        super().__init__(bits, spec)
        self.fixed = fixed
        if fixed is not None:
            self.requires_grad_(False)

    def grid(self) -> kernels.Grid:
        levels = 2**self.bits - 1
        step = (self.upper - self.lower) / levels
        nudge = self.lower + (-self.lower / step).round().clamp(0, levels) * step
        nudge = nudge.detach()
        return kernels.Grid(
            self.lower - nudge, self.upper - nudge, None, None, self.bits, self.codes
        )

    @torch.no_grad()
    def project_(self, smallest_range: Tensor) -> None:
        super().project_(smallest_range)
        self.lower.clamp_(max=0)
        self.upper.clamp_(min=0)

    def set_bounds(self, lower: Tensor, upper: Tensor) -> None:
        if self.fixed is not None:
            lower, upper = (torch.full_like(lower, bound) for bound in self.fixed)
        super().set_bounds(lower.clamp(max=0), upper.clamp(min=0))


class SymmetricWeightQuantizer(WeightQuantizer):
    """A quantizer of weights as integer hardware has it: 2^bits - 1 levels around 0.

    The step is upper / (2^(bits - 1) - 1), lower is -upper; one bit has the levels -upper, upper.
    Always one scale for each output channel.
    """

    stored = ("upper",)
    compact_form = stored

    def __init__(self, rotated: Tensor, bits: int, spec: QuantSpec):
        fine = dataclasses.replace(spec, per_channel=True, weight_groups=None)
        super().__init__(rotated, bits, fine, None)

    def grid(self) -> kernels.Grid:
        levels, half = 2**self.bits - 1, max(2 ** (self.bits - 1) - 1, 0.5)
        # s = (upper - lower)/levels + alpha is what the kernels compute; the last code stays unused.
        alpha = self.upper * (1 / half - 2 / levels)
        return kernels.Grid(-self.upper, self.upper, alpha, None, self.bits, self.codes)

    @torch.no_grad()
    def project_(self, smallest_range: Tensor) -> None:
        torch.maximum(self.upper, smallest_range / 2, out=self.upper)
        self.lower.copy_(-self.upper)

    @torch.no_grad()
    def compact(self, storage: torch.dtype) -> None:
        """Freeze, with the upper bounds in a storage type."""
        self.upper.copy_(self.upper.to(storage))
        self.set_compact(storage)
        self.restore()
        self.freeze()

    @torch.no_grad()
    def restore(self) -> None:
        self.lower.copy_(-self.upper)

    def set_bounds(self, lower: Tensor, upper: Tensor) -> None:
        upper = torch.maximum(-lower, upper)
        super().set_bounds(-upper, upper)


_observers = 0  # that look on through `observed`


def observing() -> bool:
    """Whether someone looks on through `observed`: then no recorded launch may stand for a site."""
    return _observers > 0


@contextlib.contextmanager
def observed(
    sites: Iterable[Quantizer], observer: Callable[[Quantizer, Tensor], Tensor | None]
) -> Iterator[None]:
    """While it lasts, these sites show their inputs to an observer (see `Quantizer`)."""
    global _observers
    sites = list(sites)
    try:
        _observers += 1
        for site in sites:
            site.observer = observer
        yield
    finally:
        _observers -= 1
        for site in sites:
            site.observer = None


def looks_one_sided(x: Tensor) -> bool:
    """Whether nearly all of the range lies on one side of zero (softmax, GELU)."""
    least, greatest = (float(v) for v in x.aminmax())
    return least > -0.25 * greatest


# --- Whole models ----------------------------------------------------------------------------------


def stored_as_float(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and persistent buffers by name that are neither a quantizer's nor integers."""
    sites = tuple(f"{name}." for name, _ in named_quantizers(model))
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(sites) and tensor.is_floating_point()
    }


@torch.no_grad()
def round_to_storage(model: nn.Module) -> None:
    """Round all that stays float to spec.storage: what is measured is what the file holds."""
    spec = quant_spec(model)
    assert spec is not None
    for tensor in stored_as_float(model).values():
        tensor.copy_(tensor.to(STORAGE[spec.storage]))


def fine_sites(model: nn.Module) -> list[WeightQuantizer]:
    """The weights with more than one scale, where spec asks for such; their scales can be compact."""
    spec = quant_spec(model)
    assert spec is not None
    if not spec.per_channel and spec.weight_groups is None and spec.convolution_bits is None:
        return []
    sites = (site for _, site in named_quantizers(model) if isinstance(site, WeightQuantizer))
    return [site for site in sites if site.group is not None]


def compact_scales(model: nn.Module) -> None:
    """Freeze weights with more than one scale, and round these to spec.storage: the end of training."""
    spec = quant_spec(model)
    assert spec is not None
    for site in fine_sites(model):
        site.compact(STORAGE[spec.storage])


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
