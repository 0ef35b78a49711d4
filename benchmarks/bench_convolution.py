"""convolve: the convolutions of SwinIR-light on the tokens of a 320x184 picture, with what surrounds them.

The reference is PyTorch's convolution in channels-last order, its residual and shuffle one by one.
"""

from __future__ import annotations

import pytest
import torch
from shapes import TYPES
from torch import Tensor

from compsrt import kernels
from compsrt.kernels import reference

HEIGHT, WIDTH = 184, 320
on_each_batch = pytest.mark.parametrize("batch", [1, 16])
on_each_type = pytest.mark.parametrize("dtype", TYPES[::2], ids=str)

# (K, N, shuffle, what else): the first convolution, that of a layer, the last.
KINDS = {
    "first": (3, 60, 1, ("mean",)),
    "layer": (60, 60, 1, ("residual",)),
    "layer tf32": (60, 60, 1, ("residual", "allow_tf32")),
    "layer int8": (60, 60, 1, ("residual", "scale")),
    "x4": (60, 48, 4, ("offset",)),
    "x4 tf32": (60, 48, 4, ("offset", "allow_tf32")),
    "x2": (60, 12, 2, ("offset",)),
}


@pytest.mark.parametrize("kind", KINDS)
@on_each_batch
@on_each_type
@torch.no_grad()
def test_forward(implementation, measure, kind, batch, dtype):
    size, out, shuffle, which = KINDS[kind]
    x = torch.randn(batch, HEIGHT, WIDTH, size, device="cuda", dtype=dtype)
    weight = torch.randn(out, size, 3, 3, device="cuda") / 16
    given = {
        "residual": torch.randn(batch, HEIGHT, WIDTH, out, device="cuda", dtype=dtype),
        "scale": torch.full((out,), 1 / 127, device="cuda"),
        "mean": torch.randn(size, device="cuda"),
        "offset": torch.randn(out // shuffle**2, device="cuda"),
        "allow_tf32": True,
    }
    given = {name: value for name, value in given.items() if name in which}
    if kind == "first":
        x = x.float().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    if "scale" in given:
        weight = (127 * weight.clamp(-1, 1)).round().to(torch.int8)
    weight = weight.to(memory_format=torch.channels_last)
    target = torch.float32 if shuffle > 1 else dtype
    function = implementation(kernels.convolve, reference.convolve)

    def call() -> Tensor:
        return function(x, weight, shuffle=shuffle, dtype=target, **given)

    moved = x.nbytes + call().nbytes + (given["residual"].nbytes if "residual" in given else 0)
    measure(
        call,
        bytes_moved=moved,
        operations=2 * 9 * size * out * batch * HEIGHT * WIDTH,
    )
