"""Quantization-aware training: weights, biases and ranges of a quantized network.

    loss = mean |network(lr) - hr|              against the true pictures, or
    loss = mean (network(lr) - float(lr))^2     against those of the float network

on luma where the network knows nothing else. The float network is the better target as long as the
quantized one can follow it: the first loss is mostly what both get wrong, whose gradient is noise; the
second is what quantization adds, and its square is what PSNR counts. The rounding of weights
and activations is passed straight through. The float weights behind the codes move by parts of
their tensor's root mean square, the ranges by parts of their quantizer's step (`StepAdam`), so one
pair of rates serves every layer and every bit width. What is kept is the moving average of all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .distillation import StepAdam
from .float_training import AveragedTraining
from .quantization import WeightQuantizer, named_quantizers

# The least unit of a tensor that starts at or near zero, such as a bias.
LEAST_UNIT = 0.01


class QuantTraining(AveragedTraining):
    """A calibrated network whose method trains weights; an `Objective` of the trainer.

    teacher: the float network to follow; None: the true pictures are the target. weight_rate: of
    weights, over the schedule's rate, which is that of the ranges. Raises ValueError for a network
    that is not calibrated.
    """

    def __init__(
        self,
        network: nn.Module,
        teacher: nn.Module | None = None,
        *,
        weight_rate: float,
        average: float = 0.998,
    ):
        for name, quantizer in named_quantizers(network):
            if not quantizer.calibrated:
                raise ValueError(f"network: {name} is not calibrated")
            if isinstance(quantizer, WeightQuantizer):
                quantizer.train_weight()
        super().__init__(network, average)
        self.teacher = teacher
        steps = {
            id(parameter): quantizer.step
            for _, quantizer in named_quantizers(network)
            for name, parameter in quantizer.named_parameters()
            if name in quantizer.stored
        }
        parameters = self.trained().values()
        scalars = [p for p in parameters if id(p) in steps]
        weights = [p for p in parameters if id(p) not in steps]
        units = [p.detach().square().mean().sqrt().clamp_min(LEAST_UNIT) for p in weights]
        self.optimizer = StepAdam(
            [
                {"params": scalars, "lr_factor": 1.0},
                {"params": weights, "lr_factor": weight_rate},
            ],
            [*(steps[id(p)] for p in scalars), *units],
            lr=1.0,
        )
        self.sites = [quantizer for _, quantizer in named_quantizers(network)]
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
        self.optimizer.step()
        for quantizer, smallest in zip(self.sites, self.smallest, strict=True):
            quantizer.project_(smallest)
        self.follow()
