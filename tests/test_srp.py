"""SRP from a dense network to a small one: penalty, phases, resuming, and the command."""

import dataclasses
import json

import pytest
import torch
from networks import tiny_swinir, write_pictures
from PIL import Image

from compsrt import checkpoint, cli, evaluate, srp, train, upscale
from compsrt.data import PatchSampler, find_pairs
from compsrt.models.edsr import EDSR, EDSRConfig
from compsrt.models.sesr import SESR, SESRConfig
from compsrt.pruning import StructureSpec, choose, doomed_weights
from compsrt.recipes import RECIPES, Recipe
from compsrt.trainer import Schedule, Trainer

PENALTY = srp.Penalty(step=0.1, every=1, limit=0.5, stabilize=3)


def tiny_edsr(seed=0):
    torch.manual_seed(seed)
    return EDSR(EDSRConfig.uniform(2, blocks=2, channels=8))


def plan(**changes):
    fast = Schedule(steps=4, batch=2, patches=(12,), validate_every=2, save_every=1)
    prune = dataclasses.replace(fast, steps=PENALTY.updates, final=1.0)
    fields = {
        "phases": srp.PHASES,
        "structure": StructureSpec((("*", 0.5),)),
        "penalty": PENALTY,
        "dense": fast,
        "prune": prune,
        "finetune": fast,
    }
    return srp.Plan(**(fields | changes))


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    folder = write_pictures(tmp_path_factory.mktemp("train"), 2, 64, 64)
    return PatchSampler(find_pairs(folder, 2), 2)


# --- The penalty -----------------------------------------------------------------------------------


def test_the_published_penalty_takes_143150_updates():
    published = srp.Penalty()
    assert published.updates == 5000 * 20 + 43_150
    assert published.at(0) == published.at(19) == 0 and published.at(20) == 1e-4
    assert published.at(99_999) == pytest.approx(0.4999) and published.at(100_000) == 0.5
    assert published.at(143_149) == 0.5
    assert srp.Penalty(start=0.2, step=0.1, every=3, stabilize=0).updates == 9


def test_geometric_growth_multiplies():
    penalty = srp.Penalty(0.01, step=1.0, every=5, limit=0.1, stabilize=7, growth="geometric")
    assert [penalty.at(n) for n in (0, 4, 5, 10, 15)] == [0.01, 0.01, 0.02, 0.04, 0.08]
    assert penalty.at(20) == penalty.at(10**9) == 0.1 and penalty.updates == 4 * 5 + 7


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"start": -1.0}, "-1.0"),
        ({"start": 1.0}, "limit"),
        ({"limit": float("inf")}, "inf"),
        ({"step": 0.0}, "penalty_step"),
        ({"every": 0}, "penalty_every"),
        ({"growth": "quick"}, "penalty_growth"),
        ({"growth": "geometric"}, "penalty_start"),
        ({"stabilize": -1}, "stabilize"),
    ],
)
def test_a_penalty_that_makes_no_sense_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        srp.Penalty(**fields)


def test_the_gradient_of_doomed_weights_grows_by_strength_times_weight(sampler):
    network = tiny_edsr()
    doomed = doomed_weights(network.state_dict(), choose(network, StructureSpec((("*", 0.5),))))
    objective = srp.StructureRegularization(
        network, doomed, srp.Penalty(start=0.3 * 255, limit=100)
    )
    lr, hr = sampler.sample(2, 12, step=0)
    objective.losses(lr, hr)["loss"].backward()
    before = {name: p.grad.clone() for name, p in network.named_parameters()}
    objective.regularize()
    for name, parameter in network.named_parameters():
        added = parameter.grad - before[name]
        wanted = 0.3 * parameter * doomed[name] if name in doomed else torch.zeros_like(added)
        torch.testing.assert_close(added, wanted, rtol=0, atol=1e-6)


def test_the_penalty_drives_doomed_weights_to_zero_and_leaves_the_others(sampler):
    network = tiny_edsr()
    doomed = doomed_weights(network.state_dict(), choose(network, StructureSpec((("*", 0.5),))))
    objective = srp.StructureRegularization(network, doomed, srp.Penalty(start=100, limit=100))
    schedule = Schedule(steps=200, batch=1, patches=(8,), learning_rate=2e-3, final=1.0)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    Trainer(objective, sampler, schedule).fit()
    gone = kept = start = 0.0
    for name, parameter in network.named_parameters():
        if name in doomed and parameter.dim() > 1:
            weight = parameter.detach()
            gone += float((weight * doomed[name]).abs().sum())
            kept += float((weight * ~doomed[name]).abs().sum())
            start += float((before[name] * doomed[name]).abs().sum())
    assert gone < 0.05 * start and kept > 0.5 * start


# --- Phases ----------------------------------------------------------------------------------------


