"""The subcommands of `python -m compsrt.statistics`: arguments in, tables out, a report back.

Each prints its tables, writes what `--output` and `--figure` ask for, and returns what the last
line of stdout says.
"""

from __future__ import annotations

import csv
import io
import json
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from compsrt import demo
from compsrt.analysis import errors, figures, measures
from compsrt.analysis.dumps import read_operands, read_pairs, write_dump
from compsrt.analysis.results import AVERAGES, compare, models_of, read_scores
from compsrt.analysis.tables import (
    correlations_table,
    gains_table,
    results_table,
    roles_table,
    tests_table,
)
from compsrt.analysis.tensors import Operand, TensorPair, observe
from compsrt.checkpoint import load
from compsrt.cli import format_table, progress
from compsrt.data import PatchSampler, find_pairs
from compsrt.files import atomic_write
from compsrt.transforms import next_power_of_two

Row = dict[str, Any]


def perform(args: Namespace) -> Row:
    """Run the subcommand that the arguments name and return its report."""
    if getattr(args, "figure", None) is not None:
        figures.check_available(args.figure)
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
    handlers = {
        "dump": _dump,
        "normality": _normality,
        "range": _range,
        "band": _band,
        "error": _error,
        "results": _results,
    }
    report = {"command": args.subcommand, **handlers[args.subcommand](args)}
    kept = {key: getattr(args, key, None) for key in ("output", "figure")}
    return report | {key: path for key, path in kept.items() if path is not None}


# --- tensors --------------------------------------------------------------------------------------


def _dump(args: Namespace) -> Row:
    operands, source = _observe(args, args.transforms)
    path = args.output / "tensors.safetensors"
    write_dump(path, operands, args.transforms, seed=args.seed)
    rows = [
        {
            "site": operand.site,
            "kind": operand.kind,
            "role": operand.role,
            "shape": " x ".join(map(str, operand.shape)),
            "kept": operand.rows.numel(),
        }
        for operand in operands
    ]
    print(format_table(rows, ["site", "kind", "role", "shape", "kept"]))
    report = {"source": source, "transforms": args.transforms, "tensors": len(rows)}
    _keep(args, report, dump=rows)
    return report | {"file": path, "bytes": path.stat().st_size}


def _normality(args: Namespace) -> Row:
    drawn: list[figures.Histogram] = []

    def measure(pair: TensorPair) -> Row:
        if args.figure is not None:
            drawn.append(figures.histogram(pair, standardized=True))
        return measures.normality(pair, values=args.shapiro_values, seed=args.seed)

    rows, report, title = _test_tensors(
        args,
        measure,
        measures.NORMALITY,
        f"closer to a normal distribution? Distances on equally many values of both, at most"
        f" {args.shapiro_values}\n(Shapiro-Wilk allows 5000); change: log10(before / after), so"
        f" that 1 is a tenth of the distance.",
    )
    for side in ("before", "after"):
        p = [row.get(f"shapiro_p_{side}") for row in rows]
        report[f"not_rejected_{side}"] = sum(value is not None and value >= 0.05 for value in p)
    print(
        f"\nOf {len(rows)} tensors Shapiro-Wilk at 5 % does not reject normality of"
        f" {report['not_rejected_before']} before and {report['not_rejected_after']} after."
    )
    if args.figure is not None:
        figures.draw_normality(args.figure, title, rows, report["tests"], drawn)
    return report


def _range(args: Namespace) -> Row:
    rows, report, title = _test_tensors(
        args,
        measures.ranges,
        measures.RANGE,
        "narrower? change: log2(before / after), the bits that are saved at an equal step.",
    )
    reductions = [row["range_reduction"] for row in rows if row["range_reduction"] is not None]
    report["range_reduction"] = float(np.median(reductions)) if reductions else None
    if reductions:
        print(f"\nMedian reduction of the range: {report['range_reduction']:.1%}.")
    if args.figure is not None:
        figures.draw_range(args.figure, title, rows, report["tests"])
    return report


def _band(args: Namespace) -> Row:
    if not 0 < args.eps < float("inf"):
        raise ValueError(f"--eps {args.eps}: it must be positive and finite")
    published = args.counting == "published"
    if published and args.tensors is None and args.transform != "hadamard-padded":
        raise ValueError("--counting published: it needs --transform hadamard-padded, which pads")
    drawn: list[figures.Histogram] = []

    def measure(pair: TensorPair) -> Row:
        if args.figure is not None:
            drawn.append(figures.histogram(pair, standardized=False))
        return measures.band(pair, args.eps, counting=args.counting)

    counting = "Padding is not counted."
    if published:
        counting = (
            "Counting as published: every axis is padded\nto a power of two, and the zeros of that"
            " padding count as values in the band after, but not before."
        )
    rows, report, title = _test_tensors(
        args,
        measure,
        {"absolute": measures.BAND["absolute"]} if published else measures.BAND,
        f"more in the band? Shares of values, eps = {args.eps:g}; change: after - before."
        f" {counting}",
    )
    if args.figure is not None:
        figures.draw_band(args.figure, title, rows, report["tests"], drawn, args.eps)
    return report | {"eps": args.eps, "counting": args.counting}


