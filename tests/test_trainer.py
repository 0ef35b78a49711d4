import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import tiny_swinir, write_pictures

import compsrt
from compsrt import data
from compsrt.distillation import Distillation
from compsrt.distributed import Ranks
from compsrt.float_training import FloatTraining, start_from
from compsrt.quantization import TRAINED_KINDS, QuantSpec
from compsrt.trainer import Schedule, Trainer, Validation

CPU = Ranks(torch.device("cpu"))


@pytest.fixture
def sampler(tmp_path):
    return data.PatchSampler(data.find_pairs(write_pictures(tmp_path / "hr"), 2), 2)


def trainer(objective, sampler, folder=None, **changes):
    schedule = Schedule(
        **{"steps": 6, "batch": 2, "patches": (16,), "learning_rate": 1e-3, "validate_every": 2,
           "save_every": 1, "log_every": 1, **changes}
    )  # fmt: skip
    validation = Validation(sampler, 4, 16, CPU)
    return Trainer(objective, sampler, schedule, validation=validation, folder=folder)


def float_objective():
    return FloatTraining(tiny_swinir())


def distillation():
    teacher = tiny_swinir()
    spec = QuantSpec(bits=3)
    return Distillation(compsrt.quantize(teacher, spec, torch.rand(2, 3, 16, 16)), teacher)


def distillation_of_weights():
    teacher = tiny_swinir()
    spec = QuantSpec(bits=3, per_channel=True, pruning=0.3, train_weights=TRAINED_KINDS)
    student = compsrt.quantize(teacher, spec, torch.rand(2, 3, 16, 16))
    return Distillation(student, teacher, picture_weight=0.5, average=0.9)


@pytest.mark.parametrize("make", [float_objective, distillation, distillation_of_weights])
def test_a_killed_run_resumes_to_the_same_result(make, sampler, tmp_path):
    torch.manual_seed(3)
    whole = trainer(make(), sampler)
    whole.fit()
    torch.manual_seed(3)
    first = trainer(make(), sampler, tmp_path)
    losses, first.objective.losses = first.objective.losses, None

    def stop_in_step_4(lr, hr):
        if first.step == 4:
            raise SystemExit  # killed: nothing is saved any more
        return losses(lr, hr)

    first.objective.losses = stop_in_step_4
    with pytest.raises(SystemExit):
        first.fit()
    torch.manual_seed(3)
    second = trainer(make(), sampler, tmp_path)
    assert second.resume() and second.step == 4
    second.fit()
    for key, value in whole.objective.learned().items():
        assert torch.equal(value, second.objective.learned()[key]), key
    assert whole.best[:2] == second.best[:2]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_resuming_with_other_settings_is_refused(sampler, tmp_path):
    one = trainer(float_objective(), sampler, tmp_path, steps=1)
    one.settings = {"seed": 0}
    one.fit()
    one.settings = {"seed": 1}
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        one.resume()
    (tmp_path / "state.pt").write_bytes(b"PK damaged")
    with pytest.raises(ValueError, match="damaged"):
        one.resume()


def test_accumulated_gradients_equal_those_of_the_whole_batch(sampler):
    gradients = []
    for accumulate in (1, 2, 4):
        objective = FloatTraining(tiny_swinir().double())
        objective.losses = lambda lr, hr, o=objective: {
            "loss": torch.nn.functional.l1_loss(o.network(lr.double()), hr.double())
        }
        run = trainer(objective, sampler, batch=4, accumulate=accumulate)
        run._gradients()
        gradients.append(torch.cat([p.grad.flatten() for p in objective.network.parameters()]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-10, atol=1e-14)


def test_the_best_validation_is_kept(sampler):
    objective = float_objective()
    run = trainer(objective, sampler, steps=4, validate_every=1)
    values = iter([30.0, 31.0, 33.0, 32.0, 31.0])
    run.validation.psnr = lambda model: next(values)
    run.fit()
    assert run.best[:2] == (33.0, 2)
    final = {key: value.clone() for key, value in objective.learned().items()}
    run.load_best()
    assert any(not torch.equal(final[key], value) for key, value in objective.learned().items())
    assert all(torch.equal(run.best[2][key], value) for key, value in objective.learned().items())


def test_a_loss_that_is_not_finite_stops_with_name_and_step(sampler):
    objective = distillation()
    run = trainer(objective, sampler)
    update = objective.update

    def break_a_scalar():
        update()
        if run.step == 1:
            with torch.no_grad():
                objective.trained()["layers.0.residual_group.blocks.0.fc2.weight.upper"].fill_(
                    torch.nan
                )

    objective.update = break_a_scalar
    with pytest.raises(ValueError, match=r"step 2: .*blocks\.0\.fc2\.weight\.upper"):
        run.fit()


def test_learning_rate_warms_up_and_falls():
    schedule = Schedule(steps=100, learning_rate=2.0, warmup=10, final=0.1)
    rates = [schedule.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[10] == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] >= 0.2


def test_patches_grow_in_equal_parts():
    schedule = Schedule(steps=9, patches=(16, 24, 32))
    assert [schedule.patch_at(step) for step in range(9)] == [16] * 3 + [24] * 3 + [32] * 3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"batch": 0}, "batch"),
        ({"batch": 4, "accumulate": 3}, "accumulate"),
        ({"patches": (4,)}, "patch"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"steps": -1}, "steps"),
    ],
)
def test_impossible_schedules_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        Schedule(**{"steps": 10, **fields})