def test_three_phases_leave_three_files_and_a_small_network(sampler, tmp_path):
    report = srp.train_srp(tiny_edsr(), sampler, plan(), folder=tmp_path)
    files = {phase: checkpoint.load(tmp_path / phase / "model.safetensors") for phase in srp.PHASES}
    assert files["dense"].config == EDSRConfig.uniform(2, blocks=2, channels=8)
    small = EDSRConfig.uniform(2, blocks=2, channels=4)
    assert files["prune"].config == files["finetune"].config == small
    assert report["dense"]["steps"] == report["finetune"]["steps"] == 4
    assert report["prune"]["steps"] == PENALTY.updates == 8
    card = files["prune"].card
    assert card["phase"] == "prune" and "head.0 and 3 tied to it: 8 filters -> 4" in card["cut"]


def test_each_phase_alone_in_one_folder_gives_the_same(sampler, tmp_path):
    srp.train_srp(tiny_edsr(), sampler, plan(), folder=tmp_path / "whole")
    for phase in srp.PHASES:
        network = tiny_edsr() if phase == "dense" else None
        srp.train_srp(network, sampler, plan(phases=(phase,)), folder=tmp_path / "parts")
    for phase in srp.PHASES:
        same_tensors(tmp_path / "whole" / phase, tmp_path / "parts" / phase)


def same_tensors(one, two):
    first = checkpoint.read_state(one / "model.safetensors")
    second = checkpoint.read_state(two / "model.safetensors")
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


class Killed(Exception):
    pass


@pytest.mark.parametrize("phase", srp.PHASES)
def test_killed_in_any_phase_it_goes_on_to_the_same_result(sampler, tmp_path, monkeypatch, phase):
    srp.train_srp(tiny_edsr(), sampler, plan(), folder=tmp_path / "whole")
    gradients, save = Trainer._gradients, Trainer.save
    broken = tmp_path / "broken"

    def until_killed(trainer):
        if trainer.folder == broken / phase and trainer.step == 3:
            raise Killed
        return gradients(trainer)

    monkeypatch.setattr(Trainer, "_gradients", until_killed)
    with pytest.raises(Killed):
        srp.train_srp(tiny_edsr(), sampler, plan(), folder=broken)
    assert not (broken / phase / "model.safetensors").exists()
    monkeypatch.setattr(Trainer, "_gradients", gradients)
    assert Trainer.save is save
    finished = {
        p: (broken / p / "model.safetensors") for p in srp.PHASES[: srp.PHASES.index(phase)]
    }
    times = {path: path.stat().st_mtime_ns for path in finished.values()}
    srp.train_srp(tiny_edsr(1), sampler, plan(), folder=broken, resume=True)
    assert times == {path: path.stat().st_mtime_ns for path in finished.values()}
    for each in srp.PHASES:
        same_tensors(tmp_path / "whole" / each, broken / each)


def test_another_ratio_is_not_resumed(sampler, tmp_path):
    srp.train_srp(tiny_edsr(), sampler, plan(), folder=tmp_path)
    other = plan(structure=StructureSpec((("*", 0.25),)))
    with pytest.raises(ValueError, match="cannot resume, structure was"):
        srp.train_srp(tiny_edsr(), sampler, other, folder=tmp_path, resume=True)


def test_without_penalty_it_is_plain_l1_pruning(sampler, tmp_path):
    network = tiny_edsr()
    checkpoint.save_float(network, tmp_path / "dense.safetensors")
    spec = StructureSpec((("*", 0.5),), tied="l1")
    once = plan(phases=("prune",), structure=spec, penalty=None)
    report = srp.train_srp(
        None, sampler, once, folder=tmp_path, weights=tmp_path / "dense.safetensors"
    )
    assert report["prune"]["steps"] == 0
    kept = choose(network, spec)[0].kept
    small = checkpoint.read_state(tmp_path / "prune/model.safetensors")
    assert torch.equal(small["head.0.weight"], network.state_dict()["head.0.weight"][list(kept)])


def test_a_collapsed_sesr_is_pruned_too(sampler, tmp_path):
    network = SESR(SESRConfig(blocks=2, features=8))
    checkpoint.save_float(network, tmp_path / "dense.safetensors")
    narrow = plan(
        phases=("prune", "finetune"),
        structure=StructureSpec((("body.blocks.0", 0.25), ("body.first", 0.5))),
    )
    srp.train_srp(None, sampler, narrow, folder=tmp_path, weights=tmp_path / "dense.safetensors")
    small = checkpoint.load(tmp_path / "finetune/model.safetensors")
    assert small.config.all_widths == (4, 6, 4)
    before = checkpoint.load(tmp_path / "prune/model.safetensors")
    x = torch.rand(1, 3, 9, 9)
    assert 0 < float((small(x) - before(x)).abs().max()) < 0.5, "fine-tuned, not drawn anew"


# --- The command -----------------------------------------------------------------------------------

FAST = ["--validation-count", "1", "--validation-crops", "1", "--batch", "2", "--patch", "16",
        "--steps", "2", "--penalty-step", "0.25", "--penalty-every", "1", "--stabilize", "1"]  # fmt: skip


