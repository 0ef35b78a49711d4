"""The reference ops against the published modules, float64 autograd and brute force."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compsrt import transforms
from compsrt.calibration import search_bounds
from compsrt.kernels import reference

CASES = ("act_5x64x60", "act_2x6x64x10", "act_2x6x64x64", "act_5x64x120",
         "weight_60x60", "weight_120x60", "weight_60x120")  # fmt: skip


def scalar(value, dtype=torch.float64):
    return torch.tensor(float(value), dtype=dtype, requires_grad=True)


# --- The published modules -------------------------------------------------------------------------


def published(x, method):
    """What a published quantizer quantizes, and how its output comes back."""
    if method == "2dquant":
        return x, lambda y: y
    size = x.shape[-1]
    order = transforms.next_power_of_two(size)
    back = transforms.hadamard(order).to(x.dtype)
    return reference.hadamard_transform(x, order), lambda y: (y @ back)[..., :size]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["compsrt", "2dquant"])
def test_fake_quantize_equals_the_published_module(shared, method, case, bits, dtype):
    file = np.load(shared / f"golden/quantizer_{method}.npz")
    start = f"{case}/{bits}bit/"
    sets = [s for s in ("zero/", "pos/", "neg/") if f"{start}{s}out" in file.files]
    for name in sets or [""]:
        want = {k: file[start + name + k] for k in ("out", "d_x", "d_lower", "d_upper")}
        rules = ("unclamped",) if name == "neg/" else ("clamped", "unclamped")
        for codes in rules:
            x = torch.from_numpy(file[f"{case}/x"]).to(dtype).requires_grad_()
            g = torch.from_numpy(file[f"{case}/g"]).to(dtype)
            lower, upper = (scalar(file[start + k], dtype) for k in ("lower", "upper"))
            alpha = beta = None
            if name:
                alpha, beta = (scalar(file[start + name + k], dtype) for k in ("alpha", "beta"))
            rotated, back = published(x, method)
            y = reference.fake_quantize(rotated, lower, upper, alpha, beta, bits=bits, codes=codes)
            out = back(y)
            (out * g).sum().backward()
            step, _ = reference.step_and_zero(lower, upper, alpha, beta, bits)
            assert np.abs(out.detach().numpy() - want["out"]).max() <= 1e-4 * float(step.detach())
            assert np.abs(x.grad.numpy() - want["d_x"]).max() <= 1e-5
            assert abs(lower.grad.item() - want["d_lower"]) <= 2e-4
            assert abs(upper.grad.item() - want["d_upper"]) <= 2e-4
            if name:
                assert abs(alpha.grad.item() - file[start + name + "d_alpha"]) <= 1.5e-3
                assert abs(beta.grad) <= 2e-4
                r = reference.quantize_codes(
                    rotated, lower, upper, alpha, beta, bits=bits, codes=codes
                ).detach()
                r = r.flatten(0, -2)
                assert r.min() == file[start + name + "code_min"]
                assert r.max() == file[start + name + "code_max"]
                assert r.unique().numel() == file[start + name + "levels"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["compsrt", "2dquant"])
def test_search_finds_the_published_bounds(shared, method, case):
    file = np.load(shared / f"golden/quantizer_{method}.npz")
    x = torch.from_numpy(file[f"{case}/x"])
    searched = published(x, method)[0]
    if method == "compsrt":
        if case.startswith("weight"):  # the published code pads the rows too, and searches them
            rows = transforms.next_power_of_two(x.shape[0])
            searched = torch.nn.functional.pad(searched, (0, 0, 0, rows - x.shape[0]))
        else:
            searched = searched[..., : x.shape[-1]]
    width = float(searched.max() - searched.min())
    for bits in (2, 3, 4):
        start = f"{case}/{bits}bit/"
        lower, upper = search_bounds(searched, bits)
        assert abs(lower.item() - file[start + "lower"]) <= 1e-6 * width
        assert abs(upper.item() - file[start + "upper"]) <= 1e-6 * width
        _, _, error = reference.search_bounds(searched.reshape(1, -1), bits)
        assert float(error.sqrt()) == pytest.approx(float(file[start + "dobi_error"]), rel=1e-5)


def test_hadamard_transform_equals_the_published_one(shared):
    file = np.load(shared / "golden/hadamard.npz")
    for size in (10, 60, 64, 120):
        x = torch.from_numpy(file[f"d{size}/x"])
        want = torch.from_numpy(file[f"d{size}/forward"])
        got = reference.hadamard_transform(x, want.shape[-1])
        torch.testing.assert_close(got, want[: len(x), : x.shape[1]], rtol=0, atol=3e-6)


# --- The definition --------------------------------------------------------------------------------


def defined(v, lower, upper, alpha, beta, bits, codes):
    """design: written out step by step, differentiated by autograd (round passes gradients on)."""
    levels = 2**bits - 1
    s = (upper - lower) / levels + alpha
    z = lower + beta
    c = torch.where(v < lower, lower, torch.where(v > upper, upper, v))
    t = (c - z) / s
    r = t + (t.round() - t).detach()
    if codes == "clamped":
        r = r.clamp(0, levels)
    return s * r + z


finite = st.floats(-0.9, 0.9)


@given(
    bits=st.integers(1, 8),
    codes=st.sampled_from(reference.CODES),
    bounds=st.tuples(st.floats(-2, 0.4), st.floats(0.5, 3)),
    relative_alpha=st.floats(-0.7, 3),
    relative_beta=st.floats(-2, 2),
    channels=st.sampled_from([(), (5, 1)]),
    columns=st.sampled_from([1, 63]),
    seed=st.integers(0, 999),
)
def test_forward_and_all_gradients_equal_the_definition(
    bits, codes, bounds, relative_alpha, relative_beta, channels, columns, seed
):
    generator = torch.Generator().manual_seed(seed)
    x = 1.5 * torch.randn(5, columns, generator=generator, dtype=torch.float64)
    g = torch.randn(5, columns, generator=generator, dtype=torch.float64)
    step = (bounds[1] - bounds[0]) / (2**bits - 1)
    values = (*bounds, relative_alpha * step, relative_beta * step)
    spread = 1 + 0.1 * torch.rand(channels, generator=generator, dtype=torch.float64)
    results = []
    for function in (reference.fake_quantize, defined):
        inputs = [x.clone().requires_grad_()]
        inputs += [(v * spread).requires_grad_() for v in values]
        if function is defined:
            out = function(*inputs, bits, codes)
        else:
            out = function(*inputs, bits=bits, codes=codes)
        gradients = torch.autograd.grad((out * g).sum(), inputs)
        results.append((out.detach(), *gradients))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    if codes == "clamped" and not channels:
        assert results[0][0].unique().numel() <= 2**bits


def test_a_value_on_a_bound_counts_for_both():
    x = torch.tensor([-1.0, 0.2, 1.0], dtype=torch.float64, requires_grad=True)
    lower, upper = scalar(-1), scalar(1)
    reference.fake_quantize(x, lower, upper, bits=2).sum().backward()
    assert torch.equal(x.grad, torch.ones(3, dtype=torch.float64))
    t = (0.2 + 1) / (2 / 3)
    assert lower.grad == pytest.approx(1 - (round(t) - t) / 3)
    assert upper.grad == pytest.approx(1 + (round(t) - t) / 3)


def test_beta_has_a_gradient_where_codes_saturate():
    x = torch.linspace(-1, 1, 41, dtype=torch.float64)
    beta = scalar(0.5)
    reference.fake_quantize(x, scalar(-1), scalar(1), scalar(0), beta, bits=2).sum().backward()
    # Codes of t = (x + 0.5)/(2/3) below -1/2 are saturated: x < -5/6.
    assert beta.grad == pytest.approx(float((x < -5 / 6).sum()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype):
    x = torch.randn(64, 60).to(dtype).requires_grad_()
    lower, upper = scalar(-2, torch.float32), scalar(2, torch.float32)
    y = reference.fake_quantize(x, lower, upper, bits=4)
    want = reference.fake_quantize(x.detach().float(), lower.detach(), upper.detach(), bits=4)
    assert y.dtype == dtype and torch.equal(y, want.to(dtype))
    y.float().sum().backward()
    assert x.grad.dtype == dtype and lower.grad.dtype == torch.float32


@given(
    shape=st.sampled_from([(3, 7, 10), (1, 64, 60), (0, 5, 12), (2, 3, 5, 8)]),
    rotated=st.booleans(),
    quantized_right=st.booleans(),
    seed=st.integers(0, 99),
)
def test_quant_matmul_equals_its_parts(shape, rotated, quantized_right, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64, requires_grad=True)

    a = draw(*shape)
    b = draw(*shape[:-2], shape[-1], 6) if quantized_right else draw(shape[-1], 6)
    bias = None if quantized_right else draw(6)
    rotation = transforms.dct(shape[-1]) if rotated else None
    scalars = [[scalar(v) for v in (-1.2, 1.4, 0.02, 0.1)] for _ in range(2)]
    a_grid = reference.Grid(*scalars[0], 3)
    b_grid = reference.Grid(*scalars[1], 4) if quantized_right else None
    left = reference.fake_quantize(a if rotation is None else a @ rotation, *scalars[0], bits=3)
    right = reference.fake_quantize(b, *scalars[1], bits=4) if quantized_right else b
    parts = left @ right if bias is None else left @ right + bias
    whole = reference.quant_matmul(a, b, a_grid, b_grid, bias=bias, rotation=rotation)
    torch.testing.assert_close(whole, parts)
    inputs = [a, b, *scalars[0], *(scalars[1] if quantized_right else [bias])]
    g = torch.randn(whole.shape, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad((whole * g).sum(), inputs)
    theirs = torch.autograd.grad((parts * g).sum(), inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bits", [0, 9, 2.5, True, "4"])
def test_wrong_bits_are_refused(bits):
    with pytest.raises(ValueError, match="bits"):
        reference.fake_quantize(torch.zeros(3), scalar(0), scalar(1), bits=bits)


def test_wrong_codes_and_orders_are_refused():
    with pytest.raises(ValueError, match="codes"):
        reference.fake_quantize(torch.zeros(3), scalar(0), scalar(1), bits=2, codes="clamp")
    with pytest.raises(ValueError, match="below"):
        reference.hadamard_transform(torch.zeros(2, 8), 4)


# --- DOBI ------------------------------------------------------------------------------------------


def brute_force(x, bits, one_sided, candidates=100):
    least, greatest = x.min(), x.max()
    d = (greatest - least) / (2 * candidates)
    best = None
    for i in range(candidates):
        lower = least if one_sided else least + i * d
        upper = greatest - (2 * i * d if one_sided else i * d)
        y = reference.fake_quantize(x, lower, upper, bits=bits)
        error = float((x - y).square().sum())
        if best is None or error < best[0] * (1 - 1e-12):
            best = error, float(lower), float(upper)
    return best


@given(
    bits=st.integers(1, 6),
    one_sided=st.booleans(),
    kind=st.sampled_from(["normal", "heavy", "softmax", "gelu", "few"]),
    seed=st.integers(0, 999),
)
def test_search_equals_the_brute_force_loop(bits, one_sided, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 40, generator=generator, dtype=torch.float64)
    x = {
        "normal": lambda: x,
        "heavy": lambda: x**3,
        "softmax": lambda: x.softmax(-1),
        "gelu": lambda: torch.nn.functional.gelu(2 * x),
        "few": lambda: x[:1, :3],
    }[kind]()
    error, lower, upper = brute_force(x, bits, one_sided)
    got = reference.search_bounds(x.reshape(1, -1), bits, one_sided=one_sided)
    # Two candidates may tie (few values): then the error must be the same.
    assert float(got[2]) == pytest.approx(error, rel=1e-9, abs=1e-15)
    if kind != "few":
        assert (float(got[0]), float(got[1])) == pytest.approx((lower, upper), abs=1e-12)


def test_rows_are_searched_apart_and_both_kinds_together():
    x = torch.stack([torch.randn(200), torch.rand(200) ** 4]).double()
    rows = reference.search_bounds(x, 2, one_sided=None)
    for i, row in enumerate(x):
        alone = [reference.search_bounds(row[None], 2, one_sided=k) for k in (False, True)]
        assert float(rows[2][i]) == pytest.approx(min(float(a[2]) for a in alone))
