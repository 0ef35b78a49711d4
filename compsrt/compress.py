"""From a float model to a packed one: calibrate, prune, distil or train, validate, pack."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import checkpoint, models
from .calibration import quantize
from .data import PatchSampler
from .distillation import Distillation
from .distributed import Ranks
from .quant_training import QuantTraining
from .quantization import METHODS, QuantSpec
from .quantizers import compact_scales, round_to_storage
from .trainer import Schedule, Trainer, Validation

CALIBRATION_STEP = 1 << 40  # a step that no training reaches: its crops are the calibration set


@dataclasses.dataclass(frozen=True)
class CalibrationSet:
    """Which crops the first bounds are searched on: seeded, and recorded in the packed file."""

    sampler: PatchSampler
    count: int = 32
    patch: int = 64

    def pictures(self) -> torch.Tensor:
        """(count, 3, patch, patch) in [0, 1]."""
        lr, _ = self.sampler.sample(self.count, self.patch, step=CALIBRATION_STEP, augment=False)
        return lr

    def record(self) -> dict[str, Any]:
        """Seed, size, and name and place of every crop."""
        crops = self.sampler.describe(self.count, self.patch, step=CALIBRATION_STEP, augment=False)
        places = [[crop["name"], crop["y"], crop["x"]] for crop in crops]
        return {"seed": self.sampler.seed, "patch": self.patch, "crops": places}


def compress(
    model: nn.Module,
    spec: QuantSpec,
    calibration: CalibrationSet,
    *,
    schedule: Schedule,
    validation: Validation | None = None,
    feature_weight: float = 1.0,
    picture_weight: float = 0.0,
    weight_rate: float = 1 / 30,
    average: float = 0.998,
    target: str = "pictures",
    folder: Path | None = None,
    settings: dict[str, Any] | None = None,
    resume: bool = False,
    ranks: Ranks | None = None,
    source: dict[str, Any] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """A quantized copy of a float model by `spec.method`, and what was done to it.

    With a folder, its model.safetensors is the packed model (not for unclamped codes, which need
    not fit their bits) and its state.pt what an interrupted distillation goes on from; after an
    interruption the packed model is the best one so far and the report says interrupted. Of the
    models on the way, the start included, the one with the best validation PSNR is kept.
    feature_weight and picture_weight are of distillation (`Distillation`), weight_rate and average
    of runs that train more than scalars, target of methods that train weights (`QuantTraining`).
    """
    began = time.perf_counter()
    pictures = calibration.pictures()
    model = models.equalized(model, pictures)
    quantized = quantize(model, spec, pictures)
    report: dict[str, Any] = {"steps": 0, "interrupted": False}
    method = METHODS[spec.method]
    if (method.learn or spec.train_weights) and schedule.steps:
        more = method.weights or spec.train_weights
        rates = {"weight_rate": weight_rate, "average": average if more else 0.0}
        objective = (
            QuantTraining(quantized, model if target == "float" else None, **rates)
            if method.weights
            else Distillation(
                quantized,
                model,
                feature_weight=feature_weight,
                picture_weight=picture_weight,
                **rates,
            )
        )
        trainer = Trainer(
            objective,
            calibration.sampler,
            schedule,
            validation=validation,
            folder=folder,
            settings=settings,
            ranks=ranks,
            description=f"{spec.method}, {spec.bits} bits",
        )
        if resume:
            trainer.resume()
        began -= trainer.seconds
        trainer.fit()
        trainer.load_best()
        quantized = objective.model
        round_to_storage(quantized)
        report |= {"steps": trainer.step, "interrupted": trainer.interrupted}
        report["training"] = (
            "QAT" if method.weights else "QAT by distillation" if more else "distillation"
        )
        report["crops"] = trainer.step * schedule.batch * trainer.ranks.world
        report["pictures"] = len(calibration.sampler)
        if trainer.best is not None:
            report |= {"validation_psnr": trainer.best[0], "best_step": trainer.best[1]}
    if spec.codes == "clamped":
        compact_scales(quantized)
    report["seconds"] = time.perf_counter() - began
    if folder is not None and spec.codes == "clamped" and (ranks is None or ranks.is_main):
        checkpoint.save_packed(
            quantized,
            folder / "model.safetensors",
            calibration=calibration.record(),
            source=source,
            results=report,
        )
    return quantized, report
