"""Importing the package is cheap and silent: no CUDA, no Triton, none of the extras."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("triton", "skimage", "matplotlib", "tensorboard", "onnx", "ai_edge_litert")


def python(program: str) -> str:
    """What a fresh interpreter prints on stdout and stderr while it runs a program to its end."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:compsrt", "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_import_prints_nothing():
    assert python("import compsrt") == ""


def test_import_leaves_cuda_alone():
    program = "import compsrt, torch; print(torch.cuda.is_initialized())"
    assert python(program).split() == ["False"]


@pytest.mark.parametrize("module", ["compsrt", "compsrt.cli", "compsrt.files"])
def test_import_loads_nothing_heavy(module):
    program = f"import sys, {module}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    assert python(program).split() == []


def test_the_reference_needs_no_triton():
    # A None in sys.modules makes every import of that name fail, as on a machine without Triton.
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, compsrt, compsrt.kernels.reference\n"
        "print(torch.cuda.is_initialized())"
    )
    assert python(program).split() == ["False"]


def test_files_needs_nothing_of_the_package():
    program = (
        "import runpy, sys\n"
        f"runpy.run_path({str(ROOT / 'compsrt' / 'files.py')!r})\n"
        "print(*[m for m in sys.modules if m.partition('.')[0] in ('compsrt', 'torch', 'numpy')])"
    )
    assert python(program).split() == []
