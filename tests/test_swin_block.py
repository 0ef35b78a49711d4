"""quant_swin_block: a folded block against the block by its definition, and the kernel against both.

A code that rounds the other way moves a token by far more than the tolerances here: where they
hold, all codes are those of the definition.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import tiny_swinir
from shapes import DEVICES, UNIT, randn, triton_only
from swin_blocks import Block, Kind

import compsrt
from compsrt import kernels
from compsrt.kernels import dispatch, reference, swin_block, swin_block_tiles
from compsrt.kernels.dispatch import tl, triton
from compsrt.kernels.reference import FoldedBlock
from compsrt.kernels.reference import folded as folded_blocks
from compsrt.kernels.reference.folded import HALF_UNITS
from compsrt.kernels.reference.folding import moved
from compsrt.quantization import QuantSpec

on_each_device = pytest.mark.parametrize("device", DEVICES)


def run(x: torch.Tensor, folded: FoldedBlock, device: str = "cpu") -> torch.Tensor:
    with triton_only():
        return kernels.quant_swin_block(x.to(device), moved(folded, torch.device(device))).cpu()


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error over the root mean square of what is right."""
    return float((found.double() - exact).abs().max() / exact.square().mean().sqrt())


# --- The folded reference ------------------------------------------------------------------------


@given(
    sizes=st.sampled_from([(12, 2, 6, 24), (8, 1, 4, 16), (10, 3, 5, 10), (4, 2, 8, 8)]),
    window=st.sampled_from([2, 4, 8]),
    shifted=st.booleans(),
    transforms=st.sampled_from(["none", "dct", "random", "hadamard"]),
    head_transform=st.sampled_from(["none", "dct", "random"]),
    bits=st.sampled_from([1, 2, 4, 8]),
    weight_bits=st.sampled_from([2, 3, 8]),
    options=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    picture=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)),
    mode=st.sampled_from(["fold", "integer"]),
    seed=st.integers(0, 99),
)
def test_a_folded_block_is_the_block(
    sizes,
    window,
    shifted,
    transforms,
    head_transform,
    bits,
    weight_bits,
    options,
    picture,
    mode,
    seed,
):
    shift = window // 2 * shifted
    rest = transforms, head_transform, bits, weight_bits, *options, seed
    block = Block(Kind(*sizes, window, shift, *rest))
    batch, down, across = picture
    x = block.tokens(batch, down * window, across * window, seed=1)
    found = kernels.quant_swin_block(x, block.folded(mode, torch.double))
    torch.testing.assert_close(found, block(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shift", [0, 4])
def test_windows_some_at_a_time(shift, monkeypatch):
    """Whatever goes through the block at once, and over every border of the picture."""
    block = Block(Kind(window=8, shift=shift))
    x = block.tokens(2, 24, 40)
    folded, expected = block.folded("fold", torch.double), block(x)
    module = importlib.import_module("compsrt.kernels.reference.swin_block")
    for scores in (1, 3 * 2 * 64**2, 2**30):
        monkeypatch.setattr(module, "SCORES_AT_ONCE", scores)
        found = kernels.quant_swin_block(x, folded)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_half_types_pass_through_float32():
    block = Block(Kind(bits=8))
    x = block.tokens(1, 8, 8).bfloat16()
    found = kernels.quant_swin_block(x, block.folded())
    assert found.dtype == torch.bfloat16
    expected = kernels.quant_swin_block(x.float(), block.folded())
    torch.testing.assert_close(found, expected.bfloat16(), rtol=0, atol=0)


def test_float16_matrices_in_float32():
    """Units and padding of such a block are the kernel's matter, and come off where PyTorch runs it."""
    block = Block(Kind(60, 6, 10, 120, 8, 4, "hadamard", bits=8, by_head=True))
    x = block.tokens(1, 8, 16).float()
    added = block(x.double()) - x
    found = reference.quant_swin_block(x, block.folded("fold", torch.float16)) - x
    assert (found - added).norm() < 0.02 * added.norm()


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize(
    ("kind", "inside"),
    [
        (Kind(60, 6, 10, 120, 8, 4, "hadamard"), True),
        (Kind(30, 3, 10, 62), True),  # just room for two lanes
        (Kind(32, 2, 16, 128), False),
        (Kind(31, 1, 31, 60), False),
    ],
    ids=["SwinIR-light", "30", "32", "31"],
)
def test_biases_in_matrices(kind, inside, bits, monkeypatch):
    """What columns of matrices add are biases in vectors, to twice the bits of float16."""
    block = Block(kind._replace(bits=bits))
    found = block.folded("fold", torch.float16)
    assert (found.enter.bias is None) == inside
    monkeypatch.setattr(folded_blocks, "_with_biases_in", lambda block: block)
    wanted = block.folded("fold", torch.float16)
    assert wanted.enter.bias is not None
    _, linears = folded_blocks.plain(found, torch.double)
    for name, (weight, bias) in folded_blocks.plain(wanted, torch.double)[1].items():
        assert torch.equal(linears[name][0], weight)
        # A constant of 255 times half of the least that a column can hold.
        torch.testing.assert_close(linears[name][1], bias, rtol=1e-6, atol=255 * 2**-25)


def test_biases_that_no_column_can_make():
    """Codes of a single value are 0, and so is what columns of theirs add; and float16 has an end."""
    block = Block(Kind())
    layer = block.layer("fc1")
    one_code = layer._replace(grid=layer.grid._replace(alpha=torch.tensor(1e3).double()))
    large = block.norms[0]._replace(bias=1e6 * torch.ones(12).double())
    for changes in ({"fc1": one_code}, {"norms": (large, block.norms[1])}):
        folded = block.folded("fold", torch.float16, **changes)
        assert folded.enter.bias is not None
        x = block.tokens(1, 4, 4).float()
        assert reference.quant_swin_block(x, folded).isfinite().all()
    assert block.folded("fold", torch.float16).enter.bias is None


def test_the_blocks_of_a_model_fold():
    model = tiny_swinir(num_heads=(3,))
    spec = QuantSpec(bits=4, transform="dct", pruning=0.4, per_channel=True)
    quantized = compsrt.quantize(model, spec, torch.rand(1, 3, 16, 16)).double()
    x = torch.randn(1, 16, 24, 24, dtype=torch.double)
    for block in quantized.layers[0].blocks:
        for mode in ("fold", "integer"):
            found = kernels.quant_swin_block(x, block.folded(mode, torch.double))
            torch.testing.assert_close(found, block(x), rtol=0, atol=1e-9)


# --- The kernel ----------------------------------------------------------------------------------

KINDS = {
    "plain": Kind(),
    "shifted": Kind(shift=2, masked=True, channels=True),
    "by head": Kind(shift=2, by_head=True, head_transform="dct"),
    "no transforms": Kind(transform="none", bits=8, weight_bits=8),
    "SwinIR-light": Kind(60, 6, 10, 120, 8, 4, "hadamard"),
    "32": Kind(32, 2, 16, 128, 8, bits=2),
    "36": Kind(36, 4, 9, 72, shift=1, bits=6),
    "90": Kind(90, 3, 30, 180, weight_bits=8, head_transform="random"),
    "128": Kind(128, 4, 32, 256, shift=2, bits=8, weight_bits=2),
    "36, an MLP of 4": Kind(36, 3, 12, 144, shift=2, bits=5, masked=True),
    "pruned heads": Kind(40, 2, 8, 50),
}


@on_each_device
@pytest.mark.parametrize("mode", ["fold", "integer"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_the_kernel_in_float32_is_the_block(device, kind, mode):
    block = Block(kind)
    x = block.tokens(1, kind.window, 2 * kind.window, seed=1).float()
    found = run(x, block.folded(mode), device)
    assert relative(found, block(x.double())) < 1e-4


@on_each_device
@pytest.mark.parametrize("mode", ["fold", "integer"])
@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 12, 4), (1, 4, 12), (1, 12, 16)], ids=str)
def test_every_border_of_a_shifted_picture(device, mode, shape):
    block = Block(Kind(8, 1, 4, 16, shift=3))
    x = block.tokens(*shape, seed=1).float()
    assert relative(run(x, block.folded(mode), device), block(x.double())) < 1e-4


@on_each_device
def test_a_window_of_several_programs(device):
    block = Block(Kind(12, 1, 12, 24, 16, 8))
    x = block.tokens(1, 16, 16, seed=1).float()
    assert relative(run(x, block.folded(), device), block(x.double())) < 1e-4


@triton.jit
def _codes_kernel(
    t_ptr, limits_ptr, out_ptr, COUNT: tl.constexpr, CODES: tl.constexpr, FAST: tl.constexpr
):
    i = tl.arange(0, COUNT)
    low, high = tl.load(limits_ptr), tl.load(limits_ptr + 1)
    codes = swin_block_tiles.to_codes(tl.load(t_ptr + i), low, high, CODES, FAST)
    tl.store(out_ptr + i, codes.to(tl.float32))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # of 1e30, by the interpreter
@on_each_device
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    ("codes", "low", "high"),
    [("float16", 0, 255), ("float16", 0, 15), ("float16", 0, 1), ("float16", 0, 0)]
    + [
        (codes, low, high)
        for codes in ("bfloat16", "int8")
        for low, high in ((-128, 127), (-8, 7), (-2, 1), (3, 5))
    ],
)
def test_codes_are_rounded_half_to_even_and_clamped(device, fast, codes, low, high):
    """In float16, where codes start at 0, in their unit, and with what is nearest to a tie."""
    ends = torch.tensor([-torch.inf, -1e30, -1e5, -3000, 3000, 1e5, 1e30, torch.inf])
    ties = torch.arange(-128, 128) + 0.5
    near = [ties.nextafter(side.expand(256)) for side in (ends[0], ends[-1])]
    t = torch.cat([torch.arange(-760, 768) / 8, *near, ends]).float()
    unit = HALF_UNITS[0] if codes == "float16" else 1.0
    found = torch.empty_like(t, device=device)
    numbers = (n.to(device) * unit for n in (t, torch.tensor([low, high]).float()))
    _codes_kernel[(1,)](*numbers, found, COUNT=len(t), CODES=getattr(tl, codes), FAST=fast)
    assert torch.equal(found.cpu() / unit, t.round().clamp(low, high))


