"""compsrt.count against published figures and against the files that are written."""

import pytest
import torch
from networks import tiny_swinir

import compsrt
from compsrt import checkpoint
from compsrt.counting import count
from compsrt.models import sesr
from compsrt.models.edsr import EDSR, EDSRConfig
from compsrt.models.sesr import SESR, SESRConfig
from compsrt.models.swinir import SwinIR, SwinIRConfig

HD = 720, 1280  # the output that papers count for


@pytest.mark.parametrize(
    ("scale", "parameters", "giga"), [(2, 609_042, 140.0), (3, 615_132, 62.7), (4, 623_658, 35.8)]
)
def test_srpn_lite_has_the_published_size(scale, parameters, giga):
    counted = count(EDSR(EDSRConfig.uniform(scale, blocks=16, channels=45)), *HD)
    assert counted.parameters == parameters
    assert round(counted.macs / 1e9, 1) == giga


@pytest.mark.parametrize(
    ("size", "weights", "giga"),
    [("m3", 8_912, 2.05), ("m5", 13_520, 3.11), ("m7", 18_128, 4.18), ("m11", 27_344, 6.30),
     ("xl", 105_376, 24.3)],
)  # fmt: skip
def test_sesr_has_the_published_size(size, weights, giga):
    blocks, features = sesr.SIZES[size]
    counted = count(SESR(SESRConfig(2, blocks, features)), *HD)
    assert counted.weights == weights
    assert counted.macs / 1e9 == pytest.approx(giga, abs=0.05 if giga > 20 else 0.006)


def test_swin_blocks_of_swinir_light_x4_have_the_published_macs():
    # 2DQuant counts 14.34 G in what it quantizes, for 128 x 128 pixels of input.
    counted = count(SwinIR(SwinIRConfig()), 512, 512)
    blocks = [layer for layer in counted.layers if "blocks" in layer.name]
    assert round(sum(layer.macs for layer in blocks) / 1e9, 2) == 14.34
    products = 2 * 24 * 128 * 128 * 64 * 60
    assert sum(layer.macs for layer in blocks if layer.name.endswith(".attn")) == products
    assert counted.parameters == 929_628


def test_macs_are_counted_on_whole_windows():
    model = tiny_swinir()
    assert count(model, 32, 32).macs == count(model, 18, 32).macs < count(model, 34, 32).macs


def test_a_row_a_layer_and_their_sum():
    model = EDSR(EDSRConfig.uniform(2, blocks=1, channels=8))
    counted = count(model, 20, 30)
    assert [layer.name for layer in counted.layers] == [
        "head.0", "body.0.body.0", "body.0.body.2", "body.1", "tail.0"
    ]  # fmt: skip
    head = counted.layers[0]
    assert (head.parameters, head.weights, head.macs, head.bytes) == (224, 216, 216 * 150, 896)
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    assert counted.bytes == 4 * counted.parameters
    lines = str(counted).splitlines()
    assert len(lines) == 2 + 5 + 1 and lines[-1].split()[:2] == ["sum", str(counted.parameters)]
    assert "30x20" in lines[0]


@pytest.mark.parametrize("spec", [{"bits": 4}, {"bits": 3, "pruning": 0.4, "per_channel": True}])
def test_bytes_of_a_quantized_network_are_those_of_its_file(tmp_path, spec):
    model = compsrt.quantize(tiny_swinir(), compsrt.QuantSpec(**spec), torch.rand(1, 3, 16, 16))
    path = tmp_path / "packed.safetensors"
    checkpoint.save_packed(model, path)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    counted = count(model, 32, 32)
    assert counted.bytes == pytest.approx(path.stat().st_size - header, abs=len(counted.layers))
    float_count = count(tiny_swinir(), 32, 32)
    assert [layer.name for layer in counted.layers] == [layer.name for layer in float_count.layers]
    assert counted.macs == float_count.macs and counted.weights == float_count.weights


def test_a_quantized_sesr_is_counted_by_the_layers_of_the_float_one():
    network = SESR(SESRConfig(blocks=2, features=4))
    spec = compsrt.QuantSpec(bits=8, method="dobi")
    counted = count(compsrt.quantize(network, spec, torch.rand(1, 3, 16, 16)), 32, 32)
    layers = {layer.name: layer for layer in counted.layers}
    first = layers["body.first"]  # 100 codes, four scales, four biases
    assert first.bytes == 100 + 4 * 4 + 2 * 4
    assert counted.macs == count(network, 32, 32).macs


def test_wrong_sizes_and_networks_are_refused():
    with pytest.raises(ValueError, match="height, width: 1 x 720"):
        count(tiny_swinir(), 1, 720)
    with pytest.raises(ValueError, match="Linear is not supported"):
        count(torch.nn.Linear(1, 1), *HD)
