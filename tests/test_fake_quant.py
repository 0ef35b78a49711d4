"""fake_quantize: the kernel against the reference, forward and backward, and what runs where."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shapes import (
    DEVICES,
    SMALL,
    TYPES,
    OnDevice,
    error,
    four_scalars,
    leaves,
    randn,
    triton_only,
    without_shrinking,
)

from compsrt import kernels
from compsrt.kernels import dispatch, fake_quant, reference

on_each_device = pytest.mark.parametrize("device", DEVICES)


def run(function, x, scalars, bits, codes, grad):
    """The output, and the gradients of x and the four scalars."""
    out = function(x, *scalars, bits=bits, codes=codes)
    return out, *torch.autograd.grad(out, (x, *scalars), grad)


def same_output(out, wanted):
    if out.dtype == torch.bfloat16 and out.device.type == "cpu":
        # The interpreter cuts bf16 off where everything else rounds.
        torch.testing.assert_close(out, wanted, rtol=2**-7, atol=0)
    else:
        torch.testing.assert_close(out.cpu(), wanted, rtol=0, atol=0, equal_nan=True)


@on_each_device
@without_shrinking
@given(
    shape=st.sampled_from(SMALL),
    dtype=st.sampled_from(TYPES),
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    codes=st.sampled_from(reference.CODES),
    channels=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_kernel_is_the_reference(device, shape, dtype, bits, codes, channels, seed):
    # Codes, output and dx are the same bits, ties included. The reference runs on the CPU: on a
    # device (u - l)/L is not a true division there.
    rows = (shape[0], *[1] * (len(shape) - 1)) if channels and len(shape) > 1 else ()
    x, scalars = randn(*shape, seed=seed, dtype=dtype), four_scalars(rows, bits, codes, seed)
    grad = randn(*shape, seed=seed + 1, dtype=dtype)
    wanted = run(reference.fake_quantize, *split(x, scalars, "cpu"), bits, codes, grad)
    with triton_only():
        arguments = split(x, scalars, device)
        found = run(kernels.fake_quantize, *arguments, bits, codes, grad.to(device))
    same_output(found[0], wanted[0])
    assert found[1].dtype == dtype
    assert torch.equal(found[1].cpu(), wanted[1])
    for ours, theirs in zip(found[2:], wanted[2:], strict=True):
        assert ours.shape == rows
        # Sums of up to 2^bits times the gradient, in another order.
        torch.testing.assert_close(
            ours.cpu(), theirs, rtol=0, atol=2**-20 * 2**bits * max(1.0, float(grad.norm()))
        )


def split(x, scalars, device):
    x, *scalars = leaves([x, *scalars], device)
    return x, scalars


@on_each_device
@pytest.mark.parametrize("bits", [2, 4])
def test_the_scalars_gradients_in_float64(device, bits):
    # Enough entries for every program to take several blocks.
    x, grad, scalars = (
        randn(331, 61, seed=0),
        randn(331, 61, seed=1),
        four_scalars((), bits, "clamped"),
    )
    exact = run(
        reference.fake_quantize,
        *split(x.double(), [s.double() for s in scalars], "cpu"),
        bits,
        "clamped",
        grad.double(),
    )
    by_torch = run(reference.fake_quantize, *split(x, scalars, "cpu"), bits, "clamped", grad)
    with triton_only():
        found = run(
            kernels.fake_quantize, *split(x, scalars, device), bits, "clamped", grad.to(device)
        )
    for ours, theirs, right in zip(found[2:], by_torch[2:], exact[2:], strict=True):
        assert (
            error(ours, right) <= 2 * error(theirs, right) + 2**-22 * float(grad.norm()) * 2**bits
        )


@on_each_device
@pytest.mark.parametrize("beta", [0.0, -0.75, 0.75], ids=["plain", "low codes", "high codes"])
def test_ties_and_bounds_and_what_is_not_finite(device, beta):
    # Steps of a power of two: every tie between codes and every bound is hit exactly.
    x = torch.cat([torch.arange(-24, 25) / 16, torch.tensor([torch.inf, -torch.inf, 1e30])])
    scalars = [torch.tensor(v) for v in (-1.0, 0.75, 0.0, beta)]
    grad = randn(len(x), seed=0)
    for codes in reference.CODES:
        wanted = run(reference.fake_quantize, *split(x, scalars, "cpu"), 3, codes, grad)
        with triton_only():
            found = run(
                kernels.fake_quantize, *split(x, scalars, device), 3, codes, grad.to(device)
            )
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours.cpu(), theirs)
    with triton_only():
        out = kernels.fake_quantize(
            torch.tensor([torch.nan, 0.5], device=device),
            *[s.to(device) for s in scalars],
            bits=3,
        )
        never_set = torch.tensor(torch.nan, device=device)
        nothing = kernels.fake_quantize(out, never_set, never_set, bits=3)
    assert out.isnan().tolist() == [True, False]
    assert nothing.isnan().all()


@on_each_device
def test_none_for_alpha_and_beta_and_any_strides(device):
    x = randn(12, 9, 5, seed=0).to(device)
    lower, upper = torch.tensor(-1.0), torch.tensor(1.5)
    for view in (x.mT, x[::2, 1:, 3], x.expand(2, 12, 9, 5)):
        wanted = reference.fake_quantize(view.cpu(), lower, upper, bits=4)
        with triton_only():
            out = kernels.fake_quantize(view, lower.to(device), upper.to(device), bits=4)
        assert torch.equal(out.cpu(), wanted)
        assert out.is_contiguous()


@on_each_device
def test_operators_keep_their_promises(device):
    x, *scalars = leaves([randn(6, 10, seed=0), *four_scalars((6, 1), 3, "clamped")], device)
    arguments = x, *scalars, 3, True
    with triton_only():
        torch.library.opcheck(fake_quant._fake_quantize, arguments)
        torch.library.opcheck(
            fake_quant._fake_quantize_backward, (x.detach(), *arguments), test_utils="test_schema"
        )


@on_each_device
def test_compiles_into_one_graph(device):
    def step(x, scalars):
        return kernels.fake_quantize(x, *scalars, bits=3).square().sum()

    x, scalars = split(randn(7, 10, seed=0), four_scalars((), 3, "clamped"), device)
    with triton_only():
        wanted = torch.autograd.grad(step(x, scalars), (x, *scalars))
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(x, scalars), (x, *scalars))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.gpu
def test_twenty_runs_are_the_same_bits():
    x, grad = randn(1000, 1000, seed=0).cuda(), randn(1000, 1000, seed=1).cuda()
    x, scalars = split(x, four_scalars((), 4, "clamped"), "cuda")
    with triton_only():
        runs = [run(kernels.fake_quantize, x, scalars, 4, "clamped", grad) for _ in range(20)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.gpu
def test_a_graph_captures_forward_and_backward():
    x, scalars = split(randn(1000, 60, seed=0), four_scalars((), 4, "clamped"), "cuda")
    grad = torch.ones_like(x)
    stream = torch.cuda.Stream()
    # What is recorded has to have run on the stream of the recording: backward follows forward there.
    with torch.cuda.stream(stream):
        wanted = run(kernels.fake_quantize, x, scalars, 4, "clamped", grad)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = run(kernels.fake_quantize, x, scalars, 4, "clamped", grad)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# --- What runs where, and what is refused --------------------------------------------------------


def test_a_cpu_goes_straight_to_the_reference(monkeypatch):
    monkeypatch.delenv("COMPSRT_KERNELS", raising=False)
    monkeypatch.setattr(fake_quant, "_fake_quantize", None)
    x = randn(3, 5, seed=0).double()
    out = kernels.fake_quantize(x, x.min(), x.max(), bits=2)
    assert out.dtype == torch.float64


class OnFirstDevice(OnDevice):
    device = torch.device("cuda", 0)


@pytest.fixture
def asked_anew(monkeypatch):
    """What is known of devices is forgotten, and none is there to be entered."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    dispatch._runs_kernels.cache_clear()
    yield
    dispatch._runs_kernels.cache_clear()


