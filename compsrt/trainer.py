"""The training loop: one for float training, distillation and whatever else takes steps.

What is trained is an `Objective`: it has the losses, the optimizer and the state. The loop has
everything else: crops, schedule, gradient accumulation and averaging over processes, validation,
logs, and resuming.

A step is a pure function of the state before it and of its number (crop j of step i depends on
seed, i and j alone), and the state is saved between steps only. So a run that was killed goes on
to the same result, and N processes with batches of B see what one sees with a batch of N B.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import metrics
from .cli import progress
from .data import PatchSampler, to_image
from .distributed import Ranks
from .files import TEMPORARY, atomic_write


class Objective(Protocol):
    """What a Trainer trains."""

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    @property
    def model(self) -> nn.Module:
        """What is validated and in the end kept (the averaged weights, where there are such)."""
        ...

    def losses(self, lr: Tensor, hr: Tensor) -> dict[str, Tensor]:
        """Scalars by name; "loss" is what gradients are taken of."""
        ...

    def update(self) -> None:
        """One optimizer step with the gradients that are there."""
        ...

    def trained(self) -> dict[str, nn.Parameter]:
        """What the optimizer moves, by name."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def learned(self) -> dict[str, Tensor]:
        """The tensors of `model` that training changes."""
        ...


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long, how much at a time, and how fast.

    steps: optimizer steps. batch: crops a step and process, in `accumulate` parts. patches: sides
    of the LR crops, one after another over equal parts of the run. learning_rate: the highest,
    reached after `warmup` steps, then a cosine down to `final` times it. validate_every,
    save_every, log_every: steps.
    """

    steps: int
    batch: int = 8
    accumulate: int = 1
    patches: tuple[int, ...] = (32,)
    learning_rate: float = 1e-3
    warmup: int = 0
    final: float = 0.02
    validate_every: int = 100
    save_every: int = 100
    log_every: int = 10

    def __post_init__(self):
        for name in ("batch", "accumulate", "validate_every", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is below 1")
        if self.steps < 0 or self.warmup < 0:
            raise ValueError("steps and warmup: negative numbers make no sense")
        if self.batch % self.accumulate:
            raise ValueError(
                f"accumulate: {self.accumulate} does not divide the batch {self.batch}"
            )
        if not self.patches or min(self.patches) < 8:
            raise ValueError(f"patch: {self.patches} holds a side below 8 pixels")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate: {self.learning_rate} is not positive")

    def learning_rate_at(self, step: int) -> float:
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        low = self.final
        return self.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * done)) / 2)

    def patch_at(self, step: int) -> int:
        return self.patches[min(step * len(self.patches) // self.steps, len(self.patches) - 1)]


def pictures_of(sampler: PatchSampler, validation: Validation | None) -> dict[str, Any]:
    """What a run depends on of its pictures, in its settings."""
    return {
        "pictures": sampler.identity,
        "validation": None if validation is None else validation.identity,
    }


def check_settings(path: Path, found: Any, settings: dict[str, Any]) -> None:
    """Raise ValueError unless the run that wrote `found` to a file had these settings."""
    before = found.get("settings") if isinstance(found, dict) else None
    if not isinstance(before, dict):
        raise ValueError(f"{path}: it is of no run, cannot resume; --force starts anew")
    for key, value in settings.items():
        if before.get(key) != value:
            raise ValueError(
                f"{path}: cannot resume, {key} was {before.get(key)!r} and is {value!r}"
            )


def finished(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The report of a run that is finished, by its done.json; None without one or its model.

    Raises ValueError if it is damaged or of a run with other settings.
    """
    path = folder / "done.json"
    if not path.exists() or not (folder / "model.safetensors").exists():
        return None
    try:
        found = json.loads(path.read_text())
    except ValueError:
        raise ValueError(f"{path}: damaged, cannot resume; --force starts anew") from None
    check_settings(path, found, settings)
    return found["report"]


def finish(folder: Path, settings: dict[str, Any], report: dict[str, Any]) -> None:
    """Write what `finished` reads."""
    text = json.dumps({"settings": settings, "report": report})
    atomic_write(folder / "done.json", text.encode())


def start(folder: Path, resume: bool) -> None:
    """A run begins in this folder: what an earlier one would go on from, or was writing, goes."""
    folder.mkdir(parents=True, exist_ok=True)
    old = [folder / "done.json", *folder.glob(TEMPORARY)]
    for path in old if resume else [*old, folder / "state.pt"]:
        path.unlink(missing_ok=True)


