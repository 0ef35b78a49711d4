"""One file is the whole model: the same bits after loading, or one clear line and no model."""

import dataclasses
import errno
import io
import json
import math
import os
import pickle
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import compsrt
from compsrt import checkpoint
from compsrt.calibration import calibrate
from compsrt.checkpoint import (
    count_levels,
    load,
    read_state,
    save_float,
    save_packed,
    size_report,
)
from compsrt.data import read_image, to_tensor
from compsrt.models.edsr import EDSR, EDSRConfig
from compsrt.models.quant_swinir import swap_blocks
from compsrt.models.sesr import SESR, SESRConfig
from compsrt.models.swinir import SwinIR, SwinIRConfig
from compsrt.pruning import prune
from compsrt.quantization import METHODS, QuantSpec
from compsrt.quantizers import WeightQuantizer, compact_scales, named_quantizers, stored_as_float
from compsrt.transforms import TRANSFORMS

TINY = SwinIRConfig(
    scale=2, depths=(2,), embed_dim=12, num_heads=(2,), window_size=4, mlp_hidden=(24,)
)
LINEAR_WEIGHTS = 2 * (4 * 12 * 12 + 2 * 12 * 24)
SITES, WEIGHT_SITES = 2 * 16, 2 * 6
RECORDS = {
    "calibration": {"count": 1, "seed": 0, "files": ["größe.png"]},
    "source": {"name": "tiny.safetensors", "sha256": "ab" * 32},
    "results": {"Set5": {"psnr": 33.25}},
}


def float_model(config: SwinIRConfig = TINY) -> SwinIR:
    torch.manual_seed(0)
    return SwinIR(config).eval()


def quantized(spec: QuantSpec, model=None, x=None):
    """Pruned and calibrated, with scalars as distillation might leave them."""
    model = swap_blocks(model or float_model(), spec)
    prune(model, spec.pruning, spec.pruning_pattern)
    calibrate(model, torch.rand(1, 3, 8, 8) if x is None else x)
    with torch.no_grad():
        for _, site in named_quantizers(model):
            site.alpha.uniform_(-0.2, 0.2).mul_(site.step)
            site.beta.uniform_(-0.4, 0.4).mul_(site.step)
    return model


def assert_same_output(a, b, x) -> None:
    with torch.no_grad():
        assert torch.equal(a(x), b(x))


@pytest.fixture
def packed(tmp_path):
    """A packed, pruned model's file."""
    path = tmp_path / "model.safetensors"
    save_packed(quantized(QuantSpec(bits=3, pruning=0.4)), path, **RECORDS)
    return path


# --- the packed model -----------------------------------------------------------------------------

PATTERNS = ("*.weight", "*.fc?.*", "*.blocks.1.q.weight", "*.attention", "conv_first.weight")
specs = st.builds(
    QuantSpec,
    bits=st.integers(1, 8),
    weight_bits=st.none() | st.integers(1, 8),
    activation_bits=st.none() | st.integers(1, 8),
    method=st.sampled_from(sorted(METHODS)),
    transform=st.none() | st.sampled_from(TRANSFORMS),
    site_transforms=st.sampled_from([(), (("fc2", "none"), ("*.1.q*", "dct"))]),
    pruning=st.sampled_from([0.0, 0.4, 0.99]),
    per_channel=st.booleans(),
    per_head=st.booleans(),
    storage=st.sampled_from(["float16", "float32"]),
    convolution_bits=st.none() | st.integers(1, 8),
    site_bits=st.lists(st.tuples(st.sampled_from(PATTERNS), st.integers(1, 8)), max_size=3),
)
pruned_2_of_4 = st.builds(
    QuantSpec,
    bits=st.integers(1, 8),
    pruning=st.just(0.5),
    pruning_pattern=st.just("2:4"),
    per_channel=st.booleans(),
    per_head=st.booleans(),
)


