"""Runs side by side are the runs that each is alone, in one pass a step."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from elsewhere import ELSEWHERE, Census, Elsewhere
from torch import Tensor, nn
from torch.nn import functional

from amalgam import NominalConfig, NominalStudent
from amalgam.evaluation import Contender, Curve, Readings, Runner, train
from amalgam.evaluation import runner as runner_module
from amalgam.evaluation.cache import RunCache
from amalgam.evaluation.contenders import baseline, student_contender, teacher_contenders
from amalgam.evaluation.rows import Row, most_rows, obstacle, seconds_a_step, train_rows
from amalgam.evaluation.runner import Progress, Run
from amalgam.policies import Pool
from amalgam.seeding import generator_for
from amalgam.tasks import PrivateGradient, Task

READINGS = Readings((2, 4), (3, 9))


def a_task(*layers: nn.Module, **more: Any) -> Task:
    x = torch.randn(60, 4, generator=generator_for(1))
    y = (x[:, 0] * x[:, 1] > 0).long()

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), *copy.deepcopy(layers), nn.Tanh(), nn.Linear(6, 2))

    more = {"batch_size": 8} | more
    return Task("net", build, (x[:40], y[:40]), (x[40:], y[40:]), **more)


def images() -> Task:
    x = torch.randn(60, 1, 6, 6, generator=generator_for(1))
    y = (x.mean((1, 2, 3)) > 0).long()

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2)
        )

    return Task("images", build, (x[:40], y[:40]), (x[40:], y[40:]), batch_size=8)


class Tied(nn.Module):
    """One matrix at both ends, and a constant between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.fixed = nn.Parameter(torch.randn(4), requires_grad=False)
        self.register_buffer("shift", torch.randn(4))
        self.last = nn.Linear(4, 4, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.first(x) + self.shift).tanh() * self.fixed)[:, :2]


def tied() -> Task:
    x = torch.randn(60, 4, generator=generator_for(1))
    y = torch.randn(60, 2, generator=generator_for(2))
    data = (x[:40], y[:40]), (x[40:], y[40:])
    return Task("tied", Tied, *data, loss=functional.mse_loss, batch_size=8)


def student(**more: Any) -> NominalStudent:
    config = NominalConfig(pacing=0.05, orthogonal=True, **more)
    return NominalStudent(config, generator=generator_for(2))


CONTENDERS = {
    "Adam": baseline("Adam", (("lr", 0.02),), "linear"),
    "AdamW": baseline("AdamW", (("lr", 0.01), ("weight_decay", 0.1)), "constant"),
    "SGD": baseline("SGD", (("lr", 0.1), ("momentum", 0.9)), "constant"),
    "RMSprop": baseline("RMSprop", (("lr", 0.01),), "linear"),
    "Muon": baseline("Muon", (("lr", 0.02),), "constant"),
    "nominal": student_contender("nominal", student()).decaying("linear"),
}


def rows_of(*contenders: Contender, seeds: int = 2) -> list[Row]:
    return [Row(one.make, seed, one.decay) for one in contenders for seed in range(seeds)]


def alone(task: Task, rows: list[Row], steps: int, readings: Readings = READINGS) -> list[Curve]:
    return [
        train(task, row.make, steps=steps, seed=row.seed, readings=readings, decay=row.decay)
        for row in rows
    ]


def assert_alike(found: list[Curve], expected: list[Curve]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.steps == theirs.steps
        assert ours.state_bytes == theirs.state_bytes
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-4, nan_ok=True)
        assert ours.accuracies == pytest.approx(theirs.accuracies, nan_ok=True)
        for one, other in zip(ours.full, theirs.full, strict=True):
            assert one == pytest.approx(other, rel=1e-4, nan_ok=True)
        assert math.isnan(ours.seconds)


@pytest.mark.parametrize("make", [a_task, images, tied])
def test_runs_side_by_side_are_what_each_is_alone(make: Any) -> None:
    task, rows = make(), rows_of(*CONTENDERS.values())
    found = train_rows(task, rows, steps=9, readings=READINGS)
    assert_alike(found, alone(task, rows, 9))
    assert len({curve.final for curve in found}) == len(found)