class Validation:
    """Fixed crops of held-out training pictures, and the PSNR (luma, of the pooled error) on them."""

    def __init__(self, sampler: PatchSampler, count: int, patch: int, ranks: Ranks):
        self.scale, self.ranks = sampler.scale, ranks
        lr, hr = sampler.sample(count, patch, step=0, augment=False)
        self.lr = lr[ranks.rank :: ranks.world]
        self.hr = hr[ranks.rank :: ranks.world]
        self.names = sorted({crop["name"] for crop in sampler.describe(count, patch, step=0)})
        self.identity = f"{count} crops of {patch} of {sampler.identity}"

    @torch.no_grad()
    def psnr(self, model: nn.Module) -> float:
        errors = []
        for lr, hr in zip(self.lr.split(8), self.hr.split(8), strict=True):
            for ours, theirs in zip(model(lr).float(), hr, strict=True):
                difference = metrics.y_channel(to_image(ours)) - metrics.y_channel(to_image(theirs))
                inside = difference[self.scale : -self.scale, self.scale : -self.scale]
                errors.append(float(np.square(inside).mean()))
        gathered = [error for share in self.ranks.gather(errors) for error in share]
        error = math.fsum(gathered) / len(gathered)
        return 10 * math.log10(255**2 / error) if error else math.inf


