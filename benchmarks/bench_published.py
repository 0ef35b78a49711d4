"""SwinIR-light beside the published CompSRT code: a forward pass, and the gradients of its bounds.

Needs a checkout of github.com/anonymous-researcher-99/CompSRT, which COMPSRT_PUBLISHED names; its files
are imported as they are. Both sides have the same random weights (time does not depend on their
values), and the published quantizers have bounds that this project's calibration found. First every
block has to give what it gives here. On a CPU the device that the published code names, "cuda", means
the CPU while it runs, and the time is that of the processor with one thread: what others do on the
machine counts less.

"fake-quantized, padded" is this project's form of the published arithmetic: Hadamard matrices of the
next power of two. "fake-quantized" and "packed" have those of the exact order. All forms take turns in
one process, and the least time of each counts, from the call to the device being idle. `extra_info`
has these seconds, their ratios to those of `base`, on a CUDA device the peak memory beyond what was
held before, and the forms that ran out of it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_packed_model import SIZES, model_of, networks

import compsrt
from compsrt.models.quant_swinir import QuantSwinBlock
from compsrt.models.swinir import SwinIR, mirror_to_multiple
from compsrt.quantization import SCALARS, QuantSpec
from compsrt.quantizers import named_quantizers, quantizers

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
CLOCK = time.perf_counter if CUDA else time.process_time
ROUNDS = 10 if CUDA else 3
PATCH, BATCH = 64, 16 if CUDA else 1  # of a training step
if CUDA:
    SHAPES = {f"{size}, batch {n}": (*shape, n) for size, shape in SIZES.items() for n in (1, 16)}
else:
    SHAPES = {f"x{scale} of {PATCH}x{PATCH}": (scale, PATCH, PATCH, 1) for scale in (4, 2)}
PUBLISHED = QuantSpec(bits=4, transform="hadamard-padded", one_sided="never", storage="float32")

# Where the published network keeps what this project's block calls so.
PARTS = {
    "q": "attn.qkv.q",
    "k": "attn.qkv.k",
    "v": "attn.qkv.v",
    "query": "attn.mymodule_q",
    "key": "attn.mymodule_k",
    "value": "attn.mymodule_v",
    "attention": "attn.mymodule_a",
    "proj": "attn.proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    "input": "act_quantizer",
    "weight": "weight_quantizer",
}

# Of a picture in [0, 1]; convolutions of a CUDA device round to TF32 in the published network.
FLOAT_ERROR = 1e-3 if CUDA else 1e-5
# Of what a block adds, for codes at ties (0.002 on a CPU); quantization changes it by 0.22 or more.
BLOCK_ERROR = 1e-2


@functools.cache
def imported(checkout: Path) -> tuple[Any, Any]:
    """Its modules of the float network and of the quantizers.

    Its packages load everything that they hold, and with it packages that these two do not need: they
    are replaced by bare ones that only say where files are, and two helpers by PyTorch's own.
    """
    for name in ("basicsr", "basicsr.archs", "basicsr.utils"):
        package: Any = types.ModuleType(name)
        package.__path__ = [str(checkout.joinpath(*name.split(".")))]
        sys.modules[name] = package
    helpers: Any = types.ModuleType("basicsr.archs.arch_util")
    helpers.to_2tuple = lambda x: tuple(x) if isinstance(x, tuple | list) else (x, x)
    helpers.trunc_normal_ = torch.nn.init.trunc_normal_
    sys.modules[helpers.__name__] = helpers
    swinir, quant = (
        importlib.import_module(f"basicsr.archs.{name}_arch") for name in ("swinir", "quant")
    )
    return swinir, quant


@functools.cache
def padded(scale: int) -> torch.nn.Module:
    """The quantized network with the published transforms, on the CPU."""
    torch.manual_seed(0)
    quantized = compsrt.quantize(networks(scale)[0], PUBLISHED, torch.rand(1, 3, PATCH, PATCH))
    return quantized.requires_grad_(False)


@pytest.fixture
def published(monkeypatch):
    """Makes the published float and quantized networks from this project's, on the device at hand."""
    folder = os.environ.get("COMPSRT_PUBLISHED")
    if not folder:
        pytest.skip("COMPSRT_PUBLISHED does not name a checkout of the published CompSRT code")
    if not Path(folder, "basicsr/archs/quant_arch.py").is_file():
        pytest.fail(f"COMPSRT_PUBLISHED: {folder} has no basicsr/archs/quant_arch.py")
    pytest.importorskip("scipy", reason="the published code takes its matrices from scipy")
    swinir, quant = imported(Path(folder).resolve())
    threads = torch.get_num_threads()
    if not CUDA:
        torch.set_num_threads(1)
        to = torch.Tensor.to

        def to_here(tensor, *args, **options):
            here = ("cpu" if isinstance(a, str) and a == "cuda" else a for a in args)
            return to(tensor, *here, **options)

        monkeypatch.setattr(torch.Tensor, "to", to_here)

    def make(scale: int) -> tuple[Any, Any]:
        network, ours = networks(scale)[0], padded(scale)
        theirs = swinir.SwinIR(
            upscale=scale,
            img_size=PATCH,
            window_size=8,
            depths=[6] * 4,
            embed_dim=60,
            num_heads=[6] * 4,
            mlp_ratio=2,
            upsampler="pixelshuffledirect",
        ).eval()
        missing, unexpected = theirs.load_state_dict(network.state_dict(), strict=False)
        derived = ("attn_mask", "relative_position_index")
        assert not unexpected and all(name.endswith(derived) for name in missing)
        quantized = with_quantizers(copy.deepcopy(theirs), swinir, quant, ours).to(DEVICE)
        theirs = theirs.to(DEVICE)
        check(theirs, quantized, swinir, network, ours)
        return theirs, quantized

    yield make
    torch.set_num_threads(threads)