def test_a_run_that_has_ended_steps_no_more() -> None:
    steps = []

    class Exploding(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            if any(bool(p.isnan().any()) for group in self.param_groups for p in group["params"]):
                raise ValueError("nan")
            steps.append(None)
            for group in self.param_groups:
                for param in group["params"]:
                    param.data.fill_(math.nan)

    rows = [Row(partial(Exploding, lr=1.0), 3, name="bad"), *rows_of(CONTENDERS["SGD"])]
    found = train_rows(a_task(), rows, steps=5, readings=Readings((1,)))
    assert len(steps) == 1
    assert [curve.diverged for curve in found] == [True, False, False]
    with pytest.raises(ValueError, match="nan") as raised:
        train_rows(a_task(), rows, steps=5, readings=Readings())
    assert raised.value.__notes__ == ["in the run of bad, seed 3"]


def test_a_step_of_all_is_one_pass() -> None:
    calls = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        calls.append(output.shape)
        return functional.cross_entropy(output, target)

    task, counts = a_task(loss=loss), []
    assert obstacle(task) is None
    for seeds in (1, 5):
        for steps in (0, 6):
            calls.clear()
            train_rows(
                task, rows_of(CONTENDERS["SGD"], seeds=seeds), steps=steps, readings=Readings()
            )
            counts.append(len(calls))
    none, six, none_of_five, six_of_five = counts
    # The last step's reading is each row's own.
    assert six - none == 6 + 1
    assert six_of_five - none_of_five == 6 + 5


@pytest.mark.parametrize("make", [a_task, images])
def test_a_run_that_is_not_finite_leaves_the_others_alone(make: Any) -> None:
    exploding = Contender(
        "exploding", partial(torch.optim.SGD, lr=1e20, weight_decay=1e20), draws=False
    )
    task, rows = make(), rows_of(CONTENDERS["Adam"], exploding, CONTENDERS["nominal"])
    found = train_rows(task, rows, steps=9, readings=READINGS)
    assert_alike(found, alone(task, rows, 9))
    assert [curve.diverged for curve in found] == [False, False, True, True, False, False]
    assert math.isnan(found[2].final)


class Averaging(nn.Module):
    """Keeps a running mean in a buffer, which vmap lets it do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return self.linear(x - self.mean)


class Idle(nn.Module):
    """Has a parameter that nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.idle = nn.Linear(4, 2), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def test_what_can_not_go_side_by_side_says_why() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 2, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).double()).float()

    def of(module: type[nn.Module]) -> Task:
        data = a_task()
        return Task(module.__name__, module, data.train, data.validation, batch_size=8)

    private = a_task(gradient=PrivateGradient(1.0, 1.0))
    for task, why in (
        (a_task(nn.BatchNorm1d(6)), "vmap|running"),
        (a_task(nn.Dropout(0.5)), "draw random numbers"),
        (private, "its gradients are PrivateGradient"),
        (of(Mixed), "of several dtypes"),
        (of(Averaging), "buffers change"),
        (of(Idle), "have no gradients"),
    ):
        assert obstacle(task) is not None
        with pytest.raises(ValueError, match=f"task must be .* not '{task.name}': .*({why})"):
            train_rows(task, rows_of(CONTENDERS["SGD"]), steps=1, readings=READINGS)
    with pytest.raises(ValueError, match="decay must be one of .*, not 'slow'"):
        train_rows(a_task(), [Row(CONTENDERS["SGD"].make, 0, "slow")], steps=1, readings=READINGS)


