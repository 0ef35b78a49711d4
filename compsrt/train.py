"""``python -m compsrt.train``: compress a model, or train a float one.

Without options this is the demo. Several methods, bits or pruning shares make a grid: one run
each, and one table at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compsrt.cli import ArgumentParser, nearest, run
from compsrt.files import sha256

if TYPE_CHECKING:
    from compsrt.compress import CalibrationSet
    from compsrt.data import Pair
    from compsrt.distributed import Ranks
    from compsrt.trainer import Validation


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    argv = list(sys.argv[1:] if argv is None else argv)
    options = _parse(argv)
    from compsrt import distributed

    ranks = distributed.setup(options.device)
    try:
        return _run(options, ranks)
    finally:
        ranks.close()


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    from compsrt import float_command, srp_command
    from compsrt.quantization import (
        CALIBRATIONS,
        METHODS,
        PRUNING_PATTERNS,
        ROUNDINGS,
        STORAGE,
        TRAINED_KINDS,
    )
    from compsrt.recipes import RECIPES
    from compsrt.transforms import TRANSFORMS

    methods = "\n".join(f"  {name:11}{method.summary}" for name, method in METHODS.items())
    recipes = "\n".join(f"  {name:21}{recipe.summary}" for name, recipe in RECIPES.items())
    parser = ArgumentParser(
        "compsrt.train",
        description="Quantize and prune a float model, distil it, score and pack it. Without"
        " --train this is the demo: the small model that comes with the package, and the"
        " photographs of scikit-image.\n\n"
        "  python -m compsrt.train --method compsrt --bits 4 --weights swinir.pth \\\n"
        "      --train DIV2K --test Set5 --output runs/x2\n"
        "  torchrun --nproc-per-node 2 -m compsrt.train ...\n\n"
        f"Methods:\n\n{methods}\n"
        "  float      train a float network (--recipe says which)\n"
        f"  srp        {srp_command.SUMMARY}\n\n"
        f"Recipes:\n\n{recipes}",
    )
    what = parser.add_argument_group("what to do")
    what.add_argument(
        "--method", nargs="+", default=["compsrt"], choices=[*METHODS, "float", "srp"],
        metavar="METHOD",
        help="one of the methods above, or several: one run each",
    )  # fmt: skip
    what.add_argument("--recipe", choices=list(RECIPES), metavar="NAME", help="see above")
    what.add_argument("--weights", metavar="FILE", help="the float model, .pth or .safetensors")
    pictures = parser.add_argument_group("pictures")
    pictures.add_argument(
        "--train", action="append", metavar="DIR",
        help="photographs to calibrate and train on; may be given several times",
    )  # fmt: skip
    pictures.add_argument(
        "--test", action="append", default=[], metavar="DIR",
        help="a test set, scored at the end only; may be given several times",
    )  # fmt: skip
    pictures.add_argument("--validation-count", type=int, default=8, metavar="N",
                          help="training pictures held out to choose the checkpoint by")  # fmt: skip
    pictures.add_argument("--validation-crops", type=int, default=32, metavar="N",
                          help="crops of these that are looked at")  # fmt: skip
    pictures.add_argument("--cache-gigabytes", type=float, default=4.0, metavar="GB",
                          help="memory for decoded training pictures")  # fmt: skip
    quantizer = parser.add_argument_group("quantization")
    quantizer.add_argument("--bits", type=int, nargs="+", default=[4], metavar="B",
                           help="1 to 8; several: one run each")  # fmt: skip
    quantizer.add_argument("--weight-bits", type=int, metavar="B", help="for weights alone")
    quantizer.add_argument("--activation-bits", type=int, metavar="B", help="for inputs alone")
    quantizer.add_argument(
        "--transform", choices=(*TRANSFORMS, "auto"), metavar="NAME",
        help=f"instead of the method's own: {', '.join(TRANSFORMS)} (Hadamard's, turned by"
        " distillation), or auto (chosen for every block and site by output error)",
    )  # fmt: skip
    quantizer.add_argument(
        "--site-transform", action="append", default=[], metavar="SITE=NAME",
        help="for one kind of site (qkv, query_key, value, attention, proj, fc1, fc2) or a pattern"
        " of BLOCK.SITE; may be given several times",
    )  # fmt: skip
    quantizer.add_argument("--convolution-bits", type=int, metavar="B",
                           help="for the weights of SwinIR's convolutions, whose inputs stay float"
                           " (default: float weights)")  # fmt: skip
    quantizer.add_argument(
        "--average-bits", type=float, nargs="+", default=[None], metavar="A",
        help="bits of every site by what it matters, with this average, instead of --bits; several:"
        " one run each",
    )  # fmt: skip
    quantizer.add_argument("--weight-groups", type=int, metavar="N",
                           help="a weight scale for each N inputs of an output channel")  # fmt: skip
    quantizer.add_argument("--calibration", choices=CALIBRATIONS, metavar="NAME",
                           help="first bounds, instead of the method's own:"
                           f" {', '.join(CALIBRATIONS)}")  # fmt: skip
    quantizer.add_argument("--rounding", choices=ROUNDINGS, default="nearest",
                           help="of weights: to the nearest code, or for the least error of the"
                           " layer's output")  # fmt: skip
    quantizer.add_argument("--codes", choices=("clamped", "unclamped"), default="clamped",
                           help="unclamped is the published arithmetic, for comparison only")  # fmt: skip
    quantizer.add_argument("--per-channel", action="store_true",
                           help="weight scales per output channel")  # fmt: skip
    quantizer.add_argument("--per-head", action="store_true",
                           help="scalars per head at query, key, value and attention")  # fmt: skip
    quantizer.add_argument("--one-sided", choices=("auto", "never"), default="auto",
                           help="whether DOBI may choose a one-sided range")  # fmt: skip
    quantizer.add_argument(
        "--percentile", type=float, default=99.9, help="of the method percentile"
    )
    quantizer.add_argument("--pruning", type=float, nargs="+", default=[0.0], metavar="SHARE",
                           help="of the weights that become zero, 0 to 0.99; several: one run each")  # fmt: skip
    quantizer.add_argument("--pruning-pattern", choices=PRUNING_PATTERNS, default="unstructured",
                           help="2:4 goes with --pruning 0.5")  # fmt: skip
    quantizer.add_argument("--storage", choices=tuple(STORAGE), default="float16",
                           help="type of everything that stays float")  # fmt: skip
    quantizer.add_argument("--calibration-count", type=int, default=32, metavar="N",
                           help="crops that the first bounds are searched on")  # fmt: skip
    quantizer.add_argument("--calibration-patch", type=int, default=64, metavar="PIXELS",
                           help="side of these crops in LR")  # fmt: skip
    training = parser.add_argument_group("training and distillation")
    training.add_argument("--steps", type=int, default=400, help="0 calibrates only")
    training.add_argument("--batch", type=int, default=4, help="crops a step and process")
    training.add_argument("--accumulate", type=int, default=1, metavar="N",
                          help="parts that a batch is computed in")  # fmt: skip
    training.add_argument("--patch", type=int, nargs="+", default=[32], metavar="PIXELS",
                          help="side of the LR crops; several: one after another")  # fmt: skip
    training.add_argument(
        "--learning-rate", type=float, metavar="LR",
        help="highest; of distillation in quantizer steps (default 0.03; of float training 1e-3)",
    )  # fmt: skip
    training.add_argument(
        "--train-weights", nargs="*", choices=TRAINED_KINDS, default=(), metavar="KIND",
        help="train these beside the scalars (QAT by distillation):"
        f" {', '.join(TRAINED_KINDS)}; without a KIND all of them",
    )  # fmt: skip
    training.add_argument("--weight-learning-rate", type=float, default=1e-3, metavar="LR",
                          help="of the weights with --train-weights or --method qat, in parts of"
                          " their root mean square")  # fmt: skip
    training.add_argument("--average", type=float, default=0.998, metavar="DECAY",
                          help="of the moving average that is kept with --train-weights or --method"
                          " qat; 0: none")  # fmt: skip
    training.add_argument("--target", choices=("pictures", "float"), default="pictures",
                          help="what --method qat compares with: the true pictures or those of the"
                          " float network")  # fmt: skip
    training.add_argument("--warmup", type=int, default=0, metavar="STEPS")
    training.add_argument("--feature-weight", type=float, default=1.0, metavar="W",
                          help="of the feature term of distillation")  # fmt: skip
    training.add_argument("--picture-weight", type=float, default=0.0, metavar="W",
                          help="of the true picture beside the teacher's in distillation")  # fmt: skip
    training.add_argument("--validate-every", type=int, default=50, metavar="STEPS")
    training.add_argument("--save-every", type=int, default=50, metavar="STEPS",
                          help="how often the state to resume from is saved")  # fmt: skip
    training.add_argument("--compile", action="store_true",
                          help="float training through torch.compile")  # fmt: skip
    float_command.add_options(parser)
    srp_command.add_options(parser)
    general = parser.add_argument_group("run")
    general.add_argument(
        "--output", type=Path, metavar="DIR", help="default runs/RECIPE or runs/METHOD"
    )
    general.add_argument("--resume", action="store_true", help="go on where a run stopped")
    general.add_argument("--force", action="store_true", help="overwrite what is in --output")
    general.add_argument("--seed", type=int, default=0)
    general.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    first, _ = argparse.ArgumentParser.parse_known_args(parser, [*argv])
    recipe = RECIPES[first.recipe] if first.recipe else None
    if recipe is not None:
        parser.set_defaults(**recipe.options())
    options = parser.parse_args(argv)
    options.architecture = float_command.architecture(
        parser, recipe.architecture if recipe else None, options
    )
    options.demo = options.train is None
    options.afterwards = None  # a recipe whose runs follow
    if options.demo:
        _demo_defaults(parser, options, argv)
    if "float" in options.method:
        if len(options.method) > 1:
            parser.error("--method float cannot be combined with others: it makes their weights")
        if options.architecture is None:
            parser.error("--method float needs a --recipe that says which network")
    elif "srp" in options.method:
        srp_command.check(parser, options)
    elif options.compile:
        parser.error("--compile goes with --method float: distillation gains too little by it")
    elif options.weights is None:
        parser.error("--weights is needed: the float model to compress")
    if options.learning_rate is None:
        floating = options.method in (["float"], ["srp"])
        options.learning_rate = 1e-3 if floating else 0.03
    if "--bits" in (given := _given(argv)) and "--average-bits" not in given:
        options.average_bits = [None]  # whatever the recipe says
    if options.train_weights == []:
        options.train_weights = TRAINED_KINDS
    if options.output is None:
        options.output = Path("runs") / (options.recipe or "-".join(options.method))
    if options.resume and options.force:
        parser.error("--resume and --force contradict each other")
    if not 0 < options.cache_gigabytes < math.inf:
        parser.error(f"--cache-gigabytes: {options.cache_gigabytes} is no size of a memory")
    for bits in options.average_bits:
        if bits is not None and not 1 <= bits <= 8:
            parser.error(f"--average-bits: {bits} is not from 1 to 8")
    for name in ("calibration_count", "calibration_patch", "validation_crops"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: {getattr(options, name)} is not at least 1")
    return options


def _demo_defaults(
    parser: ArgumentParser, options: argparse.Namespace, argv: Sequence[str]
) -> None:
    """Without --train: the shipped model and scikit-image's photographs, and options fit for them."""
    from compsrt import demo

    if {"float", "srp"} & set(options.method):
        parser.error("--train is needed: the photographs to train on")
    options.weights = options.weights or str(demo.WEIGHTS)
    if not argv:
        options.method, options.bits = list(demo.METHODS), list(demo.BITS)
        options.force, options.afterwards = True, demo.RECIPE
    given = _given(argv)
    for name, value in demo.OPTIONS.items():
        if f"--{name.replace('_', '-')}" not in given:
            setattr(options, name, value)