HALF_KINDS = {
    "shifted": Kind(shift=2, head_transform="dct"),
    "by head": KINDS["by head"],
    "no transforms": KINDS["no transforms"],
    "SwinIR-light": KINDS["SwinIR-light"],
    "90": KINDS["90"],
    "16": Kind(12, 1, 12, 24, 16, 8),
}


@on_each_device
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capability", [None, 9])  # None: without instructions of NVIDIA devices
@pytest.mark.parametrize("kind", HALF_KINDS.values(), ids=HALF_KINDS.keys())
def test_matrices_of_half_types(device, dtype, stored, capability, kind, monkeypatch):
    """Against float64 matrices, as root mean squares, relative to what the block adds to its tokens.

    An operand that is off by one rounding, `unit`, turns every so-manieth code, by a step, which is
    2^-7 of what 8 bits hold or less: a root mean square of sqrt(unit * step), from ten quantizers.
    """
    if device == "cpu":
        monkeypatch.setattr(dispatch, "assumed_capability", capability)
    elif capability is None:
        pytest.skip("a device has its own")
    block = Block(kind._replace(bits=8, weight_bits=8))
    x = block.tokens(1, 2 * kind.window, kind.window, seed=1).to(stored)
    found = run(x, block.folded("fold", dtype), device)
    assert found.dtype == stored
    added = block(x.double()) - x.double()
    error = found.double() - x.double() - added
    # Of 60 and 90 channels 8.7 are reached, where each operand sums up more that was rounded.
    most = 8 if kind.size < 60 else 10
    limit = most * (UNIT[dtype] * 2.0**-7) ** 0.5 * added.norm()
    limit += UNIT[stored] * x.double().norm()
    assert error.norm() < limit


