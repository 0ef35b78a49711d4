"""A stack of convolutions that enlarges one channel, in plain PyTorch (SESR collapsed, MLSys 2022)."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class ConvStack(NamedTuple):
    """What `enlarge_by_convolutions` computes with; F features, M blocks, S the scale, 2 or 4.

    first: (F, 1, 5, 5); blocks: (M, F, F, 3, 3), M at least 1; last: (S^2, F, 5, 5); biases and
    slopes: (M + 1, F), of the first convolution and of every block (slopes 0 make a ReLU);
    last_bias: (S^2,).
    """

    first: Tensor
    blocks: Tensor
    last: Tensor
    biases: Tensor
    slopes: Tensor
    last_bias: Tensor

    @property
    def scale(self) -> int:
        return {4: 2, 16: 4}[len(self.last)]


def check_stack(x: Tensor, stack: ConvStack) -> None:
    """Raises ValueError for shapes that do not fit; names the argument."""
    if x.dim() != 4 or x.shape[1] != 1:
        raise ValueError(f"x: its shape is {tuple(x.shape)}; it needs (B, 1, H, W)")
    if stack.blocks.dim() != 5 or not len(stack.blocks):
        raise ValueError(f"blocks: their shape is {tuple(stack.blocks.shape)}; (M, F, F, 3, 3)")
    count, features = stack.blocks.shape[:2]
    if len(stack.last) not in (4, 16):
        raise ValueError(f"last: {len(stack.last)} channels are not the square of a scale 2 or 4")
    wanted = {
        "first": (features, 1, 5, 5),
        "blocks": (count, features, features, 3, 3),
        "last": (len(stack.last), features, 5, 5),
        "biases": (count + 1, features),
        "slopes": (count + 1, features),
        "last_bias": (len(stack.last),),
    }
    for name, shape in wanted.items():
        found = tuple(getattr(stack, name).shape)
        if found != shape:
            raise ValueError(f"{name}: its shape is {found}; it needs {shape}")


def enlarge_by_convolutions(x: Tensor, stack: ConvStack) -> Tensor:
    """x (B, 1, H, W) -> (B, 1, S H, S W); see `kernels/conv_stack.py`."""
    check_stack(x, stack)

    def layer(y: Tensor, kernel: Tensor, number: int) -> Tensor:
        y = F.conv2d(y, kernel, stack.biases[number], padding=kernel.shape[-1] // 2)
        return F.prelu(y, stack.slopes[number])

    y = first = layer(x, stack.first, 0)
    for number, kernel in enumerate(stack.blocks, 1):
        y = layer(y, kernel, number)
    y = F.conv2d(y + first, stack.last, stack.last_bias, padding=2) + x
    for _ in range(stack.scale.bit_length() - 1):
        y = F.pixel_shuffle(y, 2)
    return y
