"""A training step of SESR-M5 x2, batch 32 of 64x64: linear blocks collapsed against expanded.

The paper counts 1.84 against 41.77 G multiply-adds forward. Each form runs in processes of its own, so
that the peak of the resident memory is its own; the forms take turns, and medians are compared.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time

import torch

from compsrt.models.sesr import BLOCKS, SESR, SESRConfig, training_macs

BATCH, PATCH, ROUNDS, THREADS = 32, 64, 5, 2


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
