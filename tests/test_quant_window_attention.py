"""quant_window_attention: attention of quantized operands in shifted windows, against float64."""

from __future__ import annotations

import hypothesis
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
from compsrt.kernels import attention, dispatch, fake_quant, reference
from compsrt.kernels.reference import Grid, windows
from compsrt.kernels.reference.attention import attend
from compsrt.models import swinir

on_each_device = pytest.mark.parametrize("device", DEVICES)

# Transforms of the head, the value and the tokens: none, those of SwinIR-light's recipes, padded.
ROTATIONS = [
    (None, None, None),
    (None, None, "hadamard"),
    ("dct", "dct", "hadamard"),
    ("hadamard-padded", "hadamard-padded", "wider"),
]


def rotations_of(names, size, window, dtype=torch.float32, device="cpu"):
    sizes = size, size, window**2
    found = [
        transforms.random_orthogonal(size + 4)[:size]
        if name == "wider"
        else transforms.transform_matrix(name or "none", size)
        for name, size in zip(names, sizes, strict=True)
    ]
    return [None if matrix is None else matrix.to(device, dtype) for matrix in found]


def grids_of(scalars, bits, codes):
    return [Grid(*scalars[4 * i : 4 * i + 4], b, codes) for i, b in enumerate(bits)]


def make(shape, heads, window, bits, codes, dtype, seed, per_head=()):
    """q, k, v as thirds of one tensor, the table, the sixteen scalars, and a gradient.

    per_head: the grids, of the four, whose scalars are one a head.
    """
    *grid, size = shape
    qkv = randn(*grid, 3 * heads * size, seed=seed, dtype=dtype)
    table = 0.5 * randn((2 * window - 1) ** 2, heads, seed=seed + 1)
    shapes = [(heads, 1, 1) if i in per_head else () for i in range(4)]
    scalars = [s for i in range(4) for s in four_scalars(shapes[i], bits[i], codes, seed + i)]
    # Probabilities, rotated or not, are of this size.
    scalars[12:] = [s * 2 / window for s in scalars[12:]]
    return qkv, table, scalars, randn(*grid, heads * size, seed=seed + 2, dtype=dtype)


def run(function, qkv, table, scalars, grad, settings, bits, codes, rotations):
    """The output, and the gradients of qkv, the table and all scalars."""
    grids = grids_of(scalars, bits, codes)
    keys = ("head_rotation", "value_rotation", "token_rotation")
    rotations = dict(zip(keys, rotations, strict=True))
    out = function(*qkv.chunk(3, -1), table, grids, **settings, **rotations)
    return [out, *torch.autograd.grad(out, (qkv, table, *scalars), grad)]


def margin(qkv, table, scalars, settings, bits, codes, rotations):
    """The least distance, in codes, of any operand (float64) from where its code or side changes."""
    least = []

    def quantize(x, rotation, grid):
        v = x if rotation is None else x @ rotation
        scale, zero = reference.step_and_zero(*grid[:4], grid.bits)
        w = (v - zero) / scale
        edges = [(w - w.floor() - 0.5).abs()]
        edges += [(w - (bound - zero) / scale).abs() for bound in (grid.lower, grid.upper)]
        least.extend(edge.min() for edge in edges)
        return reference.fake_quantize(v, *grid[:4], bits=grid.bits, codes=grid.codes)

    def multiply(a, b, a_grid, b_grid=None, *, rotation):
        b = b if b_grid is None else quantize(b, None, b_grid)
        return quantize(a, rotation, a_grid) @ b

    grids = grids_of(scalars, bits, codes)
    sizes = [settings[key] for key in ("heads", "window", "shift", "scale")]
    attend(*qkv.chunk(3, -1), table, grids, *sizes, *rotations, quantize, multiply)
    return float(torch.stack(least).detach().min())


def check(
    device, shape, heads, window, shift, names, dtype, bits, codes="clamped", seed=0, per_head=()
):
    """Roundings of half types turn some codes over, and one turn more than torch's is no fault in so
    small a tensor: of four draws one has to be as good."""
    arguments = device, shape, heads, window, shift, names, dtype, bits, codes
    for draw in range(4):
        try:
            return check_draw(*arguments, seed + 1000 * draw, per_head)
        except AssertionError:
            if dtype == torch.float32 or draw == 3:
                raise


