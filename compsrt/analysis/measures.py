"""Measures of a tensor before and after a transform, and tests of their differences.

Every measure gives a row `{key}_before`, `{key}_after`, `{key}_delta` with the delta oriented so
that positive supports the claim (closer to normal, narrower, more values near zero). The unit of
all tests is the tensor. Tensors of one network are no random sample of anything: p says how
consistent a change is over this network's tensors, not over networks.

A tensor that cannot be measured (constant, too few values) has None and a note, and no test counts
it.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from compsrt.analysis.paired import RESAMPLES, holm, paired_test
from compsrt.analysis.tensors import TensorPair

Floats = npt.NDArray[np.float64]
Row = dict[str, Any]

# Above 5,000 values Royston's approximation of Shapiro-Wilk's p is not supported. The other three
# statistics grow with the number of values, so all four are taken on the same ones.
SHAPIRO_VALUES = 5000
_FEWEST_VALUES = 8  # of D'Agostino's test

NORMALITY = {
    "shapiro": "Shapiro-Wilk, 1 - W",
    "dagostino": "D'Agostino, K2",
    "anderson": "Anderson-Darling, A2",
    "jarque_bera": "Jarque-Bera, JB",
}
RANGE = {
    "range": "range, all values",
    "span999": "span of 99.9 %",
    "span99": "span of 99 %",
    "iqr": "interquartile range",
    "crest": "largest |x| / RMS",
}
BAND = {"absolute": "|x| <= eps", "relative": "|x| <= eps * std"}
COUNTINGS = ("real", "published")

_SPANS = {"span999": 0.999, "span99": 0.99, "iqr": 0.5}


def normality(pair: TensorPair, *, values: int = SHAPIRO_VALUES, seed: int = 0) -> Row:
    """Four distances from a normal distribution, on equally many values (at most `values`) of both.

    The delta is log10(before / after) of 1 - W, K2, A2, JB: 1 is a distance of a tenth. Also p of
    Shapiro-Wilk, K2 and JB. Values of one tensor depend on each other (tokens, channels), so
    these p are no tests of the tensor; the statistics serve as distances.
    """
    n = min(values, SHAPIRO_VALUES, pair.before.size, pair.after.size)
    row = _identity(pair) | {"tested": n}
    sides = {
        side: np.random.default_rng(seed).choice(x.ravel(), n, replace=False)
        for side, x in (("before", pair.before), ("after", pair.after))
    }
    note = next((found for x in sides.values() if (found := _not_testable(x))), "")
    for side, x in sides.items():
        found = {} if note else _normality(x)
        row |= {f"{key}_{side}": value for key, value in found.items()}
    for key in NORMALITY:
        before, after = row.get(f"{key}_before"), row.get(f"{key}_after")
        row[f"{key}_delta"] = None if note else _log_ratio(before, after, math.log10)
    return row | {"note": note}


def _normality(x: Floats) -> dict[str, float]:
    shapiro: Any = stats.shapiro(x)
    dagostino: Any = stats.normaltest(x)
    jarque_bera: Any = stats.jarque_bera(x)
    with warnings.catch_warnings():
        # Since SciPy 1.17 it asks how p is to be computed, of which only the statistic is used.
        warnings.simplefilter("ignore", FutureWarning)
        anderson: Any = stats.anderson(x, "norm")
    return {
        "shapiro": 1 - float(shapiro.statistic),
        "shapiro_p": float(shapiro.pvalue),
        "dagostino": float(dagostino.statistic),
        "dagostino_p": float(dagostino.pvalue),
        "anderson": float(anderson.statistic),
        "jarque_bera": float(jarque_bera.statistic),
        "jarque_bera_p": float(jarque_bera.pvalue),
        "skewness": float(stats.skew(x)),
        "excess_kurtosis": float(stats.kurtosis(x)),
    }


def ranges(pair: TensorPair) -> Row:
    """Range over all values, percentile spans, and largest magnitude over RMS.

    The delta is log2(before / after): at an equal step, the bits that are saved.
    `range_reduction` is 1 - after/before, the published figure.
    """
    row = _identity(pair)
    for side, x, ends in (
        ("before", pair.before, pair.before_ends),
        ("after", pair.after, pair.after_ends),
    ):
        row[f"range_{side}"] = ends[1] - ends[0]
        for key, share in _SPANS.items():
            low, high = np.quantile(x, ((1 - share) / 2, (1 + share) / 2))
            row[f"{key}_{side}"] = float(high - low)
        rms = math.sqrt(float(np.square(x).mean()))
        row[f"crest_{side}"] = max(map(abs, ends)) / rms if rms else None
    for key in RANGE:
        row[f"{key}_delta"] = _log_ratio(row[f"{key}_before"], row[f"{key}_after"], math.log2)
    before = row["range_before"]
    row["range_reduction"] = 1 - row["range_after"] / before if before else None
    return row | {"note": "" if row["range_delta"] is not None else "constant"}


def band(pair: TensorPair, eps: float, *, counting: str = "real") -> Row:
    """The share of |x| <= eps, and of |x| <= eps times the tensor's standard deviation.

    counting: "real" never counts padding. "published" adds to "after", as the published script
    does by default, the zeros of the padded axes, all of which are in the band: it turns the size
    of the padding into support for the claim. It applies to the absolute share alone.
    """
    row = _identity(pair)
    for side, x in (("before", pair.before), ("after", pair.after)):
        magnitude, spread = np.abs(x), float(x.std())
        row[f"absolute_{side}"] = float((magnitude <= eps).mean())
        row[f"relative_{side}"] = float((magnitude <= eps * spread).mean()) if spread else None
    if counting == "published":
        total = pair.count_after + pair.padding
        inside = row["absolute_after"] * pair.count_after + pair.padding
        row |= {"absolute_after": inside / total, "padding": pair.padding / total}
    for key in BAND:
        before, after = row[f"{key}_before"], row[f"{key}_after"]
        row[f"{key}_delta"] = None if before is None or after is None else after - before
    return row | {"note": "" if row["relative_delta"] is not None else "constant"}


def summarize(
    measures: Mapping[str, str],
    scopes: Mapping[str, Sequence[Row]],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Row]:
    """A paired test of every measure in every scope, with Holm's correction over all of them.

    scopes: rows by name, as `scopes_of` makes them. Medians of "before" and "after" are over the
    rows tested; `untestable` counts the others.
    """
    tests = []
    for key, heading in measures.items():
        for scope, chosen in scopes.items():
            tested = [row for row in chosen if row[f"{key}_delta"] is not None]
            test = paired_test(
                [row[f"{key}_delta"] for row in tested], resamples=resamples, seed=seed
            )
            medians = {
                side: float(np.median([row[f"{key}_{side}"] for row in tested])) if tested else None
                for side in ("before", "after")
            }
            tests.append(
                {
                    "measure": key,
                    "heading": heading,
                    "scope": scope,
                    **medians,
                    **dataclasses.asdict(test),
                    "untestable": len(chosen) - len(tested),
                }
            )
    for test, adjusted in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["p_holm"] = adjusted
    return tests


def scopes_of(rows: Sequence[Row], key: str) -> dict[str, list[Row]]:
    """The rows by their kind or role, in order of appearance."""
    return {
        value: [row for row in rows if row[key] == value]
        for value in dict.fromkeys(row[key] for row in rows)
    }


def _identity(pair: TensorPair) -> Row:
    return {
        "site": pair.site,
        "kind": pair.kind,
        "role": pair.role,
        "transform": pair.transform,
        "count": pair.count,
        "kept": pair.before.size,
    }


def _not_testable(x: Floats) -> str:
    if x.size < _FEWEST_VALUES:
        return f"fewer than {_FEWEST_VALUES} values"
    # Of numbers that differ in their last digits only, the moments would be rounding noise.
    return "constant" if np.ptp(x) <= 1e-10 * np.abs(x).max() else ""


def _log_ratio(before: float | None, after: float | None, log) -> float | None:
    return log(before / after) if before and after and min(before, after) > 0 else None
