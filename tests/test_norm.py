"""layer_norm: the kernel against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shapes import (
    DEVICES,
    SMALL,
    TYPES,
    UNIT,
    assert_as_good,
    leaves,
    randn,
    triton_only,
    without_shrinking,
)

from compsrt import kernels
from compsrt.kernels import norm, reference
from compsrt.kernels.reference import LayerNormWeights

on_each_device = pytest.mark.parametrize("device", DEVICES)


def weights(size: int, device: str = "cpu", dtype: torch.dtype = torch.float32):
    vectors = (randn(size, seed=i).to(device, dtype) for i in (1, 2))
    return LayerNormWeights(*vectors, 1e-3)


def check(device, x, of_weights=torch.float32):
    size, dtype = x.shape[-1], x.dtype
    exact = reference.layer_norm(x.double(), weights(size, dtype=of_weights))
    by_torch = reference.layer_norm(x, weights(size, dtype=of_weights))
    with triton_only():
        found = kernels.layer_norm(x.to(device), weights(size, device, of_weights))
    assert found.dtype == dtype
    assert found.is_contiguous()
    assert_as_good(found, by_torch, exact, UNIT[dtype])


@on_each_device
@without_shrinking
@given(
    shape=st.sampled_from([*SMALL, (65, 60), (3, 180), (2, 1024), (7, 1000)]),
    dtype=st.sampled_from(TYPES),
    of_weights=st.sampled_from(TYPES),
    offset=st.sampled_from([0.0, 3.0]),
    seed=st.integers(0, 99),
)
def test_types_and_shapes(device, shape, dtype, of_weights, offset, seed):
    check(device, (randn(*shape, seed=seed) + offset).to(dtype), of_weights)


@on_each_device
def test_strides(device):
    x = randn(60, 9, 4, seed=0)
    for view in (x.mT, x.transpose(0, 2), x[::5], x[::2, 1]):
        check(device, view)


@on_each_device
def test_a_stream_that_half_types_cannot_hold(device):
    check(device, 1e6 * randn(70, 60, seed=0))


@on_each_device
def test_gradients_wide_tokens_and_compiled_code_are_pytorch_s(device, monkeypatch):
    monkeypatch.setattr(norm, "_forward", None)
    monkeypatch.setenv("COMPSRT_KERNELS", "triton")
    (x,) = leaves([randn(5, 12, seed=0)], device)
    weight = weights(12, device)
    kernels.layer_norm(x, weight).sum().backward()
    assert x.grad is not None
    with pytest.raises(TypeError):
        kernels.layer_norm(x.detach(), weight)
    kernels.layer_norm(torch.randn(2, 1025, device=device), weights(1025, device))
    compiled = torch.compile(kernels.layer_norm, backend="eager", fullgraph=True)
    compiled(x.detach(), weight)


@on_each_device
def test_the_operator_keeps_its_promises(device):
    x = randn(5, 4, 10, seed=0).to(device).mT
    with triton_only():
        torch.library.opcheck(norm._layer_norm, (x, *weights(4, device)))


def test_weights_of_another_size_are_refused():
    with pytest.raises(
        ValueError, match=r"weight: its shape is \(8,\); x of \(2, 9\) needs \(9,\)"
    ):
        kernels.layer_norm(torch.ones(2, 9), weights(8))
    shorter = weights(9)._replace(bias=torch.ones(1))
    with pytest.raises(ValueError, match=r"bias: its shape is \(1,\)"):
        kernels.layer_norm(torch.ones(2, 9), shorter)