def _given(argv: Sequence[str]) -> set[str]:
    """The options that the command line names."""
    return {word.partition("=")[0] for word in argv}


# --- The grid ----------------------------------------------------------------------------------------


def _run(options: argparse.Namespace, ranks: Ranks) -> dict[str, Any] | None:

    if options.method == ["float"]:
        return _train_float(options, ranks)
    structured = None
    if options.method[0] == "srp":
        structured = _train_srp(options, ranks)
        if len(options.method) == 1:
            return structured
        options.weights = str(options.output / "srp" / "model.safetensors")
        options.method = options.method[1:]
    from compsrt import checkpoint, demo, models, scoring
    from compsrt.quantizers import quant_spec

    grid = _grid(options)
    names = [_name(spec) for _, spec in grid]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice}: the same run twice; name each number of bits and share once")
    _schedule(options)  # what is wrong with it is said before anything is made
    model: Any = checkpoint.load(options.weights, ranks.device)
    if quant_spec(model) is not None:
        raise ValueError(f"{options.weights}: it is quantized already; the float model is needed")
    scale = model.scale
    train = demo.training_pairs() if options.demo else _pairs(options.train, scale)
    sets = scoring.test_sets(options.test, scale)
    if options.demo and not sets:
        sets = {"photographs": demo.test_pairs()}
    calibration, validation = _pictures(options, train, scale, ranks)
    _claim(options, ranks)
    source = {"file": Path(options.weights).name, "sha256": sha256(options.weights)}
    candidates = (("bicubic", None, None), ("float", model, options.weights))
    rows, pictures = scoring.score_all(candidates, sets, scale, ranks)
    packed: dict[str, Any] = {}
    for chosen, spec in grid:
        name = _name(spec)
        quantized, report = _compress(
            chosen, spec, name, model, calibration, validation, source, ranks
        )
        models.set_arithmetic(quantized, "auto")  # as a loaded file is run
        packed[name] = quantized
        path = options.output / name / "model.safetensors"
        if sets:
            row, scores = scoring.score(
                name, quantized, sets, scale,
                path=path if spec.codes == "clamped" else None, ranks=ranks,
            )  # fmt: skip
            rows.append(row | report)
            pictures += scores
        else:
            rows.append({"model": name, "tests": {}} | report)
        if report["interrupted"]:
            break
    if not ranks.is_main:
        return None
    print(scoring.table(rows))
    result = {"output": str(options.output), "scale": scale, "rows": rows}
    if structured is not None:
        result["srp"] = structured
    scoring.write(options.output, "results", result, pictures)
    if options.demo and sets:
        picture = demo.side_by_side(model, packed, sets, options.output / "comparison.png")
        if picture is not None:
            print(f"side by side: {picture}")
            result["picture"] = str(picture)
    if rows[-1].get("interrupted"):
        raise KeyboardInterrupt
    return result


