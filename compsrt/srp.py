"""SRP: structure-regularized pruning (Zhang et al., ICLR 2022), from a dense network to a small one.

Three phases, each a run of the trainer in a folder of its own, each to be resumed:

    dense      float training of the network as it is
    prune      the doomed units are chosen; a growing L2 penalty drives what makes them to zero,
               while the rest of the network takes over what they did; then they are cut out
    finetune   float training of the small network

The penalty of update n adds strength(n) / 255 * w to the gradient of every doomed weight w. The
strength starts at `start` (0), grows by `step` (1e-4) every `every` (20) updates up to `limit`
(0.5), and stays there for `stabilize` (43,150) updates: 143,150 in all, the published defaults.
They are meant for a loss on colours from 0 to 255; ours are from 0 to 1, so its gradients are 255
times smaller, and the penalty is made so too.

The gradients of the first layer are 40 to 100 times those of the blocks (root mean square, in an
EDSR of 8 blocks of 64 channels after 8,000 updates). So under a strength that grows linearly within
a few thousand updates either the blocks' filters are gone before the others can take over, or the
first layer's are not gone at the end. In short runs the growth can be "geometric" instead: then
`step` is a share of the strength.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, trainer
from .data import PatchSampler
from .distributed import Ranks
from .files import sha256
from .float_training import FloatTraining, train_float
from .pruning import Choice, StructureSpec, choose, cut, doomed_weights
from .trainer import Schedule, Trainer, Validation

PHASES = ("dense", "prune", "finetune")
WHITE = 255  # of the colours that the published strengths are meant for
GROWTHS = ("linear", "geometric")
AVERAGE = 0.99  # of the weights while they shrink: what is cut must not lag behind


@dataclasses.dataclass(frozen=True)
class Penalty:
    """How strong the penalty is at every update; see the head of this file.

    growth: "linear" adds `step`, "geometric" multiplies by 1 + step.
    """

    start: float = 0.0
    step: float = 1e-4
    every: int = 20
    limit: float = 0.5
    stabilize: int = 43_150
    growth: str = "linear"

    def __post_init__(self):
        if not (0 <= self.start <= self.limit and math.isfinite(self.limit)):
            raise ValueError(
                f"penalty: it starts at {self.start}, which is not between 0 and its limit"
                f" {self.limit}"
            )
        if self.growth not in GROWTHS:
            raise ValueError(f"penalty_growth: {self.growth!r} is not one of {', '.join(GROWTHS)}")
        if self.growth == "geometric" and not self.start:
            raise ValueError("penalty_start: geometric growth never leaves 0; start above it")
        if not self.step > 0:
            raise ValueError(f"penalty_step: {self.step} is not above 0, so it would never grow")
        if self.every < 1 or self.stabilize < 0:
            raise ValueError("penalty_every and stabilize: at least 1 and 0 updates")

    def at(self, update: int) -> float:
        """The strength at an update, counted from 0."""
        grown = update // self.every
        if self.growth == "linear":
            return min(self.start + self.step * grown, self.limit)
        # Never more than it takes, or the power would be too large for a float.
        return min(self.start * (1 + self.step) ** min(grown, self._growths), self.limit)

    @property
    def _growths(self) -> int:
        """How often it grows before it is at its limit."""
        if self.growth == "linear":
            return math.ceil(round((self.limit - self.start) / self.step, 6))
        return math.ceil(round(math.log(self.limit / self.start) / math.log1p(self.step), 6))

    @property
    def updates(self) -> int:
        """How many updates it takes in all."""
        return self._growths * self.every + self.stabilize


class StructureRegularization(FloatTraining):
    """Float training with the penalty on the doomed weights. An `Objective` of the trainer.

    doomed: masks by the names of parameters (`pruning.doomed_weights`).
    """

    def __init__(
        self,
        network: nn.Module,
        doomed: dict[str, Tensor],
        penalty: Penalty,
        *,
        compiled: bool = False,
    ):
        super().__init__(network, average=AVERAGE, compiled=compiled)
        parameters = dict(network.named_parameters())
        self.penalty = penalty
        self.masks = [
            (parameters[name], mask.to(parameters[name])) for name, mask in doomed.items()
        ]
        self.count = sum(float(mask.sum()) for _, mask in self.masks)

    def losses(self, lr: Tensor, hr: Tensor) -> dict[str, Tensor]:
        """The loss; and, for the log, the penalty's strength and the doomed weights' mean magnitude."""
        found = super().losses(lr, hr)
        with torch.no_grad():
            sizes = torch.stack([(parameter * mask).abs().sum() for parameter, mask in self.masks])
        strength = torch.tensor(self.penalty.at(self.updates))
        return {**found, "penalty": strength, "doomed": sizes.sum() / self.count}

    @torch.no_grad()
    def regularize(self) -> None:
        strength = self.penalty.at(self.updates) / WHITE
        for parameter, mask in self.masks:
            assert parameter.grad is not None
            parameter.grad.addcmul_(parameter, mask, value=strength)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `train_srp` does: which phases, what is cut, and the schedules.

    penalty: None cuts at once, which is plain one-shot pruning. prune: the schedule of the updates
    under the penalty; its steps follow from it.
    """

    phases: tuple[str, ...]
    structure: StructureSpec
    penalty: Penalty | None
    dense: Schedule
    prune: Schedule
    finetune: Schedule

    def __post_init__(self):
        if "prune" in self.phases and not self.structure.ratios:
            raise ValueError(
                "ratio: nothing says how much is to be cut; 0.5 is half of every layer"
            )


