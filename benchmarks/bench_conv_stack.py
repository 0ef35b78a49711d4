"""enlarge_by_convolutions: a collapsed SESR on one picture of 1920 x 1080, features never in memory.

Against cuDNN layer by layer in half precision, channels last, as PyTorch runs it. Target: 0.5 ms for
M5 x2 (a picture of 3840 x 2160) on an H200.
"""

from __future__ import annotations

import pytest
import torch

from compsrt import kernels
from compsrt.kernels import reference
from compsrt.kernels.reference import ConvStack

HEIGHT, WIDTH = 1080, 1920
NETWORKS = {"m5": (5, 16), "m11": (11, 16), "xl": (11, 32)}


def stack_of(blocks: int, features: int) -> ConvStack:
    def randn(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(shape, device="cuda").half()

    return ConvStack(
        randn(features, 1, 5, 5),
        randn(blocks, features, features, 3, 3),
        randn(4, features, 5, 5),
        randn(blocks + 1, features),
        randn(blocks + 1, features),
        randn(4),
    )


def channels_last(x: torch.Tensor, stack: ConvStack) -> torch.Tensor:
    """The reference, its pictures and kernels in the layout that cuDNN is fastest with."""
    x = x.contiguous(memory_format=torch.channels_last)
    four = {"first": stack.first, "last": stack.last}
    four = {k: t.contiguous(memory_format=torch.channels_last) for k, t in four.items()}
    return reference.enlarge_by_convolutions(x, stack._replace(**four))


@pytest.mark.parametrize("name", NETWORKS)
def test_forward(implementation, measure, name):
    blocks, features = NETWORKS[name]
    stack = stack_of(blocks, features)
    x = torch.rand(1, 1, HEIGHT, WIDTH, device="cuda").half()
    call = implementation(kernels.enlarge_by_convolutions, channels_last)
    weights = 25 * features + 9 * blocks * features**2 + 100 * features
    with torch.no_grad():
        assert call(x, stack).shape == (1, 1, 2 * HEIGHT, 2 * WIDTH)
        measure(
            lambda: call(x, stack),
            bytes_moved=5 * x.nbytes,
            operations=2 * weights * HEIGHT * WIDTH,
        )
