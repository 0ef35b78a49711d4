"""Models side by side: quality on test sets beside what each model costs, as rows and a table."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from . import checkpoint, data, inference
from .cli import format_table
from .counting import count
from .data import Pair
from .distributed import Ranks
from .files import atomic_write
from .quantizers import quant_spec, quantizers

# Side of the LR crop that levels are counted on: its 36 windows fill every level that there is.
LEVELS_CROP = 48
MACS_SIZE = 720, 1280  # of the output that multiply-adds are counted for
Score = dict[str, Any]
SCORES = ("psnr", "ssim", "milliseconds")


def score(
    name: str,
    model: nn.Module | None,
    sets: dict[str, list[Pair]],
    scale: int,
    *,
    path: str | Path | None = None,
    ranks: Ranks | None = None,
    save: Path | None = None,
    against: Path | None = None,
    self_ensemble: bool = False,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One model (None: bicubic enlargement) on test sets: its row, and the values of every picture.

    path: the model's file, for its bytes. save: folder for the pictures, as TEST/NAME.png. against:
    such a folder of another model. self_ensemble: as `tiling.self_ensemble`. Errors as
    `inference.evaluate_pairs`. The row: model, tests {name: psnr, ssim}, milliseconds, with
    `against` the least agreement (dB) of all pictures, and, for a model, all of
    `checkpoint.size_report`, levels counted over weights and activations, parameters, and macs for
    an output of 1280 x 720.
    """
    tests = {
        test: inference.evaluate_pairs(
            model,
            pairs,
            scale,
            ranks=ranks,
            save=save / test if save else None,
            against=against / test if against else None,
            self_ensemble=self_ensemble,
            description=f"{name}, {test}",
        )
        for test, pairs in sets.items()
    }
    pictures = [
        {"model": name, "test": test, **score} for test, all_ in tests.items() for score in all_
    ]
    row: dict[str, Any] = {
        "model": name,
        "tests": {test: means(scores, "psnr", "ssim") for test, scores in tests.items()},
        **means(pictures, "milliseconds"),
    }
    if against is not None:
        row["agreement"] = min(picture["agreement"] for picture in pictures)
    if model is not None:
        row |= checkpoint.size_report(model, path) | {"levels": _levels(model, sets, scale)}
        counted = count(model, *MACS_SIZE)
        row |= {"parameters": counted.parameters, "macs": counted.macs}
    return row, pictures


def score_all(
    candidates: Iterable[tuple[str, nn.Module | None, str | Path | None]],
    sets: dict[str, list[Pair]],
    scale: int,
    ranks: Ranks | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """`score` of several models (name, model, its file), in one list each; nothing without sets."""
    rows, pictures = [], []
    for name, model, path in candidates if sets else ():
        row, scores = score(name, model, sets, scale, path=path, ranks=ranks)
        rows.append(row)
        pictures += scores
    return rows, pictures


def add_differences(rows: list[dict[str, Any]], pictures: list[Score], first: str) -> None:
    """Give every row that has an agreement the psnr_difference: the most that the PSNR (dB, against
    HR) of a picture differs from that of the model `first`."""
    theirs = {(p["test"], p["name"]): p["psnr"] for p in pictures if p["model"] == first}
    for row in rows:
        if "agreement" in row:
            mine = [p for p in pictures if p["model"] == row["model"]]
            pairs = [(p["psnr"], theirs[p["test"], p["name"]]) for p in mine]
            # Two infinities are no further apart.
            row["psnr_difference"] = max(abs(a - b) if a != b else 0.0 for a, b in pairs)


def test_sets(folders: Sequence[str], scale: int) -> dict[str, list[Pair]]:
    """The pairs of each folder by its name in tables. Raises as `data.find_pairs` and `short_names`."""
    names = short_names(folders)
    return {n: data.find_pairs(folder, scale) for n, folder in zip(names, folders, strict=True)}


def short_names(paths: Sequence[str]) -> list[str]:
    """What the table calls files and folders: as few of their last parts as tell them apart."""
    parts = [Path(os.path.abspath(path)).parts[1:] for path in paths]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-length:]).removesuffix(".safetensors") for part in parts]
        if len(set(names)) == len(names):
            return names
    if parts:
        raise ValueError(f"{', '.join(paths)}: the same one twice")
    return []


