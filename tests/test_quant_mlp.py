"""quant_mlp: two layers in one kernel, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import SCALARS, Kind, assert_all_as_good, clear_of_ties, operand, quant_linear, run
from shapes import DEVICES, TYPES, leaves, randn, triton_only, without_shrinking

from compsrt import kernels
from compsrt.kernels import linear, mlp, reference
from compsrt.kernels.reference import Grid, LayerNormWeights, QuantLayer, QuantWeight

on_each_device = pytest.mark.parametrize("device", DEVICES)


def split(tensors):
    """The tensors of fc1 and of fc2, which are called as in `Kind.tensors` but for a prefix."""
    return [
        {name[4:]: t for name, t in tensors.items() if name.startswith(layer)}
        for layer in ("fc1_", "fc2_")
    ]


def call(function, kinds: tuple[Kind, Kind], residual: bool = False):
    def both(x, tensors):
        first, second = split(tensors)
        return function(
            x,
            kinds[0].layer(first),
            kinds[1].layer(second),
            norm=kinds[0].normalization(first),
            residual=residual,
        )

    return both


def inputs(kinds: tuple[Kind, Kind], rows: int):
    """x with rows clear of the ties of both layers, their tensors, and the gradient of the output."""
    first, second = kinds[0].tensors(), kinds[1].tensors()
    x = randn(20 * rows + 500, kinds[0].size, seed=kinds[0].seed, dtype=kinds[0].dtype)
    clear = clear_of_ties(operand(kinds[0], x, first), kinds[0].grid(first)).all(1)
    exact = {name: t.double() for name, t in first.items()}
    hidden = quant_linear(
        reference.quant_linear, kinds[0]._replace(activation="gelu"), x.double(), exact
    )
    clear &= clear_of_ties(operand(kinds[1], hidden, second), kinds[1].grid(second), 1e-4).all(1)
    x = x[clear][:rows]
    assert len(x) == rows
    tensors = {f"fc1_{name}": t for name, t in first.items()}
    tensors.update((f"fc2_{name}", t) for name, t in second.items())
    return x, tensors, randn(rows, kinds[1].out, seed=kinds[0].seed + 1, dtype=kinds[0].dtype)


def check(device, kinds: tuple[Kind, Kind], rows: int, residual: bool) -> None:
    x, tensors, grad = inputs(kinds, rows)
    right = call(reference.quant_mlp, kinds, residual)
    exact = run(right, x, tensors, grad, dtype=torch.double)
    by_torch = run(right, x, tensors, grad)
    with triton_only():
        found = run(call(kernels.quant_mlp, kinds, residual), x, tensors, grad, device)
    terms = 2 ** max(kind.bits for kind in kinds) * float(grad.float().norm())
    assert_all_as_good(found, by_torch, exact, kinds[0].dtype, terms)


@on_each_device
def test_that_of_swinir(device):
    check(device, (Kind(60, 120, norm=True), Kind(120, 60, seed=9)), 17, residual=True)


@on_each_device
@settings(without_shrinking, max_examples=without_shrinking.max_examples // 5)
@given(
    sizes=st.sampled_from([(12, 20, 12), (10, 17, 10), (7, 12, 7)]),
    transforms=st.sampled_from([(None, None), ("dct", None), (None, "dct"), ("random", "dct")]),
    bits=st.sampled_from([(4, 3), (8, 4), (2, 8)]),
    codes=st.sampled_from(reference.CODES),
    options=st.lists(st.booleans(), min_size=5, max_size=5),
    seed=st.integers(0, 99),
)
def test_every_combination(device, sizes, transforms, bits, codes, options, seed):
    channels, masked, norm, bias, residual = options
    rest = (*bits, codes, channels, masked)
    first = Kind(*sizes[:2], transforms[0], *rest, norm, bias, seed=seed)
    second = Kind(*sizes[1:], transforms[1], *rest, False, not bias, seed=seed + 30)
    check(device, (first, second), 37, residual)


@on_each_device
@pytest.mark.parametrize("dtype", TYPES[1:], ids=str)
def test_half_types(device, dtype):
    # The quantizer of the hidden tokens sees what a half type has rounded: a code of two bits that
    # rounds the other way would outweigh all else, one of eight does not.
    first = Kind(12, 20, "dct", 8, dtype=dtype)
    check(device, (first, Kind(20, 12, "dct", 8, dtype=dtype, seed=9)), 37, residual=True)


@on_each_device
@pytest.mark.parametrize(
    "kinds",
    [
        (Kind(10, 20, "hadamard-padded", norm=True), Kind(20, 10, seed=9)),
        (Kind(10, 20, "dct"), Kind(20, 10, "hadamard-padded", seed=9)),
        (Kind(12, 180), Kind(180, 12, bits=6, seed=9)),
    ],
    ids=["padded", "padded in the middle", "wide"],
)
def test_what_the_kernel_does_not_hold_is_composed(device, kinds, monkeypatch):
    monkeypatch.setattr(mlp, "_quant_mlp", None)
    check(device, kinds, 5, residual=True)


def test_the_reference_is_its_parts():
    kinds = Kind(12, 20, norm=True, dtype=torch.double), Kind(20, 12, dtype=torch.double, seed=9)
    x, tensors, grad = inputs(kinds, 19)

    def parts(x, tensors):
        rest = x
        for kind, t in zip(kinds, split(tensors), strict=True):
            if kind.norm:
                x = F.layer_norm(x, (kind.size,), t["norm_weight"], t["norm_bias"], 1e-3)
            a, w = kind.grid(t), kind.weight(t)
            x = reference.fake_quantize(x @ kind.rotation(), *a[:4], bits=a.bits)
            weight = reference.fake_quantize(w.values, *w.grid[:4], bits=w.grid.bits) * w.mask
            x = x @ weight.mT + t["bias"]
            x = F.gelu(x) if kind is kinds[0] else x
        return x + rest

    wanted = run(parts, x, tensors, grad, dtype=torch.double)
    found = run(call(reference.quant_mlp, kinds, True), x, tensors, grad, dtype=torch.double)
    for name, right in wanted.items():
        torch.testing.assert_close(found[name], right, rtol=1e-9, atol=1e-9, msg=name)


SMALL = Kind(12, 8, norm=True), Kind(8, 12, seed=9)


@on_each_device
def test_each_gradient_alone_is_the_one_among_all(device):
    x, tensors, grad = inputs(SMALL, 37)
    both = call(kernels.quant_mlp, SMALL, True)
    with triton_only():
        every = run(both, x, tensors, grad, device)
        for wanted in ("x", "fc1_lower", "fc1_norm_bias", "fc2_weight", "fc2_upper", "fc2_bias"):
            (leaf,) = leaves([{"x": x, **tensors}[wanted]], device)
            some = {name: t.to(device) for name, t in {"x": x, **tensors}.items()} | {wanted: leaf}
            y = both(some.pop("x"), some)
            (found,) = torch.autograd.grad(y, leaf, grad.to(device))
            assert torch.equal(found, every[wanted]), wanted


@on_each_device
def test_strides_leading_shapes_and_no_rows(device):
    tensors = inputs(SMALL, 1)[1]
    both = call(kernels.quant_mlp, SMALL, True)
    there = {name: t.to(device) for name, t in tensors.items()}
    x = randn(12, 4, 9, seed=0).to(device)
    with triton_only():
        for view in (x.permute(1, 2, 0), x.mT.transpose(0, 2)[..., ::2, :], x[:, 0, 0]):
            assert torch.equal(both(view, there), both(view.contiguous(), there))
            assert both(view, there).shape == view.shape
        found = run(both, x.new_zeros(0, 3, 12), tensors, x.new_zeros(0, 3, 12), device)
    shapes = {"y": (0, 3, 12), "x": (0, 3, 12), **{n: tuple(t.shape) for n, t in tensors.items()}}
    assert {name: tuple(t.shape) for name, t in found.items()} == shapes
    assert all(not gradient.any() for gradient in found.values())


@on_each_device
def test_operators_keep_their_promises(device):
    x, tensors, grad = inputs(SMALL, 7)
    x, *values = leaves([x, *tensors.values()], device)
    first, second = split(dict(zip(tensors, values, strict=True)))
    fc1, fc2 = SMALL[0].layer(first), SMALL[1].layer(second)
    with triton_only():
        flat, present, rules = [], [], []
        for layer, activation, norm in (
            (fc1, "gelu", SMALL[0].normalization(first)),
            (fc2, None, None),
        ):
            found, numbers = linear.layer_of(
                x,
                layer.weight,
                grid=layer.grid,
                norm=norm,
                rotation=layer.rotation,
                bias=layer.bias,
                activation=activation,
            )
            tensors_of, which = linear.flatten(found)
            flat, present, rules = flat + tensors_of, present + which, rules + list(numbers)
        settings = present, rules, 1e-3, True
        torch.library.opcheck(mlp._quant_mlp, (x, flat, *settings))
        detached = [t.detach() for t in flat]
        torch.library.opcheck(
            mlp._quant_mlp_backward,
            (grad.to(device), x.detach(), detached, *settings, [True] * 7 + [False] + [True] * 4),
            test_utils=("test_schema", "test_faketensor"),
        )


@on_each_device
def test_compiles_into_one_graph(device):
    x, tensors, grad = inputs(SMALL, 5)
    constants = [(kind.rotation().to(device), kind.mask().to(device)) for kind in SMALL]

    def step(x, tensors):
        layers = []
        for (rotation, mask), prefix in zip(constants, ("fc1_", "fc2_"), strict=True):
            a = Grid(*(tensors[prefix + name] for name in SCALARS), 4)
            w = Grid(*(tensors[f"{prefix}weight_{name}"] for name in SCALARS), 3)
            weight = QuantWeight(tensors[prefix + "weight"], w, mask)
            layers.append(QuantLayer(a, weight, tensors[prefix + "bias"], rotation))
        norm = LayerNormWeights(tensors["fc1_norm_weight"], tensors["fc1_norm_bias"], 1e-3)
        return kernels.quant_mlp(x, *layers, norm=norm, residual=True) * 2

    with triton_only():
        wanted = run(step, x, tensors, grad, device)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        found = run(compiled, x, tensors, grad, device)
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


def test_a_cpu_goes_straight_to_the_reference(monkeypatch):
    monkeypatch.delenv("COMPSRT_KERNELS", raising=False)
    monkeypatch.setattr(mlp, "_quant_mlp", None)
    x, tensors, _ = inputs(SMALL, 5)
    tensors = {name: t.double() for name, t in tensors.items()}
    assert call(kernels.quant_mlp, SMALL)(x.double(), tensors).dtype == torch.float64


@pytest.mark.parametrize("path", ["reference", pytest.param("triton", marks=DEVICES[0].marks)])
def test_what_does_not_fit_is_refused(monkeypatch, path):
    monkeypatch.setenv("COMPSRT_KERNELS", path)
    first, second = split(inputs(SMALL, 1)[1])
    fc1, fc2 = SMALL[0].layer(first), SMALL[1].layer(second)
    x = torch.zeros(3, 12)
    with pytest.raises(ValueError, match="weight: 12 rows of 8 do not fit operands of 12"):
        kernels.quant_mlp(x, fc2._replace(rotation=None), fc2)
    with pytest.raises(ValueError, match="weight: 8 rows of 12 do not fit operands of 8"):
        kernels.quant_mlp(x, fc1, fc1._replace(rotation=None))
    with pytest.raises(ValueError, match=r"bias: its shape is \(8,\); it needs \(12,\)"):
        kernels.quant_mlp(x, fc1, fc2._replace(bias=fc1.bias))
    weight = fc2.weight
    narrow = QuantWeight(weight.values[:7], weight.grid, weight.mask[:7])
    with pytest.raises(ValueError, match=r"residual: its shape is \(3, 12\); it needs \(3, 7\)"):
        kernels.quant_mlp(x, fc1, fc2._replace(weight=narrow, bias=None), residual=True)


@pytest.mark.gpu
def test_twenty_runs_are_the_same_bits():
    kinds = Kind(60, 120, norm=True), Kind(120, 60, seed=9)
    tensors = inputs(kinds, 1)[1]
    x, grad = randn(20000, 60, seed=0), randn(20000, 60, seed=1)
    both = call(kernels.quant_mlp, kinds, True)
    with triton_only():
        runs = [run(both, x, tensors, grad, "cuda") for _ in range(20)]
    for other in runs[1:]:
        assert all(torch.equal(other[name], value) for name, value in runs[0].items())
