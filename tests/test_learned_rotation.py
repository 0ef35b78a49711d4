"""Learned rotations: orthonormal whatever their entries, exact gradients, packed exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import tiny_swinir

import compsrt
from compsrt import kernels
from compsrt.checkpoint import save_packed
from compsrt.distillation import Distillation
from compsrt.learned_rotation import WHOLE, LearnedRotation, factors
from compsrt.models.quant_swinir import _rotated
from compsrt.quantization import QuantSpec
from compsrt.quantizers import WeightQuantizer, named_quantizers, round_to_storage


def student(bits: int = 3, **fields):
    torch.manual_seed(0)
    teacher = tiny_swinir()
    spec = QuantSpec(**{"bits": bits, "transform": "learned", **fields})
    return teacher, compsrt.quantize(teacher, spec, torch.rand(2, 3, 16, 16))


def train(objective, steps: int, rate: float = 0.03) -> list[float]:
    losses = []
    for number in range(steps):
        x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(number))
        for group in objective.optimizer.param_groups:
            group["lr"] = rate * group["lr_factor"]
        objective.optimizer.zero_grad()
        loss = objective.losses(x)["loss"]
        loss.backward()
        objective.update()
        losses.append(float(loss.detach()))
    return losses


@given(order=st.integers(1, 130), size=st.floats(0, 30))
def test_it_is_orthonormal_whatever_its_entries(order, size):
    turn = LearnedRotation(order)
    torch.manual_seed(order)
    torch.nn.init.normal_(turn.angles, std=size)
    matrix = turn().detach()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(order), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("order", "sizes"), [(60, (6, 10)), (120, (10, 12)), (10, (10, 1))])
def test_it_starts_as_the_identity_with_few_entries(order, sizes):
    turn = LearnedRotation(order)
    assert torch.equal(turn(), torch.eye(order))
    assert factors(order) == sizes
    assert turn.angles.numel() == sum(n * (n - 1) // 2 for n in sizes)
    assert order <= WHOLE or turn.angles.numel() < order * (order - 1) / 16


def test_its_gradient_is_exact():
    turn = LearnedRotation(20).double()
    torch.nn.init.normal_(turn.angles, std=0.5)
    direction = torch.randn(20, 20, dtype=torch.float64)

    def value(angles):
        return (torch.func.functional_call(turn, {"angles": angles}, ()) * direction).sum()

    assert torch.autograd.gradcheck(value, turn.angles.detach().requires_grad_())


def test_at_the_start_it_is_the_hadamard_transform():
    # Heads of 12 have a Hadamard matrix too, so every site of the network has one.
    _, learned = student()
    _, hadamard = student(transform="hadamard")
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(learned(x), hadamard(x))


def turned(model, size: float = 0.3):
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, LearnedRotation):
            torch.nn.init.normal_(module.angles, std=size)
    return model


def test_the_network_is_the_same_function_with_and_without_gradients():
    _, model = student(storage="float32")
    model = turned(model.double())
    x = torch.rand(1, 3, 16, 16).double()
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-9)


def test_rotations_leave_the_float_product_as_it_is():
    teacher, model = student(storage="float32")
    model = turned(model.double())
    x = torch.rand(1, 3, 16, 16).double()
    for _, site in named_quantizers(model):
        site.observer = lambda site, x: None
    with torch.no_grad():
        expected = copy.deepcopy(teacher).double()(x)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)


def test_angles_are_learned_and_stay_orthonormal():
    teacher, model = student(train_weights=("weights",))
    objective = Distillation(model, teacher, weight_rate=0.3)
    angles = [name for name in objective.trained() if name.endswith("angles")]
    assert len(angles) == 2 * 6
    losses = train(objective, 25)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    for module in model.modules():
        if isinstance(module, LearnedRotation):
            matrix = module().detach()
            assert module.angles.abs().max() > 0
            torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix)), atol=1e-6, rtol=0)


def test_both_operands_give_the_angles_their_gradient():
    _, model = student(storage="float32")
    layer = turned(model.double()).layers[0].blocks[0].fc2
    x = torch.randn(2, 5, 48, dtype=torch.float64)
    matrix = layer.weight.turn().detach().requires_grad_()
    sites = [
        (x @ (layer.start @ matrix), layer.input),
        (layer.weight.rotated @ matrix, layer.weight),
    ]
    left, right = (
        kernels.fake_quantize(value, *site.grid()[:4], bits=site.bits) for value, site in sites
    )
    direction = torch.randn(2, 5, 24, dtype=torch.float64)
    (of_matrix,) = torch.autograd.grad(((left @ right.T) * direction).sum(), matrix)
    angles = layer.weight.turn.angles
    (expected,) = torch.autograd.grad((layer.weight.turn() * of_matrix).sum(), angles)
    tokens, norm, rotation = _rotated(x, None, layer.rotation)
    assert norm is None and rotation is None  # no op differentiates by a rotation
    y = kernels.quant_linear(tokens, **layer.layer()._replace(rotation=None, bias=None)._asdict())
    (gradient,) = torch.autograd.grad((y * direction).sum(), angles)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("fields", [{}, {"train_weights": ("weights",), "pruning": 0.4}])
def test_a_learned_model_packs_exactly_and_takes_few_bytes(fields, tmp_path):
    teacher, model = student(**fields)
    objective = Distillation(model, teacher, weight_rate=0.3, average=0.9)
    train(objective, 3)
    trained = objective.model
    round_to_storage(trained)
    for _, site in named_quantizers(trained):
        if isinstance(site, WeightQuantizer) and site.mask is not None:
            assert (site()[~site.mask] == 0).all()
    save_packed(trained, tmp_path / "learned.safetensors")
    loaded = compsrt.load(tmp_path / "learned.safetensors", arithmetic="reference")
    x = torch.rand(1, 3, 9, 14)
    with torch.no_grad():
        assert torch.equal(loaded(x), trained(x))
    save_packed(student(transform="hadamard", **fields)[1], tmp_path / "hadamard.safetensors")
    more = (tmp_path / "learned.safetensors").stat().st_size
    more -= (tmp_path / "hadamard.safetensors").stat().st_size
    entries = sum(m.angles.numel() for m in model.modules() if isinstance(m, LearnedRotation))
    assert more < 2 * entries + 64  # float16, and what the header grows by
