"""Meta-training on another device than the CPU: nothing stays behind, and the numbers are the same.

Where there is no GPU, on one that pretends (see ``elsewhere``); then on a real one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from elsewhere import ELSEWHERE, Elsewhere
from runs import (
    SMALL,
    Killed,
    LinearFamily,
    killer,
    linear_task,
    metrics,
    perturbation_of,
    policies,
    tiny_student,
    trainer,
)
from torch import Tensor, nn

from amalgam import distributed, tasks
from amalgam.meta import (
    Amalgamation,
    Conditions,
    Memory,
    MetaBatch,
    OnPolicy,
    PersistentEvolution,
    Repeat,
    Stage,
    Stages,
    Trainer,
    Training,
    Unroll,
)
from amalgam.meta.memory import free_bytes
from amalgam.meta.periods import UnrollSettings
from amalgam.policies import (
    Choice,
    ChoiceConfig,
    Policy,
    PolicyTeacher,
    Pool,
    Student,
    TorchTeacher,
    load_policy,
)
from amalgam.seeding import generator_for
from amalgam.tasks import Task

# PyTorch takes a device that pretends for one without memory.
pytestmark = pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")

EVERY_STEP = Training(validate_every=2, validation_steps=3, validation_seeds=1, checkpoint_every=1)
TWO_WINDOWS = Stages((Stage(1, 2, 0.1),), 3)
REFERENCE = Amalgamation(scale_spread=1.0, backend="reference")
BATCH = MetaBatch(4, slots=2, unroll=3, shortest=3, longest=9, imitation_weight=0.1)
CONDITIONS = Conditions(
    weight_decay=(1e-3, 0.1), lr=(0.5, 2.0), lr_decays=("linear", "cosine"), loss_scale=(-1, 1)
)
NOISES: list[dict[str, Any]] = [
    {"kind": "gaussian"},
    {"kind": "persistent_gaussian_rel"},
    {"kind": "fgsm"},
    {"kind": "pgd", "norm": "inf"},
    {"kind": "pgd", "norm": "scale"},
    {"kind": "pgd_clipped_gradient"},
    {"kind": "adaptive_pgd"},
    {"kind": "cgd"},
]


def convolutional_task() -> Task:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 1, 3, 3, generator=generator), torch.arange(64) % 2

    def build() -> nn.Module:
        kernels = (nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU())
        return nn.Sequential(*kernels, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 2))

    return Task("convolutional", build, (x[:48], y[:48]), (x[48:], y[48:]), batch_size=16)


def every_teacher() -> list[Any]:
    muon = TorchTeacher("torch.optim.Muon", lr=0.02, others=("torch.optim.NAdam", {"lr": 0.01}))
    taught = [PolicyTeacher(policies()[kind]) for kind in ("choice", "student", "scale")]
    return ["adam", "powersign", muon, TorchTeacher("torch.optim.Adagrad", lr=0.1), *taught]


RUNS: dict[str, Callable[[], dict[str, Any]]] = {
    **{kind: partial(lambda kind: {"students": policies()[kind]}, kind) for kind in policies()},
    **{
        " ".join(map(str, how.values())): partial(dict, perturbation=perturbation_of(**how))
        for how in NOISES
    },
    "input noise": lambda: {"training": replace(EVERY_STEP, input_noise=0.05)},
    "every teacher": lambda: {"pool": every_teacher()},
    "no teacher": lambda: {"pool": ()},
    "pes": lambda: {"estimator": PersistentEvolution(pairs=2)},
    "replicates": lambda: {
        "students": [tiny_student(7), tiny_student(8)],
        "training": replace(EVERY_STEP, optimizees=2),
    },
    "strategy": lambda: {
        "strategy": Repeat(2, 2, windows=1, episodes=2, validation=UnrollSettings(2, 1, 1, 1, 0.05))
    },
    "meta-batch": lambda: {"strategy": BATCH, "tasks": [linear_task(), linear_task(3, "narrow")]},
    "families": lambda: {
        "strategy": BATCH,
        "tasks": [LinearFamily(), linear_task(8)],
        "validation": [LinearFamily("held out")],
    },
    "conditions": lambda: {"conditions": CONDITIONS},
    "on-policy": lambda: {
        "pool": Pool(every_teacher(), ["cosine"] * len(every_teacher())),
        "amalgamation": Amalgamation(
            on_policy=OnPolicy(anneal_steps=2), second_order=False, backend="reference"
        ),
    },
    "several tasks": lambda: {"tasks": [linear_task(), linear_task(3, "narrow")]},
    "convolutions": lambda: {"tasks": convolutional_task()},
    "segments": lambda: {"memory": Memory(segment=2, cells="bfloat16")},
    "first order": lambda: {
        "amalgamation": Amalgamation(
            mechanism="mean", second_order=False, log_objective=False,
            normaliser="every-batch", scale_teachers=True, backend="reference",
        )
    },
}  # fmt: skip


def settings_of(name: str) -> dict[str, Any]:
    """A trainer's; students and teachers are made here, on the CPU."""
    common = {"students": tiny_student(7), "training": EVERY_STEP, "strategy": TWO_WINDOWS}
    return common | RUNS[name]()