def check_draw(device, shape, heads, window, shift, names, dtype, bits, codes, seed, per_head):
    size = shape[-1]
    settings = {"heads": heads, "window": window, "shift": shift, "scale": size**-0.5}
    exact_rotations = rotations_of(names, size, window, torch.double)
    for attempt in range(50):  # one code more or less would hide all else
        *inputs, grad = make(
            shape, heads, window, bits, codes, dtype, seed + 100 * attempt, per_head
        )
        exact_inputs = leaves([inputs[0], inputs[1], *inputs[2]], "cpu", torch.double)
        arguments = settings, bits, codes, exact_rotations
        far = margin(exact_inputs[0], exact_inputs[1], exact_inputs[2:], *arguments)
        if dtype != torch.float32 or far > 2e-5:  # ten times what float32 sums are off by
            break
    else:
        raise AssertionError("no inputs clear of ties")

    def results(function, device, like):
        qkv, table, *scalars = leaves([inputs[0], inputs[1], *inputs[2]], device)
        if like == torch.double:
            qkv, table, *scalars = leaves([qkv, table, *scalars], device, like)
        rotations = rotations_of(names, size, window, like, device)
        there = grad.to(device, like)
        return run(function, qkv, table, scalars, there, settings, bits, codes, rotations)

    exact = results(reference.quant_window_attention, "cpu", torch.double)
    by_torch = results(reference.quant_window_attention, "cpu", dtype)
    with triton_only():
        found = results(kernels.quant_window_attention, device, dtype)
    assert found[0].dtype == found[1].dtype == dtype
    for ours, theirs, right in zip(found[:3], by_torch[:3], exact[:3], strict=True):
        assert_as_good(ours, theirs, right, 8 * UNIT[dtype])
    for i in range(4):  # sums of both signs: what they are off by goes with the size of the terms
        ours, theirs, right = (torch.stack(r[3 + 4 * i :][:4]) for r in (found, by_torch, exact))
        terms = 2 ** (bits[i] + 2) * float(grad.double().norm())
        assert error(ours, right) <= 2 * error(theirs, right) + terms * UNIT[dtype]