@on_each_device
@pytest.mark.parametrize(
    "sizes",
    [
        (12, 2, 6, 62),  # lanes of constants that begin, or end, where a tile or a chunk does
        (12, 2, 6, 95),
        (12, 2, 6, 96),
        (12, 2, 6, 126),
        (48, 4, 12, 192),
        (60, 6, 10, 240),
        (70, 2, 35, 192),
        (12, 2, 6, 300),
        (12, 2, 6, 320),
    ],
    ids=str,
)
def test_biases_reach_every_product(device, sizes, monkeypatch):
    """The kernel against PyTorch's products of the same matrices, relative to what the block adds."""
    if device == "cpu":
        monkeypatch.setattr(dispatch, "assumed_capability", 9)
    block = Block(Kind(*sizes, bits=8, weight_bits=8))
    folded = block.folded("fold", torch.float16)
    assert folded.enter.bias is None
    x = block.tokens(1, 4, 4, seed=1).float()
    added = reference.quant_swin_block(x, folded) - x
    error = run(x, folded, device) - x - added
    assert error.norm() < 0.04 * added.norm()  # 0.02 at most; without the biases of fc2 0.5


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # by the interpreter
@on_each_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_what_is_not_a_number_stays_in_its_window(device, dtype):
    """And is not hidden."""
    block = Block(Kind(bits=8))
    x = block.tokens(1, 4, 8, seed=1).float()
    x[0, 1, 1, 3] = torch.nan
    found = run(x, block.folded("fold", dtype), device)
    assert found[:, :, :4].isnan().all()
    assert found[:, :, 4:].isfinite().all()


