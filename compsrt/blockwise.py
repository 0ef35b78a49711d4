"""Many passes through a network that differ from some block on: what lies before runs once.

What is found site by site takes a pass for each site. With the outputs of blocks kept, a pass that
looks for the rounding of one layer costs a block and the convolutions around it, and one that
measures what a site does to the picture costs half of the network on average. Kept is one output for
each finished layer of blocks, and for each finished block of the layer that has begun.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .models.quant_swinir import QuantSwinBlock
from .models.swinir import ResidualLayer

Outputs = dict[nn.Module, Tensor]


@contextlib.contextmanager
def recorded(model: nn.Module, outputs: Outputs) -> Iterator[None]:
    """While it lasts, each block, and each layer of blocks instead of them, leaves its output in
    `outputs` when it has run. Nothing happens in a network that has none."""

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        for part in module.modules():
            outputs.pop(part, None)
        outputs[module] = output

    stages = [m for m in model.modules() if isinstance(m, (QuantSwinBlock, ResidualLayer))]
    hooks = [stage.register_forward_hook(keep) for stage in stages]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def skipped(outputs: Outputs) -> Iterator[None]:
    """While it lasts, the modules in `outputs` do not run, but give what stands there."""
    modules: list[Any] = list(outputs)
    try:
        for module in modules:
            module.forward = lambda x, output=outputs[module]: output
        yield
    finally:
        for module in modules:
            del module.forward
