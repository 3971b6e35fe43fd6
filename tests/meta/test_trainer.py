"""The trainer: learning, skipping, checkpoints, resuming to the same bits."""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import Killed, killer, linear_task, metrics, tiny_student, trainer
from torch import Tensor, nn

from amalgam import weight_files
from amalgam.meta import (
    Amalgamation,
    Memory,
    NothingLearned,
    Repeat,
    Stage,
    Stages,
    Trainer,
    Training,
    Truncation,
    Unroll,
    clip_adaptively,
)
from amalgam.meta.run_folder import CHECKPOINT, FORMAT, LATER, METRICS, STUDENT
from amalgam.policies import Pool, Student
from amalgam.tasks import Task

GOLDEN = Path(__file__).parents[1] / "golden"
SMOOTHED = partial(nn.functional.cross_entropy, label_smoothing=0.1)


def test_a_run_learns(tmp_path) -> None:
    """Meta-training brings the meta-loss of a task it can learn down."""
    run = trainer(
        tmp_path,
        training=Training(meta_lr=0.01, validate_every=0),
        strategy=Stages((Stage(60, 1, 0.05),), 10),
        amalgamation=Amalgamation(scale_spread=0.0, backend="reference"),
    )
    run.run()
    losses = [row["meta_loss"] for row in metrics(tmp_path)]
    assert sum(losses[-10:]) / 10 < sum(losses[:10]) / 10 - 0.1


def test_run_folder(tmp_path) -> None:
    run = trainer(tmp_path)
    seen = []
    student = run.run(report=seen.append)
    rows = metrics(tmp_path)
    assert [row["meta_step"] for row in rows] == list(range(1, 8)) == [r["meta_step"] for r in seen]
    assert [row["stage"] for row in rows] == [0, 0, 0, 1, 1, 1, 1]
    assert [row["episode"] for row in rows] == [0, 1, 2, 3, 3, 4, 4]
    assert [row["window"] for row in rows] == [0, 0, 0, 0, 1, 0, 1]
    assert [row["meta_step"] for row in rows if "validation" in row] == [3, 6, 7]
    assert set(rows[0]["loss"]) == {"student", "adam", "sgd"}
    assert sum(rows[0]["followed"].values()) == pytest.approx(1)
    loaded = Student.load(tmp_path / STUDENT)
    assert all(map(torch.equal, loaded.weights(), student.weights()))
    assert loaded.provenance["meta_steps"] == 7
    best = min((row for row in rows if "validation" in row), key=lambda row: row["validation"])
    assert loaded.provenance["kept_meta_step"] == best["meta_step"]


