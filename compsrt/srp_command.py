"""What of the train command is about SRP: the options of `--method srp`, and the run they ask for."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data import Pair, PatchSampler
    from .distributed import Ranks
    from .srp import Plan
    from .trainer import Schedule, Validation

SUMMARY = "structured pruning: dense training, penalty and cut, fine-tuning"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of SRP, in a group of their own, with the published defaults."""
    from .pruning import TIED, WIDTHS
    from .srp import GROWTHS, PHASES

    group = parser.add_argument_group(
        "structured pruning (--method srp)",
        "Layers by name or pattern ('body.*.body.0') or by kind: filters, heads, hidden. --steps"
        " and --learning-rate are those of the dense training.",
    )
    group.add_argument(
        "--phase", nargs="+", choices=PHASES, metavar="PHASE",
        help=f"of {', '.join(PHASES)}; default: all, without the first if there are --weights",
    )  # fmt: skip
    group.add_argument(
        "--ratio", nargs="+", default=[], metavar="PATTERN:SHARE",
        help="share of the filters, heads or hidden channels that go; a share alone is for all"
        " layers; where several fit, the last one counts",
    )  # fmt: skip
    group.add_argument("--skip-layers", nargs="+", default=[], metavar="PATTERN",
                       help="layers that lose nothing, nor do those tied to them")  # fmt: skip
    group.add_argument(
        "--same-group", nargs="+", action="append", default=[], metavar="PATTERN",
        help="layers that share one set of indices, besides those that the network's sums tie;"
        " may be given several times",
    )  # fmt: skip
    group.add_argument("--tied", choices=TIED, default="random",
                       help="how tied layers choose their common indices")  # fmt: skip
    group.add_argument(
        "--widths", choices=WIDTHS, default="hadamard",
        help="of a SwinIR: rounded to what the quantized form can rotate, or exact",
    )  # fmt: skip
    group.add_argument("--one-shot", action="store_true",
                       help="cut at once, without the penalty: plain L1 pruning")  # fmt: skip
    for name, default, what in (
        ("start", 0.0, "at first"),
        ("step", 1e-4, "what it grows by"),
        ("limit", 0.5, "at most"),
    ):
        group.add_argument(f"--penalty-{name}", type=float, default=default, metavar="P",
                           help=f"of the doomed weights, {what}")  # fmt: skip
    group.add_argument("--penalty-growth", choices=GROWTHS, default="linear",
                       help="geometric: the step is a share of the penalty")  # fmt: skip
    group.add_argument("--penalty-every", type=int, default=20, metavar="STEPS",
                       help="how often it grows")  # fmt: skip
    group.add_argument("--stabilize", type=int, default=43_150, metavar="STEPS",
                       help="under the full penalty, before the cut")  # fmt: skip
    group.add_argument("--prune-learning-rate", type=float, default=1e-4, metavar="LR",
                       help="under the penalty, constant")  # fmt: skip
    group.add_argument("--finetune-steps", type=int, metavar="STEPS", help="default --steps")
    group.add_argument("--finetune-learning-rate", type=float, default=1e-4, metavar="LR",
                       help="highest")  # fmt: skip


def check(parser: Any, options: argparse.Namespace) -> None:
    """Ends the command where the options contradict each other, and fills in what follows."""
    methods = options.method
    if methods[0] != "srp":
        parser.error("--method srp comes first: the others quantize what it leaves")
    if options.phase is None:
        options.phase = ["prune", "finetune"] if options.weights else ["dense", "prune", "finetune"]
    from .srp import PHASES

    options.phase = [phase for phase in PHASES if phase in options.phase]
    if options.phase == ["dense", "finetune"]:
        parser.error("--phase dense finetune leaves out the phase between them, prune")
    if "dense" in options.phase:
        if options.weights:
            parser.error("--weights is the dense network: leave out the phase dense, or --weights")
        if options.architecture is None:
            parser.error("the phase dense needs a --recipe that says which network; or --weights")
        if len(methods) > 1:
            parser.error(
                f"--method {' '.join(methods)} needs --weights: --steps is that of {methods[1]}"
            )
    if "finetune" not in options.phase and len(methods) > 1:
        parser.error(f"--method {' '.join(methods)} needs the phase finetune before {methods[1]}")
    if options.finetune_steps is None:
        options.finetune_steps = options.steps


