"""enlarge_by_convolutions: one launch computes what the convolutions one after another compute."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import tiny_sesr
from shapes import DEVICES, UNIT, assert_as_good, triton_only, without_shrinking

from compsrt import kernels
from compsrt.kernels import conv_stack, reference
from compsrt.kernels.reference import ConvStack
from compsrt.models.sesr import SESR, SESRConfig

on_each_device = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture
def small_tiles(monkeypatch):
    """Few and large products, which the interpreter is fast with; tiles of 8 rows, so several."""
    monkeypatch.setattr(conv_stack, "ROWS", 8)
    monkeypatch.setattr(conv_stack, "PIXELS", 1024)


def stack_of(blocks: int, features: int, scale: int, seed: int = 0) -> ConvStack:
    """In float64, of a size that keeps features near 1."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        taps = shape[-1] ** 2 * shape[-3] if len(shape) > 3 else 4
        return torch.randn(shape, generator=generator, dtype=torch.double) / taps**0.5

    return ConvStack(
        randn(features, 1, 5, 5),
        randn(blocks, features, features, 3, 3),
        randn(scale**2, features, 5, 5),
        randn(blocks + 1, features),
        randn(blocks + 1, features),
        randn(scale**2),
    )


def converted(stack: ConvStack, device: str, dtype: torch.dtype) -> ConvStack:
    return ConvStack(*(tensor.to(device, dtype) for tensor in stack))


def check(device: str, stack: ConvStack, x: torch.Tensor, dtype: torch.dtype) -> None:
    exact = reference.enlarge_by_convolutions(x, stack)
    by_torch = reference.enlarge_by_convolutions(x.to(dtype), converted(stack, "cpu", dtype))
    with triton_only():
        found = kernels.enlarge_by_convolutions(
            x.to(device, dtype), converted(stack, device, dtype)
        )
    assert found.dtype == dtype
    assert_as_good(found, by_torch, exact, UNIT[dtype])


@on_each_device
@settings(without_shrinking, max_examples=5)
@given(
    blocks=st.integers(1, 3),
    features=st.sampled_from([1, 5, 16]),
    scale=st.sampled_from([2, 4]),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 19), st.integers(1, 70)),
    seed=st.integers(0, 99),
)
def test_every_shape(device, blocks, features, scale, shape, seed, small_tiles_for_all):
    pictures, height, width = shape
    stack = stack_of(blocks, features, scale, seed)
    x = torch.rand(pictures, 1, height, width, dtype=torch.double)
    check(device, stack, x, torch.float16)


@pytest.fixture(scope="module")
def small_tiles_for_all():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv_stack, "ROWS", 8)
        patch.setattr(conv_stack, "PIXELS", 1024)
        yield


@on_each_device
@pytest.mark.parametrize("dtype", conv_stack.HALF_TYPES, ids=str)
def test_m5_and_each_type(device, dtype, small_tiles):
    # Six tiles for the two programs of the interpreter: scratch is used again.
    x = torch.rand(1, 1, 17, 61, dtype=torch.double)
    check(device, stack_of(5, 16, 2), x, dtype)


@on_each_device
def test_more_features_and_a_wide_halo(device, small_tiles):
    """32 features, and so many blocks that a tile is twice as wide."""
    check(device, stack_of(15, 17, 2), torch.rand(1, 1, 3, 5, dtype=torch.double), torch.float16)


@on_each_device
def test_the_shipped_tile(device):
    """Rows and products as on a device; one tile."""
    check(device, stack_of(1, 3, 2), torch.rand(1, 1, 9, 7, dtype=torch.double), torch.float16)


@on_each_device
def test_strides_and_no_pictures(device, small_tiles):
    stack = converted(stack_of(1, 4, 2), device, torch.float16)
    x = torch.rand(2, 1, 7, 9).to(device, torch.float16)
    with triton_only():
        whole = kernels.enlarge_by_convolutions(x, stack)
        turned = x.mT.contiguous().mT
        assert torch.equal(kernels.enlarge_by_convolutions(turned, stack), whole)
        assert torch.equal(kernels.enlarge_by_convolutions(x[1:], stack), whole[1:])
        assert kernels.enlarge_by_convolutions(x[:0], stack).shape == (0, 1, 14, 18)


@on_each_device
def test_the_operator_keeps_its_promises(device, small_tiles):
    stack = converted(stack_of(1, 4, 4), device, torch.float16)
    x = torch.rand(1, 1, 5, 6).to(device, torch.float16)
    with triton_only():
        torch.library.opcheck(conv_stack._conv_stack, (x, list(stack)))


def test_the_reference_is_a_sesr():
    torch.manual_seed(0)
    for scale in (2, 4):
        network = tiny_sesr(scale=scale).double()
        x = torch.rand(2, 1, 6, 7, dtype=torch.double)
        stack = network.body.stack()
        torch.testing.assert_close(reference.enlarge_by_convolutions(x, stack), network(x))


@on_each_device
@pytest.mark.parametrize("activation", ["prelu", "relu"])
def test_a_sesr_runs_it_at_inference(device, activation, small_tiles):
    network = tiny_sesr(activation=activation).eval().to(device)
    x = torch.rand(1, 1, 6, 7).to(device)
    right = network(x).detach()
    network.half().body.first.forward = None  # what is not called cannot fail
    with triton_only(), torch.no_grad():
        torch.testing.assert_close(network(x.half()).float(), right, rtol=0, atol=2e-3)


def test_a_sesr_that_is_looked_into_runs_layer_by_layer(monkeypatch):
    """Wide blocks, pruned widths, and hooks on layers: the kernel has none of these."""
    monkeypatch.setenv("COMPSRT_KERNELS", "triton")
    monkeypatch.setattr(conv_stack, "_conv_stack", None)
    x = torch.rand(1, 1, 6, 7).half()
    pruned = SESR(SESRConfig(blocks=2, features=4, widths=(4, 3, 4)))
    hooked = tiny_sesr()
    seen = []
    hooked.feature_modules[0].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        for network in (pruned, hooked, tiny_sesr().widened(expansion=8)):
            assert network.eval().half()(x).shape == (1, 1, 12, 14)
    assert seen


def test_gradients_come_from_the_reference(monkeypatch):
    monkeypatch.setenv("COMPSRT_KERNELS", "triton")
    monkeypatch.setattr(conv_stack, "_conv_stack", None)
    stack = converted(stack_of(1, 4, 2), "cpu", torch.float16)
    x = torch.rand(1, 1, 5, 6, dtype=torch.float16, requires_grad=True)
    (grad,) = torch.autograd.grad(kernels.enlarge_by_convolutions(x, stack).sum(), x)
    assert grad.abs().max() > 0


def test_what_does_not_fit_is_refused():
    stack = converted(stack_of(2, 4, 2), "cpu", torch.float32)
    with pytest.raises(ValueError, match=r"x: its shape is \(3, 8, 8\); it needs \(B, 1, H, W\)"):
        kernels.enlarge_by_convolutions(torch.zeros(3, 8, 8), stack)
    x = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match=r"biases: its shape is \(2, 4\); it needs \(3, 4\)"):
        kernels.enlarge_by_convolutions(x, stack._replace(biases=stack.biases[1:]))
    with pytest.raises(ValueError, match="last: 3 channels are not the square"):
        kernels.enlarge_by_convolutions(x, stack._replace(last=stack.last[1:]))