def train_srp(
    network: nn.Module | None,
    sampler: PatchSampler,
    plan: Plan,
    *,
    folder: Path,
    weights: str | Path | None = None,
    validation: Validation | None = None,
    settings: dict[str, Any] | None = None,
    resume: bool = False,
    compiled: bool = False,
    ranks: Ranks | None = None,
    card: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The phases of a plan one after another, each from what the one before it left in its folder.

    network: what the dense phase trains (in its wider form, if it has one). weights: a file that the
    first phase starts from if that is not "dense". Every phase leaves folder/PHASE/model.safetensors
    (the phase "prune": after the cut), and a finished one is not repeated when the run is resumed.
    Returns the report of each phase by name, and "interrupted". Raises ValueError if a phase has
    nothing to start from.
    """
    ranks = ranks or Ranks(sampler.device)
    shared: dict[str, Any] = {
        "validation": validation, "resume": resume, "compiled": compiled, "ranks": ranks,
    }  # fmt: skip
    report: dict[str, Any] = {"interrupted": False}
    for phase in plan.phases:
        place = folder / phase
        source = None if phase == "dense" else _source(folder, phase, weights)
        schedule: Schedule = getattr(plan, phase)
        wanted = {
            **(settings or {}),
            **trainer.pictures_of(sampler, validation),
            "schedule": json.dumps(dataclasses.asdict(schedule)),
        }
        if source is not None:
            wanted["source"] = sha256(source)
        elif network is not None:
            wanted["architecture"] = repr(network.config)
        if phase == "prune":
            wanted["structure"] = json.dumps(dataclasses.asdict(plan.structure))
            wanted["penalty"] = json.dumps(plan.penalty and dataclasses.asdict(plan.penalty))
        weights = None  # of the first phase only
        before = trainer.finished(place, wanted) if resume else None
        if before is not None:
            report[phase] = before
            continue
        if ranks.is_main:
            trainer.start(place, resume)
        ranks.gather(None)
        start: Any = network if source is None else checkpoint.load(source, sampler.device)
        own = {**(card or {}), "phase": phase}
        if source is not None:
            own["source"] = {"file": Path(source).name, "sha256": wanted["source"]}
        if phase == "prune":
            done = _prune(start, sampler, plan, place, wanted, card=own, **shared)
        else:
            assert start is not None
            _, done = train_float(
                start, sampler, schedule=schedule, folder=place, settings=wanted, card=own, **shared
            )
        report[phase] = done
        report["interrupted"] = done["interrupted"]
        if done["interrupted"]:
            break
        if ranks.is_main:
            trainer.finish(place, wanted, done)
    ranks.gather(None)
    return report


def _source(folder: Path, phase: str, weights: str | Path | None) -> str | Path:
    """The file that a phase starts from."""
    if weights is not None:
        return weights
    before = PHASES[PHASES.index(phase) - 1]
    path = folder / before / "model.safetensors"
    if not path.exists():
        raise ValueError(
            f"phase: {phase!r} needs a network to start from; run the phase {before!r} in"
            f" {folder} first, or give --weights"
        )
    return path


def _prune(
    network: nn.Module,
    sampler: PatchSampler,
    plan: Plan,
    folder: Path,
    settings: dict[str, Any],
    *,
    validation: Validation | None,
    resume: bool,
    compiled: bool,
    ranks: Ranks,
    card: dict[str, Any],
) -> dict[str, Any]:
    """Penalty and cut. The choice follows from the network and the plan, so it is made anew on resuming."""
    began = time.perf_counter()
    choices = choose(network, plan.structure)
    if not choices:
        ratios = " ".join(f"{pattern}:{ratio}" for pattern, ratio in plan.structure.ratios)
        raise ValueError(f"ratio: {ratios} cuts nothing out of this network")
    report: dict[str, Any] = {"steps": 0, "interrupted": False, "cut": [str(c) for c in choices]}
    if ranks.is_main:
        print(_summary(choices))
    if plan.penalty is not None:
        masks = doomed_weights(network.state_dict(), choices)
        objective = StructureRegularization(network, masks, plan.penalty, compiled=compiled)
        trainer = Trainer(
            objective,
            sampler,
            plan.prune,
            validation=validation,
            folder=folder,
            settings=settings,
            ranks=ranks,
            description="penalty",
        )
        if resume:
            trainer.resume()
        began -= trainer.seconds
        trainer.fit()
        # What counts is the end, not the best on the way: there the penalty had done nothing yet.
        network = objective.model
        report |= {"steps": trainer.step, "interrupted": trainer.interrupted}
        if validation is not None:
            report["validation_psnr_before_cut"] = validation.psnr(network)
    if not report["interrupted"]:
        small = cut(network, choices).eval()
        if validation is not None:
            report["validation_psnr"] = validation.psnr(small)
        report["seconds"] = time.perf_counter() - began
        if ranks.is_main:
            checkpoint.save_float(small, folder / "model.safetensors", card={**card, **report})
    ranks.gather(None)
    return report


def _summary(choices: Sequence[Choice]) -> str:
    """The cut in few lines: like groups counted together."""
    lines: dict[str, list[str]] = {}
    for choice in choices:
        text = str(choice)
        lines.setdefault(text.partition(": ")[2], []).append(choice.group.name)
    return "\n".join(
        f"{len(names)} x {text} ({names[0]}{', ...' if names[1:] else ''})"
        for text, names in lines.items()
    )
