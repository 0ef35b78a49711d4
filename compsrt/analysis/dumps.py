"""Tensors in files: this package's dump, and the folder that the published scripts read.

A dump is one safetensors file with `{site}.before` (R, size) and `{site}.{transform}` (R, order)
for every site, float32, and in its metadata a JSON object a site: kind, role, shape of the whole
tensor, extremes of the whole tensor. `site` is a name such as
`layers.0.residual_group.blocks.0.fc1.input`.

The published layout is a folder of `{number}_{kind}_prehad.pt` and `{number}_{kind}_posthad.pt`,
one tensor each. There every axis of `posthad` is padded to a power of two and the last one is
transformed, so what lies beyond the other axes' sizes is zero: it is cut off here and counted.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from compsrt.analysis.tensors import (
    VALUES,
    Operand,
    TensorPair,
    check_finite,
    ends_of,
    kept_rows,
    sample,
)
from compsrt.cli import nearest
from compsrt.files import atomic_write
from compsrt.transforms import next_power_of_two

FORMAT = "compsrt.statistics"
PUBLISHED = "published"  # the name of the transform of the published layout

_BEFORE, _AFTER = "_prehad.pt", "_posthad.pt"


def write_dump(
    path: Path, operands: Sequence[Operand], transforms: Sequence[str], *, seed: int = 0
) -> None:
    """Write operands before and after the transforms; seed is that of the transform "random"."""
    tensors, sites = {}, {}
    for operand in operands:
        tensors[f"{operand.site}.before"] = operand.rows.contiguous()
        for transform in transforms:
            after = torch.from_numpy(operand.pair(transform, seed).after).float()
            tensors[f"{operand.site}.{transform}"] = after.contiguous()
        sites[operand.site] = {
            "kind": operand.kind,
            "role": operand.role,
            "shape": operand.shape,
            "ends": dict(operand.ends),
        }
    # A transform that leaves the rows alone would share their memory, which safetensors refuses.
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "version": "1", "sites": json.dumps(sites)}
    atomic_write(path, save(tensors, metadata))


def read_pairs(
    path: Path, transform: str, *, values: int = VALUES, seed: int = 0
) -> Iterator[TensorPair]:
    """The pairs of a dump, or of a folder in the published layout (which has one transform).

    Raises FileNotFoundError; ValueError for no tensors, half a pair, shapes that do not belong
    together, values that are not finite, or a transform that the dump lacks.
    """
    if path.is_dir():
        for before, after in _published_files(path):
            yield _published_pair(before, after, values, seed)
        return
    for operand, after in _read_dump(path, transform):
        pair = operand.pair("none")
        known = {"none", transform} <= set(operand.ends)
        yield TensorPair(
            site=operand.site,
            kind=operand.kind,
            role=operand.role,
            transform=transform,
            before=pair.before,
            after=after.double().numpy(),
            before_ends=operand.ends["none"] if known else pair.before_ends,
            after_ends=operand.ends[transform] if known else ends_of(after),
            count=pair.count,
            count_after=math.prod(operand.shape[:-1]) * after.shape[1],
            padding=operand.pair(transform).padding if transform == "hadamard-padded" else 0,
        )


def read_operands(path: Path, *, values: int = VALUES, seed: int = 0) -> Iterator[Operand]:
    """What lies in such a file or folder before the transform; raises as `read_pairs`."""
    if path.is_dir():
        for before, _ in _published_files(path):
            site, kind = _published_name(before)
            yield sample(site, kind, kind, _load_tensor(before), values=values, seed=seed)
    else:
        for operand, _ in _read_dump(path, None):
            yield operand


# --- this package's dump --------------------------------------------------------------------------


def _read_dump(path: Path, transform: str | None) -> Iterator[tuple[Operand, Tensor]]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such dump or folder")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path}: no dump of tensors; python -m {FORMAT} dump writes one")
            names = set(file.keys())
            for site, fields in json.loads(metadata["sites"]).items():
                rows = _tensor(path, file, names, f"{site}.before")
                ends = {name: tuple(pair) for name, pair in fields["ends"].items()}
                shape = tuple(fields["shape"])
                if rows.dim() != 2 or rows.shape[1] != shape[-1]:
                    raise ValueError(
                        f"{path}: {site}.before is {tuple(rows.shape)}, not of {shape}"
                    )
                operand = Operand(site, fields["kind"], fields["role"], shape, rows, ends)
                after = rows
                if transform is not None:
                    after = _tensor(path, file, names, f"{site}.{transform}")
                    if after.dim() != 2 or len(after) != len(rows):
                        raise ValueError(
                            f"{path}: {site} has {tuple(rows.shape)} before and"
                            f" {tuple(after.shape)} after; they must be the same rows"
                        )
                yield operand, after
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or a damaged one ({error})") from None


def _tensor(path: Path, file, names: set[str], name: str) -> Tensor:
    if name not in names:
        site = name.rpartition(".")[0]
        known = sorted(other.rpartition(".")[2] for other in names if other.startswith(f"{site}."))
        raise ValueError(f"{path}: it holds no {name}{nearest(name.rpartition('.')[2], known)}")
    tensor = file.get_tensor(name)
    check_finite(f"{path}: {name}", tensor)
    return tensor


# --- the published layout -------------------------------------------------------------------------


def _published_files(folder: Path) -> list[tuple[Path, Path]]:
    before = {path.name.removesuffix(_BEFORE): path for path in folder.glob(f"*{_BEFORE}")}
    after = {path.name.removesuffix(_AFTER): path for path in folder.glob(f"*{_AFTER}")}
    if not before and not after:
        raise ValueError(f"{folder}: no tensors in this folder, looked for *{_BEFORE}, *{_AFTER}")
    for name in sorted(before.keys() ^ after.keys()):
        missing = f"{name}{_AFTER if name in before else _BEFORE}"
        raise ValueError(f"{folder}: {missing} is missing, half of a pair")

    def position(name: str) -> tuple[int, str]:
        number = name.partition("_")[0]
        return (int(number) if number.isdecimal() else 0, name)

    return [(before[name], after[name]) for name in sorted(before, key=position)]


def _published_name(path: Path) -> tuple[str, str]:
    """Site and kind: `12_weight_prehad.pt` is the site `12_weight` of kind `weight`."""
    site = path.name.removesuffix(_BEFORE)
    return site, site.rpartition("_")[2]


def _published_pair(before_path: Path, after_path: Path, values: int, seed: int) -> TensorPair:
    site, kind = _published_name(before_path)
    before, padded = _load_tensor(before_path), _load_tensor(after_path)
    size, order = before.shape[-1], padded.shape[-1]
    fits = (
        before.dim() == padded.dim()
        and order in (size, next_power_of_two(size))
        and all(b <= a for b, a in zip(before.shape, padded.shape, strict=True))
    )
    after = padded[tuple(slice(n) for n in before.shape[:-1])] if fits else padded
    if not fits or torch.count_nonzero(after) != torch.count_nonzero(padded):
        raise ValueError(
            f"{after_path}: the shape {tuple(padded.shape)} is not that of {before_path.name},"
            f" {tuple(before.shape)}, padded with zeros to powers of two"
        )
    rows = kept_rows(before.numel() // size, size, values=values, seed=seed)
    return TensorPair(
        site=site,
        kind=kind,
        role=kind,
        transform=PUBLISHED,
        before=before.reshape(-1, size)[rows].double().numpy(),
        after=after.reshape(-1, order)[rows].double().numpy(),
        before_ends=ends_of(before),
        after_ends=ends_of(after),
        count=before.numel(),
        count_after=after.numel(),
        padding=padded.numel() - after.numel(),
    )


def _load_tensor(path: Path) -> Tensor:
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: no tensor can be loaded from it safely ({reason})") from None
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{path}: it holds a {type(tensor).__name__}, not a tensor")
    if tensor.dim() == 0 or tensor.is_complex():
        raise ValueError(f"{path}: {tensor.dtype} of shape {tuple(tensor.shape)} is no operand")
    tensor = tensor.detach().float()
    check_finite(str(path), tensor)
    return tensor
