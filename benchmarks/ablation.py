"""One table of what each lever brings: ``python benchmarks/ablation.py --train DIR --test DIR ...``

Three kinds of rows. *Alone*: one lever added to the plainest form (DOBI bounds, no rotation, nothing
trained). *Sum*: the levers added up, one after the other. *Best*: the recipe compsrt-best, which
takes its steps from there and turns on what paid. Every row is made at several bits and with
several seeds, which choose calibration and training crops, held-out pictures and their order; the
table shows the mean and, after ±, the standard deviation over the seeds.

What is finished is kept in the result file, and a run that is there is not made again: the command
can be stopped and given again, and several may fill one file side by side. Beside the file it
writes a Markdown table (.md) and a picture (.png) of loss against bits per weight, with published
losses. Their float network is SwinIR-light, not the one measured here, so only the losses against
each one's own float network can be laid side by side.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from compsrt import checkpoint, data, env, scoring
from compsrt import train as train_command
from compsrt.cli import format_table
from compsrt.files import atomic_write, sha256

# Levers: arguments of compsrt.train. {bits} and {steps} are filled in.
PLAIN = "--method dobi"
ROTATED = "--transform hadamard"
PER_CHANNEL = "--per-channel"
ASYMMETRIC = "--calibration dobi-asymmetric"
OUTPUT = "--rounding output"
MIXED = "--average-bits {bits}"
CONVOLUTIONS = "--convolution-bits {}"
HEADS = "--per-head"
AUTO = "--transform auto"
BOUNDS = "--method compsrt --steps {steps}"
WEIGHTS = (
    "--train-weights weights biases norms tables convolutions --weight-learning-rate 8e-3"
    " --average 0.98"
)
LEARNED = "--transform learned"
ALONE = {
    "plain": "",
    "rotation": ROTATED,
    "per-channel": PER_CHANNEL,
    "groups": "--weight-groups 20",
    "per-head": HEADS,
    "auto-transform": AUTO,
    "asymmetric-bounds": ASYMMETRIC,
    "output-rounding": OUTPUT,
    "mixed-bits": MIXED,
    "convolutions-8": CONVOLUTIONS.format(8),
    "convolutions-6": CONVOLUTIONS.format(6),
    "bounds": f"{BOUNDS} --transform none",
    "bounds-rotation": f"{BOUNDS} {ROTATED}",
    "bounds-learned-transform": f"{BOUNDS} {LEARNED}",
    "weights": f"{BOUNDS} --transform none {WEIGHTS}",
}
STEPS_OF_SUM = (
    ("rotation", ROTATED),
    ("output-rounding", OUTPUT),
    ("mixed-bits", MIXED),
    ("asymmetric-bounds", ASYMMETRIC),
    ("convolutions-8", CONVOLUTIONS.format(8)),
    ("convolutions-6", CONVOLUTIONS.format(6)),
    ("bounds", BOUNDS),
    ("weights", WEIGHTS),
)
# What the recipe makes of it, trained for longer; the same with as many bits at every site.
BEST = {
    "best": "--recipe compsrt-best --average-bits {bits}",
    "best, equal bits": "--recipe compsrt-best --bits {bits}",
}
# Arguments of every other run; a later one of the same name wins.
COMMON = (
    "--steps 0 --batch 2 --patch 32 --warmup 20 --validate-every 50 --save-every 50"
    " --calibration-count 16 --calibration-patch 32 --validation-crops 8"
)
# PSNR in dB on Y, as published, x2: float SwinIR-light and 4, 3, 2 bits on the sets of SETS. Not ours.
SETS = ("Set5", "Set14", "B100", "Urban100", "Manga109")
PUBLISHED_FLOAT = (38.15, 33.86, 32.31, 32.76, 39.11)
PUBLISHED = {
    "2DQuant": {
        4: (37.87, 33.41, 32.02, 31.84, 38.31),
        3: (37.32, 32.85, 31.60, 30.45, 37.24),
        2: (36.00, 31.98, 30.91, 28.62, 34.40),
    },
    "CondiQuant": {
        4: (38.03, 33.50, 32.16, 32.03, 38.57),
        3: (37.77, 33.21, 31.94, 31.18, 38.01),
        2: (37.15, 32.74, 31.55, 29.96, 36.63),
    },
    "CompSRT (codes not bounded)": {
        4: (38.13, 33.81, 32.28, 32.57, 38.98),
        3: (38.11, 33.82, 32.27, 32.53, 38.90),
        2: (38.03, 33.70, 32.19, 32.22, 38.69),
    },
}


def rows() -> dict[str, str]:
    """The arguments of every row by its name: alone/LEVER, sum/LEVER in their order, BEST."""
    found = {f"alone/{name}": arguments for name, arguments in ALONE.items()}
    so_far = PLAIN
    for name, arguments in STEPS_OF_SUM:
        so_far += f" {arguments}"
        found[f"sum/{name}"] = so_far
    return found | BEST


def arguments_of(
    row: str, bits: int, seed: int, steps: int, best_steps: int | None = None
) -> list[str]:
    """What compsrt.train is told for one run, without files."""
    filled = rows()[row].format(bits=bits, steps=steps)
    if row in BEST:
        fewer = "" if best_steps is None else f" --steps {best_steps}"
        return f"{filled}{fewer} --seed {seed}".split()
    return f"{PLAIN} --bits {bits} {COMMON} {filled} --seed {seed}".split()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(rows())
    assets = Path(train_command.__file__).parent / "assets"
    parser.add_argument("--weights", default=str(assets / "swinir_nano_x2.safetensors"),
                        help="the float model; default: the nano model")  # fmt: skip
    parser.add_argument("--train", metavar="DIR", help="photographs to train on")
    parser.add_argument("--test", action="append", default=[], metavar="DIR",
                        help="a test set; may be given several times")  # fmt: skip
    parser.add_argument("--rows", nargs="+", default=names, choices=names, metavar="ROW",
                        help=f"of: {' '.join(names)}")  # fmt: skip
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200, help="of rows that train")
    parser.add_argument("--best-steps", type=int, metavar="N",
                        help="of the rows of compsrt-best (default: the recipe's)")  # fmt: skip
    parser.add_argument("--pictures", type=int, metavar="N",
                        help="score on no more of each test set, spread evenly (default: all)")  # fmt: skip
    parser.add_argument("--result", type=Path, metavar="FILE",
                        default=Path("benchmarks/results/ablation_nano_x2.json"))  # fmt: skip
    parser.add_argument("--models", type=Path, default=Path("runs/ablation"), metavar="DIR",
                        help="where the packed models are left")  # fmt: skip
    parser.add_argument("--draw", action="store_true", help="no runs: table and picture alone")
    options = parser.parse_args(argv)
    result = _begin(parser, options)
    if not options.draw:
        _run_all(options)
        result = json.loads(options.result.read_text())
    lines = f"{summary(result)}\n\n{table(result)}\n"
    atomic_write(options.result.with_suffix(".md"), lines.encode())
    print(lines)
    picture = draw(result, options.result.with_suffix(".png"))
    print(json.dumps({"result": str(options.result), "picture": str(picture)}))


# --- Runs ------------------------------------------------------------------------------------------


def _begin(parser: argparse.ArgumentParser, options: argparse.Namespace) -> dict[str, Any]:
    """The result so far: of the same settings, or new and written."""
    if options.draw:
        return json.loads(options.result.read_text())
    if options.train is None or not options.test:
        parser.error("--train and --test are needed, unless --draw only shows what is there")
    settings = {
        "weights": sha256(options.weights),
        "steps": options.steps,
        "tests": [Path(folder).name for folder in options.test],
        "pictures": options.pictures,
        "common": COMMON,
    }
    if options.best_steps is not None:
        settings["best_steps"] = options.best_steps
    if options.result.exists():
        result = json.loads(options.result.read_text())
        if result["settings"] != settings:
            parser.error(f"{options.result}: it is of other settings; give another --result")
        return result
    result = {"settings": settings, "environment": env.collect(), "runs": []}
    options.result.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(options.result, json.dumps(result, indent=1).encode())
    return result


def _run_all(options: argparse.Namespace) -> None:
    model: Any = checkpoint.load(options.weights)
    sets = {
        Path(folder).name: some(data.find_pairs(folder, model.scale), options.pictures)
        for folder in options.test
    }

    def keep(run: dict[str, Any]) -> None:
        # Read again: several commands can fill one file, with other seeds or rows each.
        result = json.loads(options.result.read_text())
        result["runs"] = [r for r in result["runs"] if _key(r) != _key(run)] + [run]
        atomic_write(options.result, json.dumps(result, indent=1).encode())

    def find(row: str, bits: int, seed: int) -> dict[str, Any] | None:
        """The run that is there, or one of another row that was told the same."""
        told = None if row == "float" else " ".join(_told(options, row, bits, seed))
        runs = json.loads(options.result.read_text())["runs"]
        found = [r for r in runs if _key(r) == (row, bits, seed)]
        return next(iter(found + [r for r in runs if told and r.get("arguments") == told]), None)

    if find("float", 32, 0) is None:
        row, _ = scoring.score("float", model, sets, model.scale, path=options.weights)
        keep({"row": "float", "bits": 32, "seed": 0, **_figures(row)})
    # All rows with the first seed before the second one: a table that is soon whole.
    for seed in options.seeds:
        for bits in options.bits:
            for row in options.rows:
                run = find(row, bits, seed)
                run = _run(options, sets, model.scale, row, bits, seed) if run is None else run
                keep({**run, "row": row})


def some(pairs: list[Any], count: int | None) -> list[Any]:
    """At most so many, spread evenly."""
    count = len(pairs) if count is None else min(count, len(pairs))
    return [pairs[i * len(pairs) // count] for i in range(count)]


def _run(options, sets, scale: int, row: str, bits: int, seed: int) -> dict[str, Any]:
    name = re.sub(r"\W+", "-", f"{row}-{bits}bit-seed{seed}")
    folder = options.models / name
    arguments = _told(options, row, bits, seed)
    files = ["--weights", options.weights, "--train", options.train, "--output", str(folder)]
    began = time.perf_counter()
    there = folder.exists() and any(folder.iterdir())
    trained = train_command.main([*arguments, *files, *(["--resume"] if there else [])])
    assert trained is not None
    made = trained["rows"][-1]
    path = next(folder.glob("*/model.safetensors"))
    scored, _ = scoring.score(row, checkpoint.load(path), sets, scale, path=path)
    print(f"{row}, {bits} bits, seed {seed}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return {
        "row": row,
        "bits": bits,
        "seed": seed,
        "arguments": " ".join(arguments),
        "seconds": made["seconds"],
        "validation_psnr": made.get("validation_psnr"),
        **_figures(scored),
    }


def _told(options: argparse.Namespace, row: str, bits: int, seed: int) -> list[str]:
    return arguments_of(row, bits, seed, options.steps, options.best_steps)


def _key(run: dict[str, Any]) -> tuple[str, int, int]:
    return run["row"], run["bits"], run["seed"]


def _figures(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("tests", "bits_per_weight", "file_bytes", "levels")}


# --- Table and picture -----------------------------------------------------------------------------


def groups(result: dict[str, Any]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """The runs of every row and bits, rows in their order, the most bits first."""
    order = ["float", *rows()]
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    known = [run for run in result["runs"] if run["row"] in order]
    for run in sorted(known, key=lambda r: (-r["bits"], order.index(r["row"]), r["seed"])):
        found.setdefault((run["row"], run["bits"]), []).append(run)
    return found


def spread(values: Iterable[float], decimals: int) -> str:
    """Mean, and standard deviation (of a sample) where there is more than one value."""
    values = list(values)
    text = f"{statistics.fmean(values):.{decimals}f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.{decimals}f}"


def loss(run: dict[str, Any], of_float: dict[str, Any], tests: list[str]) -> float:
    """PSNR lost against the float network, the mean over test sets, dB."""
    return math.fsum(of_float["tests"][t]["psnr"] - run["tests"][t]["psnr"] for t in tests) / len(
        tests
    )


def summary(result: dict[str, Any]) -> str:
    """Markdown: a line for each row, and under each number of bits its loss (dB, mean over the sets)."""
    found = groups(result)
    of_float, tests = found["float", 32][0], result["settings"]["tests"]
    widths = sorted({bits for row, bits in found if row != "float"}, reverse=True)
    lines = []
    for row in dict.fromkeys(row for row, _ in found if row != "float"):
        line: dict[str, Any] = {"row": row}
        for bits in widths:
            runs = found.get((row, bits), [])
            losses = [loss(run, of_float, tests) for run in runs]
            line[str(bits)] = f"{spread(losses, 3)} ({len(runs)})" if runs else None
        lines.append(line)
    shown = {"row": "loss in dB (seeds)", **{str(bits): f"{bits} bits" for bits in widths}}
    return format_table(lines, shown, markdown=True)


def table(result: dict[str, Any]) -> str:
    """Markdown: one line for each row and bits."""
    found = groups(result)
    of_float, tests = found["float", 32][0], result["settings"]["tests"]
    lines = []
    for (row, bits), runs in found.items():
        line: dict[str, Any] = {"row": row, "bits": bits, "seeds": len(runs)}
        for test in tests:
            line[f"{test} psnr"] = spread((run["tests"][test]["psnr"] for run in runs), 3)
            line[f"{test} ssim"] = spread((run["tests"][test]["ssim"] for run in runs), 4)
        line["loss"] = spread((loss(run, of_float, tests) for run in runs), 3)
        line["bits_per_weight"] = spread((run["bits_per_weight"] for run in runs[:1]), 2)
        line["kB"] = spread((run["file_bytes"] / 1000 for run in runs[:1]), 1)
        seconds = [run["seconds"] for run in runs if "seconds" in run]
        line["seconds"] = spread(seconds, 0) if seconds else None
        lines.append(line)
    shown = {"row": "row", "bits": "bits", "seeds": "seeds"}
    for test in tests:
        shown |= {f"{test} psnr": f"{test} PSNR", f"{test} ssim": "SSIM"}
    shown |= {
        "loss": "mean loss, dB",
        "bits_per_weight": "bits/weight",
        "kB": "file kB",
        "seconds": "made in s",
    }
    return format_table(lines, shown, markdown=True)


def draw(result: dict[str, Any], path: Path) -> Path:
    """Loss against bits per weight: our rows of sums, the plain form, and what was published."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = groups(result)
    of_float = found["float", 32][0]
    tests = [test for test in result["settings"]["tests"] if test in SETS]
    figure = Figure(figsize=(8.5, 5.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for (row, _), runs in found.items():
        if row == "alone/plain" or row.startswith(("sum/", "best")):
            losses = [loss(run, of_float, tests) for run in runs]
            deviation = statistics.stdev(losses) if len(losses) > 1 else 0.0
            bits = statistics.fmean(run["bits_per_weight"] for run in runs)
            curves.setdefault(row, []).append((bits, statistics.fmean(losses), deviation))
    for number, (row, points) in enumerate(curves.items()):
        x, y, deviation = zip(*sorted(points), strict=True)
        color = colormaps["viridis"](number / max(len(curves), 1))
        label = row.replace("sum/", "here, + ").replace("alone/plain", "here, DOBI, no rotation")
        label = re.sub("^best", "here, compsrt-best", label)
        axes.errorbar(x, y, yerr=deviation, marker="o", ms=4, capsize=2, color=color, label=label)
    places = [SETS.index(test) for test in tests]
    for (name, values), style in zip(PUBLISHED.items(), (":", "--", "-."), strict=True):
        losses = [
            statistics.fmean(PUBLISHED_FLOAT[i] - values[bits][i] for i in places)
            for bits in sorted(values)
        ]
        axes.plot(sorted(values), losses, style, color="0.45", marker="s", ms=4,
                  label=f"published, SwinIR-light: {name}")  # fmt: skip
    axes.set_xlabel(
        "bits per weight of the linear layers, scales counted (published: nominal bits)"
    )
    axes.set_ylabel(f"PSNR lost against the own float network, dB\nmean of {', '.join(tests)}, x2")
    axes.set_title(
        "Losses only can be compared: the published float network is SwinIR-light (38.15 dB on"
        f" Set5),\nours the model of this table ({of_float['tests'][tests[0]]['psnr']:.2f} dB on"
        f" {tests[0]})",
        fontsize=9,
    )
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path)
    return path


if __name__ == "__main__":
    main()
