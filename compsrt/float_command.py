"""What of the train command is about float networks: options of `--method float`, and the run they ask for."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data import Pair, PatchSampler
    from .distributed import Ranks
    from .trainer import Schedule, Validation


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of SESR networks, in a group of their own."""
    from .models.sesr import ACTIVATIONS, BLOCKS, EXPANSION

    group = parser.add_argument_group("SESR networks (--method float)")
    group.add_argument("--blocks", type=int, metavar="M", help="3x3 convolutions")
    group.add_argument("--features", type=int, metavar="F", help="their channels")
    group.add_argument("--activation", choices=ACTIVATIONS, help="default prelu")
    group.add_argument("--expansion", type=int, default=EXPANSION, metavar="P",
                       help="channels inside a linear block")  # fmt: skip
    group.add_argument("--block", choices=BLOCKS, default=BLOCKS[0],
                       help="run linear blocks collapsed at every step, or wide")  # fmt: skip


def architecture(parser: Any, recipe: Any, options: argparse.Namespace) -> Any:
    """The recipe's network (its configuration, or None) with what the options change."""
    names = ("blocks", "features", "activation")
    changes = {name: value for name in names if (value := getattr(options, name)) is not None}
    if not changes:
        return recipe
    known = {field.name for field in dataclasses.fields(recipe)} if recipe else set()
    for name in changes:
        if not set(names) <= known:
            parser.error(f"--{name} goes with a recipe of a SESR network")
    return dataclasses.replace(recipe, **changes)


def network(options: argparse.Namespace, ranks: Ranks) -> Any:
    """The network to train, from scratch or from `--weights`, in the form that is trained."""
    import torch

    from . import checkpoint, models
    from .float_training import start_from
    from .models.sesr import SESR

    torch.manual_seed(options.seed)
    made: Any = models.create(options.architecture)
    if options.weights:
        fresh = start_from(made, checkpoint.load(options.weights))
        if ranks.is_main and fresh:
            print(f"started from {options.weights}; new: {', '.join(fresh)}")
    if isinstance(made, SESR):
        made = made.widened(block=options.block, expansion=options.expansion)
        if ranks.is_main:
            print(_work(options))
    return made.to(ranks.device)


def _work(options: argparse.Namespace) -> str:
    """What the forward of a training step takes, in words, with the linear blocks either way."""
    from .models.sesr import BLOCKS, training_macs

    pixels = options.batch * options.patch[-1] ** 2
    words = []
    for block in BLOCKS:
        each, once = training_macs(options.architecture, block, options.expansion)
        words.append(f"{(each * pixels + once) / 1e9:.2f} G {block}")
    return f"multiply-adds of a training step, forward: {', '.join(words)}; --block {options.block}"


def run(
    options: argparse.Namespace,
    ranks: Ranks,
    network: Any,
    sampler: PatchSampler,
    validation: Validation | None,
    sets: dict[str, list[Pair]],
    schedule: Schedule,
) -> dict[str, Any] | None:
    """Trains the network, stores and scores it. Returns what the command reports (None in all
    processes but the first). Raises KeyboardInterrupt after an interruption, its state saved.
    """
    from . import scoring
    from .float_training import train_float

    model, report = train_float(
        network,
        sampler,
        schedule=schedule,
        validation=validation,
        folder=options.output,
        settings={
            "architecture": repr(options.architecture),
            "schedule": json.dumps(dataclasses.asdict(schedule)),
            "seed": options.seed,
            "world": ranks.world,
            # The wide weights are what a run goes on from; narrow networks have none.
            **({"expansion": options.expansion} if hasattr(network, "widened") else {}),
        },
        resume=options.resume,
        compiled=options.compile,
        ranks=ranks,
        card={"recipe": options.recipe},
    )
    path = options.output / "model.safetensors"
    candidates = (("bicubic", None, None), (options.recipe, model, path))
    rows, pictures = scoring.score_all(candidates, sets, sampler.scale, ranks)
    if not ranks.is_main:
        return None
    if rows:
        print(scoring.table(rows))
    result = {
        "output": str(options.output),
        "scale": sampler.scale,
        "recipe": options.recipe,
        **report,
        "rows": rows,
    }
    scoring.write(options.output, "results", result, pictures)
    if report["interrupted"]:
        raise KeyboardInterrupt
    return result
