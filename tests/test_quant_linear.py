"""quant_linear: norm, rotation, quantizers, product, bias, GELU and residual in one kernel, in float64."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import SCALARS, Kind, assert_all_as_good, clear_of_ties, operand, quant_linear, run
from shapes import DEVICES, TYPES, leaves, randn, triton_only, without_shrinking

from compsrt import kernels
from compsrt.kernels import linear, reference
from compsrt.kernels.reference import Grid, LayerNormWeights, QuantWeight

on_each_device = pytest.mark.parametrize("device", DEVICES)


def inputs(kind: Kind, rows: int, residual: bool = False):
    """x with rows clear of ties, the tensors of the layer, and the gradient of its output."""
    tensors = kind.tensors()
    x = randn(30 * rows + 30, kind.size, seed=kind.seed, dtype=kind.dtype)
    # A half type's normalized x has errors of its own, before the quantizer.
    margin = 0.03 if kind.norm and kind.dtype.itemsize == 2 else 1e-3
    x = x[clear_of_ties(operand(kind, x, tensors), kind.grid(tensors), margin).all(1)][:rows]
    assert len(x) == rows
    if residual:
        tensors["residual"] = randn(rows, kind.out, seed=kind.seed + 20, dtype=kind.dtype)
    return x, tensors, randn(rows, kind.out, seed=kind.seed + 21, dtype=kind.dtype)


def call(function, kind: Kind):
    return lambda x, tensors: quant_linear(function, kind, x, tensors)


def check(device: str, kind: Kind, rows: int = 37, residual: bool = False) -> None:
    x, tensors, grad = inputs(kind, rows, residual)
    right = call(reference.quant_linear, kind)
    exact = run(right, x, tensors, grad, dtype=torch.double)
    by_torch = run(right, x, tensors, grad)
    with triton_only():
        found = run(call(kernels.quant_linear, kind), x, tensors, grad, device)
    terms = 2**kind.bits * float(grad.float().norm())
    assert_all_as_good(found, by_torch, exact, kind.dtype, terms)
    if kind.masked:
        assert not found["weight"].cpu()[~kind.mask()].any()


# The layers of SwinIR-light; q, k and v as one.
LAYERS = {
    "qkv": Kind(60, 180, norm=True),
    "proj": Kind(60, 60),
    "fc1": Kind(60, 120, norm=True, activation="gelu"),
    "fc2": Kind(120, 60),
}


@on_each_device
@pytest.mark.parametrize("name", LAYERS)
def test_the_layers_of_swinir(device, name):
    check(device, LAYERS[name], 67 if name == "proj" else 17, residual=name in ("proj", "fc2"))


@on_each_device
@settings(without_shrinking, max_examples=without_shrinking.max_examples // 4)
@given(
    sizes=st.sampled_from([(12, 20), (10, 3), (28, 12), (7, 33)]),
    transform=st.sampled_from([None, "dct", "random"]),
    dtype=st.sampled_from(TYPES),
    bits=st.sampled_from([(1, 2), (4, 3), (8, 4), (2, 8)]),
    codes=st.sampled_from(reference.CODES),
    options=st.lists(st.booleans(), min_size=6, max_size=6),
    seed=st.integers(0, 99),
)
def test_every_combination(device, sizes, transform, dtype, bits, codes, options, seed):
    channels, masked, norm, bias, gelu, residual = options
    activation = "gelu" if gelu else None
    norm = norm and (
        dtype == torch.float32 or bits[0] <= 2
    )  # with more bits no row is clear of ties
    kind = Kind(
        *sizes, transform, *bits, codes, channels, masked, norm, bias, activation, dtype, seed
    )
    check(device, kind, 37, residual)


@on_each_device
def test_many_rows_and_few_outputs(device):
    # More parts of the operand's sums than the weight has rows: one launch adds up both.
    check(device, Kind(12, 5, norm=True), 200)


@on_each_device
@pytest.mark.parametrize(
    "kind",
    [
        Kind(10, 7, "hadamard-padded", norm=True, activation="gelu"),
        Kind(10, 7, "hadamard-padded", bias=False, masked=False),
        Kind(180, 20, norm=True),
        Kind(150, 20, None, channels=True),
    ],
    ids=["padded", "padded and bare", "wide", "wide, no rotation"],
)
def test_what_the_kernels_do_not_hold_is_composed(device, kind, monkeypatch):
    monkeypatch.setattr(linear, "_linear", None)
    check(device, kind, 19, residual=True)


@pytest.mark.parametrize("transform", ["hadamard", "hadamard-padded", None])
def test_the_reference_is_its_parts(transform):
    size = 12 if transform == "hadamard" else 10
    kind = Kind(size, 6, transform, norm=True, activation="gelu", dtype=torch.double)
    x, tensors, grad = inputs(kind, 23, residual=True)

    def parts(x, tensors):
        x = F.layer_norm(x, (kind.size,), tensors["norm_weight"], tensors["norm_bias"], 1e-3)
        rotation = torch.eye(size).double() if transform is None else kind.rotation()
        x = x @ rotation
        a, w = kind.grid(tensors), kind.weight(tensors)
        x = reference.fake_quantize(x, *a[:4], bits=a.bits)
        weight = reference.fake_quantize(w.values, *w.grid[:4], bits=w.grid.bits) * w.mask
        projection = rotation.mT @ rotation
        return F.gelu(x @ projection @ weight.mT + tensors["bias"]) + tensors["residual"]

    wanted = run(parts, x, tensors, grad, dtype=torch.double)
    found = run(call(reference.quant_linear, kind), x, tensors, grad, dtype=torch.double)
    for name, right in wanted.items():
        torch.testing.assert_close(found[name], right, rtol=1e-9, atol=1e-9, msg=name)


@on_each_device
def test_each_gradient_alone_is_the_one_among_all(device):
    # What is not wanted is not computed, and that must not change the rest.
    kind = Kind(12, 20, norm=True, activation="gelu")
    x, tensors, grad = inputs(kind, 37)
    with triton_only():
        every = run(call(kernels.quant_linear, kind), x, tensors, grad, device)
        for wanted in ("x", "lower", "weight", "weight_upper", "bias", "norm_bias"):
            (leaf,) = leaves([{"x": x, **tensors}[wanted]], device)
            some = {name: t.to(device) for name, t in {"x": x, **tensors}.items()} | {wanted: leaf}
            y = quant_linear(kernels.quant_linear, kind, some.pop("x"), some)
            (found,) = torch.autograd.grad(y, leaf, grad.to(device))
            assert torch.equal(found, every[wanted]), wanted


@on_each_device
def test_strides_leading_shapes_and_no_rows(device):
    kind = Kind(12, 5, norm=True)
    tensors = {name: t.to(device) for name, t in kind.tensors().items()}
    x = randn(12, 4, 9, seed=0).to(device)
    with triton_only():
        for view in (x.permute(1, 2, 0), x.mT.transpose(0, 2)[..., ::2, :], x[:, 0, 0]):
            out = quant_linear(kernels.quant_linear, kind, view, tensors)
            wanted = quant_linear(kernels.quant_linear, kind, view.contiguous(), tensors)
            assert torch.equal(out, wanted)
            assert out.shape == (*view.shape[:-1], 5)
        found = run(
            call(kernels.quant_linear, kind),
            x.new_zeros(0, 3, 12),
            tensors,
            x.new_zeros(0, 3, 5),
            device,
        )
    assert all(not gradient.any() for gradient in found.values())
    shapes = {"y": (0, 3, 5), "x": (0, 3, 12), **{name: t.shape for name, t in tensors.items()}}
    assert {name: tuple(t.shape) for name, t in found.items()} == shapes


@on_each_device
def test_codes_are_a_weight_too(device):
    kind = Kind(12, 20, masked=True)
    x, tensors, grad = inputs(kind, 37)
    grid = kind.weight(tensors).grid
    codes = reference.quantize_codes(tensors["weight"], *grid[:4], bits=grid.bits).to(torch.uint8)
    tensors = {name: t for name, t in tensors.items() if name != "weight"}

    def with_codes(function):
        return lambda x, t: quant_linear(function, kind, x, {**t, "weight": codes.to(x.device)})

    exact = run(with_codes(reference.quant_linear), x, tensors, grad, dtype=torch.double)
    by_torch = run(with_codes(reference.quant_linear), x, tensors, grad)
    with triton_only():
        found = run(with_codes(kernels.quant_linear), x, tensors, grad, device)
    assert_all_as_good(found, by_torch, exact, torch.float32, 2**4 * float(grad.norm()))


@on_each_device
def test_operators_keep_their_promises(device):
    kind = Kind(12, 5, norm=True, activation="gelu")
    x, tensors, grad = inputs(kind, 7)
    x, *values = leaves([x, *tensors.values()], device)
    layer = kind.layer(dict(zip(tensors, values, strict=True)))
    norm = kind.normalization(dict(zip(tensors, values, strict=True)))
    with triton_only():
        found, rules = linear.layer_of(
            x, layer.weight, grid=layer.grid, norm=norm, rotation=layer.rotation, bias=layer.bias
        )
        arguments = linear.flatten(found)
        settings = arguments[1], list(rules), 1e-3
        torch.library.opcheck(linear._linear, (x, arguments[0], grad.to(device), *settings))
        detached = [t.detach() for t in arguments[0]]
        torch.library.opcheck(
            linear._linear_backward,
            (grad.to(device), x.detach(), detached, *settings, [True] * 6),
            test_utils=("test_schema", "test_faketensor"),
        )


@on_each_device
def test_compiles_into_one_graph(device):
    kind = Kind(12, 20, norm=True, activation="gelu")
    x, tensors, grad = inputs(kind, 17)

    rotation, mask = kind.rotation().to(device), kind.mask().to(device)

    def step(x, t):
        a = Grid(*(t[name] for name in SCALARS), 4)
        w = Grid(*(t[f"weight_{name}"] for name in SCALARS), 3)
        norm = LayerNormWeights(t["norm_weight"], t["norm_bias"], 1e-3)
        weight = QuantWeight(t["weight"], w, mask)
        options = {"norm": norm, "rotation": rotation, "bias": t["bias"], "activation": "gelu"}
        return kernels.quant_linear(x, a, weight, **options) * 2

    with triton_only():
        wanted = run(step, x, tensors, grad, device)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        found = run(compiled, x, tensors, grad, device)
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


def test_a_cpu_goes_straight_to_the_reference(monkeypatch):
    monkeypatch.delenv("COMPSRT_KERNELS", raising=False)
    monkeypatch.setattr(linear, "_linear", None)
    kind = Kind(12, 20, norm=True)
    x, tensors, _ = inputs(kind, 5)
    tensors = {name: t.double() for name, t in tensors.items()}
    assert quant_linear(kernels.quant_linear, kind, x.double(), tensors).dtype == torch.float64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotation": torch.zeros(10, 12)}, r"rotation: \(10, 12\) does not fit x \(3, 12\)"),
        ({"rotation": torch.zeros(12, 16)}, "of 12 do not fit operands of 16, x's last axis rotated"),
        ({"bias": torch.zeros(4)}, r"bias: its shape is \(4,\); it needs \(5,\)"),
        ({"residual": torch.zeros(5)}, r"residual: its shape is \(5,\); it needs \(3, 5\)"),
        ({"residual": torch.zeros(3, 5).half()}, "residual: it is torch.float16; convert it to x's"),
        ({"activation": "relu"}, "activation: 'relu' is unknown; one of None, 'gelu'"),
        ({"norm": LayerNormWeights(torch.ones(5), torch.ones(5))}, r"norm: its shape is \(5,\)"),
        ({"x": torch.zeros(3, 12).int()}, r"x: (it is|no kernel for) torch.int32"),
        ({"x": torch.zeros(3, 13)}, "weight: 5 rows of 12 do not fit operands of 13"),
        ({"grid": Grid(torch.zeros(()), torch.ones(()), None, None, 9)}, "bits: 9"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
@pytest.mark.parametrize("path", ["reference", pytest.param("triton", marks=DEVICES[0].marks)])
def test_what_does_not_fit_is_refused(monkeypatch, path, changes, message):
    monkeypatch.setenv("COMPSRT_KERNELS", path)
    kind = Kind(12, 5, None)
    tensors = kind.tensors()
    arguments = {
        "x": torch.zeros(3, 12),
        "grid": kind.grid(tensors),
        "weight": kind.weight(tensors),
    }
    with pytest.raises(ValueError, match=message):
        kernels.quant_linear(**{**arguments, **changes})


@pytest.mark.gpu
def test_twenty_runs_are_the_same_bits():
    kind = Kind(60, 120, norm=True, activation="gelu")
    tensors = kind.tensors()
    x, grad = randn(20000, 60, seed=0), randn(20000, 120, seed=1)
    with triton_only():
        runs = [run(call(kernels.quant_linear, kind), x, tensors, grad, "cuda") for _ in range(20)]
    for other in runs[1:]:
        assert all(torch.equal(other[name], value) for name, value in runs[0].items())


# --- Several layers of one x ---------------------------------------------------------------------


def three_layers(transform: str | None, dtype: torch.dtype = torch.double):
    kinds = [Kind(12, 8, transform, dtype=dtype, seed=seed) for seed in (0, 30, 60)]
    layers = []
    for kind in kinds:
        tensors = {name: t.to(dtype) for name, t in kind.tensors().items()}
        grid, weight = kind.grid(tensors), kind.weight(tensors)
        layers.append(reference.QuantLayer(grid, weight, tensors["bias"]))
    return layers, kinds[0].rotation()


@pytest.mark.parametrize("transform", [None, "hadamard", "hadamard-padded"])
def test_layers_of_one_x_are_the_layers_one_by_one(transform):
    layers, rotation = three_layers(transform)
    x = randn(2, 5, 12, seed=1, dtype=torch.double)
    norm = LayerNormWeights(torch.rand(12).double(), torch.rand(12).double())
    together = kernels.quant_linears(x, layers, norm=norm, rotation=rotation)
    for layer, y in zip(layers, together, strict=True):
        alone = reference.quant_linear(
            x, layer.grid, layer.weight, norm=norm, rotation=rotation, bias=layer.bias
        )
        torch.testing.assert_close(y, alone, rtol=1e-12, atol=1e-12)


@on_each_device
def test_layers_of_one_x_run_kernels(device):
    layers, rotation = three_layers("hadamard", torch.float32)
    x = randn(9, 12, seed=1).to(device)
    on_device = []
    for grid, weight, bias, _ in layers:
        grid = Grid(*(s.to(device) for s in grid[:4]), *grid[4:])
        weight_grid = Grid(*(s.to(device) for s in weight.grid[:4]), *weight.grid[4:])
        moved = QuantWeight(weight.values.to(device), weight_grid, weight.mask.to(device))
        on_device.append(reference.QuantLayer(grid, moved, bias.to(device)))
    with triton_only():
        together = kernels.quant_linears(x, on_device, rotation=rotation.to(device))
        alone = [
            kernels.quant_linear(x, l.grid, l.weight, rotation=rotation.to(device), bias=l.bias)
            for l in on_device
        ]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one, other)


def test_layers_of_one_x_share_their_rotation():
    layers, rotation = three_layers("hadamard")
    x = randn(3, 12, seed=1, dtype=torch.double)
    with pytest.raises(ValueError, match="layers: pass at least one"):
        kernels.quant_linears(x, [])
    with pytest.raises(ValueError, match="they share the argument rotation"):
        kernels.quant_linears(x, [layers[0]._replace(rotation=rotation)])


@pytest.mark.parametrize("with_mask", [False, True])
def test_a_weight_that_is_quantized_already_needs_no_grid(with_mask):
    """What layers with scales finer than a row pass on: same result, same gradients, no codes."""
    x, values = torch.randn(5, 7, 12), torch.randn(6, 12)
    mask = torch.rand(6, 12) > 0.5 if with_mask else None
    grid = kernels.Grid(torch.tensor(-1.5), torch.tensor(2.0), None, None, 3)
    found = []
    for path in (contextlib.nullcontext, triton_only):
        leaves = [t.clone().requires_grad_() for t in (x, values)]
        with path():
            layer = kernels.QuantLayer(grid, kernels.QuantWeight(leaves[1], None, mask))
            y = kernels.quant_linear(leaves[0], grid, layer.weight)
            z = kernels.quant_mlp(leaves[0], layer, layer._replace(weight=layer.weight._replace(
                values=leaves[1].new_ones(4, 6), mask=None)))  # fmt: skip
        (y.square().sum() + z.square().sum()).backward()
        found.append([y, z, *(leaf.grad for leaf in leaves)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="codes need a grid"):
        kernels.quant_linear(x, grid, kernels.QuantWeight(values.to(torch.uint8), None))
    with pytest.raises(ValueError, match="it has no grid"):
        kernels.pack_weight(kernels.QuantWeight(values, None))
