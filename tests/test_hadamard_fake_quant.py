"""hadamard_fake_quantize: one to three quantizers of one rotated tensor, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shapes import (
    DEVICES,
    TYPES,
    UNIT,
    assert_as_good,
    error,
    four_scalars,
    leaves,
    randn,
    triton_only,
    without_shrinking,
)

from compsrt import kernels, transforms
from compsrt.kernels import fake_quant, hadamard_fake_quant, reference
from compsrt.kernels.reference import Grid

on_each_device = pytest.mark.parametrize("device", DEVICES)

# (width, transform): exact and padded orders, the DCT of a head, any orthonormal matrix; 180 is
# composed of two kernels.
ROTATIONS = [
    (10, "hadamard-padded"),
    (10, "dct"),
    (60, "hadamard"),
    (60, "hadamard-padded"),
    (63, "random"),
    (120, "hadamard"),
    (180, "hadamard"),
]


def grids_of(scalars, bits, codes):
    return [Grid(*scalars[4 * i : 4 * i + 4], b, codes) for i, b in enumerate(bits)]


def run(function, x, rotation, scalars, bits, codes, back, grads):
    """Outputs, then the gradients of x and all scalars."""
    outs = function(x, rotation, grids_of(scalars, bits, codes), back)
    return [*outs, *torch.autograd.grad(outs, (x, *scalars), grads)]


def composed(x, rotation, grids, back):
    return hadamard_fake_quant._composed(x, rotation, grids, back, reference.fake_quantize)


def clear_of_ties(x, rotation, scalars, bits, codes):
    """The rows of x (float64) whose every coefficient is clear of where a code or a side changes:
    there rounding in float32 decides, and one code more or less moves the whole row."""
    v = x @ rotation
    clear = torch.ones(len(x), dtype=torch.bool)
    for grid in grids_of(scalars, bits, codes):
        scale, zero = reference.step_and_zero(*grid[:4], grid.bits)
        w = (v - zero) / scale
        edges = [(w - w.floor() - 0.5).abs()]
        edges += [(w - (bound - zero) / scale).abs() for bound in (grid.lower, grid.upper)]
        clear &= (torch.stack(edges) > 1e-3).all(0).all(1)
    return clear


def check(device, width, name, dtype, bits, codes, back, seed):
    rotation = transforms.transform_matrix(name, width).to(dtype)
    scalars = [s for i, b in enumerate(bits) for s in four_scalars((), b, codes, seed + i)]
    exact_scalars = [s.double() for s in scalars]
    x = randn(150, width, seed=seed, dtype=dtype)
    x = x[clear_of_ties(x.double(), rotation.double(), exact_scalars, bits, codes)][:67]
    assert len(x) > 16
    order = rotation.shape[0 if back else 1]
    grads = [randn(len(x), order, seed=seed + i, dtype=dtype) for i in range(len(bits))]
    x_exact, *exact_leaves = leaves([x, *scalars], "cpu", torch.double)
    exact = run(
        composed,
        x_exact,
        rotation.double(),
        exact_leaves,
        bits,
        codes,
        back,
        [g.double() for g in grads],
    )
    with triton_only():
        (x_here,) = leaves([x], device)
        found = run(
            kernels.hadamard_fake_quantize,
            x_here,
            rotation.to(device),
            leaves(scalars, device),
            bits,
            codes,
            back,
            [g.to(device) for g in grads],
        )
    count = len(bits)
    for ours, right in zip(found[: count + 1], exact[: count + 1], strict=True):
        assert ours.dtype == dtype
        assert_as_good(ours, right, right, 4 * UNIT[dtype])
    for i, (ours, right) in enumerate(zip(found[count + 1 :], exact[count + 1 :], strict=True)):
        terms = 2 ** bits[i // 4] * float(grads[i // 4].float().norm())
        assert error(ours, right) <= 2**-18 * terms


@on_each_device
@pytest.mark.parametrize(("width", "name"), ROTATIONS[:-1])
@pytest.mark.parametrize("back", [False, True], ids=["", "back"])
def test_every_kind_of_rotation(device, width, name, back):
    check(device, width, name, torch.float32, [4], "clamped", back, seed=0)


@on_each_device
@without_shrinking
@given(
    rotation=st.sampled_from(ROTATIONS[:4]),
    dtype=st.sampled_from(TYPES),
    bits=st.sampled_from([[4], [2, 3], [4, 4, 4], [1, 8, 2]]),
    codes=st.sampled_from(reference.CODES),
    back=st.booleans(),
    seed=st.integers(0, 99),
)
def test_up_to_three_quantizers_of_one_tensor(device, rotation, dtype, bits, codes, back, seed):
    check(device, *rotation, dtype, bits, codes, back, seed)


@on_each_device
def test_wide_rows_and_channels_are_composed(device):
    check(device, 180, "hadamard", torch.float32, [2, 3], "clamped", True, seed=0)
    x, rotation = randn(5, 12, seed=0), transforms.hadamard(12).float()
    grid = Grid(*four_scalars((5, 1), 2, "clamped"), 2)
    (wanted,) = composed(x, rotation, [grid], False)
    with triton_only():
        grid = Grid(*(s.to(device) for s in grid[:4]), 2)
        (found,) = kernels.hadamard_fake_quantize(x.to(device), rotation.to(device), [grid])
    torch.testing.assert_close(found.cpu(), wanted)


@on_each_device
def test_strides_leading_shapes_and_no_rows(device):
    rotation = transforms.hadamard(12).float().to(device)
    grid = Grid(*(s.to(device) for s in four_scalars((), 3, "clamped")), 3)
    x = randn(12, 4, 9, seed=0).to(device)
    with triton_only():
        for view in (x.permute(1, 2, 0), x.mT.transpose(0, 2)[..., ::2, :], x[:, 0, 0]):
            (out,) = kernels.hadamard_fake_quantize(view, rotation, [grid])
            (wanted,) = kernels.hadamard_fake_quantize(view.contiguous(), rotation, [grid])
            assert torch.equal(out, wanted)
            assert out.shape == view.shape
        (none,) = leaves([torch.zeros(0, 3, 12)], device)
        outs = kernels.hadamard_fake_quantize(none, rotation, [grid, grid], back=True)
        torch.autograd.backward(outs, [torch.zeros_like(out) for out in outs])
    assert [tuple(out.shape) for out in outs] == [(0, 3, 12)] * 2
    assert none.grad.shape == none.shape


@on_each_device
def test_one_output_may_go_unused(device):
    rotation = transforms.hadamard(12).float().to(device)
    x, *scalars = leaves([randn(7, 12, seed=0), *four_scalars((), 3, "clamped")], device)
    grid = Grid(*scalars, 3)
    with triton_only():
        _, out = kernels.hadamard_fake_quantize(x, rotation, [grid, grid])
        found = torch.autograd.grad(out.sum(), (x, *scalars))
        (alone,) = kernels.hadamard_fake_quantize(x, rotation, [grid])
        wanted = torch.autograd.grad(alone.sum(), (x, *scalars))
    for ours, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=1e-6)


@on_each_device
def test_operators_keep_their_promises(device):
    rotation = transforms.transform_matrix("hadamard-padded", 10).float().to(device)
    scalars = four_scalars((), 3, "clamped") + four_scalars((), 3, "clamped", seed=1)
    x, *scalars = leaves([randn(5, 10, seed=0), *scalars], device)
    settings = [3, 3], [True, False], True
    with triton_only():
        torch.library.opcheck(
            hadamard_fake_quant._hadamard_fake_quantize, (x, rotation, scalars, *settings)
        )
        torch.library.opcheck(
            hadamard_fake_quant._hadamard_fake_quantize_backward,
            ([x.detach()] * 2, x.detach(), rotation, scalars, *settings),
            test_utils="test_schema",
        )


@on_each_device
def test_compiles_into_one_graph(device):
    rotation = transforms.hadamard(60).float().to(device)

    def step(x, scalars):
        grids = grids_of(scalars, [4, 3, 2], "clamped")
        q, k, v = kernels.hadamard_fake_quantize(x, rotation, grids)
        return (q * k + v).sum()

    scalars = [s for b in (4, 3, 2) for s in four_scalars((), b, "clamped")]
    x, *scalars = leaves([randn(5, 60, seed=0), *scalars], device)
    with triton_only():
        wanted = torch.autograd.grad(step(x, scalars), (x, *scalars))
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(x, scalars), (x, *scalars))
    for ours, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=0)


def test_a_cpu_goes_straight_to_the_reference(monkeypatch):
    monkeypatch.delenv("COMPSRT_KERNELS", raising=False)
    monkeypatch.setattr(hadamard_fake_quant, "_hadamard_fake_quantize", None)
    monkeypatch.setattr(fake_quant, "_fake_quantize", None)
    x, grid = randn(3, 12, seed=0).double(), Grid(*four_scalars((), 3, "clamped"), 3)
    outs = kernels.hadamard_fake_quantize(x, transforms.hadamard(12).float(), [grid, grid], True)
    assert [out.dtype for out in outs] == [torch.float64] * 2


def test_what_does_not_fit_is_refused():
    x, grid = randn(3, 12, seed=0), Grid(*four_scalars((), 3, "clamped"), 3)
    with pytest.raises(ValueError, match=r"rotation: \(10, 16\) does not fit x \(3, 12\)"):
        kernels.hadamard_fake_quantize(x, torch.zeros(10, 16), [grid])
    with pytest.raises(ValueError, match="grids: 4 of them; pass one to three"):
        kernels.hadamard_fake_quantize(x, torch.eye(12), [grid] * 4)


@pytest.mark.gpu
def test_twenty_runs_are_the_same_bits():
    rotation = transforms.hadamard(60).float().cuda()
    scalars = [s for i in range(3) for s in four_scalars((), 4, "clamped", i)]
    x, *scalars = leaves([randn(20000, 60, seed=0), *scalars], "cuda")
    arguments = x, rotation, scalars, [4, 4, 4], "clamped", False
    grads = [randn(20000, 60, seed=i).cuda() for i in range(3)]
    with triton_only():
        runs = [run(kernels.hadamard_fake_quantize, *arguments, grads) for _ in range(20)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
