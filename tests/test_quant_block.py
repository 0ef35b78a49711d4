"""A whole quantized Swin block: in pieces as calibration sees it, and by kernels alone."""

from __future__ import annotations

import pytest
import torch
from networks import tiny_swinir
from shapes import DEVICES, triton_only

import compsrt
from compsrt.distillation import Distillation
from compsrt.quantization import QuantSpec
from compsrt.quantizers import named_quantizers


def block_of(spec: QuantSpec, number: int = 1, **changes):
    """A block (number 1 is a shifted one) and tokens of two windows, calibrated on pictures."""
    model = tiny_swinir(**changes)
    torch.manual_seed(1)
    quantized = compsrt.quantize(model, spec, torch.rand(1, 3, 16, 24))
    return quantized.layers[0].blocks[number], torch.randn(1, 8, 16, 24)


@pytest.mark.parametrize("transform", ["none", "hadamard", "hadamard-padded", "dct"])
@pytest.mark.parametrize("pruning", [0.0, 0.5])
def test_the_pieces_that_calibration_sees_are_the_block(transform, pruning):
    """In float64, with observers that quantize: the two ways through the block are one."""
    spec = QuantSpec(bits=4, method="2dquant", transform=transform, pruning=pruning)
    block, x = block_of(spec, num_heads=(3,))
    block, x = block.double(), x.double()
    whole = block(x)
    sites = [site for _, site in named_quantizers(block) if not hasattr(site, "rotated")]
    hooks = []
    for site in sites:

        def quantize(site, inputs, output):
            observer, site.observer = site.observer, None
            result = compsrt.kernels.fake_quantize(
                *inputs, *site.grid()[:4], bits=site.bits, codes=site.codes
            )
            site.observer = observer
            return result

        site.observer = lambda quantizer, x: None
        hooks.append(site.register_forward_hook(quantize))
    torch.testing.assert_close(block(x), whole, rtol=1e-9, atol=1e-9)
    for hook in hooks:
        hook.remove()


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_kernels_alone_run_a_block_and_its_backward(device):
    """Codes at ties round either way, so outputs and gradients are compared as wholes."""
    spec = QuantSpec(bits=6, pruning=0.3)
    block, x = block_of(spec)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))

    def run(block, x, grad):
        x = x.clone().requires_grad_()
        learned = [p for p in block.parameters() if p.requires_grad]
        y = block(x)
        return [y, *torch.autograd.grad(y, [x, *learned], grad)]

    expected = run(block, x, grad)
    with triton_only():
        found = run(block.to(device), x.to(device), grad.to(device))
    found = [tensor.cpu() for tensor in found]
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert float((ours - theirs).norm().detach() / theirs.norm().detach()) < 0.02
    scalars = [
        torch.stack([t.flatten().sum() for t in tensors[2:]]) for tensors in (found, expected)
    ]
    assert float(torch.cosine_similarity(*scalars, dim=0)) > 0.99
    assert all(torch.isfinite(tensor).all() for tensor in found)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_steps_of_distillation_by_kernels_follow_the_reference(device, monkeypatch):
    """DQC with Triton against the reference: the losses of two steps agree within 2 %."""
    losses = {}
    for kernels in ("reference", "triton"):
        model = tiny_swinir().to(device)
        torch.manual_seed(1)
        pictures = torch.rand(2, 3, 16, 16)
        quantized = compsrt.quantize(model, QuantSpec(bits=4), pictures.to(device))
        monkeypatch.setenv("COMPSRT_KERNELS", kernels)
        distillation = Distillation(quantized, model)
        losses[kernels] = []
        for step in range(2):
            lr = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(step))
            distillation.optimizer.param_groups[0]["lr"] = 0.03
            distillation.optimizer.zero_grad()
            loss = distillation.losses(lr.to(device))["loss"]
            loss.backward()
            distillation.update()
            losses[kernels].append(float(loss.detach()))
        monkeypatch.delenv("COMPSRT_KERNELS")
    reference, triton = (torch.tensor(losses[name]) for name in ("reference", "triton"))
    assert abs(float(triton.mean() / reference.mean()) - 1) < 0.02


@pytest.mark.parametrize("device", DEVICES)
def test_a_network_of_kernels_compiles_into_one_graph(device, monkeypatch):
    quantized = compsrt.quantize(tiny_swinir(), QuantSpec(bits=6), torch.rand(1, 3, 16, 16))
    quantized, x = quantized.to(device), torch.rand(1, 3, 8, 16).to(device)
    monkeypatch.setenv("COMPSRT_KERNELS", "triton")
    expected = quantized(x)
    compiled = torch.compile(quantized, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-6)
    torch.compiler.reset()
