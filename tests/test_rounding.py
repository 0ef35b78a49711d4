"""Rounding for the least output error: better than the nearest codes, and on the same grids."""

import contextlib

import pytest
import torch
from networks import tiny_sesr, tiny_swinir

from compsrt import rounding
from compsrt.calibration import quantize
from compsrt.checkpoint import count_levels, load, save_packed
from compsrt.quantization import ROUNDINGS, QuantSpec
from compsrt.quantizers import WeightQuantizer, named_quantizers


def layer(bits=3, rows=6, columns=12, **fields):
    site = WeightQuantizer(torch.randn(rows, columns), bits, QuantSpec(**fields), None)
    assert site.rotated is not None
    found = site.searched(site.rotated)
    if site.lower.dim():
        site.set_bounds(found.amin(1, keepdim=True), found.amax(1, keepdim=True))
    else:
        site.set_bounds(found.min(), found.max())
    return site


def output_error(site, weight, operand):
    with torch.no_grad():
        return float((operand @ (site().double() - weight).mT).square().mean())


@pytest.mark.parametrize(
    "fields", [{}, {"per_channel": True}, {"weight_groups": 4}, {"method": "lsq+"}]
)
def test_the_output_errs_less_where_operands_are_correlated(fields):
    site = layer(**fields)
    weight = site.rotated.double().clone()
    operand = torch.randn(500, 12).double() + 2 * torch.randn(500, 1).double()
    nearest = output_error(site, weight, operand)
    gram = operand.mT @ operand / len(operand)
    site.rotated.copy_(rounding._rounded(weight, gram, site))
    assert output_error(site, weight, operand) < 0.5 * nearest


def test_uncorrelated_operands_leave_the_nearest_codes():
    site = layer()
    weight = site.rotated.double().clone()
    rounded = rounding._rounded(weight, torch.eye(12).double(), site)
    assert torch.equal(rounded, weight)


def test_pruned_weights_stay_zero_and_the_others_make_up_for_them():
    site = layer()
    weight = site.rotated.double().clone()
    site.mask = torch.rand(6, 12) > 0.4
    operand = torch.randn(500, 12).double() + 2 * torch.randn(500, 1).double()
    before = output_error(site, weight, operand)
    site.rotated.copy_(rounding._rounded(weight, operand.mT @ operand, site))
    assert (site()[~site.mask] == 0).all()
    assert output_error(site, weight, operand) < 0.5 * before


def smooth_pictures():
    """Neighbouring pixels are alike, as in photographs."""
    small = torch.rand(4, 3, 6, 6)
    return torch.nn.functional.interpolate(small, size=(32, 32), mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize(
    ("network", "fields"),
    [
        (tiny_swinir, {"bits": 4, "convolution_bits": 5}),
        (tiny_swinir, {"bits": 3, "transform": "hadamard-padded", "pruning": 0.3}),
        (tiny_sesr, {"bits": 4, "method": "dobi"}),
    ],
)
def test_a_network_errs_less_on_other_pictures_and_packs_exactly(network, fields, tmp_path):
    network, pictures, others = network(), smooth_pictures(), smooth_pictures()
    errors = []
    with torch.no_grad():
        for how in ROUNDINGS:
            model = quantize(network, QuantSpec(rounding=how, **fields), pictures)
            errors.append(float((model(others) - network(others)).square().mean()))
        save_packed(model, tmp_path / "a.safetensors")
        assert torch.equal(
            load(tmp_path / "a.safetensors", arithmetic="reference")(others), model(others)
        )
    sites = dict(named_quantizers(model))
    for name, levels in count_levels(model, others).items():
        assert levels <= 2 ** sites[name].bits
    assert errors[1] < errors[0]


def test_an_unknown_rounding_is_named():
    with pytest.raises(ValueError, match=r"rounding: 'gptq' is unknown; one of nearest, output"):
        QuantSpec(rounding="gptq")


def test_passes_from_a_block_on_give_what_whole_passes_do(monkeypatch):
    pictures = torch.rand(2, 3, 16, 16)
    spec = QuantSpec(bits=3, rounding="output", convolution_bits=6)
    network = tiny_swinir(depths=(2, 2), num_heads=(2, 2), mlp_hidden=(48, 48))
    found = quantize(network, spec, pictures).state_dict()
    kept = []

    def nothing_skipped(outputs):
        kept.append(len(outputs))
        return contextlib.nullcontext()

    monkeypatch.setattr(rounding, "skipped", nothing_skipped)
    whole = quantize(network, spec, pictures).state_dict()
    # A pass for each group; what a pass is the first to finish is there for the next one.
    assert kept[0] == 0
    assert kept[-1] == 2
    assert max(kept) == 3
    assert all(torch.equal(found[name], whole[name]) for name in found)