def _grid(options: argparse.Namespace) -> list[tuple[argparse.Namespace, Any]]:
    """The runs, and the options of each; the whole demo ends with those of a recipe."""
    from compsrt import demo
    from compsrt.recipes import RECIPES

    grid = [(options, spec) for spec in _specs(options)]
    if options.afterwards is not None:
        recipe = RECIPES[options.afterwards].options()
        last = {**vars(options), **recipe, **demo.RECIPE_OPTIONS}
        last = argparse.Namespace(**last)
        grid += [(last, spec) for spec in _specs(last)]
    return grid


def _specs(options: argparse.Namespace) -> list[Any]:
    from compsrt.quantization import TRANSFORM_GROUPS, QuantSpec

    sites = []
    for word in options.site_transform:
        pattern, equals, transform = word.partition("=")
        if not equals:
            raise ValueError(f"--site-transform: {word!r} is not SITE=TRANSFORM")
        if pattern.isidentifier() and pattern not in TRANSFORM_GROUPS:
            hint = nearest(pattern, TRANSFORM_GROUPS)
            raise ValueError(f"--site-transform: no site is called {pattern!r}{hint}")
        sites.append((pattern, transform))
    shared = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(QuantSpec)
        if hasattr(options, field.name)
        and field.name not in ("bits", "average_bits", "method", "pruning")
    }
    # Mixed bits are found on a model of equal bits, the nearest whole number.
    widths = [(round(a), a) for a in options.average_bits if a is not None]
    widths = widths or [(bits, None) for bits in options.bits]
    return [
        QuantSpec(
            method=method,
            bits=bits,
            average_bits=average,
            pruning=share,
            site_transforms=tuple(sites),
            **shared,
        )
        for method, (bits, average), share in itertools.product(
            options.method, widths, options.pruning
        )
    ]


