"""Files of models: the packed file of a quantized model, and float state dicts of any origin.

A packed file is a safetensors file of at most five flat tensors, because every named tensor costs
header bytes, and names and shapes follow from the architecture:

    codes    uint8      codes of the quantized weights (kernels/packing.py), pruned ones left out,
                        each site's in as many bits as the spec gives it
    mask     uint8      one bit a weight that can be pruned, 1 where it is kept; only in a pruned model
    scalars  float32    of every quantizer those that it stores: lower, upper, alpha and beta
    scales   spec.storage    step and zero point of weights with more than one scale, where these were
                             made compact (`compact_scales`) and are not among the scalars
    floats   spec.storage    everything else: biases, norms, convolutions, position biases

each in the order in which `named_quantizers` and `stored_as_float` name its parts. Unstructured
pruning of a share p of b-bit weights so takes b (1 - p) + 1 bits a weight. One metadata key,
`compsrt`, holds all the rest as JSON: format version, architecture, spec, calibration, source,
results, and a checksum: the SHA-256 of the whole file with its own 64 digits taken as zeros. So not
one byte can change, in header, metadata or data, without `load` noticing. The same model gives the
same bytes. The format is 1 unless the spec says something that came later (`QuantSpec.file_format`):
what could be said in format 1 is written byte for byte as then.

What is packed gives the same output bit for bit after loading, so what cannot be stored without a
change is refused instead of rounded.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from . import models
from .files import atomic_write
from .kernels.packing import pack_mask, pack_parts, unpack_mask, unpack_parts
from .quantization import STORAGE, QuantSpec
from .quantizers import (
    Quantizer,
    WeightQuantizer,
    fine_sites,
    named_quantizers,
    observed,
    quant_spec,
    stored_as_float,
)

FORMAT = 2  # the newest that is read; 1 lacks the bits of single sites and of convolutions
_METADATA_KEY = "compsrt"
_BLANK = "0" * 64  # what the checksum is taken as while it is computed
_STATE_KEYS = ("params_ema", "params", "state_dict")
# What content that nothing of ours wrote makes of the code that interprets it.
_MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError)

StrPath = str | os.PathLike[str]


# --- Reading --------------------------------------------------------------------------------------


def load(
    path: StrPath,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    arithmetic: str = "auto",
) -> nn.Module:
    """A model from one file, float or packed, ready to use: eval mode, no gradients.

    path: a packed file, or float parameters under official names (.safetensors; .pth, .pt under
    `params_ema`, `params`, `state_dict` or bare). dtype: what it computes in. arithmetic: of a packed
    SwinIR, "auto": folded, fast; "fold", "integer": one of its two ways; "reference": quantizer by
    quantizer, bit for bit what was saved (`models.set_arithmetic`). Returns a module
    (B, 3, H, W) in [0, 1] -> (B, 3, scale H, scale W) with `.scale`, `.window_size`, `.card` (the
    file's metadata, a dict) and, if quantized, `.spec`. Raises FileNotFoundError, and ValueError
    for a file that is damaged, of a newer format, no checkpoint, or of another architecture;
    TypeError for a dtype that is none.
    """
    if not isinstance(dtype, torch.dtype):
        name = dtype if isinstance(getattr(torch, str(dtype), None), torch.dtype) else "float32"
        raise TypeError(f"dtype: {dtype!r} is no torch.dtype; use torch.{name}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype: {dtype} is not a floating-point type")
    tensors, card = _read(path)
    packed = "spec" in card
    try:
        model = _unpack(tensors, card) if packed else _float_model(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except _MALFORMED as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path}: not a model of this package: {reason}") from error
    model.card = card if packed else card.get("card", {})  # pyright: ignore[reportArgumentType]
    model = model.to(device, dtype).eval().requires_grad_(False)
    models.set_arithmetic(model, arithmetic)
    return model


def _float_model(tensors: Mapping[str, Tensor]) -> nn.Module:
    try:
        model = models.from_state_dict(tensors)
    except (KeyError, RuntimeError) as error:  # tensors missing, or of shapes that contradict
        what = models.describe_state_dict(tensors)
        reason = " ".join(str(error).split())
        raise ValueError(f"looks like {what}, but does not fit: {reason}") from None
    for name, tensor in tensors.items():
        if name.endswith((".weight", ".bias")) and not tensor.is_floating_point():
            raise ValueError(f"{name}: {tensor.dtype}, where floating-point weights are needed")
    return model


def read_state(path: StrPath) -> dict[str, Tensor]:
    """The state dict of a float model's file (formats as in `load`), on the CPU, types as stored.

    Raises FileNotFoundError, and ValueError for a file that is damaged, holds no state dict, is a
    pickle of more than tensors, or is a packed model.
    """
    tensors, card = _read(path)
    if "spec" in card:
        raise ValueError(f"{path}: a packed model, where float parameters are needed")
    return tensors


def _read(path: StrPath) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a file, and our own metadata if it has any."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():
        raise ValueError(f"{path}: not a file")
    data = path.read_bytes()
    if not data:
        raise ValueError(f"{path}: an empty file, not a checkpoint")
    if path.suffix == ".safetensors" or data[8:9] == b"{":
        return _read_safetensors(path, data)
    return _read_pickle(path, data), {}


def _read_safetensors(path: Path, data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        text = header.get("__metadata__", {}).get(_METADATA_KEY)
        tensors = safetensors.torch.load(data)
        card = {} if text is None else json.loads(text)
        checksum = card.pop("checksum", "")
        blanked = data.replace(checksum.encode(), _BLANK.encode(), 1)
    # A wrong byte can make anything of JSON: another type, a missing key, no JSON at all.
    except Exception as error:
        raise ValueError(
            f"{path}: damaged, or no safetensors file ({type(error).__name__})"
        ) from None
    ours = text is not None or "scalars" in tensors
    if ours and hashlib.sha256(blanked).hexdigest() != checksum:
        raise ValueError(f"{path}: damaged (checksum)")
    if type(card.get("format", FORMAT)) is not int or not isinstance(card.get("card", {}), dict):
        raise ValueError(f"{path}: not a model of this package: its metadata are malformed")
    if card.get("format", FORMAT) > FORMAT:
        raise ValueError(
            f"{path}: its format {card['format']} is newer than {FORMAT}, the newest that this"
            " version of compsrt reads; update compsrt"
        )
    return tensors, card


def _read_pickle(path: Path, data: bytes) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    # torch reports damage by nearly any of them: RuntimeError, EOFError, KeyError, IndexError, ...
    except Exception as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and found:
            raise ValueError(
                f"{path}: it holds {found[1]} beside tensors, and to unpickle that could run any"
                " code; save the state dict alone"
            ) from None
        raise ValueError(f"{path}: damaged, or no checkpoint ({type(error).__name__})") from None
    if isinstance(state, Mapping):
        state = next((state[key] for key in _STATE_KEYS if key in state), state)
    if not (isinstance(state, Mapping) and state and _all_tensors(state.values())):
        raise ValueError(
            f"{path}: no state dict in it, neither bare nor under {', '.join(_STATE_KEYS)}"
        )
    for key, value in state.items():
        if value.is_meta or value.layout != torch.strided:
            raise ValueError(f"{path}: {key} holds no values, or sparse ones; save dense tensors")
    # A model that was saved from inside DistributedDataParallel.
    wrapped = all(str(key).startswith("module.") for key in state)
    return {
        str(key).removeprefix("module.") if wrapped else str(key): value.detach()
        for key, value in state.items()
    }


def _all_tensors(values: Iterable[object]) -> bool:
    return all(isinstance(value, Tensor) for value in values)


# --- Writing --------------------------------------------------------------------------------------


def save_packed(
    model: nn.Module,
    path: StrPath,
    *,
    calibration: dict[str, Any] | None = None,
    source: dict[str, Any] | None = None,
    results: dict[str, Any] | None = None,
) -> None:
    """Write a quantized, calibrated model as a packed file, whole or not at all.

    calibration, source (the float model's file name and SHA-256), results: records for the
    metadata, of what JSON can hold; None keeps what the model's own file said. Raises ValueError
    for a float model, one that is not calibrated, unclamped codes (they are for comparison, and
    need not fit their bits), and values that the file's types cannot hold exactly; OSError as
    `atomic_write`.
    """
    spec = quant_spec(model)
    if spec is None:
        raise ValueError("model: it is a float model; quantize it first, or use save_float")
    if spec.codes == "unclamped":
        raise ValueError(
            f"model: unclamped codes need not fit {spec.bits_of_weights} bits and cannot be packed;"
            " they are for comparison only"
        )
    weights = _weight_quantizers(model)
    kept = [_kept(weight) for weight in weights.values()]
    scalars: list[Tensor] = []
    scales: list[Tensor] = []
    for site, quantizer in _calibrated_quantizers(model):
        dtype = quantizer.scale_type
        for name in quantizer.stored:
            found = _exactly(f"{site}.{name}", getattr(quantizer, name), dtype or torch.float32)
            (scalars if dtype is None else scales).append(found)
    tensors = {
        "scalars": torch.cat(scalars),
        "floats": torch.cat(
            [
                _exactly(name, tensor, STORAGE[spec.storage])
                for name, tensor in stored_as_float(model).items()
            ]
        ),
    }
    if scales:
        tensors["scales"] = torch.cat(scales)
    if any(weight.mask is not None for weight in weights.values()):
        masks = zip(kept, weights.values(), strict=True)
        tensors["mask"] = pack_mask(torch.cat([m.flatten() for m, w in masks if w.prunable]).cpu())
    tensors["codes"] = pack_parts(
        (weight.to_integers()[mask].cpu(), weight.bits)
        for weight, mask in zip(weights.values(), kept, strict=True)
    )
    records = {"calibration": calibration, "source": source, "results": results}
    card: dict[str, Any] = getattr(model, "card", {})
    card = card if "spec" in card else {}  # what is known of the float model is not about this one
    metadata = {
        "format": 2 if scales else spec.file_format,
        "architecture": models.describe(model),
        "spec": spec.to_json(),
        **{key: card.get(key) if value is None else value for key, value in records.items()},
    }
    atomic_write(Path(path), _sealed(tensors, metadata))


def save_float(
    model: nn.Module,
    path: StrPath,
    card: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a float model as safetensors under official parameter names, whole or not at all.

    card: metadata of what JSON can hold; None keeps the model's own. dtype: float32 or float16.
    Raises ValueError for a quantized model, another dtype, and values beyond the range of float16;
    OSError as `atomic_write`.
    """
    if quant_spec(model) is not None:
        raise ValueError("model: it is quantized; use save_packed")
    if dtype not in STORAGE.values():
        raise ValueError(f"dtype: {dtype} is not one of {', '.join(STORAGE)}")
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in model.state_dict().items()
    }
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name}: it holds values that are not finite as {dtype}")
    kept: dict[str, Any] = getattr(model, "card", {}) if card is None else card
    atomic_write(Path(path), _sealed(tensors, {"format": 1, "card": kept}))


