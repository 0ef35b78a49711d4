"""DQC: a quantized student learns its quantizers' scalars from its float teacher (2DQuant, section 3.3).

loss = mean |student - teacher|  +  weight * mean over layers of ||f_s/|f_s| - f_t/|f_t|||^2

Both pictures and the features after every layer are compared; a feature map is divided by its own
norm, one norm a sample. In the published code the norm was broadcast over the batch and the term
divided twice by the number of elements, which left it 10^5 to 10^7 times too small to matter.

Only the scalars that the method learns get gradients. Their sizes differ by orders of magnitude
from site to site, so `StepAdam` measures every update in the quantizer's own step: a learning rate
of 0.01 moves a bound by about a hundredth of a level a step, everywhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .quantization import named_quantizers


class StepAdam(torch.optim.Optimizer):
    """Adam whose update of a parameter is multiplied by that parameter's `unit`, a positive tensor.

    parameters: those, or groups of them. units: one tensor a parameter, in their order, of its shape
    or (). For all parameters of a group at once: a dozen launches however many there are.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter] | list[dict[str, Any]],
        units: list[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-12,
    ):
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps})
        every = [p for group in self.param_groups for p in group["params"]]
        for parameter, unit in zip(every, units, strict=True):
            self.state[parameter] = {
                "step": 0,
                "mean": torch.zeros_like(parameter),
                "square": torch.zeros_like(parameter),
                "unit": unit.detach().expand_as(parameter).clone(),
            }

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            raise ValueError("closure: StepAdam takes none")
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            states = [self.state[p] for p in parameters]
            gradients = [p.grad for p in parameters]
            means, squares, units = ([s[key] for s in states] for key in ("mean", "square", "unit"))
            for state in states:
                state["step"] += 1
            count = states[0]["step"]
            first, second = group["betas"]
            torch._foreach_lerp_(means, gradients, 1 - first)
            torch._foreach_mul_(squares, second)
            torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
            updates = torch._foreach_div(squares, 1 - second**count)
            torch._foreach_sqrt_(updates)
            torch._foreach_add_(updates, group["eps"])
            torch._foreach_reciprocal_(updates)
            torch._foreach_mul_(updates, means)
            torch._foreach_mul_(updates, units)
            torch._foreach_add_(parameters, updates, alpha=-group["lr"] / (1 - first**count))


class Distillation:
    """A quantized student, its float teacher, and what keeps the student's scalars sound.

    An `Objective` of the trainer. Raises ValueError for a student that learns nothing or was not
    calibrated.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        feature_weight: float = 1.0,
    ):
        self.student, self.teacher = student, teacher
        self.feature_weight = feature_weight
        self.sites = list(named_quantizers(student))
        for name, quantizer in self.sites:
            if not quantizer.calibrated:
                raise ValueError(f"student: {name} is not calibrated")
        self.named = {
            f"{name}.{key}": parameter
            for name, quantizer in self.sites
            for key, parameter in quantizer.named_parameters()
            if parameter.requires_grad
        }
        if not self.named:
            raise ValueError("student: its method learns nothing; there is nothing to distil")
        steps = [
            quantizer.step
            for _, quantizer in self.sites
            for parameter in quantizer.parameters()
            if parameter.requires_grad
        ]
        self.optimizer = StepAdam(list(self.named.values()), steps, lr=1.0)
        self.smallest = [1e-3 * (q.upper - q.lower).detach() for _, q in self.sites]

    @property
    def model(self) -> nn.Module:
        return self.student

    def losses(self, lr: Tensor, hr: Tensor | None = None) -> dict[str, Tensor]:
        """The two terms and their weighted sum, for pictures lr (B, 3, H, W); hr is not used."""
        with _features(self.student) as ours, _features(self.teacher) as theirs:
            with torch.no_grad():
                target = self.teacher(lr)
            pixel = F.l1_loss(self.student(lr), target)
        feature = torch.stack([_distance(*maps) for maps in zip(ours, theirs, strict=True)]).mean()
        return {
            "loss": pixel + self.feature_weight * feature,
            "pixel": pixel,
            "feature": feature,
        }

    @torch.no_grad()
    def update(self) -> None:
        """One optimizer step, then every quantizer's step is kept positive and finite."""
        self.optimizer.step()
        for (_, quantizer), smallest in zip(self.sites, self.smallest, strict=True):
            quantizer.project_(smallest)

    def trained(self) -> dict[str, nn.Parameter]:
        return self.named

    def learned(self) -> dict[str, Tensor]:
        return dict(self.named)

    def state_dict(self) -> dict[str, Any]:
        return {"scalars": dict(self.named), "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, parameter in self.named.items():
            parameter.copy_(state["scalars"][name])
        self.optimizer.load_state_dict(state["optimizer"])


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
