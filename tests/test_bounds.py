"""search_bounds: the kernel's candidate is the best one, by errors in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shapes import DEVICES, TYPES, randn, triton_only, without_shrinking

from compsrt import kernels
from compsrt.kernels import bounds, reference

on_each_device = pytest.mark.parametrize("device", DEVICES)


def errors(x, bits, one_sided, candidates):
    """Squared errors (R, candidates) of all candidates, in float64, the plain way."""
    lower, upper = bounds._ranges(x, one_sided, candidates)
    step = ((upper - lower) / (2**bits - 1))[..., None]
    v = x.double()[:, None]
    code = ((v - lower[..., None]) / step).round().clamp(0, 2**bits - 1)
    return (v - lower[..., None] - step * code).square().nan_to_num().sum(-1)


def check(x, bits, one_sided, candidates, device):
    all_errors = errors(x, bits, one_sided, candidates)
    least = all_errors.min(1).values
    with triton_only():
        lower, upper, error = kernels.search_bounds(
            x.to(device), bits, one_sided=one_sided, candidates=candidates
        )
    assert lower.dtype == upper.dtype == x.dtype
    assert error.dtype == torch.float64
    ranges = bounds._ranges(x, one_sided, candidates)
    for row, (low, high) in enumerate(zip(lower.cpu(), upper.cpu(), strict=True)):
        chosen = [
            (ends[row].to(x.dtype) == end) for ends, end in zip(ranges, (low, high), strict=True)
        ]
        chosen = chosen[0] & chosen[1]
        assert chosen.any(), "no candidate has these bounds"
        assert all_errors[row][chosen].min() <= (1 + 1e-5) * least[row] + 1e-12
    torch.testing.assert_close(error.cpu(), least, rtol=2e-5, atol=1e-9)


@on_each_device
@without_shrinking
@given(
    size=st.sampled_from([(1, 3780), (3, 60), (2, 1), (1, 1023), (2, 257), (0, 5)]),
    dtype=st.sampled_from(TYPES),
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    one_sided=st.sampled_from([False, True, None]),
    candidates=st.sampled_from([1, 7, 100]),
    seed=st.integers(0, 99),
)
def test_the_best_of_all_candidates(device, size, dtype, bits, one_sided, candidates, seed):
    check(randn(*size, seed=seed, dtype=dtype), bits, one_sided, candidates, device)


@on_each_device
@pytest.mark.parametrize(
    "distribution",
    {
        "softmax": lambda x: (3 * x).softmax(-1),
        "gelu": torch.nn.functional.gelu,
        "outliers": lambda x: torch.where(x > 2.5, 8 * x, x),
        "far from zero": lambda x: 100 + x,
        "constant": torch.ones_like,
    }.items(),
    ids=lambda item: item[0],
)
def test_tensors_as_networks_have_them(device, distribution):
    x = distribution[1](randn(64, 64, seed=0)).reshape(1, -1)
    for bits in (2, 4):
        check(x, bits, None, 100, device)


@on_each_device
def test_parts_of_a_long_row_add_up(device):
    # More than one part of a row: BLOCK * STEPS entries.
    check(randn(2, bounds.BLOCK * bounds.STEPS + 77, seed=0), 4, False, 20, device)


@on_each_device
def test_same_as_the_reference(device):
    x = randn(4, 500, seed=0)
    wanted = reference.search_bounds(x, 3)
    with triton_only():
        found = kernels.search_bounds(x.to(device), 3)
    for ours, theirs in zip(found[:2], wanted[:2], strict=True):
        assert torch.equal(ours.cpu(), theirs)


@on_each_device
def test_nan_shows(device):
    x = torch.tensor([[0.0, torch.nan], [0.0, 1.0]], device=device)
    with triton_only():
        lower, upper, _ = kernels.search_bounds(x, 4)
    assert lower.isnan().tolist() == upper.isnan().tolist() == [True, False]


@on_each_device
def test_the_operator_keeps_its_promises(device):
    x = randn(2, 30, seed=0).to(device)
    with triton_only():
        for one_sided in (False, None):
            torch.library.opcheck(bounds._search_bounds, (x, 4, one_sided, 10))
        compiled = torch.compile(kernels.search_bounds, fullgraph=True, backend="aot_eager")
        found, wanted = compiled(x, 4), kernels.search_bounds(x, 4)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_cpu_goes_straight_to_the_reference(monkeypatch):
    monkeypatch.delenv("COMPSRT_KERNELS", raising=False)
    monkeypatch.setattr(bounds, "_search_bounds", None)
    lower, _, _ = kernels.search_bounds(randn(2, 9, seed=0).double(), 4)
    assert lower.dtype == torch.float64


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"x: shape \(3,\) is not \(R, N\)"):
        kernels.search_bounds(torch.zeros(3), 4)
    with pytest.raises(ValueError, match=r"x: shape \(3, 0\) is not \(R, N\)"):
        kernels.search_bounds(torch.zeros(3, 0), 4)
    with pytest.raises(ValueError, match="candidates: 0 is below 1"):
        kernels.search_bounds(torch.zeros(3, 1), 4, candidates=0)
    with pytest.raises(ValueError, match="bits: 0"):
        kernels.search_bounds(torch.zeros(3, 1), 0)


@pytest.mark.gpu
def test_twenty_runs_are_the_same_bits():
    x = randn(1, 1000000, seed=0).cuda()
    with triton_only():
        runs = [kernels.search_bounds(x, 4) for _ in range(20)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@given(
    seed=st.integers(0, 99), bits=st.sampled_from([1, 2, 3, 4]), skew=st.sampled_from([0.0, 1.0])
)
def test_bounds_that_move_on_their_own(seed, bits, skew):
    """No worse than the shrunken ranges, their error is what it says, and no pair nearby is better."""
    x = randn(2, 200, seed=seed, dtype=torch.float32)
    x = x + skew * x.square()
    first = reference.search_bounds(x, bits, one_sided=None)[2]
    lower, upper, error = kernels.search_bounds(x, bits, one_sided=None, asymmetric=True)
    assert (error <= first * (1 + 1e-9)).all()
    unit = (x.amax(1) - x.amin(1)).double() / 200
    for row in range(2):
        ends = [end[row].double() + unit[row] / 4 * torch.arange(-3, 4) for end in (lower, upper)]
        low, high = (grid.flatten() for grid in torch.meshgrid(*ends, indexing="ij"))
        step = ((high - low) / (2**bits - 1))[:, None]
        v = x[row].double()[None]
        code = ((v - low[:, None]) / step).round().clamp(0, 2**bits - 1)
        brute = (v - low[:, None] - step * code).square().sum(1).view(7, 7)
        torch.testing.assert_close(brute[3, 3], error[row], rtol=1e-5, atol=1e-9)
        assert error[row] <= brute[2:5, 2:5].min() * (1 + 1e-5)
