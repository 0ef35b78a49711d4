"""The command that scores models: its table, its files, its errors, and several processes."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from compsrt import evaluate
from compsrt.calibration import calibrate
from compsrt.checkpoint import load, save_float, save_packed
from compsrt.cli import run
from compsrt.data import find_pairs, imresize, load_pair, read_image, write_image
from compsrt.inference import enlarge
from compsrt.models.quant_swinir import swap_blocks
from compsrt.models.swinir import SwinIR, SwinIRConfig
from compsrt.quantization import QuantSpec

ROOT = Path(__file__).resolve().parents[1]


def tiny(scale: int) -> SwinIR:
    torch.manual_seed(0)
    return SwinIR(
        SwinIRConfig(
            scale=scale, depths=(2,), embed_dim=12, num_heads=(2,), window_size=4, mlp_hidden=(24,)
        )
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """float.safetensors and packed.safetensors x2, x3.safetensors, and test sets A and B."""
    folder = tmp_path_factory.mktemp("evaluate")
    random = np.random.default_rng(0)
    for name, heights in (("A", (40, 51, 44, 60, 39)), ("B", (48,))):
        (folder / name / "HR").mkdir(parents=True)
        for number, height in enumerate(heights):
            small = random.integers(0, 256, (height // 4, 12, 3), dtype=np.uint8)
            write_image(folder / name / "HR" / f"{number}.png", imresize(small, 4))
    (folder / "empty").mkdir()
    model = tiny(2)
    save_float(model, folder / "float.safetensors")
    save_float(tiny(3), folder / "x3.safetensors")
    quantized = swap_blocks(model, QuantSpec(bits=3))
    calibrate(quantized, torch.rand(1, 3, 16, 16))
    save_packed(quantized, folder / "packed.safetensors")
    return folder


def arguments(folder: Path, *words: str) -> list[str]:
    """Words that name a file or folder of the fixture become its path."""
    return [str(folder / word) if (folder / word).exists() else word for word in words]


def test_a_table_of_models_and_test_sets(folder, tmp_path, capsys):
    words = ["float.safetensors", "packed.safetensors", "--test", "A", "--test", "B"]
    argv = [*arguments(folder, *words), "--output", str(tmp_path), "--save-images"]
    assert run(evaluate.main, argv) == 0
    lines = capsys.readouterr().out.splitlines()
    headings = (
        "model A PSNR SSIM B PSNR SSIM parameters GMACs bits/weight file kB float/file levels"
        " ms/picture"
    )
    assert " ".join(lines[0].split()) == headings
    assert [line.split()[0] for line in lines[2:5]] == ["bicubic", "float", "packed"]
    assert len(lines) == 6
    report = json.loads(lines[-1])
    bicubic, floating, packed = report["rows"]
    assert bicubic.keys() == {"model", "tests", "milliseconds"}
    assert floating["bits_per_weight"] == 32
    assert floating["levels"] is None
    assert packed["levels"] == 8
    assert packed["file_bytes"] == (folder / "packed.safetensors").stat().st_size
    with open(tmp_path / "evaluate.csv", newline="") as file:
        pictures = list(csv.DictReader(file))
    assert [(row["model"], row["test"], row["name"]) for row in pictures[6:12]] == [
        *(("float", "A", str(number)) for number in range(5)),
        ("float", "B", "0"),
    ]
    mean = np.mean([float(row["psnr"]) for row in pictures[6:11]])
    assert floating["tests"]["A"]["psnr"] == pytest.approx(mean)
    written = json.loads((tmp_path / "evaluate.json").read_text())
    assert written["rows"] == report["rows"]
    assert [str(picture["psnr"]) for picture in written["pictures"]] == [
        row["psnr"] for row in pictures
    ]
    assert (tmp_path / "packed" / "A" / "4.png").is_file()


def test_agreement_with_the_first_model(folder, tmp_path, capsys):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes((folder / "packed.safetensors").read_bytes())
    models = arguments(folder, "packed.safetensors", "float.safetensors")
    words = [*models, str(copy), "--test", str(folder / "A"), "--agreement", "--no-bicubic"]
    # With a folder for the pictures and without one.
    for output in ([], ["--output", str(tmp_path / "out"), "--save-images"]):
        assert run(evaluate.main, [*words, *output]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split()[-5:] == ["agree", "dB", "PSNR", "differs", "ms/picture"]
        assert lines[4].split()[-3:-1] == ["inf", "0.0000"]
        packed, floating, same = json.loads(lines[-1])["rows"]
        assert "agreement" not in packed
        assert (same["agreement"], same["psnr_difference"]) == (None, 0)
        assert 10 < floating["agreement"] < 80
    written = json.loads((tmp_path / "out" / "evaluate.json").read_text())["pictures"]
    psnr = {(p["model"], p["name"]): p["psnr"] for p in written}
    differences = [abs(psnr["float", str(n)] - psnr["packed", str(n)]) for n in range(5)]
    assert floating["psnr_difference"] == max(differences)
    assert floating["agreement"] == min(p["agreement"] for p in written if p["model"] == "float")
    with open(tmp_path / "out" / "evaluate.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["agreement"] == ""
    assert float(rows[5]["agreement"]) == written[5]["agreement"]


def test_the_ways_in_which_a_packed_model_computes_agree(folder, capsys):
    words = arguments(folder, "packed.safetensors", "float.safetensors", "--test", "A")
    ways = ["--no-bicubic", "--agreement", "--arithmetic", "auto", "reference", "integer"]
    assert run(evaluate.main, [*words, *ways]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    names = [row["model"] for row in rows]
    assert names == ["packed, auto", "packed, reference", "packed, integer", "float"]
    for row in rows[1:3]:  # a code may round the other way in float32
        assert row["psnr_difference"] < 0.02 and (row["agreement"] or 99) > 45
    assert run(evaluate.main, [*words, "--arithmetic", "floating"]) == 2
    assert "arithmetic: 'floating' is unknown" in capsys.readouterr().err


def test_self_ensemble_and_data_type(folder, tmp_path, capsys):
    words = arguments(folder, "float.safetensors", "--test", "B", "--no-bicubic", "--save-images")
    pictures = {}
    for name, extra in (
        ("plain", []),
        ("ensemble", ["--self-ensemble"]),
        ("half", ["--dtype", "bfloat16"]),
    ):
        assert run(evaluate.main, [*words, *extra, "--output", str(tmp_path / name)]) == 0
        report = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert report["self_ensemble"] == (name == "ensemble")
        assert report["dtype"] == ("bfloat16" if name == "half" else "float32")
        pictures[name] = read_image(tmp_path / name / "float" / "B" / "0.png").astype(int)
    model = load(folder / "float.safetensors")
    lr, _ = load_pair(find_pairs(folder / "B", 2)[0], 2)
    assert np.array_equal(pictures["ensemble"], enlarge(model, lr, self_ensemble=True))
    assert 0 < abs(pictures["half"] - pictures["plain"]).max() < 20


def test_bicubic_alone_needs_only_a_scale(folder, capsys):
    assert run(evaluate.main, arguments(folder, "--test", "A", "--scale", "3")) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["scale"], len(report["rows"])) == (3, 1)


def test_identical_pictures_are_no_number_in_json(tmp_path, capsys):
    (tmp_path / "flat").mkdir()
    write_image(tmp_path / "flat" / "white.png", np.full((40, 40, 3), 255, np.uint8))
    argv = ["--test", str(tmp_path / "flat"), "--scale", "2", "--output", str(tmp_path)]
    assert run(evaluate.main, argv) == 0
    assert "inf" in capsys.readouterr().out
    assert json.loads((tmp_path / "evaluate.json").read_text())["pictures"][0]["psnr"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["float.safetensors", "x3.safetensors", "--test", "A"], "x3.safetensors is x3 but"),
        (["float.safetensors", "--scale", "4", "--test", "A"], "is x2 but --scale is x4"),
        (["--test", "A"], "--scale is needed"),
        (["--test", "A", "--scale", "0"], "scale must be a positive integer"),
        (["--test", "empty", "--scale", "2"], "no pictures in this folder"),
        (["--test", "nowhere", "--scale", "2"], "nowhere: no such folder"),
        (["--test", "A", "--test", "A", "--scale", "2"], "the same one twice"),
        (["nothing.safetensors", "--test", "A"], "nothing.safetensors: no such file"),
        (["A/HR/0.png", "--test", "A"], "damaged, or no checkpoint"),
        (["--test", "A", "--scale", "2", "--device", "cuda:77"], "cuda:77"),
    ],
    ids=" ".join,
)
def test_mistakes_are_one_line_before_any_work(words, message, folder, tmp_path, capsys):
    output = tmp_path / "output"
    argv = [*arguments(folder, *words), "--output", str(output)]
    assert run(evaluate.main, argv, name="compsrt.evaluate") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("compsrt.evaluate: error: ")
    assert err.count("\n") == 1
    assert not output.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--test", "A", "--scale", "2", "--save-images"], "--save-images needs --output"),
        (["--test", "A", "--scale", "2", "--no-bicubic"], "leaves nothing to score"),
        (["model", "--test", "A", "--agreement"], "--agreement needs at least two"),
        (["--tset", "A"], "did you mean --test?"),
        ([], "--test"),
    ],
    ids=" ".join,
)
def test_mistyped_options_are_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        evaluate.main(words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_test_set_of_another_scale_is_named(folder, tmp_path, capsys):
    low = tmp_path / "A" / "LR_bicubic" / "X2"
    low.mkdir(parents=True)
    (tmp_path / "A" / "HR").symlink_to(folder / "A" / "HR")
    for number in range(5):
        write_image(low / f"{number}x2.png", np.zeros((10, 12, 3), np.uint8))
    argv = [str(folder / "float.safetensors"), "--test", str(tmp_path / "A")]
    assert run(evaluate.main, argv) == 2
    assert "0x2.png: 12 x 10 pixels do not fit" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_score_exactly_as_one(folder, tmp_path):
    def command(*program: str, output: str) -> list[str]:
        models = arguments(folder, "float.safetensors", "packed.safetensors", "--test", "A")
        result = subprocess.run(
            [sys.executable, "-m", *program, "compsrt.evaluate", *models, "--device", "cpu",
             "--output", str(tmp_path / output)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()

    def scores(output: str) -> list[dict]:
        pictures = json.loads((tmp_path / output / "evaluate.json").read_text())["pictures"]
        return [{**picture, "milliseconds": None} for picture in pictures]

    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    together = command(*launcher, output="two")
    # One process, of one thread as well: the order of a sum decides the last bit.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    words = arguments(folder, "float.safetensors", "packed.safetensors", "--test", "A")
    report = evaluate.main([*words, "--device", "cpu", "--output", str(tmp_path / "one")])
    torch.set_num_threads(threads)
    assert scores("two") == scores("one")
    assert report is not None
    means = [row["tests"] for row in report["rows"]]
    assert [row["tests"] for row in json.loads(together[-1])["rows"]] == means
    assert len(together) == 6


def test_a_float_model_agrees_with_nothing_else(folder, capsys):
    words = ["float.safetensors", "--test", "B", "--agreement", "--arithmetic", "fold", "integer"]
    assert run(evaluate.main, arguments(folder, *words)) == 2
    assert "--agreement: float computes in one way" in capsys.readouterr().err
    words = ["float.safetensors", "--test", "B", "--arithmetic", "foo"]
    assert run(evaluate.main, arguments(folder, *words)) == 2
    assert "arithmetic: 'foo' is unknown" in capsys.readouterr().err


def test_no_test_picture_is_overwritten(tmp_path, capsys):
    place = tmp_path / "out/bicubic/A"
    place.mkdir(parents=True)
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    write_image(place / "0.png", picture)
    before = (place / "0.png").read_bytes()
    argv = ["--scale", "2", "--test", str(place), "--output", str(tmp_path / "out")]
    assert run(evaluate.main, [*argv, "--save-images"]) == 2
    assert "0.png: it is a test picture, and would be overwritten" in capsys.readouterr().err
    assert (place / "0.png").read_bytes() == before
    assert run(evaluate.main, argv) == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_levels_are_counted_in_any_type(dtype, folder, capsys):
    model = ROOT / "compsrt/assets/sesr_m5_x2_8bit.safetensors"
    argv = [str(model), "--test", str(folder / "B"), "--dtype", dtype]
    assert run(evaluate.main, argv) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["rows"][-1]["levels"] <= 256
