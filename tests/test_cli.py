"""What a user sees of every command: help, one-line errors, exit codes, the last line, tables."""

import argparse
import errno
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compsrt import distributed
from compsrt.cli import (
    ArgumentParser,
    SeveralErrors,
    format_table,
    nearest,
    open_device,
    progress,
    run,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def parser() -> ArgumentParser:
    parser = ArgumentParser(
        "compsrt.train",
        description="Train a network.\nIn one paragraph.\n\nExample:\n\n  train --bits 4",
    )
    parser.add_argument("image", nargs="*", help="pictures")
    model = parser.add_argument_group("model")
    model.add_argument("--bits", type=int, default=4, choices=(2, 3, 4, 8), help="bits of a code")
    model.add_argument("--method", default="compsrt", choices=("compsrt", "2dquant"), help="which")
    model.add_argument("--teacher", metavar="FILE", help="a float model")
    model.add_argument("--fast", action="store_true", help="fewer steps")
    model.add_argument("--pruning", type=float, default=0.0, help="share of weights, 50%% at most")
    parser.add_argument("--secret-knob", help=argparse.SUPPRESS)
    return parser


def error_of(parser: ArgumentParser, arguments: list[str], capsys) -> str:
    """The only line that a refused command line leaves, after checking that it is one."""
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(arguments)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err.rstrip("\n")


# --- the argument parser --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bit", "4"], "unknown option --bit; did you mean --bits?"),
        (["--bit=4"], "unknown option --bit; did you mean --bits?"),
        (["--METHOD", "x"], "unknown option --METHOD; did you mean --method?"),
        (["--xyzzyx"], "unknown option --xyzzyx"),
        (["-q"], "unknown option -q"),
        (["--secret-kno", "x"], "unknown option --secret-kno"),
        (["--bits", "5"], "argument --bits: unknown choice '5'; known: 2, 3, 4, 8"),
        (["--bits", "four"], "argument --bits: invalid int value: 'four'"),
        (
            ["--method", "compsr"],
            "argument --method: unknown choice 'compsr'; did you mean compsrt?",
        ),
        (["--teacher"], "argument --teacher: expected one argument"),
        (["--fast=1"], "argument --fast: ignored explicit argument '1'"),
    ],
)
def test_a_wrong_argument_is_one_line_and_names_the_nearest(parser, arguments, message, capsys):
    assert error_of(parser, arguments, capsys) == f"compsrt.train: error: {message}"


def test_a_mistyped_option_is_named_before_the_one_it_leaves_missing(parser, capsys):
    parser.add_argument("--data", required=True)
    assert error_of(parser, ["--dta", "x"], capsys).endswith(
        "unknown option --dta; did you mean --data?"
    )
    assert error_of(parser, [], capsys).endswith("the following arguments are required: --data")


def test_a_surplus_argument_is_named(capsys):
    parser = ArgumentParser("compsrt.env")
    assert error_of(parser, ["now"], capsys) == "compsrt.env: error: unexpected argument 'now'"


def test_a_lone_separator_is_no_argument():
    assert vars(ArgumentParser("compsrt.env").parse_args(["--"])) == {}


def test_options_are_not_abbreviated(parser, capsys):
    assert "--teacher?" in error_of(parser, ["--teach", "x"], capsys)


def test_what_is_right_is_parsed(parser):
    parsed = parser.parse_args(["--bits=2", "--pruning", "-0.5", "a.png", "--", "--b.png"])
    assert (parsed.image, parsed.bits, parsed.pruning) == (["a.png", "--b.png"], 2, -0.5)
    assert parsed.method == "compsrt"


def test_line_breaks_in_an_argument_stay_in_one_line(parser, capsys):
    assert "'a\\nb'" in error_of(parser, ["--bits", "a\nb"], capsys)


def test_help_shows_defaults_and_keeps_paragraphs(parser):
    text = parser.format_help()
    assert text.startswith("usage: python -m compsrt.train [options] [image ...]\n")
    assert "\nTrain a network. In one paragraph.\n\nExample:\n\n  train --bits 4\n" in text
    assert "bits of a code (default: 4)" in text
    assert "50% at most (default: 0.0)" in text
    assert "None" not in text
    assert "False" not in text
    assert "secret" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_usage_names_what_is_required():
    parser = ArgumentParser("compsrt.export")
    parser.add_argument("model")
    parser.add_argument("--out", required=True, metavar="FILE")
    parser.add_argument("--check", action="store_true")
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("--onnx", action="store_true")
    either.add_argument("--packed", action="store_true")
    assert parser.format_usage() == (
        "usage: python -m compsrt.export [options] --out FILE (--onnx | --packed) model\n"
    )


@given(
    known=st.lists(st.text("abcdefgh-", min_size=3, max_size=10), min_size=1, unique=True),
    data=st.data(),
)
def test_nearest_finds_a_known_name(known, data):
    name = data.draw(st.sampled_from(known))
    assert nearest(name, known) == f"; did you mean {name}?"


