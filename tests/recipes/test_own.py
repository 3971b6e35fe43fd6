"""Tasks, teachers and policies of the user's own, which a recipe names by dotted path."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from amalgam import recipes
from amalgam.experiment import Experiment
from amalgam.policies import load_policy
from amalgam.recipes import Recipe, RecipeError

MODULE = """
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from amalgam.policies import Policy, PolicyConfig, ReferencePolicy
from amalgam.tasks import Task

NUMBER = 3


def make_task(batch_size, samples=60, classes=2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples + 20, 4, generator=generator)
    y = (x[:, 0] > 0).long() % classes
    data = (x[:samples], y[:samples]), (x[samples:], y[samples:])
    return Task(f"own-{classes}", lambda: nn.Linear(4, classes), *data, batch_size=batch_size)


def make_number(batch_size, **more):
    return 3


@dataclass(frozen=True, kw_only=True)
class MyConfig(PolicyConfig):
    gain: float = 0.1
    warmup_steps: int = 1


class MyState(NamedTuple):
    m: torch.Tensor


class MyPolicy(ReferencePolicy):
    config_type = MyConfig

    def build(self, generator):
        self.log_rate = nn.Parameter(torch.randn(1, generator=generator))

    def initial_state(self, like, layout=None):
        return MyState(torch.zeros_like(like))

    def compute(self, grad, state, weights, layout):
        (log_rate,) = weights
        m = 0.9 * state.m + 0.1 * grad
        return self.config.gain * log_rate.exp() * m.tanh(), MyState(m)

    def warm_up(self, grad, state, *, layout=None):
        return MyState(0.9 * state.m + 0.1 * grad)


class Unfinished(Policy):
    config_type = MyConfig


class Unseeded(MyPolicy):
    def __init__(self, config=None):
        super().__init__(config)


class Unconfigured(MyPolicy):
    config_type = dict


@dataclass(frozen=True)
class MyTeacher:
    # SGD with decay, whose rate falls with the steps.
    lr: float = 0.1
    decay: float = 0.0
    kind = "mine"
    policy = None

    def __post_init__(self):
        if self.decay < 0:
            raise ValueError(f"decay must be 0 or more, not {self.decay}")

    @property
    def label(self):
        return f"{self.lr:g}"

    def at(self, lr):
        return MyTeacher(lr, self.decay)

    def initial_state(self, like, layout=None):
        return {"steps": 0}

    def step(self, params, grad, state, layout, backend="auto"):
        steps = state["steps"] + 1
        return self.lr / steps * (grad + self.decay * params), {"steps": steps}

    def warm_up(self, params, grad, state, layout):
        return state
