"""Transforms chosen by output error: the least is taken, recorded in the spec, and packed as such."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from networks import tiny_sesr, tiny_swinir

import compsrt
from compsrt import transform_search
from compsrt.checkpoint import save_packed
from compsrt.quantization import TRANSFORM_GROUPS, QuantSpec
from compsrt.quantizers import named_quantizers
from compsrt.transform_search import CANDIDATES, choose_transforms, group_of

BLOCKS = [f"layers.0.residual_group.blocks.{i}" for i in range(2)]


def pictures():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_every_site_belongs_to_a_group():
    model = compsrt.quantize(tiny_swinir(), QuantSpec(), pictures())
    names = [name for name, _ in named_quantizers(model.layers[0].blocks[0])]
    assert {group_of(name) for name in names} == set(TRANSFORM_GROUPS)


@pytest.mark.parametrize("fields", [{}, {"pruning": 0.4, "per_channel": True}])
def test_the_least_error_of_the_blocks_output_is_chosen(fields):
    model, spec = tiny_swinir(), QuantSpec(bits=3, **fields)

    def calibrated(s):
        return compsrt.quantize(model, s, pictures())

    chosen = choose_transforms(calibrated, model, spec, pictures())
    assert len({chosen.transform_of(b, g) for b in BLOCKS for g in TRANSFORM_GROUPS}) > 1
    with torch.no_grad():
        kept = transform_search._outputs(model, pictures())
        for name in BLOCKS:
            x, y = kept[name]
            for group in ("qkv", "attention", "fc2"):
                errors = {}
                for candidate in CANDIDATES:
                    trial = calibrated(dataclasses.replace(spec, transform=candidate))
                    block = trial.get_submodule(name)
                    for site_name, site in named_quantizers(block):
                        if group_of(site_name) != group:
                            site.observer = lambda site, x: None
                            if hasattr(site, "mask"):
                                site.mask = None
                    errors[candidate] = float((block.observed(x) - y).square().sum())
                assert chosen.transform_of(name, group) == min(errors, key=errors.__getitem__)


def test_a_trial_leaves_the_block_as_it_was():
    spec = QuantSpec(bits=3, pruning=0.4)
    model = compsrt.quantize(tiny_swinir(), spec, pictures())
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        before = model(x)
        transform_search._with_one_group(model.layers[0].blocks[0], "qkv", torch.rand(1, 8, 8, 24))
        assert torch.equal(model(x), before)


def test_quantize_takes_auto_and_the_file_needs_nothing_new(tmp_path):
    sites = (("fc2", "none"),)
    spec = QuantSpec(bits=3, transform="auto", site_transforms=sites)
    model = compsrt.quantize(tiny_swinir(), spec, pictures())
    assert model.spec.transform in CANDIDATES
    assert all(model.spec.transform_of(block, "fc2") == "none" for block in BLOCKS)
    save_packed(model, tmp_path / "auto.safetensors")
    loaded = compsrt.load(tmp_path / "auto.safetensors", arithmetic="reference")
    assert loaded.spec == model.spec
    x = torch.rand(1, 3, 9, 14)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_what_auto_needs_is_said():
    with pytest.raises(ValueError, match="chosen on pictures"):
        compsrt.quantize(tiny_swinir(), QuantSpec(transform="auto"))
    spec = QuantSpec(method="dobi", transform="auto")
    with pytest.raises(ValueError, match="Swin blocks"):
        compsrt.quantize(tiny_sesr(), spec, pictures())
