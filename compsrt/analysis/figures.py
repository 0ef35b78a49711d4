"""One page of plots for every kind of statistics, 1200 pixels wide (matplotlib, the extra `demo`).

Colours are those of Okabe and Ito, "Color Universal Design" (2008), which people of all kinds of
colour vision tell apart; grey is always "before", and what has several series has several markers.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compsrt.analysis.tensors import TensorPair
from compsrt.files import atomic_write

Row = dict[str, Any]

GREY, BLUE, ORANGE, GREEN, PINK, YELLOW, SKY = (
    "#8c8c8c", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
)  # fmt: skip
MARKED = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (PINK, "D"), (YELLOW, "v"), (SKY, "P"))
BLACK = "#333333"
_SCOPES = {"weight": (BLUE, "o"), "activation": (ORANGE, "s"), "all": (BLACK, "D")}
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
_WIDTH, _DPI = 12, 100


def check_available(path: Path) -> None:
    """Raise ValueError if a page cannot be drawn to this path, before anything is computed."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"--figure {path}: the page is a picture, give it the suffix .png")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--figure {path}: no folder {path.parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("--figure needs matplotlib: pip install 'compsrt[demo]'") from None


# --- pages ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Histogram:
    """The densities (bins,) of one tensor before and after, between common edges (bins + 1,)."""

    edges: npt.NDArray[np.float64]
    before: npt.NDArray[np.float64]
    after: npt.NDArray[np.float64]


def histogram(pair: TensorPair, *, standardized: bool, bins: int = 61) -> Histogram:
    """Densities of a pair: each in its own mean and std, or both over 2 std of "before"."""
    sides = pair.before.ravel(), pair.after.ravel()
    if standardized:
        sides = tuple((x - x.mean()) / (x.std() or 1) for x in sides)
        reach = 7.0
    else:
        reach = 2 * float(sides[0].std()) or 1.0
    edges = np.linspace(-reach, reach, bins + 1)
    densities = (np.histogram(x, edges)[0] / (x.size * np.diff(edges)) for x in sides)
    return Histogram(edges, *densities)


def draw_normality(
    path: Path, title: str, rows: Sequence[Row], tests: Sequence[Row], drawn: Sequence[Histogram]
) -> None:
    """Histograms of four tensors from most to least improved, distances, effect sizes."""
    page = _Page(path, title)
    x = np.linspace(-5, 5, 200)
    normal = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    for place, (row, found) in enumerate(_examples(rows, drawn, "shapiro_delta")):
        axes = page.panel(0, place, f"{_short(row)}\n1 − W: {_arrow(row, 'shapiro')}")
        _paired_histogram(axes, found)
        axes.plot(x, normal, color="black", linewidth=1, linestyle=":", label="normal")
        axes.set_yscale("log")
        axes.set_ylim(1e-5, 3)
        axes.set_xlabel("standard deviations")
    page.legend(0, "Most improved, thirds, least improved of all tensors (density)")
    axes = page.panel(1, slice(0, 2), "Distance from normal, 1 − W: below the line is closer after")
    _before_after(axes, rows, "shapiro")
    _forest(
        page.panel(1, slice(2, 4), "Effect of the transform (positive: closer to normal)"), tests
    )
    page.save()


def draw_range(path: Path, title: str, rows: Sequence[Row], tests: Sequence[Row]) -> None:
    """Range before and after, range against interquartile range, effect sizes."""
    page = _Page(path, title)
    axes = page.panel(0, slice(0, 2), "Range (all values): below the line is narrower after")
    _before_after(axes, rows, "range")
    axes = page.panel(0, slice(2, 4), "Interquartile range: where most values lie")
    _before_after(axes, rows, "iqr")
    axes = page.panel(1, slice(0, 2), "log2(before / after) of the range, by site")
    _by_role(axes, rows, "range_delta", "bits of range saved")
    _forest(page.panel(1, slice(2, 4), "Effect of the transform (positive: narrower)"), tests)
    page.save()


