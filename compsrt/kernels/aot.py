"""``python -m compsrt.kernels.aot``: compile every kernel for named devices without having one.

The `examples()` of an op file are calls of its host functions with the shapes of SwinIR-light; a third
entry has what one may spill on a target, or None where it is not compiled; the op's file says why.
The launches that they end in are caught before they reach a device and compiled instead, with the very
arguments, block sizes and warps that a device would get. What the compilers say makes a table:

    registers   of a thread; on AMD vector registers, accumulators included
    spill       bytes of a thread that went to memory for want of registers
    shared      bytes of shared memory of a program
    tensor      tensor-core instructions in the code (mma, wgmma, tcgen05, mfma)
    occupancy   share of a processor's warps that can be resident; a theoretical figure, by
                registers, shared and tensor memory (on AMD the compiler's own)
    seconds     that the compilers took

`aot_table.json` beside this file is the committed table.
"""

from __future__ import annotations

import fnmatch
import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import dispatch
from .dispatch import INSTALLED, INTERPRETED, triton

TABLE = Path(__file__).with_name("aot_table.json")
OPS = (  # files that have examples()
    "fake_quant",
    "hadamard",
    "hadamard_fake_quant",
    "bounds",
    "norm",
    "linear",
    "mlp",
    "attention",
    "convolution",
    "swin_block",
    "conv_stack",
)
COLUMNS = ("registers", "spill", "shared", "tensor", "occupancy", "seconds")

# What `--check` accepts.
SPILL = 32  # bytes
GROWTH = 1.1  # of registers, spill and shared memory over the committed table


class Target(NamedTuple):
    backend: str
    arch: int | str
    warp: int  # threads
    shared: int  # bytes of shared memory that a program may have
    processor_shared: int  # bytes that a processor has
    processor_warps: int = 64  # and how many warps, and half as many programs, may be on it

    def __str__(self) -> str:
        return f"{self.backend}:{self.arch}"


# 8.6 and 8.9 run the code of 8.0, with less shared memory: this limit is theirs.
TARGETS = (
    Target("cuda", 80, 32, 99 << 10, 164 << 10),
    Target("cuda", 90, 32, 227 << 10, 228 << 10),
    Target("cuda", 100, 32, 227 << 10, 228 << 10),
    Target("cuda", 120, 32, 99 << 10, 100 << 10, 48),
    Target("hip", "gfx942", 64, 64 << 10, 64 << 10),
)


# --- Catching and compiling launches -------------------------------------------------------------


class Launch(NamedTuple):
    name: str  # of kernel and example
    kernel: Any
    arguments: tuple
    options: dict
    spills: Mapping[str, int | None] = {}  # bytes that are accepted on a target; None: left out


def launches(pattern: str = "*") -> Iterator[Launch]:
    """Every launch of every example whose name matches, caught before it needs a device."""
    from triton.runtime import jit

    kernel_class: Any = jit.JITFunction
    caught: list[tuple] = []

    def catch(kernel, *arguments, grid, warmup=False, **options):
        caught.append((kernel, arguments, options))

    for op in OPS:
        for label, call, *spills in importlib.import_module(f".{op}", __package__).examples():
            caught.clear()
            run, kernel_class.run = kernel_class.run, catch
            try:
                call()
            finally:
                kernel_class.run = run
            for kernel, arguments, options in caught:
                name = f"{kernel.__name__.strip('_').removesuffix('_kernel')} {label}"
                if fnmatch.fnmatchcase(name, pattern):
                    yield Launch(name, kernel, arguments, options, *spills)


class _Device:
    """What Triton's launcher asks of a driver, answered for a device that is not there."""

    def __init__(self, target: Target):
        self.target = target

    def get_current_device(self) -> str:
        return str(self.target)  # only a key of the launcher's cache

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.target.backend, self.target.arch, self.target.warp)


def compile_launch(launch: Launch, target: Target) -> dict[str, Any]:
    """One line of the table, and under "product" whether the kernel has a matrix product."""
    from triton.runtime import driver

    active: Any = driver
    active.set_active(_Device(target))
    knobs = triton.knobs.compilation
    cached, knobs.always_compile = knobs.always_compile, True
    start = time.perf_counter()
    try:
        code = launch.kernel.run(*launch.arguments, grid=(1,), warmup=True, **launch.options)
    finally:
        knobs.always_compile = cached
    seconds = round(time.perf_counter() - start, 1)
    resources = _cuda_resources if target.backend == "cuda" else _hip_resources
    return {
        **resources(code, target),
        "shared": code.metadata.shared,
        "seconds": seconds,
        "product": "tt.dot" in code.asm["ttir"],
    }


def _cuda_resources(code: Any, target: Target) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", answer)}
    warps = code.metadata.num_warps
    tensor_columns = getattr(code.metadata, "tmem_size", None) or 0
    programs = min(
        target.processor_warps // 2,
        target.processor_warps // warps,
        65536 // (warps * -(-usage["REG"] * 32 // 256) * 256),  # given out 256 to a warp at a time
        target.processor_shared // (code.metadata.shared + 1024),  # one KiB is the system's
        512 // max(32, triton.next_power_of_2(tensor_columns)),
    )
    instructions = re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", code.asm["ptx"])
    return {
        "registers": usage["REG"],
        "spill": usage["STACK"] + usage["LOCAL"],
        "tensor": len(instructions),
        "occupancy": round(programs * warps / target.processor_warps, 4),
    }


