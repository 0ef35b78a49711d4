"""Float training: L1, AdamW, an average of the weights, bf16 autocast on a GPU."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FloatTraining:
    """A float network against the true pictures; what is kept is the moving average of its weights.

    average: decay of that average a step (it starts slower, as (1 + n)/(10 + n)). compiled: run
    the training forward through torch.compile, once for every patch size.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        weight_decay: float = 0.0,
        average: float = 0.999,
        clip: float = 1.0,
        compiled: bool = False,
    ):
        self.network, self.decay, self.clip = network.train().requires_grad_(True), average, clip
        self.averaged = copy.deepcopy(network).eval().requires_grad_(False)
        self.forward = torch.compile(network, dynamic=False) if compiled else network
        self.on_gpu = next(network.parameters()).device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            network.parameters(),
            lr=1.0,
            betas=(0.9, 0.99),
            weight_decay=weight_decay,
            fused=self.on_gpu,
        )
        self.updates = 0

    @property
    def model(self) -> nn.Module:
        return self.averaged

    def losses(self, lr: Tensor, hr: Tensor) -> dict[str, Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=self.on_gpu):
            output = self.forward(lr)
        return {"loss": F.l1_loss(output.float(), hr)}

    def update(self) -> None:
        parameters = list(self.network.parameters())
        torch.nn.utils.clip_grad_norm_(parameters, self.clip)
        self.optimizer.step()
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        with torch.no_grad():
            torch._foreach_lerp_(tuple(self.averaged.parameters()), tuple(parameters), 1 - decay)

    def trained(self) -> dict[str, nn.Parameter]:
        return dict(self.network.named_parameters())

    def learned(self) -> dict[str, Tensor]:
        return dict(self.averaged.named_parameters())

    def state_dict(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]


@torch.no_grad()
def start_from(network: nn.Module, other: nn.Module) -> list[str]:
    """Copy every parameter of `other` that `network` has in the same shape; returns those it lacks.

    So x3 and x4 start from x2: all but the last convolution is of one shape. Raises ValueError
    when nothing fits.
    """
    theirs = dict(other.named_parameters())
    missing, copied = [], 0
    for name, parameter in network.named_parameters():
        if name in theirs and theirs[name].shape == parameter.shape:
            parameter.copy_(theirs[name])
            copied += 1
        else:
            missing.append(name)
    if not copied:
        raise ValueError("weights: no parameter has the name and shape of this network's")
    return missing
