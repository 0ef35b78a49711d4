import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import tiny_swinir

import compsrt
from compsrt.pruning import magnitude_mask, prune
from compsrt.quantization import QuantSpec
from compsrt.quantizers import WeightQuantizer, named_quantizers


@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    fraction=st.floats(0, 0.99),
    ties=st.booleans(),
)
def test_exactly_the_smallest_are_removed(shape, fraction, ties):
    weight = torch.randint(-3, 4, shape).float() if ties else torch.randn(shape)
    mask = magnitude_mask(weight, fraction)
    assert int((~mask).sum()) == round(fraction * weight.numel())
    if mask.any() and not mask.all():
        assert weight[mask].abs().min() >= weight[~mask].abs().max()


@given(rows=st.integers(1, 9), fours=st.integers(1, 9))
def test_two_of_four_keeps_the_larger_half_of_every_four(rows, fours):
    weight = torch.randn(rows, 4 * fours)
    mask = magnitude_mask(weight, 0.5, "2:4")
    groups, kept = weight.abs().view(-1, 4), mask.view(-1, 4)
    assert (kept.sum(1) == 2).all()
    for group, keep in zip(groups, kept, strict=True):
        assert group[keep].min() >= group[~keep].max()


@pytest.mark.parametrize(
    ("weight", "fraction", "pattern", "words"),
    [
        (torch.zeros(2, 4), 1.0, "unstructured", "1.0"),
        (torch.zeros(2, 4), -0.1, "unstructured", "-0.1"),
        (torch.zeros(2, 6), 0.5, "2:4", "6"),
        (torch.zeros(2, 4), 0.5, "1:4", "1:4"),
    ],
)
def test_wrong_requests_are_refused(weight, fraction, pattern, words):
    with pytest.raises(ValueError, match=words):
        magnitude_mask(weight, fraction, pattern)


@pytest.mark.parametrize(
    ("share", "pattern"), [(0.4, "unstructured"), (0.99, "unstructured"), (0.5, "2:4")]
)
def test_pruned_weights_contribute_exactly_zero(share, pattern):
    spec = QuantSpec(bits=2, pruning=share, pruning_pattern=pattern)
    quantized = compsrt.quantize(tiny_swinir(), spec, torch.rand(1, 3, 16, 16))
    for _, site in named_quantizers(quantized):
        if isinstance(site, WeightQuantizer):
            weight = site()
            assert (weight[~site.mask] == 0).all()
            assert int((~site.mask).sum()) == round(share * weight.numel())
            # Kept weights are as they would be without the mask.
            site.mask, mask = None, site.mask
            assert torch.equal(site()[mask], weight[mask])


def test_a_packed_weight_is_not_pruned_again():
    quantized = compsrt.quantize(tiny_swinir(), QuantSpec(), torch.rand(1, 3, 16, 16))
    for _, site in named_quantizers(quantized):
        if isinstance(site, WeightQuantizer):
            site.freeze()
    with pytest.raises(ValueError, match="packed"):
        prune(quantized, 0.5)
