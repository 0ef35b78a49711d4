"""Which implementation of an op runs: the reference in plain PyTorch, or a Triton kernel.

`COMPSRT_KERNELS` decides, read at every call (under torch.compile once, when the call is traced):

    auto        the default: Triton for CUDA tensors in float32, float16 and bfloat16, the
                reference for all others, wherever Triton is missing (macOS, Windows) or cannot
                run (without a C compiler, it cannot), and on NVIDIA devices before 8.0
    reference   always the reference
    triton      always Triton; for CPU tensors this needs its interpreter, TRITON_INTERPRET=1
                in the environment before Triton is imported

Every op file takes `triton` and `tl` from here, so that it can be read where Triton is missing.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from typing import Any

import torch
from torch import Tensor

CHOICES = ("reference", "triton", "auto")
TYPES = (torch.float32, torch.float16, torch.bfloat16)
# For older NVIDIA devices Triton makes products without tensor cores, which spill whatever they hold:
# compiled for 7.5, `quant_swin_block` in float16 spills 9,584 bytes of a thread, and takes over a minute.
LEAST_CAPABILITY = 8


class _Missing:
    """Stands in for a module that is not there: jit and constexpr leave their argument alone."""

    def __getattr__(self, name: str) -> Any:
        return lambda argument: argument


triton: Any  # its own types know nothing of launch options and loops over tl.range
tl: Any
libdevice: Any
try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
except ImportError:
    triton = tl = libdevice = _Missing()
    INSTALLED = INTERPRETED = False
else:
    INSTALLED, INTERPRETED = True, bool(triton.knobs.runtime.interpret)


def use_triton(x: Tensor) -> bool:
    """Whether an op on x runs its Triton kernel.

    Raises ValueError for an unknown COMPSRT_KERNELS, and for "triton" where x cannot have it.
    """
    choice = os.environ.get("COMPSRT_KERNELS") or "auto"
    if choice == "reference":
        return False
    if choice == "auto":
        return x.is_cuda and INSTALLED and x.dtype in TYPES and runs_kernels(x.device)
    if choice != "triton":
        raise ValueError(f"COMPSRT_KERNELS: {choice!r} is unknown; one of {', '.join(CHOICES)}")
    if not INSTALLED:
        raise ValueError("COMPSRT_KERNELS: triton is not installed here; use auto or reference")
    if x.dtype not in TYPES:
        raise ValueError(f"x: no kernel for {x.dtype}; use float32, or COMPSRT_KERNELS=reference")
    if not x.is_cuda and not (INTERPRETED and x.device.type == "cpu"):
        raise ValueError(
            f"COMPSRT_KERNELS: triton does not run on {x.device}; use auto, a CUDA device, or,"
            " for tests on a CPU, TRITON_INTERPRET=1"
        )
    return True


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Makes x's device the current one: Triton launches on that, wherever its arguments are."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


assumed_capability: int | None = None  # of tensors on a CPU, while aot.py compiles for a device


def capability(device: torch.device) -> int | None:
    """The major number of the compute capability of a CUDA device; None of other devices."""
    if device.type != "cuda":
        return assumed_capability
    return None if torch.version.hip else torch.cuda.get_device_capability(device)[0]


@torch.compiler.assume_constant_result
def runs_kernels(device: torch.device) -> bool:
    """Whether a CUDA device can run the kernels, and as what they are written for."""
    return _runs_kernels(device)


@triton.jit
def _nothing_kernel():
    pass


@functools.lru_cache(maxsize=32)
def _runs_kernels(device: torch.device) -> bool:
    """Asked once a device; where Triton cannot compile or launch, a warning says why."""
    if (capability(device) or LEAST_CAPABILITY) < LEAST_CAPABILITY:
        return False
    try:
        with torch.cuda.device(device):
            _nothing_kernel[(1,)]()
    except Exception as error:  # of a C compiler, of ptxas, of the driver
        why = str(error).partition("\n")[0] or type(error).__name__
        warnings.warn(
            f"Triton cannot run on {device}, so that PyTorch's own ops do, slower: {why}",
            stacklevel=2,
        )
        return False
    return True


def flushes_halves(device: torch.device) -> bool:
    """Whether a device's matrix products take float16 below its normal numbers for 0, as AMD's MI200 do
    (https://docs.pytorch.org/docs/stable/notes/numerical_accuracy.html)."""
    if device.type != "cuda" or not torch.version.hip:
        return False
    return "gfx90a" in torch.cuda.get_device_properties(device).gcnArchName


@functools.lru_cache(maxsize=32)
def processors(device: torch.device) -> int:
    """Multiprocessors of a device. Two on a CPU: enough for the interpreter to meet every case."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