@triton.jit
def _product_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    total = tl.zeros((N, N), tl.float32)
    tl.store(
        out_ptr + at, swin_block_tiles.add_product(tl.load(a_ptr + at), tl.load(b_ptr + at), total)
    )


@on_each_device
@pytest.mark.parametrize("code", [1, 3, 15, 255])
def test_products_of_codes_below_the_normal_halves(device, code):
    """A device may add up products with 24 bits from the exponent of normal numbers on."""
    a = torch.randint(0, code + 1, (64, 64), generator=torch.Generator().manual_seed(0))
    a, b = (a * HALF_UNITS[0]).half(), randn(64, 64, seed=1).half()
    found = torch.empty(64, 64, device=device)
    _product_kernel[(1,)](a.to(device), b.to(device), found, N=64)
    error = found.cpu().double() / HALF_UNITS[0] - a.double() @ b.double() / HALF_UNITS[0]
    assert error.abs().max() < 64 * 2**-14 * b.abs().max()


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="only the interpreter shows a kernel's codes")
def test_codes_of_integers_are_the_reference_s(monkeypatch):
    """Of a block of SwinIR-light: all but 1e-5 of them, and those are ties within rounding."""
    block = Block(Kind(60, 6, 10, 120, 8, 0, "hadamard", masked=True))
    x = block.tokens(1, 8, 16, seed=1).float()
    found, wanted = [], []
    of_kernel, module = swin_block_tiles.to_codes, reference.swin_block
    of_reference = module._to_codes

    def to_codes(t, low, high, CODES, FAST):
        codes = of_kernel(t, low, high, tl.float32, FAST)
        found.append(torch.from_numpy(codes.handle.data.copy()))
        return codes.to(CODES)

    def to_codes_of_reference(t, operands, site):
        before = t.clone()
        codes = of_reference(t, operands, site)
        wanted.append((site, before, codes.clone()))
        return codes

    monkeypatch.setattr(swin_block_tiles, "to_codes", to_codes)
    monkeypatch.setattr(module, "_to_codes", to_codes_of_reference)
    folded = block.folded("integer")
    y = run(x, folded)
    expected = module.quant_swin_block(x.double(), block.folded("integer", torch.double))
    assert relative(y, expected) < 1e-4
    sites = {site: (t, codes) for site, t, codes in wanted}
    different, all_codes = 0, 0
    # As a program, which does one window, makes them.
    per_window = iter(found)
    for window in range(2):
        tokens = slice(64 * window, 64 * window + 64)
        first = ("k", "v", "q", "key", "value", "query")
        whole = {site: next(per_window) for site in first}
        attention = [next(per_window) for _ in range(6)]
        whole |= {site: next(per_window) for site in ("proj", "fc1", "fc2")}
        for site, (t, codes) in sites.items():
            t, codes = (t[window], codes[window]) if t.ndim == 4 else (t[tokens], codes[tokens])
            if t.ndim == 3:
                if site == "attention":
                    ours = torch.stack(attention)
                else:
                    ours = whole[site][:, :60].T.unflatten(0, (6, 10))
            else:
                ours = whole[site][:, : t.shape[1]]
            differs = ours.double() != codes
            ties = (t - t.floor() - 0.5).abs() < 1e-4
            assert not (differs & ~ties).any(), site
            different += int(differs.sum())
            all_codes += codes.numel()
    assert next(per_window, None) is None
    assert all_codes == 2 * 64 * (3 * 60 + 6 * (3 * 10 + 64) + 2 * 60 + 120)
    assert different <= 1e-5 * all_codes


