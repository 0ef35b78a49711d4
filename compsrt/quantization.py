"""What is quantized and how: the methods, and the specification of a quantized model."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Iterable
from typing import Any

import torch

from .transforms import TRANSFORMS

TRANSFORM_GROUPS = ("qkv", "query_key", "value", "attention", "proj", "fc1", "fc2")
PRUNING_PATTERNS = ("unstructured", "2:4")
SCALARS = ("lower", "upper", "alpha", "beta")
_OPTIONAL_BITS = ("weight_bits", "activation_bits", "convolution_bits")
TRAINED_KINDS = ("weights", "biases", "norms", "tables", "convolutions")
CALIBRATIONS = ("minmax", "percentile", "dobi", "dobi-asymmetric")
ROUNDINGS = ("nearest", "output")
STORAGE = {"float16": torch.float16, "float32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Method:
    """What a named method does: its transform, first bounds, and the scalars that are learned.

    weights: whether weights and biases are trained too, on the true pictures; else the scalars
    alone are, by distillation.
    """

    transform: str
    calibration: str
    learn: tuple[str, ...] = ()
    moving_clip: bool = False
    weights: bool = False
    summary: str = ""


METHODS = {
    "minmax": Method("none", "minmax", summary="bounds at the extremes; no training"),
    "percentile": Method("none", "percentile", summary="bounds at percentiles; no training"),
    "dobi": Method("none", "dobi", summary="bounds of least squared error; no training"),
    "2dquant": Method("none", "dobi", ("lower", "upper"), summary="DOBI, then DQC on the bounds"),
    "lsq+": Method(
        "none", "dobi", ("alpha", "beta"), True, summary="DOBI, then DQC on scale and offset"
    ),
    "qat": Method(
        "none",
        "dobi",
        ("lower", "upper"),
        weights=True,
        summary="DOBI, then weights and ranges trained on the true pictures",
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


def _since(file_format: int, default: Any) -> Any:
    """A field that files know from this format on; one of an older format lacks it."""
    return dataclasses.field(default=default, metadata={"format": file_format})


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """All choices of a quantized model, stored in its file.

    bits: 1 to 8, for weights and activations unless weight_bits or activation_bits say otherwise.
    method: one of METHODS. transform: one of TRANSFORMS, or None for the method's own, or "auto":
    calibration chooses for every block and group (and puts its choice in this place);
    site_transforms: (pattern, transform) pairs that override it, the pattern matched against a
    group of TRANSFORM_GROUPS or "{block}.{group}". codes: "clamped", or "unclamped" for the
    published arithmetic. pruning: share of the rotated weights set to zero, 0 to 0.99, by
    pruning_pattern. per_channel: weight scales per output channel; per_head: four scalars
    a head at query, key, value and attention. one_sided: whether DOBI may
    choose a one-sided range ("auto", by error, or "never"). percentile: of the method of that
    name, per cent. seed: of the random transform. storage: type of all that stays float.
    convolution_bits: of the weights of SwinIR's convolutions, with a scale for each output channel,
    and its position tables then take 8 bits, a scale a head; None leaves both float.
    site_bits: (pattern, bits) pairs for sites by name, the last that matches.
    train_weights: which of TRAINED_KINDS are trained beside the scalars. calibration: one of
    CALIBRATIONS, or None for the method's own. rounding: of weights then, "nearest" or for the least
    error of their layers' "output" (rounding.py).
    average_bits: 1 to 8; calibration finds the site_bits with this average (allocation.py).
    weight_groups: weights of a row that share a scale (a divisor of every row's length), instead of
    all of the tensor, or of the row with per_channel.
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
    convolution_bits: int | None = _since(2, None)
    site_bits: tuple[tuple[str, int], ...] = _since(2, ())
    train_weights: tuple[str, ...] = _since(2, ())
    calibration: str | None = _since(2, None)
    rounding: str = _since(2, "nearest")
    average_bits: float | None = _since(2, None)
    weight_groups: int | None = _since(2, None)
    per_head: bool = _since(2, False)

    def __post_init__(self):
        site_bits = tuple((str(pattern), bits) for pattern, bits in self.site_bits)
        object.__setattr__(self, "site_bits", site_bits)
        widths = {name: getattr(self, name) for name in ("bits", *_OPTIONAL_BITS)}
        widths |= {f"site_bits: {pattern}": bits for pattern, bits in site_bits}
        for name, value in widths.items():
            if value is None and name in _OPTIONAL_BITS:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 8:
                raise ValueError(f"{name}: {value!r} is not a whole number from 1 to 8")
        groups = self.weight_groups
        if groups is not None and (
            isinstance(groups, bool) or not isinstance(groups, int) or groups < 1
        ):
            raise ValueError(f"weight_groups: {groups!r} is not a whole number of at least 1")
        if self.average_bits is not None and not 1 <= self.average_bits <= 8:
            raise ValueError(f"average_bits: {self.average_bits} is not between 1 and 8")
        _one_of("method", self.method, METHODS)
        if self.transform is not None:
            _one_of("transform", self.transform, (*TRANSFORMS, "auto"))
        object.__setattr__(
            self, "site_transforms", tuple((str(p), str(t)) for p, t in self.site_transforms)
        )
        for _, transform in self.site_transforms:
            _one_of("transform", transform, TRANSFORMS)
        object.__setattr__(self, "train_weights", tuple(self.train_weights))
        for kind in self.train_weights:
            _one_of("train_weights", kind, TRAINED_KINDS)
        _one_of("codes", self.codes, ("clamped", "unclamped"))
        _one_of("one_sided", self.one_sided, ("auto", "never"))
        if self.calibration is not None:
            _one_of("calibration", self.calibration, CALIBRATIONS)
        _one_of("rounding", self.rounding, ROUNDINGS)
        _one_of("storage", self.storage, STORAGE)
        _one_of("pruning_pattern", self.pruning_pattern, PRUNING_PATTERNS)
        if not 0 <= self.pruning <= 0.99:
            raise ValueError(f"pruning: {self.pruning} is not between 0 and 0.99")
        if self.pruning_pattern == "2:4" and self.pruning not in (0, 0.5):
            raise ValueError(
                f"pruning: the pattern 2:4 prunes 0.5 of the weights, not {self.pruning}"
            )
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

    def bits_of(self, site: str, bits: int) -> int:
        """The bits of a site by its name: of the last pattern that matches, else the given ones."""
        for pattern, chosen in reversed(self.site_bits):
            if fnmatch.fnmatchcase(site, pattern):
                return chosen
        return bits

    def _changed(self, field: dataclasses.Field) -> bool:
        return getattr(self, field.name) != field.default

    @property
    def file_format(self) -> int:
        """The oldest format of packed files that can say all this."""
        fields = dataclasses.fields(self)
        return max(
            f.metadata.get("format", 1) for f in fields if f.name == "bits" or self._changed(f)
        )

    def to_json(self) -> dict:
        """What files hold: all fields of the first format, and of the later ones those that are set."""
        later = {f.name for f in dataclasses.fields(self) if "format" in f.metadata}
        unset = {f.name for f in dataclasses.fields(self) if not self._changed(f)}
        fields = dataclasses.asdict(self) | {"site_bits": _shared_prefixes(self.site_bits)}
        return {name: value for name, value in fields.items() if name not in later & unset}

    @classmethod
    def from_json(cls, fields: dict) -> QuantSpec:
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(
                f"spec: unknown field {unknown[0]!r}; known: {', '.join(sorted(known))}"
            )
        if runs := fields.get("site_bits"):
            fields = {**fields, "site_bits": _whole_names(runs)}
        return cls(**fields)


def _shared_prefixes(pairs: Iterable[tuple[str, int]]) -> list[list]:
    """(name, bits) pairs as [prefix, name, bits, name, bits, ...], one for each run of a block's."""
    runs: list[list] = []
    for name, bits in pairs:
        matched = re.match(r"(?:.*\.\d+\.)?", name)
        prefix = matched[0] if matched else ""
        if not runs or runs[-1][0] != prefix:
            runs.append([prefix])
        runs[-1] += [name.removeprefix(prefix), bits]
    return runs


def _whole_names(runs: Iterable[Any]) -> list[tuple[str, int]]:
    """The inverse of `_shared_prefixes`; ValueError for anything else."""
    try:
        return [
            (prefix + name, bits)
            for prefix, *rest in runs
            for name, bits in zip(rest[::2], rest[1::2], strict=True)
        ]
    except (TypeError, ValueError):
        raise ValueError("spec: site_bits is not [[prefix, name, bits, ...], ...]") from None
