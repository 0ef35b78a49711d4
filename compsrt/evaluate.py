"""``python -m compsrt.evaluate``: models side by side on test sets, by one protocol.

PSNR and SSIM as in ``metrics``, the mean over the pictures of a set. Beside quality stands what it
costs: bytes of the file, bits a weight, and the number of distinct levels that the quantized
tensors really have. Under torchrun the pictures are shared out among the processes, and the
figures are those of one process (that has as many threads).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compsrt.cli import DTYPES, ArgumentParser, run

if TYPE_CHECKING:
    import torch
    from torch import nn

    from compsrt.data import Pair
    from compsrt.distributed import Ranks


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    options = _parse(argv)
    from compsrt import distributed

    ranks = distributed.setup(options.device)
    try:
        return _evaluate(options, ranks)
    finally:
        ranks.close()


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        "compsrt.evaluate",
        description="Score models on test sets: PSNR and SSIM on luma, file size, bits per weight,"
        " distinct levels, and time. One row a model, in a table; the last line is the same as"
        " JSON.\n\nShared among processes:\n\n"
        "  torchrun --nproc-per-node 2 -m compsrt.evaluate ...",
    )
    what = parser.add_argument_group("what to score")
    what.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="packed or float files, all of one scale; none scores the bicubic enlargement alone",
    )
    what.add_argument(
        "--test",
        action="append",
        required=True,
        metavar="DIR",
        help="a folder of test pictures, HR with LR beside it or HR alone (LR is made then);"
        " may be given several times",
    )
    what.add_argument("--scale", type=int, help="only needed without a model")
    what.add_argument(
        "--bicubic",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="begin with a row for bicubic enlargement",
    )
    what.add_argument(
        "--self-ensemble",
        action="store_true",
        help="let every model enlarge the eight flips and rotations of a picture and take the mean",
    )
    what.add_argument(
        "--agreement",
        action="store_true",
        help="say how far every other model's pictures are from those of the first MODEL: float,"
        " fake-quantized and packed forms, data types, devices. Two columns: the least PSNR between"
        " two pictures, and the most that their PSNR (against HR) differs",
    )
    output = parser.add_argument_group("what to keep")
    output.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="write evaluate.csv and evaluate.json, with the values of every picture",
    )
    output.add_argument(
        "--save-images",
        action="store_true",
        help="write the enlarged pictures too, as DIR/MODEL/TEST/NAME.png",
    )
    output.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="write DIR/index.html, a page to look at: the table, and pictures side by side with a"
        " movable lens and error maps",
    )
    output.add_argument(
        "--report-pictures",
        type=int,
        default=20,
        metavar="N",
        help="how many pictures the page shows: those where the models differ the most",
    )
    output.add_argument("--force", action="store_true", help="replace the report that is in DIR")
    machine = parser.add_argument_group("where")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    machine.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="what the models compute in"
    )
    machine.add_argument(
        "--arithmetic", nargs="+", default=["auto"], metavar="WAY",
        help="how packed SwinIRs compute: auto, fold, integer or reference; several: a row each",
    )  # fmt: skip
    options = parser.parse_args(argv)
    if options.agreement and len(options.models) * len(options.arithmetic) < 2:
        parser.error("--agreement needs at least two MODELs, or one in two ways of --arithmetic")
    if options.save_images and options.output is None:
        parser.error("--save-images needs --output, the folder to write them to")
    if options.force and options.report is None:
        parser.error("--force replaces a report, it needs --report")
    if options.report_pictures < 1:
        parser.error(f"--report-pictures must be at least 1, got {options.report_pictures}")
    if options.report and options.output and options.report.resolve() == options.output.resolve():
        parser.error("--report needs another folder than --output, --output/report for example")
    if not options.models and not options.bicubic:
        parser.error("--no-bicubic leaves nothing to score without a MODEL")
    return options


def _evaluate(options: argparse.Namespace, ranks: Ranks) -> dict[str, Any] | None:
    import torch

    from compsrt import report, scoring

    # What is wrong with the arguments is found before the first picture is enlarged.
    dtype = getattr(torch, options.dtype)
    runs = list(_runs(options.models, options.arithmetic, ranks.device, dtype))
    names = [name for name, *_ in runs]
    if options.agreement and len(runs) < 2:
        raise ValueError(f"--agreement: {names[0]} computes in one way; name another model too")
    scale = _scale(options.scale, {path: model for _, path, model in runs})
    sets = scoring.test_sets(options.test, scale)
    output: Path | None = options.output
    page: Path | None = options.report
    # The folder for the enlarged pictures, if they are wanted.
    enlarged = output if output and options.save_images else page and page / report.ENLARGED
    if enlarged:
        _keep_what_is_read(enlarged, ["bicubic"] * options.bicubic + names, sets)
    if enlarged and options.bicubic and "bicubic" in names:
        raise ValueError("bicubic: a model of this name; rename its file or give --no-bicubic")
    if page is not None:
        report.check_folder(page, force=options.force)
        ranks.gather(None)  # nobody begins to write before all have looked
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    candidates: list[tuple[str, str | None, nn.Module | None]] = [("bicubic", None, None)]
    candidates = candidates * options.bicubic
    candidates += runs
    rows: list[dict[str, Any]] = []
    pictures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="compsrt-") as scratch:
        for name, path, model in candidates:
            save = enlarged / name if enlarged else None
            against = None
            if options.agreement and model is not None:
                # The first model's pictures have to be somewhere for the others to be compared.
                first = enlarged / names[0] if enlarged else Path(scratch)
                save, against = (save or first, None) if name == names[0] else (save, first)
            row, scores = scoring.score(
                name,
                model,
                sets,
                scale,
                path=path,
                ranks=ranks,
                save=save,
                against=against,
                self_ensemble=options.self_ensemble,
            )
            rows.append(row)
            pictures += scores
    if options.agreement:
        scoring.add_differences(rows, pictures, names[0])
    if not ranks.is_main:
        return None
    print(scoring.table(rows))
    result = {
        "scale": scale,
        "device": str(ranks.device),
        "dtype": options.dtype,
        "self_ensemble": options.self_ensemble,
        "rows": rows,
    }
    if output is not None:
        scoring.write(output, "evaluate", result, pictures)
    if page is not None and enlarged is not None:
        count = options.report_pictures
        written = report.write(page, rows, pictures, sets, scale, enlarged=enlarged, count=count)
        print(f"report: {written}")
    return result


def _keep_what_is_read(folder: Path, names: Sequence[str], sets: dict[str, list[Pair]]) -> None:
    """Raise ValueError if a test picture lies where an enlarged one would be written."""
    pairs = [(test, pair) for test, several in sets.items() for pair in several]
    read = {path.resolve() for _, pair in pairs for path in (pair.hr, pair.lr) if path}
    for name in names:
        for test, pair in pairs:
            path = folder / name / test / f"{pair.name}.png"
            if path.resolve() in read:
                raise ValueError(f"{path}: it is a test picture, and would be overwritten")


def _runs(
    paths: Sequence[str], ways: Sequence[str], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, str, nn.Module]]:
    """(name, path, model) of every row: one a file, and one a way to compute where a model has several."""
    from compsrt import checkpoint, models, scoring

    for name, path in zip(scoring.short_names(paths), paths, strict=True):
        model = checkpoint.load(path, device, dtype, ways[0])
        several = len(ways) > 1 and models.arithmetics(model)
        yield f"{name}, {ways[0]}" if several else name, path, model
        for way in ways[1:] if several else ():
            yield f"{name}, {way}", path, checkpoint.load(path, device, dtype, way)


def _scale(asked: int | None, models: dict[str, Any]) -> int:
    """The one scale of all models and of --scale."""
    scales = {path: int(model.scale) for path, model in models.items()}
    if asked is not None:
        scales = {"--scale": asked, **scales}
    if not scales:
        raise ValueError("--scale is needed where there is no model to tell it")
    (first, scale), *others = scales.items()
    for path, other in others:
        if other != scale:
            raise ValueError(f"{path} is x{other} but {first} is x{scale}: score them apart")
    return scale


if __name__ == "__main__":
    sys.exit(run(main))
