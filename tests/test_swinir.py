import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import golden_swinir, tiny_swinir

from compsrt import models
from compsrt.models import swinir


@pytest.mark.parametrize("scale", [2, 4])
def test_equals_the_official_network(shared, scale):
    file = np.load(shared / f"golden/swinir_tiny_x{scale}.npz")
    model = golden_swinir(file)
    for i in (0, 1):
        want = torch.from_numpy(file[f"float/out{i}"])
        torch.testing.assert_close(
            model(torch.from_numpy(file[f"input{i}"])), want, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize(("scale", "count"), [(2, 910_152), (3, 918_267), (4, 929_628)])
def test_swinir_light_has_the_published_number_of_parameters(scale, count):
    with torch.device("meta"):
        model = swinir.SwinIR(swinir.SwinIRConfig(scale=scale))
    assert sum(p.numel() for p in model.parameters()) == count


@given(
    scale=st.sampled_from([2, 3, 4]),
    depths=st.sampled_from([(1,), (2, 3)]),
    heads=st.sampled_from([1, 2, 3]),
    head=st.sampled_from([4, 10]),
    window=st.sampled_from([4, 8]),
    upsampler=st.sampled_from(swinir.UPSAMPLERS),
    resi=st.sampled_from(["1conv", "3conv"]),
    qkv_bias=st.booleans(),
)
@settings(max_examples=20)
def test_every_hyper_parameter_is_read_from_the_state_dict(
    scale, depths, heads, head, window, upsampler, resi, qkv_bias
):
    config = swinir.SwinIRConfig(
        scale=scale, depths=depths, embed_dim=heads * head, num_heads=(heads,) * len(depths),
        window_size=window, mlp_hidden=(17,) * len(depths), upsampler=upsampler,
        resi_connection=resi, qkv_bias=qkv_bias,
    )  # fmt: skip
    with torch.device("meta"):
        state = swinir.SwinIR(config).state_dict()
    assert swinir.read_config(state) == config


def test_official_buffers_are_accepted_and_strangers_are_not():
    model = tiny_swinir()
    state = model.state_dict()
    block = "layers.0.residual_group.blocks.0"
    extra = {
        f"{block}.attn.relative_position_index": torch.zeros(64, 64, dtype=torch.long),
        f"{block}.attn_mask": torch.zeros(64, 64, 64),
    }
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(models.from_state_dict({**state, **extra})(x), model(x))
    with pytest.raises(ValueError, match="1 unknown"):
        models.from_state_dict({**state, "norm.extra": torch.zeros(1)})
    del state["norm.bias"]
    with pytest.raises(ValueError, match="1 parameters missing"):
        models.from_state_dict(state)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"conv_up1.weight": torch.zeros(1)}, "nearest"),
        ({"absolute_pos_embed": torch.zeros(1)}, "absolute position"),
    ],
)
def test_other_forms_are_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        models.from_state_dict({**tiny_swinir().state_dict(), **change})


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (["head.0.weight", "body.0.body.0.weight"], "EDSR"),
        (["conv_first.weight", "body.0.rdb1.conv1.weight"], "RRDBNet"),
        (["anything"], "unknown network"),
    ],
)
def test_a_foreign_state_dict_is_named(keys, name):
    with pytest.raises(ValueError, match=name):
        models.from_state_dict({key: torch.zeros(1) for key in keys})


@given(height=st.integers(1, 40), width=st.integers(1, 40))
@settings(max_examples=15)
def test_any_size_passes_and_padding_is_cropped_exactly(height, width):
    model = tiny_swinir()
    x = torch.rand(1, 3, height, width)
    padded = swinir.mirror_to_multiple(x, 8)
    assert padded.shape[-2] % 8 == padded.shape[-1] % 8 == 0
    out = model(x)
    assert out.shape == (1, 3, 2 * height, 2 * width)
    assert torch.equal(out, model(padded)[..., : 2 * height, : 2 * width])


def test_the_mirror_repeats_the_edge_and_goes_on_for_tiny_pictures():
    row = torch.arange(3.0).view(1, 1, 1, 3)
    got = swinir.mirror_to_multiple(row, 8)[0, 0, 0]
    assert got.tolist() == [0, 1, 2, 2, 1, 0, 0, 1]


@given(
    h=st.integers(1, 4), w=st.integers(1, 4), window=st.sampled_from([4, 8]), shifted=st.booleans()
)
def test_windows_are_undone(h, w, window, shifted):
    x = torch.randn(2, h * window, w * window, 3)
    shift = window // 2 if shifted else 0
    windows = swinir.to_windows(x, window, shift)
    assert windows.shape == (2 * h * w, window**2, 3)
    assert torch.equal(swinir.from_windows(windows, *x.shape[1:3], window, shift), x)


def test_shift_mask_separates_what_the_picture_separates():
    mask = swinir.shift_mask(16, 24, 8, 4, torch.device("cpu"), torch.float32)
    # Tag every token with its place; two tokens of a window are neighbours if less than 8 apart.
    y, x = torch.meshgrid(torch.arange(16), torch.arange(24), indexing="ij")
    places = torch.stack([y, x], -1)[None].float()
    places = swinir.to_windows(places, 8, 4)
    near = (places[:, :, None] - places[:, None, :]).abs().amax(-1) < 8
    assert torch.equal(mask == 0, near)


def test_grey_pictures_and_wrong_configurations():
    model = tiny_swinir(in_channels=1)
    assert model(torch.rand(1, 1, 9, 9)).shape == (1, 1, 18, 18)
    with pytest.raises(ValueError, match="heads"):
        swinir.SwinIRConfig(num_heads=(7, 6, 6, 6))
    with pytest.raises(ValueError, match="upsampler"):
        swinir.SwinIRConfig(upsampler="nearest+conv")


@pytest.mark.parametrize("upsampler", swinir.UPSAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_survives_a_stream_that_half_types_cannot_hold(dtype, upsampler):
    model = tiny_swinir(upsampler=upsampler).eval().requires_grad_(False)
    model.layers[0].conv.weight *= 5e4  # so that the stream leaves the range of float16
    x = torch.rand(2, 3, 16, 24)
    want = model(x)
    stream = []
    model.layers[0].register_forward_hook(lambda *args: stream.append(args[2].abs().max()))
    got = copy.deepcopy(model).to(dtype)(x.to(dtype))
    assert stream[0] > 65504 and got.dtype == dtype and torch.isfinite(got).all()
    # The weights' rounding is part of it: 2^-11 and 2^-8 of each.
    error = (got.float() - want).norm() / (want - want.mean()).norm()
    assert error < {torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
