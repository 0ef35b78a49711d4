"""Training of a quantized network: its quantizers' scalars and, where asked for, what they quantize.

Rounding passes gradients straight through. Sizes differ by orders of magnitude from site to site, so
`StepAdam` measures every update in a unit of its own: a scalar moves by parts of its quantizer's step
(a rate of 0.01 moves a bound by about a hundredth of a level a step, everywhere), a float tensor by
parts of its root mean square, a learned rotation by radians. So one pair of rates serves every layer
and every bit width.

What is trained is what the method learns and spec.train_weights names. `QuantTraining` compares
pictures, on luma where the network knows nothing else:

    loss = mean |network(lr) - hr|              with the true ones, or
    loss = mean (network(lr) - float(lr))^2     with those of the float network

The float network is the better target as long as the quantized one can follow it: the first loss is
mostly what both get wrong, whose gradient is noise; the second is what quantization adds, and its
square is what PSNR counts. `distillation.Distillation` compares features too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .float_training import AveragedTraining
from .learned_rotation import LearnedRotation
from .quantization import METHODS, SCALARS
from .quantizers import Quantizer, WeightQuantizer, named_quantizers, quant_spec

# The least unit of a tensor that starts at or near zero, such as a bias.
LEAST_UNIT = 0.01


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


def kind_of(module: nn.Module, name: str) -> str | None:
    """To which of TRAINED_KINDS a module's own parameter or buffer belongs."""
    if isinstance(module, WeightQuantizer):
        return module.kind if name == "rotated" else None
    if isinstance(module, Quantizer):
        return None
    if isinstance(module, nn.LayerNorm):
        return "norms"
    if isinstance(module, nn.Conv2d):
        return "convolutions"
    return {"bias": "biases", "relative_position_bias_table": "tables"}.get(name)


class QuantTraining(AveragedTraining):
    """A calibrated network against pictures; an `Objective` of the trainer.

    teacher: the float network to follow; None: the true pictures are the target. weight_rate: of
    float tensors, over the schedule's rate, which is that of the scalars. average: decay of the
    moving average that is kept (0: the network itself is). Raises ValueError for a network that
    learns nothing or is not calibrated.
    """

    def __init__(
        self,
        network: nn.Module,
        teacher: nn.Module | None = None,
        *,
        weight_rate: float,
        average: float = 0.998,
    ):
        spec = quant_spec(network)
        assert spec is not None
        kinds = {*spec.train_weights, *(["weights"] if METHODS[spec.method].weights else [])}
        sites = list(named_quantizers(network))
        for name, quantizer in sites:
            if not quantizer.calibrated:
                raise ValueError(f"network: {name} is not calibrated")
            if isinstance(quantizer, WeightQuantizer) and kind_of(quantizer, "rotated") in kinds:
                quantizer.train_weight()
        for module in network.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if kind_of(module, name) in kinds:
                    parameter.requires_grad_(True)
        super().__init__(network, average)
        self.teacher = teacher
        parameters = self.trained().values()
        if not parameters:
            raise ValueError("network: its method learns nothing; there is nothing to train")
        steps = {
            id(getattr(quantizer, name)): quantizer.step
            for _, quantizer in sites
            for name in SCALARS
        }
        scalars = [p for p in parameters if id(p) in steps]
        floats = [p for p in parameters if id(p) not in steps]
        angles = {
            id(p)
            for m in network.modules()
            if isinstance(m, LearnedRotation)
            for p in m.parameters()
        }
        units = [
            torch.ones_like(p)
            if id(p) in angles
            else p.detach().square().mean().sqrt().clamp_min(LEAST_UNIT)
            for p in floats
        ]
        self.optimizer = StepAdam(
            [
                {"params": group, "lr_factor": factor}
                for group, factor in ((scalars, 1.0), (floats, weight_rate))
                if group
            ],
            [*(steps[id(p)] for p in scalars), *units],
            lr=1.0,
        )
        self.sites = [quantizer for _, quantizer in sites]
        self.smallest = [1e-3 * (q.upper - q.lower).detach() for q in self.sites]

    def losses(self, lr: Tensor, hr: Tensor) -> dict[str, Tensor]:
        lr, hr = self.pair(lr, hr)
        output = self.network(lr)
        if self.teacher is None:
            return {"loss": F.l1_loss(output, hr)}
        with torch.no_grad():
            target = self.teacher(lr)
        return {"loss": F.mse_loss(output, target)}

    @torch.no_grad()
    def update(self) -> None:
        """One optimizer step, then every quantizer's step is kept positive and finite."""
        self.optimizer.step()
        for quantizer, smallest in zip(self.sites, self.smallest, strict=True):
            quantizer.project_(smallest)
        self.follow()
