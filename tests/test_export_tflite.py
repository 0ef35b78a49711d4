"""SESR as TFLite: the file computes what the network computes, in int8, with the learned scales."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from networks import tiny_sesr, tiny_swinir

import compsrt
from compsrt import data
from compsrt.exporting.sesr_graph import LARGEST_BIAS, _affine, graph_of
from compsrt.exporting.tflite import _rounded, tflite_file
from compsrt.images import to_tensor
from compsrt.models.sesr import luma
from compsrt.quantization import QuantSpec
from compsrt.quantizers import AffineQuantizer

INT8 = QuantSpec(bits=8, method="dobi")
SHAPES = ((2, "prelu", 24, 32), (2, "relu", 17, 23), (4, "prelu", 13, 21), (4, "relu", 16, 8))


def pictures(count: int, height: int, width: int) -> torch.Tensor:
    """Smooth random RGB pictures (B, 3, H, W)."""
    noise = torch.rand(count, 3, -(-height // 6), -(-width // 6))
    return F.interpolate(noise, size=(height, width), mode="bicubic").clamp(0, 1)


def int8_network(scale: int = 2, activation: str = "prelu", **changes):
    network = tiny_sesr(scale=scale, activation=activation, **changes)
    return compsrt.quantize(network, INT8, pictures(4, 32, 32))


@pytest.fixture(scope="module")
def litert():
    return pytest.importorskip("ai_edge_litert.interpreter", reason="needs the extra 'export'")


def run(litert, content: bytes, x: np.ndarray, resolver: str = "AUTO") -> np.ndarray:
    """The output of a file for an input (1, H, W, 1) of its own type."""
    interpreter = litert.Interpreter(
        model_content=content,
        num_threads=1,
        experimental_op_resolver_type=getattr(litert.OpResolverType, resolver),
    )
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


def pixels(x: torch.Tensor) -> np.ndarray:
    """(1, 1, H, W) in [0, 1] as (H, W) whole numbers."""
    return np.rint(x[0, 0].detach().numpy() * 255).astype(int)


def run_int8(litert, content: bytes, x: torch.Tensor, resolver: str = "AUTO") -> np.ndarray:
    codes = (pixels(x) - 128).astype(np.int8)[None, :, :, None]
    return run(litert, content, codes, resolver)[0, :, :, 0].astype(int) + 128


def psnr(a: np.ndarray, b: np.ndarray, border: int) -> float:
    inside = slice(border, -border), slice(border, -border)
    return float(10 * np.log10(255**2 / np.mean((a[inside] - b[inside]) ** 2.0)))


@pytest.mark.parametrize("resolver", ["AUTO", "BUILTIN_REF"])
@pytest.mark.parametrize(("scale", "activation", "height", "width"), SHAPES)
def test_integers_compute_what_the_quantized_network_computes(
    scale, activation, height, width, resolver, litert
):
    network = int8_network(scale, activation)
    large = luma(pictures(1, height * scale, width * scale))
    small = F.interpolate(large, size=(height, width), mode="bicubic", antialias=True)
    ours = pixels(network(small))
    theirs = run_int8(litert, tflite_file(network, height, width).content, small, resolver)
    assert theirs.shape == ours.shape
    # The kernels round products and sums in their own way, and slopes have 8 bits.
    assert np.abs(theirs - ours).max() <= 2
    assert (np.abs(theirs - ours) <= 1).mean() > 0.99
    assert (theirs == ours).mean() > 0.8
    truth = pixels(large)
    assert abs(psnr(theirs, truth, scale) - psnr(ours, truth, scale)) < 0.1


@pytest.mark.parametrize(("scale", "activation", "height", "width"), SHAPES)
def test_a_float_network_gives_a_float_file(scale, activation, height, width, litert):
    network = tiny_sesr(scale=scale, activation=activation)
    # Every channel of the last convolution its own value: pixels must come out in their places.
    network.body.last.bias.copy_(torch.arange(scale**2) / 7)
    x = torch.rand(1, 1, height, width)
    file = tflite_file(network, height, width)
    assert file.input == ("luma", "float32", (1, height, width, 1), None, None)
    y = run(litert, file.content, x.permute(0, 2, 3, 1).numpy())
    # float32: sums of at most 200 products, in another order
    np.testing.assert_allclose(y[..., 0], network(x)[0].numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("scale", "activation", "height", "width"), SHAPES)
def test_all_tensors_are_int8_with_the_learned_scales(scale, activation, height, width, litert):
    network = int8_network(scale, activation)
    body = network.body
    file = tflite_file(network, height, width)
    interpreter = litert.Interpreter(
        model_content=file.content, experimental_op_resolver_type=litert.OpResolverType.BUILTIN_REF
    )
    tensors = {tensor["name"]: tensor for tensor in interpreter.get_tensor_details()}
    for name, tensor in tensors.items():
        assert tensor["dtype"] == (np.int32 if name.endswith("/bias") else np.int8), name
    ends = interpreter.get_input_details() + interpreter.get_output_details()
    for end, said in zip(ends, (file.input, file.output), strict=True):
        assert (end["name"], tuple(end["shape"])) == (said.name, said.shape)
        assert end["quantization"] == (said.scale, said.zero_point) == (np.float32(1 / 255), -128)

    learned = {"long": body.long, "last/products": body.last_sum, "residual": body.output}
    for number, (products, activated) in enumerate(zip(body.sums, body.activated, strict=True)):
        learned[f"layer{number}/products"] = products
        learned[f"layer{number}/activated"] = activated
    for name, quantizer in learned.items():
        scale_of, zero_point = tensors[name]["quantization"]
        assert scale_of == quantizer.step
        assert abs(scale_of * (-128 - zero_point) - quantizer.grid().lower) < 1e-6
    for number, convolution in enumerate(body.convolutions):
        weight = tensors[f"layer{number}/weight"]
        values = interpreter.get_tensor(weight["index"]).transpose(0, 3, 1, 2)
        scales = weight["quantization_parameters"]["scales"]
        real = convolution.weight().view(len(scales), *convolution.shape).numpy()
        np.testing.assert_allclose(values * scales[:, None, None, None], real, rtol=0, atol=1e-6)


def test_the_file_says_what_it_is(litert):
    schema = pytest.importorskip("ai_edge_litert.schema_py_generated")
    content = tflite_file(int8_network(), 8, 8).content
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    facts = json.loads(bytes(model.buffers[model.metadata[0].buffer].data))
    assert model.metadata[0].name == b"compsrt"
    assert facts["network"] == "SESR"
    assert facts["weight_bits"] == facts["activation_bits"] == 8
    assert facts["picture"].startswith("luma")
    interpreter = litert.Interpreter(model_content=content)
    assert interpreter.get_signature_list() == {
        "serving_default": {"inputs": ["luma"], "outputs": ["enlarged"]}
    }


def test_another_size_needs_no_other_file(litert):
    network = int8_network()
    interpreter = litert.Interpreter(model_content=tflite_file(network, 8, 8).content)
    interpreter.resize_tensor_input(interpreter.get_input_details()[0]["index"], (1, 11, 14, 1))
    interpreter.allocate_tensors()
    assert tuple(interpreter.get_output_details()[0]["shape"]) == (1, 22, 28, 1)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: tiny_swinir(), "SwinIR has no TFLite form"),
        (
            lambda: quantized(bits=4),
            "4-bit weights and 4-bit activations; .* --method qat --bits 8",
        ),
        (lambda: quantized(bits=8, activation_bits=6), "8-bit weights and 6-bit activations"),
        (lambda: tiny_sesr().widened(expansion=16), "blocks are wide"),
    ],
    ids=["swinir", "4 bits", "6 bits", "wide"],
)
def test_what_has_no_tflite_form_is_refused(network, message):
    with pytest.raises(ValueError, match=message):
        tflite_file(network(), 8, 8)


def quantized(**fields):
    return compsrt.quantize(tiny_sesr(), QuantSpec(method="minmax", **fields), pictures(1, 16, 16))


@pytest.mark.parametrize("sides", [(0, 8), (8, -1)])
def test_a_picture_has_at_least_one_pixel(sides):
    with pytest.raises(ValueError, match="both must be at least 1"):
        tflite_file(tiny_sesr(), *sides)


@pytest.mark.parametrize("sides", [(99999999999999, 1), (10**9, 10**9), (2**16, 2**14)])
def test_a_picture_larger_than_a_tensor_can_be_is_refused(sides):
    message = (
        rf"height and width: {sides[0]} x {sides[1]} pixels of 16 channels .* at most 134217727"
    )
    with pytest.raises(ValueError, match=message):
        tflite_file(tiny_sesr(scale=4), *sides)


# --- Arrays --------------------------------------------------------------------------------------


def test_the_lower_bound_is_the_first_integer():
    quantizer = AffineQuantizer(8, INT8)
    for lower, upper in ((-1.0, 2.0), (0.0, 0.3), (-5.0, 0.0), (-1e-4, 7.0)):
        quantizer.set_bounds(torch.tensor(lower), torch.tensor(upper))
        scale, zero_point = _affine(quantizer)
        levels = (np.arange(-128, 128) - zero_point) * scale
        x = torch.linspace(lower - 0.1, upper + 0.1, 5000)
        found = quantizer(x).detach().unique().numpy()
        np.testing.assert_allclose(found, levels, rtol=0, atol=1e-6 * (upper - lower))


def test_a_bias_beyond_32_bits_gets_coarser_units():
    network = int8_network()
    convolution = network.body.convolutions[1]
    with torch.no_grad():
        convolution.weight.upper[2] = 1e-7
        convolution.weight.restore()
        convolution.bias[2] = -0.7
        convolution.bias[3] = 0.1
    found = graph_of(network).layers[1].convolution
    assert abs(int(found.bias[2])) <= LARGEST_BIAS
    real = found.bias * found.bias_scale.astype(np.float64)
    expected = convolution.bias.detach().numpy()
    np.testing.assert_allclose(real, expected, rtol=1e-6, atol=found.bias_scale.max())


def test_pruned_weights_are_0():
    network = compsrt.quantize(
        tiny_sesr(), QuantSpec(bits=8, method="dobi", pruning=0.5), pictures(2, 16, 16)
    )
    layers = zip(graph_of(network).layers, network.body.convolutions, strict=True)
    for layer, convolution in layers:
        weight = layer.convolution.weight.reshape(convolution.weight.mask.shape)
        assert (weight[~convolution.weight.mask.numpy()] == 0).all()
        assert (weight != 0).any()


@given(
    arrays.arrays(np.float32, st.integers(1, 20), elements=st.floats(-2, 2, width=32)),
)
def test_slopes_are_rounded_to_the_nearest_level(slopes):
    codes, (scale, zero_point) = _rounded(slopes)
    assert codes.dtype == np.int8
    assert -128 <= zero_point <= 127
    real = (codes.astype(int) - zero_point) * scale
    assert np.abs(real - slopes).max() <= 0.501 * scale
    assert (real[slopes == 0] == 0).all()


# --- Trained weights -----------------------------------------------------------------------------


@pytest.mark.slow
def test_set5_in_int8_is_within_a_tenth_of_a_decibel(litert, shared):
    network = compsrt.load(Path(compsrt.__file__).parent / "assets/sesr_m5_x2_8bit.safetensors")
    pairs = [data.load_pair(pair, 2) for pair in data.find_pairs(shared / "data" / "Set5", 2)]
    losses, same, close = [], [], []
    for lr, hr in pairs:
        small, truth = luma(to_tensor(lr)), pixels(luma(to_tensor(hr)))
        ours = pixels(network(small))
        theirs = run_int8(litert, tflite_file(network, *small.shape[2:]).content, small)
        losses.append(psnr(ours, truth, 2) - psnr(theirs, truth, 2))
        same.append((ours == theirs).mean())
        close.append((np.abs(ours - theirs) <= 1).mean())
    assert abs(np.mean(losses)) < 0.1, losses
    # PReLU slopes are rounded to 8 bits in the file: 60 % were equal, 97 % within a level.
    assert np.mean(same) > 0.5 and np.mean(close) > 0.95, (same, close)