def plan_of(options: argparse.Namespace, dense: Schedule) -> Plan:
    """The plan that the options describe; ValueError for a ratio that is no number from 0 to 1."""
    from .pruning import StructureSpec
    from .srp import Penalty, Plan

    ratios = []
    for word in options.ratio:
        pattern, _, share = word.rpartition(":")
        try:
            ratios.append((pattern or "*", float(share)))
        except ValueError:
            raise ValueError(f"--ratio: {word!r} is not PATTERN:SHARE, such as '*:0.5'") from None
    structure = StructureSpec(
        ratios=tuple(ratios),
        skip_layers=tuple(options.skip_layers),
        same_groups=tuple(tuple(patterns) for patterns in options.same_group),
        tied=options.tied,
        widths=options.widths,
        seed=options.seed,
    )
    penalty = Penalty(
        options.penalty_start,
        options.penalty_step,
        options.penalty_every,
        options.penalty_limit,
        options.stabilize,
        options.penalty_growth,
    )
    prune = dataclasses.replace(
        dense,
        steps=penalty.updates,
        learning_rate=options.prune_learning_rate,
        warmup=0,
        final=1.0,
    )
    finetune = dataclasses.replace(
        dense, steps=options.finetune_steps, learning_rate=options.finetune_learning_rate
    )
    return Plan(
        phases=tuple(options.phase),
        structure=structure,
        penalty=None if options.one_shot else penalty,
        dense=dense,
        prune=prune,
        finetune=finetune,
    )


def scale_of(options: argparse.Namespace) -> int:
    """Of the network that the run starts from."""
    from . import checkpoint

    file = options.weights
    if "dense" not in options.phase and not file:
        before = "dense" if "prune" in options.phase else "prune"
        path = options.output / before / "model.safetensors"
        if not path.exists():
            raise ValueError(
                f"--weights is needed: {options.phase[0]} has no network to start from in"
                f" {options.output}"
            )
        file = path
    if file is None:
        return options.architecture.scale
    model: Any = checkpoint.load(file)
    return model.scale


def run(
    options: argparse.Namespace,
    ranks: Ranks,
    sampler: PatchSampler,
    validation: Validation | None,
    sets: dict[str, list[Pair]],
    schedule: Schedule,
) -> dict[str, Any] | None:
    """All phases; then the dense network, the cut one and the fine-tuned one side by side.

    The last one is the output folder's model.safetensors. Returns what the command reports (None in
    all processes but the first). Raises KeyboardInterrupt after an interruption, its state saved.
    """
    import torch

    from . import checkpoint, models, scoring, srp
    from .files import atomic_write
    from .quantizers import quant_spec

    plan = plan_of(options, schedule)
    network: Any = None
    if "dense" in plan.phases:
        torch.manual_seed(options.seed)
        network = models.create(options.architecture)
        if hasattr(network, "widened"):
            network = network.widened(block=options.block, expansion=options.expansion)
        network = network.to(ranks.device)
    elif options.weights and quant_spec(checkpoint.load(options.weights)) is not None:
        raise ValueError(f"{options.weights}: it is quantized already; the float model is needed")
    report = srp.train_srp(
        network,
        sampler,
        plan,
        folder=options.output,
        weights=options.weights,
        validation=validation,
        settings={"seed": options.seed, "world": ranks.world},
        resume=options.resume,
        compiled=options.compile,
        ranks=ranks,
        card={"recipe": options.recipe, "method": "srp"},
    )
    if report["interrupted"]:
        raise KeyboardInterrupt
    last: Path = options.output / "model.safetensors"
    if ranks.is_main:
        atomic_write(last, (options.output / plan.phases[-1] / last.name).read_bytes())
    ranks.gather(None)
    files: dict[str, Any] = {"bicubic": None}
    if options.weights:
        files["dense" if plan.phases[0] == "prune" else "cut"] = options.weights
    names = {"dense": "dense", "prune": "cut", "finetune": "fine-tuned"}
    files |= {names[phase]: options.output / phase / last.name for phase in plan.phases}
    candidates = (
        (name, None if path is None else checkpoint.load(path, ranks.device), path)
        for name, path in files.items()
    )
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
    scoring.write(options.output, "srp", result, pictures)
    return result