def with_quantizers(model: Any, swinir: Any, quant: Any, ours: torch.nn.Module) -> Any:
    """The published float network made its quantized one, with the bounds of ours."""
    blocks = [block for block in model.modules() if isinstance(block, swinir.SwinTransformerBlock)]
    for block in blocks:
        attention, mlp = block.attn, block.mlp
        for parent, name in ((attention, "qkv"), (attention, "proj"), (mlp, "fc1"), (mlp, "fc2")):
            kind = quant.QuantLinearQKV if name == "qkv" else quant.QuantLinear
            layer = kind({"bit": PUBLISHED.bits, "name": name, "pruning_keep_frac": 1.0})
            layer.set_param(getattr(parent, name))
            setattr(parent, name, layer)
        for operand in "qkva":
            setattr(attention, f"mymodule_{operand}", quant.FakeQuantizerAct(PUBLISHED.bits))
    for site, quantizer in named_quantizers(ours):
        words = site.split(".")
        module = model.get_submodule(".".join([*words[:5], *(PARTS[w] for w in words[5:])]))
        module.set_params_manually(quantizer.lower.item(), quantizer.upper.item(), PUBLISHED.bits)
        module.calibrated = True
    return model


@torch.no_grad()
def check(theirs: Any, quantized: Any, swinir: Any, network: SwinIR, ours: torch.nn.Module) -> None:
    """The float networks agree, and every quantized block gives what ours gives for the same tokens."""
    x = torch.rand(1, 3, PATCH, PATCH, device=DEVICE)
    difference = theirs(x) - copy.deepcopy(network).to(DEVICE)(x)
    assert difference.abs().max() <= FLOAT_ERROR
    ours = copy.deepcopy(ours).to(DEVICE)
    pairs = zip(
        (block for block in quantized.modules() if isinstance(block, swinir.SwinTransformerBlock)),
        (block for block in ours.modules() if isinstance(block, QuantSwinBlock)),
        strict=True,
    )
    tokens = torch.randn(1, PATCH * PATCH, 60, device=DEVICE)
    for their_block, block in pairs:
        want = their_block(tokens, (PATCH, PATCH))
        got = block(tokens.unflatten(1, (PATCH, PATCH))).flatten(1, 2)
        assert (got - want).norm() <= BLOCK_ERROR * (want - tokens).norm()
        tokens = want


