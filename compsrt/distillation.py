"""DQC: a quantized student learns from its float teacher (2DQuant, section 3.3).

loss = mean |student - teacher|  +  feature weight * mean over layers of ||f_s/|f_s| - f_t/|f_t|||^2
       + picture weight * mean |student - true picture|

Both pictures and the features after every layer are compared; a feature map is divided by its own
norm, one norm a sample. In the published code the norm was broadcast over the batch and the term
divided twice by the number of elements, which left it 10^5 to 10^7 times too small to matter. The
true picture is this package's addition, and off unless asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .quant_training import QuantTraining


class Distillation(QuantTraining):
    """A quantized student, its float teacher, and what keeps the student's scalars sound.

    An `Objective` of the trainer, which trains what `QuantTraining` does, and keeps an average only
    if asked to. Raises ValueError for a student that learns nothing or was not calibrated.
    """

    teacher: nn.Module

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        feature_weight: float = 1.0,
        picture_weight: float = 0.0,
        weight_rate: float = 1 / 30,
        average: float = 0.0,
    ):
        super().__init__(student, teacher, weight_rate=weight_rate, average=average)
        self.feature_weight, self.picture_weight = feature_weight, picture_weight

    def losses(self, lr: Tensor, hr: Tensor | None = None) -> dict[str, Tensor]:
        """The terms and their weighted sum, for pictures lr (B, 3, H, W); hr: of picture_weight."""
        with _features(self.network) as ours, _features(self.teacher) as theirs:
            with torch.no_grad():
                target = self.teacher(lr)
            output = self.network(lr)
        pixel = F.l1_loss(output, target)
        feature = torch.stack([_distance(*maps) for maps in zip(ours, theirs, strict=True)]).mean()
        terms = {"pixel": pixel, "feature": feature}
        loss = pixel + self.feature_weight * feature
        if self.picture_weight:
            assert hr is not None
            terms["picture"] = F.l1_loss(output, hr)
            loss = loss + self.picture_weight * terms["picture"]
        return {"loss": loss, **terms}


def _distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean over the batch of the squared distance of two feature maps (B, ...) of norm 1."""
    axes = tuple(range(1, ours.dim()))
    ours = ours / torch.linalg.vector_norm(ours.detach(), dim=axes, keepdim=True)
    theirs = theirs / torch.linalg.vector_norm(theirs, dim=axes, keepdim=True)
    return (ours - theirs).square().sum(axes).mean()


def _layers(model: Any) -> nn.ModuleList:
    """The modules whose outputs are compared."""
    return model.feature_modules


@contextlib.contextmanager
def _features(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the outputs of the model's feature modules while it runs."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        kept.append(output)

    hooks = [module.register_forward_hook(keep) for module in _layers(model)]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()
