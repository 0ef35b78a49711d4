import pytest
import torch
from networks import tiny_swinir

import compsrt
from compsrt.distillation import Distillation, StepAdam, _distance
from compsrt.quantization import QuantSpec


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