def draw_band(
    path: Path,
    title: str,
    rows: Sequence[Row],
    tests: Sequence[Row],
    drawn: Sequence[Histogram],
    eps: float,
) -> None:
    """Histograms around zero with the band, shares before and after, effect sizes."""
    page = _Page(path, title)
    for place, (row, found) in enumerate(_examples(rows, drawn, "absolute_delta")):
        axes = page.panel(0, place, f"{_short(row)}\nin band: {_arrow(row, 'absolute', '.1%')}")
        axes.axvspan(-eps, eps, color=YELLOW, alpha=0.25, linewidth=0, label=f"|x| ≤ {eps:g}")
        _paired_histogram(axes, found)
        axes.set_xlim(found.edges[0], found.edges[-1])
        axes.set_xlabel("value")
        axes.set_yticks([])
        axes.spines.left.set_visible(False)
    page.legend(0, "Most gained, thirds, most lost of all tensors (density)")
    axes = page.panel(1, slice(0, 2), f"Share of |x| ≤ {eps:g}: above the line is more after")
    _before_after(axes, rows, "absolute", logarithmic=False)
    _forest(page.panel(1, slice(2, 4), "Effect of the transform (positive: more in band)"), tests)
    page.save()


def draw_error(
    path: Path, title: str, rows: Sequence[Row], found: Sequence[Row], transform: str, bits: int
) -> None:
    """Gain by transform and width for each kind, and what predicts it (found: correlations)."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    page = _Page(path, title)
    spans = [slice(0, 4)] if len(kinds) == 1 else [slice(0, 2), slice(2, 4)]
    for kind, span in zip(kinds, spans, strict=False):
        axes = page.panel(0, span, f"Error below that without a transform, {kind} tensors")
        _gain_panel(axes, [row for row in rows if row["kind"] == kind])
    axes = page.panel(1, slice(0, 2), f"Gain of {transform} at {bits} bits, by site")
    here = [row for row in rows if row["transform"] == transform and row["bits"] == bits]
    _by_role(axes, here, "gain", "dB")
    axes = page.panel(1, slice(2, 4), f"What predicts it ({transform}, {bits} bits)? Spearman's ρ")
    _correlations(axes, found)
    page.save()


def draw_results(
    path: Path, title: str, tests: Sequence[Row], pictures: Sequence[Row], within: Sequence[str]
) -> None:
    """The difference of every picture by set, and effect sizes. within: as in `results.compare`."""

    def place_of(row: Row) -> str:
        return " ".join([*(f"{word} {row[word]}" for word in within), row["set"]])

    page = _Page(path, title)
    metrics = list(dict.fromkeys(test["metric"] for test in tests))
    spans = [slice(0, 4)] if len(metrics) == 1 else [slice(0, 2), slice(2, 4)]
    for metric, span in zip(metrics, spans, strict=True):
        groups: dict[str, list[float]] = {}
        for row in pictures:
            if f"{metric}_difference" in row:
                groups.setdefault(place_of(row), []).append(row[f"{metric}_difference"])
        axes = page.panel(0, span, f"Difference of {metric.upper()}, every picture of a set")
        _strips(axes, groups)
        axes.set_ylabel("dB" if metric == "psnr" else "")
    labelled = [
        test | {"heading": test["metric"].upper(), "scope": place_of(test)} for test in tests
    ]
    _forest(page.panel(1, slice(0, 4), "Effect size (positive: the first is better)"), labelled)
    page.save()


class _Page:
    """Two rows of four columns, laid out each by itself, saved as 1200 pixels across."""

    def __init__(self, path: Path, title: str):
        import matplotlib
        from matplotlib.figure import Figure

        self.path, self.style = path, matplotlib.rc_context(STYLE)
        self.style.__enter__()
        self.figure = Figure(figsize=(_WIDTH, 8.6), dpi=_DPI, layout="constrained")
        parts: Any = self.figure.subfigures(3, 1, height_ratios=[0.06, 1, 1])
        head, *self.rows = parts
        head.text(0.01, 0.5, title, fontsize=14, va="center")
        self.grids = [row.add_gridspec(1, 4) for row in self.rows]

    def panel(self, row: int, column: int | slice, title: str) -> Any:
        axes = self.rows[row].add_subplot(self.grids[row][0, column])
        axes.set_title(title)
        return axes

    def legend(self, row: int, title: str) -> None:
        """One legend for a whole row, from its first panel, under a title."""
        if not self.rows[row].axes:
            self.rows[row].text(0.01, 0.9, "No tensor could be tested.")
            return
        handles, labels = self.rows[row].axes[0].get_legend_handles_labels()
        self.rows[row].legend(
            handles, labels, loc="outside upper left", ncols=4, title=title, alignment="left"
        )

    def save(self) -> None:
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png")
        self.style.__exit__(None, None, None)
        atomic_write(self.path, buffer.getvalue())


# --- panels ---------------------------------------------------------------------------------------


def _paired_histogram(axes: Any, found: Histogram) -> None:
    axes.stairs(found.before, found.edges, fill=True, color=GREY, alpha=0.6, label="before")
    axes.stairs(found.after, found.edges, baseline=None, color=BLUE, linewidth=1.6, label="after")


def _before_after(axes: Any, rows: Sequence[Row], key: str, *, logarithmic: bool = True) -> None:
    known = [row for row in rows if row[f"{key}_delta"] is not None]
    for kind, (color, marker) in _marks(row["kind"] for row in known).items():
        points = [(r[f"{key}_before"], r[f"{key}_after"]) for r in known if r["kind"] == kind]
        axes.scatter(*zip(*points, strict=True), s=32, color=color, marker=marker, alpha=0.75,
                     linewidths=0, label=f"{kind} ({len(points)})")  # fmt: skip
    if not known:
        axes.text(0.5, 0.5, "nothing to show", ha="center", transform=axes.transAxes)
        return
    values = [row[f"{key}_{side}"] for row in known for side in ("before", "after")]
    low, high = min(values), max(values)
    if logarithmic:
        axes.set_xscale("log")
        axes.set_yscale("log")
        ends = low / 1.3, high * 1.3
    else:
        ends = low - 0.03, high + 0.03
    axes.plot(ends, ends, color="black", linewidth=0.8)
    axes.set_xlabel("before")
    axes.set_ylabel("after")
    _legend(axes)


def _forest(axes: Any, tests: Sequence[Row]) -> None:
    """d_z with its interval, a line each; hollow where Holm's p is not below 5 %."""
    marks = _marks(test["scope"] for test in tests)
    labels = []
    for place, test in enumerate(tests):
        color, marker = marks[test["scope"]]
        labels.append(f"{test['heading']}, {test['scope']} ({test['n']})")
        if test["effect"] is None:
            axes.text(0, place, test["note"], fontsize=9, va="center", ha="center", color=GREY)
            continue
        sure = test["p_holm"] is not None and test["p_holm"] < 0.05
        axes.plot(
            [test["effect_low"], test["effect_high"]], [place] * 2, color=color, linewidth=1.8
        )
        axes.plot(test["effect"], place, marker, color=color, markersize=7,
                  markerfacecolor=color if sure else "white")  # fmt: skip
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels, fontsize=9 if len(labels) > 10 else 10)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlabel("d_z with 95 % interval; filled: Holm's p < 0.05")


