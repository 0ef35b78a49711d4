"""One method against another, from their metrics on the same pictures.

Read are the files of per-picture metrics that `python -m compsrt.evaluate` writes, or any CSV or
JSON with such columns:

    model (method, network)  test (set, dataset)  name (image, picture, file)  psnr  ssim

The unit is the picture. Seeds of a method are averaged on each picture first: they say how much a
method scatters, and are no further pictures. Without the column `name` every row is the average of
a test set, the unit is the set, and five sets cannot give a p below 1/32.
"""

from __future__ import annotations

import csv
import dataclasses
import fnmatch
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compsrt.analysis.paired import RESAMPLES, holm, paired_test
from compsrt.cli import nearest

Row = dict[str, Any]

METRICS = ("psnr", "ssim")
COLUMNS = {
    "model": ("model", "method", "network", "weights", "label"),
    "set": ("set", "test", "dataset", "test_set", "testset"),
    "name": ("name", "image", "picture", "file", "filename"),
    "seed": ("seed", "run"),
}
AVERAGES = "(averages)"  # the set that a table of averages is tested as


@dataclass(frozen=True)
class Score:
    """What one run of one model reached on one picture (name None: on the average of a set)."""

    model: str
    run: str
    set: str
    name: str | None
    within: tuple[str, ...]
    values: dict[str, float]
    source: str


def read_scores(paths: Sequence[Path], within: Sequence[str] = ()) -> list[Score]:
    """The rows of CSV and JSON files; one without a model column is one model, named as the file.

    within: columns that must agree too for two rows to be compared, such as scale. Raises
    FileNotFoundError; ValueError, with file and row, for what is missing, unknown or no number.
    """
    scores = [score for path in paths for score in _read_file(path, within)]
    if not scores:
        raise ValueError(f"{', '.join(map(str, paths))}: no rows")
    unnamed = next((score for score in scores if score.name is None), None)
    if unnamed is not None and any(score.name is not None for score in scores):
        raise ValueError(f"{unnamed.source}: it has averages while other rows have picture names")
    return scores


def models_of(scores: Sequence[Score]) -> list[str]:
    """The models' names, in order of appearance."""
    return list(dict.fromkeys(score.model for score in scores))