def test_nearest_lists_what_is_known_if_nothing_is_close():
    assert nearest("xyz", ["hadamard", "dct"]) == "; known: hadamard, dct"
    assert nearest("xyz", ["hadamard", "dct"], listed=False) == ""
    assert nearest("xyz", []) == ""
    assert nearest("SwinIR", ["edsr", "swinir"]) == "; did you mean swinir?"


# --- run ------------------------------------------------------------------------------------------


def test_the_last_line_of_stdout_is_the_report_as_json(capsys):
    report = {
        "psnr": 38.25,
        "loss": float("nan"),
        "worst": [float("inf"), -float("inf"), 1.0],
        "path": Path("a/b"),
        "step": numpy.int64(7),
        "single": numpy.float32("nan"),
        "tensor": torch.tensor([1, 2]),
        "device": torch.device("cpu"),
        "ok": True,
        "none": None,
        3: {"nested": (1, 2)},
    }

    def main(argv):
        print("words for people")
        return report

    assert run(main, []) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "words for people"
    assert json.loads(lines[-1]) == {
        "psnr": 38.25,
        "loss": None,
        "worst": [None, None, 1.0],
        "path": "a/b",
        "step": 7,
        "single": None,
        "tensor": [1, 2],
        "device": "cpu",
        "ok": True,
        "none": None,
        "3": {"nested": [1, 2]},
    }
    assert list(json.loads(lines[-1]))[:2] == ["psnr", "loss"], "the order is the caller's"


def test_no_report_prints_nothing(capsys):
    assert run(lambda argv: None, []) == 0
    assert capsys.readouterr().out == ""


def test_the_arguments_are_passed_on(capsys):
    assert run(lambda argv: {"argv": list(argv or [])}, ["a", "b"]) == 0
    assert json.loads(capsys.readouterr().out) == {"argv": ["a", "b"]}


FULL = OSError(errno.ENOSPC, "No space left on device (old file kept)", "model.pt")
NO_CPU_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:116] . DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
)
NO_CUDA_MEMORY = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("bits must be 2 to 8, not 9"), "bits must be 2 to 8, not 9"),
        (ValueError("first\n  second\n\nthird"), "first second third"),
        (ValueError(), "ValueError"),
        (ValueError("red \x1b[31m"), "red \\x1b[31m"),
        (FileNotFoundError(2, "No such file or directory", "a.png"), "a.png: no such file or "),
        (FileNotFoundError("no pictures in 'x'"), "no pictures in 'x'"),
        (IsADirectoryError(21, "Is a directory", "out"), "out: is a directory"),
        (NotADirectoryError(20, "Not a directory", "a/b"), "a/b: not a directory"),
        (PermissionError(13, "Permission denied", Path("/x")), "/x: permission denied"),
        (OSError(5, "Input/output error"), "input/output error"),
        (OSError(18, "Invalid cross-device link", "a", None, "b"), "b: invalid cross-device"),
        (FULL, "model.pt: no space left on device (old file kept)"),
        (MemoryError(), "out of memory; smaller tiles, pictures or batches need less"),
        (RuntimeError(NO_CPU_MEMORY), "out of memory (4000000000000 bytes more were asked for)"),
        (torch.OutOfMemoryError(NO_CUDA_MEMORY), "out of memory (20.00 GiB more were asked for)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_of_the_user_is_one_line_and_code_2(error, line, capsys, monkeypatch):
    monkeypatch.delenv("COMPSRT_DEBUG", raising=False)

    def main(argv):
        raise error

    assert run(main, [], name="compsrt.train") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"compsrt.train: error: {line}")
    assert err.count("\n") == 1


def test_several_errors_are_a_line_each(capsys):
    def main(argv):
        raise SeveralErrors(["a.png: empty", "b\n.png: damaged", "2 of 3 failed"])

    assert run(main, [], name="compsrt.upscale") == 2
    assert capsys.readouterr().err.splitlines() == [
        "compsrt.upscale: error: a.png: empty",
        "compsrt.upscale: error: b .png: damaged",
        "compsrt.upscale: error: 2 of 3 failed",
    ]


@pytest.mark.parametrize("error", [RuntimeError("shape"), KeyError("x"), AssertionError()])
def test_an_error_of_ours_keeps_its_traceback(error):
    def main(argv):
        raise error

    with pytest.raises(type(error)):
        run(main, [])


def test_debugging_shows_the_traceback_too(capsys, monkeypatch):
    monkeypatch.setenv("COMPSRT_DEBUG", "1")

    def main(argv):
        raise ValueError("wrong")

    assert run(main, [], name="compsrt.train") == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("compsrt.train: error: wrong\n")


def test_an_interrupt_is_one_line_and_code_130(capsys):
    def main(argv):
        raise KeyboardInterrupt

    assert run(main, [], name="compsrt.train") == 130
    assert capsys.readouterr().err == "compsrt.train: interrupted\n"


