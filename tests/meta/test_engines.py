"""Meta-training on task families: an episode draws its task, and a resumed run draws it again."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from runs import (
    LinearFamily,
    linear_task,
    metrics,
    policies,
    resumes_to_the_same_bits,
    tiny_student,
    trainer,
)

from amalgam import recipes
from amalgam.experiment import Experiment
from amalgam.meta import (
    Conditions,
    MetaBatch,
    PersistentEvolution,
    Repeat,
    Stage,
    Stages,
    Training,
)
from amalgam.meta.periods import UnrollSettings
from amalgam.meta.perturbation import Gaussian
from amalgam.recipes import RecipeError
from amalgam.tasks import Task

PLAIN = Training(validate_every=0)
RESUMED = Training(validate_every=3, validation_steps=4, validation_seeds=2, checkpoint_every=1)
TINY = MetaBatch(3, slots=2, unroll=2, shortest=2, longest=6, imitation_weight=0.1)
STAGES = Stages((Stage(2, 2, 0.1),), 3)
ONE = UnrollSettings(2, 1, 2, 1, 0.05)
REPEAT = Repeat(unroll=2, episodes=1, num_periods=2, windows=(1, 2), validation=ONE)


def two_families() -> list[Any]:
    return [LinearFamily(), linear_task(), LinearFamily("others", 16)]


RUNS: dict[str, dict[str, Any]] = {
    "meta-batch": {},
    "one family": {"tasks": LinearFamily, "strategy": replace(TINY, slots=3)},
    "stages": {"strategy": STAGES},
    "repeat": {"strategy": REPEAT},
    "noise": {
        "perturbation": Gaussian(0.01, relative=True),
        "training": replace(RESUMED, input_noise=0.05, il_mode="switch", optimizees=2),
        "strategy": replace(TINY, imitation_weight=0.5),
    },
    "conditions": {"conditions": Conditions(weight_decay=(1e-3, 1e-2), lr=(0.5, 2.0))},
    "pes": {"estimator": PersistentEvolution(pairs=2)},
    "replicates": {"students": lambda: [tiny_student(7), tiny_student(8)]},
    # Its state has a part for every tensor, not for every coordinate alone.
    "hierarchical": {"students": lambda: policies()["scale"], "strategy": STAGES},
    "validation": {"validation": lambda: [LinearFamily("held out"), linear_task(3)]},
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_resume(name, tmp_path) -> None:
    how = {"training": RESUMED, "strategy": TINY} | RUNS[name]
    students = how.pop("students", lambda: tiny_student(7))
    tasks, held_out = how.pop("tasks", two_families), how.pop("validation", list)

    def run(folder):
        return trainer(folder, students(), tasks=tasks(), validation=held_out(), **how)

    rows = resumes_to_the_same_bits(run, tmp_path)
    assert {row["skipped_meta_steps"] for row in rows} == {0}


def test_every_episode_draws_its_task(tmp_path) -> None:
    """It keeps it to its end, no other episode has it, and no more are kept than slots."""
    batch = MetaBatch(12, slots=3, unroll=2, shortest=2, longest=8)
    run = trainer(tmp_path, tasks=LinearFamily(), training=PLAIN, strategy=batch)
    run.run()
    rows = metrics(tmp_path)
    of_episode: dict[int, set[str]] = {}
    for row in rows:
        for slot in row["slots"]:
            of_episode.setdefault(slot["episode"], set()).add(slot["task"])
    assert len(of_episode) > 6
    assert all(len(names) == 1 for names in of_episode.values())
    assert len(set.union(*of_episode.values())) == len(of_episode)
    assert any(
        now["episode"] == then["episode"]
        for row, following in pairwise(rows)
        for now, then in zip(row["slots"], following["slots"], strict=True)
    )
    assert len(run._meta_steps.engines._of_slots) == 3


def test_the_seed_decides_what_is_drawn(tmp_path) -> None:
    def names(folder: str, **how: Any) -> list[str]:
        settings = {"tasks": LinearFamily(), "training": PLAIN, "strategy": STAGES, "seed": 7} | how
        trainer(tmp_path / folder, **settings).run()
        return [row["task"] for row in metrics(tmp_path / folder) if not row.get("replicate")]

    one = names("one")
    assert one[0] == one[1] != one[2] == one[3]
    assert names("other", seed=8)[0] != one[0]
    both = [tiny_student(7), tiny_student(8)]
    assert names("both", students=both, training=replace(PLAIN, optimizees=2)) == one


def test_replicates_are_single_runs(tmp_path) -> None:
    both = [tiny_student(7), tiny_student(8)]
    how = {"tasks": two_families(), "training": PLAIN, "strategy": TINY}
    trainer(tmp_path / "both", both, **how).run()
    alone = trainer(tmp_path / "alone", tiny_student(7), **how).run()
    for one, other in zip(alone.weights(), both[0].weights(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


# ---- validation


@dataclass(frozen=True)
class Noted(LinearFamily):
    """Notes what it draws in ``seen``, by its name."""

    seen: Any = None

    def draw(self, generator: torch.Generator) -> Task:
        task = super().draw(generator)
        self.seen.append(task.name)
        return task


def test_validations_draw_the_same_tasks_and_none_of_trainings(tmp_path) -> None:
    seen: list[str] = []
    training = replace(RESUMED, validate_every=2, validation_seeds=3)
    batch = replace(TINY, meta_steps=6, slots=1, longest=2)
    for seed in (7, 8):
        family = Noted(seen=seen)
        run = trainer(
            tmp_path / str(seed), tasks=family, training=training, strategy=batch, seed=seed
        )
        run.run()
    trained = {slot["task"] for row in metrics(tmp_path / "8") for slot in row["slots"]}
    trained |= {slot["task"] for row in metrics(tmp_path / "7") for slot in row["slots"]}
    validated = [name for name in seen if name not in trained]
    assert len(trained) == 12
    assert len(validated) == 2 * 3 * 3
    assert validated == 6 * validated[:3]
    assert len(set(validated)) == 3


@pytest.mark.parametrize("strategy", [TINY, REPEAT], ids=["final loss", "meta-loss"])
def test_other_families_validate(strategy, tmp_path) -> None:
    trained, validated = [], []
    run = trainer(
        tmp_path,
        tasks=Noted("trained", seen=trained),
        validation=[Noted("validated", seen=validated), linear_task(name="plain")],
        training=RESUMED,
        strategy=strategy,
    )
    student = run.run()
    rows = metrics(tmp_path)
    key = "validation" if strategy is TINY else "meta_validation"
    scores = [row[key] for row in rows if key in row]
    assert scores
    assert validated
    episodes = {slot["episode"] for row in rows for slot in row.get("slots", [row])}
    # The first is drawn twice: the run tries it out before it begins.
    assert len(set(trained)) == len(episodes)
    assert student.provenance["data"] == "trained, batches up to 24"
    assert student.provenance["validation_data"].startswith("validated, batches up to 24; plain:")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tasks": LinearFamily(batch_size=32)}, "tasks = linears, batches up to 24, weight 1"),
        ({"validation": [LinearFamily()]}, "tasks = .*, not .*; validation: linears, batches up"),
    ],
)
def test_a_run_of_another_family_is_refused(changes, named, tmp_path) -> None:
    trainer(tmp_path, tasks=LinearFamily(), strategy=TINY).run()
    with pytest.raises(ValueError, match=named):
        trainer(tmp_path, **{"tasks": LinearFamily(), "strategy": TINY} | changes).run(resume=True)


class Numbers(LinearFamily):
    def draw(self, generator: torch.Generator) -> Task:
        return 3  # type: ignore[return-value]


def test_a_family_that_draws_no_task_is_named(tmp_path) -> None:
    run = trainer(tmp_path, tasks=Numbers(), strategy=TINY)
    with pytest.raises(ValueError, match="draw of the family 'linears' must return .*Task, not 3"):
        run.run()


# ---- recipes

SMALL = {"smallest_batch": 4, "parameters": [300, 400]}
RECIPE: dict[str, Any] = {
    "tasks": [
        {"name": "families.mlp", "batch_size": 8, "weight": 2.0,
         "arguments": {**SMALL, "data": ["halves"], "depth": [1, 2]}},
        {"name": "runs.LinearFamily", "batch_size": 12},
    ],
    "validation": [
        {"name": "families.gru", "batch_size": 8, "arguments": {**SMALL, "context": [2, 3]}}
    ],
    "teachers": [],
    "threads": 1,
    "device": "cpu",
    "student": {"hidden": 4, "layers": 1, "warmup_steps": 2},
    "training": {"validate_every": 2, "validation_steps": 2},
    "strategy": {
        "kind": "meta-batch", "meta_steps": 3, "slots": 2, "unroll": 2, "shortest": 2, "longest": 6
    },
    "evaluation": {"tasks": ["digits-mlp"], "steps": 2, "seeds": 1},
}  # fmt: skip


def test_a_recipe_trains_and_validates_on_families(tmp_path) -> None:
    recipe = recipes.from_dict(RECIPE)
    assert recipes.from_dict(recipe.as_dict()) == recipe
    (student,) = Experiment(recipe, tmp_path / "run").train()
    rows = metrics(tmp_path / "run")
    names = {slot["task"].split("[")[0] for row in rows for slot in row["slots"]}
    assert names == {"families.mlp", "linears"}
    assert [row["meta_step"] for row in rows if "validation" in row] == [2, 3]
    assert "depth=(1, 2)" in student.provenance["data"]
    assert student.provenance["validation_data"].startswith("families.gru(batch_size=8, ")


def test_a_recipe_without_validation_is_as_it_was() -> None:
    """Runs that were begun before recipes had the key go on."""
    recipe = recipes.from_dict({key: RECIPE[key] for key in RECIPE if key != "validation"})
    assert "validation" not in recipe.as_dict()


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("validation", [{"name": "families.grus"}], "validation.0: .*did you mean 'families.gru'"),
        ("validation", [{"name": "digits-mlp", "weight": 1.0}], "'validation.0.weight'; the near"),
        ("tasks", [{"name": "families.mlp", "arguments": {"dept": 1}}], "tasks.0: .*'dept'"),
        (
            "tasks",
            [{"name": "families.mlp", "arguments": {"depth": [2, 1]}}],
            r"tasks.0: depth must be two integers .*, not \[2, 1\]",
        ),
        ("evaluation", {"tasks": ["families.mlp"]}, "evaluation.tasks: .*not the family"),
    ],
)
def test_bad_keys_are_named(key, value, named) -> None:
    with pytest.raises(RecipeError, match=named):
        recipes.from_dict({**RECIPE, key: value})
