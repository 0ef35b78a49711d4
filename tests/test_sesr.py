"""SESR: collapsing is exact, sizes are the published ones, files load, x4 starts from x2."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import tiny_sesr, tiny_swinir, write_pictures
from PIL import Image

import compsrt
from compsrt import evaluate, metrics, models, upscale
from compsrt.checkpoint import count_levels, save_float, save_packed, size_report
from compsrt.cli import run
from compsrt.data import to_image
from compsrt.distillation import Distillation
from compsrt.float_training import start_from
from compsrt.models.sesr import (
    SESR,
    SIZES,
    CollapsibleConv2d,
    SESRConfig,
    luma,
    training_macs,
)
from compsrt.quantization import QuantSpec
from compsrt.quantizers import named_quantizers

TINY = SESRConfig(blocks=2, features=4)


def parameters_of(block: CollapsibleConv2d) -> list[torch.Tensor]:
    return list(block.parameters())


@given(
    channels=st.integers(1, 9),
    out=st.integers(1, 9),
    kernel=st.sampled_from([1, 3, 5]),
    expansion=st.integers(1, 40),
    residual=st.booleans(),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_collapsed_and_expanded_blocks_agree(
    channels, out, kernel, expansion, residual, height, width, seed
):
    torch.manual_seed(seed)
    out = channels if residual else out
    block = CollapsibleConv2d(channels, out, kernel, expansion=expansion, residual=residual)
    x = torch.randn(2, channels, height, width)
    weights = torch.randn(2, out, height, width)
    results = []
    for collapsed in (True, False):
        block.collapsed = collapsed
        y = block(x)
        gradients = torch.autograd.grad((y * weights).mean(), parameters_of(block))
        results.append((y, *gradients))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@given(channels=st.integers(1, 5), kernel=st.sampled_from([3, 5]), seed=st.integers(0, 99))
def test_collapsing_is_what_identity_impulses_give(channels, kernel, seed):
    """Algorithm 1: one impulse an input channel, pushed through; the kernel comes out mirrored."""
    torch.manual_seed(seed)
    block = CollapsibleConv2d(channels, 3, kernel, expansion=7, collapsed=False)
    impulses = torch.zeros(channels, channels, 2 * kernel - 1, 2 * kernel - 1)
    for i in range(channels):
        impulses[i, i, kernel - 1, kernel - 1] = 1
    out = block(impulses) - block(torch.zeros_like(impulses))
    side = slice(kernel // 2, kernel // 2 + kernel)
    pushed = out[:, :, side, side].flip(2, 3).transpose(0, 1)
    torch.testing.assert_close(block.collapse()[0], pushed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("expansion", [4, 16, 300])
def test_widening_and_collapsing_lead_back(expansion):
    """Also where the wide kernels are fewer than a kernel has entries."""
    network = SESR(TINY)
    wide = network.widened(expansion=expansion)
    x = torch.rand(1, 1, 9, 11)
    torch.testing.assert_close(wide(x), network(x), rtol=1e-4, atol=1e-5)
    narrow = wide.collapsed()
    assert type(narrow) is SESR and not any(
        isinstance(m, CollapsibleConv2d) for m in narrow.modules()
    )
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(narrow.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def test_wide_networks_train_the_same_in_both_forms():
    network = SESR(TINY)
    x, y = torch.rand(2, 1, 8, 8), torch.rand(2, 1, 16, 16)
    gradients = []
    torch.manual_seed(1)
    wide = network.widened(expansion=32)
    for collapsed in (True, False):
        for module in wide.modules():
            if isinstance(module, CollapsibleConv2d):
                module.collapsed = collapsed
        gradients.append(torch.autograd.grad(F.l1_loss(wide(x), y), list(wide.parameters())))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "parameters", "giga"),
    [
        ("m3", 8912, "2.05"),
        ("m5", 13520, "3.11"),
        ("m7", 18128, "4.18"),
        ("m11", 27344, "6.30"),
        ("xl", 105376, "24.3"),
    ],
)
def test_sizes_are_the_published_ones(size, parameters, giga):
    blocks, features = SIZES[size]
    config = SESRConfig(blocks=blocks, features=features)
    network = SESR(config)
    assert sum(weight.numel() for weight in models.quantizable_weights(network)) == parameters
    macs = training_macs(config, "collapsed")[0] * 640 * 360
    assert macs == parameters * 230_400
    # Its figures are rounded, but 3.115 G is given as 3.11.
    assert abs(macs / 1e9 - float(giga)) < 0.51 * 10.0 ** -len(giga.partition(".")[2])


def test_a_training_step_of_m5_takes_the_published_multiply_adds():
    pixels = 32 * 64 * 64
    each, once = training_macs(SESRConfig(), "expanded")
    assert str((each * pixels + once) / 1e9).startswith("41.77")
    each, once = training_macs(SESRConfig(), "collapsed")
    assert 1.77e9 < each * pixels + once < 1.84e9  # the paper's, by impulses, are 1.84


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("activation", ["prelu", "relu"])
def test_a_file_tells_everything(scale, activation, tmp_path):
    network = SESR(SESRConfig(scale, 3, 8, activation)).eval()
    save_float(network, tmp_path / "sesr.safetensors")
    loaded = compsrt.load(tmp_path / "sesr.safetensors")
    assert loaded.config == network.config
    assert (loaded.scale, loaded.window_size) == (scale, 1)
    x = torch.rand(1, 3, 7, 5)
    assert torch.equal(loaded(x), network(x))
    assert loaded(x).shape == (1, 3, 7 * scale, 5 * scale)


def test_colour_keeps_luma_and_enlarges_the_rest():
    network = SESR(TINY)
    picture = torch.rand(1, 3, 12, 12)
    torch.testing.assert_close(luma(network(picture)), network(luma(picture)), rtol=0, atol=1e-6)
    theirs = metrics.y_channel(to_image(picture))
    ours = luma(picture)[0, 0].numpy() * 255
    assert abs(ours - theirs).max() < 0.6  # to_image rounds to whole numbers
    grey = torch.full((1, 3, 6, 6), 0.5)
    out = network(grey)
    torch.testing.assert_close(out[:, :1].expand_as(out), out, rtol=0, atol=1e-5)


def test_x4_starts_from_x2_but_for_its_last_layer():
    torch.manual_seed(0)
    small, large = SESR(TINY), SESR(SESRConfig(4, TINY.blocks, TINY.features))
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.normal_()
    assert start_from(large, small) == ["body.last.weight", "body.last.bias"]
    wide = large.widened()
    x = torch.rand(1, 1, 8, 8)

    def features(network):
        body, y = network.body, x
        for convolution, act in zip([body.first, *body.blocks], body.activations, strict=True):
            y = act(convolution(y))
        return y

    torch.testing.assert_close(features(wide), features(small), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 3}, "scale: 3"),
        ({"blocks": 0}, "blocks"),
        ({"activation": "gelu"}, "activation: 'gelu'"),
    ],
)
def test_bad_hyper_parameters_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SESRConfig(**arguments)


def test_bad_blocks_are_named():
    with pytest.raises(ValueError, match="block: 'both'"):
        SESR(TINY).widened(block="both")
    with pytest.raises(ValueError, match="expansion: 2"):
        SESR(TINY).widened(expansion=2)


def test_a_file_of_wide_blocks_is_named():
    wide = SESR(TINY).widened(expansion=8)
    with pytest.raises(ValueError, match=r"SESR of wide blocks.*collapsed"):
        models.from_state_dict(wide.state_dict())


# --- Quantized -----------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["prelu", "relu"])
@pytest.mark.parametrize("scale", [2, 4])
def test_equalized_channels_compute_the_same_with_one_range(activation, scale):
    network = tiny_sesr(activation=activation, scale=scale).double()
    body = network.body
    factors = torch.tensor([4.0, 2, 1, 1, 0.5, 1, 1, 1], dtype=torch.double)
    body.blocks[0].weight.mul_(factors[:, None, None, None])
    body.first.bias[3] = -9  # always negative: its PReLU is a factor
    pictures = torch.rand(2, 3, 16, 16, dtype=torch.double)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    equal = models.equalized(network, pictures)
    torch.testing.assert_close(equal(pictures), network(pictures), rtol=0, atol=1e-9)
    assert all(torch.equal(tensor, before[n]) for n, tensor in network.state_dict().items())
    if activation == "prelu":
        assert equal.body.activations[0].weight[3] == 1

    def ranges(network):
        y = network.body.activations[0](network.body.first(luma(pictures)))
        return network.body.blocks[0](y).abs().amax((0, 2, 3))

    spread = [float(found.max() / found.min()) for found in map(ranges, (network, equal))]
    assert spread[1] < spread[0] / 10  # not 1: the least channels keep a part of their distance


def test_equalized_channels_round_better():
    """What it is for: less error at 8 bits where channels differ and some are always negative."""
    network = tiny_sesr()
    network.body.first.weight[:4] *= 0.05
    network.body.first.bias[:4] = torch.tensor([-9.0, -5, 0, 0])
    network.body.activations[0].weight[:2] = 0.02
    pictures, spec = torch.rand(2, 3, 24, 24), QuantSpec(bits=8, method="dobi")
    errors = [
        float((compsrt.quantize(one, spec, pictures)(pictures) - network(pictures)).square().mean())
        for one in (network, models.equalized(network, pictures))
    ]
    assert errors[1] < 0.7 * errors[0]


def test_other_networks_stay_as_they_are():
    network = tiny_swinir()
    assert models.equalized(network, torch.rand(1, 3, 8, 8)) is network


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantized_levels_are_bounded_and_the_packed_file_is_exact(bits, tmp_path):
    network = SESR(TINY)
    with torch.no_grad():
        network.body.activations[0].weight.fill_(-0.3)
    pictures = torch.rand(2, 3, 24, 24)
    quantized = compsrt.quantize(network, QuantSpec(bits=bits, method="dobi"), pictures)
    levels = count_levels(quantized, pictures[:1])
    for name, site in named_quantizers(quantized):
        assert levels[name] <= 2**site.bits
        assert site.bits == bits or (bits < 8 and site.bits == 8 and "weight" not in name)
    save_packed(quantized, tmp_path / "q.safetensors")
    loaded = compsrt.load(tmp_path / "q.safetensors")
    assert torch.equal(loaded(pictures), quantized(pictures))
    report = size_report(loaded, tmp_path / "q.safetensors")
    weights = 25 * 4 + 2 * 9 * 16 + 25 * 16
    assert report["weights"] == weights
    channels = 4 + 4 + 4 + 4
    assert report["bits_per_weight"] == pytest.approx(bits + 32 * channels / weights)


def test_weights_are_symmetric_and_zero_is_a_level_of_every_activation():
    pictures = torch.rand(2, 3, 24, 24)
    quantized = compsrt.quantize(SESR(TINY), QuantSpec(bits=8, method="minmax"), pictures)
    for name, site in named_quantizers(quantized):
        grid = site.grid()
        zero = compsrt.kernels.fake_quantize(torch.zeros(1), *grid[:4], bits=grid.bits)
        if "weight" not in name:
            assert abs(float(zero)) < 1e-6 * float(grid.upper - grid.lower)
            continue
        values, step = site().detach(), site.step
        whole = values / step
        torch.testing.assert_close(whole, whole.round(), rtol=0, atol=1e-3)
        assert int(whole.abs().max().round()) <= 127


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(method="compsrt"),
        QuantSpec(method="lsq+"),
        QuantSpec(method="dobi", transform="hadamard"),
        QuantSpec(method="dobi", codes="unclamped"),
    ],
)
def test_what_integer_convolutions_cannot_do_is_refused(spec):
    with pytest.raises(ValueError, match=r"^(method|codes): .*SESR"):
        compsrt.quantize(SESR(TINY), spec)


def test_bounds_can_be_distilled_from_the_float_network():
    torch.manual_seed(0)
    network = SESR(TINY).eval().requires_grad_(False)
    pictures = torch.rand(2, 3, 24, 24)
    quantized = compsrt.quantize(network, QuantSpec(bits=3, method="2dquant"), pictures)
    distillation = Distillation(quantized, network)
    losses = []
    for _ in range(20):
        distillation.optimizer.zero_grad()
        loss = distillation.losses(pictures)["loss"]
        loss.backward()
        distillation.optimizer.param_groups[0]["lr"] = 0.05
        distillation.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["float", "packed"])
def test_commands_take_its_files_as_they_take_swinirs(kind, tmp_path, capsys):
    network, pictures = tiny_sesr(), torch.rand(2, 3, 24, 24)
    path = tmp_path / f"{kind}.safetensors"
    if kind == "float":
        save_float(network, path)
    else:
        save_packed(compsrt.quantize(network, QuantSpec(bits=8, method="dobi"), pictures), path)
    photos = write_pictures(tmp_path / "photos", count=1, height=32, width=48)
    assert run(evaluate.main, [str(path), "--test", str(photos)]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][-1]
    assert row["model"] == kind and row["tests"]["photos"]["psnr"] > 10
    large = tmp_path / "large"
    assert run(upscale.main, [str(path), str(photos), "--output", str(large)]) == 0
    with Image.open(next(large.iterdir())) as image:
        assert image.size == (96, 64)