@on_each_device
def test_activations_beyond_half_types(device):
    """The residual stream may be larger than a float16 can hold."""
    block = Block(Kind(bits=8))
    x = 1e6 * block.tokens(1, 4, 4, seed=1).float()
    found = run(x, block.folded("fold", torch.float16), device)
    assert torch.isfinite(found).all()
    assert relative(found, block(x.double())) < 1e-5


@on_each_device
def test_operator(device):
    block = Block(Kind(8, 1, 4, 8))
    x = block.tokens(1, 4, 4).float().to(device)
    for options in (("fold",), ("fold", torch.float16), ("integer",)):
        arguments = folded_blocks.flatten(moved(block.folded(*options), torch.device(device)))
        torch.library.opcheck(swin_block._quant_swin_block, (x, *arguments))


def test_a_block_survives_the_operator():
    folded = Block(Kind(masked=True)).folded("integer")
    again = folded_blocks.unflatten(*folded_blocks.flatten(folded))
    for name, part, other in zip(FoldedBlock._fields, folded, again, strict=True):
        parts = (part, other) if isinstance(part, tuple) else ((part,), (other,))
        assert all(a is b or a == b for a, b in zip(*parts, strict=True)), name


@on_each_device
def test_no_tokens(device):
    block = Block(Kind())
    assert run(torch.empty(0, 8, 8, 12), block.folded(), device).shape == (0, 8, 8, 12)