def _error(args: Namespace) -> Row:
    if args.tensors is None:
        operands, source = _observe(args, ())
    else:
        _only_tensors(args)
        found = read_operands(args.tensors, values=args.values, seed=args.seed)
        operands, source = list(found), {"tensors": args.tensors}
    transforms = [
        (transform, seed)
        for transform in ("none", *args.transforms)
        for seed in (range(args.seeds) if transform == "random" else (0,))
    ]
    every = [
        row
        for operand in progress(operands, description="error", unit="tensor")
        for row in errors.measure_operand(operand, transforms, args.bits, seed=args.seed)
    ]
    rows = errors.average_seeds(every)
    settings = {"resamples": args.resamples, "seed": args.seed}
    by_kind, by_role = (errors.gains(rows, key, **settings) for key in ("kind", "role"))
    predicted = errors.correlations(rows, **settings)

    bits = 4 if 4 in args.bits else args.bits[0]
    compared = args.transforms[0]
    print("Signal to quantization error without a transform (median, dB), and the gain of each")
    print(
        "transform over it (median, dB; tensors better / worse; * Holm's p < 0.05 in this table):\n"
    )
    print(gains_table(rows, by_kind))
    print("".join(f"\n{remark}" for remark in _remarks(operands, rows, args.transforms)))
    print(f"\nMedian gain by site, dB at {bits} bits:\n")
    print(roles_table(by_role, bits))
    shown = [r for r in predicted if (r["transform"], r["bits"]) == (compared, bits)]
    print(f"\nRank correlation of each proxy's change with the gain, {compared}, {bits} bits:\n")
    print(correlations_table(shown))
    report = {
        "source": source,
        "tensors": len(operands),
        "bits": args.bits,
        "transforms": args.transforms,
        "seeds": args.seeds,
    }
    tables = {"error": every, "error_tests": by_kind, "error_tests_by_site": by_role}
    _keep(args, report, **tables, error_correlations=predicted)
    if args.figure is not None:
        title = f"Quantization error of {len(operands)} tensors of {_name(args)}, by transform"
        figures.draw_error(args.figure, title, rows, shown, compared, bits)
    overall = [test for test in by_kind if test["scope"] == by_kind[0]["scope"]]
    gains = {f"{test['transform']}, {test['bits']} bits": test["median"] for test in overall}
    return report | {"gain": gains}


def _remarks(
    operands: Sequence[Operand], rows: Sequence[Row], transforms: Sequence[str]
) -> list[str]:
    """What has to be known to compare the transforms with each other."""
    remarks = []
    for transform in transforms:
        left = {
            r["site"]: r["role"] for r in rows if r["transform"] == transform and r["unchanged"]
        }
        if left:
            remarks.append(
                f"{transform} leaves {len(left)} tensors as they are, which are no part of its"
                f" figures: {', '.join(dict.fromkeys(left.values()))}."
            )
    sizes = sorted({operand.shape[-1] for operand in operands})
    padded = [f"{next_power_of_two(n)} for {n}" for n in sizes if next_power_of_two(n) != n]
    if padded and "hadamard-padded" in transforms:
        remarks.append(
            f"hadamard-padded spends more codes ({', '.join(padded)}), which pay for some of its"
            " gain."
        )
    return remarks


def _test_tensors(
    args: Namespace,
    measure: Callable[[TensorPair], Row],
    headings: Mapping[str, str],
    question: str,
) -> tuple[list[Row], Row, str]:
    """Measure and test every tensor before and after one transform: rows, report, page's title."""
    pairs: Iterable[TensorPair]
    if args.tensors is None:
        operands, source = _observe(args, (args.transform,))
        pairs = (operand.pair(args.transform, args.seed) for operand in operands)
    else:
        _only_tensors(args)
        source = {"tensors": args.tensors, "values": args.values, "seed": args.seed}
        pairs = read_pairs(args.tensors, args.transform, values=args.values, seed=args.seed)
    rows, unchanged = [], []
    for pair in progress(pairs, description=args.subcommand, unit="tensor"):
        if np.array_equal(pair.before, pair.after):
            unchanged.append(pair.role)
        else:
            rows.append(measure(pair))
    if not rows:
        raise ValueError(f"the transform leaves all {len(unchanged)} tensors as they are")
    kinds, roles = (measures.scopes_of(rows, key) for key in ("kind", "role"))
    scopes = {"all": rows, **kinds} if len(kinds) > 1 else kinds
    settings = {"resamples": args.resamples, "seed": args.seed}
    tests = measures.summarize(headings, scopes, **settings)
    by_role = measures.summarize(headings, roles, **settings)

    transform = rows[0]["transform"]
    print(f"After {transform}: {question}\n")
    print(tests_table(tests))
    if any(test["p"] is not None and test["p"] > 0.975 for test in tests):
        print("\nThe tests are one-sided: a p near 1 says that the opposite holds.")
    if len(roles) > len(kinds):
        first = next(iter(headings))
        print(f"\nBy site, {headings[first]}:\n")
        print(tests_table([test for test in by_role if test["measure"] == first]))
    left_out = [f"{row['site']} ({row['note']})" for row in rows if row["note"]]
    if left_out:
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        print(f"\nNot testable: {', '.join(left_out[:3])}{more}.")
    if unchanged:
        print(
            f"\nLeft as they are by {transform}, and so no part of this: {len(unchanged)} tensors"
            f" ({', '.join(dict.fromkeys(unchanged))})."
        )
    report = {"source": source, "transform": transform, "tensors": len(rows)}
    report |= {"unchanged": len(unchanged), "tests": tests}
    name = args.subcommand
    _keep(args, report, **{name: rows, f"{name}_tests": tests, f"{name}_tests_by_site": by_role})
    title = f"{len(rows)} tensors of {_name(args)}, before and after {transform}"
    return rows, report, title