"""

RECIPE = """
threads = 1
device = "cpu"
[task]
name = "own_things.make_task"
batch_size = 8
arguments = { samples = 50, classes = 3 }
[[teachers]]
kind = "sgd"
lr = 0.1
[[teachers]]
kind = "own_things.MyTeacher"
arguments = { decay = 0.01 }
[policy]
kind = "own_things.MyPolicy"
gain = 0.2
[training]
checkpoint_every = 1
validate_every = 2
validation_steps = 2
validation_seeds = 1
[strategy]
kind = "stages"
unroll = 3
[[strategy.stages]]
episodes = 2
windows = 2
[evaluation]
tasks = ["own_things.make_task", { name = "own_things.make_task", arguments = { classes = 4 } }]
steps = 2
seeds = 1
every = 1
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe beside a module that it names things of."""
    (tmp_path / "own_things.py").write_text(MODULE)
    path = tmp_path / "own.toml"
    path.write_text(RECIPE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_things", raising=False)
    return path


def interrupted(recipe: Recipe, folder: Path, meta_steps: int) -> None:
    """Begin a run and stop it after so many meta-steps."""

    class Stopped(Exception):
        pass

    def stop(row: dict) -> None:
        if row["meta_step"] == meta_steps:
            raise Stopped

    with pytest.raises(Stopped):
        Experiment(recipe, folder, seed=5).train(stop)


def test_own_things_run_and_resume_to_the_same_bits(own, tmp_path) -> None:
    whole = Experiment(recipes.load(own), tmp_path / "whole", seed=5)
    (student,) = whole.train()
    kind = sys.modules["own_things"].MyPolicy
    assert type(student) is kind
    assert student.config.gain == 0.2
    assert whole.pool.teachers[1] == sys.modules["own_things"].MyTeacher(decay=0.01)
    begun = kind(student.config, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(student.log_rate, begun.log_rate)

    interrupted(recipes.load(own), tmp_path / "cut", 3)
    assert not (tmp_path / "cut" / "student.safetensors").exists()
    resumed = Experiment(recipes.load(own), tmp_path / "cut", seed=5, resume=True)
    (again,) = resumed.train()
    assert torch.equal(again.log_rate, student.log_rate)
    stored = load_policy(tmp_path / "cut" / "student.safetensors")
    assert type(stored) is kind
    assert stored.config == student.config

    results = resumed.evaluate().at(0)
    assert [of_task[0].task for of_task in results] == ["own-2", "own-4"]
    assert [result.name for result in results[0][:3]] == ["student", "sgd", "mine"]
    resolved = json.loads((tmp_path / "cut" / "recipe.json").read_text())["resolved"]
    assert resolved["tasks"][0]["arguments"] == {"samples": 50, "classes": 3}
    arguments = {"arguments": {"decay": 0.01}, "lr_decay": "constant"}
    teacher = {"kind": "own_things.MyTeacher", **arguments}
    assert resolved["teachers"][1] == teacher
    assert resolved["policy"]["kind"] == "own_things.MyPolicy"
    assert recipes.from_dict(resolved) == recipes.load(own)

    changed = recipes.load(own, ["task.arguments.samples=40"])
    with pytest.raises(RecipeError, match=r"recipe.tasks is .*'samples': 50.* there and .*40"):
        Experiment(changed, tmp_path / "cut", seed=5, resume=True)


def test_the_command_line_finds_modules_of_the_working_directory(own, tmp_path) -> None:
    """Also the installed script does, whose own folder is first in the path and not this one."""
    script = tmp_path / "bin" / "amalgam"
    script.parent.mkdir()
    script.write_text("from amalgam.cli import main\nif __name__ == '__main__':\n    main()\n")
    train = ("train", "own.toml", "--out", "run", "--seed", "1")

    def run(*arguments: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        package = str(Path(recipes.__file__).parents[2])
        environment = os.environ | {"PYTHONPATH": package, "COLUMNS": "200"}
        command = [sys.executable, *flags, str(script), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=120, cwd=tmp_path
        )

    done = run(*train)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "own-4: validation after 2 steps" in done.stdout
    compared = run(
        *("evaluate", "run/student.safetensors", "--tasks", "own_things.make_task:batch_size=8"),
        *("--short", "--horizon", "1", "--budgets", "1", "--seeds", "1", "--cache", "cache"),
        *("--jobs", "2"),
    )
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert "own-2: validation after 1 steps" in compared.stdout
    unsafe = run(*train, flags=("-P",))
    assert unsafe.returncode == 2
    assert "No module named 'own_things'" in unsafe.stderr


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("task.name=own_thing.make_task", "tasks.0: task must be a function .*No module named"),
        (
            "task.name=own_things.make",
            "task must be a function .*'my.module.make_task', not .*make'",
        ),
        ("task.name=own_things.NUMBER", "task must be a function .* but 'own_things.NUMBER' is 3"),
        ("task.name=own_things.make_number", "must return an amalgam.tasks.Task or .*, not 3"),
        (
            "task.arguments={sample=3}",
            r"can't be called with .*sample=3.*'sample'; it takes .*sam",
        ),
        ("task.arguments=3", "tasks.0.arguments: .*table, not 3"),
        ("task.batch_size=51", "batch_size must be between 1 and the 50 training samples, not 51"),
        ("evaluation.tasks=['own_things.NUMBER']", "evaluation.tasks: task must be a function"),
        ("evaluation.tasks=[{name='digits'}]", "evaluation.tasks: task must be .*did you mean"),
        ("evaluation.tasks.1.nam=3", "'evaluation.tasks.1.nam'; the nearest is .*tasks.1.name'"),
        (
            "policy.kind=own_things.make_task",
            "policy: .*Policy, which 'own_things.make_task' is not",
        ),
        ("policy.kind=own_things.Policie", "policy: .* must be a class that can be imported"),
        ("policy.kind=own_things.Unfinished", "policy: .*'own_things.Unfinished'.*initial_state"),
        (
            "policy.kind=own_things.Unseeded",
            "policy: .*'own_things.Unseeded' can't be called .*gene",
        ),
        (
            "policy.kind=own_things.Unconfigured",
            "policy: .*config_type is a dataclass, which that of",
        ),
        ("teachers.1.kind=own_things.NUMBER", "teachers.1: kind must be .*own_things.NUMBER' is 3"),
        ("teachers.1.kind=own_thing.MyTeacher", "teachers.1: kind must be .*No module named"),
        (
            "teachers.1.kind=own_things.make_number",
            "teachers.1: .*make_number' can't be called with",
        ),
        ("teachers.1.kind=own_things.MyConfig", "teachers.1: kind .*MyConfig' can't be .*'decay'"),
        ("teachers.1.arguments={dekay=1}", "teachers.1: kind .*'dekay'; it takes .*decay: float"),
        ("teachers.1.arguments={decay=-1}", "teachers.1: decay must be 0 or more, not -1"),
        ("teachers.1={kind='own_things.make'}", "teachers.1: kind must be a class that can be"),
        ("teachers.1={kind='own_things.MyConfig'}", "what .*MyConfig' makes must be .* lacks .*at"),
        ("teachers.1.lr=3", "'teachers.1.lr'; the nearest is"),
        ("policy.gian=1.0", "'policy.gian'; the nearest is 'policy.gain'"),
        ("policy.gain=x", "policy.gain: .*valid number, not 'x'"),
    ],
)
def test_what_can_not_be_taken_is_named(own, override, named) -> None:
    with pytest.raises(RecipeError, match=named):
        recipes.load(own, [override])


@pytest.mark.parametrize(
    "override",
    [
        "task.name=own_things.make_task",
        "teachers.0.kind=own_things.MyTeacher",
        "policy.kind=own_things.MyPolicy",
    ],
)
def test_a_recipe_from_elsewhere_runs_no_code_unless_allowed(
    own, override, tmp_path, monkeypatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(RecipeError, match="run the code of 'own_things'; .* pass --own-code"):
        recipes.load(own)
    plain = tmp_path / "plain.toml"
    plain.write_text('[task]\nname = "digits-mlp"\n[[teachers]]\nkind = "torch.optim.SGD"\n')
    recipes.load(plain)
    with pytest.raises(RecipeError, match="would run the code of 'own_things'"):
        recipes.load(plain, [override])
    assert "own_things" not in sys.modules
    with pytest.raises(RecipeError, match="'os.system' would run the code of 'os'"):
        recipes.load(plain, ["teachers.0={kind='os.system', arguments={command='touch x'}}"])
    assert not (tmp_path / "here" / "x").exists()
    recipes.load(own, own_code=True)
    monkeypatch.chdir(tmp_path)
    recipes.load(own)
    recipes.load("own.toml")


def test_a_module_that_fails_is_named_in_one_line(own, tmp_path) -> None:
    (tmp_path / "broken.py").write_text("raise RuntimeError('no\\nluck')")
    with pytest.raises(
        RecipeError, match="'broken' fails where it is imported .RuntimeError: no l"
    ):
        recipes.load(own, ["task.name=broken.make_task"])
