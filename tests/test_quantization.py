import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import golden_swinir, tiny_swinir

import compsrt
from compsrt import checkpoint, models, transforms
from compsrt.calibration import calibrate
from compsrt.models.quant_swinir import swap_blocks
from compsrt.quantization import METHODS, QuantSpec
from compsrt.quantizers import WeightQuantizer, named_quantizers, quantizers

PAPER = {"one_sided": "never", "storage": "float32"}


def golden_spec(method, bits):
    transform = "hadamard-padded" if method == "compsrt" else "none"
    return QuantSpec(bits=bits, method=method, transform=transform, **PAPER)


def site_of(published):
    """Our name of a published quantizer: ...attn.qkv.q.act_quantizer is ...q.input."""
    block, _, rest = published.partition(".attn.")
    if not rest:
        block, _, rest = published.partition(".mlp.")
    rest = rest.removeprefix("qkv.")
    rest = rest.replace("act_quantizer", "input").replace("weight_quantizer", "weight")
    words = {"mymodule_q": "query", "mymodule_k": "key", "mymodule_v": "value",
             "mymodule_a": "attention"}  # fmt: skip
    return f"{block}.{words.get(rest, rest)}"


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("method", ["compsrt", "2dquant"])
@pytest.mark.parametrize("scale", [2, 4])
def test_whole_network_equals_the_published_one_in_float64(shared, scale, method, bits):
    file = np.load(shared / f"golden/swinir_tiny_x{scale}.npz")
    start = f"{method}/{bits}bit/"
    model = golden_swinir(file).double()
    quantized = swap_blocks(model, golden_spec(method, bits)).double()
    assert [site_of(str(name)) for name in file["quantizers"]] == list(quantizers(quantized))
    sites = list(quantizers(quantized).values())
    for site, lower, upper in zip(sites, file[start + "lower"], file[start + "upper"], strict=True):
        site.set_bounds(torch.tensor(float(lower)), torch.tensor(float(upper)))
        site.requires_grad_(True)
    for i in (0, 1):
        x = torch.from_numpy(file[f"input{i}"]).double()
        quantized.zero_grad()
        out = quantized(x)
        (out - model(x)).abs().mean().backward()
        if (key := f"{start}out{i}_f64") in file.files:
            assert np.abs(out.detach().numpy() - file[key]).max() <= 1e-6
        for name in ("lower", "upper", "alpha")[: 3 if method == "compsrt" else 2]:
            want = file[f"{start}d_{name}{i}_f64"]
            got = np.array([getattr(site, name).grad.item() for site in sites])
            assert np.linalg.norm(got - want) <= 1e-9 * np.linalg.norm(want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", ["compsrt", "2dquant"])
def test_calibration_finds_the_published_bounds(shared, method, dtype):
    file = np.load(shared / "golden/swinir_tiny_x2.npz")
    for bits in (4, 3, 2):
        start = f"{method}/{bits}bit/"
        quantized = swap_blocks(golden_swinir(file).to(dtype), golden_spec(method, bits)).to(dtype)
        calibrate(quantized, torch.from_numpy(file["input1"]).to(dtype))
        # u - l is (1 - i/100) of the range that was searched.
        width = (file[start + "upper"] - file[start + "lower"]) / (
            1 - file[start + "dobi_index"] / 100
        )
        for name in ("lower", "upper"):
            got = np.array([getattr(q, name).item() for q in quantizers(quantized).values()])
            assert (np.abs(got - file[start + name]) <= 2e-6 * width).all()


def test_in_float32_the_published_outputs_agree_on_average(shared):
    file = np.load(shared / "golden/swinir_tiny_x2.npz")
    model = golden_swinir(file)
    quantized = swap_blocks(model, golden_spec("compsrt", 4))
    start = "compsrt/4bit/"
    for q, lower, upper in zip(
        quantizers(quantized).values(), file[start + "lower"], file[start + "upper"], strict=True
    ):
        q.set_bounds(torch.tensor(float(lower)), torch.tensor(float(upper)))
    x = torch.from_numpy(file["input1"])
    with torch.no_grad():
        ours = (quantized(x) - model(x)).abs().mean().item()
    theirs = np.abs(file[start + "out1_f64"] - file["float/out1"]).mean()
    assert ours == pytest.approx(theirs, rel=0.05)


# --- Every configuration ---------------------------------------------------------------------------

specs = st.builds(
    QuantSpec,
    bits=st.integers(1, 8),
    method=st.sampled_from(sorted(METHODS)),
    transform=st.sampled_from([None, *transforms.TRANSFORMS]),
    per_channel=st.booleans(),
    per_head=st.booleans(),
    pruning=st.sampled_from([0.0, 0.4, 0.9]),
    site_transforms=st.sampled_from([(), (("fc2", "none"), ("*blocks.1.attention", "dct"))]),
)


def straight(model, quantized, x):
    """The quantized network again, from plain modules and the plain meaning of the transforms.

    Every operand goes there and back: fq(x T) T^T, and products are of those.
    """
    from compsrt.models import swinir

    spec = quantized.spec
    sites = quantizers(quantized)

    def fq(site, value, group, block):
        matrix = transforms.transform_matrix(spec.transform_of(block, group), value.shape[-1], 0)
        if matrix is None:
            return site(value)
        matrix = matrix.to(value)
        return site(value @ matrix) @ matrix.T

    def weight(site, group, block, size):
        matrix = transforms.transform_matrix(spec.transform_of(block, group), size, 0)
        return site() if matrix is None else site() @ matrix.T

    class Block(torch.nn.Module):
        def __init__(self, block, name):
            super().__init__()
            self.block, self.name = block, name

        def linear(self, value, name, group, bias):
            w = weight(sites[f"{self.name}.{name}.weight"], group, self.name, value.shape[-1])
            value = fq(sites[f"{self.name}.{name}.input"], value, group, self.name)
            return value @ w.T + bias

        def forward(self, x):
            b, (_, h, w, c) = self.block, x.shape
            size = h, w, b.window, b.shift
            y = swinir.to_windows(b.norm1(x), b.window, b.shift)
            heads = b.attn.heads
            parts = []
            for i, name in enumerate("qkv"):
                out = self.linear(y, name, "qkv", b.attn.qkv.bias.chunk(3)[i])
                parts.append(out.unflatten(-1, (heads, -1)).transpose(1, 2))
            q, k, v = parts
            q = fq(sites[f"{self.name}.query"], q * (c // heads) ** -0.5, "query_key", self.name)
            k = fq(sites[f"{self.name}.key"], k, "query_key", self.name)
            v = fq(sites[f"{self.name}.value"], v, "value", self.name)
            scores = (q @ k.mT)[None].unflatten(1, (-1, (h // b.window) * (w // b.window)))[0]
            scores = swinir.add_bias(scores, b.attn.relative_position_bias_table, size)
            a = fq(sites[f"{self.name}.attention"], scores.softmax(-1), "attention", self.name)
            out = (a.flatten(0, 1) @ v).transpose(1, 2).flatten(2)
            out = self.linear(out, "proj", "proj", b.attn.proj.bias)
            x = x + swinir.from_windows(out, *size)
            hidden = self.linear(b.norm2(x), "fc1", "fc1", b.mlp.fc1.bias)
            return x + self.linear(torch.nn.functional.gelu(hidden), "fc2", "fc2", b.mlp.fc2.bias)

    import copy

    plain = copy.deepcopy(model)
    for name, parent, position, block in list(plain.named_blocks()):
        parent[position] = Block(block, name)
    return plain(x)


@given(spec=specs, seed=st.integers(0, 99))
@settings(max_examples=20)
def test_every_configuration_equals_its_plain_meaning(spec, seed):
    spec = dataclasses.replace(spec, storage="float32")
    model = tiny_swinir(seed % 5).double()
    x = torch.rand(1, 3, 16, 24, dtype=torch.float64)
    quantized = compsrt.quantize(model, spec, x)
    with torch.no_grad():
        for site in quantizers(quantized).values():
            site.alpha += 0.05 * site.step * torch.rand(())
            site.beta += 0.2 * site.step * torch.randn(())
        ours, plain = quantized(x), straight(model, quantized, x)
    # One code that rounds the other way would show as 1e-3; in float64 none does.
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-7)


@given(spec=specs)
@settings(max_examples=15)
def test_no_tensor_has_more_levels_than_its_bits_allow(spec):
    model = tiny_swinir()
    x = torch.rand(2, 3, 16, 16)
    quantized = compsrt.quantize(model, spec, x)
    with torch.no_grad():
        for site in quantizers(quantized).values():
            site.alpha -= 0.4 * site.step  # the published arithmetic would get more levels by this
    levels = checkpoint.count_levels(quantized, x)
    assert levels.keys() == quantizers(quantized).keys()
    assert max(levels.values()) <= 2**spec.bits


def test_unclamped_codes_have_more_levels_and_it_shows():
    model = tiny_swinir()
    x = torch.rand(2, 3, 16, 16)
    quantized = compsrt.quantize(model, QuantSpec(bits=2, codes="unclamped"), x)
    with torch.no_grad():
        for site in quantizers(quantized).values():
            site.alpha -= 0.6 * site.step
    assert max(checkpoint.count_levels(quantized, x).values()) > 4


def test_a_swapped_model_leaves_the_float_one_alone_and_learns_only_scalars():
    model = tiny_swinir()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    quantized = compsrt.quantize(model, QuantSpec(method="2dquant"), torch.rand(1, 3, 16, 16))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    learned = {
        name.rpartition(".")[2] for name, p in quantized.named_parameters() if p.requires_grad
    }
    assert learned == {"lower", "upper"}
    with pytest.raises(ValueError, match="already"):
        models.quantized(quantized, QuantSpec())
    with pytest.raises(ValueError, match="Linear"):
        models.quantized(torch.nn.Linear(2, 2), QuantSpec())


def test_before_calibration_every_output_is_nan():
    quantized = compsrt.quantize(tiny_swinir(), QuantSpec())
    assert not any(q.calibrated for q in quantizers(quantized).values())
    assert quantized(torch.rand(1, 3, 8, 8)).isnan().all()


@given(
    moved=st.tuples(*[st.floats(-1e6, 1e6)] * 4),
    bits=st.integers(1, 8),
    method=st.sampled_from(["compsrt", "lsq+"]),
)
def test_projection_keeps_the_step_positive_whatever_happened(moved, bits, method):
    from compsrt.quantizers import Quantizer

    q = Quantizer(bits, QuantSpec(bits=bits, method=method))
    q.set_bounds(torch.tensor(-1.0), torch.tensor(2.0))
    with torch.no_grad():
        for parameter, value in zip(q.parameters(), moved, strict=True):
            parameter.copy_(torch.tensor(value))
    q.project_(torch.tensor(3e-3))
    assert torch.isfinite(q.step) and q.step > 0 and q.upper > q.lower
    out = q(torch.linspace(-5, 5, 101))
    assert torch.isfinite(out).all() and out.unique().numel() <= 2**bits


def test_a_good_quantizer_is_not_moved_by_projection():
    from compsrt.quantizers import Quantizer

    q = Quantizer(3, QuantSpec())
    q.set_bounds(torch.tensor(-1.0), torch.tensor(2.0))
    with torch.no_grad():
        q.alpha += 0.1
        q.beta -= 0.2
    before = [p.detach().clone() for p in q.parameters()]
    q.project_(torch.tensor(3e-3))
    for parameter, value in zip(q.parameters(), before, strict=True):
        assert torch.equal(parameter, value)


def test_compiles_as_one_graph():
    model = tiny_swinir()
    x = torch.rand(1, 3, 16, 16)
    quantized = compsrt.quantize(model, QuantSpec(), x)
    compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), quantized(x), rtol=0, atol=1e-5)


def test_a_distillation_step_compiles_as_one_graph():
    model = tiny_swinir()
    x = torch.rand(1, 3, 16, 16)
    gradients = []
    for compiled in (False, True):
        quantized = compsrt.quantize(model, QuantSpec(bits=8), x)
        forward = (
            torch.compile(quantized, fullgraph=True, backend="aot_eager") if compiled else quantized
        )
        (forward(x) - model(x)).square().mean().backward()
        gradients.append(torch.stack([q.upper.grad for q in quantizers(quantized).values()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.95


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bits": 0}, "bits"),
        ({"bits": 9}, "bits"),
        ({"weight_bits": 2.5}, "weight_bits"),
        ({"method": "gptq"}, "method"),
        ({"transform": "fourier"}, "transform"),
        ({"site_transforms": (("fc1", "fourier"),)}, "transform"),
        ({"pruning": 1.0}, "pruning"),
        ({"pruning": 0.4, "pruning_pattern": "2:4"}, "2:4"),
        ({"storage": "int8"}, "storage"),
        ({"percentile": 10}, "percentile"),
    ],
)
def test_wrong_specifications_name_the_field(fields, words):
    with pytest.raises(ValueError, match=words):
        QuantSpec(**fields)


def test_a_specification_survives_json():
    spec = QuantSpec(bits=3, site_transforms=(("fc1", "dct"),), pruning=0.4)
    assert QuantSpec.from_json(spec.to_json()) == spec
    with pytest.raises(ValueError, match="colour"):
        QuantSpec.from_json({"colour": 1})


def test_bits_of_weights_and_activations_are_apart():
    quantized = compsrt.quantize(
        tiny_swinir(), QuantSpec(weight_bits=2, activation_bits=8), torch.rand(1, 3, 16, 16)
    )
    for _, site in named_quantizers(quantized):
        assert site.bits == (2 if isinstance(site, WeightQuantizer) else 8)
