"""Float training: L1, AdamW, an average of the weights, bf16 autocast on a GPU."""

from __future__ import annotations

import copy
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checkpoint, models
from .data import PatchSampler
from .distributed import Ranks
from .models.sesr import luma
from .trainer import Schedule, Trainer, Validation


class AveragedTraining:
    """What objectives share that keep the moving average of a network's parameters.

    average: decay of that average a step (it starts slower, as (1 + n)/(10 + n)); 0 keeps the
    network itself. `pair` gives what is compared: luma alone where the network knows nothing else.
    """

    optimizer: torch.optim.Optimizer

    def __init__(self, network: nn.Module, average: float):
        self.network, self.decay, self.updates = network, average, 0
        self.averaged = network
        if average:
            self.averaged = copy.deepcopy(network).eval().requires_grad_(False)
        self.luma_only = getattr(network, "luma_only", False)

    @property
    def model(self) -> nn.Module:
        return self.averaged

    def pair(self, lr: Tensor, hr: Tensor) -> tuple[Tensor, Tensor]:
        return (luma(lr), luma(hr)) if self.luma_only else (lr, hr)

    @torch.no_grad()
    def follow(self) -> None:
        """Move the average, after an update."""
        self.updates += 1
        if self.averaged is self.network:
            return
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averaged = tuple(self.averaged.parameters())
        torch._foreach_lerp_(averaged, tuple(self.network.parameters()), 1 - decay)

    def trained(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.network.named_parameters() if p.requires_grad}

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


class _NarrowForward(nn.Module):
    """A network whose products are in bf16 on a GPU; no copy of a weight outlives the call."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda, cache_enabled=False):
            return self.network(x).float()


class FloatTraining(AveragedTraining):
    """A float network against the true pictures; what is kept is the moving average of its weights.

    compiled: run the network through torch.compile, once for every patch size; of a network of Swin
    blocks the blocks alone, which share what is compiled. On a CUDA device the launches of a forward
    and of its backward are recorded, too, and replayed: to send them takes longer than to do them.
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
        super().__init__(network.train().requires_grad_(True), average)
        self.narrow, self.clip = _NarrowForward(network), clip
        on_gpu = next(network.parameters()).device.type == "cuda"
        self.recorded: dict[torch.Size, Any] | None = {} if compiled and on_gpu else None
        if compiled:
            blocks = getattr(network, "named_blocks", None)
            for module in [block for *_, block in blocks()] if blocks else [network]:
                module.compile(dynamic=False)
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=1.0, betas=(0.9, 0.99), weight_decay=weight_decay, fused=on_gpu
        )

    def losses(self, lr: Tensor, hr: Tensor) -> dict[str, Tensor]:
        lr, hr = self.pair(lr, hr)
        return {"loss": F.l1_loss(self._forward(lr), hr)}

    def _forward(self, lr: Tensor) -> Tensor:
        if self.recorded is None:
            return self.narrow(lr)
        if lr.shape not in self.recorded:
            self.recorded[lr.shape] = torch.cuda.make_graphed_callables(
                _NarrowForward(self.network), (lr.clone(),), allow_unused_input=True
            )
        for parameter in self.network.parameters():
            if parameter.grad is not None:  # of another part of the batch, where a replay writes
                parameter.grad = parameter.grad.clone()
        return self.recorded[lr.shape](lr)

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(list(self.network.parameters()), self.clip)
        self.regularize()
        self.optimizer.step()
        self.follow()

    def regularize(self) -> None:
        """What is added to the clipped gradients: nothing here."""


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


def train_float(
    network: nn.Module,
    sampler: PatchSampler,
    *,
    schedule: Schedule,
    validation: Validation | None = None,
    folder: Path,
    settings: dict[str, Any] | None = None,
    resume: bool = False,
    compiled: bool = False,
    ranks: Ranks | None = None,
    card: dict[str, Any] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """The network trained by a schedule, as it was at the best validation, and what was done.

    Its float file is the folder's model.safetensors (card: what it says beside the report), its
    state.pt what an interrupted run goes on from. A network that trains in a wider form (SESR) comes
    back narrow.
    """
    objective = FloatTraining(network, compiled=compiled)
    trainer = Trainer(
        objective,
        sampler,
        schedule,
        validation=validation,
        folder=folder,
        settings=settings,
        ranks=ranks,
        description=(card or {}).get("recipe") or "float",
    )
    if resume:
        trainer.resume()
    began = time.perf_counter(), trainer.step
    trainer.fit()
    images = (trainer.step - began[1]) * schedule.batch * trainer.ranks.world
    trainer.load_best()
    report: dict[str, Any] = {
        "steps": trainer.step,
        "seconds": trainer.seconds,
        "images_per_second": images / (time.perf_counter() - began[0]),
        "pictures": len(sampler),
        "schedule": dataclasses.asdict(schedule),
        "interrupted": trainer.interrupted,
    }
    if trainer.best is not None:
        report |= {"validation_psnr": trainer.best[0], "best_step": trainer.best[1]}
    model = models.narrow(objective.model)
    if trainer.ranks.is_main:
        checkpoint.save_float(model, folder / "model.safetensors", card={**(card or {}), **report})
    trainer.ranks.gather(None)
    return model, report
