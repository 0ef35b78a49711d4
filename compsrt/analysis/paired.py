"""Tests of paired differences: what is claimed, how sure it is, and how large the effect is.

One difference belongs to one unit: a tensor before and after a transform, or a picture under two
methods. Differences are oriented so that positive supports the claim, and every test is one-sided:
p is the chance of at least this much support if signs were random; p near 1 says the opposite.

Nothing is reported where nothing can be: fewer than three pairs, or ties alone, have no p.

Sources: F. Wilcoxon, "Individual comparisons by ranking methods", 1945; S. Holm, "A simple
sequentially rejective multiple test procedure", 1979; interval of d_z by the noncentral t: J. H.
Steiger and R. T. Fouladi, "Noncentrality interval estimation", 1997; tau-b: M. Kendall, 1945.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special, stats

Floats = npt.NDArray[np.float64]

FEWEST_PAIRS = 3
RESAMPLES = 2000
CONFIDENCE = 0.95

# Up to here the distribution of the signed ranks is enumerated, as SciPy does it.
_LARGEST_EXACT = 50


@dataclass(frozen=True)
class PairedTest:
    """What n paired differences say of "the median is positive".

    wins, losses, ties: positive, negative and zero differences. statistic, p: Wilcoxon's signed
    ranks without the ties; p_sign: the exact sign test; least_p: the least p that this many
    differences can give, 2^-(wins + losses). effect: d_z = mean / standard deviation; its interval
    by the noncentral t, which takes the differences for normal. mean_low, mean_high: percentile
    bootstrap. All intervals are of 95 %. What cannot be computed is None, and note says why.
    """

    n: int
    wins: int
    losses: int
    ties: int
    mean: float | None = None
    median: float | None = None
    mean_low: float | None = None
    mean_high: float | None = None
    statistic: float | None = None
    p: float | None = None
    p_sign: float | None = None
    least_p: float | None = None
    effect: float | None = None
    effect_low: float | None = None
    effect_high: float | None = None
    note: str = ""


def paired_test(
    differences: npt.ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0
) -> PairedTest:
    """Test whether paired differences (n,) are positive.

    Raises ValueError if one of them is not finite: leave out beforehand what cannot be tested.
    """
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or not np.isfinite(d).all():
        raise ValueError(f"differences: {d.shape} values must be one row of finite numbers")
    wins, losses = int((d > 0).sum()), int((d < 0).sum())
    found: dict[str, Any] = {
        "n": len(d),
        "wins": wins,
        "losses": losses,
        "ties": len(d) - wins - losses,
    }
    if len(d) < FEWEST_PAIRS:
        return PairedTest(**found, note=f"fewer than {FEWEST_PAIRS} pairs")
    low, high = bootstrap_interval(d, lambda x: x.mean(-1), resamples=resamples, seed=seed)
    found |= {"mean": float(d.mean()), "median": float(np.median(d))}
    found |= {"mean_low": low, "mean_high": high}
    if wins + losses == 0:
        return PairedTest(**found, note="all ties")
    statistic, p = signed_ranks(d)
    effect, effect_low, effect_high = effect_size(d)
    return PairedTest(
        **found,
        statistic=statistic,
        p=p,
        p_sign=float(stats.binomtest(wins, wins + losses, alternative="greater").pvalue),
        least_p=0.5 ** (wins + losses),
        effect=effect,
        effect_low=effect_low,
        effect_high=effect_high,
        note="" if effect is not None else "all differences equal",
    )


def signed_ranks(differences: Floats) -> tuple[float, float]:
    """Wilcoxon's statistic (the positive ranks' sum) and one-sided p of differences not all zero.

    Zeros are dropped. Up to 50 differences p is exact, with equal magnitudes too: for these SciPy
    falls back on the normal distribution, which at n = 5 may claim p = 0.02 where no arrangement
    of signs is rarer than 1/32.
    """
    d = differences[differences != 0]
    ranks = stats.rankdata(np.abs(d))
    if len(np.unique(ranks)) == len(d) or len(d) > _LARGEST_EXACT:
        result: Any = stats.wilcoxon(d, alternative="greater")
        return float(result.statistic), float(result.pvalue)
    doubled = np.rint(2 * ranks).astype(int)  # a mean rank is a multiple of 1/2
    chances = np.ones(1)  # of every value of the doubled statistic
    for rank in doubled:
        shifted = np.zeros(len(chances) + rank)
        shifted[: len(chances)] = chances / 2
        shifted[rank:] += chances / 2
        chances = shifted
    observed = int(doubled[d > 0].sum())
    return observed / 2, min(1.0, float(chances[observed:].sum()))


def effect_size(differences: Floats) -> tuple[float | None, float | None, float | None]:
    """Cohen's d_z = mean / standard deviation with its 95 % interval.

    None where all differences are equal to four digits: there is no scatter to compare with.
    sqrt(n) d_z has a noncentral t distribution if the differences are normal; the interval holds
    the noncentralities for which the observed value is neither in the upper nor the lower 2.5 %.
    """
    n, spread = len(differences), float(np.std(differences, ddof=1))
    if spread <= 1e-4 * float(np.abs(differences).max()):
        return None, None, None
    root = np.sqrt(n)
    effect = float(differences.mean()) / spread
    low, high = (
        float(special.nctdtrinc(n - 1, (1 + side * CONFIDENCE) / 2, root * effect) / root)
        for side in (1, -1)
    )
    return effect, low, high


def bootstrap_interval(
    sample: Floats,
    statistic: Callable[[Floats], Floats],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """The 95 % percentile interval of a statistic that maps (resamples, n) to (resamples,)."""
    picks = np.random.default_rng(seed).integers(len(sample), size=(resamples, len(sample)))
    tails = (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2
    low, high = np.quantile(statistic(sample[picks]), tails)
    return float(low), float(high)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p of a family; None (not testable) stays None and does not count."""
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    reached = 0.0
    for place, (p, i) in enumerate(order):
        reached = max(reached, min(1.0, p * (len(order) - place)))
        adjusted[i] = reached
    return adjusted


