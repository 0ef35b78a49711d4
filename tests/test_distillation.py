import pytest
import torch
from networks import tiny_swinir

import compsrt
from compsrt.checkpoint import save_packed
from compsrt.distillation import Distillation, _distance
from compsrt.quant_training import StepAdam
from compsrt.quantization import TRAINED_KINDS, QuantSpec
from compsrt.quantizers import WeightQuantizer, round_to_storage


def student(method="compsrt", **fields):
    model = tiny_swinir()
    spec = QuantSpec(bits=3, method=method, **fields)
    return model, compsrt.quantize(model, spec, torch.rand(2, 3, 16, 16))


def test_step_adam_is_adam_measured_in_units():
    units = [torch.tensor(0.01), torch.tensor([1.0, 100.0])]
    ours = [torch.nn.Parameter(torch.tensor(1.0)), torch.nn.Parameter(torch.tensor([2.0, 3.0]))]
    theirs = [torch.nn.Parameter(p.detach() / u) for p, u in zip(ours, units, strict=True)]
    one = StepAdam(ours, units, lr=0.1)
    other = torch.optim.Adam(theirs, lr=0.1, betas=(0.9, 0.99), eps=1e-12)
    for step in range(5):
        for p, q, u in zip(ours, theirs, units, strict=True):
            p.grad = torch.sin(p.detach() / u + step)
            q.grad = torch.sin(q.detach() + step)
        one.step()
        other.step()
        for p, q, u in zip(ours, theirs, units, strict=True):
            torch.testing.assert_close(p / u, q)


def test_features_are_compared_per_sample_and_scale_free():
    ours, theirs = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    want = torch.stack(
        [(a / a.norm() - b / b.norm()).square().sum() for a, b in zip(ours, theirs, strict=True)]
    ).mean()
    torch.testing.assert_close(_distance(ours, theirs), want)
    scales = torch.tensor([1.0, 10.0, 0.1]).view(3, 1, 1, 1)
    torch.testing.assert_close(_distance(scales * ours, theirs), want)
    assert _distance(theirs, theirs) == 0


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("2dquant", {"lower", "upper"}),
        ("lsq+", {"alpha", "beta"}),
        ("compsrt", {"lower", "upper", "alpha", "beta"}),
    ],
)
def test_only_the_scalars_of_the_method_get_gradients_and_they_help(method, names):
    teacher, model = student(method)
    objective = Distillation(model, teacher)
    for group in objective.optimizer.param_groups:
        group["lr"] = 0.02
    x = torch.rand(2, 3, 16, 16)
    losses = []
    for _ in range(30):
        model.zero_grad()
        terms = objective.losses(x)
        terms["loss"].backward()
        torch.testing.assert_close(terms["loss"], terms["pixel"] + terms["feature"])
        objective.update()
        losses.append(float(terms["loss"].detach()))
    with_gradient = {
        n.rpartition(".")[2] for n, p in model.named_parameters() if p.grad is not None
    }
    assert with_gradient == names
    assert min(losses[-5:]) < 0.97 * losses[0]
    assert not any(hook for m in model.modules() for hook in m._forward_hooks.values())


def test_terms_are_of_comparable_size():
    teacher, model = student()
    terms = Distillation(model, teacher).losses(torch.rand(2, 3, 16, 16))
    assert 0.01 < float(terms["feature"].detach() / terms["pixel"].detach()) < 100


def test_what_cannot_be_distilled_is_refused():
    model = tiny_swinir()
    with pytest.raises(ValueError, match="not calibrated"):
        Distillation(compsrt.quantize(model, QuantSpec()), model)
    with pytest.raises(ValueError, match="learns nothing"):
        Distillation(
            compsrt.quantize(model, QuantSpec(method="dobi"), torch.rand(1, 3, 16, 16)), model
        )


# --- Trained weights ------------------------------------------------------------------------------


def train(objective, steps, rate=0.02):
    for number in range(steps):
        generator = torch.Generator().manual_seed(number)
        lr = torch.rand(2, 3, 16, 16, generator=generator)
        hr = torch.nn.functional.interpolate(lr, scale_factor=2)
        for group in objective.optimizer.param_groups:
            group["lr"] = rate * group["lr_factor"]
        objective.optimizer.zero_grad()
        terms = objective.losses(lr, hr)
        terms["loss"].backward()
        objective.update()
    return terms


