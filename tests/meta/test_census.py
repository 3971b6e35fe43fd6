"""What a window asks of a device: how often the host waits for it, and how many launches a step is.

Counted on a device that pretends (see ``elsewhere``). An operation of this package counts as one
launch: how many its kernels make of it, their own tests and bench/gpu say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from elsewhere import ELSEWHERE, Census, Elsewhere
from runs import linear_task, tiny_student, trainer

from amalgam import tasks
from amalgam.meta import (
    Amalgamation,
    MetaBatch,
    OnPolicy,
    PersistentEvolution,
    Stage,
    Stages,
    Training,
    Unroll,
)
from amalgam.meta.episode import Episodes
from amalgam.meta.tape import Tape
from amalgam.meta.window import WindowInputs
from amalgam.operations import registry
from amalgam.policies import NominalConfig, NominalStudent, Policy, Pool, Student, StudentConfig
from amalgam.policies import pool as pools
from amalgam.seeding import generator_for
from amalgam.tasks.task import Batches


def nominal(seed: int) -> Policy:
    config = NominalConfig(hidden=2, pacing=0.03, inputs=("time", "rms"))
    return NominalStudent(config, generator=generator_for(seed))


def paper(seed: int) -> Policy:
    return Student(StudentConfig(hidden=2), generator=generator_for(seed))


@pytest.fixture
def census(monkeypatch: pytest.MonkeyPatch) -> Census:
    """Counts the engine's own launches, not those of the optimizees' passes or of a backend."""
    made = Census()

    def within(block: Callable[[], AbstractContextManager[None]], call: Callable[..., Any]) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with block():
                return call(*args, **kwargs)

        return wrapped

    def compute(operation: str, *args: Any, **how: Any) -> Any:
        with made.one(operation):
            return plain(operation, *args, **how)

    plain = registry.compute
    monkeypatch.setattr(registry, "compute", compute)
    teachers = within(lambda: made.one("teacher_step"), pools.step_together)
    monkeypatch.setattr(pools, "step_together", teachers)
    for owner, name in ((Episodes, "gradients"), (Tape, "_hessian_product")):
        monkeypatch.setattr(owner, name, within(made.paused, getattr(owner, name)))
    return made


class Counts:
    """Of a window with its meta-gradient: the launches of an inner step, and the waits."""

    def __init__(
        self,
        census: Census,
        make: Callable[[int], Policy] = paper,
        replicates: int = 1,
        held_out: bool = False,
        **how: Any,
    ) -> None:
        settings = Amalgamation(backend="reference", **how)
        task = tasks.load("digits-cnn", batch_size=4)  # what is launched depends on no sizes
        students = [make(seed) for seed in range(replicates)]
        with Elsewhere(census):
            task = task.to(ELSEWHERE)
            students = [student.to(ELSEWHERE) for student in students]
            unroll = Unroll(task, students, Pool(["adam", "rmsprop"]), settings)

            def generators(purpose: str) -> Any:
                return (generator_for(row, purpose) for row in range(replicates))

            begin = unroll.begin(*generators("episode"))
            counts, waits = [], []
            for steps in (2, 2, 4):  # the first one makes what is made but once
                drawn = [
                    Batches.stack([task.batches(each, steps) for each in generators(purpose)])
                    for purpose in ("batches", "held out")
                ]
                given = WindowInputs(begin, drawn[0], [s.weights() for s in students])
                if held_out:
                    given = given._replace(held_out=drawn[1])
                census.launches.clear()
                census.waits.clear()
                unroll.meta_gradient(given, (1.0, 0.1))
                counts.append(Counter(census.launches))
                waits.append(list(census.waits))
        assert waits[1] == waits[2]
        self.waits = waits[2]
        self.of_step = {
            name: (counts[2][name] - counts[1][name]) / 2
            for name in counts[2]
            if counts[2][name] != counts[1][name]
        }
        self.launches = sum(self.of_step.values())


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"second_order": False},
        {"make": nominal, "scale_spread": 0.0},
        {"make": nominal, "scale_spread": 0.0, "second_order": False},
        {"log_objective": False, "normaliser": "every-batch"},
        {"held_out": True, "objective": "final"},
        {"on_policy": OnPolicy(), "second_order": False},
        {"replicates": 3},
    ],
)
def test_a_window_waits_once(how, census) -> None:
    """For whether anything in it should have been skipped; however many steps it has."""
    assert Counts(census, **how).waits == ["aten._local_scalar_dense"]


@pytest.mark.parametrize("how", [{}, {"second_order": False}])
def test_an_inner_step_is_some_launches(how, census) -> None:
    counts = Counts(census, **how)
    assert counts.launches <= 50, counts.of_step


@pytest.mark.parametrize("make", [paper, nominal])
def test_an_inner_step_of_many_replicates_is_one_launch_more(make, census) -> None:
    """Teachers' gradients come row by row and are stepped teacher by teacher: a copy of several."""
    how = {"make": make, "scale_spread": 0.0}
    one, many = Counts(census, **how), Counts(census, replicates=64, **how)
    assert many.launches <= one.launches + 1, (one.of_step, many.of_step)


def waits_of_meta_steps(folder: Path, census: Census, **settings: Any) -> list[int]:
    """How often the host waited in each meta-step but the first; no episode begins in them."""
    seen: list[int] = []
    with Elsewhere(census):
        run = trainer(
            folder,
            device=ELSEWHERE,
            training=Training(validate_every=0, checkpoint_every=100),
            amalgamation=Amalgamation(scale_spread=1.0, backend="reference"),
            **settings,
        )
        take = run._meta_steps.take

        def counting(*args: Any) -> Any:
            before = len(census.waits)
            found = take(*args)
            seen.append(len(census.waits) - before)
            return found

        run._meta_steps.take = counting  # type: ignore[method-assign]
        run.run()
    return seen[1:]


@pytest.mark.parametrize(
    "settings",
    [
        {"students": [tiny_student(0)]},
        {"students": [tiny_student(seed) for seed in range(3)]},
        {"students": tiny_student(0), "estimator": PersistentEvolution(pairs=3)},
    ],
    ids=["one", "replicates", "particles"],
)
def test_a_meta_step_waits_for_the_window_and_for_its_numbers(settings, census, tmp_path) -> None:
    waits = waits_of_meta_steps(
        tmp_path,
        census,
        tasks=linear_task(),
        strategy=Stages((Stage(1, 5, 0.1),), 3),
        **settings,
    )
    assert waits == [2] * 4


def test_slots_wait_once_more_for_their_mean(census, tmp_path) -> None:
    waits = waits_of_meta_steps(
        tmp_path,
        census,
        tasks=linear_task(),
        students=tiny_student(0),
        strategy=MetaBatch(4, slots=3, unroll=3, shortest=60, longest=60),
    )
    assert waits == [2 * 3 + 1] * 3
