"""The tables that `python -m compsrt.statistics` prints: tests, gains, correlations, results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from compsrt.cli import format_table

Row = dict[str, Any]

_JUDGEMENT = {
    "signs": "+ / - / =",
    "p": "p",
    "p_holm": "p (Holm)",
    "p_sign": "p (sign)",
    "d_z": "d_z [95 %]",
    "note": "note",
}


def tests_table(tests: Sequence[Row]) -> str:
    """What `measures.summarize` found: a line a test."""
    rows = []
    for test in tests:
        left = f", {test['untestable']} not testable" if test["untestable"] else ""
        rows.append(
            {
                **test,
                **_judgement(test),
                "tensors": f"{test['scope']} ({test['n']}{left})",
                **{key: rounded(test[key]) for key in ("before", "after", "median")},
            }
        )
    columns = {
        "heading": "measure",
        "tensors": "tensors",
        "before": "before",
        "after": "after",
        "median": "change",
    }
    return format_table(rows, columns | _judgement_columns(tests))


def results_table(tests: Sequence[Row], within: Sequence[str]) -> str:
    """What `results.compare` found; A is the method, B the baseline."""
    rows = [
        {
            **test,
            **_judgement(test),
            "metric": test["metric"].upper(),
            "difference": interval(test["mean"], test["mean_low"], test["mean_high"], ".4f"),
            "least_p": rounded(test["least_p"]),
        }
        for test in tests
    ]
    columns = {
        **{word: word for word in within},
        "set": "set",
        "metric": "metric",
        "n": "n",
        "method": "A",
        "baseline": "B",
        "difference": "A - B [95 %]",
        **_judgement_columns(tests),
        "least_p": "least p",
    }
    return format_table(rows, columns, decimals={"method": 4, "baseline": 4})


def gains_table(rows: Sequence[Row], tests: Sequence[Row]) -> str:
    """Gains by kind and transform, a column a width, below the plain signal to error."""
    widths = list(dict.fromkeys(row["bits"] for row in rows))
    table = []
    for scope in dict.fromkeys(test["scope"] for test in tests):
        plain = [
            row
            for row in rows
            if scope in ("all", row["kind"])
            and row["transform"] == "none"
            and row["snr"] is not None
        ]
        if plain:
            medians = {b: np.median([r["snr"] for r in plain if r["bits"] == b]) for b in widths}
            cells = {str(b): f"{median:.2f}" for b, median in medians.items()}
            table.append({"tensors": scope, "transform": "none: dB", **cells})
        for transform in dict.fromkeys(test["transform"] for test in tests):
            row = {"tensors": scope, "transform": transform}
            for test in tests:
                if (test["scope"], test["transform"]) == (scope, transform):
                    row[str(test["bits"])] = _gain_cell(test)
            table.append(row)
    columns = {str(b): f"{b} bits" for b in widths}
    return format_table(table, {"tensors": "tensors", "transform": "transform", **columns})


def roles_table(tests: Sequence[Row], bits: int) -> str:
    """The median gain of every site's role, a column a transform."""
    here = [test for test in tests if test["bits"] == bits]
    table = []
    for role in dict.fromkeys(test["scope"] for test in here):
        found = {t["transform"]: t["median"] for t in here if t["scope"] == role}
        best = max(found, key=lambda t: -np.inf if found[t] is None else found[t])
        better = found[best] is not None and found[best] > 0
        table.append({"site": role, **found, "best": best if better else "none"})
    transforms = dict.fromkeys(test["transform"] for test in here)
    return format_table(table, ["site", *transforms, "best"], decimals=2)


def correlations_table(found: Sequence[Row]) -> str:
    """Spearman's rho of every proxy by kind, and Kendall's tau of all tensors, with intervals."""
    scopes = list(dict.fromkeys(row["scope"] for row in found))
    table: dict[str, Row] = {}
    for row in found:
        cells = table.setdefault(row["proxy"], {"proxy": row["heading"]})
        for key in ("spearman", "kendall"):
            value = interval(row[key], row[f"{key}_low"], row[f"{key}_high"], "+.2f")
            cells[f"{key} {row['scope']}"] = value or row["note"]
    columns = {"proxy": "proxy"} | {f"spearman {scope}": f"rho, {scope}" for scope in scopes}
    columns |= {f"kendall {scope}": f"tau, {scope}" for scope in scopes[:1]}
    return format_table(list(table.values()), columns)


def rounded(value: float | None) -> float | None:
    """Three significant digits."""
    return None if value is None else float(f"{value:.3g}")


def interval(value: float | None, low: float | None, high: float | None, style: str) -> str | None:
    """`0.52 [0.31, 0.70]`"""
    if value is None or low is None or high is None:
        return None
    return f"{value:{style}} [{low:{style}}, {high:{style}}]"


def _judgement(test: Row) -> Row:
    return {
        "signs": f"{test['wins']} / {test['losses']} / {test['ties']}",
        **{key: rounded(test[key]) for key in ("p", "p_holm", "p_sign")},
        "d_z": interval(test["effect"], test["effect_low"], test["effect_high"], ".2f"),
        "note": test["note"] or None,
    }


def _judgement_columns(tests: Sequence[Row]) -> dict[str, str]:
    noted = any(test["note"] for test in tests)
    return {key: text for key, text in _JUDGEMENT.items() if key != "note" or noted}


def _gain_cell(test: Row) -> str:
    if test["median"] is None:
        return f"- ({test['note']})"
    sure = test["p_holm"] is not None and test["p_holm"] < 0.05
    return f"{test['median']:+.2f}{'*' if sure else ' '} ({test['wins']}/{test['losses']})"
