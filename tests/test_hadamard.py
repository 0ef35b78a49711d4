"""hadamard_transform: the kernel against the matrix in float64, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shapes import (
    DEVICES,
    ORDERS,
    TYPES,
    UNIT,
    assert_as_good,
    leaves,
    randn,
    triton_only,
    without_shrinking,
)

from compsrt import kernels, transforms
from compsrt.kernels import hadamard, reference

on_each_device = pytest.mark.parametrize("device", DEVICES)
UP_TO_1024 = [(1024, 1024), (1000, 1024), (768, 768), (960, 960), (896, 896), (720, 720)]


def run(function, x, order, grad):
    out = function(x, order)
    return out, *torch.autograd.grad(out, x, grad)


def check(device, rows, size, order, dtype, seed=0):
    """Output and gradient at most twice as far from float64 as a product in torch."""
    x, grad = randn(*rows, size, seed=seed, dtype=dtype), randn(*rows, order, seed=1, dtype=dtype)
    exact = run(
        reference.hadamard_transform, *leaves([x], "cpu", torch.double), order, grad.double()
    )
    by_torch = run(reference.hadamard_transform, *leaves([x], "cpu"), order, grad)
    with triton_only():
        found = run(kernels.hadamard_transform, *leaves([x], device), order, grad.to(device))
    for ours, theirs, right in zip(found, by_torch, exact, strict=True):
        assert ours.dtype == dtype
        assert_as_good(ours, theirs, right, UNIT[dtype])


@on_each_device
@pytest.mark.parametrize(("size", "order"), ORDERS)
def test_every_kind_of_order(device, size, order):
    check(device, (33,), size, order, torch.float32)


@on_each_device
@pytest.mark.parametrize(("size", "order"), UP_TO_1024)
def test_large_orders(device, size, order):
    check(device, (3,), size, order, torch.float32)


@on_each_device
@without_shrinking
@given(
    rows=st.sampled_from([(1,), (63,), (2, 0), (2, 3, 65), ()]),
    order=st.sampled_from(ORDERS),
    dtype=st.sampled_from(TYPES),
    seed=st.integers(0, 99),
)
def test_types_and_leading_shapes(device, rows, order, dtype, seed):
    check(device, rows, *order, dtype, seed)


@on_each_device
def test_float32_loses_nothing_to_half_types(device):
    # A sum of a large and small entries: bf16 alone would keep three digits of it.
    x = torch.full((1, 64), 1e-4, device=device)
    x[0, 0] = 1000.0
    with triton_only():
        out = kernels.hadamard_transform(x)
    exact = reference.hadamard_transform(x.cpu().double())
    torch.testing.assert_close(out.cpu().double(), exact, rtol=2**-20, atol=0)


@on_each_device
def test_transposed_is_the_way_back(device):
    # Order 20 is Paley's first: not symmetric.
    x = randn(7, 20, seed=0).to(device)
    with triton_only():
        y = kernels.hadamard_transform(x)
        back = hadamard._hadamard(y, 20, 20, True, 1.0)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-5)
    assert not torch.allclose(transforms.hadamard(20), transforms.hadamard(20).mT)


@on_each_device
def test_scale_and_strides(device):
    x = randn(60, 9, 4, seed=0).to(device)
    for view in (x.mT[..., :4, :], x.transpose(0, 2), x[::5], x[::2, 1]):
        size = transforms.next_power_of_two(view.shape[-1])
        wanted = 0.25 * reference.hadamard_transform(view.cpu().double(), size)
        with triton_only():
            out = kernels.hadamard_transform(view, size, scale=0.25)
        torch.testing.assert_close(out.cpu().double(), wanted, rtol=0, atol=2e-6)
    assert kernels.hadamard_transform(torch.ones(4), scale=3.0).tolist() == [6, 0, 0, 0]


@on_each_device
def test_the_operator_keeps_its_promises(device):
    (x,) = leaves([randn(5, 10, seed=0)], device)
    with triton_only():
        torch.library.opcheck(hadamard._hadamard, (x, 16, 16, False, 0.5))
        torch.library.opcheck(hadamard._hadamard, (x, 16, 12, True, 0.5))


@on_each_device
def test_compiles_into_one_graph(device):
    def energy(x):
        return kernels.hadamard_transform(x, 64).abs().sum()

    (x,) = leaves([randn(5, 60, seed=0)], device)
    with triton_only():
        (wanted,) = torch.autograd.grad(energy(x), x)
        compiled = torch.compile(energy, fullgraph=True, backend="aot_eager")
        (found,) = torch.autograd.grad(compiled(x), x)
    assert torch.equal(found, wanted)


@on_each_device
def test_the_gradient_has_a_gradient(device):
    (x,) = leaves([randn(2, 12, seed=0)], device)
    with triton_only():
        (first,) = torch.autograd.grad(
            kernels.hadamard_transform(x).pow(3).sum(), x, create_graph=True
        )
        (second,) = torch.autograd.grad(first.sum(), x)
    assert second.shape == x.shape
    assert second.isfinite().all()


@on_each_device
def test_orders_without_a_kernel_are_refused(monkeypatch, device):
    monkeypatch.setenv("COMPSRT_KERNELS", "triton")
    x = torch.zeros(2, 10, device=device)
    with pytest.raises(ValueError, match="order: 8 is below the 10 entries"):
        kernels.hadamard_transform(x, 8)
    with pytest.raises(ValueError, match="no Hadamard matrix of order 10 is known"):
        kernels.hadamard_transform(x)
    with pytest.raises(ValueError, match="order: no kernel for 2048"):
        kernels.hadamard_transform(x, 2048)
    with pytest.raises(ValueError, match="order: no kernel for 380"):
        kernels.hadamard_transform(x, 380)


def test_the_factors_multiply_to_the_order():
    for order in range(1, 1025):
        if transforms.has_hadamard(order):
            try:
                parts, base = hadamard._factors(order)
            except ValueError:
                continue
            assert parts * base == order
            small = parts.bit_count() == 1 and parts <= 8
            assert small, order
            whole = torch.kron(transforms.hadamard(parts), transforms.hadamard(base))
            assert torch.equal(whole.sign(), transforms.hadamard(order).sign()), order


def test_a_cpu_goes_straight_to_the_reference(monkeypatch):
    monkeypatch.delenv("COMPSRT_KERNELS", raising=False)
    monkeypatch.setattr(hadamard, "_hadamard", None)
    x = torch.zeros(3, 64).double()
    x[:, 0] = 1
    assert torch.equal(kernels.hadamard_transform(x), torch.full_like(x, 1 / math.sqrt(64)))


@pytest.mark.gpu
def test_twenty_runs_are_the_same_bits():
    x = randn(5000, 60, seed=0).cuda()
    with triton_only():
        runs = [kernels.hadamard_transform(x) for _ in range(20)]
    assert all(torch.equal(runs[0], other) for other in runs)