def compare(
    scores: Sequence[Score],
    method: str,
    baseline: str,
    *,
    within: Sequence[str] = (),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[list[Row], list[Row]]:
    """Test whether a method is above a baseline: (tests, one row a picture).

    method, baseline: names of models or patterns (`compsrt-*`); what matches counts as seeds.
    within: names of the columns given to `read_scores`. Every set and metric is one test of the
    family that Holm's correction covers. Raises ValueError for names that match nothing, and for
    a picture that one of the two lacks.
    """
    first, second = (_select(scores, pattern) for pattern in (method, baseline))
    lacking = min(first.keys() ^ second.keys(), default=None, key=str)
    if lacking is not None:
        has, lacks = (method, baseline) if lacking in first else (baseline, method)
        place = " ".join(part for part in (*lacking[0], lacking[1], lacking[2]) if part)
        raise ValueError(f"{place}: {has} has a result, {lacks} has none; a pair needs both")
    averages = all(score.name is None for score in scores)
    groups: dict[tuple, list[Row]] = {}
    pictures = []
    for (conditions, set_name, name), runs in first.items():
        row: Row = dict(zip(within, conditions, strict=True)) | {"set": set_name, "name": name}
        for metric in METRICS:
            if not all(metric in run for run in runs + second[conditions, set_name, name]):
                continue
            a, b = (
                [run[metric] for run in group]
                for group in (runs, second[conditions, set_name, name])
            )
            entry = {
                "method": float(np.mean(a)),
                "baseline": float(np.mean(b)),
                # What is written with few decimals ties often, and must tie in binary too.
                "difference": round(float(np.mean(a) - np.mean(b)), 10),
                "spread": max(np.std(a), np.std(b)) if max(len(a), len(b)) > 1 else None,
            }
            row |= {f"{metric}_{key}": value for key, value in entry.items()}
            group = (*conditions, AVERAGES if averages else set_name, metric)
            groups.setdefault(group, []).append(entry)
        pictures.append(row)
    if not groups:
        raise ValueError(f"{method} and {baseline} have no metric in common")
    tests = []
    for group, entries in groups.items():
        test = paired_test([e["difference"] for e in entries], resamples=resamples, seed=seed)
        tests.append(
            dict(zip((*within, "set", "metric"), group, strict=True))
            | {side: float(np.mean([e[side] for e in entries])) for side in ("method", "baseline")}
            | dataclasses.asdict(test)
        )
    for test, adjusted in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["p_holm"] = adjusted
    return tests, pictures


def _select(scores: Sequence[Score], pattern: str) -> dict[tuple, list[dict[str, float]]]:
    """The runs' metrics of every (within, set, name) of the models that match."""
    names = models_of(scores)
    chosen = {name for name in names if name == pattern} or set(fnmatch.filter(names, pattern))
    if not chosen:
        raise ValueError(f"no rows of the model {pattern!r}{nearest(pattern, names)}")
    found: dict[tuple, dict[tuple, Score]] = {}
    for score in scores:
        if score.model not in chosen:
            continue
        runs = found.setdefault((score.within, score.set, score.name), {})
        run = (score.model, score.run)
        if run in runs:
            place = " ".join(filter(None, (score.set, score.name)))
            raise ValueError(
                f"{score.source}: {score.model} has two results for {place}; tell seeds apart by a"
                f" column 'seed' or by files, and conditions by --within"
            )
        runs[run] = score
    return {key: [score.values for score in runs.values()] for key, runs in found.items()}


# --- files ----------------------------------------------------------------------------------------


def _read_file(path: Path, within: Sequence[str]) -> list[Score]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file") from None
    rows = (
        _json_rows(path, text)
        if path.suffix == ".json"
        else list(csv.DictReader(text.splitlines()))
    )
    if not rows:
        raise ValueError(f"{path}: no rows")
    header = list(rows[0])
    columns = {
        meaning: next((key for word in words for key in header if _folded(key) == word), None)
        for meaning, words in COLUMNS.items()
    }
    metrics = {metric: key for metric in METRICS for key in header if _folded(key) == metric}
    if columns["set"] is None:
        raise ValueError(f"{path}: no column for the test set (test), it has {', '.join(header)}")
    if not metrics:
        raise ValueError(f"{path}: neither psnr nor ssim among its columns {', '.join(header)}")
    for word in within:
        if word not in header:
            raise ValueError(f"{path}: no column {word!r}{nearest(word, header)}")

    def text_of(row: Row, meaning: str, default: str) -> str:
        key = columns[meaning]
        return default if key is None or row.get(key) in (None, "") else str(row[key])

    return [
        Score(
            model=text_of(row, "model", path.stem),
            run=text_of(row, "seed", str(path)),
            set=text_of(row, "set", ""),
            name=None if columns["name"] is None else text_of(row, "name", f"row {number}"),
            within=tuple(str(row[word]) for word in within),
            values={
                metric: _number(f"{path}, row {number}", key, row.get(key))
                for metric, key in metrics.items()
            },
            source=f"{path}, row {number}",
        )
        for number, row in enumerate(rows, start=1)
    ]


def _json_rows(path: Path, text: str) -> list[Row]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if isinstance(found, dict):  # the report of evaluate
        found = found.get("pictures")
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ValueError(
            f"{path}: it must be a list of objects, a picture each, or hold it as pictures"
        )
    return found


def _folded(key: str) -> str:
    return str(key).strip().casefold().replace(" ", "_")


def _number(place: str, column: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{place}: {column} is {value!r}, not a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{place}: {column} is {value}; only finite numbers can be compared")
    return number
