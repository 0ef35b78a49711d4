"""Why rotation helps, tested: python -m compsrt.statistics SUBCOMMAND.

The first five take a float model and calibration pictures (default: the packaged demo model and
photographs of scikit-image's wheel), or with --tensors a dump, or a folder of *_prehad.pt and
*_posthad.pt as the published scripts read it. Every subcommand prints tables; --output DIR keeps
all numbers as CSV and JSON, --figure FILE.png draws a page.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compsrt.cli import ArgumentParser, run

SUBCOMMANDS = {
    "dump": "write what every quantizer sees, before and after transforms, to a file",
    "normality": "are tensors closer to a normal distribution after the transform?",
    "range": "are they narrower?",
    "band": "are more of their values near zero?",
    "error": "is their quantization error smaller, and which of the above predicts it?",
    "results": "is one method better than another, picture by picture?",
}
# Written out, as everything else below that has its definition elsewhere, so that --help and a
# mistyped option need no torch; a test compares them.
TRANSFORMS = ("hadamard", "hadamard-padded", "block-hadamard", "dct", "random")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = _parser().parse_args(argv)
    from compsrt.analysis import commands

    return commands.perform(args)


def _parser() -> ArgumentParser:
    parser = ArgumentParser("compsrt.statistics", description=__doc__)
    commands = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    for name, question in SUBCOMMANDS.items():
        command = commands.add_parser(name, help=question, description=question.capitalize())
        if name == "results":
            _add_results(command)
        else:
            _add_tensors(command, name)
        if name in ("normality", "range", "band"):
            command.add_argument(
                "--transform", choices=TRANSFORMS, default="hadamard", help="compared with none"
            )
        elif name in ("dump", "error"):
            command.add_argument(
                "--transforms",
                nargs="+",
                choices=TRANSFORMS,
                default=list(TRANSFORMS),
                help="compared with none",
            )
        if name == "normality":
            command.add_argument(
                "--shapiro-values",
                type=_integer(8, 5000),
                default=5000,
                help="values tested of each tensor, at most 5000",
            )
        elif name == "band":
            command.add_argument("--eps", type=float, default=0.05, help="half the band's width")
            command.add_argument(
                "--counting",
                choices=("real", "published"),
                default="real",
                help="published: the zeros that padding adds count as values in the band",
            )
        elif name == "error":
            command.add_argument(
                "--bits",
                nargs="+",
                type=int,
                choices=range(1, 9),
                default=[2, 3, 4, 8],
                help="widths",
            )
            command.add_argument(
                "--seeds", type=_integer(1), default=3, help="of the transform random"
            )
        _add_common(command, name)
    return parser


def _add_tensors(command: argparse.ArgumentParser, name: str) -> None:
    group = command.add_argument_group("tensors")
    group.add_argument(
        "--weights", type=Path, metavar="FILE", help="a float model instead of the demo's"
    )
    group.add_argument(
        "--pictures",
        type=Path,
        metavar="DIR",
        help="calibration pictures instead of photographs of scikit-image's wheel",
    )
    group.add_argument("--calibration-count", type=_integer(1), default=32, help="crops")
    group.add_argument(
        "--calibration-patch", type=_integer(1), default=64, help="side of a crop, LR pixels"
    )
    group.add_argument(
        "--values", type=_integer(0), default=200_000, help="values kept a tensor; 0 keeps all"
    )
    if name != "dump":
        group.add_argument(
            "--tensors",
            type=Path,
            metavar="PATH",
            help="a dump, or a folder of *_prehad.pt and *_posthad.pt, instead of a model",
        )


def _add_results(command: argparse.ArgumentParser) -> None:
    command.add_argument("files", nargs="+", type=Path, metavar="FILE", help="CSV or JSON")
    command.add_argument(
        "--method", metavar="NAME", help="model, or pattern of its seeds, claimed to be better"
    )
    command.add_argument("--baseline", metavar="NAME", help="model, or pattern, compared with")
    command.add_argument(
        "--within",
        nargs="+",
        default=[],
        metavar="COLUMN",
        help="columns, such as scale, that must agree too",
    )


def _add_common(command: argparse.ArgumentParser, name: str) -> None:
    group = command.add_argument_group("what is kept")
    group.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        required=name == "dump",
        help="write CSV and JSON there",
    )
    if name != "dump":
        group.add_argument(
            "--figure", type=Path, metavar="FILE.png", help="draw a page (the extra demo)"
        )
        command.add_argument(
            "--resamples", type=_integer(100), default=2000, help="of every bootstrap interval"
        )
    command.add_argument(
        "--seed", type=_integer(0), default=0, help="of all that is drawn at random"
    )


def _integer(least: int, most: int | None = None):
    def integer(text: str) -> int:
        value = int(text)
        if value < least or (most is not None and value > most):
            limits = f"at least {least}" + ("" if most is None else f" and at most {most}")
            raise argparse.ArgumentTypeError(f"{value} is not {limits}")
        return value

    return integer


if __name__ == "__main__":
    sys.exit(run(main))