@on_each_device
@pytest.mark.parametrize(
    ("names", "heads", "shift"),
    [(ROTATIONS[1], 2, 0), *((names, 1, 4) for names in ROTATIONS)],
    ids=str,
)
def test_every_kind_of_rotation(device, names, heads, shift):
    check(device, (1, 8, 16 // heads, 10), heads, 8, shift, names, torch.float32, [4] * 4)


@on_each_device
@hypothesis.settings(without_shrinking, max_examples=6)
@given(
    shape=st.sampled_from([(1, 4, 8), (2, 4, 4), (1, 8, 4), (3, 4, 4)]),
    size=st.sampled_from([1, 6, 10, 16, 30]),
    heads=st.integers(1, 2),
    shift=st.integers(0, 3),
    names=st.sampled_from(ROTATIONS),
    dtype=st.sampled_from(TYPES),
    bits=st.sampled_from([[4] * 4, [2, 3, 8, 4], [8, 1, 2, 3]]),
    codes=st.sampled_from(reference.CODES),
    seed=st.integers(0, 99),
)
def test_shapes_and_bits(device, shape, size, heads, shift, names, dtype, bits, codes, seed):
    check(device, (*shape, size), heads, 4, shift, names, dtype, bits, codes, seed)


@on_each_device
def test_other_windows_and_wide_heads_are_composed(device, monkeypatch):
    monkeypatch.setattr(attention, "_quant_window_attention", None)
    check(device, (1, 6, 3, 10), 2, 3, 1, ROTATIONS[3], torch.float32, [4] * 4)
    check(device, (1, 8, 4, 40), 1, 4, 2, ROTATIONS[1], torch.float32, [4] * 4)
    check(device, (1, 16, 16, 10), 1, 16, 0, (None, None, "hadamard"), torch.float32, [4] * 4)


@on_each_device
@pytest.mark.parametrize("per_head", [(0, 1, 2, 3), (1,), (0, 3)], ids=str)
@pytest.mark.parametrize("names", [ROTATIONS[1], ROTATIONS[3]], ids=str)
def test_scalars_a_head(device, per_head, names):
    check(device, (1, 4, 8, 10), 3, 4, 2, names, torch.float32, [4] * 4, per_head=per_head)


@on_each_device
def test_scalars_a_head_where_the_op_is_composed(device, monkeypatch):
    monkeypatch.setattr(attention, "_quant_window_attention", None)
    everything = (0, 1, 2, 3)
    check(device, (2, 6, 3, 10), 2, 3, 1, ROTATIONS[3], TYPES[0], [4] * 4, per_head=everything)


@on_each_device
def test_scalars_a_head_that_are_equal_are_those_of_a_tensor(device):
    qkv, table, scalars, grad = make((2, 8, 8, 10), 3, 4, [4] * 4, "clamped", torch.float32, 0)
    settings = {"heads": 3, "window": 4, "shift": 2, "scale": 0.3}
    rotations = rotations_of(ROTATIONS[1], 10, 4, device=device)
    results = []
    for shape in ((), (3, 1, 1)):
        inputs = [qkv, table, *(s.expand(shape).contiguous() for s in scalars)]
        qkv_, table_, *scalars_ = leaves(inputs, device)
        arguments = qkv_, table_, scalars_, grad.to(device), settings, [4] * 4, "clamped", rotations
        with triton_only():
            results.append(run(kernels.quant_window_attention, *arguments))
    for one, three in zip(*results, strict=True):
        three = three.sum((0, 1, 2)) if three.shape == (3, 1, 1) else three
        torch.testing.assert_close(three, one, rtol=1e-5, atol=1e-4)


def plain(q, k, v, table, grids, *, heads, window, shift, scale, **rotations):
    """The op in so many words, with every rotation taken back before the products."""
    _, height, width, channels = q.shape
    count = height * width // window**2

    def split(x):
        x = windows.to_windows(x, window, shift)
        return x.unflatten(-1, (heads, -1)).unflatten(0, (-1, count)).transpose(2, 3)

    def quantize(x, key, grid):
        rotation = rotations[f"{key}_rotation"]
        rotation = torch.eye(x.shape[-1], dtype=x.dtype) if rotation is None else rotation
        x = x @ rotation
        return reference.fake_quantize(x, *grid[:4], bits=grid.bits, codes=grid.codes) @ rotation.mT

    query, key, value, attention = grids
    q = quantize(scale * split(q), "head", query)
    scores = q @ quantize(split(k), "head", key).mT + windows.relative_bias(table, window)
    mask = windows.shift_mask(height, width, window, shift, q.device, q.dtype)
    p = quantize((scores + mask[:, None]).softmax(-1), "token", attention)
    out = (p @ quantize(split(v), "value", value)).transpose(2, 3).reshape(-1, window**2, channels)
    return windows.from_windows(out, height, width, window, shift)


@pytest.mark.parametrize("names", ROTATIONS, ids=str)
@pytest.mark.parametrize(("window", "shift"), [(8, 4), (3, 0), (4, 3)])
def test_the_reference_is_attention_in_so_many_words(names, window, shift):
    *inputs, scalars, grad = make(
        (2, 2 * window, window, 10), 3, window, [4] * 4, "clamped", None, 0
    )
    settings = {"heads": 3, "window": window, "shift": shift, "scale": 0.3}
    rotations = rotations_of(names, 10, window, torch.double)
    qkv, table, *scalars = leaves([*inputs, *scalars], "cpu", torch.double)
    arguments = qkv, table, scalars, grad.double(), settings, [4] * 4, "clamped", rotations
    found = run(reference.quant_window_attention, *arguments)
    for ours, right in zip(found, run(plain, *arguments), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-10, atol=1e-10)


@on_each_device
@pytest.mark.parametrize("shift", range(4))
def test_bias_and_mask_are_those_of_swinir(device, shift):
    # With values that number the tokens of a window, what comes out are the probabilities.
    window, size = 4, (12, 8)
    places = torch.eye(16)[None].expand(6, 16, 16)
    v = windows.from_windows(places.reshape(6, 16, 16), *size, window, shift)
    table = randn(49, 1, seed=0)
    zero, one = torch.zeros(()), torch.ones(())
    grids = [Grid(-one, one, None, None, 2)] * 2 + [Grid(zero, one, None, None, b) for b in (1, 8)]
    scores = windows.relative_bias(table, window)
    mask = swinir.shift_mask(*size, window, shift, torch.device("cpu"), torch.float32)
    wanted = windows.from_windows((scores + mask).softmax(-1), *size, window, shift)
    q = torch.zeros_like(v)
    settings = {"heads": 1, "window": window, "shift": shift, "scale": 1.0}
    # All queries and keys are one vector (zero is no level), which no softmax sees.
    with triton_only():
        here = [Grid(*(s if s is None else s.to(device) for s in g[:4]), g.bits) for g in grids]
        arguments = [x.to(device) for x in (q, q, v, table)]
        found = kernels.quant_window_attention(*arguments, here, **settings)
    assert float((found.cpu() - wanted).abs().max()) <= 0.51 / 255


@on_each_device
def test_slices_other_strides_and_no_pictures(device):
    qkv, table, scalars, _ = make((2, 8, 12, 10), 2, 4, [4] * 4, "clamped", torch.float32, 0)
    qkv, table, *scalars = (x.to(device) for x in (qkv, table, *scalars))
    grids = grids_of(scalars, [4] * 4, "clamped")
    settings = {"heads": 2, "window": 4, "shift": 2, "scale": 0.3}
    q, k, v = qkv.chunk(3, -1)
    with triton_only():
        wanted = kernels.quant_window_attention(
            *(x.contiguous() for x in (q, k, v)), table, grids, **settings
        )
        for views in (
            (q, k.transpose(1, 2).contiguous().transpose(1, 2), v),
            (q.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0), k, v),
        ):
            assert torch.equal(
                kernels.quant_window_attention(*views, table, grids, **settings), wanted
            )
        part = kernels.quant_window_attention(
            *(x[1:, 4:, :4] for x in (q, k, v)), table, grids, **settings
        )
        assert part.shape == (1, 4, 4, 20) and part.isfinite().all()
        none, table = leaves([qkv[:0], table], device)
        out = kernels.quant_window_attention(*none.chunk(3, -1), table, grids, **settings)
        out.sum().backward()
    assert out.shape == (0, 8, 12, 20)
    assert none.grad.shape == none.shape
    assert not table.grad.any()


@on_each_device
@pytest.mark.parametrize("per_head", [(), (0, 1, 2, 3)], ids=str)
def test_operators_keep_their_promises(device, per_head):
    heads = 2 if per_head else 1
    qkv, table, scalars, grad = make(
        (1, 4, 4, 3), heads, 4, [3] * 4, "clamped", torch.float32, 0, per_head
    )
    q, k, v, table, grad, *scalars = leaves([*qkv.chunk(3, -1), table, grad, *scalars], device)
    rotations = rotations_of(("hadamard-padded", "dct", "hadamard"), 3, 4, device=device)
    arguments = q, k, v, table, scalars, *rotations, heads, 4, 2, 0.5, [3] * 4, [True] * 4
    with triton_only():
        torch.library.opcheck(attention._quant_window_attention, arguments)
        plain = [
            [s.detach() for s in x] if isinstance(x, list) and isinstance(x[0], torch.Tensor) else x
            for x in (x.detach() if isinstance(x, torch.Tensor) else x for x in (grad, *arguments))
        ]
        for with_table in (True, False):
            torch.library.opcheck(
                attention._quant_window_attention_backward,
                (*plain, with_table),
                test_utils=("test_schema", "test_faketensor"),
            )


@on_each_device
def test_compiles_into_one_graph_and_skips_the_table(device):
    qkv, table, scalars, _ = make((1, 4, 8, 10), 2, 4, [4] * 4, "clamped", torch.float32, 0)
    qkv, table, *scalars = leaves([qkv, table, *scalars], device)
    _, _, mix = rotations_of((None, None, "hadamard"), 10, 4, device=device)

    def step(qkv, table, scalars):
        out = kernels.quant_window_attention(
            *qkv.chunk(3, -1),
            table,
            grids_of(scalars, [4] * 4, "clamped"),
            heads=2,
            window=4,
            shift=2,
            scale=0.3,
            token_rotation=mix,
        )
        return out.square().sum()

    with triton_only():
        wanted = torch.autograd.grad(step(qkv, table, scalars), (qkv, table, *scalars))
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(qkv, table, scalars), (qkv, table, *scalars))
        alone = torch.autograd.grad(step(qkv, table.detach(), scalars), (qkv, *scalars))
    for ours, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=0)
    for ours, right in zip(alone, (wanted[0], *wanted[2:]), strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=0)