def _name(spec: Any) -> str:
    """Such as compsrt-4bit, compsrt-weights-4bit (trained weights) or compsrt-3bit-pruned40."""
    width = f"{spec.bits}bit" if spec.average_bits is None else f"{spec.average_bits:g}bit-mixed"
    name = f"{spec.method}{'-weights' if spec.train_weights else ''}-{width}"
    return name if not spec.pruning else f"{name}-pruned{100 * spec.pruning:g}"


def _pairs(folders: Sequence[str], scale: int) -> list[Pair]:
    from compsrt import data

    pairs = [pair for folder in folders for pair in data.find_pairs(folder, scale)]
    # Of folders that overlap once, so that none is both trained on and held out.
    return list({pair.hr.resolve(): pair for pair in pairs}.values())


def _claim(options: argparse.Namespace, ranks: Ranks) -> None:
    """The output folder is ours: new, or to be resumed, or to be overwritten."""
    folder: Path = options.output
    there = folder.exists() and (
        not folder.is_dir() or any(_is_of_a_run(entry) for entry in folder.iterdir())
    )
    if not options.resume and not options.force and there:
        raise ValueError(f"{folder}: it is not empty; --resume goes on, --force overwrites")
    ranks.gather(None)  # every process has looked before the first one writes
    if ranks.is_main:
        folder.mkdir(parents=True, exist_ok=True)