def test_warnings_are_one_line_and_only_inside(capsys, monkeypatch):
    monkeypatch.delenv("COMPSRT_DEBUG", raising=False)
    before = warnings.showwarning

    def main(argv):
        warnings.simplefilter("always")
        warnings.warn("no GPU:\n  slow", stacklevel=1)
        return {}

    assert run(main, [], name="compsrt.train") == 0
    assert capsys.readouterr().err == "compsrt.train: warning: no GPU: slow\n"
    assert warnings.showwarning is before


PROGRAM = """
import sys
from compsrt.cli import run
def main(argv):
    for i in range(int(argv[0])):
        print("line", i)
    return {"lines": i}
sys.exit(run(main, sys.argv[1:], name="compsrt.test"))
"""


def in_a_shell(command: str) -> subprocess.CompletedProcess:
    """A command in bash with the program above as $PROGRAM."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHON": sys.executable, "PROGRAM": PROGRAM}
    return subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=120
    )


def test_a_reader_that_goes_away_is_no_error():
    done = in_a_shell('"$PYTHON" -c "$PROGRAM" 100000 | head -n 1; echo ${PIPESTATUS[0]}')
    assert done.stdout.split("\n")[:2] == ["line 0", "141"]
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
@pytest.mark.parametrize("lines", [1, 100000])
def test_stdout_on_a_full_disk_is_one_line(lines):
    done = in_a_shell(f'"$PYTHON" -c "$PROGRAM" {lines} >/dev/full')
    assert done.returncode == 2
    assert done.stderr == "compsrt.test: error: no space left on device\n"


def test_the_name_is_that_of_the_module_that_runs():
    done = in_a_shell('"$PYTHON" -m compsrt.env --hlep')
    assert done.returncode == 2
    assert done.stderr == "compsrt.env: error: unknown option --hlep; did you mean --help?\n"


# --- tables ---------------------------------------------------------------------------------------

ROWS = [
    {"image": "baby", "psnr": 38.254, "pixels": 262144, "ok": True},
    {"image": "butterfly", "psnr": 7.5, "pixels": 65536, "ok": False},
    {"image": "mean", "psnr": 22.877},
]


def test_a_table_aligns_numbers_to_the_right():
    table = format_table(ROWS, ["image", "psnr", "pixels", "ok"], decimals={"psnr": 2})
    assert table.splitlines() == [
        "image       psnr  pixels  ok",
        "---------  -----  ------  ---",
        "baby       38.25  262144  yes",
        "butterfly   7.50   65536  no",
        "mean       22.88       -  -",
    ]


def test_a_table_in_markdown_has_headings_and_escapes_pipes():
    rows = [{"name": "a|b", "n": 1}]
    table = format_table(rows, {"name": "Name", "n": "N"}, markdown=True)
    assert table.splitlines() == ["| Name |   N |", "| ---- | --: |", "| a\\|b |   1 |"]


def test_decimals_may_hold_for_all_columns_and_numbers_may_be_of_any_kind():
    rows = [{"x": numpy.float32(1.0), "y": torch.tensor(2.0)}, {"x": float("nan"), "y": 10}]
    assert format_table(rows, ["x", "y"], decimals=1).splitlines()[2:] == ["1.0   2.0", "nan  10.0"]
    assert format_table(rows, ["x", "y"]).splitlines()[2:] == ["  1   2", "nan  10"]


def test_a_table_without_rows_is_its_head():
    assert format_table([], ["a", "b"]) == "a  b\n-  -"


# --- devices and progress -------------------------------------------------------------------------


def test_cpu_is_always_there():
    assert open_device("cpu") == torch.device("cpu")


def test_auto_takes_cuda_where_there_is_any(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert open_device("auto") == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert open_device("auto") == torch.device("cpu")


def test_cuda_without_a_device_is_an_error_that_says_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ValueError, match=r"cuda asked for but there is none: .* without CUDA"):
        open_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ValueError, match=r"cuda:0 asked for but there is none: .* compsrt\.env"):
        open_device("cuda:0")


def test_a_cuda_index_beyond_the_last_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert open_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"there is only cuda:0 to cuda:1"):
        open_device("cuda:2")


def test_apples_device_is_taken_where_it_is(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="mps asked for but torch sees none here; use cpu or auto"):
        open_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert open_device("mps") == torch.device("mps")
    with pytest.raises(ValueError, match="mps enlarges pictures"):
        distributed.setup("mps")


@pytest.mark.parametrize(
    "name", ["gpu", "", "cpu:0", "cuda:", "cuda:-1", "cuda:x", "meta", "auto:0", "mps:0"]
)
def test_an_unknown_device_is_named(name):
    with pytest.raises(ValueError, match=f"unknown device '{name}'; "):
        open_device(name)


def test_progress_is_silent_without_a_terminal(capsys):
    assert list(progress(range(3), description="steps")) == [0, 1, 2]
    with progress(total=2, unit="image") as bar:
        bar.update(2)
        bar.set_postfix_str("loss 1")
    assert capsys.readouterr() == ("", "")
