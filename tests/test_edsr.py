"""EDSR and its residual-in-residual form: shapes, state dicts of any origin, detection."""

import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from compsrt import checkpoint, models
from compsrt.models import edsr
from compsrt.models.edsr import EDSR, EDSRConfig

CONFIGS = {
    "light": EDSRConfig.uniform(2, blocks=3, channels=6),
    "upsampler": EDSRConfig.uniform(3, blocks=2, channels=4, tail="upsampler"),
    "two stages": EDSRConfig.uniform(4, blocks=2, channels=4, tail="upsampler"),
    "groups": EDSRConfig.uniform(4, blocks=2, channels=5, groups=3),
    "scaled": dataclasses.replace(EDSRConfig.uniform(2, blocks=2, channels=4), residual_scale=0.1),
    "widths": EDSRConfig(scale=2, form="rir", channels=5, hidden=((3, 7), (2,))),
}


def network(name):
    torch.manual_seed(0)
    return EDSR(CONFIGS[name]).eval().requires_grad_(False)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_state_dict_tells_the_whole_configuration(name):
    model = network(name)
    loaded = models.from_state_dict(model.state_dict())
    assert isinstance(loaded, EDSR) and loaded.config == CONFIGS[name]
    x = torch.rand(2, 3, 9, 7)
    out = model(x)
    assert out.shape == (2, 3, 9 * model.scale, 7 * model.scale) and model.window_size == 1
    assert torch.equal(loaded(x), out)
    assert models.from_description(models.describe(model)).config == model.config


@pytest.mark.parametrize("name", CONFIGS)
def test_files_keep_it(tmp_path, name):
    model = network(name)
    checkpoint.save_float(model, tmp_path / "model.safetensors")
    torch.save(model.state_dict(), tmp_path / "model.pth")
    x = torch.rand(1, 3, 8, 8)
    for file in ("model.safetensors", "model.pth"):
        assert torch.equal(checkpoint.load(tmp_path / file)(x), model(x))


def as_published(state, x, residual_scale=1.0):
    """EDSR-PyTorch's arithmetic from its own state dict: x and the result from 0 to 255."""

    def conv(name, x):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding="same")

    first = conv("head.0", conv("sub_mean", x))
    y, block = first, 0
    while f"body.{block}.body.0.weight" in state:
        inside = conv(f"body.{block}.body.2", F.relu(conv(f"body.{block}.body.0", y)))
        y = y + residual_scale * inside
        block += 1
    y = conv(f"body.{block}", y) + first
    stage = 0
    while f"tail.0.{stage}.weight" in state:
        y = conv(f"tail.0.{stage}", y)
        last = f"tail.0.{stage + 2}.weight" not in state
        factor = 3 if last and stage == 0 and y.shape[1] % 9 == 0 else 2
        y, stage = F.pixel_shuffle(y, factor), stage + 2
    if "tail.1.weight" in state:
        y = conv("tail.1", y)
    return conv("add_mean", y)


def published_state(config, white):
    """A random state dict as EDSR-PyTorch writes it, with its mean shifts for a white of 1 or 255."""
    state = dict(EDSR(config).state_dict())
    mean = white * torch.tensor(edsr.MEAN_RGB)
    for name, sign in (("sub_mean", -1), ("add_mean", 1)):
        state[f"{name}.weight"] = torch.eye(3)[:, :, None, None]
        state[f"{name}.bias"] = sign * mean
    return state


@pytest.mark.parametrize("white", [1, 255])
@pytest.mark.parametrize(
    "config",
    [
        EDSRConfig.uniform(2, blocks=2, channels=4, tail="upsampler"),
        EDSRConfig.uniform(3, blocks=2, channels=4, tail="upsampler"),
        EDSRConfig.uniform(4, blocks=1, channels=4, tail="upsampler"),
    ],
    ids=lambda value: f"x{value.scale}",
)
def test_equals_edsr_pytorch_on_its_own_state_dict(config, white):
    state = published_state(config, white)
    model = models.from_state_dict(state).requires_grad_(False)
    assert model.config == config
    x = torch.rand(1, 3, 7, 6)
    want = as_published(state, white * x) / white
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-5)


