import pytest
import torch
from networks import tiny_swinir

import compsrt
from compsrt.calibration import search_bounds
from compsrt.quantization import QuantSpec
from compsrt.quantizers import looks_one_sided, quantizers


def test_minmax_and_percentile():
    x = torch.arange(1001.0)
    assert [float(v) for v in search_bounds(x, 4, method="minmax")] == [0, 1000]
    bounds = search_bounds(x, 4, method="percentile", percentile=99)
    assert [float(v) for v in bounds] == [10, 990]


def test_rows_get_bounds_of_their_own():
    x = torch.stack([torch.rand(50), 10 * torch.rand(50)])
    lower, upper = search_bounds(x, 4, method="minmax", per_row=True)
    assert lower.shape == upper.shape == (2, 1)
    assert torch.equal(upper[:, 0], x.amax(1))


@pytest.mark.parametrize(
    ("x", "options", "words"),
    [
        (torch.zeros(0), {}, "no elements"),
        (torch.tensor([1.0, torch.nan]), {}, "NaN"),
        (torch.tensor([1.0, torch.inf]), {"method": "minmax"}, "infinite"),
        (torch.ones(3), {"method": "best"}, "method"),
    ],
)
def test_what_cannot_be_searched_is_refused(x, options, words):
    with pytest.raises(ValueError, match=words):
        search_bounds(x, 4, **options)


def test_a_nan_picture_names_the_first_site():
    with pytest.raises(ValueError, match=r"blocks\.0\.q\.input.*NaN"):
        compsrt.quantize(tiny_swinir(), QuantSpec(), torch.full((1, 3, 16, 16), torch.nan))


@pytest.mark.parametrize(
    ("pictures", "found"),
    [
        (torch.rand(3, 16, 16), r"a float32 tensor of shape \(3, 16, 16\)"),
        (torch.rand(0, 3, 16, 16), r"a float32 tensor of shape \(0, 3, 16, 16\)"),
        (torch.ones(1, 3, 16, 16, dtype=torch.uint8), "a uint8 tensor"),
        (torch.tensor(1.0), r"a float32 tensor of shape \(\)"),
        ([torch.rand(3, 16, 16)], "list"),
    ],
)
@pytest.mark.parametrize("fields", [{}, {"transform": "auto"}, {"average_bits": 3.0}])
def test_pictures_of_another_form_are_refused(pictures, found, fields):
    with pytest.raises(ValueError, match=rf"^pictures: {found}.*; give .* \(B, C, H, W\)"):
        compsrt.quantize(tiny_swinir(), QuantSpec(**fields), pictures)


def test_a_constant_picture_leaves_every_step_positive():
    quantized = compsrt.quantize(tiny_swinir(), QuantSpec(), torch.zeros(1, 3, 16, 16))
    for site in quantizers(quantized).values():
        assert site.calibrated and site.step > 0
    assert torch.isfinite(quantized(torch.zeros(1, 3, 16, 16))).all()


def test_calibration_sees_the_float_network():
    model = tiny_swinir()
    x = torch.rand(2, 3, 16, 16)
    quantized = compsrt.quantize(model, QuantSpec(method="minmax"), x)
    seen = []
    block = model.layers[0].blocks[1]
    block.mlp.fc2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(x)
    site = quantizers(quantized)["layers.0.residual_group.blocks.1.fc2.input"]
    torch.testing.assert_close(site.lower, seen[0].min(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(site.upper, seen[0].max(), rtol=1e-4, atol=1e-5)


def test_bounds_do_not_sit_on_the_constant_coefficient_of_a_softmax():
    quantized = compsrt.quantize(
        tiny_swinir(), QuantSpec(method="minmax", transform="hadamard"), torch.rand(1, 3, 16, 16)
    )
    for name, site in quantizers(quantized).items():
        if name.endswith("attention"):
            assert site.upper > 0.125 and site.upper - 0.125 < 1e-4


def test_one_sided_ranges_are_taken_where_they_are_better():
    x = torch.rand(1, 3, 16, 16)
    both = {}
    for choice in ("auto", "never"):
        spec = QuantSpec(method="dobi", bits=2, one_sided=choice)
        both[choice] = quantizers(compsrt.quantize(tiny_swinir(), spec, x))
    name = "layers.0.residual_group.blocks.0.attention"
    assert both["auto"][name].lower < both["never"][name].lower


def test_scalars_a_head_are_those_of_each_head_alone():
    model = tiny_swinir()
    pictures = torch.rand(2, 3, 16, 16)
    quantized = compsrt.quantize(model, QuantSpec(bits=3, per_head=True), pictures)
    block, seen = quantized.layers[0].blocks[1], {}
    for name in ("query", "key", "value", "attention"):
        assert getattr(block, name).lower.shape == (2, 1, 1)
    for _, site in quantizers(quantized).items():
        site.observer = lambda site, x: seen.__setitem__(site.site, x)
    quantized(pictures)
    for name, x in seen.items():
        site = quantizers(quantized)[name]
        if site.lower.dim() == 3:
            one_sided = None if looks_one_sided(x) else False
            for head in range(2):
                part = x[..., head, :, :]
                lower, upper = search_bounds(part, 3, one_sided=one_sided)
                width = float(upper - lower)
                assert abs(float(site.lower[head].detach() - lower)) < 2e-6 * width + 1e-6
                assert abs(float(site.upper[head].detach() - upper)) < 2e-6 * width + 1e-6
