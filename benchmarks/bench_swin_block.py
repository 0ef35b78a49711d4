"""quant_swin_block: between x and out no token reaches memory, and no weight is float32."""

from __future__ import annotations

import pytest
import torch
from swin_blocks import Block, Kind, to

from compsrt import kernels
from compsrt.kernels import reference

# Blocks of SwinIR-light x4 to 1280 x 720, one picture and 16, plain and shifted.
PICTURES = {"1 x 184 x 320": (1, 184, 320), "16 x 184 x 320": (16, 184, 320)}
on_each_picture = pytest.mark.parametrize("shape", PICTURES.values(), ids=PICTURES)
on_each_shift = pytest.mark.parametrize("shift", [0, 4], ids=["plain", "shifted"])
MODES = [
    ("fold", torch.bfloat16),
    ("fold", torch.float16),
    ("integer", torch.float32),
]


def operations(tokens: int, size: int = 60, hidden: int = 120, window: int = 64) -> int:
    """Of the products: E, q, k, v, M and proj, E', fc1, P', fc2; S, T twice (P and v) and A^ V."""
    of_layers = size * size * 7 + 2 * size * hidden + hidden * hidden
    of_windows = 6 * window * window + 3 * size * window
    return 2 * tokens * (of_layers + of_windows)


@on_each_picture
@on_each_shift
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("mode", "dtype"), MODES, ids=lambda value: str(value))
def test_inference(implementation, measure, shape, shift, stored, mode, dtype):
    block = Block(Kind(60, 6, 10, 120, 8, shift, "hadamard", masked=True))
    folded = to(block.folded(mode, dtype), "cuda")
    x = torch.randn(*shape, 60, device="cuda").to(stored)
    function = implementation(kernels.quant_swin_block, reference.quant_swin_block)
    measure(
        lambda: function(x, folded),
        bytes_moved=2 * x.nbytes,
        operations=operations(x.shape[:3].numel()),
    )