def _hip_resources(code: Any, target: Target) -> dict[str, Any]:
    text = code.asm["amdgcn"]

    def number(key: str) -> int | None:
        found = re.search(rf"{key}:\s*(\d+)", text)
        return None if found is None else int(found[1])

    waves = number("; Occupancy")  # of eight on each of a processor's four vector units
    return {
        "registers": number(r"\.vgpr_count"),
        "spill": number(r"\.private_segment_fixed_size"),
        "tensor": len(re.findall(r"\bv_s?mfmac?_", text)),
        "occupancy": None if waves is None else waves / 8,
    }


# --- The table -----------------------------------------------------------------------------------


def compile_all(targets: Sequence[Target] = TARGETS, pattern: str = "*") -> list[dict[str, Any]]:
    """All lines of the table: kernel and example, target, and what `compile_launch` says."""
    if not INSTALLED:
        raise ValueError("triton is not installed here, so there is nothing to compile with")
    if INTERPRETED:
        raise ValueError("TRITON_INTERPRET: the interpreter compiles nothing; unset it")
    lines = []
    for target in targets:
        # What is launched may depend on the device, so there is a round of launches for each.
        dispatch.assumed_capability = target.arch // 10 if isinstance(target.arch, int) else None
        try:
            for launch in launches(pattern):
                accepted = launch.spills.get(str(target), SPILL)
                if accepted is not None:
                    line = {"kernel": launch.name, "target": str(target), "accepted": accepted}
                    lines.append({**line, **compile_launch(launch, target)})
        finally:
            dispatch.assumed_capability = None
    return sorted(lines, key=lambda line: line["kernel"])


def faults(lines: Sequence[dict[str, Any]], committed: dict[str, Any]) -> list[str]:
    """What is wrong with the lines, each fault in one sentence."""
    limits = {str(target): target.shared for target in TARGETS}
    found = []
    # Another compiler gives other figures: then only the limits hold.
    known = committed["lines"] if committed["triton"] == triton.__version__ else []
    before = {(line["kernel"], line["target"]): line for line in known}
    for line in lines:
        name = f"{line['kernel']} for {line['target']}"
        if (line["spill"] or 0) > line["accepted"]:
            found.append(f"{name} spills {line['spill']} bytes")
        if line["shared"] > limits[line["target"]]:
            found.append(f"{name} needs {line['shared']} bytes of shared memory")
        if line["product"] and not line["tensor"]:
            found.append(f"{name} has a matrix product but no tensor-core instruction")
        old = before.get((line["kernel"], line["target"]), None if known else line)
        if old is None:
            found.append(f"{name} is not in the committed table")
            continue
        for key in ("registers", "spill", "shared"):
            if (line[key] or 0) > GROWTH * (old[key] or 0):
                found.append(f"{name}: {key} went up from {old[key]} to {line[key]}")
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    from ..cli import ArgumentParser, format_table

    parser = ArgumentParser(
        "compsrt.kernels.aot",
        description="Compile every kernel for named devices, without having one, and print a table"
        " of registers, spills, shared memory, tensor-core instructions and occupancy.",
    )
    parser.add_argument(
        "--target", action="append", choices=[str(t) for t in TARGETS], help="default: all"
    )
    parser.add_argument(
        "--kernel", default="*", help="a pattern of kernels' names, such as '*bwd*'"
    )
    parser.add_argument("--output", type=Path, help="write the table to this file too, as JSON")
    parser.add_argument(
        "--check",
        action="store_true",
        help=f"exit code 1 for a spill above {SPILL} bytes, too much shared memory, a product"
        f" without tensor cores, or more than {GROWTH} times what {TABLE.name} says",
    )
    options = parser.parse_args(argv)
    targets = [t for t in TARGETS if options.target is None or str(t) in options.target]
    lines = compile_all(targets, options.kernel)
    print(format_table(lines, columns=("kernel", "target", *COLUMNS)))
    if options.output is not None:
        rows = ",\n".join(json.dumps(line) for line in lines)
        text = f'{{"triton": "{triton.__version__}", "lines": [\n{rows}\n]}}\n'
        options.output.write_text(text)
    found = faults(lines, json.loads(TABLE.read_text())) if options.check else []
    for fault in found:
        print(f"fault: {fault}")
    seconds = round(sum(line["seconds"] for line in lines), 1)
    return {
        "triton": triton.__version__,
        "kernels": len({line["kernel"] for line in lines}),
        "lines": len(lines),
        "seconds": seconds,
        "faults": found,
    }


def _run() -> int:
    from ..cli import run

    report: dict[str, Any] = {}

    def entry(argv):
        report.update(main(argv))
        return report

    return run(entry) or int(bool(report["faults"]))


if __name__ == "__main__":
    sys.exit(_run())