@on_each_device
@pytest.mark.parametrize("size", [12, 160], ids=["kernel", "reference"])
def test_which_path_runs(device, size, monkeypatch):
    """What the kernel does not hold is composed of products; all else it does alone."""
    block = Block(Kind(size, 2, size // 2, 16))
    x = block.tokens(1, 4, 4).float().to(device)
    folded = moved(block.folded(), torch.device(device))
    ran = []
    monkeypatch.setenv("COMPSRT_KERNELS", "triton")
    monkeypatch.setattr(reference, "quant_swin_block", lambda x, folded: ran.append(x))
    kernels.quant_swin_block(x, folded)
    assert len(ran) == (size == 160)
    monkeypatch.setenv("COMPSRT_KERNELS", "reference")
    kernels.quant_swin_block(x, folded)
    assert len(ran) == 1 + (size == 160)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_device_that_flushes_halves(dtype, monkeypatch):
    """Codes of float16 blocks would be 0 there."""
    folded = Block(Kind()).folded("fold", dtype)
    assert swin_block.fits(folded)
    monkeypatch.setattr(swin_block, "flushes_halves", lambda device: True)
    assert swin_block.fits(folded) == (dtype != torch.float16)


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="a device has what it has")
def test_a_block_too_large_for_a_device_falls_back(monkeypatch):
    """What a launch needs is known when it is compiled; the interpreter compiles nothing."""
    block = Block(Kind())
    x, folded = block.tokens(1, 8, 8).float(), block.folded()

    def too_large(*arguments, **options):
        raise dispatch.triton.OutOfResources(98304, 65536, "shared memory")

    kernel = type("Kernel", (), {"__getitem__": lambda self, grid: too_large})()
    monkeypatch.setattr(swin_block, "_quant_swin_block_fwd_kernel", kernel)
    monkeypatch.setattr(swin_block, "_TOO_LARGE", set())
    monkeypatch.setenv("COMPSRT_KERNELS", "triton")
    with pytest.warns(UserWarning, match="98304 bytes of shared memory for 12 channels are more"):
        found = kernels.quant_swin_block(x, folded)
    torch.testing.assert_close(found, reference.quant_swin_block(x, folded), rtol=0, atol=0)
    assert not swin_block.has_kernel(x, folded)
    assert swin_block.has_kernel(x, block.folded(mode="integer"))
    kernels.quant_swin_block(x, folded)  # nothing more is said


@on_each_device
@pytest.mark.parametrize("shape", [(2**16, 4, 4), (1, 2**18, 4), (2**14, 2**9, 2**8)], ids=str)
def test_more_than_a_launch_can_count(device, shape):
    block = Block(Kind())
    x = torch.zeros(1, device=device).expand(*shape, 12)
    with triton_only(), pytest.raises(ValueError, match=r"x: no kernel for .*; split it below 2"):
        kernels.quant_swin_block(x, moved(block.folded(), torch.device(device)))


# --- Errors --------------------------------------------------------------------------------------

BLOCK = Block(Kind())
SMALLEST = BLOCK.folded()


def test_a_padded_transform_cannot_be_folded():
    padded = compsrt.transforms.transform_matrix("hadamard-padded", 12)
    with pytest.raises(ValueError, match="only a transform of exact order can be folded"):
        BLOCK.folded(rotation=padded)


def test_unclamped_codes_cannot_be_folded():
    layer = BLOCK.layer("proj")
    layer = layer._replace(grid=layer.grid._replace(codes="unclamped"))
    with pytest.raises(ValueError, match="proj: unclamped codes cannot be folded"):
        BLOCK.folded(proj=layer)


def test_grids_of_groups_are_no_integers():
    layer = BLOCK.layer("fc1")
    grid = layer.weight.grid
    grid = grid._replace(lower=grid.lower.expand(24, 12), upper=grid.upper.expand(24, 12))
    with pytest.raises(ValueError, match="fc1"):
        BLOCK.folded("integer", fc1=layer._replace(weight=layer.weight._replace(grid=grid)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "float"}, "mode: 'float' is unknown; one of fold, integer"),
        ({"mode": "integer", "dtype": torch.half}, "too coarse for codes that are exact"),
        ({"heads": 5}, "heads: 5 does not fit 12 channels"),
        ({"qkv": []}, "pass three layers and four grids"),
        ({"fc2": BLOCK.layer("fc1")}, "rotation of fc2: "),
    ],
    ids=["mode", "dtype", "heads", "qkv", "fc2"],
)
def test_what_does_not_fold(arguments, message):
    with pytest.raises(ValueError, match=message):
        BLOCK.folded(**arguments)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 8, 8, 10), r"x: \(1, 8, 8, 10\) of torch.float32 is not \(B, H, W, 12\)"),
        (torch.zeros(1, 8, 6, 12), "not both multiples of the window of 4; pad the picture"),
        (torch.zeros(1, 8, 8, 12, dtype=torch.int), "in a floating type"),
        (torch.zeros(1, 8, 8, 12, requires_grad=True), "no gradients; call it under"),
    ],
    ids=["width", "picture", "type", "gradient"],
)
def test_what_does_not_run(x, message):
    with pytest.raises(ValueError, match=message):
        kernels.quant_swin_block(x, SMALLEST)
