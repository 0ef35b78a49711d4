"""Bits under a budget: the least error that any choice reaches, and never a bit too many."""

import contextlib
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import tiny_swinir

from compsrt import allocation
from compsrt.allocation import CHOICES, spend
from compsrt.calibration import quantize
from compsrt.checkpoint import count_levels, load, save_packed, size_report
from compsrt.quantization import QuantSpec
from compsrt.quantizers import WeightQuantizer, named_quantizers


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=2),
    st.floats(1, 8),
    st.integers(0, 1000),
)
def test_no_choice_within_the_budget_is_better(sizes, average, seed):
    errors = np.random.default_rng(seed).random((len(sizes), len(CHOICES)))
    bits = spend(errors, sizes, average)
    budget = average * sum(sizes) + 1e-9
    assert sum(s * b for s, b in zip(sizes, bits, strict=True)) <= budget

    def cost(choice):
        return sum(errors[i, b - 1] for i, b in enumerate(choice))

    allowed = (
        choice
        for choice in itertools.product(CHOICES, repeat=len(sizes))
        if sum(s * b for s, b in zip(sizes, choice, strict=True)) <= budget
    )
    assert cost(bits) == pytest.approx(min(map(cost, allowed)))


def test_falling_errors_spend_the_whole_budget():
    errors = 4.0 ** -np.arange(8)[None] * np.array([[1.0], [30.0], [1e-3], [5.0]])
    sizes = [3600, 7200, 3600, 7200]
    bits = spend(errors, sizes, 3)
    assert sum(s * b for s, b in zip(sizes, bits, strict=True)) == 3 * sum(sizes)
    assert bits[2] < bits[0] < bits[1]


def test_an_average_below_one_bit_is_refused():
    with pytest.raises(ValueError, match="average_bits"):
        spend(np.ones((2, 8)), [1, 1], 0.9)
    with pytest.raises(ValueError, match=r"average_bits: 0.5 is not between 1 and 8"):
        QuantSpec(average_bits=0.5)
    with pytest.raises(ValueError, match="average_bits: it needs pictures"):
        quantize(tiny_swinir(), QuantSpec(average_bits=3))


def test_a_model_of_mixed_bits_keeps_its_budget_and_its_file(tmp_path):
    pictures = torch.rand(2, 3, 16, 16)
    spec = QuantSpec(bits=3, average_bits=3.0, convolution_bits=6)
    model = quantize(tiny_swinir(), spec, pictures)
    sites = dict(named_quantizers(model))
    weights = [s for s in sites.values() if isinstance(s, WeightQuantizer) and s.prunable]
    assert sum(s.bits * s.size.numel() for s in weights) == 3 * sum(s.size.numel() for s in weights)
    assert len({site.bits for site in weights}) > 1
    others = [s for s in sites.values() if isinstance(s, WeightQuantizer) and not s.prunable]
    assert sum(s.bits * s.size.numel() for s in others) <= 6 * sum(s.size.numel() for s in others)
    assert len({site.bits for site in others}) > 1
    found = model.spec
    assert dict(found.site_bits) == {n: sites[n].bits for n, _ in found.site_bits}
    assert dataclasses.replace(found, site_bits=()) == spec
    save_packed(model, tmp_path / "mixed.safetensors")
    loaded = load(tmp_path / "mixed.safetensors", arithmetic="reference")
    x = torch.rand(1, 3, 9, 13)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    for name, levels in count_levels(loaded, pictures).items():
        assert levels <= 2 ** sites[name].bits
    scalars = 32 * 4 * len(weights) / sum(s.size.numel() for s in weights)
    assert size_report(loaded)["bits_per_weight"] == pytest.approx(3 + scalars)


def test_mixed_bits_err_less_than_equal_ones():
    """A network whose second block matters little for its picture."""
    network, pictures = tiny_swinir(), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        block = network.layers[0].blocks[1]
        block.mlp.fc2.weight.mul_(0.01)
        block.attn.proj.weight.mul_(0.01)
        target = network(pictures)
        errors = [
            (quantize(network, spec, pictures)(pictures) - target).square().mean()
            for spec in (QuantSpec(bits=3), QuantSpec(bits=3, average_bits=3))
        ]
    assert errors[1] < 0.7 * errors[0]


@torch.no_grad()
def test_passes_from_a_block_on_tell_what_whole_passes_do(monkeypatch):
    pictures = torch.rand(2, 3, 16, 16)
    network = tiny_swinir(depths=(2, 2), num_heads=(2, 2), mlp_hidden=(48, 48))
    model = quantize(network, QuantSpec(bits=3, convolution_bits=6), pictures)
    sites = dict(named_quantizers(model))
    found, sizes = allocation._errors(model, sites, sites, pictures)
    kept = []

    def nothing_skipped(outputs):
        kept.append(len(outputs))
        return contextlib.nullcontext()

    monkeypatch.setattr(allocation, "skipped", nothing_skipped)
    whole, same_sizes = allocation._errors(model, sites, sites, pictures)
    # Blocks of the first layer, the first layer, it and blocks of the second, both layers.
    assert [count for count, _ in itertools.groupby(kept)] == [0, 1, 2, 1, 2, 3, 2]
    assert sizes == same_sizes
    assert found.keys() == whole.keys()
    assert all((found[name] == whole[name]).all() for name in found)