def means(scores: list[dict[str, Any]], *keys: str) -> dict[str, float]:
    """The mean of each key; exactly the same whatever process measured which picture."""
    return {key: math.fsum(score[key] for score in scores) / len(scores) for key in keys}


def _levels(model: nn.Module, sets: dict[str, list[Pair]], scale: int) -> int | None:
    """The most distinct levels in any tensor of the spec's bits, for a crop of the first test picture.

    Pictures and sums that no convolution reads have 8 bits in a SESR, and convolutions bits of their
    own in a SwinIR, whatever the spec says of the rest.
    """
    spec, sites = quant_spec(model), quantizers(model)
    if spec is None:
        return None
    lr, _ = data.load_pair(next(iter(sets.values()))[0], scale)
    weight = next(model.parameters())
    crop = data.to_tensor(lr[:LEVELS_CROP, :LEVELS_CROP]).to(weight.device, weight.dtype)
    bits = max(
        spec.bits_of_weights, spec.bits_of_activations, *(bits for _, bits in spec.site_bits)
    )
    levels = checkpoint.count_levels(model, crop)
    if spec.codes == "clamped":
        assert all(count <= 2 ** sites[site].bits for site, count in levels.items())
    return max(count for site, count in levels.items() if sites[site].bits <= bits)


def table(rows: list[dict[str, Any]], *, markdown: bool = False) -> str:
    """The rows of `score` as text; a column that no row has is left out."""
    lines, shown, decimals = columns(rows)
    return format_table(lines, shown, decimals=decimals, markdown=markdown)


def columns(
    rows: list[dict[str, Any]],
) -> tuple[list[dict[str, Any]], dict[str, str], dict[str, int]]:
    """What a table of the rows of `score` shows: flat lines, key -> heading, key -> decimals."""
    tests = list(rows[0]["tests"]) if rows else []
    headings = {"model": "model"}
    decimals = {"kB": 1, "bits_per_weight": 2, "ratio": 2, "milliseconds": 0, "seconds": 0}
    decimals |= {"giga": 2, "agreement": 2, "psnr_difference": 4}
    for test in tests:
        headings |= {f"{test} psnr": f"{test} PSNR", f"{test} ssim": "SSIM"}
        decimals |= {f"{test} psnr": 3, f"{test} ssim": 4}
    headings |= {
        "parameters": "parameters",
        "giga": "GMACs",
        "bits_per_weight": "bits/weight",
        "kB": "file kB",
        "ratio": "float/file",
        "levels": "levels",
        "agreement": "agree dB",
        "psnr_difference": "PSNR differs",
        "milliseconds": "ms/picture",
        "seconds": "made in s",
    }
    lines = [
        {
            **row,
            **{f"{test} {key}": row["tests"][test][key] for test in tests for key in SCORES[:2]},
            "giga": row["macs"] / 1e9 if row.get("macs") else None,
            "kB": row["file_bytes"] / 1000 if row.get("file_bytes") else None,
        }
        for row in rows
    ]
    present = {key for line in lines for key, value in line.items() if value is not None}
    shown = {key: head for key, head in headings.items() if key in present}
    return lines, shown, decimals


def write(folder: Path, name: str, report: dict[str, Any], pictures: list[dict[str, Any]]) -> None:
    """NAME.json: the report and the values of every picture; NAME.csv: these alone."""
    # Identical pictures have an infinite PSNR, which JSON has no word for.
    text = json.dumps({**report, "pictures": pictures})
    plain = json.loads(text, parse_constant=lambda _: None)
    atomic_write(folder / f"{name}.json", json.dumps(plain, indent=1).encode())
    lines = io.StringIO()
    agreement = ["agreement"] * any("agreement" in picture for picture in pictures)
    writer = csv.DictWriter(lines, ["model", "test", "name", *SCORES, *agreement])
    writer.writeheader()
    writer.writerows(pictures)
    atomic_write(folder / f"{name}.csv", lines.getvalue().encode())