@settings(max_examples=40)
@given(spec=specs | pruned_2_of_4)
def test_a_packed_model_is_the_same_model(spec, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    model = quantized(spec)
    save_packed(model, folder / "a.safetensors", **RECORDS)
    loaded = load(folder / "a.safetensors", arithmetic="reference")
    assert_same_output(model, loaded, torch.rand(2, 3, 9, 13))
    assert loaded.spec == spec
    assert loaded.config == TINY
    save_packed(loaded, folder / "b.safetensors")
    assert (folder / "a.safetensors").read_bytes() == (folder / "b.safetensors").read_bytes()
    sites = dict(named_quantizers(loaded))
    for name, levels in count_levels(loaded, torch.rand(1, 3, 8, 8)).items():
        assert levels <= 2 ** sites[name].bits
        assert sites[name].bits == spec.bits_of(name, sites[name].bits)


def test_format_1_is_written_as_ever(shared, tmp_path):
    """A file of the first format comes back byte for byte, and its spec names no later field."""
    original = Path(compsrt.__file__).parent / "assets" / "sesr_m5_x2_8bit.safetensors"
    save_packed(load(original), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == original.read_bytes()
    assert QuantSpec().file_format == 1
    assert not {"site_bits", "convolution_bits"} & set(QuantSpec().to_json())


@pytest.mark.parametrize("spec", [QuantSpec(convolution_bits=8), QuantSpec(site_bits=(("*", 2),))])
def test_what_format_1_cannot_say_is_format_2(spec, packed):
    save_packed(quantized(spec), packed)
    assert load(packed).card["format"] == 2
    assert QuantSpec.from_json(spec.to_json()) == spec


def test_names_of_sites_are_stored_short():
    names = [f"layers.0.blocks.{i}.{site}" for i in (0, 1) for site in ("q.weight", "query")]
    spec = QuantSpec(site_bits=(*((name, 3) for name in names), ("*.fc1.*", 2)))
    stored = spec.to_json()["site_bits"]
    assert stored[0] == ["layers.0.blocks.0.", "q.weight", 3, "query", 3]
    assert [run[0] for run in stored[1:]] == ["layers.0.blocks.1.", ""]
    with pytest.raises(ValueError, match="site_bits is not"):
        QuantSpec.from_json({**spec.to_json(), "site_bits": [["layers.0.q.weight", 3]]})


def test_bits_of_sites_and_convolutions_are_what_the_file_takes(packed):
    """Two sites of a block in 2 bits, the others in 4; convolutions in 7: the codes are that long."""
    spec = QuantSpec(bits=4, convolution_bits=7, site_bits=(("*.fc?.weight", 2),))
    model = quantized(spec)
    save_packed(model, packed)
    with safetensors.safe_open(packed, "pt") as file:
        stored = file.get_tensor("codes")
    convolutions = sum(p.numel() for n, p in float_model().named_parameters() if p.dim() == 4)
    mlp = 2 * 2 * 12 * 24
    tables = 2 * 2 * 7**2
    bits = 2 * mlp + 4 * (LINEAR_WEIGHTS - mlp) + 7 * convolutions + 8 * tables
    assert len(stored) == -(-bits // 8)
    names = set(stored_as_float(model))
    assert all(name.endswith("bias") or "norm" in name for name in names)
    scales = 32 * 4 * WEIGHT_SITES
    counted = size_report(model)["bits_per_weight"] * LINEAR_WEIGHTS
    assert counted == 2 * mlp + 4 * (LINEAR_WEIGHTS - mlp) + scales


@pytest.mark.parametrize(
    ("fields", "scales"),
    [
        ({"per_channel": True}, 2 * (5 * 12 + 24)),
        ({"weight_groups": 4, "pruning": 0.4}, 2 * (5 * 12 * 3 + 24 * 3 - 12 * 3 + 12 * 6)),
        ({"per_channel": True, "method": "lsq+", "storage": "float32"}, 2 * (5 * 12 + 24)),
        ({"per_channel": True, "convolution_bits": 6}, 2 * (5 * 12 + 24)),
    ],
)
def test_compact_scales_take_two_numbers_of_the_storage_type(fields, scales, packed):
    """step and zero point of every row or group; the model is the one that the file gives back."""
    spec = QuantSpec(bits=3, **fields)
    model, x = quantized(spec), torch.rand(1, 3, 9, 13)
    with torch.no_grad():
        before = model(x)
    save_packed(model, packed)
    assert_same_output(model, load(packed, arithmetic="reference"), x)
    compact_scales(model)
    save_packed(model, packed)
    loaded = load(packed, arithmetic="reference")
    assert loaded.card["format"] == 2
    assert_same_output(model, loaded, x)
    save_packed(loaded, packed.with_name("again"))
    assert packed.read_bytes() == packed.with_name("again").read_bytes()
    each = 2 * (16 if spec.storage == "float16" else 32)
    codes = 3 * round(LINEAR_WEIGHTS * (1 - spec.pruning)) + LINEAR_WEIGHTS * bool(spec.pruning)
    bits = size_report(loaded)["bits_per_weight"] * LINEAR_WEIGHTS
    assert bits == pytest.approx(codes + each * scales, abs=3 * WEIGHT_SITES)
    with torch.no_grad():
        assert (model(x) - before).abs().mean() < 0.1 * before.std()


def test_convolutions_of_every_kind_are_quantized_and_never_pruned(tmp_path):
    config = dataclasses.replace(
        TINY, resi_connection="3conv", upsampler="pixelshuffle", upsample_channels=8
    )
    spec = QuantSpec(bits=3, convolution_bits=8, pruning=0.5)
    model = quantized(spec, float_model(config))
    sites = dict(named_quantizers(model))
    convolutions = [n for n, m in float_model(config).named_modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 2 * 3 + 4
    for name in convolutions:
        site = sites[f"{name}.weight"]
        assert site.bits == 8
        assert site.mask is None
    save_packed(model, tmp_path / "a.safetensors")
    assert_same_output(
        model, load(tmp_path / "a.safetensors", arithmetic="reference"), torch.rand(1, 3, 9, 13)
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_real_weights_are_the_same_model(bits, shared, tmp_path):
    x = to_tensor(read_image(shared / "data/Set5/LR_bicubic/X2/womanx2.png"))
    original = load(shared / "assets/swinir_nano_x2.safetensors")
    model = quantized(QuantSpec(bits=bits, pruning=0.4), original, x[..., :64, :64])
    save_packed(model, tmp_path / "nano.safetensors")
    loaded = load(tmp_path / "nano.safetensors", arithmetic="reference")
    assert_same_output(model, loaded, x[..., 40:101, 20:93])


def test_a_packed_file_is_little_more_than_its_codes_and_floats(shared, tmp_path):
    """The nano model at 4 bits: next to codes and floats there are 2.1 kB of scales and header."""
    path = tmp_path / "nano.safetensors"
    model = quantized(QuantSpec(bits=4), load(shared / "assets/swinir_nano_x2.safetensors"))
    save_packed(model, path)
    report = size_report(model, path)
    floats = report["float_file_bytes"] // 4 - report["weights"]
    assert report["weights"] == 115_200
    assert report["file_bytes"] - report["weights"] // 2 - 2 * floats < 2300


def test_a_loaded_model_is_ready_to_use(packed):
    model = load(packed)
    assert (model.scale, model.window_size) == (2, 4)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {key: model.card[key] for key in RECORDS} == RECORDS
    assert model.card["spec"]["pruning"] == 0.4
    assert load(packed, dtype=torch.float64)(torch.rand(1, 3, 8, 8).double()).dtype == torch.float64


def test_one_model_gives_one_file(packed, tmp_path):
    save_packed(quantized(QuantSpec(bits=3, pruning=0.4)), tmp_path / "again", **RECORDS)
    assert (tmp_path / "again").read_bytes() == packed.read_bytes()


def test_loading_draws_no_random_numbers(packed):
    before = torch.get_rng_state()
    load(packed)
    assert torch.equal(torch.get_rng_state(), before)


def test_records_of_the_float_model_are_not_those_of_the_packed_one(tmp_path):
    save_float(float_model(), tmp_path / "a", {"results": {"Set5": 36.9}})
    save_packed(quantized(QuantSpec(), load(tmp_path / "a")), tmp_path / "b")
    assert load(tmp_path / "b").card["results"] is None


# --- what cannot be packed ------------------------------------------------------------------------


def test_unclamped_codes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unclamped codes need not fit 4 bits"):
        save_packed(quantized(QuantSpec(codes="unclamped")), tmp_path / "a")


def test_a_float_model_is_not_packed_and_a_quantized_one_not_saved_as_float(tmp_path):
    with pytest.raises(ValueError, match="a float model"):
        save_packed(float_model(), tmp_path / "a")
    with pytest.raises(ValueError, match="it is quantized"):
        save_float(swap_blocks(float_model(), QuantSpec()), tmp_path / "a")


def test_a_model_without_bounds_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"layers\.0\..* has no bounds"):
        save_packed(swap_blocks(float_model(), QuantSpec()), tmp_path / "a")


def test_what_float16_does_not_hold_is_refused(tmp_path):
    model = quantized(QuantSpec())
    with torch.no_grad():
        model.conv_first.bias[0] = 0.1
    with pytest.raises(ValueError, match=r"conv_first\.bias: .*float16 does not hold exactly"):
        save_packed(model, tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_records_must_be_json(tmp_path):
    with pytest.raises(ValueError, match="JSON cannot hold"):
        save_packed(quantized(QuantSpec()), tmp_path / "a", results={"psnr": math.nan})


# --- damage ---------------------------------------------------------------------------------------


def assert_damaged(path) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: damaged") as caught:
        load(path)
    assert "\n" not in str(caught.value)


@settings(max_examples=150)
@given(where=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255))
def test_no_byte_changes_unnoticed(where, change, packed_bytes, tmp_path_factory):
    path = tmp_path_factory.mktemp("flipped") / "model.safetensors"
    data = bytearray(packed_bytes)
    data[int(where * len(data))] ^= change
    path.write_bytes(data)
    assert_damaged(path)


@pytest.mark.parametrize("change", [0x01, 0x20, 0x29])  # 0x29 makes a tabulator of a space
def test_no_byte_of_the_header_changes_unnoticed(change, packed):
    data = packed.read_bytes()
    for position in range(8 + int.from_bytes(data[:8], "little")):
        changed = bytearray(data)
        changed[position] ^= change
        packed.write_bytes(changed)
        assert_damaged(packed)


def test_no_file_cut_short_is_loaded(packed):
    data = packed.read_bytes()
    for length in {*range(1, 1500, 7), *range(1500, len(data), 501), len(data) - 1}:
        packed.write_bytes(data[:length])
        assert_damaged(packed)
    packed.write_bytes(data + b"\0")
    assert_damaged(packed)


@pytest.fixture(scope="module")
def packed_bytes(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("packed") / "model.safetensors"
    save_packed(quantized(QuantSpec(bits=3)), path)
    return path.read_bytes()


def test_a_newer_format_is_named(packed, monkeypatch):
    save_packed(quantized(QuantSpec(convolution_bits=8)), packed)
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    with pytest.raises(ValueError, match=r"its format 2 is newer than 1, .* update compsrt"):
        load(packed)


@pytest.mark.parametrize("save", [lambda p: save_packed(quantized(QuantSpec()), p),
                                  lambda p: save_float(float_model(), p)])  # fmt: skip
def test_a_full_disk_keeps_the_old_file(save, packed, monkeypatch):
    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    old = packed.read_bytes()
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        save(packed)
    assert packed.read_bytes() == old
    assert os.listdir(packed.parent) == [packed.name]


# --- float files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ""])
def test_float_files_are_recognized_by_their_content(suffix, tmp_path):
    model, path = float_model(), tmp_path / f"model{suffix}"
    if suffix in (".pth", ".pt"):
        torch.save(model.state_dict(), path)
    else:
        save_float(model, path, {"note": "x"})
    loaded = load(path)
    assert_same_output(model, loaded, torch.rand(1, 3, 9, 10))
    assert (loaded.scale, loaded.window_size) == (2, 4)
    assert loaded.card == ({} if suffix in (".pth", ".pt") else {"note": "x"})
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert read_state(path).keys() == model.state_dict().keys()


@pytest.mark.parametrize("keys", [["params"], ["params", "params_ema"], ["state_dict"]])
def test_state_dicts_may_be_wrapped(keys, tmp_path):
    path = tmp_path / "model.pth"
    states = {key: dict(float_model().state_dict()) for key in keys}
    last = states[keys[-1]]
    last["norm.bias"] = torch.full((12,), 7.0)
    torch.save({"iteration": 3, **states}, path)
    assert read_state(path)["norm.bias"][0] == 7
    torch.save({f"module.{key}": value for key, value in last.items()}, path)
    assert read_state(path).keys() == last.keys()


def test_a_float_file_may_hold_half_precision(tmp_path):
    model, path = float_model(), tmp_path / "model.safetensors"
    save_float(model, path, dtype=torch.float16)
    assert {tensor.dtype for tensor in read_state(path).values()} == {torch.float16}
    assert torch.equal(load(path).norm.weight, model.norm.weight.half().float())
    assert size_report(load(path), path)["bits_per_weight"] == 16
    model.norm.weight.data[0] = 1e6
    with pytest.raises(ValueError, match=r"norm\.weight: .* not finite as torch\.float16"):
        save_float(model, path, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"dtype: torch\.int8"):
        save_float(model, path, dtype=torch.int8)


def test_a_damaged_float_file_of_ours_is_noticed(tmp_path):
    path = tmp_path / "model.safetensors"
    save_float(float_model(), path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged \(checksum\)"):
        read_state(path)


def test_a_packed_file_is_no_state_dict(packed):
    with pytest.raises(ValueError, match="a packed model"):
        read_state(packed)


def saved(content, **options) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


STATE = {"body.0.body.0.weight": torch.zeros(3), "head.0.weight": torch.zeros(3)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"just some text, no checkpoint", "damaged, or no checkpoint"),
        (pickle.dumps([1, 2]), "damaged, or no checkpoint"),
        (saved({"a": io.StringIO("x"), **STATE}), "it holds _?io.StringIO beside tensors"),
        (saved(STATE)[:-40], "damaged, or no checkpoint"),
        (saved(STATE, _use_new_zipfile_serialization=False)[:-1], "damaged, or no checkpoint"),
        (saved({"epoch": 3, "optimizer": {}}), "no state dict in it"),
        (saved(torch.zeros(3)), "no state dict in it"),
        (saved({}), "no state dict in it"),
        (saved({"params": {}}), "no state dict in it"),
        (saved(STATE), "looks like EDSR"),
        (safetensors.torch.save(STATE), "looks like EDSR"),
        (b"\x07" + bytes(7) + b'{"a":1}', "damaged, or no safetensors file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_model_is_one_line_that_names_the_file(content, message, tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def network(family: str) -> nn.Module:
    if family == "SESR":
        return SESR(SESRConfig(blocks=2)).collapsed()
    return EDSR(EDSRConfig(channels=8, hidden=((8,),))) if family == "EDSR" else float_model()


def assert_no_model(path) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: ") as caught:
        load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("family", ["SESR", "EDSR", "SwinIR"])
def test_no_tensor_of_another_kind_escapes_as_another_error(family, tmp_path):
    state, path = network(family).state_dict(), tmp_path / "model.pth"
    torch.save(state, path)
    assert type(load(path)).__name__ == family
    weights = [name for name in state if name.endswith("weight")]
    replacements = (
        torch.tensor(1.0),
        torch.zeros(0),
        torch.zeros(0, 0, 3, 3),
        torch.zeros(4, 0, 3, 3),
        torch.zeros(0, 4, 3, 3),
        torch.zeros(4),
    )
    for name in weights:
        changed = [lambda v: v.to("meta"), lambda v: v.to_sparse(), lambda v: v.long()]
        changed += [lambda v: v.bool(), *(lambda v, new=new: new for new in replacements)]
        for change in changed:
            torch.save({**state, name: change(state[name])}, path)
            assert_no_model(path)
    for change in (
        torch.Tensor.long,
        lambda v: v.to("meta"),
        *(lambda v, r=r: r for r in replacements),
    ):
        torch.save({name: change(value) for name, value in state.items()}, path)
        assert_no_model(path)


CRAFTED = [
    ("spec", None),
    ("spec", []),
    ("spec", "x"),
    ("spec.pruning", "x"),
    ("spec.site_bits", 3),
    ("spec.method", []),
    ("architecture", None),
    ("architecture", {}),
    ("architecture.name", "x"),
    ("architecture.config", None),
    ("architecture.config.unknown", 1),
    ("architecture.config.embed_dim", "x"),
    ("architecture.config.num_heads", [0]),
    ("architecture.config.window_size", 0),
    ("architecture.config.embed_dim", 10**30),
    ("format", "x"),
    ("format", None),
    ("card", "x"),
]


@pytest.mark.parametrize(("where", "value"), CRAFTED, ids=str)
def test_metadata_that_say_no_model_are_one_line(where, value, packed):
    data = packed.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    card = json.loads(header["__metadata__"]["compsrt"])
    del card["checksum"]
    *parents, last = where.split(".")
    inner = card
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    packed.write_bytes(checkpoint._sealed(safetensors.torch.load(data), card))
    assert_no_model(packed)


@pytest.mark.parametrize("missing", ["codes", "mask", "scalars", "floats"])
def test_a_packed_file_without_one_of_its_tensors_is_one_line(missing, packed):
    data = packed.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    card = json.loads(header["__metadata__"]["compsrt"])
    del card["checksum"]
    tensors = safetensors.torch.load(data)
    for value in (None, torch.zeros(()), torch.zeros(2, 2), torch.zeros(3, dtype=torch.bool)):
        changed = {name: tensor for name, tensor in tensors.items() if name != missing}
        changed |= {} if value is None else {missing: value}
        packed.write_bytes(checkpoint._sealed(changed, card))
        assert_no_model(packed)


@pytest.mark.parametrize(("dtype", "use"), [("float16", "float16"), (float, "float32")])
def test_a_dtype_is_torchs(dtype, use, packed):
    with pytest.raises(TypeError, match=f"^dtype: .* is no torch.dtype; use torch.{use}$"):
        load(packed, dtype=dtype)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth: no such file"):
        load(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="not a file"):
        load(tmp_path)
    with pytest.raises(ValueError, match="dtype"):
        load(tmp_path, dtype=torch.int8)


def test_tensors_that_contradict_each_other_are_one_line(tmp_path):
    state = float_model().state_dict()
    path = tmp_path / "model.pth"
    torch.save({**state, "norm.weight": torch.zeros(5)}, path)
    with pytest.raises(ValueError, match=r"looks like SwinIR, but does not fit: .*norm\.weight"):
        load(path)
    del state["layers.0.residual_group.blocks.0.mlp.fc1.weight"]
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"mlp\.fc1\.weight"):
        load(path)


# --- sizes and levels -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({"bits": 4}, 4),
        ({"bits": 2, "pruning": 0.5}, 2 * 0.5 + 1),
        ({"bits": 3, "pruning": 0.5, "pruning_pattern": "2:4"}, 3 * 0.5 + 1),
        ({"bits": 4, "transform": "hadamard-padded"}, 4 * 4 / 3),  # rows of 12 and 24 as 16 and 32
    ],
    ids=str,
)
def test_bits_per_weight_count_all_that_weights_need(options, bits, tmp_path):
    model, path = quantized(QuantSpec(**options)), tmp_path / "a"
    save_packed(model, path)
    report = size_report(load(path), path)
    scales = WEIGHT_SITES * 4 * 32
    assert report["bits_per_weight"] == pytest.approx(bits + scales / LINEAR_WEIGHTS)
    assert report == size_report(model, path)
    assert report["weights"] == LINEAR_WEIGHTS
    assert report["file_bytes"] == path.stat().st_size
    assert report["ratio"] == report["float_file_bytes"] / report["file_bytes"]
    assert 2 ** (options["bits"] - 1) < report["levels"] <= 2 ** options["bits"]


def test_the_float_model_is_reported_as_float(tmp_path):
    path = tmp_path / "model.safetensors"
    save_float(float_model(), path)
    report = size_report(load(path), path)
    assert report["bits_per_weight"] == 32
    assert report["levels"] is None
    assert report["float_file_bytes"] < report["file_bytes"]
    assert size_report(float_model())["ratio"] is None


@pytest.mark.parametrize("finer", [False, True])
def test_levels_are_counted_at_every_site(finer):
    """Per output channel of a weight and per head where these have scalars of their own."""
    model = quantized(QuantSpec(bits=2, pruning=0.4, per_channel=finer, per_head=finer)).double()
    x = torch.rand(1, 3, 12, 12).double()
    outputs = []
    model.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    levels = count_levels(model, x)
    with torch.no_grad():
        model(x)
    # What was counted is what the model computes: its fused products and these agree.
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-9)
    assert levels.keys() == dict(named_quantizers(model)).keys()
    assert len(levels) == SITES
    assert max(levels.values()) == 4
    assert count_levels(float_model(), x.float()) == {}


def test_unclamped_codes_show_their_true_number_of_levels():
    model = quantized(QuantSpec(bits=2, codes="unclamped"))
    with torch.no_grad():
        for _, site in named_quantizers(model):
            site.alpha.copy_(-0.9 * (site.upper - site.lower) / 3)
    levels = count_levels(model, torch.rand(1, 3, 12, 12))
    assert max(levels.values()) > 25
    report = size_report(model)
    weights = [n for n, site in named_quantizers(model) if isinstance(site, WeightQuantizer)]
    assert report["levels"] == max(levels[name] for name in weights) > 25
    assert report["bits_per_weight"] > 4.5


def test_the_card_is_plain_json_inside_the_header(packed):
    data = packed.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header.keys() == {"__metadata__", "codes", "mask", "scalars", "floats"}
    card = json.loads(header["__metadata__"]["compsrt"])
    assert list(card)[:2] == ["checksum", "format"]
    assert card["architecture"]["config"]["depths"] == [2]