# --- Measuring -------------------------------------------------------------------------------------


def to_the_end(call: Callable[[], Any]) -> float:
    """Seconds from the call to the device being idle."""
    start = CLOCK()
    call()
    if CUDA:
        torch.cuda.synchronize()
    return CLOCK() - start


def peak_bytes(call: Callable[[], Any]) -> int:
    """Memory of the CUDA device that a call takes beyond what is held, its result included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    to_the_end(call)
    return torch.cuda.max_memory_allocated() - held


def compare(
    benchmark, calls: dict[str, Callable], base: str, direct: dict[str, Callable] | None = None
) -> None:
    """Times the calls in turns. direct: what the memory is measured of, where that is not the call."""
    peaks: dict[str, int] = {}
    for name, call in (calls | (direct or {})).items():
        with contextlib.suppress(torch.OutOfMemoryError):
            call()  # compiles
            if CUDA:
                peaks[name] = peak_bytes(call)
    seconds: dict[str, list[float]] = {name: [] for name in calls}

    def turns():  # the first ones also record and replay
        for _ in range(ROUNDS):
            for name, call in calls.items():
                with contextlib.suppress(torch.OutOfMemoryError):
                    seconds[name].append(to_the_end(call))

    benchmark.pedantic(turns, rounds=1)
    least = {name: min(measured) for name, measured in seconds.items() if measured}
    ratios = {name: value / least[base] for name, value in least.items()}
    benchmark.extra_info.update(
        seconds=least,
        ratios=ratios,
        base=base,
        peak_bytes=peaks,
        out_of_memory=[name for name in calls if name not in least],
        clock=CLOCK.__name__,
    )
    others = (f"{name} {ratio:.2f}x" for name, ratio in ratios.items() if name != base)
    print(f"\n{base}: {least[base]:.4f} s; " + "; ".join(others))


@pytest.mark.parametrize("size", SHAPES)
def test_forward(benchmark, published, size):
    scale, height, width, batch = SHAPES[size]
    theirs, quantized = published(scale)
    x = torch.rand(batch, 3, height, width, device=DEVICE)

    def whole_windows(model):
        """The published networks take whole windows; padding is part of the way to a picture."""
        return lambda: model(mirror_to_multiple(x, 8))[..., : height * scale, : width * scale]

    ours = {form: model_of(form, scale, DEVICE) for form in ("fake-quantized", "packed")}
    ours["fake-quantized, padded"] = copy.deepcopy(padded(scale)).to(DEVICE)
    ours["float"] = model_of("float", scale, DEVICE)
    calls = {
        "published, fake-quantized": whole_windows(quantized),
        "published, float": whole_windows(theirs),
        **{form: functools.partial(model, x) for form, model in ours.items()},
    }
    # A recorded picture holds its memory for good, so what it takes is looked at before.
    direct = {"packed": functools.partial(ours["packed"]._enlarge, x)}
    with torch.no_grad():
        compare(benchmark, calls, "packed", direct)


def test_gradients_of_bounds(benchmark, published):
    """Forward and backward of a step of distillation, x4, without teacher, features and optimizer.

    The published code computes gradients of all weights with it, which its optimizer does not use.
    """
    theirs, quantized = published(4)
    students = {"published": quantized}
    for form, network in (("exact order", networks(4)[1]), ("padded", padded(4))):
        students[form] = copy.deepcopy(network).to(DEVICE)
        for site in quantizers(students[form]).values():
            for scalar in SCALARS:
                getattr(site, scalar).requires_grad_(True)
    x = torch.rand(BATCH, 3, PATCH, PATCH, device=DEVICE)
    with torch.no_grad():
        target = theirs(x)

    def step(student):
        student.zero_grad()
        (student(x) - target).abs().mean().backward()

    calls = {form: functools.partial(step, student) for form, student in students.items()}
    compare(benchmark, calls, "exact order")
    for name, parameter in quantized.named_parameters():
        if name.endswith(("_bound", "alpha", "beta_Z")):
            assert torch.isfinite(parameter.grad).all(), name
