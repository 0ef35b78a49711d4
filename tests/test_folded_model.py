"""A packed SwinIR as it is run: its blocks folded, on pictures of any size, recorded and replayed."""

from __future__ import annotations

import copy
import logging
import pickle
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import tiny_swinir
from shapes import OnDevice
from torch.utils._python_dispatch import TorchDispatchMode

import compsrt
from compsrt import checkpoint, data, inference, kernels, metrics, models
from compsrt.kernels import dispatch, swin_block
from compsrt.kernels.reference import folded as folded_blocks
from compsrt.kernels.reference import windows
from compsrt.models import quant_swinir
from compsrt.models import replay as replay_module
from compsrt.models.quant_swinir import QuantSwinBlock
from compsrt.models.replay import Recording, Replay
from compsrt.models.swinir import mirror_to_multiple
from compsrt.quantization import QuantSpec
from compsrt.quantizers import named_quantizers, observed

SIZES = [(8, 8), (64, 48), (177, 93)]


def quantized(dtype=torch.float64, spec=None, **changes):
    model = compsrt.quantize(tiny_swinir(**changes), spec or QuantSpec(), torch.rand(1, 3, 24, 24))
    return model.to(dtype).requires_grad_(False)


def both_ways(model, arithmetic="fold"):
    """A model quantizer by quantizer, and the same one folded."""
    folded = copy.deepcopy(model)
    models.set_arithmetic(folded, arithmetic)
    return model, folded


def assert_folded(model):
    assert all(block._folded is not None for *_, block in model.named_blocks())


