"""Quantization-aware training: weights and ranges learn, stay sound, resume and pack exactly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import tiny_swinir

import compsrt
from compsrt.checkpoint import save_packed
from compsrt.models.sesr import SESR, SESRConfig, luma
from compsrt.quant_training import QuantTraining
from compsrt.quantization import QuantSpec
from compsrt.quantizers import WeightQuantizer, quantizers, round_to_storage

CONFIG = SESRConfig(blocks=2, features=4)


def objective(bits: int = 4, **options) -> QuantTraining:
    torch.manual_seed(0)
    spec = QuantSpec(bits=bits, method="qat", **options)
    quantized = compsrt.quantize(SESR(CONFIG), spec, torch.rand(2, 3, 16, 16))
    return QuantTraining(quantized, weight_rate=0.05)


def step(training: QuantTraining, seed: int, rate: float = 0.05) -> float:
    torch.manual_seed(seed)
    lr = torch.rand(2, 3, 12, 12)
    hr = F.interpolate(lr, scale_factor=2, mode="bilinear")
    for group in training.optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]
    training.optimizer.zero_grad()
    loss = training.losses(lr, hr)["loss"]
    loss.backward()
    training.update()
    return float(loss.detach())


def test_weights_ranges_and_biases_learn_and_the_loss_falls():
    training = objective()
    before = {name: p.detach().clone() for name, p in training.trained().items()}
    kinds = {name.rpartition(".")[2] for name in before}
    assert kinds == {"rotated", "upper", "lower", "bias", "weight"}  # "weight" is PReLU's
    losses = [step(training, seed) for seed in range(60)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    still = [name for name, p in training.trained().items() if torch.equal(p, before[name])]
    assert not still
    for quantizer in training.sites:
        assert torch.isfinite(quantizer.step).all() and (quantizer.step > 0).all()


def test_it_trains_on_luma_against_the_true_picture():
    training = objective()
    lr, hr = torch.rand(1, 3, 8, 8), torch.rand(1, 3, 16, 16)
    expected = F.l1_loss(training.network(luma(lr)), luma(hr))
    torch.testing.assert_close(training.losses(lr, hr)["loss"], expected)


def test_it_follows_the_float_network_where_asked_to():
    training = objective()
    teacher = SESR(CONFIG).eval().requires_grad_(False)
    following = QuantTraining(training.network, teacher, weight_rate=0.05)
    lr = torch.rand(1, 3, 8, 8)
    expected = F.mse_loss(following.network(luma(lr)), teacher(luma(lr)))
    found = following.losses(lr, torch.full((1, 3, 16, 16), torch.nan))["loss"]
    torch.testing.assert_close(found, expected)


def test_pictures_keep_their_range():
    training = objective()
    for seed in range(5):
        step(training, seed)
    for name in ("body.image", "body.output"):
        site = quantizers(training.network)[name]
        assert (float(site.lower), float(site.upper)) == (0.0, 1.0)


def test_a_resumed_run_is_the_uninterrupted_one():
    whole, first, second = objective(), objective(), objective()
    for seed in range(6):
        step(whole, seed)
    for seed in range(3):
        step(first, seed)
    second.load_state_dict(first.state_dict())
    for seed in range(3, 6):
        step(second, seed)
    for name, tensor in whole.learned().items():
        assert torch.equal(tensor, second.learned()[name]), name


def test_pruned_weights_stay_zero_and_the_result_packs_exactly(tmp_path):
    training = objective(pruning=0.5)
    for seed in range(3):
        step(training, seed)
    model = training.model
    round_to_storage(model)
    for site in quantizers(model).values():
        if isinstance(site, WeightQuantizer):
            assert site.mask is not None and (site()[~site.mask] == 0).all()
    save_packed(model, tmp_path / "q.safetensors")
    x = torch.rand(1, 3, 9, 7)
    with torch.no_grad():
        assert torch.equal(compsrt.load(tmp_path / "q.safetensors")(x), model(x))


def test_swinir_blocks_train_their_weights_too():
    torch.manual_seed(0)
    spec = QuantSpec(bits=4, method="qat", transform="hadamard")
    quantized = compsrt.quantize(tiny_swinir(), spec, torch.rand(1, 3, 16, 16))
    training = QuantTraining(quantized, weight_rate=0.05)
    before = {name: p.detach().clone() for name, p in training.trained().items()}
    step(training, 0)
    moved = {n for n, p in training.trained().items() if not torch.equal(p, before[n])}
    assert any(name.endswith("rotated") for name in moved)


def test_what_cannot_be_trained_is_named():
    spec = QuantSpec(bits=4, method="qat")
    with pytest.raises(ValueError, match=r"body\.image is not calibrated"):
        QuantTraining(compsrt.quantize(SESR(CONFIG), spec), weight_rate=1.0)
    site = next(
        s for s in quantizers(objective().network).values() if isinstance(s, WeightQuantizer)
    )
    site.freeze()
    with pytest.raises(ValueError, match="packed weight cannot be trained"):
        site.train_weight()
