"""What every benchmark shares: the device and its copy bandwidth, and how a call is measured.

Each benchmark runs one call of one implementation: "kernel" (what `compsrt.kernels` runs on a
CUDA device), "eager" (the reference, op by op) and "compiled" (the reference under torch.compile).
The time that pytest-benchmark reports is end to end, from the call to the device being idle;
`extra_info` has the device time (median, cold cache), the bytes that have to move at least, the
rate and its share of what a copy reaches on the same device.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))  # for shapes.py, the one table of shapes

ON_A_CPU = ("bench_model.py", "bench_published.py", "bench_sesr.py")
IMPLEMENTATIONS = ["kernel", "eager", "compiled"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if HERE in item.path.parents and item.path.name not in ON_A_CPU:  # that is of the CPU
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    from compsrt.kernels.dispatch import triton

    for private in ("node", "release", "python_build", "python_compiler"):
        machine_info.pop(private, None)
    machine_info["versions"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": getattr(triton, "__version__", None),
        "cuda": torch.version.cuda,
    }
    if torch.cuda.is_available():
        machine_info["device"] = torch.cuda.get_device_name()


@pytest.fixture(scope="session")
def copy_bandwidth() -> float:
    """Bytes a second, read and written, of copying 1 GiB on the device."""
    from triton.testing import do_bench

    source = torch.empty(1 << 28, device="cuda")
    target = torch.empty_like(source)
    milliseconds = do_bench(lambda: target.copy_(source), return_mode="median")
    return 2 * source.nbytes / (1e-3 * milliseconds)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    """Chooses between a kernel's public function and its reference."""

    def choose(kernel, reference):
        if request.param == "kernel":
            return kernel
        return torch.compile(reference, dynamic=False) if request.param == "compiled" else reference

    yield choose
    torch.compiler.reset()


@pytest.fixture
def measure(benchmark, copy_bandwidth):
    """Measures a call that has to move so many bytes and do so many operations."""

    def run(call, *, bytes_moved: int, operations: int = 0) -> None:
        from triton.testing import do_bench

        def to_the_end():
            call()
            torch.cuda.synchronize()

        to_the_end()  # compiles
        seconds = 1e-3 * do_bench(call, return_mode="median")
        benchmark.extra_info.update(
            device_seconds=seconds,
            bytes_moved=bytes_moved,
            operations=operations,
            gigabytes_a_second=bytes_moved / seconds / 1e9,
            copy_gigabytes_a_second=copy_bandwidth / 1e9,
            share_of_copy=bytes_moved / seconds / copy_bandwidth,
            peak_bytes=torch.cuda.max_memory_allocated(),
        )
        benchmark.pedantic(to_the_end, rounds=20, warmup_rounds=3)

    torch.cuda.reset_peak_memory_stats()
    return run
