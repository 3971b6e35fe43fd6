"""Conditions that episodes draw: what is drawn, and what runs make of it."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from runs import linear_task, metrics, policies, resumes_to_the_same_bits, tiny_student, trainer

from amalgam import recipes
from amalgam.experiment import Experiment
from amalgam.lr_decays import LR_DECAYS
from amalgam.meta import (
    Amalgamation,
    Conditions,
    MetaBatch,
    PersistentEvolution,
    Stage,
    Stages,
    Training,
    Unroll,
)
from amalgam.meta.conditions import Drawn, StepConditions
from amalgam.policies import Pool
from amalgam.recipes import RecipeError
from amalgam.seeding import generator_for

ALL = Conditions(
    weight_decay=(1e-3, 0.1),
    weight_decay_zero=0.25,
    lr=(0.5, 2.0),
    lr_decays=LR_DECAYS,
    loss_scale=(-2.0, 2.0),
)
PLAIN = Training(validate_every=0)
RESUMED = Training(validate_every=3, validation_steps=4, validation_seeds=1, checkpoint_every=1)
SHORT = Stages((Stage(2, 2, 0.1),), 3)
ONE = Stages((Stage(1, 2, 0.1),), 3)
BATCH = MetaBatch(2, slots=2, unroll=2, shortest=2, longest=6, imitation_weight=0.1)


def test_what_is_drawn() -> None:
    drawn = [ALL.draw(generator_for(number, "conditions")) for number in range(1000)]
    decays = [one.weight_decay for one in drawn]
    # 250 of 1000 in the mean, with a standard deviation of 13.7.
    assert abs(decays.count(0.0) - 250) < 55
    some = [decay for decay in decays if decay]
    assert 1e-3 <= min(some) < 1.3e-3
    assert 0.08 < max(some) <= 0.1
    for values, middle in ((some, 0.01), ([one.lr for one in drawn], 1.0)):
        below = sum(value < middle for value in values)
        # Half of n lie below the geometric mean, with a standard deviation of sqrt(n) / 2.
        assert abs(below - len(values) / 2) < 4 * math.sqrt(len(values)) / 2
    for kind in LR_DECAYS:
        # A third of 1000, with a standard deviation of 14.9.
        assert abs(sum(one.lr_decay == kind for one in drawn) - 333) < 60
    exponents = [math.log10(one.loss_scale) for one in drawn]
    assert -2 <= min(exponents) < -1.9 < 1.9 < max(exponents) <= 2
    assert abs(sum(exponents) / 1000) < 4 * (4 / math.sqrt(12)) / math.sqrt(1000)


def test_nothing_is_drawn_by_default() -> None:
    assert not Conditions().any
    assert Conditions().draw(generator_for(0)) == Drawn(0.0, 1.0, "constant", 1.0)
    for part in (
        {"weight_decay": (0.1, 0.1)},
        {"lr": (2.0, 2.0)},
        {"lr_decays": ("linear",)},
        {"loss_scale": (0.0, 1.0)},
    ):
        assert Conditions(**part).any


def test_rates_over_the_horizon() -> None:
    def left(kind: str) -> list[float]:
        return [Drawn(0.0, 2.0, kind, 1.0).left_at(step, 4) for step in (0, 1, 2, 3)]

    assert left("constant") == [1.0] * 4
    assert left("linear") == [1.0, 0.75, 0.5, 0.25]
    quarter = math.sqrt(0.125)
    assert left("cosine") == pytest.approx([1.0, 0.5 + quarter, 0.5, 0.5 - quarter])
    window = StepConditions.of([Drawn(0.1, 2.0, "linear", 7.0)], 1, 2, 4, torch.zeros(()))
    assert window.lr.tolist() == [[1.5], [1.0]]
    assert window.left.tolist() == [[0.75], [0.5]]
    assert window.kept[:, 0].tolist() == pytest.approx([0.85, 0.9])
    assert window.loss_scale.tolist() == [7.0]


RUNS: dict[str, dict[str, Any]] = {
    "batch": {"strategy": BATCH},
    "noise": {"strategy": ONE, "training": replace(RESUMED, optimizees=2, input_noise=0.01)},
    "pes": {"strategy": BATCH, "estimator": PersistentEvolution(pairs=2)},
    "choice": {"strategy": ONE, "students": lambda: policies()["choice"], "pool": ()},
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_resume(name, tmp_path) -> None:
    how = {"training": RESUMED} | RUNS[name]
    make = how.pop("students", lambda: tiny_student(7))

    def run(folder, **more):
        tasks = [linear_task(3, "three"), linear_task(4, "four")]
        return trainer(folder, make(), tasks=tasks, **how, **more)

    rows = resumes_to_the_same_bits(lambda folder: run(folder, conditions=ALL), tmp_path)
    assert {row["skipped_meta_steps"] for row in rows} == {0}
    run(tmp_path / "plain").run()
    plain = metrics(tmp_path / "plain")
    assert all(
        one["meta_loss"] != other["meta_loss"] for one, other in zip(rows, plain, strict=True)
    )
    for one, other in zip(rows, plain, strict=True):
        for teacher in set(other["loss"]) - {"student"}:
            assert one["loss"][teacher] == other["loss"][teacher]


def test_nothing_to_draw_changes_no_bit(tmp_path) -> None:
    found = [
        trainer(tmp_path / str(number), training=PLAIN, strategy=SHORT, conditions=one).run()
        for number, one in enumerate((None, Conditions()))
    ]
    assert all(map(torch.equal, *(student.weights() for student in found)))


def test_replicates_meet_their_own_conditions(tmp_path) -> None:
    how = {"training": PLAIN, "strategy": SHORT, "conditions": ALL}
    both = [tiny_student(7), tiny_student(8)]
    trainer(tmp_path / "both", both, **how).run()
    for seed, replicate in zip((7, 8), both, strict=True):
        alone = trainer(tmp_path / str(seed), tiny_student(seed), seed=seed, **how).run()
        for one, other in zip(alone.weights(), replicate.weights(), strict=True):
            assert torch.allclose(one, other, atol=1e-5)


def test_another_runs_conditions_are_refused(tmp_path) -> None:
    trainer(tmp_path, training=PLAIN, strategy=SHORT, conditions=ALL).run()
    with pytest.raises(ValueError, match="belongs to a run with conditions = "):
        trainer(tmp_path, training=PLAIN, strategy=SHORT).run(resume=True)


def test_in_the_warm_up_students_see_scaled_gradients_and_nothing_else_changes() -> None:
    task = linear_task()
    unroll = Unroll(task, tiny_student(3), Pool(["adam"]), Amalgamation(backend="reference"))
    begin = unroll.begin(generator_for(1))
    batches = [tuple(t[None] for t in batch) for batch in task.batches(generator_for(2), 3)]
    plain = unroll.warm_up(begin, batches, 0.1)
    scaled = unroll.warm_up(begin, batches, 0.1, torch.tensor([16.0]))
    assert torch.equal(plain.params, scaled.params)
    assert torch.equal(plain.teacher_params, scaled.teacher_params)
    assert torch.equal(16 * plain.state.m, scaled.state.m)
    assert torch.equal(256 * plain.state.v, scaled.state.v)
    for one, other in zip(plain.teacher_state, scaled.teacher_state, strict=True):
        assert torch.equal(one.m, other.m)


# ---- recipes

RECIPE: dict[str, Any] = {
    "tasks": [{"name": "digits-mlp", "batch_size": 16}, {"name": "digits-cnn", "batch_size": 8}],
    "teachers": [{"kind": "adam"}],
    "threads": 1,
    "student": {"hidden": 4, "layers": 1, "warmup_steps": 2},
    "training": {"validate_every": 0},
    "strategy": {
        "kind": "meta-batch", "meta_steps": 2, "slots": 2, "unroll": 2, "shortest": 2, "longest": 6
    },
    "conditions": {
        "weight_decay": [1e-4, 1e-2], "lr": [0.3, 3.0], "lr_decays": ["constant", "linear"],
        "loss_scale": [-1, 1],
    },
    "evaluation": {"tasks": ["digits-mlp"], "steps": 4, "seeds": 1},
}  # fmt: skip


def test_a_recipe_draws_conditions(tmp_path) -> None:
    recipe = recipes.from_dict(RECIPE)
    assert recipes.from_dict(recipe.as_dict()) == recipe
    assert recipe.conditions.lr_decays == ("constant", "linear")
    assert Experiment(recipe, tmp_path).trainer.conditions == recipe.conditions


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("weight_decay", [0.0, 0.1], "weight_decay must be positive and finite, not 0.0"),
        ("weight_decay", [0.1, 0.01], "weight_decay must be two positive .* smaller one first"),
        ("weight_decay", [0.1, 0.5], r"weight_decay must be below 1 / 3.0, .* not 0.5"),
        ("weight_decay_zero", 1.5, r"weight_decay_zero must be in \[0, 1\], not 1.5"),
        ("lr", [0.0, 1.0], "lr must be positive and finite, not 0.0"),
        ("lr", [1.0], "conditions.lr"),
        ("lr_decays", [], "lr_decays must be one or more of"),
        ("lr_decays", ["step"], "lr_decays.0: .*'constant', 'linear' or 'cosine', not 'step'"),
        ("loss_scale", [1.0, 0.0], "loss_scale must be two exponents, the smaller one"),
        ("weight_decai", 0.1, "'conditions.weight_decai'; the nearest is 'conditions.weight_decay"),
    ],
)
def test_bad_keys_are_named(key, value, named) -> None:
    with pytest.raises(RecipeError, match=named):
        recipes.from_dict({**RECIPE, "conditions": {**RECIPE["conditions"], key: value}})
