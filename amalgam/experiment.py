"""A recipe, run to its end: meta-training, the closing tables, the plots.

The run folder: ``recipe.json`` (all resolved), ``metrics.jsonl``, ``checkpoint.safetensors``,
``student.safetensors``, ``evaluation.json`` and ``evaluation.md``, ``plots/``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from amalgam import files, plots, tasks
from amalgam.evaluation import Contender, Result, evaluate, tables, tune
from amalgam.meta import Trainer, optimizer_of
from amalgam.meta.trainer import METRICS
from amalgam.optimizer import TeacherOptimizer
from amalgam.policies import Policy, Pool, Student
from amalgam.recipes import Recipe, RecipeError
from amalgam.seeding import generator_for
from amalgam.tasks import Task
from amalgam.version import describe

RECIPE = "recipe.json"


class Experiment:
    """One run of a recipe in one folder; sets PyTorch's threads as the recipe says.

    Args:
        recipe: What to run.
        folder: Where; made where missing.
        name: The recipe's name, for the student's provenance.
        seed: Decides everything random.
        resume: Go on where the folder's run stopped.

    Raises:
        FileExistsError: The folder holds a run and ``resume`` was not asked for.
        RecipeError: ``resume`` was asked for with another recipe or seed than the folder's.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: str | os.PathLike[str],
        *,
        name: str = "",
        seed: int = 0,
        resume: bool = False,
    ) -> None:
        self.recipe = recipe
        self.folder = Path(folder)
        self.seed = seed
        self.resume = resume
        self._settle(name)
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        self.pool = Pool(recipe.teachers)
        self.task = tasks.load(recipe.task.name, recipe.task.batch_size)
        self.trainer = Trainer(
            Student(recipe.student, generator=generator_for(seed, "student")),
            self.task,
            self.pool,
            folder=self.folder,
            amalgamation=recipe.amalgamation,
            training=recipe.training,
            stages=recipe.stages,
            seed=seed,
            provenance={"recipe": name, "resolved": recipe.as_dict(), **describe()},
        )

    def _settle(self, name: str) -> None:
        """Write down what this folder runs, or hold it against what is written there."""
        path = self.folder / RECIPE
        about = {"recipe": name, "seed": self.seed, "resolved": self.recipe.as_dict()}
        if not path.exists():
            _write(path, json.dumps(about, indent=2) + "\n")
            return
        if not self.resume:
            raise FileExistsError(
                f"{str(self.folder)!r} holds a run already: go on with it (--resume), "
                f"or choose another folder (--out)"
            )
        stored = json.loads(path.read_text(encoding="utf-8"))
        for key in ("seed", "resolved"):
            difference = _difference(stored[key], about[key], key.replace("resolved", "recipe"))
            if difference:
                raise RecipeError(
                    f"{str(self.folder)!r} holds another run: {difference}; "
                    f"resume it as it was begun, or choose another folder"
                )

    def train(self, report: Callable[[dict[str, Any]], None] | None = None) -> Policy:
        """Meta-train to the end; ``report`` is called with each meta-step's metrics."""
        student = self.trainer.run(resume=self.resume, report=report)
        lines = (self.folder / METRICS).read_text(encoding="utf-8").splitlines()
        plots.training([json.loads(line) for line in lines], self.folder / "plots" / "training.png")
        return student

    def evaluate(self, report: Callable[[str], None] = lambda name: None) -> list[list[Result]]:
        """Train each evaluation task with everybody; results by task, also written and drawn."""
        how = self.recipe.evaluation
        results = []
        for name in how.tasks:
            task = tasks.load(name, self.recipe.task.batch_size)
            everybody = [
                student_contender("student", self.trainer.student),
                *teacher_contenders(self.pool),
                *torch_contenders(task, steps=how.steps, report=report),
            ]
            results.append(
                evaluate(
                    task,
                    everybody,
                    steps=how.steps,
                    seeds=how.seeds,
                    every=how.every,
                    report=report,
                )
            )
        record(results, self.folder, steps=how.steps)
        return results


def student_contender(name: str, student: Policy) -> Contender:
    """A learned policy, warmed up as it was trained, as a contender."""
    return Contender(name, lambda params: optimizer_of(params, student))


def teacher_contenders(pool: Pool) -> list[Contender]:
    """A pool's teachers as contenders, each on its own."""
    named = zip(pool.names, pool.teachers, strict=True)
    return [Contender(name, partial(TeacherOptimizer, teacher=teacher)) for name, teacher in named]


def torch_contenders(
    task: Task, *, steps: int, report: Callable[[str], None] = lambda name: None
) -> list[Contender]:
    """torch.optim's Adam and AdamW, each at the rate that suits the task and the steps best."""
    contenders = []
    for kind in (torch.optim.Adam, torch.optim.AdamW):
        rate = tune(task, kind, steps=steps)
        report(f"tuning {kind.__name__}")
        contenders.append(Contender(f"torch {kind.__name__}({rate:g})", partial(kind, lr=rate)))
    return contenders


def title(results: Sequence[Result], steps: int) -> str:
    """A table's title."""
    seeds = len(results[0].curves)
    return f"{results[0].task}: validation after {steps} steps, {seeds} seed{'s' * (seeds > 1)}"


def record(results: Sequence[Sequence[Result]], folder: Path, *, steps: int) -> None:
    """Write results, a list a task, as ``evaluation.json``, ``evaluation.md`` and plots."""
    content = {"steps": steps, **describe(), "results": [r.as_dict() for rs in results for r in rs]}
    _write(folder / "evaluation.json", json.dumps(content) + "\n")
    shown = [tables.markdown(title(rs, steps), rs) for rs in results]
    _write(folder / "evaluation.md", "\n".join(shown))
    for rs in results:
        plots.curves(rs, folder / "plots" / f"{rs[0].task}.png")


def _difference(stored: Any, given: Any, key: str) -> str | None:
    """The first key in which two nested values differ, and how."""
    if isinstance(stored, dict) and isinstance(given, dict):
        for name in {**stored, **given}:
            found = _difference(stored.get(name), given.get(name), f"{key}.{name}")
            if found:
                return found
        return None
    return None if stored == given else f"{key} is {stored!r} there and {given!r} here"


def _write(path: Path, text: str) -> None:
    with files.whole(path) as beside:
        beside.write_text(text, encoding="utf-8")