def test_a_cpu_goes_straight_to_the_reference(monkeypatch):
    monkeypatch.delenv("COMPSRT_KERNELS", raising=False)
    monkeypatch.setattr(attention, "_quant_window_attention", None)
    monkeypatch.setattr(fake_quant, "_fake_quantize", None)
    qkv, table, scalars, _ = make((1, 4, 4, 3), 2, 4, [3] * 4, "clamped", torch.float32, 0)
    grids = grids_of([s.double() for s in scalars], [3] * 4, "clamped")
    out = kernels.quant_window_attention(
        *qkv.double().chunk(3, -1), table.double(), grids, heads=2, window=4, shift=2, scale=1.0
    )
    assert out.dtype == torch.float64


WRONG = [
    ({"heads": 0}, "heads: 0 is not a whole number of at least 1"),
    ({"window": 4.0}, "window: 4.0 is not a whole number"),
    ({"shift": 4}, "shift: 4 is not below the window of 4"),
    ({"scale": torch.ones(())}, r"scale: tensor\(1.\) is not a finite number"),
    ({"heads": 3}, r"q: \(1, 4, 8, 20\) of torch.float32 is not .* with 3 heads"),
    ({"q": torch.zeros(1, 4, 6, 20)}, "q: a height of 4 and width of 6 are not both multiples"),
    ({"q": torch.zeros(1, 4, 8, 20).int()}, "q: .* of torch.int32 is not .* in a floating type"),
    ({"k": torch.zeros(1, 4, 8, 10)}, r"k: \(1, 4, 8, 10\) of torch.float32 is not as q"),
    ({"v": torch.zeros(1, 4, 8, 20).half()}, "v: .* of torch.float16 is not as q"),
    ({"table": torch.zeros(49, 3)}, r"table: \(49, 3\) of torch.float32 is not .* \(49, 2\)"),
    ({"head_rotation": torch.eye(9)}, r"head_rotation: \(9, 9\) is not \(10, n\)"),
    ({"value_rotation": torch.zeros(10, 9)}, r"value_rotation: \(10, 9\) is not \(10, n\)"),
    ({"token_rotation": torch.zeros(4)}, r"token_rotation: \(4,\) is not \(16, n\)"),
    ({"k": torch.zeros(1, 4, 8, 20, device="meta")}, "k: it is on meta; move it to q's cpu"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=lambda x: x if type(x) is str else "")
@pytest.mark.parametrize("choice", ["reference", "triton"])
def test_what_does_not_fit_is_refused(change, message, choice, monkeypatch):
    if choice == "triton" and not dispatch.INTERPRETED:
        pytest.skip("not interpreted: a CUDA device or no Triton")
    monkeypatch.setenv("COMPSRT_KERNELS", choice)
    x, grid = torch.zeros(1, 4, 8, 20), Grid(*four_scalars((), 3, "clamped"), 3)
    arguments = {"q": x, "k": x, "v": x, "table": torch.zeros(49, 2), "grids": [grid] * 4}
    arguments |= {"heads": 2, "window": 4, "shift": 0, "scale": 1.0} | change
    with pytest.raises(ValueError, match=message):
        kernels.quant_window_attention(**arguments)


def test_grids_that_do_not_fit_are_refused():
    x, grid = torch.zeros(1, 4, 8, 20), Grid(*four_scalars((), 3, "clamped"), 3)
    wide = Grid(*(s.expand(2) for s in grid[:4]), 3)
    settings = {"heads": 2, "window": 4, "shift": 0, "scale": 1.0}
    for grids, message in (
        ([grid] * 3, "grids: 3 of them; pass those of query, key, value, attention"),
        ([grid] * 3 + [wide], r"lower: shape \(2,\); attention takes one value a quantizer"),
        ([grid] * 3 + [grid._replace(bits=9)], "bits: 9 is not a whole number from 1 to 8"),
        ([grid] * 3 + [grid._replace(codes="none")], "codes: 'none' is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.quant_window_attention(x, x, x, torch.zeros(49, 2), grids, **settings)


@on_each_device
def test_two_runs_are_the_same_bits(device):
    repeat(device, (1, 8, 8, 6), 2, 4, 2)


@pytest.mark.gpu
def test_twenty_runs_are_the_same_bits():
    repeat("cuda", (16, 64, 64, 10), 6, 8, 20)


def repeat(device, shape, heads, window, times):
    *inputs, scalars, grad = make(shape, heads, window, [4] * 4, "clamped", torch.float32, 0)
    qkv, table, *scalars = leaves([*inputs, *scalars], device)
    settings = {"heads": heads, "window": window, "shift": window // 2, "scale": 0.3}
    rotations = rotations_of(("dct", "dct", "hadamard"), shape[-1], window, device=device)
    arguments = qkv, table, scalars, grad.to(device), settings, [4] * 4, "clamped", rotations
    with triton_only():
        runs = [run(kernels.quant_window_attention, *arguments) for _ in range(times)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
