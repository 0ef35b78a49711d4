"""aot: kernels compile for devices that are not here, and the committed table is complete.

Compiling needs a Python whose Triton is not the interpreter, so it runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compsrt.kernels import aot, dispatch

pytestmark = pytest.mark.skipif(not dispatch.INSTALLED, reason="Triton is not installed")
ROOT = Path(__file__).resolve().parents[1]
TABLE = json.loads(aot.TABLE.read_text())


def python(*arguments: str, code: int = 0, **variables: str) -> str:
    """What a fresh Python prints on stdout, or on stderr if it is to fail."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**environment, "PYTHONPATH": str(ROOT), **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == code, done.stderr + done.stdout
    return done.stdout if code == 0 else done.stderr + done.stdout


def test_a_few_kernels_compile_for_every_target():
    # Elementwise, reduction and product, forward and backward, at SwinIR-light's width.
    out = python("-m", "compsrt.kernels.aot", "--check", "--kernel", "*bfloat16 60")
    report = json.loads(out.splitlines()[-1])
    assert report["faults"] == []
    assert report["kernels"] == 3
    assert report["lines"] == 3 * len(aot.TARGETS)
    assert "hadamard_fake_quantize_bwd bfloat16 60" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernels", ["quant_window_attention_bwd*", "quant_window_attention_fwd*", "[!q]*"]
)
def test_all_kernels_compile_for_one_target_as_the_table_says(kernels):
    """The other targets' figures are the committed table's; `aot --check` compiles for all."""
    out = python("-m", "compsrt.kernels.aot", "--check", "--target", "cuda:90", "--kernel", kernels)
    report = json.loads(out.splitlines()[-1])
    assert report["faults"] == [] and report["lines"] >= 8


def test_the_committed_table_has_every_launch():
    program = (
        "import json; from compsrt.kernels import aot\n"
        "print(json.dumps([(launch.name, launch.spills) for launch in aot.launches()]))"
    )
    launches = dict(listed := json.loads(python("-c", program)))
    assert len(launches) == len(listed)
    targets = [str(target) for target in aot.TARGETS]
    wanted = {(n, t) for n, spills in listed for t in targets if spills.get(t, 0) is not None}
    assert {(line["kernel"], line["target"]) for line in TABLE["lines"]} == wanted


def test_the_committed_table_has_no_faults():
    assert aot.faults(TABLE["lines"], TABLE) == []
    assert all(line[key] is not None for line in TABLE["lines"] for key in aot.COLUMNS)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"spill": 40}, "spills 40 bytes"),
        ({"shared": 300000}, "needs 300000 bytes of shared memory"),
        ({"tensor": 0}, "has a matrix product but no tensor-core instruction"),
        ({"registers": 100}, "registers went up from 80 to 100"),
        ({"shared": 2000}, "shared went up from 1000 to 2000"),
        ({"kernel": "new"}, "is not in the committed table"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_faults(change, fault):
    line = {
        "kernel": "old",
        "target": "cuda:90",
        "accepted": aot.SPILL,
        "registers": 80,
        "spill": 0,
        "shared": 1000,
        "tensor": 8,
        "occupancy": 0.5,
        "seconds": 1.0,
        "product": True,
    }
    committed = {"triton": dispatch.triton.__version__, "lines": [line]}
    assert aot.faults([line], committed) == []
    assert any(fault in found for found in aot.faults([{**line, **change}], committed))
    # Another compiler's figures are no measure, but the limits still are.
    other = {**committed, "triton": "0.0"}
    assert bool(aot.faults([{**line, **change}], other)) == (
        "went up" not in fault and "not in" not in fault
    )


def test_faults_are_exit_code_1(tmp_path):
    program = (
        "import sys; from compsrt.kernels import aot\n"
        "aot.SPILL = -1\n"
        "sys.argv = ['aot', '--check', '--target', 'cuda:90', '--kernel', 'search*float32',\n"
        f"    '--output', {str(tmp_path / 'table.json')!r}]\n"
        "sys.exit(aot._run())"
    )
    assert "fault: search_bounds float32 for cuda:90 spills 0 bytes" in python(
        "-c", program, code=1
    )
    assert len(json.loads((tmp_path / "table.json").read_text())["lines"]) == 1


def test_the_interpreter_compiles_nothing():
    message = python("-m", "compsrt.kernels.aot", code=2, TRITON_INTERPRET="1")
    assert "compsrt.kernels.aot: error: TRITON_INTERPRET" in message