def _sealed(tensors: dict[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """A safetensors file with its checksum, the first thing in the metadata, filled in."""
    try:
        spaces = None if metadata["format"] == 1 else (",", ":")  # the first format has them
        text = json.dumps({"checksum": _BLANK, **metadata}, allow_nan=False, separators=spaces)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata: JSON cannot hold it: {error}") from None
    data = safetensors.torch.save(tensors, {_METADATA_KEY: text})
    return data.replace(_BLANK.encode(), hashlib.sha256(data).hexdigest().encode(), 1)


def _exactly(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A flat copy in another type, refused if it would differ."""
    flat = tensor.detach().flatten().cpu()
    stored = flat.to(dtype)
    if not torch.equal(stored.to(flat.dtype), flat):
        raise ValueError(
            f"{name}: {flat.dtype} values that {dtype} does not hold exactly; the packed model"
            " would not be this one"
        )
    return stored


# --- The packed form of a quantized model ---------------------------------------------------------


def _unpack(tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> nn.Module:
    spec = QuantSpec.from_json(card["spec"])
    with torch.random.fork_rng(devices=[]):  # initial weights, all overwritten below
        model = models.quantized(models.from_description(card["architecture"]), spec)
    sites = dict(named_quantizers(model))
    weights = _weight_quantizers(model)
    if "mask" in tensors:
        prunable = [weight for weight in weights.values() if weight.prunable]
        sizes = [weight.size for weight in prunable]
        masks = unpack_mask(tensors["mask"], sum(size.numel() for size in sizes))
        for weight, mask in zip(prunable, _split(masks, sizes), strict=True):
            weight.mask = mask.clone()
    kept = [_kept(weight) for weight in weights.values()]
    parts = [(int(m.sum()), w.bits) for m, w in zip(kept, weights.values(), strict=True)]
    codes = unpack_parts(tensors["codes"], parts)
    compact = fine_sites(model) if "scales" in tensors else []
    for site in compact:
        site.set_compact(STORAGE[spec.storage])
    scalars = [
        getattr(site, name)
        for site in sites.values()
        if site not in compact
        for name in site.stored
    ]
    scales = [getattr(site, name) for site in compact for name in site.stored]
    floats = list(stored_as_float(model).values())
    with torch.no_grad():
        for targets, key in ((scalars, "scalars"), (scales, "scales"), (floats, "floats")):
            stored = tensors.get(key, torch.empty(0))
            shapes = [target.shape for target in targets]
            for target, values in zip(targets, _split(stored, shapes), strict=True):
                target.copy_(values)
    for quantizer in sites.values():
        quantizer.restore()
    for weight, mask, values in zip(weights.values(), kept, codes, strict=True):
        integers = torch.zeros(mask.shape, dtype=torch.uint8)
        integers[mask] = values
        weight.freeze(integers)
    return model


def _split(flat: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    """A flat tensor cut into tensors of the given shapes."""
    counts = [shape.numel() for shape in shapes]
    if len(flat) != sum(counts):
        raise ValueError(f"{len(flat)} stored values where its architecture has {sum(counts)}")
    return [part.view(shape) for part, shape in zip(flat.split(counts), shapes, strict=True)]


def _weight_quantizers(model: nn.Module) -> dict[str, WeightQuantizer]:
    return {
        name: quantizer
        for name, quantizer in named_quantizers(model)
        if isinstance(quantizer, WeightQuantizer)
    }


def _calibrated_quantizers(model: nn.Module) -> Iterable[tuple[str, Quantizer]]:
    for name, quantizer in named_quantizers(model):
        if not quantizer.calibrated:
            raise ValueError(f"model: {name} has no bounds; calibrate the model first")
        yield name, quantizer


def _kept(weight: WeightQuantizer) -> Tensor:
    """(C_out, order) bool: which codes count."""
    if weight.mask is None:
        return torch.ones(weight.size, dtype=torch.bool, device=weight.lower.device)
    return weight.mask


# --- What a file costs, and what it holds ---------------------------------------------------------


@torch.no_grad()
def size_report(model: nn.Module, path: StrPath | None = None) -> dict[str, Any]:
    """What a model and its file (None: it has none yet) take, counted and not claimed.

    Returns weights: the number of weights that are quantized, or would be, pruned ones included (of
    SwinIR those of linear layers, as in papers: what its convolutions take shows in the file's
    bytes); bits_per_weight: bits of their codes, mask and scales over that number; levels: the most
    distinct values of kept weights in one tensor, or one row or group of it where scales are finer
    (None for a float model); float_file_bytes: 4 bytes a parameter of the float network;
    file_bytes and ratio (float_file_bytes over file_bytes), None without a file. With unclamped
    codes a weight takes log2 of its tensor's levels, whatever spec.bits says.
    """
    with torch.device("meta"):
        network = models.from_description(models.describe(model))
    weights = sum(weight.numel() for weight in models.quantizable_weights(network))
    float_bytes = 4 * sum(parameter.numel() for parameter in network.parameters())
    sites = [site for site in _weight_quantizers(model).values() if site.prunable]
    levels = [_weight_levels(site) for site in sites]
    if sites:
        bits = sum(_bits(site, count) for site, count in zip(sites, levels, strict=True)) / weights
    elif path is not None:
        state = [tensor for tensor in read_state(path).values() if tensor.is_floating_point()]
        bits = 8 * sum(t.nbytes for t in state) / sum(t.numel() for t in state)
    else:
        bits = 32.0
    file_bytes = None if path is None else Path(path).stat().st_size
    return {
        "file_bytes": file_bytes,
        "bits_per_weight": bits,
        "weights": weights,
        "float_file_bytes": float_bytes,
        "ratio": None if file_bytes is None else float_bytes / file_bytes,
        "levels": max(levels, default=None),
    }


def _bits(site: WeightQuantizer, levels: int) -> float:
    """Bits that one weight takes in the file."""
    kept = int(_kept(site).sum())
    width = site.bits if site.codes == "clamped" else math.log2(levels)
    scalars = 8 * (site.scale_type or torch.float32).itemsize * len(site.stored)
    mask = 0 if site.mask is None else site.size.numel()
    return kept * width + mask + scalars * site.lower.numel()


def _weight_levels(site: WeightQuantizer) -> int:
    values, kept = site.rows(site()), site.rows(_kept(site))
    rows = zip(values, kept, strict=True) if site.lower.dim() else [(values, kept)]
    return max(row[mask].unique().numel() for row, mask in rows)


@torch.no_grad()
def count_levels(model: nn.Module, x: Tensor) -> dict[str, int]:
    """Distinct levels that every site of a quantized model really produces for x, by site name.

    x: (B, 3, H, W) in [0, 1]; a small picture is enough to tell, a large one takes a while. Of a
    weight the kept values count, per row where scales are per channel. {} for a float model.
    """
    levels = {name: _weight_levels(site) for name, site in _weight_quantizers(model).items()}
    names = {site: name for name, site in named_quantizers(model) if name not in levels}

    def quantize_and_count(site: Quantizer, x: Tensor) -> Tensor:
        output = site.quantize(x)
        rows = output.movedim(-3, 0) if site.lower.dim() == 3 else [output]  # of every head its own
        levels[names[site]] = max(row.unique().numel() for row in rows)
        return output

    # An observed quantizer is part of no fused product.
    with observed(names, quantize_and_count):
        model(x)
    return levels
