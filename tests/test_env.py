"""The report for bug reports: complete, readable, and there on any machine."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import compsrt
from compsrt import env
from compsrt.cli import run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_overrides(monkeypatch):
    monkeypatch.delenv("COMPSRT_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def report_of(capsys) -> tuple[str, dict]:
    assert run(env.main, []) == 0
    out, err = capsys.readouterr()
    assert err == ""
    *text, last = out.splitlines()
    return "\n".join(text), json.loads(last)


def test_the_report_names_what_matters(capsys):
    text, report = report_of(capsys)
    for name in ("python", "torch", "triton", "numpy", "scipy", "pillow", "safetensors"):
        assert name in report["versions"]
        assert f"\n{name} " in f"\n{text}"
    assert report["versions"]["torch"] == torch.__version__
    assert report["cores"] >= 1
    assert report["torch_threads"] == torch.get_num_threads()
    assert report["kernels"]["cpu"] == "reference"
    assert "kernels on cpu" in text


def test_no_cuda_device_is_no_error(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("PATH", "")
    text, report = report_of(capsys)
    assert report["cuda_devices"] == []
    assert report["driver"] is None
    assert re.search(r"CUDA devices +none", text)


@pytest.mark.parametrize(("major", "is_old"), [(9, False), (7, True)])
def test_a_cuda_device_is_described(major, is_old, capsys, monkeypatch):
    properties = SimpleNamespace(
        name="Some GPU", major=major, minor=0, total_memory=80 * 2**30, multi_processor_count=132
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    text, report = report_of(capsys)
    assert re.search(r"cuda:0 +Some GPU, capability \d\.0, 80\.0 GiB, 132 multiprocessors", text)
    assert report["cuda_devices"][0]["memory_bytes"] == 80 * 2**30
    has_triton = importlib.util.find_spec("triton") is not None
    path = "triton" if has_triton and not is_old else "reference"
    assert report["kernels"]["cuda:0"] == path


def test_a_cuda_device_that_cannot_be_opened_is_reported(capsys, monkeypatch):
    def broken(index):
        raise RuntimeError("the driver is too old")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    text, report = report_of(capsys)
    assert report["cuda_error"] == "the driver is too old"
    assert re.search(r"CUDA error +the driver is too old", text)


def test_a_machine_without_triton_is_reported(capsys, monkeypatch):
    # None in sys.modules: the import fails, and find_spec finds a module without a spec.
    monkeypatch.setitem(sys.modules, "triton", None)
    text, report = report_of(capsys)
    assert report["versions"]["triton"] is None
    assert re.search(r"triton +not installed", text)


def test_a_package_that_cannot_be_imported_is_reported(monkeypatch, tmp_path):
    (tmp_path / "half_installed.py").write_text("raise ImportError('libfoo.so.1 is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    version = env._version("half_installed", "half-installed")
    assert version == "broken (ImportError: libfoo.so.1 is missing)"


@pytest.mark.parametrize(
    ("choice", "interpret", "kind", "path"),
    [
        (None, None, "cpu", "reference"),
        (None, None, "cuda", "triton"),
        ("auto", None, "cuda", "triton"),
        ("", None, "cpu", "reference"),
        ("reference", None, "cuda", "reference"),
        ("triton", "1", "cpu", "triton, interpreted"),
        ("triton", None, "cpu", "none: triton on a CPU needs TRITON_INTERPRET=1"),
        ("tritn", None, "cpu", "unknown COMPSRT_KERNELS 'tritn'; did you mean triton?"),
    ],
)
def test_which_kernels_run_where(choice, interpret, kind, path, monkeypatch):
    if choice is not None:
        monkeypatch.setenv("COMPSRT_KERNELS", choice)
    if interpret is not None:
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
    assert env.kernel_path(kind) == path


def test_without_triton_a_gpu_runs_the_reference(monkeypatch):
    monkeypatch.delenv("COMPSRT_KERNELS", raising=False)
    for kind in ("cuda", "cpu"):
        assert env.kernel_path(kind, has_triton=False) == "reference"
    monkeypatch.setenv("COMPSRT_KERNELS", "triton")
    assert env.kernel_path("cuda", has_triton=False).startswith("none: triton is not installed")


def test_the_version_is_the_same_everywhere():
    declared = re.search(r'(?m)^version = "(.+)"$', (ROOT / "pyproject.toml").read_text())
    assert declared is not None
    assert compsrt.__version__ == declared[1]