def _observe(args: Namespace, transforms: Sequence[str]) -> tuple[list[Operand], Row]:
    """The operands of the float model that the arguments name, and what they come from."""
    weights = args.weights or demo.WEIGHTS
    model = load(weights)
    scale: Any = getattr(model, "scale", None)
    pairs = demo.training_pairs() if args.pictures is None else find_pairs(args.pictures, scale)
    sampler = PatchSampler(pairs, scale, seed=args.seed)
    size = args.calibration_patch
    crops, _ = sampler.sample(args.calibration_count, size, step=0, augment=False)
    operands = observe(model, crops, transforms, values=args.values, seed=args.seed)
    kept = f"at most {args.values} values" if args.values else "all values"
    print(
        f"{weights.name}: {len(operands)} tensors (q, k and v share their input: it is one) on"
        f" {len(crops)} crops of {size} x {size}\nfrom {len(sampler)} pictures. Of each"
        f" tensor {kept} are kept (whole rows, seed {args.seed}).\n"
    )
    return operands, {
        "weights": weights,
        "pictures": sampler.names,
        "calibration_count": args.calibration_count,
        "calibration_patch": size,
        "values": args.values,
        "seed": args.seed,
    }


def _only_tensors(args: Namespace) -> None:
    for name in ("weights", "pictures"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name}: it cannot be combined with --tensors, which replaces it")


# --- results --------------------------------------------------------------------------------------


def _results(args: Namespace) -> Row:
    scores = read_scores(args.files, args.within)
    models = models_of(scores)
    method, baseline = args.method, args.baseline
    if (method is None or baseline is None) and len(models) != 2:
        raise ValueError(
            f"--method and --baseline: say which two of these to compare: {', '.join(models)}"
        )
    method = method or next(name for name in models if name != baseline)
    baseline = baseline or next(name for name in models if name != method)
    tests, pictures = compare(
        scores, method, baseline, within=args.within, resamples=args.resamples, seed=args.seed
    )
    print(f"A = {method}, B = {baseline}; one-sided: A is better.\n")
    print(results_table(tests, args.within))
    notes = _limits(tests)
    print("".join(f"\n{note}" for note in notes))
    report = {"method": method, "baseline": baseline, "files": args.files, "tests": tests}
    _keep(args, report | {"notes": notes}, results=pictures, results_tests=tests)
    if args.figure is not None:
        title = f"{method} against {baseline}"
        figures.draw_results(args.figure, title, tests, pictures, args.within)
    return report | {"notes": notes}


def _limits(tests: Sequence[Row]) -> list[str]:
    """What these tests could not have shown, whatever the differences."""
    notes = []
    averages = [test["n"] for test in tests if test["set"] == AVERAGES]
    if averages:
        n = max(averages)
        notes.append(
            f"Every row is a set's average, so n is the number of sets. No arrangement of {n} signs"
            f" is rarer than 1/{2**n}:\nn = {n} cannot give p < 1/{2**n} = {0.5**n:.3g}, however"
            f" large the differences. Metrics per picture can."
        )
    few = {
        f"{test['set']} (n = {test['n']})": test["least_p"]
        for test in tests
        if test["least_p"] is not None and test["least_p"] * len(tests) >= 0.05
    }
    if few and not averages:
        limits = ", ".join(f"{name} below {least:.3g}" for name, least in few.items())
        notes.append(f"Too few pairs for a small p, before any correction: {limits} is impossible.")
    return notes


# --- files ----------------------------------------------------------------------------------------


def _keep(args: Namespace, report: Row, **tables: Sequence[Row]) -> None:
    """Write every table as NAME.csv, and all of them with the report as SUBCOMMAND.json."""
    if args.output is None:
        return
    for name, rows in tables.items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        atomic_write(args.output / f"{name}.csv", text.getvalue().encode())
    content = {"command": args.subcommand, **report, **tables}
    text = json.dumps(content, indent=1, default=str, allow_nan=False)
    atomic_write(args.output / f"{args.subcommand}.json", text.encode())


def _name(args: Namespace) -> str:
    return (args.tensors or args.weights or demo.WEIGHTS).name
