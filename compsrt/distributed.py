"""The processes of one run: one alone, or those that torchrun started.

    torchrun --nproc-per-node 2 -m compsrt.train ...

starts the same program twice and tells each in its environment which one it is. `setup` reads
that; started without torchrun it is a single process, without a process group.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import sys
from typing import Any

import torch
import torch.distributed as dist

from .cli import open_device


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Which process this is: number `rank` of `world`, computing on `device`."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that prints and writes."""
        return self.rank == 0

    def gather(self, item: Any) -> list[Any]:
        """What every process passed here, by rank, in every process; all have to call it."""
        items = [item] * self.world
        if self.world > 1:
            dist.all_gather_object(items, item)
        return items

    def close(self) -> None:
        """Leave the process group, all together; nothing can be gathered afterwards."""
        if self.world > 1:
            # A process that is gone while another still talks can take the other's exit code with
            # it, and a group that only dies with the interpreter sometimes aborts it. After an
            # error nobody is waited for: the others may never come.
            if sys.exc_info()[0] is None:
                dist.barrier()
            dist.destroy_process_group()
            gc.collect()


def setup(device_name: str = "auto") -> Ranks:
    """This process among those of torchrun, joined by gloo on CPUs and by NCCL on CUDA devices.

    device_name: "auto", "cpu", "cuda" or "cuda:N", as in `cli.open_device`; of several processes
    each takes the device of its local rank. Raises ValueError for a device that is not there, for
    "mps", and for "cuda:N" with several processes.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    device = open_device(device_name)
    if device.type == "mps":
        raise ValueError("device: mps enlarges pictures (compsrt.upscale) and no more; use cpu")
    if world == 1:
        if device.index is not None:  # where recorded steps of training take it to be
            torch.cuda.set_device(device)
        return Ranks(device)
    if device.type == "cuda":
        if device.index is not None:
            raise ValueError(f"device: {device_name} cannot be that of {world} processes; use cuda")
        device = open_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(device, dist.get_rank(), world)