def test_the_nested_light_tail_of_srp_is_read():
    config = EDSRConfig.uniform(2, blocks=2, channels=4)
    state = published_state(config, 255)
    for kind in ("weight", "bias"):
        state[f"tail.0.0.{kind}"] = state.pop(f"tail.0.{kind}")
    model = models.from_state_dict(state).requires_grad_(False)
    assert model.config == config
    x = torch.rand(1, 3, 7, 6)
    want = as_published(state, 255 * x) / 255
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-5)


def test_the_published_edsr_multiplies_its_branches_by_a_tenth():
    with torch.device("meta"):
        large = EDSR(EDSRConfig.uniform(2, blocks=32, channels=256, tail="upsampler"))
        baseline = EDSR(EDSRConfig.uniform(2, blocks=16, channels=64, tail="upsampler"))
    assert edsr.read_config(large.state_dict()).residual_scale == 0.1
    assert edsr.read_config(baseline.state_dict()).residual_scale == 1.0
    # As published: EDSR and the baseline, x2 (EDSR-PyTorch), without the two mean shifts.
    assert sum(p.numel() for p in large.parameters()) == 40_729_603
    assert sum(p.numel() for p in baseline.parameters()) == 1_369_859


@given(height=st.integers(1, 20), width=st.integers(1, 20))
@settings(max_examples=10)
def test_any_size_passes(height, width):
    assert network("light")(torch.rand(1, 3, height, width)).shape == (1, 3, 2 * height, 2 * width)


@pytest.mark.parametrize("name", ["light", "two stages", "groups"])
def test_it_can_be_exported(name):
    model = network(name)
    x = torch.rand(1, 3, 8, 8)
    sizes = {2: torch.export.Dim("height", min=2), 3: torch.export.Dim("width", min=2)}
    exported = torch.export.export(model, (x,), dynamic_shapes=(sizes,)).module()
    other = torch.rand(1, 3, 11, 5)
    torch.testing.assert_close(exported(other), model(other))


# --- Others ----------------------------------------------------------------------------------------


def test_channel_attention_is_refused_by_name():
    state = dict(network("groups").state_dict())
    state["body.0.body.0.body.3.conv_du.0.weight"] = torch.zeros(1, 5, 1, 1)
    with pytest.raises(ValueError, match=r"looks like RCAN; supported: .*EDSR"):
        models.from_state_dict(state)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("light", "EDSR"),
        ("upsampler", "EDSR"),
        ("groups", r"EDSR of residual groups \(RCAN without"),
    ],
)
def test_it_is_described(name, words):
    assert re.match(words, models.describe_state_dict(network(name).state_dict()))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda state: state.pop("body.1.body.2.bias"), "looks like EDSR, but does not fit"),
        (lambda state: state.update(extra=torch.zeros(1)), "looks like EDSR, but does not fit"),
        (lambda state: state.update({"sub_mean.bias": torch.zeros(3),
                                     "sub_mean.weight": torch.eye(3)}), "mean shift"),
    ],
)  # fmt: skip
def test_a_state_dict_that_does_not_fit_is_one_line(tmp_path, spoil, words):
    state = dict(network("light").state_dict())
    spoil(state)
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=words) as caught:
        checkpoint.load(tmp_path / "model.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"scale": 5}, "scale: 5"),
        ({"form": "rdn"}, "form: 'rdn'"),
        ({"tail": "heavy"}, "tail: 'heavy'"),
        ({"hidden": ()}, "hidden"),
        ({"hidden": ((4,), (4,))}, "one group, not 2"),
        ({"channels": 0}, "at least 1"),
        ({"tail": "upsampler"}, "upsample_channels: 0"),
        ({"upsample_channels": 3}, "upsample_channels: 3"),
    ],
)
def test_wrong_configurations_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        EDSRConfig(**fields)
