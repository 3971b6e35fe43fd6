"""What a recipe describes is made once, from its reading to the end of its run."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from amalgam import policies, recipes
from amalgam.experiment import Experiment
from amalgam.policies import ChoiceConfig, PolicyTeacher, StudentConfig, TorchTeacher
from amalgam.recipes import RecipeError
from amalgam.tasks import Task

RECIPE = """
threads = 1
device = "cpu"
[[tasks]]
name = "digits-mlp"
batch_size = 32
[[tasks]]
name = "digits-mlp"
batch_size = 64
[[teachers]]
kind = "torch.optim.AdamW"
arguments = { lr = 0.01 }
[[teachers]]
kind = "policy"
file = "digits"
[student]
layers = 1
hidden = 4
warmup_steps = 1
[training]
validate_every = 0
[strategy]
kind = "stages"
unroll = 2
[[strategy.stages]]
episodes = 2
[evaluation]
tasks = ["digits-mlp", "digits-cnn"]
steps = 1
seeds = 1
every = 1
"""


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many of each class have been made."""
    counts: Counter[str] = Counter()

    def count(of_class: type, method: str) -> None:
        whole = getattr(of_class, method)

        def counted(self: Any, *args: Any, **kwargs: Any) -> None:
            counts[of_class.__name__] += 1
            whole(self, *args, **kwargs)

        monkeypatch.setattr(of_class, method, counted)

    for of_class in (Task, ChoiceConfig, StudentConfig):
        count(of_class, "__post_init__")
    for of_class in (TorchTeacher, PolicyTeacher, policies.Student):
        count(of_class, "__init__")
    return counts


def test_a_run_makes_everything_once(made: Counter[str], tmp_path: Path) -> None:
    path = tmp_path / "many.toml"
    path.write_text(RECIPE)
    recipe = recipes.load(path)
    read = Counter({"Task": 3, "TorchTeacher": 1, "PolicyTeacher": 1, "StudentConfig": 1})
    # A policy that teaches is a student of a configuration of its own, made once more without
    # memory, to hold the file's tensors against.
    taught = Counter({"Student": 2, "StudentConfig": 1})
    assert made == read + taught
    run = Experiment(recipe, tmp_path / "run")
    run.train()
    assert made == read + taught + Counter({"Student": 1})
    run.evaluate()
    assert made == read + taught + Counter({"Student": 1})
    assert run.trainer.pool is recipe.pool
    assert run.trainer.tasks == tuple(one.task for one in recipe.tasks)
    assert run.trainer.student.config is recipe.policy.settings
    first, _ = recipe.evaluation_tasks
    assert first is recipe.tasks[0].task


@pytest.mark.parametrize("name", ["torch-pool", "choice-large"])
def test_a_shipped_recipe_is_read_by_making_everything_once(made: Counter[str], name: str) -> None:
    recipe = recipes.load(name)
    own = {"torch-pool": {"TorchTeacher": 3}, "choice-large": {"ChoiceConfig": 1}}[name]
    assert made == Counter({"Task": 2, "StudentConfig": 1, **own})
    assert len(recipe.pool) == own.get("TorchTeacher", 0)


def test_copies_hold_the_fields_alone(made: Counter[str], tmp_path: Path) -> None:
    """Under torchrun a recipe travels to the other processes, and a task may not."""
    path = tmp_path / "many.toml"
    path.write_text(RECIPE)
    recipe = recipes.load(path)
    stored = pickle.dumps(recipe)
    made.clear()
    for other in (pickle.loads(stored), copy.deepcopy(recipe)):
        assert other == recipe
    assert not made["Task"] + made["TorchTeacher"] + made["PolicyTeacher"]
    assert len(stored) < 4000
    assert other.tasks[1].task.batch_size == 64
    assert other.pool.names == recipe.pool.names


THREADS = """
import torch
from amalgam.tasks import digits_mlp

seen = []


def make_task(batch_size):
    seen.append(torch.get_num_threads())
    return digits_mlp(batch_size)


def refuse(batch_size):
    raise ValueError("no data")
"""


def test_tasks_are_made_with_the_recipes_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "watching_threads.py").write_text(THREADS)
    monkeypatch.syspath_prepend(tmp_path)
    before = torch.get_num_threads()
    content = {"task": {"name": "watching_threads.make_task"}, "teachers": [], "threads": 3}
    recipes.from_dict(content)
    import watching_threads  # type: ignore[import-not-found]

    assert watching_threads.seen == [3]
    assert torch.get_num_threads() == before
    content["task"] = {"name": "watching_threads.refuse"}
    with pytest.raises(RecipeError, match=r"tasks.0: no data"):
        recipes.from_dict(content)
    assert torch.get_num_threads() == before
