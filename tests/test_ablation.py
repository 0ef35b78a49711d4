"""The ablation script: every row is a command that compsrt.train takes; runs are kept and not repeated."""

import importlib.util
import itertools
import json
from pathlib import Path

import pytest
from networks import tiny_swinir, write_pictures

from compsrt import train
from compsrt.checkpoint import save_float
from compsrt.recipes import RECIPES

PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "ablation.py"
specification = importlib.util.spec_from_file_location("ablation", PATH)
assert specification is not None
assert specification.loader is not None
ablation = importlib.util.module_from_spec(specification)
specification.loader.exec_module(ablation)


@pytest.mark.parametrize("row", list(ablation.rows()))
def test_every_row_is_understood(row):
    words = ablation.arguments_of(row, 3, 1, 50)
    options = train._parse([*words, "--weights", "a", "--train", "b"])
    (spec,) = train._specs(options)
    assert spec.bits == 3
    assert options.seed == 1
    if row not in ablation.BEST:
        assert options.steps == (50 if "compsrt" in words else 0)
    else:
        assert options.steps == RECIPES["compsrt-best"].steps
        words = ablation.arguments_of(row, 3, 1, 50, best_steps=7)
        assert train._parse([*words, "--weights", "a", "--train", "b"]).steps == 7


def test_sums_add_one_lever_after_the_other():
    sums = [arguments for row, arguments in ablation.rows().items() if row.startswith("sum/")]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(sums))


@pytest.mark.slow
def test_runs_are_kept_and_not_repeated(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    save_float(tiny_swinir(), tmp_path / "tiny.safetensors")
    write_pictures(tmp_path / "train", 10, 144, 144)
    write_pictures(tmp_path / "Set5", 2, 48, 48)
    result = tmp_path / "r.json"
    words = ["--weights", tmp_path / "tiny.safetensors", "--train", tmp_path / "train"]
    words += ["--test", tmp_path / "Set5", "--result", result, "--models", tmp_path / "models"]
    words += ["--bits", 4, 2, "--steps", 2, "--rows", "alone/plain", "sum/bounds", "--seeds"]

    def run(*seeds):
        ablation.main([str(word) for word in [*words, *seeds]])
        return json.loads(result.read_text())["runs"]

    assert len(run(0)) == 1 + 2 * 2
    made = []
    original = train.main
    monkeypatch.setattr(train, "main", lambda argv: made.append(argv) or original(argv))
    runs = run(0, 1)
    assert len(made) == 2 * 2
    assert len(runs) == 1 + 2 * 2 * 2
    assert {run["bits_per_weight"] > run["bits"] for run in runs if run["row"] != "float"} == {True}
    lines = result.with_suffix(".md").read_text()
    assert "±" in lines
    assert lines.count("\n") == (2 + 2) + 1 + (2 + 1 + 4)
    assert result.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(SystemExit):
        ablation.main([str(word) for word in [*words, 0, "--steps", 3]])
    assert "other settings" in capsys.readouterr().err