@pytest.mark.parametrize(
    ("major", "hip", "runs"),
    [(7, None, False), (8, None, True), (12, None, True), (7, "6.4", True)],
)
def test_an_old_device_goes_to_the_reference(major, hip, runs, monkeypatch, asked_anew):
    """Triton's code for it has no tensor cores, and spills. AMD counts otherwise."""
    monkeypatch.delenv("COMPSRT_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "INSTALLED", True)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 5))
    launched = []
    monkeypatch.setattr(dispatch, "_nothing_kernel", {(1,): lambda: launched.append(1)})
    x = torch.zeros(3).as_subclass(OnFirstDevice)
    assert dispatch.use_triton(x) == runs
    assert dispatch.use_triton(x) == runs
    assert len(launched) == runs
    assert not dispatch.use_triton(torch.zeros(3))


@pytest.mark.gpu
def test_triton_can_run_on_a_device():
    dispatch._runs_kernels.cache_clear()
    assert dispatch.runs_kernels(torch.device("cuda", 0))


def test_a_machine_where_triton_cannot_compile_goes_to_the_reference(monkeypatch, asked_anew):
    def fails():
        raise RuntimeError("Failed to find C compiler.\nPlease specify it.")

    monkeypatch.setattr(dispatch, "_nothing_kernel", {(1,): fails})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.warns(UserWarning, match=r"cannot run on cuda:0, .*: Failed to find C compiler\.$"):
        assert not dispatch.runs_kernels(torch.device("cuda", 0))
    assert not dispatch.runs_kernels(torch.device("cuda", 0))  # says it once


@pytest.mark.gpu
def test_a_device_goes_to_the_kernel(monkeypatch):
    monkeypatch.delenv("COMPSRT_KERNELS", raising=False)
    x = randn(3, 5, seed=0).cuda()
    assert dispatch.use_triton(x)
    assert not dispatch.use_triton(x.double())
    monkeypatch.setenv("COMPSRT_KERNELS", "reference")
    assert not dispatch.use_triton(x)


@pytest.mark.skipif(not dispatch.INSTALLED, reason="Triton is not installed")
def test_unknown_choices_are_refused(monkeypatch):
    x = randn(3, seed=0)
    monkeypatch.setenv("COMPSRT_KERNELS", "cuda")
    with pytest.raises(ValueError, match="'cuda' is unknown; one of reference, triton, auto"):
        kernels.fake_quantize(x, x.min(), x.max(), bits=2)
    monkeypatch.setenv("COMPSRT_KERNELS", "triton")
    with pytest.raises(ValueError, match=r"no kernel for torch\.float64"):
        kernels.fake_quantize(x.double(), x.min(), x.max(), bits=2)
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        kernels.fake_quantize(x, x.min(), x.max(), bits=2)
    monkeypatch.setattr(dispatch, "INSTALLED", False)
    with pytest.raises(ValueError, match="not installed"):
        kernels.fake_quantize(x, x.min(), x.max(), bits=2)


@on_each_device
def test_scalars_of_an_inner_axis(device):
    """Such as one a head: as the reference, whose shapes broadcast."""
    x = randn(2, 3, 4, 5, seed=0)
    results = []
    for there, choose in (("cpu", contextlib.nullcontext), (device, triton_only)):
        inputs = leaves([x, *four_scalars((3, 1, 1), 3, "clamped")], there)
        with choose():
            y = kernels.fake_quantize(*inputs, bits=3)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for right, found in zip(*results, strict=True):
        torch.testing.assert_close(found.cpu(), right, rtol=1e-5, atol=1e-5)


@on_each_device
def test_scalars_that_do_not_fit_are_refused(monkeypatch, device):
    monkeypatch.setenv("COMPSRT_KERNELS", "triton")
    x, scalar, row = randn(4, 6, seed=0).to(device), torch.zeros((), device=device), torch.zeros(6)
    with pytest.raises(ValueError, match=r"lower: no kernel for shape \(6,\)"):
        kernels.fake_quantize(x, row, row, bits=2)
    with pytest.raises(ValueError, match=r"beta: shape \(4, 1\)"):
        kernels.fake_quantize(x, scalar, scalar, None, torch.zeros(4, 1), bits=2)
    with pytest.raises(ValueError, match="bits: 9"):
        kernels.fake_quantize(x, scalar, scalar, bits=9)
    with pytest.raises(ValueError, match="codes: 'both'"):
        kernels.fake_quantize(x, scalar, scalar, bits=2, codes="both")


def test_without_triton_every_op_is_the_reference():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from compsrt import kernels\n"
        "x, P, zero, one = torch.randn(3, 12), torch.eye(12), torch.zeros(()), torch.ones(())\n"
        "grid = kernels.Grid(zero, one, None, None, 4)\n"
        "kernels.fake_quantize(x, *grid[:4], bits=4)\n"
        "kernels.hadamard_transform(x)\n"
        "kernels.hadamard_fake_quantize(x, P, [grid])\n"
        "kernels.search_bounds(x, 4)\n"
        "assert set(kernels.__all__) <= set(dir(kernels))\n"
    )
    in_fresh_python(program)


def test_importing_the_kernels_imports_no_triton():
    program = (
        "import sys, compsrt.kernels, compsrt.kernels.reference\n"
        "compsrt.kernels.Grid, compsrt.kernels.quant_matmul\n"
        "assert 'triton' not in sys.modules\n"
    )
    in_fresh_python(program)


def in_fresh_python(program):
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "COMPSRT_KERNELS": "auto"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=120)


def test_the_quotient_of_a_device_is_a_true_division():
    # tiles.divide with the fused multiply-adds that the interpreter lacks: a product of float32 is
    # exact in float64.
    generator = np.random.default_rng(0)
    b = generator.uniform(2.0**-12, 4, 20000).astype(np.float32)
    a = (generator.standard_normal((10, 20000)) * 8 * b).astype(np.float32)
    inverse = np.float32(1) / b
    quotient = a * inverse
    residual = (a - np.multiply(quotient, b, dtype=np.float64)).astype(np.float32)
    better = (quotient + np.multiply(residual, inverse, dtype=np.float64)).astype(np.float32)
    assert np.array_equal(better, a / b)
    assert not np.array_equal(quotient, a / b)
