"""The train command: runs, resumes, and ends bad input with one line."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from networks import tiny_swinir, write_pictures

from compsrt import checkpoint, cli, demo, train, trainer
from compsrt.quantization import TRAINED_KINDS
from compsrt.recipes import RECIPES, Recipe

FAST = ["--steps", "2", "--batch", "2", "--patch", "16", "--calibration-count", "2",
        "--calibration-patch", "16", "--validation-count", "1", "--validation-crops", "1",
        "--validate-every", "1"]  # fmt: skip


@pytest.fixture
def material(tmp_path):
    """Weights, training pictures and a test set."""
    checkpoint.save_float(tiny_swinir(), tmp_path / "float.safetensors")
    write_pictures(tmp_path / "train", 4, 160, 160)
    write_pictures(tmp_path / "set", 2)
    return tmp_path


def arguments(folder, *more):
    return ["--weights", str(folder / "float.safetensors"), "--train", str(folder / "train"),
            "--test", str(folder / "set"), "--output", str(folder / "out"), *FAST, *more]  # fmt: skip


def command(capsys, argv):
    """Exit code, last line of stdout as JSON, stderr."""
    try:
        code = cli.run(train.main, argv, name="compsrt.train")
    except SystemExit as exit_:
        code = exit_.code
    out, err = capsys.readouterr()
    return code, json.loads(out.splitlines()[-1]) if code == 0 else None, err


def test_a_grid_of_runs_gives_one_table_and_one_file_each(material, capsys):
    code, report, _ = command(
        capsys,
        arguments(
            material, "--method", "minmax", "compsrt", "--bits", "4", "2", "--pruning", "0", "0.4"
        ),
    )
    assert code == 0
    names = [row["model"] for row in report["rows"]]
    assert names == ["bicubic", "float", *(
        f"{m}-{b}bit{p}" for m in ("minmax", "compsrt") for b in (4, 2) for p in ("", "-pruned40")
    )]  # fmt: skip
    for row in report["rows"][2:]:
        bits = int(row["model"].split("bit")[0][-1])
        assert row["levels"] <= 2**bits
        assert row["tests"]["set"]["psnr"] > 5
        path = material / "out" / row["model"] / "model.safetensors"
        assert path.stat().st_size == row["file_bytes"]
        model = checkpoint.load(path)
        assert model.spec.bits == bits
        assert len(model.card["calibration"]["crops"]) == 2
        assert model.card["source"]["file"] == "float.safetensors"
    saved = json.loads((material / "out" / "results.json").read_text())
    assert len(saved["pictures"]) == 2 * len(report["rows"])


def test_what_is_scored_is_what_the_file_holds(material, capsys):
    from compsrt import data, inference, metrics

    _, report, _ = command(capsys, arguments(material, "--bits", "3"))
    model = checkpoint.load(material / "out/compsrt-3bit/model.safetensors")
    pairs = data.find_pairs(material / "set", 2)
    scores = []
    for pair in pairs:
        lr, hr = data.load_pair(pair, 2)
        scores.append(metrics.psnr(inference.enlarge(model, lr), hr, crop=2))
    assert report["rows"][-1]["tests"]["set"]["psnr"] == pytest.approx(sum(scores) / 2, abs=1e-12)


def test_trained_weights_are_reported_as_what_they_are(material, capsys):
    more = ("--train-weights", "--per-channel", "--picture-weight", "0.5")
    _, report, _ = command(capsys, arguments(material, *more))
    row = report["rows"][-1]
    assert row["model"] == "compsrt-weights-4bit" and row["training"] == "QAT by distillation"
    assert (row["steps"], row["crops"], row["pictures"]) == (2, 4, 3)
    model = checkpoint.load(material / "out/compsrt-weights-4bit/model.safetensors")
    assert model.spec.train_weights == TRAINED_KINDS
    assert model.card["results"]["training"] == "QAT by distillation"


def test_the_same_command_gives_the_same_file(material, capsys):
    files = []
    for _ in range(2):
        command(capsys, arguments(material, "--force"))
        content = (material / "out/compsrt-4bit/model.safetensors").read_bytes()
        files.append(checkpoint.load(material / "out/compsrt-4bit/model.safetensors").state_dict())
        assert content
    for key, value in files[0].items():
        assert torch.equal(value, files[1][key])


def test_a_finished_run_is_not_repeated_by_resume(material, capsys):
    _, first, _ = command(capsys, arguments(material))
    path = material / "out/compsrt-4bit/model.safetensors"
    before = path.stat().st_mtime_ns
    code, second, _ = command(capsys, arguments(material, "--resume"))
    assert code == 0 and path.stat().st_mtime_ns == before
    assert second["rows"][-1]["tests"] == first["rows"][-1]["tests"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_a_usable_file_and_resumes_to_the_same_result(material, number):
    steps = ["--steps", "40", "--save-every", "1"]
    base = [sys.executable, "-m", "compsrt.train"]
    whole = arguments(material, *steps)
    whole[whole.index("--output") + 1] = str(material / "whole")
    subprocess.run(base + whole, check=True, capture_output=True)
    process = subprocess.Popen(
        base + arguments(material, *steps),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = material / "out/compsrt-4bit/metrics.jsonl"
    deadline = time.time() + 120
    while not (log.exists() and '"loss"' in log.read_text()) and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    packed = material / "out/compsrt-4bit/model.safetensors"
    assert process.returncode == 130, err
    assert "interrupted" in err and "Traceback" not in err
    assert checkpoint.load(packed).card["results"]["steps"] < 40
    subprocess.run(base + arguments(material, *steps, "--resume"), check=True, capture_output=True)
    resumed = checkpoint.load(packed).state_dict()
    for key, value in (
        checkpoint.load(material / "whole/compsrt-4bit/model.safetensors").state_dict().items()
    ):
        assert torch.equal(value, resumed[key]), key


def test_float_training_from_a_recipe(material, capsys, monkeypatch):
    tiny = Recipe("tiny", ("float",), tiny_swinir().config, steps=3, batch=2, patch=(16,))
    monkeypatch.setitem(RECIPES, "tiny", tiny)
    argv = ["--recipe", "tiny", "--train", str(material / "train"), "--test", str(material / "set"),
            "--output", str(material / "out"), "--validation-count", "1", "--validation-crops", "1"]  # fmt: skip
    code, report, _ = command(capsys, argv)
    assert code == 0 and report["steps"] == 3 and report["images_per_second"] > 0
    model = checkpoint.load(material / "out/model.safetensors")
    assert model.config == tiny.architecture and model.card["recipe"] == "tiny"


def test_the_demo_runs_on_what_the_wheel_of_scikit_image_holds(capsys, tmp_path):
    pytest.importorskip("skimage")
    argv = ["--method", "dobi", "compsrt", "--bits", "4", "--output", str(tmp_path / "demo"), *FAST]
    code, report, _ = command(capsys, argv)
    assert code == 0
    scores = {row["model"]: row["tests"]["photographs"]["psnr"] for row in report["rows"]}
    assert scores["bicubic"] < scores["compsrt-4bit"] < scores["float"]
    assert not {pair.name for pair in demo.training_pairs()} & {p.name for p in demo.test_pairs()}
    if report.get("picture"):
        assert Path(report["picture"]).stat().st_size > 10_000


def test_the_whole_demo_ends_with_the_rows_of_the_best_recipe():
    grid = train._grid(train._parse([]))
    assert [spec.method for _, spec in grid[:9]] == ["dobi"] * 3 + ["2dquant"] * 3 + ["compsrt"] * 3
    assert not any(spec.average_bits or spec.train_weights for _, spec in grid[:9])
    recipe = RECIPES[demo.RECIPE]
    assert [spec.average_bits for _, spec in grid[9:]] == [*recipe.average_bits]
    assert {options.weight_learning_rate for options, _ in grid[9:]} == {
        recipe.weight_learning_rate
    }
    assert len({train._name(spec) for _, spec in grid}) == 12


@pytest.mark.parametrize(
    ("words", "average"), [([], 4.0), (["--bits", "4"], None), (["--average-bits", "2.5"], 2.5)]
)
def test_bits_given_by_hand_win_over_the_average_of_a_recipe(words, average):
    argv = ["--recipe", "compsrt-best", "--weights", "a", "--train", "b", *words]
    spec = train._specs(train._parse(argv))[0]
    assert spec.average_bits == average
    assert spec.rounding == "output" and spec.convolution_bits == 6


# --- Bad input -------------------------------------------------------------------------------------


def damaged(folder):
    (folder / "float.safetensors").write_bytes(b"no such format")


def packed(folder):
    import compsrt

    quantized = compsrt.quantize(tiny_swinir(), compsrt.QuantSpec(), torch.rand(1, 3, 16, 16))
    checkpoint.save_packed(quantized, folder / "float.safetensors")


def foreign(folder):
    state = {"head.0.weight": torch.zeros(1), "body.0.body.0.weight": torch.zeros(1)}
    safetensors.torch.save_file(state, folder / "float.safetensors")


def pickled(folder):
    torch.save({"params": Recipe("a class")}, folder / "float.safetensors")


def no_training(folder):
    shutil.rmtree(folder / "train")


def no_pictures(folder):
    shutil.rmtree(folder / "train")
    (folder / "train").mkdir()


def truncated(folder):
    path = folder / "train/p0.png"
    path.write_bytes(path.read_bytes()[:200])


def in_use(folder):
    (folder / "out").mkdir()
    (folder / "out/thesis.txt").write_text("mine")


@pytest.mark.parametrize(
    ("spoil", "more", "words"),
    [
        (damaged, [], "float.safetensors"),
        (packed, [], "quantized already"),
        (foreign, [], "EDSR"),
        (pickled, [], "float.safetensors"),
        (no_training, [], "train"),
        (no_pictures, [], "no pictures"),
        (truncated, [], "p0.png"),
        (in_use, [], "--resume"),
        (None, ["--bits", "0"], "bits"),
        (None, ["--bits", "9"], "bits"),
        (None, ["--bits", "four"], "--bits"),
        (None, ["--method", "comprst"], "did you mean compsrt?"),
        (None, ["--bit", "4"], "did you mean --bits?"),
        (None, ["--recipe", "swinir-nano-x3"], "did you mean swinir-nano-x2?"),
        (None, ["--site-transform", "attn=none"], "attention"),
        (None, ["--site-transform", "fc1"], "SITE=TRANSFORM"),
        (None, ["--pruning", "1.5"], "pruning"),
        (None, ["--validation-count", "9"], "train"),
        (None, ["--patch", "4"], "patch"),
        (None, ["--patch", "400"], "400"),
        (None, ["--resume", "--force"], "contradict"),
        (None, ["--device", "cuda:7"], "cuda"),
        (None, ["--method", "float"], "--recipe"),
        (None, ["--compile"], "--method float"),
        (None, ["--test", "nowhere"], "nowhere"),
        (None, ["--weights", "nowhere.pth"], "nowhere.pth"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(material, capsys, spoil, more, words):
    if spoil is not None:
        spoil(material)
    before = {p: p.read_bytes() for p in material.rglob("*") if p.is_file()}
    code, _, err = command(capsys, arguments(material, *more))
    lines = [line for line in err.splitlines() if "warning" not in line]
    assert code == 2, err
    assert len(lines) == 1 and lines[0].startswith("compsrt.train: error: ") and words in lines[0]
    assert before == {p: p.read_bytes() for p in before}, "nothing of the user's was touched"


# --- Resuming ------------------------------------------------------------------------------------


@pytest.fixture
def other_pictures(material):
    write_pictures(material / "others", 4, 168, 160)
    return ["--train", str(material / "others")]


@pytest.mark.parametrize("method", ["compsrt", "dobi"])
def test_a_run_of_other_pictures_or_settings_is_not_taken_up(
    method, material, other_pictures, capsys
):
    run = arguments(material, "--method", method)
    assert command(capsys, run)[0] == 0
    path = material / f"out/{method}-4bit/model.safetensors"
    before = path.read_bytes()
    for more, word in (
        (other_pictures, "pictures was '3 pictures"),
        (["--calibration-count", "3"], "calibration was '2 crops of 16' and is '3 crops of 16'"),
        (["--validation-crops", "2"], "validation was '1 crops of 64"),
        (["--transform", "dct"], "spec was"),
    ):
        code, _, err = command(capsys, [*run, *more, "--resume"])
        assert code == 2 and f"cannot resume, {word}" in err
        assert path.read_bytes() == before
    assert command(capsys, [*run, "--resume"])[0] == 0


def test_a_run_that_starts_anew_leaves_nothing_to_go_on_from(material, capsys):
    run = arguments(material)
    assert command(capsys, run)[0] == 0
    folder = material / "out/compsrt-4bit"
    assert (folder / "state.pt").exists() and (folder / "done.json").exists()
    (folder / ".compsrt-0123456789abcdef.tmp").touch()  # as a kill leaves it
    trainer.start(folder, resume=True)
    assert not list(folder.glob(".*"))
    assert (folder / "state.pt").exists() and not (folder / "done.json").exists()
    trainer.start(folder, resume=False)
    assert not (folder / "state.pt").exists()


@pytest.mark.parametrize("name", ["done.json", "state.pt"])
@pytest.mark.parametrize("damage", ["cut", "of another kind", "without its model"])
def test_what_a_run_would_go_on_from_is_damaged(name, damage, material, capsys):
    run = arguments(material)
    assert command(capsys, run)[0] == 0
    folder = material / "out/compsrt-4bit"
    if damage == "without its model":
        (folder / "model.safetensors").unlink()
        assert command(capsys, [*run, "--resume"])[0] == 0
        assert (folder / "model.safetensors").exists()
        return
    if name == "state.pt":
        (folder / "done.json").unlink()
    content = {"a": 1}
    if damage == "cut":
        (folder / name).write_bytes(b"{")
    elif name == "state.pt":
        torch.save(content, folder / name)
    else:
        (folder / name).write_text(json.dumps(content))
    code, _, err = command(capsys, [*run, "--resume"])
    assert code == 2 and len(err.splitlines()) == 1
    assert f"{name}: " in err and "cannot resume" in err


def test_runs_that_would_share_a_folder(material, capsys):
    run = arguments(material, "--method", "dobi", "--steps", "0")
    code, report, _ = command(capsys, [*run, "--pruning", "0.401", "0.404"])
    assert code == 0
    assert [row["model"] for row in report["rows"]][2:] == [
        "dobi-4bit-pruned40.1",
        "dobi-4bit-pruned40.4",
    ]
    code, _, err = command(capsys, [*run, "--bits", "4", "4", "--force"])
    assert code == 2 and "dobi-4bit: the same run twice" in err


def test_test_sets_of_one_name_are_told_apart(material, capsys):
    shutil.copytree(material / "set", material / "other/set")
    code, report, _ = command(
        capsys, arguments(material, "--method", "dobi", "--test", str(material / "other/set"))
    )
    assert code == 0
    assert len(report["rows"][0]["tests"]) == 2


def test_no_picture_of_overlapping_folders_is_trained_on_and_held_out(material):
    pairs = train._pairs([str(material / "train"), str(material)], 2)
    paths = [pair.hr for pair in pairs]
    assert len(set(paths)) == len(paths) and len(paths) == 6


def test_a_mistake_leaves_no_folder_that_seems_in_use(material, capsys):
    code, _, _ = command(capsys, arguments(material, "--weight-groups", "7"))
    assert code == 2
    assert command(capsys, arguments(material, "--method", "dobi"))[0] == 0