@pytest.fixture
def material(tmp_path, monkeypatch):
    tiny = Recipe("tiny", ("srp",), EDSRConfig.uniform(2, blocks=2, channels=8), ratio=("*:0.5",))
    monkeypatch.setitem(RECIPES, "tiny", tiny)
    write_pictures(tmp_path / "train", 3, 160, 160)
    write_pictures(tmp_path / "set", 1, 40, 48)
    checkpoint.save_float(tiny_edsr(), tmp_path / "edsr.safetensors")
    checkpoint.save_float(tiny_swinir(), tmp_path / "swinir.safetensors")
    return tmp_path


def command(capsys, folder, *more):
    argv = ["--train", str(folder / "train"), "--test", str(folder / "set"),
            "--output", str(folder / "out"), *FAST, *more]  # fmt: skip
    try:
        code = cli.run(train.main, argv, name="compsrt.train")
    except SystemExit as exit_:
        code = exit_.code
    out, err = capsys.readouterr()
    return code, json.loads(out.splitlines()[-1]) if code == 0 else None, err


def test_one_command_goes_from_nothing_to_a_small_network(material, capsys):
    code, report, err = command(capsys, material, "--recipe", "tiny")
    assert code == 0, err
    assert [row["model"] for row in report["rows"]] == ["bicubic", "dense", "cut", "fine-tuned"]
    dense, small = report["rows"][1], report["rows"][3]
    assert small["file_bytes"] < dense["file_bytes"]
    model = checkpoint.load(material / "out/model.safetensors")
    assert model.config.channels == 4 and model.card["recipe"] == "tiny"
    # The other commands take the result like any model.
    path, pictures = str(material / "out/model.safetensors"), material / "set"
    assert cli.run(evaluate.main, [path, "--test", str(pictures)], name="compsrt.evaluate") == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][1]
    assert row["tests"] == small["tests"]
    assert row["parameters"] == sum(p.numel() for p in model.parameters())
    large = material / "large.png"
    argv = [path, str(pictures / "p0.png"), "--output", str(large)]
    assert cli.run(upscale.main, argv, name="compsrt.upscale") == 0
    with Image.open(large) as image:
        assert image.size == (96, 80)


def test_phases_alone_by_command(material, capsys):
    weights = ["--method", "srp", "--weights", str(material / "edsr.safetensors")]
    code, report, err = command(capsys, material, *weights, "--ratio", "0.5", "--phase", "prune")
    assert code == 0, err
    assert [row["model"] for row in report["rows"]] == ["bicubic", "dense", "cut"]
    argv = ["--method", "srp", "--phase", "finetune", "--resume"]
    code, report, err = command(capsys, material, *argv)
    assert code == 0, err
    assert [row["model"] for row in report["rows"]] == ["bicubic", "fine-tuned"]


def test_structure_masks_and_bits_in_one_command(material, capsys):
    argv = ["--method", "srp", "compsrt", "--weights", str(material / "swinir.safetensors"),
            "--ratio", "heads:0.5", "hidden:0.5", "--bits", "4", "--pruning", "0.4",
            "--calibration-count", "2", "--calibration-patch", "16"]  # fmt: skip
    code, report, err = command(capsys, material, *argv)
    assert code == 0, err
    assert "48 hidden -> 24" in json.dumps(report["srp"]["prune"]["cut"])
    packed = checkpoint.load(material / "out/compsrt-4bit-pruned40/model.safetensors")
    assert (packed.config.num_heads, packed.config.mlp_hidden) == ((1,), (24,))
    assert packed.config.head_dim == (12,) and packed.spec.pruning == 0.4
    assert report["rows"][-1]["levels"] <= 16
    assert report["rows"][-1]["file_bytes"] < (material / "swinir.safetensors").stat().st_size / 2


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--ratio", "body.0.body.O:0.5"], "did you mean body."),
        (["--ratio", "0.99"], "leaves none"),
        (["--ratio", "1.5"], "1.5"),
        (["--ratio", "0.01"], "cuts nothing"),
        (["--ratio", "half"], "PATTERN:SHARE"),
        (["--ratio", "tail.0:0.5"], "tail.0"),
        (["--ratio", "0.5", "--skip-layers", "hed.0"], "did you mean head.0?"),
        (["--ratio", "0.5", "--same-group", "head.0", "tail.0"], "unequal width"),
        ([], "ratio"),
        (["--ratio", "0.5", "--penalty-limit", "-1"], "limit"),
        (["--ratio", "0.5", "--phase", "finetune", "dense"], "--phase dense finetune"),
        (["--ratio", "0.5", "--phase", "dense"], "--weights"),
        (["--ratio", "0.5", "--tied", "l2"], "known: random, l1"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(material, capsys, more, words):
    argv = ["--method", "srp", "--weights", str(material / "edsr.safetensors"), *more]
    code, _, err = command(capsys, material, *argv)
    lines = [line for line in err.splitlines() if "warning" not in line]
    assert code == 2, err
    assert len(lines) == 1 and lines[0].startswith("compsrt.train: error: ") and words in lines[0]
