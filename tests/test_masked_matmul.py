"""masked_matmul: a product with a weight that is quantized, or unpacked, on the fly; and packing one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import SCALARS, Kind, assert_all_as_good, run
from shapes import DEVICES, TYPES, four_scalars, leaves, randn, triton_only, without_shrinking

from compsrt import kernels, pruning
from compsrt.kernels import linear, reference
from compsrt.kernels.packing import packed_size
from compsrt.kernels.reference import Grid, PackedWeight, QuantWeight

on_each_device = pytest.mark.parametrize("device", DEVICES)


def call(function, kind: Kind):
    return lambda x, t: function(x, kind.weight(t), bias=t.get("bias"), residual=t.get("residual"))


def check(device: str, kind: Kind, rows: int, residual: bool = False) -> None:
    tensors = kind.tensors()
    if residual:
        tensors["residual"] = randn(rows, kind.out, seed=1, dtype=kind.dtype)
    x = randn(rows, kind.size, seed=kind.seed, dtype=kind.dtype)
    grad = randn(rows, kind.out, seed=kind.seed + 1, dtype=kind.dtype)
    right = call(reference.masked_matmul, kind)
    exact = run(right, x, tensors, grad, dtype=torch.double)
    by_torch = run(right, x, tensors, grad)
    with triton_only():
        found = run(call(kernels.masked_matmul, kind), x, tensors, grad, device)
    terms = 2**kind.weight_bits * float(grad.float().norm())
    assert_all_as_good(found, by_torch, exact, kind.dtype, terms)
    if kind.masked:
        assert not found["weight"].cpu()[~kind.mask()].any()


@on_each_device
@settings(without_shrinking, max_examples=without_shrinking.max_examples // 2)
@given(
    sizes=st.sampled_from([(60, 20), (120, 7), (12, 20), (10, 3), (63, 33), (1, 1)]),
    rows=st.sampled_from([1, 7, 37]),
    dtype=st.sampled_from(TYPES),
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    codes=st.sampled_from(reference.CODES),
    options=st.lists(st.booleans(), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
def test_the_kernels_are_the_reference(device, sizes, rows, dtype, bits, codes, options, seed):
    channels, masked, bias, residual = options
    kind = Kind(*sizes, None, 0, bits, codes, channels, masked, False, bias, None, dtype, seed)
    check(device, kind, rows, residual)


@on_each_device
def test_several_programs_and_wide_rows(device, monkeypatch):
    check(device, Kind(12, 100, None, 0), 150)
    monkeypatch.setattr(linear, "_linear", None)  # these are composed
    check(device, Kind(150, 20, None, 0, channels=True), 9, residual=True)


def test_the_reference_is_its_parts():
    kind = Kind(12, 20, None, 0, dtype=torch.double)
    tensors = {**kind.tensors(), "residual": randn(7, 20, seed=1, dtype=torch.double)}
    x, grad = randn(7, 12, seed=2).double(), randn(7, 20, seed=3).double()

    def parts(x, t):
        weight = kind.weight(t)
        quantized = reference.fake_quantize(weight.values, *weight.grid[:4], bits=3) * weight.mask
        return x @ quantized.mT + t["bias"] + t["residual"]

    wanted = run(parts, x, tensors, grad, dtype=torch.double)
    found = run(call(reference.masked_matmul, kind), x, tensors, grad, dtype=torch.double)
    for name, right in wanted.items():
        torch.testing.assert_close(found[name], right, rtol=1e-12, atol=1e-12, msg=name)


@on_each_device
def test_what_is_pruned_contributes_nothing(device):
    kind = Kind(12, 20, None, 0)
    tensors = kind.tensors()
    x, mask = randn(7, 12, seed=0).to(device), kind.mask()
    tensors = {name: t.to(device) for name, t in tensors.items()}
    other = {**tensors, "weight": torch.where(mask.to(device), tensors["weight"], 1e30)}
    none = QuantWeight(
        tensors["weight"], kind.weight(tensors).grid, torch.zeros_like(mask).to(device)
    )
    with triton_only():
        y, same = (call(kernels.masked_matmul, kind)(x, t) for t in (tensors, other))
        nothing = kernels.masked_matmul(x, none)
    assert torch.equal(y, same)
    assert torch.equal(nothing, torch.zeros_like(nothing))


# --- Packed weights ------------------------------------------------------------------------------


@st.composite
def weights(draw):
    """A weight of any size and bits, with a mask of a pattern or none, and the pattern."""
    pattern = draw(st.sampled_from(reference.linear.PATTERNS))
    out, bits = draw(st.integers(1, 9)), draw(st.integers(1, 8))
    size = 4 * draw(st.integers(1, 17)) if pattern == "2:4" else draw(st.integers(1, 70))
    channels, seed = draw(st.booleans()), draw(st.integers(0, 99))
    values = randn(out, size, seed=seed)
    mask = randn(out, size, seed=seed + 1) > 0 if draw(st.booleans()) else None
    if pattern == "2:4":
        mask = pruning.magnitude_mask(values, 0.5, "2:4")
    scalars = four_scalars((out, 1) if channels else (), bits, "clamped", seed)
    return QuantWeight(values, Grid(*scalars, bits), mask), pattern


@given(weights())
def test_packing_loses_nothing_and_wastes_no_byte_of_a_row(drawn):
    weight, pattern = drawn
    packed = kernels.pack_weight(weight, pattern)
    assert torch.equal(packed.quantized(), weight.quantized())
    out, size = weight.values.shape
    kept = size // 2 if pattern == "2:4" else size
    assert packed.codes.shape == (out, packed_size(kept, weight.grid.bits))
    assert packed.mask is None or packed.mask.shape == (out, packed_size(size))
    unpacked = packed.unpacked()
    assert unpacked.mask is None or torch.equal(unpacked.mask, weight.mask)
    again = kernels.pack_weight(unpacked, pattern)
    assert torch.equal(again.codes, packed.codes)


def test_the_layout_of_two_of_four():
    codes = torch.tensor([[5, 0, 0, 3, 0, 7, 1, 0]], dtype=torch.uint8)
    zero = torch.zeros(())
    packed = kernels.pack_weight(
        QuantWeight(codes, Grid(zero, zero + 1, None, None, 3), codes > 0), "2:4"
    )
    assert packed.codes.tolist() == [[0b11_011_101, 0b0000_001_1]]
    assert packed.mask.tolist() == [[0b10_01_11_00]]


@on_each_device
@without_shrinking
@given(drawn=weights(), dtype=st.sampled_from(TYPES))
def test_every_form_of_a_weight_gives_the_same_bits(device, drawn, dtype):
    weight, pattern = drawn
    grid = Grid(*(s.to(device) for s in weight.grid[:4]), weight.grid.bits)
    mask = None if weight.mask is None else weight.mask.to(device)
    floats = QuantWeight(weight.values.to(device), grid, mask)
    packed = kernels.pack_weight(floats, pattern)
    forms = floats, packed.unpacked(), packed
    x = randn(5, weight.values.shape[1], seed=0, dtype=dtype)
    grad = randn(5, len(weight.values), seed=1, dtype=dtype).to(device)
    with triton_only():
        found = []
        for form in forms:
            (leaf,) = leaves([x], device)
            y = kernels.masked_matmul(leaf, form)
            found.append((y, torch.autograd.grad(y, leaf, grad)[0]))
    for y, dx in found[1:]:
        assert torch.equal(y, found[0][0])
        assert torch.equal(dx, found[0][1])


@on_each_device
def test_a_packed_weight_gives_gradients_to_all_else(device):
    kind = Kind(12, 20, None, 0)
    tensors = {name: t.to(device) for name, t in kind.tensors().items()}
    weight = kernels.pack_weight(kind.weight(tensors))
    packed = weight._replace(grid=Grid(*leaves(weight.grid[:4], device), weight.grid.bits))
    x, bias, residual = leaves(
        [randn(7, 12, seed=0), tensors["bias"], randn(7, 20, seed=1)], device
    )
    grad = randn(7, 20, seed=2).to(device)
    with triton_only():
        y = kernels.masked_matmul(x, packed, bias=bias, residual=residual)
    y.backward(grad)
    assert all(scalar.grad is None for scalar in packed.grid[:4])
    assert torch.equal(residual.grad, grad)
    torch.testing.assert_close(bias.grad, grad.sum(0))
    torch.testing.assert_close(x.grad, grad @ weight.quantized())
    wide = kernels.pack_weight(QuantWeight(randn(3, 150, seed=0).to(device), weight.grid))
    x = randn(2, 150, seed=1).to(device)
    with triton_only():
        torch.testing.assert_close(kernels.masked_matmul(x, wide), x @ wide.quantized().mT)


@on_each_device
def test_strides_leading_shapes_and_no_rows(device):
    kind = Kind(12, 5, None, 0)
    tensors = {name: t.to(device) for name, t in kind.tensors().items()}
    product = call(kernels.masked_matmul, kind)
    x = randn(12, 4, 9, seed=0).to(device)
    with triton_only():
        for view in (x.permute(1, 2, 0), x.mT.transpose(0, 2)[..., ::2, :], x[:, 0, 0]):
            assert torch.equal(product(view, tensors), product(view.contiguous(), tensors))
            assert product(view, tensors).shape == (*view.shape[:-1], 5)
        found = run(product, x.new_zeros(0, 3, 12), tensors, x.new_zeros(0, 3, 5), device)
    assert found["y"].shape == (0, 3, 5)
    assert all(not gradient.any() for gradient in found.values())


@on_each_device
def test_operators_keep_their_promises(device):
    kind = Kind(12, 5, None, 0)
    tensors = kind.tensors()
    x, *values = leaves([randn(7, 12, seed=0), *tensors.values()], device)
    weight = kind.weight(dict(zip(tensors, values, strict=True)))
    with triton_only():
        for form in (weight, kernels.pack_weight(weight)):
            layer, rules = linear.layer_of(x, form)
            flat, present = linear.flatten(layer)
            residual = randn(7, 5, seed=1).to(device)
            torch.library.opcheck(linear._linear, (x, flat, residual, present, list(rules), 0.0))


@on_each_device
def test_compiles_into_one_graph(device):
    kind = Kind(12, 20, None, 0)
    tensors = kind.tensors()
    mask = kind.mask().to(device)
    packed = kernels.pack_weight(kind.weight({name: t.to(device) for name, t in tensors.items()}))

    def step(x, t):
        grid = Grid(*(t[f"weight_{name}"] for name in SCALARS), 3)
        y = kernels.masked_matmul(x, QuantWeight(t["weight"], grid, mask), bias=t["bias"])
        return y * kernels.masked_matmul(x, packed)

    x, grad = randn(5, 12, seed=0), randn(5, 20, seed=1)
    with triton_only():
        wanted = run(step, x, tensors, grad, device)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        found = run(compiled, x, tensors, grad, device)
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


def test_a_cpu_goes_straight_to_the_reference(monkeypatch):
    monkeypatch.delenv("COMPSRT_KERNELS", raising=False)
    monkeypatch.setattr(linear, "_linear", None)
    kind = Kind(12, 20, None, 0, dtype=torch.double)
    x = randn(3, 12, seed=0).double()
    assert call(kernels.masked_matmul, kind)(x, kind.tensors()).dtype == torch.float64


FOUR = torch.zeros(4, 8)
GRID = Grid(torch.zeros(()), torch.ones(()), None, None, 3)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (QuantWeight(torch.zeros(8), GRID), r"weight: values are torch.float32 \(8,\)"),
        (QuantWeight(FOUR.int(), GRID), r"weight: values are torch.int32 \(4, 8\)"),
        (QuantWeight(FOUR, GRID, torch.ones(4, 7).bool()), r"mask is torch.bool \(4, 7\)"),
        (QuantWeight(FOUR, GRID, FOUR), r"mask is torch.float32 \(4, 8\); it needs bool"),
        (QuantWeight(FOUR, Grid(*[torch.zeros(4)] * 4, 3)), r"shape \(4,\); use \(\) or \(4, 1\)"),
        (QuantWeight(FOUR[:0], GRID), r"its shape is \(0, 8\); it needs one entry at least"),
        (QuantWeight(FOUR, GRID._replace(bits=0)), "bits: 0"),
        (PackedWeight(torch.zeros(4, 2).byte(), GRID, None, 8), r"uint8 \(4, 2\), not uint8 \(N, 3\)"),
        (PackedWeight(torch.zeros(4, 3).byte(), GRID, None, 8, "1:4"), "pattern '1:4' is unknown"),
        (PackedWeight(torch.zeros(4, 2).byte(), GRID, None, 8, "2:4"), "2:4 needs positions"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        kernels.masked_matmul(torch.zeros(2, 8), weight)


@pytest.mark.parametrize(
    ("weight", "pattern", "message"),
    [
        (QuantWeight(FOUR, GRID), "4:8", "pattern: '4:8' is unknown; one of unstructured, 2:4"),
        (QuantWeight(FOUR, GRID), "2:4", "mask: 2:4 needs one that keeps two of every four"),
        (QuantWeight(FOUR, GRID, FOUR == 0), "2:4", "mask: 2:4 needs one that keeps two"),
        (QuantWeight(FOUR, GRID._replace(codes="unclamped")), "unstructured", "codes: unclamped"),
        (QuantWeight(FOUR.byte() + 9, GRID), "unstructured", "the code 9 does not fit 3 bits"),
    ],
)
def test_what_cannot_be_packed_is_refused(weight, pattern, message):
    with pytest.raises(ValueError, match=message):
        kernels.pack_weight(weight, pattern)


@pytest.mark.gpu
def test_twenty_runs_are_the_same_bits():
    kind = Kind(60, 120, None, 0)
    x, grad = randn(20000, 60, seed=0), randn(20000, 120, seed=1)
    product = call(kernels.masked_matmul, kind)
    with triton_only():
        runs = [run(product, x, kind.tensors(), grad, "cuda") for _ in range(20)]
    for other in runs[1:]:
        assert all(torch.equal(other[name], value) for name, value in runs[0].items())
