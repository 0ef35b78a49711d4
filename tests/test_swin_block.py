"""A folded Swin block against the same block composed of its four ops."""

from __future__ import annotations

import pytest
import torch
from networks import tiny_swinir

import compsrt
from compsrt import kernels
from compsrt.quantization import QuantSpec


def block_of(spec: QuantSpec, shift: bool, seed: int = 0, **changes):
    """A calibrated block in float64 whose scalars have left their start."""
    model = tiny_swinir(seed, **changes)
    torch.manual_seed(seed)
    pictures = torch.rand(1, 3, 2 * model.window_size, 3 * model.window_size)
    block = compsrt.quantize(model, spec, pictures).layers[0].blocks[int(shift)].double()
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if name.endswith(("alpha", "beta")):
                parameter.add_(0.01 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return block


def assert_same_but_for_ties(found, expected):
    # A code that rounds the other way at a tie moves its whole window a little.
    apart = (found - expected).abs() > 1e-9 * expected.abs().max()
    assert float(apart.double().mean()) < 0.01


@pytest.mark.parametrize("mode", ["fold", "integer"])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("transform", ["none", "hadamard", "dct", "random"])
def test_the_folded_block_is_the_block(transform, shift, mode):
    spec = QuantSpec(bits=4, transform=transform, pruning=0.4 * shift, per_channel=shift)
    block = block_of(spec, shift, num_heads=(3,))
    folded = block.folded(mode, torch.float64)
    for shape in ((2, 8, 8), (1, 16, 24), (1, 24, 8)):
        x = torch.randn(*shape, 24, dtype=torch.float64)
        assert_same_but_for_ties(kernels.quant_swin_block(x, folded), block(x))


def test_a_padded_transform_cannot_be_folded():
    block = block_of(QuantSpec(bits=4, transform="hadamard-padded"), False)
    with pytest.raises(ValueError, match="only a transform of exact order can be folded"):
        block.folded()