def saved(folder: Path) -> list[Tensor]:
    paths = sorted(folder.glob("**/student.safetensors"))
    assert paths
    return [weight for path in paths for weight in load_policy(path).weights()]


def assert_same_runs(one: Path, other: Path) -> None:
    assert all(map(torch.equal, saved(one), saved(other)))
    for row, like in zip(metrics(one), metrics(other), strict=True):
        # A choice validates by the fastest backend, which is another on each device.
        assert row.pop("validation", 0.0) == pytest.approx(like.pop("validation", 0.0), abs=1e-5)
        assert row == like


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run that is all on the CPU, which tests share."""

    @cache
    def folder(name: str) -> Path:
        made: Path = tmp_path_factory.mktemp("on_cpu")
        trainer(made, device="cpu", **settings_of(name)).run()
        return made

    return folder


@pytest.mark.parametrize("name", RUNS)
def test_a_run_elsewhere_is_the_cpus(name, on_cpu, tmp_path) -> None:
    settings = settings_of(name)
    with Elsewhere():
        run = trainer(tmp_path / "there", device=ELSEWHERE, **settings)
        run.run()
        assert {w.device for student in run.students for w in student.weights()} == {ELSEWHERE}
    assert_same_runs(on_cpu(name), tmp_path / "there")


@pytest.mark.parametrize("begun", ["cpu", ELSEWHERE], ids=str)
@pytest.mark.parametrize(
    "name", ["choice", "every teacher", "families", "meta-batch", "pes", "replicates", "strategy"]
)
def test_a_run_goes_on_on_another_device(name, begun, on_cpu, tmp_path) -> None:
    """From the middle of an episode."""
    ended = "cpu" if begun == ELSEWHERE else ELSEWHERE
    first, second = settings_of(name), settings_of(name)
    at = 1 if first["strategy"] is TWO_WINDOWS else 3
    with Elsewhere():
        with pytest.raises(Killed):
            trainer(tmp_path / "cut", device=begun, **first).run(report=killer(at))
        trainer(tmp_path / "cut", device=ended, **second).run(resume=True)
    assert_same_runs(on_cpu(name), tmp_path / "cut")


@pytest.mark.parametrize("count", [1, 8])
def test_an_unroll_is_where_its_task_is(count) -> None:
    """Without a trainer: a task and students that are moved, a window and its way back."""

    def gradients(device: torch.device) -> list[Tensor]:
        students = [student.to(device) for student in starts]
        task = linear_task().to(device)
        unroll = Unroll(task, students, Pool(["adam", "rmsprop"]), REFERENCE)
        begin = unroll.begin(*(generator_for(s, "episode") for s in range(count)))
        by_row = [task.batches(generator_for(s, "batches"), 5) for s in range(count)]
        batches = [
            tuple(torch.stack(parts) for parts in zip(*step, strict=True))
            for step in zip(*by_row, strict=True)
        ]
        window = unroll.window(unroll.warm_up(begin, batches[:2]), batches[2:])
        assert window.end.params.device == window.skipped.device == device
        loss = (window.meta_loss + window.imitation_loss).sum()
        weights = [w for student in students for w in student.weights()]
        return [grad.cpu() for grad in torch.autograd.grad(loss, weights)]

    starts = [tiny_student(s) for s in range(count)]
    here = gradients(torch.device("cpu"))
    with Elsewhere():
        there = gradients(ELSEWHERE)
    assert all(map(torch.equal, here, there))


def test_a_student_elsewhere_is_named() -> None:
    student = tiny_student(0)
    with Elsewhere(), pytest.raises(ValueError, match="student must be on the task's device, meta"):
        Unroll(linear_task().to(ELSEWHERE), student, Pool([]), REFERENCE)


# ---- processes


@pytest.mark.parametrize(
    ("gpus", "backend", "own"),
    [(0, "gloo", []), (2, "cpu:gloo,cuda:nccl", [1]), (1, "cpu:gloo,cuda:nccl", [])],
)
def test_processes_meet_by_what_their_tensors_need(gpus, backend, own, monkeypatch) -> None:
    used, set_to = [], []
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", set_to.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", used.append)
    distributed.join()
    assert used == [backend]
    assert set_to == own


# ---- on a GPU


def digits(folder: Path, device: str, **settings: Any) -> Trainer:
    """Three meta-steps on digits."""
    student = settings.pop("student", None) or Student(generator=generator_for(0, "student"))
    return Trainer(
        student,
        settings.pop("tasks", None) or tasks.load("digits-mlp"),
        settings.pop("pool", None) or Pool(["adam", "rmsprop"]),
        folder=folder,
        amalgamation=settings.pop("amalgamation", None) or Amalgamation(backend="reference"),
        training=Training(validate_every=2, validation_steps=3, checkpoint_every=1),
        strategy=settings.pop("strategy", None) or Stages((Stage(1, 3, 0.1),), 5),
        device=device,
        **settings,
    )


def small_choice() -> Policy:
    return Choice(ChoiceConfig("small", **SMALL), generator=generator_for(0, "choice"))


ON_GPU: dict[str, Callable[[], dict[str, Any]]] = {
    "student": dict,
    "fused": lambda: {"amalgamation": Amalgamation()},
    "choice": lambda: {"student": small_choice(), "pool": Pool([])},
    "pes": lambda: {"estimator": PersistentEvolution(pairs=2)},
    "replicates": lambda: {"student": [tiny_student(0), tiny_student(1)]},
    "meta-batch": lambda: {"strategy": replace(BATCH, meta_steps=3)},
    "families": lambda: {
        "strategy": BATCH,
        "tasks": [LinearFamily(), linear_task(8)],
        "validation": [LinearFamily("held out")],
    },
    "conditions": lambda: {"conditions": CONDITIONS},
    "first order": lambda: {
        "conditions": CONDITIONS,
        "amalgamation": Amalgamation(second_order=False),
    },
    "noise": lambda: {"perturbation": perturbation_of("gaussian")},
    "every teacher": lambda: {"pool": Pool(every_teacher())},
}


def assert_close_runs(one: Path, other: Path) -> None:
    for row, like in zip(metrics(one), metrics(other), strict=True):
        for key in ("meta_loss", "imitation_loss"):
            assert row[key] == pytest.approx(like[key], rel=1e-2, abs=1e-3)
        assert row["loss"] == pytest.approx(like["loss"], rel=1e-3)
        assert row["skipped_steps"] == like["skipped_steps"]
    for weight, like in zip(saved(one), saved(other), strict=True):
        # Where a meta-gradient is rounding alone, Adam goes its rate of 1e-3 either way.
        assert (weight - like).abs().mean() < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_a_run_on_a_gpu_is_close_to_the_cpus(name, tmp_path) -> None:
    digits(tmp_path / "cpu", "cpu", **ON_GPU[name]()).run()
    run = digits(tmp_path / "gpu", "cuda", **ON_GPU[name]())
    run.run()
    assert {w.device.type for student in run.students for w in student.weights()} == {"cuda"}
    assert_close_runs(tmp_path / "gpu", tmp_path / "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize(("begun", "ended"), [("cuda", "cpu"), ("cpu", "cuda")])
@pytest.mark.parametrize("name", ["student", "every teacher"])
def test_a_run_goes_on_off_and_on_a_gpu(name, begun, ended, tmp_path) -> None:
    digits(tmp_path / "whole", "cpu", **ON_GPU[name]()).run()
    with pytest.raises(Killed):
        digits(tmp_path / "cut", begun, **ON_GPU[name]()).run(report=killer(2))
    digits(tmp_path / "cut", ended, **ON_GPU[name]()).run(resume=True)
    assert_close_runs(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.gpu
def test_what_the_allocator_keeps_is_free() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    size = 2**28
    torch.empty(size, dtype=torch.uint8, device=device)
    kept = free_bytes(device)
    torch.cuda.empty_cache()
    assert kept > free_bytes(device) - size // 2
