"""Networks as ONNX: onnxruntime computes what PyTorch computes, whatever the size of the picture."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import tiny_sesr, tiny_swinir

import compsrt
from compsrt.exporting import onnx_traced
from compsrt.exporting.onnx_integer import integer_onnx_file
from compsrt.kernels.reference import windows
from compsrt.models.edsr import EDSR, EDSRConfig
from compsrt.models.sesr import luma
from compsrt.quantization import QuantSpec

ROOT = Path(__file__).resolve().parents[1]
SIZES = ((1, 16, 24), (2, 21, 13), (1, 3, 1))  # (B, H, W); the window is 8 pixels wide


@pytest.fixture(scope="module")
def onnx():
    pytest.importorskip("onnxscript", reason="needs the extra 'export'")
    return pytest.importorskip("onnx", reason="needs the extra 'export'")


@pytest.fixture(scope="module")
def onnxruntime():
    return pytest.importorskip("onnxruntime", reason="needs the extra 'export'")


def run(onnxruntime, content: bytes, x: torch.Tensor) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    # Where a processor lacks VNNI, integer sums are exact only so; elsewhere it changes nothing.
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def edsr(form: str) -> EDSR:
    config = EDSRConfig.uniform(3, blocks=2, channels=8, groups=2 if form == "rir" else 0)
    return EDSR(config).eval().requires_grad_(False)


FLOATS = {
    "SESR x2": lambda: tiny_sesr(),
    "SESR x4, ReLU": lambda: tiny_sesr(scale=4, activation="relu"),
    "EDSR": lambda: edsr("edsr"),
    "RIR": lambda: edsr("rir"),
    "SwinIR": lambda: tiny_swinir(),
    "SwinIR x4, three convolutions, window 4": lambda: tiny_swinir(
        scale=4, upsampler="pixelshuffle", resi_connection="3conv", window_size=4
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("make", FLOATS.values(), ids=FLOATS)
def test_a_float_network_computes_the_same_at_every_size(make, onnx, onnxruntime):
    network = make()
    windows.forget()  # what a trace leaves there must not be used
    file = onnx_traced.traced_onnx_file(network)
    channels = file.input.shape[1]
    for batch, height, width in SIZES:
        x = torch.rand(batch, channels, height, width)
        y = run(onnxruntime, file.content, x)
        # float32, values of size 1, in another order of sums: some units in the last place
        np.testing.assert_allclose(y, network(x).numpy(), rtol=0, atol=1e-5)
    model = onnx.load_from_string(file.content)
    assert model.opset_import[0].version >= 17
    assert ends(model) == [(end.name, end.shape) for end in (file.input, file.output)]
    assert file.weights == "float32"
    facts = json.loads(model.metadata_props[0].value)
    assert facts["network"] == type(network).__name__
    assert facts["picture"].startswith("luma" if channels == 1 else "RGB")


def ends(model) -> list[tuple[str, tuple]]:
    """Names and sizes of input and output as the file has them."""
    return [
        (end.name, tuple(d.dim_param or d.dim_value for d in end.type.tensor_type.shape.dim))
        for end in (*model.graph.input, *model.graph.output)
    ]


LOW_BITS = {
    "SwinIR, 4 bits, rotated": (tiny_swinir, QuantSpec(bits=4, method="compsrt", pruning=0.3)),
    "SwinIR, 3 bits": (tiny_swinir, QuantSpec(bits=3, method="2dquant", per_channel=True)),
    "SESR, 6 bits": (tiny_sesr, QuantSpec(bits=6, method="dobi")),
}


@pytest.mark.slow
@pytest.mark.parametrize(("make", "spec"), LOW_BITS.values(), ids=LOW_BITS)
def test_a_quantized_network_computes_the_same(make, spec, onnx, onnxruntime):
    network = compsrt.quantize(make(), spec, torch.rand(2, 3, 24, 24)).requires_grad_(False)
    file = onnx_traced.traced_onnx_file(network)
    for batch, height, width in SIZES:
        x = torch.rand(batch, file.input.shape[1], height, width)
        error = np.abs(run(onnxruntime, file.content, x) - network(x).numpy())
        # A code that rounds the other way in float32 changes the pixels of a window or two.
        assert np.median(error) < 1e-5
        assert np.sqrt(np.mean(error**2)) < 0.02
    kinds = [node.op_type for node in onnx.load_from_string(file.content).graph.node]
    assert kinds.count("Round") > 5, "activations are rounded to their levels"


@pytest.mark.slow
def test_a_trace_leaves_no_mark(onnx):
    network = tiny_swinir()
    x = torch.rand(1, 3, 16, 8)
    expected = network(x)
    windows.forget()
    content = onnx_traced.traced_onnx_file(network).content
    assert torch.equal(network(x), expected), "the network computes with symbols of the trace"
    for path in (str(ROOT), sys.prefix):
        assert path.encode() not in content


def test_padding_before_the_network_is_the_networks_own():
    network = tiny_swinir(num_heads=(2,), depths=(2,)).double()
    padded = onnx_traced._Padded(network, network.scale, network.window_size)

    @given(st.integers(1, 19), st.integers(1, 19))
    def check(height, width):
        x = torch.rand(1, 3, height, width, dtype=torch.float64)
        torch.testing.assert_close(padded(x), network(x), rtol=0, atol=0)

    check()


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_next_number_below_is_the_product(bits):
    x = np.float32(2**bits - 0.5)
    assert x * np.float32(1 - 2.0**-24) == np.nextafter(x, np.float32(0))


# --- Integers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["prelu", "relu"])
@pytest.mark.parametrize("scale", [2, 4])
def test_integers_compute_what_the_quantized_network_computes(
    scale, activation, onnx, onnxruntime, tmp_path
):
    network = int8_network(scale, activation)
    file = integer_onnx_file(network)
    for batch, height, width in SIZES:
        large = luma(pictures(batch, height * scale, width * scale))
        small = F.interpolate(large, size=(height, width), mode="area")
        ours, theirs = network(small).numpy(), run(onnxruntime, file.content, small)
        assert theirs.shape == ours.shape
        levels = np.rint((theirs - ours) * 255)
        assert np.abs(levels).max() <= 2
        assert (np.abs(levels) <= 1).mean() > 0.99
        assert (levels == 0).mean() > 0.8
        errors = [np.mean((y - large.numpy()) ** 2) for y in (ours, theirs)]
        assert abs(10 * np.log10(errors[0] / errors[1])) < 0.1  # dB

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3  # that the file is for this machine alone
    onnxruntime.InferenceSession(file.content, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert "Conv" not in kinds, "convolutions run in integers"
    assert kinds.count("QLinearConv") == network.config.blocks + 2
    assert kinds.count("QLinearAdd") == 2


def int8_network(scale: int, activation: str):
    network = tiny_sesr(scale=scale, activation=activation)
    return compsrt.quantize(network, QuantSpec(bits=8, method="dobi"), pictures(4, 32, 32))


def pictures(count: int, height: int, width: int) -> torch.Tensor:
    noise = torch.rand(count, 3, -(-height // 6), -(-width // 6))
    return F.interpolate(noise, size=(height, width), mode="bicubic").clamp(0, 1)


def test_integers_are_stored_with_the_learned_scales(onnx):
    network = int8_network(2, "prelu")
    body = network.body
    file = integer_onnx_file(network)
    model = onnx.load(io.BytesIO(file.content))
    assert ends(model) == [(end.name, end.shape) for end in (file.input, file.output)]
    assert (file.input.scale, file.input.zero_point) == (np.float32(1 / 255), 0)
    assert file.weights == "int8"
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    for number, (convolution, products) in enumerate(
        zip(body.convolutions, body.sums, strict=True)
    ):
        weight, scale = (stored[f"layer{number}/weight/{part}"] for part in ("integers", "scale"))
        assert (weight.dtype, scale.shape) == (np.int8, weight.shape[:1])
        real = convolution.weight().view(weight.shape).numpy()
        np.testing.assert_allclose(weight * scale[:, None, None, None], real, rtol=0, atol=1e-6)
        assert stored[f"layer{number}/bias/integers"].dtype == np.int32
        assert stored[f"layer{number}/products/scale"] == products.step.numpy()


@pytest.mark.parametrize("spec", [None, QuantSpec(bits=6, method="minmax")])
def test_what_has_no_8_bits_has_no_integer_file(spec, onnx):
    network = tiny_sesr()
    if spec is not None:
        network = compsrt.quantize(network, spec, torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"float model|6-bit weights"):
        integer_onnx_file(network)