# --- rank correlations ----------------------------------------------------------------------------


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rho and Kendall's tau-b of n pairs, 95 % bootstrap intervals, or None and why."""

    n: int
    spearman: float | None = None
    spearman_low: float | None = None
    spearman_high: float | None = None
    kendall: float | None = None
    kendall_low: float | None = None
    kendall_high: float | None = None
    note: str = ""


def rank_correlation(
    x: npt.ArrayLike, y: npt.ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0
) -> RankCorrelation:
    """How far the order of x (n,) is that of y (n,); whole pairs are drawn for the intervals."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    n = len(a)
    if n < FEWEST_PAIRS:
        return RankCorrelation(n, note=f"fewer than {FEWEST_PAIRS} pairs")
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return RankCorrelation(n, note="constant")
    picks = np.random.default_rng(seed).integers(n, size=(resamples, n))
    picks = np.concatenate([np.arange(n)[None], picks])  # the first row is the sample itself
    return RankCorrelation(
        n, *_with_interval(_spearman(a, b, picks)), *_with_interval(_kendall(a, b, picks))
    )


def _with_interval(values: Floats) -> tuple[float, float, float]:
    # A resample of one pair repeated has no order; it happens in tiny samples only.
    drawn = values[1:][np.isfinite(values[1:])]
    low, high = np.quantile(drawn, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return float(values[0]), float(low), float(high)


def _spearman(a: Floats, b: Floats, picks: npt.NDArray[np.int64]) -> Floats:
    ranks = [stats.rankdata(v[picks], axis=1) for v in (a, b)]
    u, v = (r - r.mean(1, keepdims=True) for r in ranks)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (u * v).sum(1) / np.sqrt((u * u).sum(1) * (v * v).sum(1))


def _kendall(a: Floats, b: Floats, picks: npt.NDArray[np.int64]) -> Floats:
    """tau-b = w'Sw / sqrt(w'|A|w w'|B|w) where w says how often each pair was drawn, A and B hold
    the signs of all differences, and S is their product: no resample is ever sorted again."""
    times = np.zeros(picks.shape)
    np.add.at(times, (np.arange(len(picks))[:, None], picks), 1)
    signs = [np.sign(v[:, None] - v[None, :]) for v in (a, b)]

    def total(matrix: Floats) -> Floats:
        return ((times @ matrix) * times).sum(1)

    with np.errstate(invalid="ignore", divide="ignore"):
        untied = total(np.abs(signs[0])) * total(np.abs(signs[1]))
        return total(signs[0] * signs[1]) / np.sqrt(untied)