def test_same_seed_same_bits(whole, tmp_path) -> None:
    one = Student.load(whole / STUDENT).weights()
    two, other = (trainer(tmp_path / str(seed), seed=seed).run().weights() for seed in (7, 8))
    assert all(map(torch.equal, one, two))
    assert not all(map(torch.equal, one, other))
    assert metrics(whole) == metrics(tmp_path / "7")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run that is over, which tests share."""
    folder = tmp_path_factory.mktemp("whole")
    trainer(folder).run()
    return folder


@pytest.fixture
def over(whole, tmp_path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(whole, tmp_path / "over")


@pytest.mark.parametrize("at", range(1, 8))
def test_resumed_run_ends_in_the_same_bits(whole, tmp_path, at) -> None:
    kill = killer(at)
    with pytest.raises(Killed):
        trainer(tmp_path / "cut").run(report=kill)
    with (tmp_path / "cut" / METRICS).open("a") as log:
        log.write('{"meta_step": 99, "cut sho')
    with pytest.raises(FileExistsError) if at > 1 else pytest.raises(Killed):
        trainer(tmp_path / "cut").run(report=kill)
    resumed = trainer(tmp_path / "cut").run(resume=True).weights()
    assert all(map(torch.equal, Student.load(whole / STUDENT).weights(), resumed))
    assert metrics(whole) == metrics(tmp_path / "cut")
    assert not list((tmp_path / "cut").glob(".*"))


def test_random_state_outside_does_not_matter(tmp_path) -> None:
    runs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        runs.append(trainer(tmp_path / str(seed)).run().weights())
        assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 8}, "seed = 7, not 8"),
        ({"strategy": Stages((Stage(3, 1, 0.2),), 4)}, "strategy = Stages"),
        ({"strategy": Stages((Stage(3, 1, 0.2), Stage(2, 2, 0.05)), 5)}, "unroll=4.*unroll=5"),
        ({"amalgamation": Amalgamation(mechanism="mean")}, "mechanism"),
        (
            {"tasks": replace(linear_task(), loss=SMOOTHED)},
            "optimizees = linear: cross_entropy, loss .*, not linear: functools.partial.*=0.1",
        ),
        (
            {
                "tasks": replace(
                    linear_task(), build=lambda: nn.Sequential(nn.Linear(4, 2), nn.ELU())
                )
            },
            "optimizees = linear: cross_entropy, loss .*, not linear: cross_entropy, loss",
        ),
        ({"students": tiny_student(7).double()}, "dtype = torch.float32, not torch.float64"),
    ],
)
def test_a_foreign_checkpoint_is_refused(over, changes, named) -> None:
    with pytest.raises(ValueError, match=named):
        trainer(over, **changes).run(resume=True)


def test_a_task_that_runs_on_a_gpu_alone_can_be_trained_there(tmp_path, monkeypatch) -> None:
    """As one whose loss holds tensors there; what a run is known by is then read there, too."""
    task, moves = linear_task(), []

    def to(_: Task, device: str | torch.device) -> Task:
        moves.append(device)
        if len(moves) > 1:
            raise ValueError("task 'linear' can't be trained on its first samples")
        return task

    monkeypatch.setattr(Task, "to", to)
    assert (
        "linear: cross_entropy, loss 0." in trainer(tmp_path, tasks=task)._identity()["optimizees"]
    )
    assert moves == [torch.device("cpu"), "cpu", "cpu"]


def test_a_checkpoint_that_says_nothing_of_losses_and_dtypes_goes_on(over) -> None:
    """As those did that were begun before they were looked at."""
    tensors, about = weight_files.read(over / CHECKPOINT, "checkpoint")
    assert about["run"].keys() > set(LATER)
    about["run"] = {name: said for name, said in about["run"].items() if name not in LATER}
    weight_files.write(over / CHECKPOINT, "checkpoint", tensors, about)
    trainer(over).run(resume=True)
    with pytest.raises(ValueError, match="seed = 7, not 8"):
        trainer(over, seed=8).run(resume=True)


class Alone(Truncation):
    __repr__ = object.__repr__


@dataclass(frozen=True)
class Scheduled(Stages):
    schedule: Callable[[int], float] = float


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"estimator": Alone()}, "estimator .* not <test_trainer.Alone object at 0x"),
        ({"strategy": Scheduled(schedule=lambda step: 0.1)}, "strategy .* not <function <lambda> "),
    ],
)
def test_what_no_run_could_know_again_is_refused(changes, named, tmp_path) -> None:
    with pytest.raises(TypeError, match=f"{named}.*give its class a __repr__"):
        trainer(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"student": "standard"}, r"student must be a policy, .* or several, not 'standard'"),
        ({"student": [tiny_student(1), Student]}, r"student\[1\] must be a policy, .* not <class"),
        ({"task": "digits-mlp"}, "task must be a task .* not 'digits-mlp'"),
        ({"validation": [linear_task(), 3]}, r"validation\[1\] must be a task .* not 3"),
        ({"pool": ["adam"]}, r"pool must be a Pool, such as Pool\(\['adam'\]\), not \['adam'\]"),
        ({"pool": linear_task()}, "pool must be a Pool, .* not an object of Task"),
        ({"folder": None}, "folder must be a path, not None"),
        ({"amalgamation": "mean"}, "amalgamation must be an Amalgamation, .* not 'mean'"),
        ({"training": {"meta_lr": 1}}, "training must be a Training, .* not {'meta_lr': 1}"),
        ({"strategy": Stages}, r"strategy must be a Strategy, such as Stages\(\), not <class"),
        ({"estimator": "pes"}, "estimator must be an Estimator, .* not 'pes'"),
        ({"memory": "1GB"}, "memory must be a Memory, .* not '1GB'"),
        ({"perturbation": "gaussian"}, "perturbation must be a Perturbation, .* not 'gaussian'"),
        ({"conditions": 3}, "conditions must be Conditions, .* not 3"),
        ({"task_weights": ["a"]}, r"task_weights\[0\] must be a number, not 'a'"),
        ({"seed": 1.5}, "seed must be a whole number, not 1.5"),
        ({"device": 3}, "device must be 'auto', 'cpu', 'cuda' or a torch.device, not 3"),
        ({"provenance": "mine"}, "provenance must be a dictionary, not 'mine'"),
    ],
)
def test_arguments_of_another_kind_are_named(changes, named, tmp_path) -> None:
    arguments = {
        "student": tiny_student(1),
        "task": linear_task(),
        "pool": Pool(["adam"]),
        "folder": tmp_path,
    }
    with pytest.raises(TypeError, match=named):
        Trainer(**(arguments | changes))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Stages("long"), r"stages must be a stage, such as .*, or several, not 'long'"),
        (lambda: Stages((Stage(), 3)), r"stages\[1\] must be a stage, .* not 3"),
        (lambda: Repeat(validation=3), "validation must be UnrollSettings, not 3"),
        (lambda: Amalgamation(on_policy=True), "on_policy must be an OnPolicy or None, not True"),
        (
            lambda: Unroll("digits-mlp", tiny_student(1), Pool([]), Amalgamation()),
            "task must be a Task, .* not 'digits-mlp'",
        ),
        (
            lambda: Unroll(linear_task(), tiny_student(1), ["adam"], Amalgamation()),
            "pool must be a Pool, .* not ",
        ),
    ],
)
def test_settings_and_engines_name_what_is_of_another_kind(make, named) -> None:
    with pytest.raises(TypeError, match=named):
        make()


def test_a_single_stage_and_a_single_validation_task_need_no_sequence(tmp_path) -> None:
    assert Stages(Stage(2, 3)) == Stages((Stage(2, 3),))
    assert [task.name for task in trainer(tmp_path, validation=linear_task()).validation] == [
        "linear"
    ]


def test_a_checkpoint_from_before_formats_were_numbered_is_refused(over) -> None:
    tensors, about = weight_files.read(over / CHECKPOINT, "checkpoint")
    assert about.pop("format") == FORMAT
    weight_files.write(over / CHECKPOINT, "checkpoint", tensors, about)
    with pytest.raises(ValueError, match=f"format 1, .* format {FORMAT} alone; finish that"):
        trainer(over).run(resume=True)


def test_a_damaged_checkpoint_is_refused(over) -> None:
    content = (over / CHECKPOINT).read_bytes()
    (over / CHECKPOINT).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cut short"):
        trainer(over).run(resume=True)


def test_non_finite_meta_gradients_are_skipped_and_counted(tmp_path) -> None:
    run = trainer(tmp_path, training=Training(validate_every=0))
    run.check()
    (unroll,) = run._meta_steps.engines._of_tasks.values()
    plain = unroll.meta_gradient
    at = []

    def meta_gradient(given, coefficients):
        window, loss, grads = plain(given, coefficients)
        at.append(1)
        if len(at) in (2, 5):
            grads[0][0] = grads[0][0] * math.nan
        return window, loss, grads

    unroll.meta_gradient = meta_gradient  # type: ignore[method-assign]
    before: list[list[Tensor]] = [[w.clone() for w in run.student.weights()]]
    rows = []

    def report(row: dict) -> None:
        rows.append(row)
        before.append([w.clone() for w in run.student.weights()])

    run.run(report=report)
    assert [row["skipped_meta_steps"] for row in rows] == [0, 1, 1, 1, 2, 2, 2]
    for step in range(7):
        unchanged = all(map(torch.equal, before[step], before[step + 1]))
        assert unchanged == (step in (1, 4))
    assert all(w.isfinite().all() for w in run.student.weights())
    assert rows[1]["grad_norm"] is None


def test_a_window_without_a_usable_step_is_skipped(tmp_path) -> None:
    run = trainer(tmp_path, training=Training(validate_every=0))
    run.tasks[0].loss = lambda out, target: out.sum() * math.nan
    before = [w.clone() for w in run.student.weights()]
    for resume in (False, True):
        with pytest.raises(NothingLearned, match="the student learned nothing: all 7 meta-steps"):
            run.run(resume=resume)
        assert not (tmp_path / STUDENT).exists()
    rows = metrics(tmp_path)
    assert rows[-1]["skipped_meta_steps"] == 7
    assert rows[0]["skipped_steps"] == {"student": 4, "adam": 4, "sgd": 4}
    assert all(map(torch.equal, before, run.student.weights()))


@pytest.mark.parametrize("byte", range(0, 400, 7))
def test_a_flipped_bit_of_a_checkpoint_is_refused(whole, byte, tmp_path) -> None:
    """In the length, the names and the facts that come first; and in the tensors behind them."""
    content = bytearray((whole / CHECKPOINT).read_bytes())
    place = byte * len(content) // 400
    content[place] ^= 1 << (byte % 8)
    (tmp_path / CHECKPOINT).write_bytes(content)
    with pytest.raises(ValueError, match=CHECKPOINT):
        trainer(tmp_path).run(resume=True)
    assert not (tmp_path / STUDENT).exists()


@pytest.mark.parametrize("left", ["", "cut", "none"])
def test_lost_metrics_stop_no_run(whole, tmp_path, left) -> None:
    with pytest.raises(Killed):
        trainer(tmp_path / "cut").run(report=killer(5))
    log = tmp_path / "cut" / METRICS
    if left == "none":
        log.unlink()
    else:
        log.write_bytes(log.read_bytes().splitlines(keepends=True)[0] + b'{"meta_st')
    with pytest.warns(UserWarning, match=r"metrics.jsonl' lacks [34] of the 4 lines before the"):
        resumed = trainer(tmp_path / "cut").run(resume=True).weights()
    assert all(map(torch.equal, Student.load(whole / STUDENT).weights(), resumed))
    kept = 0 if left == "none" else 1
    rows = metrics(whole)
    assert metrics(tmp_path / "cut") == rows[:kept] + rows[4:]


def test_what_comes_last_is_tried_first(tmp_path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="backend='cuda' can't compute"):
        trainer(folder, amalgamation=Amalgamation(backend="cuda")).run()
    with pytest.raises(ValueError, match=r"budget must be \d+ bytes or more .*, not 700"):
        trainer(folder, memory=Memory(budget=700)).run()
    assert not folder.exists()
    with pytest.raises(ValueError, match="what JSON can hold: .*set is not JSON serializable"):
        trainer(folder, provenance={"notes": {1, 2}}).run()
    assert not (folder / METRICS).exists()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        trainer(tmp_path / "file").run()


def test_weights_that_are_not_finite_are_not_saved(tmp_path) -> None:
    run = trainer(tmp_path, training=Training(validate_every=0))

    def spoil(row: dict) -> None:
        if row["meta_step"] == 7:
            torch.nn.init.constant_(run.student.weights()[0], math.inf)

    with pytest.raises(NothingLearned, match="the weights of the student are not finite; look at"):
        run.run(report=spoil)
    assert not (tmp_path / STUDENT).exists()


def test_checkpoint_is_not_a_student(tmp_path) -> None:
    with pytest.raises(Killed):
        trainer(tmp_path).run(report=killer(6))
    with pytest.raises(
        ValueError, match="must be an amalgam student, but is an amalgam checkpoint"
    ):
        Student.load(tmp_path / CHECKPOINT)
    tensors, about = weight_files.read(tmp_path / CHECKPOINT, "checkpoint")
    assert about["progress"]["meta_step"] == 6
    assert "trajectories.0.params" in tensors


def test_clipping_matches_the_authors() -> None:

    data = np.load(GOLDEN / "losses_and_perturbations.npz")

    def column(name: str) -> list[Tensor]:
        return [torch.from_numpy(data[f"agc.{name}.{i}"]).double() for i in range(3)]

    for ours, theirs in zip(
        clip_adaptively(column("weight"), column("grad")), column("clipped"), strict=True
    ):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize(
    ("kind", "wrong", "named"),
    [
        (Stage, {"episodes": 0}, "episodes"),
        (Stage, {"imitation_weight": -1.0}, "imitation_weight"),
        (Stages, {"unroll": 0}, "unroll"),
        (Stages, {"stages": ()}, "stages must hold at least one"),
        (Training, {"meta_lr": 0.0}, "meta_lr"),
        (Training, {"validate_every": -1}, "validate_every"),
    ],
)
def test_bad_settings_are_named(kind, wrong, named) -> None:
    with pytest.raises(ValueError, match=named):
        kind(**wrong)
