"""`python -m compsrt.statistics` as a user sees it: files in, tables and pages out, bad input."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from compsrt import scoring, statistics, transforms
from compsrt.analysis import dumps, measures, paired, results, tensors
from compsrt.calibration import calibrate
from compsrt.checkpoint import load, save_float, save_packed
from compsrt.cli import run
from compsrt.models.quant_swinir import swap_blocks
from compsrt.models.swinir import SwinIR, SwinIRConfig
from compsrt.quantization import QuantSpec

TENSORS = 2 * 14  # two blocks, each of 16 sites of which three share their input
FIRST = "layers.0.residual_group.blocks.0"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = SwinIRConfig(scale=2, depths=(2,), embed_dim=12, num_heads=(2,), mlp_hidden=(24,))
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_float(SwinIR(config), path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(2):
        noise = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((80, 64), Image.Resampling.BICUBIC).save(
            folder / f"{seed}.png"
        )
    return folder


@pytest.fixture(scope="module")
def source(weights, pictures) -> list[str]:
    """Arguments for the small network and its pictures."""
    arguments = ["--weights", weights, "--pictures", pictures, "--calibration-count", 2]
    return [str(word) for word in (*arguments, "--calibration-patch", 16, "--values", 3000)]


@pytest.fixture(scope="module")
def dump(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dump")
    statistics.main(["dump", *source, "--output", str(folder)])
    return folder / "tensors.safetensors"


def write_csv(path: Path, rows: list[dict]) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_csv(path: Path) -> list[dict]:
    return list(csv.DictReader(path.read_text().splitlines()))


def scores_of(
    model: str, shift: float = 0.0, sets=(("Set5", 5), ("B100", 40)), **more
) -> list[dict]:
    rows = []
    for name, count in sets:
        random = np.random.default_rng(count)
        base, scatter = random.normal(30, 3, count), random.normal(0, 0.05, count)
        for i in range(count):
            psnr = base[i] + (shift + scatter[i] if shift else 0)
            rows.append(
                {
                    "model": model,
                    "test": name,
                    "name": f"{i}",
                    "psnr": psnr,
                    "ssim": psnr / 40,
                    **more,
                }
            )
    return rows


def refusal(arguments: list, capsys) -> str:
    """The one line that a refused command leaves on stderr, with exit code 2."""
    try:
        code = run(statistics.main, [str(word) for word in arguments], name="compsrt.statistics")
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1, err
    assert "Traceback" not in out + err
    return err.rstrip("\n").partition("error: ")[2]


# --- tensors from files ---------------------------------------------------------------------------


def test_a_dump_holds_what_the_model_shows(source, dump, weights):
    with safe_open(dump, framework="pt") as file:
        names = set(file.keys())
        assert len(names) == TENSORS * (1 + len(statistics.TRANSFORMS))
        before = file.get_tensor(f"{FIRST}.fc1.weight.before")
        assert torch.equal(before, load(weights).layers[0].blocks[0].mlp.fc1.weight)
        after = file.get_tensor(f"{FIRST}.fc1.weight.hadamard")
        torch.testing.assert_close(after, before @ transforms.hadamard(12).float())
    listed = json.loads((dump.parent / "dump.json").read_text())
    assert len(listed["dump"]) == TENSORS
    assert listed["source"]["pictures"] == ["0", "1"]


@pytest.mark.parametrize("command", ["normality", "range", "band", "error"])
def test_a_dump_gives_the_figures_of_its_model(command, source, dump, tmp_path):
    few = ["--bits", "3", "--transforms", "hadamard", "--seeds", "1"] if command == "error" else []
    reports = []
    for arguments in (source, ["--tensors", str(dump), "--values", "3000"]):
        folder = tmp_path / str(len(reports))
        statistics.main([command, *arguments, *few, "--output", str(folder)])
        reports.append(json.loads((folder / f"{command}.json").read_text()))
    first, second = (report[command] for report in reports)
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            if isinstance(value, float):
                assert b[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
            else:
                assert b[key] == value, key


def published_layout(folder: Path, operands: list[tensors.Operand]) -> None:
    """What the published code dumps: every axis padded with zeros to a power of two."""
    for number, operand in enumerate(operands, start=1):
        whole = operand.rows.reshape(operand.shape)
        sizes = [transforms.next_power_of_two(n) for n in operand.shape]
        padded = torch.zeros(sizes)
        padded[tuple(slice(n) for n in operand.shape)] = whole
        after = padded @ transforms.hadamard(sizes[-1]).float()
        torch.save(whole, folder / f"{number}_{operand.kind}_prehad.pt")
        torch.save(after, folder / f"{number}_{operand.kind}_posthad.pt")


@pytest.fixture(scope="module")
def published(weights, tmp_path_factory) -> tuple[Path, list[tensors.Operand]]:
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    operands = tensors.observe(
        load(weights), torch.rand(3, 3, 16, 16), ("hadamard-padded",), values=0
    )
    published_layout(folder, operands)
    return folder, operands


def test_the_published_layout_comes_back_without_its_padding(published):
    folder, operands = published
    found = list(dumps.read_pairs(folder, "hadamard", values=0))
    assert [pair.site for pair in found[:2]] == ["1_weight", "2_activation"]
    assert len(found) == len(operands) == TENSORS
    for pair, operand in zip(found, operands, strict=True):
        expected = operand.pair("hadamard-padded")
        assert (pair.kind, pair.transform) == (operand.kind, "published")
        np.testing.assert_array_equal(pair.before, expected.before)
        np.testing.assert_allclose(pair.after, expected.after, atol=1e-5)
        assert pair.before_ends == expected.before_ends
        assert pair.after_ends == pytest.approx(expected.after_ends, abs=1e-5)
        assert (pair.count, pair.count_after) == (expected.count, expected.count_after)
        assert pair.padding == expected.padding
        band = measures.band(pair, 0.05, counting="published")
        whole = torch.load(folder / f"{pair.site}_posthad.pt", weights_only=True)
        share = (whole.abs() <= 0.05).double().mean().item()
        assert band["absolute_after"] == pytest.approx(share, abs=1e-12)


def test_the_published_counting_turns_padding_into_evidence(published, capsys):
    folder, _ = published
    arguments = ["band", "--tensors", str(folder), "--values", "0", "--eps", "0.01"]
    real, counted = (
        statistics.main([*arguments, "--counting", counting]) for counting in ("real", "published")
    )
    after = [report["tests"][0]["after"] for report in (real, counted)]
    assert after[1] > after[0] + 0.01
    assert "zeros of that padding count" in capsys.readouterr().out


def test_the_published_layout_is_analysed_by_every_command(published, capsys):
    folder, _ = published
    for command in ("normality", "range", "error"):
        report = statistics.main([command, "--tensors", str(folder)])
        assert report["tensors"] == TENSORS
        assert "activation (" in capsys.readouterr().out or command == "error"


def test_missing_halves_mismatched_shapes_and_pickles_are_refused(published, tmp_path, capsys):
    def attempt(*wrong: torch.Tensor) -> str:
        for old in tmp_path.glob("*.pt"):
            old.unlink()
        for name, tensor in zip(("pre", "post"), wrong, strict=False):
            torch.save(tensor, tmp_path / f"1_weight_{name}had.pt")
        return refusal(["range", "--tensors", tmp_path], capsys)

    assert "no tensors in this folder" in attempt()
    assert attempt(torch.rand(3, 4)).endswith("1_weight_posthad.pt is missing, half of a pair")
    for shape in ((3, 5), (2, 4), (4,), (3, 4, 1)):
        message = attempt(torch.rand(3, 4), torch.rand(shape))
        assert str(shape) in message
        assert "(3, 4), padded with zeros to powers of two" in message
    # Larger by rows that hold something: not the padding of this tensor.
    assert "padded with zeros" in attempt(torch.rand(3, 4), torch.rand(4, 4))
    assert "1 of 12 values are NaN or infinite" in attempt(
        torch.rand(3, 4).index_fill(1, torch.tensor(0), 0).log().nan_to_num(neginf=0)
        .index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(math.nan)),
        torch.rand(3, 4),
    )  # fmt: skip
    assert "it holds a dict, not a tensor" in attempt({"a": torch.rand(2)}, torch.rand(3, 4))
    torch.save(torch.rand(3, 4), tmp_path / "1_weight_posthad.pt")
    (tmp_path / "1_weight_prehad.pt").write_bytes(b"not a tensor")
    assert "no tensor can be loaded" in refusal(["range", "--tensors", tmp_path], capsys)


def test_wrong_dumps_are_refused(dump, weights, tmp_path, capsys):
    assert "no such dump or folder" in refusal(["range", "--tensors", tmp_path / "a"], capsys)
    assert "no dump of tensors" in refusal(["range", "--tensors", weights], capsys)
    (tmp_path / "cut").write_bytes(dump.read_bytes()[:100])
    assert "not a safetensors file" in refusal(["range", "--tensors", tmp_path / "cut"], capsys)

    def changed(name: str, tensor: torch.Tensor | None) -> str:
        with safe_open(dump, framework="pt") as file:
            kept = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        if tensor is None:
            del kept[name]
        else:
            kept[name] = tensor
        save_file(kept, tmp_path / "changed", metadata)
        return refusal(["range", "--tensors", tmp_path / "changed"], capsys)

    name = f"{FIRST}.fc1.weight"
    assert "they must be the same rows" in changed(f"{name}.hadamard", torch.rand(3, 12))
    assert "not of (24, 12)" in changed(f"{name}.before", torch.rand(24, 7))
    assert f"{name}.before: 1 of 1 values are NaN" in changed(
        f"{name}.before", torch.tensor([math.nan])
    )
    message = changed(f"{name}.hadamard", None)
    assert f"it holds no {name}.hadamard" in message
    assert "did you mean" in message


# --- the measures from a model --------------------------------------------------------------------


def test_range_of_the_small_network(source, tmp_path, capsys):
    report = statistics.main(["range", *source, "--output", str(tmp_path / "new" / "folder")])
    out = capsys.readouterr().out
    assert f"{TENSORS} tensors (q, k and v share their input: it is one)" in out
    assert (
        "Left as they are by hadamard, and so no part of this: 6 tensors (query, key, value)" in out
    )
    assert report["tensors"] == TENSORS - 6
    rows = read_csv(tmp_path / "new" / "folder" / "range.csv")
    deltas = [float(row["range_delta"]) for row in rows]
    test = next(t for t in report["tests"] if (t["measure"], t["scope"]) == ("range", "all"))
    assert test["p"] == scipy.stats.wilcoxon(deltas, alternative="greater").pvalue
    assert test["median"] == pytest.approx(np.median(deltas))
    kinds = [row["kind"] for row in rows]
    assert (kinds.count("weight"), kinds.count("activation")) == (12, 10)
    tests = read_csv(tmp_path / "new" / "folder" / "range_tests.csv")
    known = [float(test["p"]) if test["p"] else None for test in tests]
    assert [float(t["p_holm"]) if t["p_holm"] else None for t in tests] == pytest.approx(
        paired.holm(known)
    )
    by_site = read_csv(tmp_path / "new" / "folder" / "range_tests_by_site.csv")
    assert {test["scope"] for test in by_site} >= {"qkv.input", "fc1.weight", "attention"}


def test_error_of_the_small_network(source, tmp_path, capsys):
    report = statistics.main(
        ["error", *source, "--bits", "2", "8", "--seeds", "2", "--output", str(tmp_path)]
    )
    out = capsys.readouterr().out
    assert "hadamard leaves 6 tensors as they are" in out
    assert "hadamard-padded spends more codes (8 for 6, 16 for 12, 32 for 24)" in out
    assert set(report["gain"]) == {f"{t}, {b} bits" for t in statistics.TRANSFORMS for b in (2, 8)}
    rows = read_csv(tmp_path / "error.csv")
    assert len(rows) == TENSORS * 2 * (1 + 4 + 2)
    assert {row["seed"] for row in rows if row["transform"] == "random"} == {"0", "1"}
    none = [float(row["snr"]) for row in rows if (row["transform"], row["bits"]) == ("none", "8")]
    assert min(none) > 25
    found = read_csv(tmp_path / "error_correlations.csv")
    assert {row["scope"] for row in found} == {"all", "weight", "activation"}


def test_the_same_seed_gives_the_same_files(source, tmp_path, capsys):
    texts = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        statistics.main(
            ["normality", *source, "--seed", str(seed), "--output", str(tmp_path / name)]
        )
        texts.append((tmp_path / name / "normality.csv").read_text())
    assert texts[0] == texts[1] != texts[2]


def test_the_defaults_are_the_packaged_model_and_photographs(capsys):
    pytest.importorskip("skimage")
    small = ["--calibration-count", "1", "--calibration-patch", "8", "--values", "2000"]
    report = statistics.main(["range", *small])
    assert report["source"]["weights"].name == "swinir_nano_x2.safetensors"
    assert not {"coffee", "chelsea"} & set(report["source"]["pictures"])


def test_what_is_written_out_for_a_quick_help_is_what_holds():
    fixed = tuple(name for name in transforms.TRANSFORMS if name not in ("none", "learned"))
    assert fixed == statistics.TRANSFORMS
    known = statistics._parser().parse_args(["normality"])
    assert known.shapiro_values == measures.SHAPIRO_VALUES
    assert (known.values, known.resamples) == (tensors.VALUES, paired.RESAMPLES)
    assert statistics._parser().parse_args(["band"]).counting in measures.COUNTINGS


def test_help_needs_no_torch_and_hides_no_module_of_the_standard_library():
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from compsrt.statistics import main\n"
        "import statistics; assert statistics.mean([1, 3]) == 2\n"
        "try: main(['range', '--help'])\n"
        "except SystemExit: pass"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "usage: python -m compsrt.statistics range" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["range", "--weights", "missing.pth"], "missing.pth: no such file"),
        (["range", "--pictures", "missing"], "missing: no such folder"),
        (["range", "--tensors", "a", "--weights", "b"], "--weights: it cannot be combined"),
        (["band", "--eps", "0"], "--eps 0.0: it must be positive"),
        (["band", "--counting", "published"], "needs --transform hadamard-padded"),
        (["range", "--figure", "page.pdf"], "give it the suffix .png"),
        (["range", "--figure", "no/such/page.png"], "no folder no/such"),
        (["dump"], "required: --output"),
        (["rang"], "did you mean range?"),
        (["range", "--transform", "none"], "unknown choice 'none'"),
        (["range", "--calibration-count", "0"], "0 is not at least 1"),
        (["normality", "--shapiro-values", "6000"], "6000 is not at least 8 and at most 5000"),
        (["error", "--bits", "9"], "unknown choice '9'"),
        (["results", "missing.csv"], "missing.csv"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, capsys):
    assert message in refusal(arguments, capsys)


@pytest.mark.parametrize("arguments", [["range", "--seed", "x"], ["range", "--sed", "1"], ["rang"]])
def test_errors_of_subcommands_begin_with_the_command(arguments, capsys):
    with pytest.raises(SystemExit):
        statistics.main(arguments)
    assert capsys.readouterr().err.startswith("compsrt.statistics: error: ")


def test_an_empty_folder_and_a_quantized_model_are_refused(source, tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    assert "no pictures" in refusal(["range", "--pictures", tmp_path / "pictures"], capsys)
    (tmp_path / "tensors").mkdir()
    assert "no tensors" in refusal(["range", "--tensors", tmp_path / "tensors"], capsys)
    too_large = [*source[:-1], "3000", "--calibration-patch", "999"]
    assert "larger than every LR picture" in refusal(["range", *too_large], capsys)
    packed = tmp_path / "packed.safetensors"
    quantized = swap_blocks(load(source[1]), QuantSpec(bits=4))
    calibrate(quantized, torch.rand(1, 3, 16, 16))
    save_packed(quantized, packed)
    assert "start from the float model" in refusal(
        ["range", "--weights", packed, *source[2:]], capsys
    )


# --- results --------------------------------------------------------------------------------------


def test_a_better_method_is_found_per_set_and_metric(tmp_path, capsys):
    a, b = scores_of("compsrt", 0.1), scores_of("dobi")
    path = write_csv(tmp_path / "evaluate.csv", a + b)
    report = statistics.main(["results", str(path), "--output", str(tmp_path / "out")])
    tests = {(test["set"], test["metric"]): test for test in report["tests"]}
    assert list(tests) == [("Set5", "psnr"), ("Set5", "ssim"), ("B100", "psnr"), ("B100", "ssim")]
    test = tests["B100", "psnr"]
    d = [x["psnr"] - y["psnr"] for x, y in zip(a[5:], b[5:], strict=True)]
    reference = scipy.stats.wilcoxon(np.round(d, 10), alternative="greater")
    assert test["p"] == reference.pvalue
    assert test["mean_low"] < 0.1 < test["mean_high"]
    assert test["n"] == 40
    assert [t["p_holm"] for t in tests.values()] == paired.holm([t["p"] for t in tests.values()])
    assert tests["Set5", "psnr"]["least_p"] == 1 / 32
    assert (
        "Too few pairs for a small p, before any correction: Set5 (n = 5) below 0.0312"
        in capsys.readouterr().out
    )
    assert len(read_csv(tmp_path / "out" / "results.csv")) == 45
    swapped = statistics.main(["results", str(path), "--method", "dobi"])
    assert all(test["p"] > 0.9 for test in swapped["tests"])


def test_methods_of_equal_quality_are_not_told_apart(tmp_path, capsys):
    rows = scores_of("b")
    noise = np.random.default_rng(0).normal(0, 0.1, len(rows))
    shifted = [
        row | {"model": "a", "psnr": row["psnr"] + x, "ssim": row["ssim"] - x / 50}
        for row, x in zip(rows, noise, strict=True)
    ]
    report = statistics.main(["results", str(write_csv(tmp_path / "r.csv", shifted + rows))])
    assert all(test["p_holm"] > 0.05 for test in report["tests"])


def test_seeds_are_averaged_and_add_no_pairs(tmp_path, capsys):
    files = [
        write_csv(tmp_path / f"{seed}.csv", scores_of("a", 0.1 + seed, seed=seed))
        for seed in range(3)
    ]
    files.append(write_csv(tmp_path / "b.csv", scores_of("b")))
    report = statistics.main(["results", *map(str, files)])
    assert [test["n"] for test in report["tests"]] == [5, 5, 40, 40]
    assert report["tests"][2]["mean"] == pytest.approx(1.1, abs=0.05)
    by_pattern = [
        write_csv(tmp_path / f"p{seed}.csv", scores_of(f"a-{seed}", 0.1 + seed))
        for seed in range(3)
    ]
    again = statistics.main(
        ["results", *map(str, by_pattern), str(files[-1]), "--method", "a-*", "--baseline", "b"]
    )
    assert again["tests"][2]["mean"] == pytest.approx(report["tests"][2]["mean"])


def test_what_evaluate_writes_is_read_as_csv_and_as_json(tmp_path, capsys):
    rows = [row | {"milliseconds": 3.0} for row in scores_of("a", 0.1) + scores_of("b")]
    scoring.write(
        tmp_path, "evaluate", {"scale": 2, "rows": [{"model": "a"}, {"model": "b"}]}, rows
    )
    first, second = (
        statistics.main(["results", str(tmp_path / f"evaluate.{kind}")]) for kind in ("csv", "json")
    )
    assert first["tests"] == second["tests"]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    assert statistics.main(["results", str(tmp_path / "list.json")])["tests"] == first["tests"]


def test_files_without_a_model_column_are_named_by_their_files(tmp_path, capsys):
    for name, shift in (("ours", 0.1), ("theirs", 0.0)):
        rows = [
            {"Dataset": r["test"], "Image": r["name"], "PSNR": r["psnr"]}
            for r in scores_of("", shift)
        ]
        write_csv(tmp_path / f"{name}.csv", rows)
    report = statistics.main(["results", str(tmp_path / "ours.csv"), str(tmp_path / "theirs.csv")])
    assert (report["method"], report["baseline"]) == ("ours", "theirs")
    assert [test["metric"] for test in report["tests"]] == ["psnr", "psnr"]


def test_five_averages_cannot_give_a_small_p(tmp_path, capsys):
    """x4 at 3 bits as published, CompSRT against CondiQuant: equal differences and all."""
    sets = ("Set5", "Set14", "B100", "Urban100", "Manga109")
    a, b = (32.31, 28.69, 27.64, 26.27, 30.60), (31.62, 28.20, 27.31, 25.39, 29.29)
    tied = (31.62 + 0.5, 28.20 + 0.5, 27.31 + 0.5, 25.39 + 0.5, 29.29 + 0.5)
    for better in (a, tied):
        rows = [
            {"model": model, "set": name, "psnr": f"{value:.2f}"}
            for model, values in (("CompSRT", better), ("CondiQuant", b))
            for name, value in zip(sets, values, strict=True)
        ]
        report = statistics.main(["results", str(write_csv(tmp_path / "t.csv", rows))])
        (test,) = report["tests"]
        assert (test["set"], test["n"], test["p"]) == (results.AVERAGES, 5, 1 / 32)
        assert "n = 5 cannot give p < 1/32 = 0.0312" in capsys.readouterr().out
    # What the normal distribution makes of five equal differences is what must not be reported.
    assert scipy.stats.wilcoxon([0.5] * 5, alternative="greater", method="approx").pvalue < 1 / 32


def test_conditions_are_compared_within(tmp_path, capsys):
    rows = [
        r
        for scale in (2, 4)
        for shift, m in ((0.1, "a"), (0, "b"))
        for r in scores_of(m, shift, scale=scale)
    ]
    path = str(write_csv(tmp_path / "r.csv", rows))
    assert "--within" in refusal(["results", path], capsys)
    page = tmp_path / "page.png"
    report = statistics.main(["results", path, "--within", "scale", "--figure", str(page)])
    assert page.exists()
    assert [(test["scale"], test["set"]) for test in report["tests"][::2]] == [
        ("2", "Set5"), ("2", "B100"), ("4", "Set5"), ("4", "B100"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (scores_of("a", 1) + scores_of("b")[1:], [], "Set5 0: a has a result, b has none"),
        (scores_of("a", 1)[1:] + scores_of("b"), [], "Set5 0: b has a result, a has none"),
        (scores_of("a"), [], "say which two of these to compare: a"),
        (scores_of("a") + scores_of("b") + scores_of("c"), [], "to compare: a, b, c"),
        (
            scores_of("a") + scores_of("b"),
            ["--method", "c"],
            "no rows of the model 'c'; known: a, b",
        ),
        (scores_of("a") + scores_of("b"), ["--within", "scal"], "no column 'scal'"),
        (scores_of("a") * 2 + scores_of("b"), [], "a has two results for Set5 0"),
        ([{"model": "a", "test": "s", "name": "n", "psnr": "inf"}], [], "psnr is inf; only finite"),
        ([{"model": "a", "test": "s", "name": "n", "ssim": "high"}], [], "row 1: ssim is 'high'"),
        ([{"model": "a", "name": "n", "psnr": "1"}], [], "no column for the test set"),
        ([{"model": "a", "test": "s", "name": "n", "mse": "1"}], [], "neither psnr nor ssim"),
    ],
)
def test_results_that_cannot_be_compared_are_one_line(rows, arguments, message, tmp_path, capsys):
    path = write_csv(tmp_path / "r.csv", rows)
    assert message in refusal(["results", path, *arguments], capsys)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.csv", b"", "no rows"),
        ("r.csv", b"model,test,name,psnr\n", "no rows"),
        ("r.csv", b"\xff\xfe\x00", "not a text file"),
        ("r.json", b"{", "not JSON"),
        ("r.json", b'{"rows": []}', "it must be a list of objects"),
        ("r.json", b"[1, 2]", "it must be a list of objects"),
    ],
)
def test_files_that_hold_no_results_are_one_line(name, content, message, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    assert message in refusal(["results", tmp_path / name], capsys)


# --- pages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["normality", "range", "band", "error", "results"])
def test_every_page_is_1200_pixels_wide(command, source, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    page = tmp_path / "page.png"
    arguments = source
    if command == "error":
        arguments = [*source, "--bits", "4", "--transforms", "hadamard", "dct"]
    if command == "results":
        arguments = [str(write_csv(tmp_path / "r.csv", scores_of("a", 0.1) + scores_of("b")))]
    report = statistics.main([command, *arguments, "--figure", str(page)])
    assert report["figure"] == page
    with Image.open(page) as image:
        assert image.width == 1200
        assert np.asarray(image.convert("L")).std() > 10


def test_a_page_of_little_is_drawn_all_the_same(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for kind, value in (("weight", 1.0), ("activation", 2.0)):
        before = torch.full((4, 4), value)
        torch.save(before, tmp_path / f"1_{kind}_prehad.pt")
        torch.save(before @ transforms.hadamard(4).float(), tmp_path / f"1_{kind}_posthad.pt")
    for command in ("normality", "range", "band", "error"):
        page = tmp_path / f"{command}.png"
        statistics.main([command, "--tensors", str(tmp_path), "--figure", str(page)])
        assert page.stat().st_size > 5000
    assert "not testable" in capsys.readouterr().out


def test_without_matplotlib_a_page_is_refused_before_the_work(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = refusal(["range", "--figure", tmp_path / "page.png"], capsys)
    assert message == "--figure needs matplotlib: pip install 'compsrt[demo]'"