def _by_role(axes: Any, rows: Sequence[Row], key: str, label: str) -> None:
    """Every site as a dot in the line of its role, ordered by the median."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        if row[key] is not None:
            groups.setdefault(row["role"], []).append(row[key])
    ordered = sorted(groups, key=lambda role: -float(np.median(groups[role])))
    for place, role in enumerate(ordered):
        axes.plot(groups[role], [place] * len(groups[role]), "o", color=BLUE, alpha=0.6,
                  markersize=6, markeredgewidth=0)  # fmt: skip
        axes.plot([float(np.median(groups[role]))] * 2, [place - 0.3, place + 0.3], color="black")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(ordered)), ordered, fontsize=9 if len(ordered) > 10 else 10)
    axes.set_ylim(len(ordered) - 0.4, -0.6)
    axes.set_xlabel(f"{label} (bar: median)")


def _gain_panel(axes: Any, rows: Sequence[Row]) -> None:
    transforms = [t for t in dict.fromkeys(row["transform"] for row in rows) if t != "none"]
    widths = list(dict.fromkeys(row["bits"] for row in rows))
    for shift, bits in enumerate(widths):
        color, marker = MARKED[shift % len(MARKED)]
        offset = (shift - (len(widths) - 1) / 2) * 0.18
        medians = []
        for place, transform in enumerate(transforms):
            values = [
                row["gain"]
                for row in rows
                if (row["transform"], row["bits"]) == (transform, bits) and row["gain"] is not None
            ]
            if not values:
                continue
            low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
            axes.plot([place + offset] * 2, [low, high], color=color, linewidth=2)
            medians.append((place + offset, middle))
        if medians:
            axes.plot(*zip(*medians, strict=True), marker, color=color, markersize=7,
                      label=f"{bits} bits")  # fmt: skip
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(transforms)), [t.replace("-", "-\n") for t in transforms])
    axes.set_ylabel("dB (median, quartiles)")
    _legend(axes, ncols=len(widths))
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.15 * (high - low))


def _correlations(axes: Any, found: Sequence[Row]) -> None:
    marks = _marks(row["scope"] for row in found)
    proxies = {row["proxy"]: row["heading"].partition(",")[0] for row in found}
    for shift, (scope, (color, marker)) in enumerate(marks.items()):
        first = True
        for row in found:
            if row["scope"] != scope or row["spearman"] is None:
                continue
            place = list(proxies).index(row["proxy"]) + (shift - (len(marks) - 1) / 2) * 0.22
            axes.plot([row["spearman_low"], row["spearman_high"]], [place] * 2, color=color)
            axes.plot(row["spearman"], place, marker, color=color, markersize=6,
                      label=f"{scope} ({row['n']})" if first else None)  # fmt: skip
            first = False
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlim(-1, 1)
    axes.set_yticks(range(len(proxies)), list(proxies.values()))
    axes.set_ylim(len(proxies) - 0.4, -1.6)
    axes.set_xlabel("ρ with 95 % interval")
    _legend(axes, ncols=3)


def _legend(axes: Any, ncols: int = 1) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=10, loc="upper left", ncols=ncols, handlelength=1, columnspacing=1)


def _marks(scopes: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of every scope, the same ones for the same scope everywhere."""
    others = iter(MARKED * 20)
    return {scope: _SCOPES.get(scope) or next(others) for scope in dict.fromkeys(scopes)}