@pytest.mark.parametrize("arithmetic", ["fold", "integer"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_folded_model_is_the_quantized_model(size, arithmetic):
    """In float64, where no code rounds the other way."""
    reference, folded = both_ways(quantized(embed_dim=36, num_heads=(3,)), arithmetic)
    assert_folded(folded)
    x = torch.rand(1, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(folded(x), reference(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "fields",
    [
        {"per_channel": True, "pruning": 0.4},
        {"per_head": True},
        {"weight_groups": 12},
        {"convolution_bits": 8},
        {"transform": "learned"},
        {"transform": "dct", "site_transforms": (("fc2", "none"),)},
        {"average_bits": 3},
        {"method": "lsq+"},
        {"method": "2dquant", "codes": "clamped", "bits": 8},
    ],
    ids=str,
)
def test_every_option_folds(fields):
    model = compsrt.quantize(tiny_swinir(), QuantSpec(**fields), torch.rand(1, 3, 24, 24))
    for name, parameter in model.named_parameters():
        if name.endswith("angles"):  # away from the identity
            parameter.data.normal_(std=0.1)
    model = model.double().requires_grad_(False)
    x = torch.rand(1, 3, 16, 24, dtype=torch.float64)
    for arithmetic in ("fold",) if "weight_groups" in fields else ("fold", "integer"):
        reference, folded = both_ways(model, arithmetic)
        assert_folded(folded)
        torch.testing.assert_close(folded(x), reference(x), rtol=0, atol=1e-9)


@given(height=st.integers(1, 40), width=st.integers(1, 40), batch=st.integers(1, 3))
@settings(max_examples=10)
def test_any_size_is_the_padded_picture_cropped(height, width, batch):
    reference, folded = both_ways(quantized())
    x = torch.rand(batch, 3, height, width, dtype=torch.float64)
    padded = mirror_to_multiple(x, 8)
    out = folded(x)
    assert torch.equal(out, folded(padded)[..., : 2 * height, : 2 * width])
    want = reference(padded)[..., : 2 * height, : 2 * width]
    torch.testing.assert_close(out, want, rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("convolution_bits", [None, 6])
def test_float_fake_quantized_packed_and_folded_agree_on_real_weights(
    shared, tmp_path, convolution_bits
):
    """The whole chain: the packed file bit for bit, and folded within 0.01 dB on Set5."""
    pairs = data.find_pairs(shared / "data/Set5", 2)
    original = checkpoint.load(shared / "assets/swinir_nano_x2.safetensors")
    crops = torch.cat([data.to_tensor(data.load_pair(p, 2)[0][:48, :48]) for p in pairs])
    spec = QuantSpec(bits=4, convolution_bits=convolution_bits)
    student = compsrt.quantize(original, spec, crops)
    path = tmp_path / "packed.safetensors"
    checkpoint.save_packed(student, path)
    reference = checkpoint.load(path, arithmetic="reference")
    folded = checkpoint.load(path)
    halves = {str(d): checkpoint.load(path, dtype=d) for d in (torch.float16, torch.bfloat16)}
    assert_folded(folded)
    assert torch.equal(reference(crops), student(crops))
    scores = {}
    for name, model in {"reference": reference, "folded": folded, **halves}.items():
        values = []
        for pair in pairs:
            lr, hr = data.load_pair(pair, 2)
            values.append(metrics.psnr(inference.enlarge(model, lr), hr, crop=2))
        scores[name] = np.mean(values)
    for name, score in scores.items():
        assert abs(score - scores["reference"]) < 0.01, name
    assert scores["reference"] > 36  # float: 36.95


def test_half_precision_leaves_scalars_and_stream_alone():
    model = quantized(torch.float32)
    model.layers[0].conv.weight *= 5e4  # the stream leaves the range of float16
    site = model.layers[0].blocks[0].query
    bounds = site.lower.clone(), site.upper.clone()
    x = torch.rand(1, 3, 16, 24)
    want = model(x)
    for dtype in (torch.float16, torch.bfloat16):
        half = copy.deepcopy(model).to(dtype)
        models.set_arithmetic(half, "auto")
        assert_folded(half)
        moved = half.layers[0].blocks[0].query
        assert (moved.lower, moved.upper) == bounds and moved.lower.dtype == torch.float32
        assert half.conv_first.weight.dtype == dtype
        got = half(x.to(dtype))
        assert got.dtype == dtype and torch.isfinite(got).all()
        error = (got.float() - want).norm() / (want - want.mean()).norm()
        assert error < 0.2, f"{dtype}: {error:.3f}"


def test_half_precision_leaves_scales_of_convolutions_alone():
    model = quantized(torch.float32, QuantSpec(bits=4, convolution_bits=6))
    steps = [site.step.clone() for _, site in named_quantizers(model)]
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert all(map(torch.equal, steps, (site.step for _, site in named_quantizers(half))))
    assert half.conv_after_body.bias.dtype == torch.float32
    assert half.norm.weight.dtype == torch.float32
    # Moved once more, as to a device, they are what they were asked to be.
    assert {b.dtype for b in half.to("cpu").modules() if isinstance(b, QuantSwinBlock)} == {
        torch.bfloat16
    }


def test_padded_transforms_run_as_they_were_trained():
    model = quantized(torch.float32, QuantSpec(transform="hadamard-padded"))
    x = torch.rand(1, 3, 16, 16)
    want = model(x)
    models.set_arithmetic(model, "auto")
    assert torch.equal(model(x), want)
    with pytest.raises(ValueError, match="exact"):
        models.set_arithmetic(model, "fold")
    with pytest.raises(ValueError, match="arithmetic: 'floating' is unknown"):
        models.set_arithmetic(model, "floating")


def test_the_limit_of_errors_tells_float16_from_what_is_wrong():
    block = quantized(torch.float32).layers[0].blocks[1]
    exact = block.folded("fold", torch.float32)
    assert quant_swinir.error_of(exact, exact) < 1e-3
    half = block.folded("fold", torch.float16)
    assert quant_swinir.error_of(half, exact) <= quant_swinir.LARGEST_ERROR
    wrong = exact._replace(bias=100 * torch.randn_like(exact.bias))
    assert quant_swinir.error_of(wrong, exact) > quant_swinir.LARGEST_ERROR
    assert block._chosen(on_gpu=False).enter.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("wrong", "form"),
    [
        ([], ("fold", torch.float16)),
        ([("fold", torch.float16)], ("integer", torch.float32)),
        ([("fold", torch.float16), ("integer", torch.float32)], ("fold", torch.float32)),
        ([("fold", torch.float16), ("integer", torch.float32), ("fold", torch.float32)], None),
    ],
    ids=str,
)
def test_what_a_gpu_computes_wrongly_it_does_not_run(wrong, form, monkeypatch):
    def form_of(folded):
        return folded.mode, folded.enter.weight.dtype

    def error_of(folded, exact):
        assert form_of(exact) == ("fold", torch.float32)
        return np.nan if form_of(folded) in wrong else 0.1

    block = quantized(torch.float32).layers[0].blocks[1]
    monkeypatch.setattr(quant_swinir, "error_of", error_of)
    monkeypatch.setattr(swin_block, "has_kernel", lambda x, folded: True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        chosen = block._chosen(on_gpu=True)
    assert [str(w.message).split("errs too much in ")[1].split(";")[0] for w in said] == (
        [" and ".join(["float16", "integers", "float32"][: len(wrong)])] if wrong else []
    )
    assert (None if chosen is None else form_of(chosen)) == form
    # Without a kernel nothing is gained by rounding.
    monkeypatch.setattr(swin_block, "has_kernel", lambda x, folded: False)
    assert form_of(block._chosen(on_gpu=True)) == ("fold", torch.float32)


def test_a_folded_model_still_tells_its_levels_and_gives_gradients():
    model = compsrt.quantize(
        tiny_swinir(), QuantSpec(bits=2, convolution_bits=6), torch.rand(1, 3, 24, 24)
    )
    models.set_arithmetic(model, "auto")
    x = torch.rand(1, 3, 16, 16)
    levels = checkpoint.count_levels(model, x)
    assert levels.keys() == dict(named_quantizers(model)).keys()
    assert max(levels.values()) > 4 and levels["layers.0.residual_group.blocks.0.query"] <= 4
    seen = []
    with observed([model.conv_first.weight], lambda site, value: seen.append(site)):
        model(x)
    assert seen == [model.conv_first.weight]
    x.requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None and float(x.grad.abs().max()) > 0
    assert model.conv_after_body.weight.upper.grad is not None


def test_a_folded_model_can_be_exported():
    _, folded = both_ways(quantized(torch.float32))
    x = torch.rand(1, 3, 16, 24)
    program = torch.export.export(folded, (x,))
    torch.testing.assert_close(program.module()(x), folded(x), rtol=1e-4, atol=1e-4)


class NoDoubles(TorchDispatchMode):
    """Apple's devices have no float64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for y in made if isinstance(made, tuple | list) else [made]:
            assert not isinstance(y, torch.Tensor) or y.dtype != torch.float64, function
        return made


@pytest.mark.parametrize("arithmetic", ["auto", "reference", "fold", "integer"])
@pytest.mark.parametrize("fields", [{}, {"convolution_bits": 6}, {"per_head": True}], ids=str)
def test_pictures_go_through_a_model_without_float64(fields, arithmetic):
    model = quantized(torch.float32, QuantSpec(**fields))
    models.set_arithmetic(model, arithmetic)
    with NoDoubles():
        model(torch.rand(1, 3, 20, 30))


@pytest.mark.gpu
@pytest.mark.parametrize("form", [("fold", torch.float16), ("integer", torch.float32)], ids=str)
def test_a_device_has_the_matrices_of_a_cpu(form):
    model = quantized(torch.float32, QuantSpec(pruning=0.4))
    wanted = [block.folded(*form) for *_, block in model.named_blocks()]
    model = model.cuda()
    found = [block.folded(*form) for *_, block in model.named_blocks()]
    for ours, theirs in zip(found, wanted, strict=True):
        tensors, *numbers = folded_blocks.flatten(ours)
        others, *other_numbers = folded_blocks.flatten(theirs)
        assert numbers == other_numbers
        assert all(
            a.is_cuda and torch.equal(a.cpu(), b) for a, b in zip(tensors, others, strict=True)
        )


@pytest.mark.parametrize("arithmetic", ["fold", "integer"])
def test_autocast_changes_no_folded_block(arithmetic):
    block = quantized(torch.float32).layers[0].blocks[1].folded(arithmetic)
    x = torch.randn(1, 16, 16, block.sizes[0])
    want = kernels.quant_swin_block(x, block)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kernels.quant_swin_block(x, block), want)


# --- Recording -----------------------------------------------------------------------------------


class Graph:
    def __init__(self, function, place, output):
        self.replay = lambda: output.copy_(function(place))


class Recorder(Replay):
    """Records on a CPU what a device would."""

    recorded = 0

    def _record(self, function, x):
        self.recorded += 1
        place = torch.zeros_like(x)
        output = torch.zeros_like(function(place))
        return Recording(Graph(function, place, output), place, output)


class ModelRecorder(Recorder):
    """The same for a model: a replay calls nothing, and no op takes a picture to be on a device."""

    def _record(self, function, x):
        result = function(x)
        return super()._record(lambda place: result, x)

    def forward(self, function, x):
        def plain(x):
            return function(x.as_subclass(torch.Tensor))

        return super().forward(plain, x.as_subclass(OnDevice)).as_subclass(torch.Tensor)


def test_what_is_recorded_stands_for_no_observed_site():
    model = quantized(torch.float32)
    models.set_arithmetic(model, "auto")
    model.replay = ModelRecorder()
    x = torch.rand(1, 3, 16, 16)
    wanted, *_ = [model(x) for _ in range(3)]
    assert model.replay.recorded == 1
    levels = checkpoint.count_levels(model, x)
    assert levels.keys() == dict(named_quantizers(model)).keys()
    assert model.replay.recorded == 1
    torch.testing.assert_close(model(x), wanted, rtol=0, atol=0)


def picture(height: int) -> torch.Tensor:
    return torch.rand(1, 3, height, 8).as_subclass(OnDevice)


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def test_a_shape_is_recorded_when_it_comes_the_second_time(device):
    replay = Recorder(shapes=2)
    double = lambda x: 2 * x  # noqa: E731
    for heights, recorded in [([8, 9, 10], 0), ([8, 8, 8], 1), ([9, 8], 2), ([10], 3), ([8], 3)]:
        for height in heights:
            x = picture(height)
            out = replay(double, x)
            assert torch.equal(out, 2 * x)
        assert replay.recorded == recorded, heights
    assert len(replay._recordings) == 2
    for recorded in (3, 4):  # it was the one to go, and starts anew
        replay(double, picture(9))
        assert replay.recorded == recorded


def test_more_shapes_in_turn_than_are_kept_are_not_recorded_each_time(device):
    replay = Recorder(shapes=2)
    for _ in range(8):
        for height in (8, 9, 10):
            replay(torch.neg, picture(height))
    assert replay.recorded <= 3 * 8 / 2


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_what_cannot_be_recorded_runs_on(error, device):
    class Refused(Recorder):
        def _record(self, function, x):
            if len(x[0, 0]) == 8:
                raise error("operation not permitted when stream is capturing\nCompile with ...")
            return super()._record(function, x)

    replay = Refused()

    def call(*heights):
        for x in map(picture, heights):
            assert torch.equal(replay(torch.neg, x), -x)

    with pytest.warns(UserWarning, match="1x3x8x8 are not recorded: .* is capturing$") as said:
        call(8, 9, 8, 9, 8, 9)
    assert len(said) == 1 and replay.recorded == 1


def test_recordings_make_room_when_memory_runs_out(device):
    replay = Recorder()
    for _ in range(2):
        replay(torch.neg, picture(8))
    assert replay.recorded == 1

    def large(x):
        if replay._recordings:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 2 * x

    x = picture(9)
    assert torch.equal(replay(large, x), 2 * x)
    assert not replay._recordings

    def too_large(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        replay(too_large, picture(10))


def test_threads_take_turns(device):
    replay = Recorder()
    running = []

    def slow(x):
        running.append(x)
        time.sleep(0.005)
        assert len(running) == 1
        running.clear()
        return 2 * x

    def call(number):
        x = torch.full((1, 3, 8, 8), float(number)).as_subclass(OnDevice)
        return torch.equal(replay(slow, x), 2 * x)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(20)))


def test_nothing_is_recorded_while_another_records(device, monkeypatch):
    monkeypatch.setattr(replay_module, "is_recording", lambda: True)
    replay = Recorder()
    for _ in range(4):
        replay(torch.neg, picture(8))
    assert replay.recorded == 0 and not replay._seen


def test_tables_of_windows_are_kept_for_all_but_recordings(monkeypatch):
    windows.forget()
    cpu = torch.device("cpu")
    with torch.inference_mode():
        kept = windows.relative_position_index(4, cpu)
    assert not kept.is_inference()
    monkeypatch.setattr(windows, "is_recording", lambda: True)
    own = windows.relative_position_index(4, cpu)
    assert own is not kept and torch.equal(own, kept)
    assert windows.relative_position_index(4, cpu) is not own
    monkeypatch.undo()
    assert windows.relative_position_index(4, cpu) is kept


def test_results_of_a_replay_are_the_callers_own(device):
    replay = Recorder()
    _, *others = [replay(lambda x: 2 * x, picture(8)) for _ in range(4)]
    kept = [other.clone() for other in others]
    replay(lambda x: 2 * x, picture(8))
    assert all(torch.equal(a, b) for a, b in zip(others, kept, strict=True))


def test_a_copy_or_a_move_starts_anew(device):
    replay = Recorder()
    for _ in range(3):
        replay(torch.neg, picture(8))
    assert replay._recordings
    assert not copy.deepcopy(replay)._recordings
    assert not pickle.loads(pickle.dumps(replay))._recordings
    replay.to(torch.float16)
    assert not replay._recordings and not replay._seen


def test_what_takes_long_is_said_once(device, monkeypatch, caplog):
    monkeypatch.setattr("compsrt.models.replay.SAID", -1)
    replay = Recorder()
    with caplog.at_level(logging.WARNING, "compsrt"):
        for _ in range(4):
            replay(torch.neg, picture(8))
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "first picture of 1x3x8x8 on cpu",
        "launches recorded for 1x3x8x8 on cpu",
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("arithmetic", quant_swinir.ARITHMETICS)
@pytest.mark.parametrize("convolution_bits", [None, 6])
def test_a_device_gives_the_same_picture_recorded_or_not(tmp_path, arithmetic, convolution_bits):
    spec = QuantSpec(convolution_bits=convolution_bits)
    checkpoint.save_packed(
        quantized(torch.float32, spec, embed_dim=60, num_heads=(6,), mlp_hidden=(120,)),
        tmp_path / "packed.safetensors",
    )
    x = torch.rand(1, 3, 64, 48)
    want = checkpoint.load(tmp_path / "packed.safetensors", arithmetic="reference")(x)
    model = checkpoint.load(tmp_path / "packed.safetensors", arithmetic=arithmetic).cuda()
    for _ in range(3):
        got = model(x.cuda()).cpu()
        # One code that rounds the other way changes the picture: compared as wholes.
        assert (got - want).norm() / (want - want.mean()).norm() < 0.05
    if arithmetic != "reference":
        assert len(model.replay._recordings) == 1


def on_device(device="cuda", **changes):
    model = quantized(torch.float32, **changes)
    models.set_arithmetic(model, "auto")
    return model.to(device)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [24, 180])  # with a kernel for blocks, and without
@torch.no_grad()
def test_a_recording_outlives_the_tables_of_other_sizes(size):
    model = on_device(embed_dim=size, num_heads=(6,), mlp_hidden=(2 * size,))
    x = torch.rand(1, 3, 16, 16, device="cuda")
    wanted, again = model(x), model(x)
    for windows_across in range(3, 15):
        model(torch.rand(1, 3, 16, 8 * windows_across, device="cuda"))
    assert len(model.replay._recordings) == 1
    assert torch.equal(model(x), again)
    torch.testing.assert_close(again, wanted, rtol=0, atol=1e-5)


@pytest.mark.gpu
@torch.no_grad()
def test_a_square_is_recorded_whatever_its_strides():
    model = on_device()
    x = torch.rand(1, 3, 16, 16, device="cuda")
    turned = [torch.rot90(x, turn, (2, 3)) for turn in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [model(y) for y in turned]
    assert len(model.replay._recordings) == 1
    model.replay = None
    for y, ours in zip(turned, found, strict=True):
        torch.testing.assert_close(ours, model(y), rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_recorded_in_one_mode_and_replayed_in_the_other(first):
    model = on_device()
    x = torch.rand(1, 3, 16, 16, device="cuda")
    with first():
        wanted = [model(x) for _ in range(3)][-1].clone()
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert torch.equal(model(x), wanted)
    assert len(model.replay._recordings) == 1


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@torch.no_grad()
def test_a_device_that_is_not_the_current_one():
    x = torch.rand(1, 3, 16, 16)
    torch.manual_seed(0)
    wanted = on_device("cuda:0")(x.to("cuda:0")).cpu()
    torch.manual_seed(0)
    model = on_device("cuda:1")
    for _ in range(3):
        torch.testing.assert_close(model(x.to("cuda:1")).cpu(), wanted, rtol=0, atol=1e-5)
        model(torch.rand_like(x).to("cuda:1"))
    assert len(model.replay._recordings) == 1


@pytest.mark.parametrize("convolution_bits", [None, 6])
def test_where_convolutions_may_be_tf32(convolution_bits, monkeypatch):
    """Where blocks may be of float16: "auto", and half types of what is folded."""
    asked = []

    def convolve(x, weight, *rest, allow_tf32=False, **options):
        asked.append(allow_tf32)
        return kernels.reference.convolve(x, weight, *rest, **options)

    model = quantized(torch.float32, QuantSpec(convolution_bits=convolution_bits))
    monkeypatch.setattr(kernels, "convolve", convolve)

    def allowed() -> bool:
        asked.clear()
        model(torch.rand(1, 3, 8, 8))
        assert len(set(asked)) == 1
        return asked[0]

    for arithmetic in quant_swinir.ARITHMETICS:
        models.set_arithmetic(model, arithmetic)
        assert allowed() == (arithmetic == "auto")
    models.set_arithmetic(model, "fold")
    model.half()
    assert allowed()
    model.float()
    assert not allowed()


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="needs the interpreter")
def test_convolutions_run_on_codes_where_kernels_do(tmp_path, monkeypatch):
    checkpoint.save_packed(
        quantized(torch.float32, QuantSpec(convolution_bits=6)), tmp_path / "packed.safetensors"
    )
    model = checkpoint.load(tmp_path / "packed.safetensors")
    layer, x = model.conv_after_body, torch.rand(1, 24, 6, 9)
    want = layer(x)
    monkeypatch.setenv("COMPSRT_KERNELS", "triton")
    layer.set_arithmetic("auto")
    assert layer._run[0].dtype == torch.int8
    # The interpreter cuts bfloat16 off; see test_convolution.py.
    torch.testing.assert_close(layer(x), want, rtol=0, atol=2.0**-12 * float(want.abs().max()))


@pytest.mark.parametrize("bits", [None, 6])
@torch.no_grad()
def test_weights_of_convolutions_are_made_ready_once_and_saved_as_they_were(tmp_path, bits):
    model = quantized(torch.float32, QuantSpec(convolution_bits=bits))
    first, again = tmp_path / "first.safetensors", tmp_path / "again.safetensors"
    checkpoint.save_packed(model, first)
    loaded = checkpoint.load(first)
    held = loaded.conv_after_body.weight if bits is None else loaded.conv_after_body._run[0]
    assert held.is_contiguous(memory_format=torch.channels_last)
    if bits is not None:
        x = torch.rand(1, 3, 16, 16)
        before = loaded(x)
        loaded.conv_after_body.weight.upper += 1
        assert torch.equal(loaded(x), before)
        models.set_arithmetic(loaded, "auto")
        assert not torch.equal(loaded(x), before)
        loaded = checkpoint.load(first)
    checkpoint.save_packed(loaded, again)
    assert again.read_bytes() == first.read_bytes()
