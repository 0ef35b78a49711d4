"""``python -m compsrt.env``: what a bug report has to say about the machine.

Versions, processor, CUDA devices, and which kernels run where. Nothing here fails for want of a
GPU, of Triton or of a driver: what is missing is reported as missing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compsrt.cli import ArgumentParser, nearest, run

# module -> distribution
PACKAGES = {
    "compsrt": "compsrt",
    "torch": "torch",
    "triton": "triton",
    "numpy": "numpy",
    "scipy": "scipy",
    "PIL": "pillow",
    "safetensors": "safetensors",
}
KERNEL_CHOICES = ("auto", "reference", "triton")


def collect() -> dict[str, Any]:
    """The report as a dictionary that JSON can hold. Initialises CUDA where there is any."""
    import torch

    versions = {name: _version(module, name) for module, name in PACKAGES.items()}
    has_triton = versions["triton"] is not None
    devices, cuda_error = _cuda_devices(torch)
    kernels = {"cpu": kernel_path("cpu", has_triton=has_triton)}
    kernels |= {
        device["name"]: kernel_path(
            "cuda", has_triton=has_triton, old=_is_old(device["capability"], torch)
        )
        for device in devices
    }
    return {
        "versions": {"python": platform.python_version(), **versions},
        "torch_cuda": torch.version.cuda,
        "torch_hip": torch.version.hip,
        "os": platform.platform(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "torch_threads": torch.get_num_threads(),
        "cuda_devices": devices,
        "cuda_error": cuda_error,
        "driver": _driver_version(),
        "COMPSRT_KERNELS": os.environ.get("COMPSRT_KERNELS"),
        "TRITON_INTERPRET": os.environ.get("TRITON_INTERPRET"),
        "kernels": kernels,
    }


def kernel_path(kind: str, *, has_triton: bool = True, old: bool = False) -> str:
    """Which kernels run on a device of ``kind`` ("cpu" or "cuda"), in words.

    The rule: Triton on CUDA where it is installed and the device not old (NVIDIA before 8.0), else
    the reference; ``COMPSRT_KERNELS`` overrides it. Triton on a CPU needs its interpreter,
    ``TRITON_INTERPRET=1``.
    """
    choice = os.environ.get("COMPSRT_KERNELS") or "auto"
    if choice not in KERNEL_CHOICES:
        return f"unknown COMPSRT_KERNELS {choice!r}{nearest(choice, KERNEL_CHOICES)}"
    if choice == "auto":
        choice = "triton" if kind == "cuda" and has_triton and not old else "reference"
    if choice == "reference":
        return "reference"
    if not has_triton:
        return "none: triton is not installed (COMPSRT_KERNELS=reference needs none)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "triton, interpreted"
    return "triton" if kind == "cuda" else "none: triton on a CPU needs TRITON_INTERPRET=1"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = ArgumentParser(
        "compsrt.env",
        description="Print what a bug report needs: versions, processor, CUDA devices and which"
        " kernels run where. The last line is the same as JSON.",
    )
    parser.parse_args(argv)
    report = collect()
    print(_as_text(report))
    return report


def _version(module: str, distribution: str) -> str | None:
    """The version, None if the package is not there, or what keeps it from being imported."""
    try:
        if importlib.util.find_spec(module) is None:
            return None
    except ValueError:  # a module without a spec, put there by hand
        pass
    # An import says more than the metadata: the build of torch ("+cpu"), a broken installation.
    try:
        found = getattr(importlib.import_module(module), "__version__", None)
    except Exception as error:  # a report on a broken machine must not break too
        return f"broken ({type(error).__name__}: {error})"
    if found is not None:
        return str(found)
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _cuda_devices(torch: Any) -> tuple[list[dict[str, Any]], str | None]:
    """What torch says of each device, and its error if it has devices but cannot open them."""
    devices = []
    try:
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            devices.append(
                {
                    "name": f"cuda:{index}",
                    "model": device.name,
                    "capability": f"{device.major}.{device.minor}",
                    "memory_bytes": device.total_memory,
                    "multiprocessors": device.multi_processor_count,
                }
            )
    except (RuntimeError, AssertionError) as error:  # torch asserts where it has no CUDA
        return devices, str(error)
    return devices, None


def _is_old(capability: str, torch: Any) -> bool:
    """Whether `kernels.dispatch`, which this report must not need, leaves a device to the reference."""
    return torch.version.hip is None and float(capability) < 8


def _driver_version() -> str | None:
    """The NVIDIA driver's version; None without a driver or without its command."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = answer.stdout.split()
    return lines[0] if lines else None


def _as_text(report: dict[str, Any]) -> str:
    facts = {name: version or "not installed" for name, version in report["versions"].items()}
    toolkit = report["torch_cuda"] or report["torch_hip"]
    facts["torch is built for"] = f"CUDA {toolkit}" if report["torch_cuda"] else toolkit or "CPU"
    facts["system"] = report["os"]
    usable = "" if report["usable_cores"] is None else f", {report['usable_cores']} usable"
    facts["processor"] = f"{report['cpu']} ({report['cores']} cores{usable})"
    facts["torch threads"] = report["torch_threads"]
    facts["driver"] = report["driver"] or "none found"
    for device in report["cuda_devices"]:
        facts[device["name"]] = (
            f"{device['model']}, capability {device['capability']}, "
            f"{device['memory_bytes'] / 2**30:.1f} GiB, "
            f"{device['multiprocessors']} multiprocessors"
        )
    if report["cuda_error"]:
        facts["CUDA error"] = report["cuda_error"]
    elif not report["cuda_devices"]:
        facts["CUDA devices"] = "none"
    for variable in ("COMPSRT_KERNELS", "TRITON_INTERPRET"):
        facts[variable] = "not set" if report[variable] is None else report[variable]
    for name, path in report["kernels"].items():
        facts[f"kernels on {name}"] = path
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {fact}" for name, fact in facts.items())


if __name__ == "__main__":
    sys.exit(run(main))