def _is_of_a_run(entry: Path) -> bool:
    """Whether a run may have to go on from it: no folder without files, nor srp, where methods start."""
    if entry.name == "srp":
        return False
    return not entry.is_dir() or any(not inside.is_dir() for inside in entry.rglob("*"))


def _pictures(
    options: argparse.Namespace, train: list[Pair], scale: int, ranks: Ranks
) -> tuple[CalibrationSet, Validation | None]:
    from compsrt import data
    from compsrt.compress import CalibrationSet
    from compsrt.trainer import Validation

    cache = int(options.cache_gigabytes * 1e9)
    validation = None
    if options.validation_count:
        train, held_out = data.hold_out(train, options.validation_count, options.seed)
        sampler = data.PatchSampler(held_out, scale, ranks.device, cache, options.seed)
        validation = Validation(sampler, options.validation_crops, 64, ranks)
    sampler = data.PatchSampler(train, scale, ranks.device, cache, options.seed)
    return CalibrationSet(sampler, options.calibration_count, options.calibration_patch), validation


def _schedule(options: argparse.Namespace) -> Any:
    from compsrt.trainer import Schedule

    fields = {field.name for field in dataclasses.fields(Schedule)} & set(vars(options))
    return Schedule(
        patches=tuple(options.patch), **{name: getattr(options, name) for name in fields}
    )


def _compress(
    options: argparse.Namespace,
    spec: Any,
    name: str,
    model: Any,
    calibration: CalibrationSet,
    validation: Validation | None,
    source: dict[str, Any],
    ranks: Ranks,
) -> tuple[Any, dict[str, Any]]:
    """One run of the grid; with --resume, one that is finished is loaded instead."""
    from compsrt import checkpoint, trainer
    from compsrt.compress import compress

    folder: Path = options.output / name
    schedule = _schedule(options)
    settings = {
        "spec": json.dumps(spec.to_json()),
        "schedule": json.dumps(dataclasses.asdict(schedule)),
        "seed": options.seed,
        "world": ranks.world,
        "source": source["sha256"],
        "feature_weight": options.feature_weight,
        "picture_weight": options.picture_weight,
        "average": options.average,
        "weight_rate": options.weight_learning_rate / options.learning_rate,
        "target": options.target,
        "calibration": f"{calibration.count} crops of {calibration.patch}",
        **trainer.pictures_of(calibration.sampler, validation),
    }
    report = trainer.finished(folder, settings) if options.resume else None
    if report is not None:
        path = folder / "model.safetensors"
        return checkpoint.load(path, ranks.device, arithmetic="reference"), report
    if ranks.is_main:
        trainer.start(folder, options.resume)
    ranks.gather(None)
    quantized, report = compress(
        model,
        spec,
        calibration,
        schedule=schedule,
        validation=validation,
        feature_weight=options.feature_weight,
        picture_weight=options.picture_weight,
        average=options.average,
        weight_rate=settings["weight_rate"],
        target=options.target,
        folder=folder,
        settings=settings,
        resume=options.resume,
        ranks=ranks,
        source=source,
    )
    if ranks.is_main and not report["interrupted"] and spec.codes == "clamped":
        trainer.finish(folder, settings, report)
    return quantized, report


# --- Float networks and structured pruning -----------------------------------------------------------


def _train_float(options: argparse.Namespace, ranks: Ranks) -> dict[str, Any] | None:
    from compsrt import float_command

    network = float_command.network(options, ranks)
    parts = _parts(options, ranks, network.scale)
    return float_command.run(options, ranks, network, *parts)


def _train_srp(options: argparse.Namespace, ranks: Ranks) -> dict[str, Any] | None:
    """In a folder of its own if methods of quantization go on from its result."""
    from compsrt import srp_command

    options = argparse.Namespace(**vars(options))
    if len(options.method) > 1:
        options.output = options.output / "srp"
    parts = _parts(options, ranks, srp_command.scale_of(options))
    return srp_command.run(options, ranks, *parts)


def _parts(options: argparse.Namespace, ranks: Ranks, scale: int) -> tuple[Any, ...]:
    """Sampler, validation, test sets and schedule; the output folder is claimed."""
    from compsrt import scoring

    train = _pairs(options.train, scale)
    sets = scoring.test_sets(options.test, scale)
    calibration, validation = _pictures(options, train, scale, ranks)
    schedule = _schedule(options)
    _claim(options, ranks)
    return calibration.sampler, validation, sets, schedule


if __name__ == "__main__":
    sys.exit(run(main))