def test_another_scale_is_started_from_all_but_the_last_layer():
    one, other = tiny_swinir(1), tiny_swinir(2, scale=3)
    missing = start_from(other, one)
    assert missing == ["upsample.0.weight", "upsample.0.bias"]
    for name, parameter in one.named_parameters():
        if name not in missing:
            assert torch.equal(parameter, other.get_parameter(name))
    with pytest.raises(ValueError, match="no parameter"):
        start_from(torch.nn.Linear(2, 2), one)


def test_the_average_follows_the_weights():
    objective = FloatTraining(tiny_swinir(), average=0.5)
    start = objective.learned()["norm.weight"].clone()
    with torch.no_grad():
        objective.network.norm.weight += 1
    objective.losses(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 16, 16))["loss"].backward()
    objective.optimizer.param_groups[0]["lr"] = 0.0
    objective.update()
    torch.testing.assert_close(objective.learned()["norm.weight"], start + 1 - 2 / 11)


# --- Two processes ---------------------------------------------------------------------------------


@pytest.mark.gpu
def test_recorded_launches_train_as_others_do():
    """Of one shape and another, and of gradients that add up over two parts of a batch."""
    torch.manual_seed(1)
    plain, recorded = (FloatTraining(tiny_swinir().cuda(), compiled=c) for c in (False, True))
    recorded.network.load_state_dict(plain.network.state_dict())
    for side in (8, 16, 8):
        pairs = [(torch.rand(2, 3, side, side), torch.rand(2, 3, 2 * side, 2 * side)) for _ in "ab"]
        for training in (plain, recorded):
            training.optimizer.zero_grad()
            for lr, hr in pairs:
                training.losses(lr.cuda(), hr.cuda())["loss"].backward()
        ours, theirs = (
            torch.cat([p.grad.flatten() for p in t.network.parameters()]) for t in (recorded, plain)
        )
        assert (ours - theirs).norm() < 0.05 * theirs.norm()  # bf16, rounded at other places


def two_processes(code: str, *arguments: str) -> str:
    """Run Python code under torchrun with two gloo processes."""
    root = Path(__file__).resolve().parents[1]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"
    }  # fmt: skip
    path = Path(arguments[0]) / "program.py"
    path.write_text(code)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    done = subprocess.run(
        [*command, str(path), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


PROGRAM = """
import sys
from pathlib import Path
import torch
from networks import tiny_swinir
import compsrt
from compsrt import data, distributed
from compsrt.distillation import Distillation
from compsrt.float_training import FloatTraining
from compsrt.quantization import QuantSpec
from compsrt.trainer import Schedule, Trainer

torch.set_num_threads(1)
folder = Path(sys.argv[1])
ranks = distributed.setup("cpu")
batch = 4 // ranks.world
sampler = data.PatchSampler(data.find_pairs(folder / "hr", 2), 2)

teacher = tiny_swinir().double()
pictures = sampler.sample(2, 16, step=99)[0].double()
student = compsrt.quantize(teacher, QuantSpec(bits=3, storage="float32"), pictures)
objective = Distillation(student, teacher)
losses = objective.losses
objective.losses = lambda lr, hr: losses(lr.double())
schedule = Schedule(steps=10, batch=batch, patches=(16,), learning_rate=1e-3)
trainer = Trainer(objective, sampler, schedule, ranks=ranks)
trainer._gradients()
gradients = {name: p.grad.clone() for name, p in objective.trained().items()}

training = FloatTraining(tiny_swinir())
Trainer(training, sampler, schedule, ranks=ranks).fit()
if ranks.is_main:
    torch.save({"gradients": gradients, "weights": training.network.state_dict()},
               folder / f"of{ranks.world}.pt")
ranks.close()
"""


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    write_pictures(tmp_path / "hr")
    two_processes(PROGRAM, str(tmp_path))
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), str(tmp_path)], env=environment, check=True
    )
    two, one = (torch.load(tmp_path / f"of{n}.pt", weights_only=True) for n in (2, 1))
    for name, gradient in one["gradients"].items():
        torch.testing.assert_close(two["gradients"][name], gradient, rtol=1e-6, atol=1e-12)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=0, atol=1e-5)
