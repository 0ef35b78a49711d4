"""SESR-M5 x2 on a CPU: what collapsing linear blocks saves in training and at inference.

A training step, batch 32 of 64x64: the paper counts 1.84 against 41.77 G multiply-adds forward. Each
form runs in processes of its own, so that the peak of the resident memory is its own; the forms take
turns, and medians are compared.

A picture of 1920 x 1080 to 3840 x 2160: wide blocks in PyTorch, narrow ones in PyTorch, in onnxruntime
as float32 and as int8, in TFLite as int8. All take turns, the least of the rounds counts. Wide blocks
need some 5 GB.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import compsrt
from compsrt.models.sesr import BLOCKS, SESR, SESRConfig, training_macs

BATCH, PATCH, ROUNDS, THREADS = 32, 64, 5, 2
# Of the whole picture; COMPSRT_BENCH_HEIGHT takes fewer of its rows, for a look at a slow machine.
HEIGHT, WIDTH = int(os.environ.get("COMPSRT_BENCH_HEIGHT", "1080")), 1920
ASSETS = Path(compsrt.__file__).parent / "assets"


def _steps(block: str, queue) -> None:
    """Median seconds of a step, and GB at the peak beyond what the process began with."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    network = SESR(SESRConfig()).widened(block=block)
    optimizer = torch.optim.AdamW(network.parameters())
    lr = torch.rand(BATCH, 1, PATCH, PATCH)
    hr = torch.rand(BATCH, 1, 2 * PATCH, 2 * PATCH)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        optimizer.zero_grad()
        (network(lr) - hr).abs().mean().backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    queue.put((statistics.median(seconds[1:]), peak / 1e6))


def _measure(block: str) -> tuple[float, float]:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_steps, args=(block, queue))
    process.start()
    result = queue.get(timeout=600)
    process.join()
    return result


def test_training_step(benchmark):
    def both():
        runs = {block: [] for block in BLOCKS}
        for _ in range(2):
            for block in BLOCKS:
                runs[block].append(_measure(block))
        return runs

    runs = benchmark.pedantic(both, rounds=1)
    lines = {}
    for block, found in runs.items():
        each, once = training_macs(SESRConfig(), block)
        lines[block] = {
            "gmacs": (each * BATCH * PATCH**2 + once) / 1e9,
            "seconds": min(seconds for seconds, _ in found),
            "peak_gb": min(peak for _, peak in found),
        }
    ratios = {key: lines["expanded"][key] / lines["collapsed"][key] for key in lines["collapsed"]}
    benchmark.extra_info.update(lines, ratios=ratios, threads=THREADS, torch=torch.__version__)
    for name, values in {**lines, "expanded / collapsed": ratios}.items():
        print(f"\n{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in values.items()))


def _onnx_session(content: bytes):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.add_session_config_entry("session.x64quantprecision", "1")  # where there is no VNNI
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _forms(picture: torch.Tensor) -> dict[str, Callable[[], object]]:
    """A call for each form of the network that enlarges the picture (1, 1, H, W)."""
    from compsrt.exporting import onnx_integer, onnx_traced, tflite

    network = compsrt.load(ASSETS / "sesr_m5_x2.safetensors")
    integers = compsrt.load(ASSETS / "sesr_m5_x2_8bit.safetensors")
    wide = network.widened(block="expanded")
    feed = {"luma": picture.numpy()}
    real = _onnx_session(onnx_traced.traced_onnx_file(network).content)
    whole = _onnx_session(onnx_integer.integer_onnx_file(integers).content)
    litert = pytest.importorskip("ai_edge_litert.interpreter", reason="needs the extra 'export'")
    content = tflite.tflite_file(integers, *picture.shape[2:]).content
    interpreter = litert.Interpreter(model_content=content, num_threads=THREADS)
    interpreter.allocate_tensors()
    pixels = (picture * 255).round().sub(128).to(torch.int8)[0, 0, None, :, :, None].numpy()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], pixels)
    return {
        "expanded, PyTorch float32": lambda: wide(picture),
        "collapsed, PyTorch float32": lambda: network(picture),
        "collapsed, onnxruntime float32": lambda: real.run(None, feed),
        "collapsed, onnxruntime int8": lambda: whole.run(None, feed),
        "collapsed, TFLite int8": interpreter.invoke,
    }


def test_1080p_to_4k(benchmark):
    torch.set_num_threads(THREADS)

    def turns():
        seconds = {name: [] for name in forms}
        for _ in range(ROUNDS):
            for name, call in forms.items():
                if name.startswith("expanded") and len(seconds[name]) == 2:
                    continue  # it takes as long as all others together
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
        return seconds

    with torch.no_grad():
        forms = _forms(torch.rand(1, 1, HEIGHT, WIDTH))
        found = benchmark.pedantic(turns, rounds=1)
    least = {name: 1e3 * min(seconds) for name, seconds in found.items()}
    benchmark.extra_info.update(least, height=HEIGHT, threads=THREADS, torch=torch.__version__)
    print(f"\n{WIDTH} x {HEIGHT} to {2 * WIDTH} x {2 * HEIGHT}, {THREADS} threads")
    for name, milliseconds in least.items():
        print(f"  {name:31} {milliseconds:8.0f} ms")
