"""Quantization error by transform, and which simpler measure predicts it.

Range, band and kurtosis are proxies: what matters is ||v - v^||^2 / ||v||^2 of every operand. It is
measured with DOBI bounds (two-sided or one-sided, whichever errs less) found on the rotated rows;
where the transform is padded the error is taken after rotating back and cropping, since energy in
the coefficients that padding adds is none of the operand's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import stats
from torch import Tensor

from compsrt import kernels
from compsrt.analysis.measures import SHAPIRO_VALUES, Row, band, normality, ranges
from compsrt.analysis.paired import RESAMPLES, holm, paired_test, rank_correlation
from compsrt.analysis.tensors import Operand
from compsrt.calibration import search_bounds
from compsrt.transforms import transform_matrix

BITS = (2, 3, 4, 8)

PROXIES = {
    "range": "range, log2 ratio",
    "span999": "span of 99.9 %, log2 ratio",
    "iqr": "interquartile range, log2 ratio",
    "crest": "largest |x| / RMS, log2 ratio",
    "kurtosis": "kurtosis, log2 ratio",
    "shapiro": "1 - W, log10 ratio",
    "absolute": "band share, difference",
    "relative": "band share in std, difference",
}


def relative_error(rows: Tensor, bits: int, matrix: Tensor | None = None) -> float | None:
    """||v - v^||^2 / ||v||^2 of rows (R, size), quantized behind the transform (size, order).

    None for rows of zeros.
    """
    energy = float(rows.double().square().sum())
    if energy == 0:
        return None
    matrix = None if matrix is None else matrix.to(rows.dtype)
    rotated = rows if matrix is None else rows @ matrix
    lower, upper = search_bounds(rotated, bits, method="dobi", one_sided=None)
    if lower == upper:
        return 0.0  # one value, which is a level
    difference = kernels.fake_quantize(rotated, lower, upper, bits=bits) - rotated
    if matrix is not None and matrix.shape[0] != matrix.shape[1]:
        difference = difference @ matrix.mT
    return float(difference.double().square().sum()) / energy


def measure_operand(
    operand: Operand,
    transforms: Sequence[tuple[str, int]],
    bits: Sequence[int] = BITS,
    *,
    eps: float = 0.05,
    seed: int = 0,
) -> list[Row]:
    """A row for every transform, given as (name, seed), and width.

    `gain` is how many dB the error lies below that without a transform, None where the transform
    leaves the operand as it is. The deltas of PROXIES are measured on the same rows as the error,
    extremes included.
    """
    sampled = dataclasses.replace(operand, ends={})
    plain = {b: relative_error(operand.rows, b) for b in bits}
    rows = []
    for transform, transform_seed in transforms:
        matrix = transform_matrix(transform, operand.shape[-1], transform_seed)
        pair = sampled.pair(transform, transform_seed)
        proxies = {
            **ranges(pair),
            **normality(pair, values=SHAPIRO_VALUES, seed=seed),
            **band(pair, eps),
            "kurtosis_delta": _kurtosis_change(pair.before, pair.after),
        }
        for b in bits:
            error = plain[b] if matrix is None else relative_error(operand.rows, b, matrix)
            rows.append(
                {
                    "site": operand.site,
                    "kind": operand.kind,
                    "role": operand.role,
                    "transform": transform,
                    "seed": transform_seed if transform == "random" else None,
                    "bits": b,
                    "error": error,
                    "snr": _decibels(error),
                    "gain": None if matrix is None else _gain(plain[b], error),
                    "unchanged": matrix is None and transform != "none",
                    **{key: proxies[f"{key}_delta"] for key in PROXIES},
                }
            )
    return rows


def average_seeds(rows: Sequence[Row]) -> list[Row]:
    """One row a site, transform and width: numbers of several seeds become their mean.

    Seeds of one site are no further evidence on sites; `seed_spread` is their standard deviation.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["site"], row["transform"], row["bits"]), []).append(row)
    averaged = []
    for group in groups.values():
        row = dict(group[0], seeds=len(group))
        for key in ("error", "snr", "gain", *PROXIES):
            values = [entry[key] for entry in group]
            row[key] = None if None in values else float(np.mean(values))
        several = len(group) > 1 and row["gain"] is not None
        row["seed_spread"] = (
            float(np.std([entry["gain"] for entry in group], ddof=1)) if several else None
        )
        del row["seed"]
        averaged.append(row)
    return averaged


def gains(rows: Sequence[Row], key: str, *, resamples: int = RESAMPLES, seed: int = 0) -> list[Row]:
    """Paired tests of the gain over no transform by transform, width and scope, Holm over all.

    rows: as `average_seeds` gives them. key: "kind" (with a scope of all tensors) or "role".
    """
    tests = []
    for transform, bits, scope, chosen in _cells(rows, key):
        if transform == "none":
            continue
        tested = [row["gain"] for row in chosen if row["gain"] is not None]
        snr = [row["snr"] for row in chosen if row["snr"] is not None]
        tests.append(
            {
                "transform": transform,
                "bits": bits,
                "scope": scope,
                "snr": float(np.median(snr)) if snr else None,
                **dataclasses.asdict(paired_test(tested, resamples=resamples, seed=seed)),
                "untestable": len(chosen) - len(tested),
            }
        )
    for test, adjusted in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["p_holm"] = adjusted
    return tests


def correlations(rows: Sequence[Row], *, resamples: int = RESAMPLES, seed: int = 0) -> list[Row]:
    """Rank correlation over sites of every proxy with the gain, by transform, width and kind."""
    found = []
    for transform, bits, scope, chosen in _cells(rows, "kind"):
        if transform == "none":
            continue
        for proxy, heading in PROXIES.items():
            known = [(r[proxy], r["gain"]) for r in chosen if None not in (r[proxy], r["gain"])]
            x, y = zip(*known, strict=True) if known else ((), ())
            result = rank_correlation(x, y, resamples=resamples, seed=seed)
            found.append(
                {
                    "proxy": proxy,
                    "heading": heading,
                    "transform": transform,
                    "bits": bits,
                    "scope": scope,
                    **dataclasses.asdict(result),
                }
            )
    return found


def _cells(rows: Sequence[Row], key: str):
    """(transform, bits, scope, rows) of every combination."""
    scopes = list(dict.fromkeys(row[key] for row in rows))
    for transform in dict.fromkeys(row["transform"] for row in rows):
        for bits in dict.fromkeys(row["bits"] for row in rows):
            cell = [r for r in rows if r["transform"] == transform and r["bits"] == bits]
            if key == "kind" and len(scopes) > 1:
                yield transform, bits, "all", cell
            for scope in scopes:
                yield transform, bits, scope, [row for row in cell if row[key] == scope]


def _kurtosis_change(before: npt.NDArray, after: npt.NDArray) -> float | None:
    # The fourth moment over the squared second: 3 for a normal distribution, never below 1.
    if np.ptp(before) == 0 or np.ptp(after) == 0:
        return None
    moments = (float(stats.kurtosis(x.ravel(), fisher=False)) for x in (before, after))
    return math.log2(next(moments) / next(moments))


def _decibels(error: float | None) -> float | None:
    return -10 * math.log10(error) if error else None


def _gain(plain: float | None, error: float | None) -> float | None:
    return 10 * math.log10(plain / error) if plain and error else None