def runs(contenders: list[Contender], tasks: int = 1, seeds: int = 3) -> list[Run]:
    return [
        Run(task, one, seed, 4, READINGS)
        for task in range(tasks)
        for one in contenders
        for seed in range(seeds)
    ]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call had."""
    sizes: list[int] = []

    def noted(task: Task, rows: list[Row], **how: Any) -> list[Curve]:
        sizes.append(len(rows))
        return train_rows(task, rows, **how)

    monkeypatch.setattr("amalgam.evaluation.runner.train_rows", noted)
    return sizes


def test_a_runner_groups_what_can_go_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = counted(monkeypatch)
    own = Contender("own", partial(torch.optim.SGD, lr=0.1))  # nobody knows whether it draws
    everybody = [*CONTENDERS.values(), own, *teacher_contenders(Pool(["sgd"]))]
    asked = runs(everybody, tasks=2)
    tasks = [a_task(), a_task(nn.BatchNorm1d(6))]
    with Runner(tasks, rows=True) as runner:
        found = runner.run(asked)
    with Runner(tasks) as runner:
        expected = runner.run(asked)
    assert sizes == [3 * len(CONTENDERS)]
    for run, ours, theirs in zip(asked, found, expected, strict=True):
        together = run.task == 0 and run.contender.name in {c.name for c in CONTENDERS.values()}
        if together:
            assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)
        else:
            assert ours.losses == theirs.losses
        assert ours.seconds > 0


def test_a_runner_that_was_stopped_goes_on_to_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sizes = counted(monkeypatch)
    monkeypatch.setattr("amalgam.evaluation.runner.most_rows", lambda task: 4)
    asked = runs([CONTENDERS["Adam"], CONTENDERS["Muon"], CONTENDERS["nominal"]])
    with Runner([a_task()], rows=True) as runner:
        expected = [curve.untimed().as_dict() for curve in runner.run(asked)]
    assert sizes == [4, 4, 1]

    def stop(progress: Progress) -> None:
        if progress.runs == 6:
            raise KeyboardInterrupt

    cache = RunCache(tmp_path)
    with (
        pytest.raises(KeyboardInterrupt),
        Runner([a_task()], cache=cache, report=stop, rows=True) as r,
    ):
        r.run(asked)
    sizes.clear()
    with Runner([a_task()], cache=cache, rows=True) as runner:
        again = [curve.untimed().as_dict() for curve in runner.run(asked)]
    # Of the second group four are made again, though two are there.
    assert sizes == [4, 1]
    assert again == expected
    # Runs one by one have other bits, and are others in the cache.
    sizes.clear()
    with Runner([a_task()], cache=cache) as runner:
        assert runner.run(asked[:1])[0].as_dict() != expected[0]
    assert not sizes


def test_what_memory_does_not_hold_at_once_goes_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = counted(monkeypatch)
    noted = runner_module.train_rows

    def of_three(task: Task, rows: list[Row], **how: Any) -> list[Curve]:
        if len(rows) > 3:
            raise torch.OutOfMemoryError
        return noted(task, rows, **how)

    monkeypatch.setattr("amalgam.evaluation.runner.train_rows", of_three)
    asked = runs([CONTENDERS["Adam"], CONTENDERS["SGD"]])
    with Runner([a_task()], rows=True) as runner:
        found = runner.run(asked)
    assert sizes == [3, 3]
    assert_alike(
        [curve.untimed() for curve in found],
        alone(a_task(), rows_of(CONTENDERS["Adam"], CONTENDERS["SGD"], seeds=3), 4),
    )


def test_processes_share_the_rows_of_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = runs([CONTENDERS["Adam"], CONTENDERS["SGD"]])
    shares, kept = [], []
    for rank in range(2):
        kept.clear()
        sizes = counted(monkeypatch)
        monkeypatch.setattr("amalgam.distributed.world", lambda: 2)
        monkeypatch.setattr("amalgam.distributed.rank", lambda rank=rank: rank)
        # Of two GPUs one has memory for two rows.

        def from_all(value: Any) -> list[Any]:
            kept.append(value)
            return [[2], value] if isinstance(value, list) else [value, dict.fromkeys(range(6))]

        monkeypatch.setattr("amalgam.distributed.from_all", from_all)
        with Runner([a_task()], rows=True) as runner:
            runner.run(asked)
        shares.append((sizes, sorted(kept[-1])))
    assert shares == [([2, 2], [0, 1, 4, 5]), ([2], [2, 3])]


def test_a_time_is_told_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    timed = []

    def noted(task: Task, make: Any) -> float:
        timed.append(make)
        return seconds_a_step(task, make)

    monkeypatch.setattr("amalgam.evaluation.runner.seconds_a_step", noted)
    adam, muon = CONTENDERS["Adam"], CONTENDERS["Muon"]
    asked = [
        *(Run(0, adam, seed, 4, READINGS) for seed in range(2)),
        *(Run(0, muon, seed, 4, READINGS, timed=False) for seed in range(2)),
    ]
    with Runner([a_task()], rows=True) as runner:
        first, second, *others = runner.run(asked)
    assert timed == [adam.make]
    assert first.seconds == second.seconds > 0
    assert all(math.isnan(curve.seconds) for curve in others)
    # What is kept without a time is no answer to who asks for one.
    cache = RunCache(tmp_path)
    for run in (asked[2], asked[2]._replace(timed=True)):
        with Runner([a_task()], cache=cache, rows=True) as runner:
            (curve,) = runner.run([run])
    assert curve.seconds > 0


def test_rows_and_processes_are_two_ways() -> None:
    with pytest.raises(ValueError, match="jobs must be 1 .* not 2"):
        Runner([a_task()], jobs=2, rows=True)
    assert most_rows(a_task()) > 1


class Still(torch.optim.SGD):
    """Leaves everything as it is: an optimizer's step is each run's own."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


def test_many_runs_take_two_launches_more_than_one_and_no_waits() -> None:
    still = Contender("still", partial(Still, lr=0.1), draws=False)
    launches, waits = [], []
    for seeds in (1, 16):
        for steps in (2, 6):
            with Elsewhere(census := Census()):
                task = images().to(ELSEWHERE)
                rows = rows_of(still, seeds=seeds)
                train_rows(task, rows, steps=steps, readings=Readings())
            launches.append(sum(census.launches.values()))
            waits.append(len(census.waits))
    assert waits[1] == waits[0]
    assert waits[3] == waits[2]
    # 43 a step of one, and two copies more of many.
    assert launches[3] - launches[2] <= launches[1] - launches[0] + 4 * 2


@pytest.mark.gpu
@pytest.mark.parametrize("make", [a_task, images, tied])
def test_rows_on_a_gpu_are_close_to_the_cpus_runs(make: Any) -> None:
    rows = rows_of(*CONTENDERS.values())
    found = train_rows(make().to("cuda"), rows, steps=5, readings=READINGS)
    for ours, theirs in zip(found, alone(make(), rows, 5), strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-3)
