"""convolve: the kernel against float64, with everything that can surround a convolution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from shapes import (
    DEVICES,
    TYPES,
    UNIT,
    assert_as_good,
    error,
    randn,
    triton_only,
    without_shrinking,
)
from torch import Tensor

from compsrt import kernels
from compsrt.kernels import convolution, dispatch, reference

on_each_device = pytest.mark.parametrize("device", DEVICES)

# Float32 operands enter as two bfloat16 each. What is left out is 2^-16 of a product; the interpreter
# cuts the second one off too, which makes it 2^-14. Float16 operands would be off by 2^-12.
UNITS = UNIT | {torch.float32: 2.0**-14}

EVERY = {
    "bias": True,
    "mean": True,
    "slope": 0.2,
    "residual": True,
    "offset": True,
}


def arguments(
    grid: tuple[int, int, int] = (1, 5, 9),
    channels: tuple[int, int] = (12, 16),
    side: int = 3,
    *,
    dtype: torch.dtype = torch.float32,
    codes: bool = False,
    shuffle: int = 1,
    seed: int = 0,
    **which,
) -> dict[str, Any]:
    """Of a call, those named in `which` and the others left out."""
    k, n = channels
    weight = randn(n, k, side, side, seed=seed + 1) / (k**0.5 * side)
    found: dict[str, Any] = {"x": 2 + randn(*grid, k, seed=seed, dtype=dtype), "shuffle": shuffle}
    found["weight"] = weight.to(memory_format=torch.channels_last) if seed % 2 else weight
    if codes:
        found["scale"] = weight.abs().amax((1, 2, 3)) / 127
        found["weight"] = (weight / found["scale"][:, None, None, None]).round().to(torch.int8)
    tensors = {
        "bias": randn(n, seed=seed + 2),
        "mean": randn(k, seed=seed + 3),
        "residual": randn(*grid, n, seed=seed + 6, dtype=dtype),
        "offset": randn(n // shuffle**2, seed=seed + 7),
    }
    found |= {name: tensors.get(name, value) for name, value in which.items() if value}
    return found


def to(given: dict[str, Any], to_what) -> dict[str, Any]:
    """The arguments on a device or in a type; codes stay codes."""

    def move(value):
        if isinstance(value, Tensor) and (value.is_floating_point() or to_what != torch.double):
            return value.to(to_what)
        return value

    return {name: move(value) for name, value in given.items()}


def check(device, given: dict[str, Any], unit: float | None = None) -> Tensor:
    exact = reference.convolve(**to(given, torch.double) | {"dtype": torch.double})
    by_torch = reference.convolve(**given)
    with triton_only():
        found = kernels.convolve(**to(given, device))
    assert found.is_contiguous() and found.dtype == by_torch.dtype
    if unit is None:
        unit = max(UNITS[given["x"].dtype], UNITS[found.dtype])
    assert_as_good(found, by_torch, exact, unit)
    return found


# --- The kernel ----------------------------------------------------------------------------------


@on_each_device
@settings(without_shrinking, max_examples=without_shrinking.max_examples // 3)
@given(
    grid=st.sampled_from([(1, 1, 1), (2, 3, 5), (1, 8, 8), (1, 9, 17)]),
    channels=st.sampled_from([(3, 36), (12, 36), (1, 72), (17, 36)]),
    side=st.sampled_from([1, 3]),
    shuffle=st.sampled_from([1, 2, 3]),
    dtype=st.sampled_from(TYPES),
    codes=st.booleans(),
    options=st.lists(st.booleans(), min_size=5, max_size=5),
    seed=st.integers(0, 99),
)
@example((1, 7, 10), (12, 48), 3, 4, torch.float32, True, [True] * 5, 0)
def test_every_combination(device, grid, channels, side, shuffle, dtype, codes, options, seed):
    which = {name: on and EVERY[name] for name, on in zip(EVERY, options, strict=True)}
    check(
        device,
        arguments(
            grid, channels, side, dtype=dtype, codes=codes, shuffle=shuffle, seed=seed, **which
        ),
    )


@on_each_device
@pytest.mark.parametrize("codes", [False, True], ids=["floats", "codes"])
@pytest.mark.parametrize(
    ("channels", "shuffle", "which"),
    [
        ((60, 60), 1, {"residual": True}),
        ((60, 48), 4, {"offset": True}),
    ],
    ids=["layer", "x4"],
)
def test_those_of_swinir(device, channels, shuffle, which, codes):
    # Four rectangles of tokens, of which three have a single row or column in the grid.
    check(device, arguments((1, 9, 17), channels, codes=codes, shuffle=shuffle, bias=True, **which))


@on_each_device
def test_the_first_convolution_takes_a_picture(device):
    picture = randn(2, 3, 9, 7, seed=0)
    given = arguments((2, 9, 7), (3, 20), bias=True, mean=True, seed=1)
    found = check(device, given | {"x": picture.permute(0, 2, 3, 1)})
    wanted = F.conv2d(picture - given["mean"][:, None, None], given["weight"], padding=1)
    wanted = wanted.permute(0, 2, 3, 1) + given["bias"]
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-3, atol=1e-3)


@on_each_device
@pytest.mark.parametrize("channels", [(70, 70), (260, 5)], ids=str)
def test_wide_grids_go_in_chunks(device, channels):
    check(device, arguments((1, 3, 3), channels, 1, mean=True, seed=1))


@on_each_device
def test_a_side_of_five(device):
    check(device, arguments((1, 3, 9), (4, 6), 5))


@on_each_device
@pytest.mark.parametrize("side", [1, 3])
def test_every_token_meets_its_own_neighbours(device, side):
    # Channels with one bright token each, in whole numbers, hence exact.
    places = [(0, 0), (8, 17), (0, 17), (8, 0), (7, 15), (7, 16), (4, 4)]
    x = torch.zeros(1, 9, 18, len(places))
    for channel, (row, column) in enumerate(places):
        x[0, row, column, channel] = 1
    weight = torch.arange(float(7 * 7 * side * side)).view(7, 7, side, side) % 128
    with triton_only():
        found = kernels.convolve(x.to(device), weight.to(device)).cpu()
    wanted = F.conv2d(x.permute(0, 3, 1, 2), weight, padding=side // 2).permute(0, 2, 3, 1)
    assert torch.equal(found, wanted)


@on_each_device
@pytest.mark.parametrize("shuffle", [2, 3, 4])
def test_the_picture_is_that_of_pixel_shuffle(device, shuffle):
    # The identity of small whole numbers, hence exact.
    n = 2 * shuffle**2
    x = torch.arange(2 * 3 * 17 * n, dtype=torch.float32).view(2, 3, 17, n) % 251
    with triton_only():
        weight, offset = torch.eye(n)[:, :, None, None], torch.tensor([1.0, 2.0])
        found = kernels.convolve(
            x.to(device), weight.to(device), shuffle=shuffle, offset=offset.to(device)
        )
    wanted = F.pixel_shuffle(x.permute(0, 3, 1, 2), shuffle) + offset[:, None, None]
    assert torch.equal(found.cpu(), wanted)


@on_each_device
def test_what_lies_outside_the_grid_is_never_used(device):
    # A view in the middle of NaN, of tokens and of a picture.
    given = arguments((1, 5, 9), (12, 16), mean=True, seed=1)
    with triton_only():
        wanted = kernels.convolve(**to(given, device))
    for order in ((0, 1, 2, 3), (0, 3, 1, 2)):
        around = torch.full((1, 9, 13, 20), torch.nan, device=device).permute(order).contiguous()
        view = around.permute([order.index(i) for i in range(4)])[:, 2:7, 2:11, 4:16]
        view.copy_(given["x"])
        with triton_only():
            found = kernels.convolve(**to(given, device) | {"x": view})
        # Other strides, other layouts in registers: a device sums in another order.
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


# --- Precision and range -------------------------------------------------------------------------


def by_halves(given: dict[str, Any]) -> Tensor:
    """The convolution of float16 operands and exact sums."""
    double = to(given, torch.double)
    halves = {
        n: double[n].half().double() for n in ("x", "weight") if double[n].is_floating_point()
    }
    return reference.convolve(**double | halves)


@on_each_device
@pytest.mark.parametrize("codes", [False, True], ids=["floats", "codes"])
def test_float32_is_closer_than_float16_operands_would_be(device, codes):
    given = arguments((1, 8, 8), (60, 16), codes=codes)
    given["x"] = randn(1, 8, 8, 60, seed=0)
    exact = reference.convolve(**to(given, torch.double))
    with triton_only():
        found = kernels.convolve(**to(given, device))
    assert error(found, exact) < error(by_halves(given), exact) / 4


@pytest.fixture
def tf32(monkeypatch):
    """A device that has TF32; the interpreter is told that it is one, and cuts as one does."""
    if dispatch.INTERPRETED:
        monkeypatch.setattr(dispatch, "assumed_capability", 9)
    elif (dispatch.capability(torch.device("cuda")) or 0) < 8:
        pytest.skip("this device has no TF32")


@on_each_device
@pytest.mark.parametrize("codes", [False, True], ids=["floats", "codes"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_tf32_is_as_close_as_float16_operands(device, tf32, codes, dtype):
    given = arguments((1, 9, 17), (60, 16), codes=codes)
    given["x"] = randn(1, 9, 17, 60, seed=0, dtype=dtype)
    given["dtype"] = torch.float32
    exact = reference.convolve(**to(given, torch.double) | {"dtype": torch.double})
    with triton_only():
        found = kernels.convolve(**to(given, device), allow_tf32=True).cpu().double()
    size = exact.square().mean().sqrt()
    exactly = codes and dtype != torch.float32  # such operands are exact as TF32
    assert error(found, exact) < (UNITS[torch.float32] if exactly else 2.0**-11) * size
    # What a cut takes is given back: the sum is neither smaller nor larger on average.
    assert abs((found * exact).sum() / exact.square().sum() - 1) < 2.0**-14
    # Where TF32 is not asked for, it is not used.
    with triton_only():
        found = kernels.convolve(**to(given, device))
    assert error(found, exact) < UNITS[torch.float32] * size


@on_each_device
@pytest.mark.parametrize("allow_tf32", [False, True])
def test_activations_beyond_float16(device, tf32, allow_tf32):
    given = arguments((1, 8, 8), (12, 16), bias=True)
    given["x"] *= 1e6
    unit = 2.0**-10 if allow_tf32 else None
    assert check(device, given | {"allow_tf32": allow_tf32}, unit).isfinite().all()


@on_each_device
def test_a_float32_picture_of_bfloat16_tokens(device):
    # The weight is as exact as for float32 tokens: only what x itself lost is lost.
    given = arguments((1, 8, 8), (60, 12), dtype=torch.bfloat16, shuffle=2, offset=True, bias=True)
    found = check(device, given | {"dtype": torch.float32}, UNITS[torch.float32])
    assert found.dtype == torch.float32
    assert check(device, given).dtype == torch.bfloat16


# --- What runs where -----------------------------------------------------------------------------


def test_the_reference_is_that_of_torch():
    given = to(arguments((2, 5, 9), (12, 18), shuffle=3, **EVERY), torch.double)
    x = given["x"] - given["mean"]
    y = F.conv2d(x.permute(0, 3, 1, 2), given["weight"], given["bias"], padding=1)
    y = F.leaky_relu(y, 0.2) + given["residual"].permute(0, 3, 1, 2)
    y = F.pixel_shuffle(y, 3) + given["offset"][:, None, None]
    torch.testing.assert_close(reference.convolve(**given), y, rtol=1e-12, atol=1e-12)


def test_codes_are_the_weight_that_they_stand_for():
    given = to(arguments(codes=True), torch.double)
    weight = given["weight"] * given["scale"][:, None, None, None]
    found = reference.convolve(**given)
    assert torch.equal(found, reference.convolve(given["x"], weight))


@pytest.mark.parametrize("path", ["reference", pytest.param("triton", marks=DEVICES[0].marks)])
@pytest.mark.parametrize("of", ["x", "weight", "bias", "residual"])
def test_gradients_are_those_of_the_reference(monkeypatch, path, of):
    monkeypatch.setenv("COMPSRT_KERNELS", path)
    monkeypatch.setattr(convolution, "_convolve", None)
    given = to(arguments((1, 3, 4), (3, 4), bias=True, residual=True), torch.double)
    if path == "triton":
        given = to(given, torch.float32)
    given[of] = given[of].requires_grad_()
    kernels.convolve(**given).sum().backward()
    assert given[of].grad.any()


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="not interpreted")
def test_no_gradient_is_wanted_under_no_grad():
    given = arguments((1, 3, 4), (3, 4))
    given["weight"].requires_grad_()
    with triton_only(), torch.no_grad():
        assert not kernels.convolve(**given).requires_grad


def test_a_cpu_goes_straight_to_the_reference(monkeypatch):
    monkeypatch.delenv("COMPSRT_KERNELS", raising=False)
    monkeypatch.setattr(convolution, "_convolve", None)
    assert kernels.convolve(**arguments()).shape == (1, 5, 9, 16)


@pytest.mark.parametrize(
    "which", [{"dtype": torch.double}, {"weight": torch.ones(16, 12, 1, 1).double()}]
)
def test_float64_is_the_reference_s(monkeypatch, which):
    monkeypatch.setenv("COMPSRT_KERNELS", "triton" if dispatch.INTERPRETED else "auto")
    monkeypatch.setattr(convolution, "_convolve", None)
    assert kernels.convolve(**arguments() | which).shape == (1, 5, 9, 16)


@on_each_device
@pytest.mark.parametrize("grid", [(0, 5, 9), (2, 0, 9), (2, 5, 0)], ids=str)
def test_no_tokens(device, grid):
    with triton_only():
        found = kernels.convolve(**to(arguments(grid, (3, 8), shuffle=2), device))
    assert found.shape == (grid[0], 2, 2 * grid[1], 2 * grid[2])


@on_each_device
@pytest.mark.parametrize("shuffle", [1, 2])
def test_the_operator_keeps_its_promises(device, shuffle):
    given = to(arguments((1, 3, 4), (3, 8)), device)
    rest = given["weight"], *[None] * 5, 1.0, shuffle, torch.bfloat16, True
    with triton_only():
        torch.library.opcheck(convolution._convolve, (given["x"], *rest))
        turned = given["x"].permute(0, 2, 1, 3)
        torch.library.opcheck(convolution._convolve, (turned, *rest))


@on_each_device
def test_compiles_into_one_graph(device):
    given = to(arguments((1, 3, 4), (3, 8), bias=True, mean=True), device)

    def step(x):
        return 2 * kernels.convolve(**given | {"x": x})

    with triton_only():
        wanted = step(given["x"])
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(given["x"]), wanted)


@pytest.mark.parametrize("path", ["reference", pytest.param("triton", marks=DEVICES[0].marks)])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 9, 12)}, r"x: torch.float32 of shape \(5, 9, 12\) is no token grid"),
        ({"x": torch.zeros(1, 5, 9, 11)}, "weight: it takes 12 channels; x has 11"),
        ({"weight": torch.zeros(16, 12, 2, 2)}, "weight: its shape is .* with an odd k"),
        ({"weight": torch.zeros(16, 12, 3, 1)}, "weight: its shape is .* with an odd k"),
        ({"weight": torch.zeros(16, 12, 1, 1, dtype=torch.int8)}, "scale: codes need one"),
        (
            {"weight": torch.zeros(16, 12, 1, 1, dtype=torch.uint8)},
            "weight: torch.uint8 is neither",
        ),
        ({"scale": torch.ones(16)}, "scale: a weight of torch.float32 has none"),
        ({"bias": torch.zeros(12)}, r"bias: its shape is \(12,\); it needs \(16,\)"),
        ({"mean": torch.zeros(1, 12)}, r"mean: its shape is \(1, 12\); it needs \(12,\)"),
        ({"residual": torch.zeros(1, 5, 9, 12)}, r"residual: .* needs \(1, 5, 9, 16\)"),
        ({"shuffle": 3}, r"shuffle: 16 channels are not a multiple of 3\^2"),
        ({"shuffle": 0}, "shuffle: 16 channels"),
        ({"offset": torch.zeros(4)}, r"offset: its shape is \(4,\); it needs \(16,\)"),
        ({"dtype": torch.int8}, "dtype: torch.int8 is not floating"),
        ({"bias": torch.zeros(16, device="meta")}, "bias: it is on meta; move it to x's cpu"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused(monkeypatch, path, change, message):
    monkeypatch.setenv("COMPSRT_KERNELS", path)
    with pytest.raises(ValueError, match=message):
        kernels.convolve(**arguments() | change)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_whole_picture(dtype):
    which = {"bias": True, "residual": True, "mean": True}
    check("cuda", arguments((2, 177, 93), (60, 60), dtype=dtype, seed=1, **which))


@pytest.mark.gpu
def test_more_tokens_than_an_int32_can_address():
    x = torch.ones(1, 8200, 4096, 64, dtype=torch.bfloat16, device="cuda")
    weight = torch.eye(64, device="cuda")[:, :, None, None]
    found = kernels.convolve(x, weight)
    assert bool((found[-1, -8:] == 1).all())