class Trainer:
    """Runs a schedule on an objective; `fit` returns when it is done or was asked to stop.

    folder: where state.pt, metrics.jsonl and, if tensorboard is installed, its log are written (by
    the first process alone); None keeps nothing. settings: what must be the same when a run is
    resumed. Raises ValueError when a loss or a gradient stops being finite, naming what and when.
    """

    def __init__(
        self,
        objective: Objective,
        sampler: PatchSampler,
        schedule: Schedule,
        *,
        validation: Validation | None = None,
        folder: Path | None = None,
        settings: dict[str, Any] | None = None,
        ranks: Ranks | None = None,
        description: str = "training",
    ):
        self.objective, self.sampler, self.schedule = objective, sampler, schedule
        self.validation, self.folder = validation, folder
        self.settings = {**(settings or {}), **pictures_of(sampler, validation)}
        self.ranks = ranks or Ranks(sampler.device)
        self.description = description
        self.step = 0
        self.seconds = 0.0
        self.best: tuple[float, int, dict[str, Tensor]] | None = None
        self.interrupted = False

    # --- State ---

    @property
    def _state_file(self) -> Path | None:
        return None if self.folder is None else self.folder / "state.pt"

    def save(self) -> None:
        """Write state.pt, whole or not at all."""
        if self._state_file is None or not self.ranks.is_main:
            return
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "best": self.best,
            "settings": self.settings,
            "objective": self.objective.state_dict(),
        }
        atomic_write(self._state_file, lambda file: torch.save(state, file))

    def resume(self) -> bool:
        """Go on from state.pt if it is there. ValueError if it is of a run with other settings."""
        path = self._state_file
        if path is None or not path.exists():
            return False
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{path}: damaged, cannot resume ({type(error).__name__})") from None
        check_settings(path, state, self.settings)
        self.step, self.seconds = state["step"], state["seconds"]
        self.best = state["best"]
        self.objective.load_state_dict(state["objective"])
        return True

    def load_best(self) -> None:
        """Give the objective's model the tensors it had at the best validation."""
        if self.best is not None:
            learned = self.objective.learned()
            with torch.no_grad():
                for name, tensor in self.best[2].items():
                    learned[name].copy_(tensor)

    # --- Loop ---

    def fit(self) -> None:
        schedule, objective = self.schedule, self.objective
        logger = _Logger(self.folder if self.ranks.is_main else None, self.step)
        bar = progress(total=schedule.steps, initial=self.step, description=self.description,
                       unit="step") if self.ranks.is_main else None  # fmt: skip
        if self.step == 0:
            self._validate(logger)
        start, images, since = time.perf_counter() - self.seconds, 0, time.perf_counter()
        with _until_interrupted(self), contextlib.closing(logger):
            while self.step < schedule.steps and not self._asked_to_stop():
                rate = schedule.learning_rate_at(self.step)
                for group in objective.optimizer.param_groups:
                    group["lr"] = rate * group.get("lr_factor", 1.0)
                losses = self._gradients()
                last = self.step + 1 == schedule.steps
                logged = last or self.step % schedule.log_every == 0
                # Reading a number waits for a GPU, so there it is only looked at now and then.
                if logged or self.sampler.device.type == "cpu":
                    self._check(losses)
                objective.update()
                self.step += 1
                images += schedule.batch * self.ranks.world
                if logged:
                    now = time.perf_counter()
                    values = {key: float(value) for key, value in losses.items()}
                    speed = images / (now - since)
                    images, since = 0, now
                    logger.log(self.step, {**values, "lr": rate, "images_per_second": speed})
                    if bar is not None:
                        best = f"{self.best[0]:.3f}" if self.best else "-"
                        bar.set_postfix_str(f"{speed:.1f} images/s, best PSNR {best} dB")
                self.seconds = time.perf_counter() - start
                if bar is not None:
                    bar.update()
                if last or self.step % schedule.validate_every == 0:
                    self._validate(logger)
                if not last and self.step % schedule.save_every == 0:
                    self.save()
        self.seconds = time.perf_counter() - start
        self.save()
        if bar is not None:
            bar.close()

    def _asked_to_stop(self) -> bool:
        """Whether any process was interrupted: they stop together, at a step that is logged."""
        if self.ranks.world == 1:
            return self.interrupted
        if self.step % self.schedule.log_every:
            return False
        return any(self.ranks.gather(self.interrupted))

    def _gradients(self) -> dict[str, Tensor]:
        """Losses of one step; the gradients are in place, averaged over parts and processes."""
        schedule, objective, ranks = self.schedule, self.objective, self.ranks
        patch, part = schedule.patch_at(self.step), schedule.batch // schedule.accumulate
        objective.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for i in range(schedule.accumulate):
            first = ranks.rank * schedule.batch + i * part
            lr, hr = self.sampler.sample(part, patch, step=self.step, first=first)
            losses = objective.losses(lr, hr)
            (losses["loss"] / schedule.accumulate).backward()
            for key, value in losses.items():
                sums[key] = sums.get(key, 0) + value.detach() / schedule.accumulate
        if ranks.world > 1:
            self._average(list(objective.trained().values()))
        return sums

    def _average(self, parameters: list[nn.Parameter]) -> None:
        """Gradients averaged over the processes, by one all-reduce of all as a single vector."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.ranks.world
        parts = flat.split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter).clone()

    def _check(self, losses: dict[str, Tensor]) -> None:
        if not all(math.isfinite(float(value)) for value in losses.values()):
            raise self._not_finite("loss")

    def _not_finite(self, what: str) -> ValueError:
        first = _first_not_finite(self.objective.trained())
        return ValueError(f"step {self.step}: the {what} is not finite; first in {first}")

    def _validate(self, logger: _Logger) -> None:
        if self.validation is None:
            return
        try:
            value = self.validation.psnr(self.objective.model)
        except ValueError:  # the output is no picture
            raise self._not_finite("output") from None
        logger.log(self.step, {"validation_psnr": value})
        if self.best is None or value > self.best[0]:
            copies = {k: v.detach().cpu().clone() for k, v in self.objective.learned().items()}
            self.best = value, self.step, copies


def _first_not_finite(parameters: dict[str, nn.Parameter]) -> str:
    """The name of the first parameter that is NaN or infinite, else of the first such gradient."""
    for values in (parameters, {name: p.grad for name, p in parameters.items()}):
        for name, value in values.items():
            if value is not None and not torch.isfinite(value).all():
                return name
    return "the output alone"


class _Logger:
    """metrics.jsonl, one object a line, and tensorboard where it is installed."""

    def __init__(self, folder: Path | None, first_step: int):
        self.file = self.board = None
        if folder is None:
            return
        path = folder / "metrics.jsonl"
        kept = []
        if first_step and path.exists():  # what a killed run logged after its last saved state
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    if json.loads(line)["step"] <= first_step:
                        kept.append(line)
        path.write_text("".join(f"{line}\n" for line in kept))
        self.file = path.open("a")
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step or None)

    def log(self, step: int, values: dict[str, float]) -> None:
        if self.file is not None:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            self.file.flush()
        if self.board is not None:
            for key, value in values.items():
                self.board.add_scalar(key, value, step)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.close()


@contextlib.contextmanager
def _until_interrupted(trainer: Trainer) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the loop after the step that is running; a second one at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        if trainer.interrupted:
            raise KeyboardInterrupt
        trainer.interrupted = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