def _strips(axes: Any, groups: dict[str, list[float]]) -> None:
    random = np.random.default_rng(0)
    for place, values in enumerate(groups.values()):
        sideways = place + random.uniform(-0.22, 0.22, len(values))
        axes.plot(sideways, values, "o", color=BLUE, alpha=0.5, markersize=5, markeredgewidth=0)
        ends, mean = [place - 0.3, place + 0.3], float(np.mean(values))
        label = "mean" if place == 0 else None
        axes.plot(ends, [mean, mean], color=ORANGE, linewidth=2, label=label)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(groups)), [f"{name}\n({len(v)})" for name, v in groups.items()])
    _legend(axes)


def _examples(rows: Sequence[Row], drawn: Sequence[Histogram], key: str):
    """Four tensors at the ends and the thirds of the order of a delta: no flattering choice."""
    found = [(row, h) for row, h in zip(rows, drawn, strict=True) if row[key] is not None]
    found.sort(key=lambda entry: -entry[0][key])
    count = min(4, len(found))
    return [found[round(i * (len(found) - 1) / max(count - 1, 1))] for i in range(count)]


def _short(row: Row) -> str:
    """`layers.0.residual_group.blocks.1.fc1.input` as `layer 0.1, fc1.input`."""
    numbers = [part for part in row["site"].split(".") if part.isdecimal()]
    return f"layer {'.'.join(numbers)}, {row['role']}" if numbers else row["site"]


def _arrow(row: Row, key: str, style: str = ".2g") -> str:
    return f"{row[f'{key}_before']:{style}} → {row[f'{key}_after']:{style}}"
