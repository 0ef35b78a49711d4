"""The command that exports: what it writes and reports, and what it refuses in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import tiny_sesr, tiny_swinir

import compsrt
from compsrt import export
from compsrt.checkpoint import save_float, save_packed
from compsrt.cli import run
from compsrt.quantization import QuantSpec

NEEDED = ("ai_edge_litert", "flatbuffers", "onnx", "onnxscript")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Models: int8, int4 and float SESR, x2 and x4, and a SwinIR; the folder is the current one."""
    monkeypatch.chdir(tmp_path)
    network, photos = tiny_sesr(), torch.rand(1, 3, 16, 16)
    for bits in (4, 8):
        quantized = compsrt.quantize(network, QuantSpec(bits=bits, method="minmax"), photos)
        save_packed(quantized, f"int{bits}.safetensors")
    save_float(network, "float.safetensors")
    save_float(tiny_sesr(scale=4), "x4.safetensors")
    save_float(tiny_swinir(), "swinir.safetensors")
    return tmp_path


@pytest.fixture
def extra() -> None:
    for name in NEEDED:
        pytest.importorskip(name, reason="needs the extra 'export'")


def exported(*words: str) -> int:
    return run(export.main, list(words), name="compsrt.export")


def test_both_files_and_a_report(folder, extra, capsys):
    words = ["int8.safetensors", "--tflite", "a.tflite", "--onnx", "a.onnx"]
    assert exported(*words) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {key: report[key] for key in ("network", "scale", "weight_bits", "model")} == {
        "network": "SESR",
        "scale": 2,
        "weight_bits": 8,
        "model": "int8.safetensors",
    }
    assert report["picture"].startswith("luma")
    tflite, onnx = report["files"]
    for file, path in ((tflite, "a.tflite"), (onnx, "a.onnx")):
        assert file["path"] == path
        assert file["bytes"] == (folder / path).stat().st_size
        assert file["weights"] == "int8"
    unit = float(torch.tensor(1 / 255))
    assert tflite["inputs"] == [
        {
            "name": "luma",
            "type": "int8",
            "shape": [1, 1080, 1920, 1],
            "scale": unit,
            "zero_point": -128,
        }
    ]
    assert tflite["outputs"][0]["shape"] == [1, 2160, 3840, 1]
    assert onnx["outputs"][0]["shape"] == ["batch", 1, "2*height", "2*width"]
    assert onnx["outputs"][0]["scale"] == unit

    before = [(folder / name).read_bytes() for name in ("a.tflite", "a.onnx")]
    assert exported(*words) == 2
    assert "a.tflite: exists; --force overwrites" in capsys.readouterr().err
    assert exported(*words, "--force", "--height", "5", "--width", "7") == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["files"][0]["inputs"][0]["shape"] == [1, 5, 7, 1]
    after = [(folder / name).read_bytes() for name in ("a.tflite", "a.onnx")]
    assert before[0] != after[0]
    assert before[1] == after[1], "the same model gives the same bytes"


def test_x4_takes_1080p_too(folder, extra, capsys):
    assert exported("x4.safetensors", "--tflite", "a.tflite") == 0
    file = json.loads(capsys.readouterr().out.splitlines()[-1])["files"][0]
    assert file["inputs"][0]["shape"] == [1, 1080, 1920, 1]
    assert file["inputs"][0]["type"] == file["weights"] == "float32"


@pytest.mark.slow
@pytest.mark.parametrize("model", ["float", "int4", "swinir"])
def test_what_is_not_8_bits_is_traced(model, folder, extra, capsys):
    assert exported(f"{model}.safetensors", "--onnx", "a.onnx") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert len(out.splitlines()) == 2
    file = json.loads(out.splitlines()[-1])["files"][0]
    assert file["weights"] == "float32"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["int8.safetensors"], "nothing to write: give --tflite FILE, --onnx FILE or both"),
        (["nothing", "--onnx", "a"], "nothing: no such file"),
        (
            ["int8.safetensors", "--tflite", "a", "--height", "9"],
            "--height and --width go together",
        ),
        (
            ["int8.safetensors", "--tflite", "a", "--height", "0", "--width", "9"],
            "--height 0 --width 9: at least 1 pixel each",
        ),
        (
            ["int8.safetensors", "--onnx", "a", "--height", "9", "--width", "9"],
            "ONNX files take any size",
        ),
        (["int8.safetensors", "--onnx", "a", "--tflite", "a"], "a: would be written twice"),
        (["int8.safetensors", "--onnx", "int8.safetensors", "--force"], "overwrite the model"),
        (["int8.safetensors", "--onnx", "no/a.onnx"], "no: no such folder, to write a.onnx to"),
        (["int8.safetensors", "--onnx", "."], "a folder; name a file"),
        (["int4.safetensors", "--tflite", "a"], "4-bit weights and 4-bit activations"),
        (
            ["swinir.safetensors", "--tflite", "a"],
            "--tflite of swinir.safetensors: SwinIR has no TFLite form, only SESR has",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_and_nothing_is_written(words, message, folder, request, capsys):
    if words[0].startswith("int4"):
        request.getfixturevalue("extra")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    try:
        code = exported(*words)
    except SystemExit as stop:  # argparse
        code = stop.code
    assert code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("model", "kind", "missing", "named"),
    [
        ("int8", "tflite", "ai_edge_litert", "ai-edge-litert"),
        ("int8", "onnx", "onnx", "onnx"),
        ("float", "onnx", "onnx", "onnx"),
    ],
)
def test_a_missing_package_is_one_line(model, kind, missing, named, folder, capsys, monkeypatch):
    for module in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, missing, None)  # every import of that name fails
    assert exported(f"{model}.safetensors", f"--{kind}", "a") == 2
    err = capsys.readouterr().err
    assert f"{named} is not installed; it comes with the extra 'export'" in err
    assert err.count("\n") == 1
    assert not (folder / "a").exists()


def test_help_needs_no_package():
    names = (*NEEDED, "torch", "numpy")
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({names!r}))\n"
        "import runpy; sys.argv[1:] = ['--help']\n"
        "runpy.run_module('compsrt.export', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: python -m compsrt.export [options] MODEL\n")