# What a name of each kind ends with, and how many a tiny network has.
KINDS = {
    "weights": (".rotated", 2 * 6),
    "biases": (".bias", 2 * 6),
    "norms": ("norm", 2 * 4 + 4),
    "tables": ("table", 2),
    "convolutions": ("conv", 2 * 4),
}


@pytest.mark.parametrize("kind", TRAINED_KINDS)
def test_each_kind_of_float_tensors_is_trained_when_asked_for_and_moves(kind):
    teacher, model = student(train_weights=(kind,))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    before |= {name: p.clone() for name, p in model.named_buffers() if name.endswith("rotated")}
    objective = Distillation(model, teacher)
    scalars = {"lower", "upper", "alpha", "beta"}
    trained = {n: p for n, p in objective.trained().items() if n.rpartition(".")[2] not in scalars}
    what, count = KINDS[kind]
    assert len(trained) == count
    words = ("conv", "upsample") if kind == "convolutions" else (what,)
    assert all(any(word in name for word in words) for name in trained)
    train(objective, 2)
    still = [name for name, p in trained.items() if torch.equal(p, before[name])]
    assert not still
    fixed = before.keys() - objective.trained().keys()
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], before[name]) for name in fixed if name in now)


def test_trained_weights_lower_the_loss_further_than_scalars_alone():
    finals = {}
    for kinds in ((), TRAINED_KINDS):
        teacher, model = student(train_weights=kinds, per_channel=True)
        objective = Distillation(model, teacher, weight_rate=1.0)
        finals[kinds] = float(train(objective, 30)["loss"].detach())
    assert finals[TRAINED_KINDS] < 0.9 * finals[()]


def test_a_float_tensor_moves_by_parts_of_its_root_mean_square():
    teacher, model = student(train_weights=("weights",))
    objective = Distillation(model, teacher, weight_rate=0.1)
    weights = [q for q in objective.sites if isinstance(q, WeightQuantizer)]
    before = [q.rotated.detach().clone() for q in weights]
    train(objective, 1, rate=0.02)
    for quantizer, old in zip(weights, before, strict=True):
        largest = (quantizer.rotated.detach() - old).abs().max() / old.square().mean().sqrt()
        torch.testing.assert_close(float(largest), 0.1 * 0.02, rtol=1e-3, atol=0)


def test_the_average_is_kept_and_follows():
    teacher, model = student(train_weights=TRAINED_KINDS)
    objective = Distillation(model, teacher, average=0.9)
    assert objective.model is not model
    start = {name: t.clone() for name, t in objective.learned().items()}
    train(objective, 1)
    now = dict(objective.network.named_parameters())
    decay = 2 / 11  # (1 + n)/(10 + n) of the first update
    for name, averaged in objective.learned().items():
        torch.testing.assert_close(averaged, torch.lerp(start[name], now[name], 1 - decay))
    assert Distillation(student()[1], teacher).model is not objective.model


def test_the_true_picture_is_a_term_where_asked_for():
    teacher, model = student()
    lr, hr = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 32, 32)
    terms = Distillation(model, teacher, picture_weight=0.5).losses(lr, hr)
    assert float(terms["picture"].detach()) == pytest.approx(
        float((model(lr) - hr).abs().mean().detach())
    )
    total = terms["pixel"] + terms["feature"] + 0.5 * terms["picture"]
    torch.testing.assert_close(terms["loss"], total)


@pytest.mark.parametrize(
    "fields", [{"pruning": 0.5, "per_head": True}, {"pruning": 0.5, "pruning_pattern": "2:4"}]
)
def test_pruned_weights_stay_zero_and_the_trained_model_packs_exactly(fields, tmp_path):
    teacher, model = student(train_weights=TRAINED_KINDS, per_channel=True, **fields)
    objective = Distillation(model, teacher, average=0.9)
    train(objective, 3)
    trained = objective.model
    round_to_storage(trained)
    for module in trained.modules():
        if isinstance(module, WeightQuantizer):
            assert module.mask is not None and (module()[~module.mask] == 0).all()
    save_packed(trained, tmp_path / "trained.safetensors")
    loaded = compsrt.load(tmp_path / "trained.safetensors", arithmetic="reference")
    assert loaded.spec == model.spec
    x = torch.rand(1, 3, 9, 14)
    with torch.no_grad():
        assert torch.equal(loaded(x), trained(x))
