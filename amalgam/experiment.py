"""The run of a recipe: meta-training, the closing tables, the plots.

A run's folder holds ``recipe.json`` (with every key spelled out), ``metrics.jsonl``,
``checkpoint.safetensors``, ``student.safetensors`` (several replicates have one each, in
``replicate-0/`` and so on), ``evaluation.json``, ``evaluation.md``, ``plots/`` and, where it was
asked for, ``tensorboard/``. Where a choice is trained first, ``choice/`` holds the same of it.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from amalgam import distributed, files
from amalgam.device import resolve
from amalgam.evaluation import Contender, Evaluation, Protocol, Runner, evaluate, plots
from amalgam.evaluation.contenders import grid, student_contender, teacher_contenders
from amalgam.evaluation.protocol import RATES
from amalgam.evaluation.report import record_closing
from amalgam.meta import Trainer
from amalgam.meta.run_folder import CHECKPOINT, METRICS, STUDENT
from amalgam.policies import Choice, Policy, PolicyTeacher, Pool, policy_type
from amalgam.recipes import Recipe, RecipeError
from amalgam.seeding import generator_for
from amalgam.tasks import Task, TaskFamily
from amalgam.tensorboard import MetricsWriter, summary_writer
from amalgam.version import describe

RECIPE = "recipe.json"
KEPT = (CHECKPOINT, STUDENT, f"choice/{CHECKPOINT}", "replicate-*")
"""What a run keeps: a folder without any of it holds none, and may be begun anew."""
FREE = ("description", "device", "evaluation")
"""Keys of a recipe that may change when a run is resumed. So may ``memory``, with float32 cells."""


class Experiment:
    """One run of a recipe in one folder; sets PyTorch's threads as the recipe says.

    Args:
        recipe: The recipe, whose tasks and teachers the run takes.
        folder: The run folder; made where missing.
        name: The recipe's name, for the student's provenance.
        seed: Decides everything random.
        resume: Whether to go on where the folder's run stopped, if it holds one. It may have been
            on another device.
        tensorboard: Whether to write the metrics for TensorBoard, too; see
            :class:`amalgam.tensorboard.MetricsWriter`.

    Attributes:
        tasks: The tasks and families to meta-train on; tasks are on the run's device.
        meta_steps: Meta-steps of each training that is over: the choice's, the student's.

    Raises:
        BlockingIOError: Another process has the folder.
        FileExistsError: The folder holds a run, and ``resume`` was not given; or it holds a
            student, and no run.
        MissingExtra: TensorBoard is asked for and not installed.
        RecipeError: The folder holds a run of another recipe or seed, or of an earlier version.
        ValueError: The recipe can't be computed on this device, or by this backend.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: str | os.PathLike[str],
        *,
        name: str = "",
        seed: int = 0,
        resume: bool = False,
        tensorboard: bool = False,
    ) -> None:
        if tensorboard:
            summary_writer()
        self.recipe = recipe
        self.folder = Path(folder)
        self.seed = seed
        self.resume = resume
        self._name = name
        self._tensorboard = tensorboard
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        self.device = resolve(recipe.device)
        self._moved: dict[int, Task] = {}
        self.tasks = [self._source(one.task) for one in recipe.tasks]
        self._choice: Policy | None = None
        self.meta_steps: list[int] = []
        first = self.trainer if recipe.choice is None else self._choice_trainer
        distributed.by_first(lambda: self._settle(first))

    @cached_property
    def pool(self) -> Pool:
        """The teachers; where a choice is trained first, only after that."""
        if self.recipe.choice is None:
            return self.recipe.pool
        if self._choice is None:
            raise RuntimeError("the pool's choice is yet to be trained; call train() first")
        return Pool([PolicyTeacher(self._choice)])

    @cached_property
    def trainer(self) -> Trainer:
        """The student's trainer; where a choice is trained first, only after that."""
        recipe = self.recipe
        make, config = policy_type(recipe.policy.kind), recipe.policy.settings
        students = [
            make(config, generator=generator_for(self.seed + index, "student"))
            for index in range(recipe.replicates)
        ]
        return self._trainer(
            students,
            self.pool,
            self.folder,
            amalgamation=recipe.amalgamation,
            training=recipe.training,
            strategy=recipe.strategy.settings,
            perturbation=recipe.perturbation and recipe.perturbation.settings,
            estimator=recipe.estimator.settings,
            conditions=recipe.conditions,
        )

    def _here(self, task: Task) -> Task:
        """A task of the recipe on the run's device, moved there once."""
        if id(task) not in self._moved:
            self._moved[id(task)] = task.to(self.device)
        return self._moved[id(task)]

    def _source(self, task: Task | TaskFamily) -> Task | TaskFamily:
        """A task on the run's device; a family as it is, as its draws are moved there."""
        return self._here(task) if isinstance(task, Task) else task

    def _trainer(self, students: list[Policy], pool: Pool, folder: Path, **how: Any) -> Trainer:
        recipe = self.recipe
        return Trainer(
            students,
            self.tasks,
            pool,
            folder=folder,
            memory=recipe.memory,
            task_weights=[task.weight for task in recipe.tasks],
            validation=[self._source(one.task) for one in recipe.validation],
            seed=self.seed,
            device=self.device,
            provenance={"recipe": self._name, "resolved": recipe.as_dict(), **describe()},
            **how,
        )

    def _settle(self, first: Trainer) -> None:
        """Write ``recipe.json``; or check that the run that is there is this one.

        What can't be computed here is found out before the folder is made.

        Args:
            first: The trainer of what is trained first.
        """
        if self.folder.exists():
            with files.locked(self.folder):
                self._refuse_others()
        first.check()
        about = {"recipe": self._name, "seed": self.seed, "resolved": self.recipe.as_dict()}
        text = json.dumps(about, indent=2) + "\n"
        with files.locked(self.folder):
            files.clear_leftovers(self.folder)
            with files.whole(self.folder / RECIPE) as beside:
                beside.write_text(text, encoding="utf-8")

    def _refuse_others(self) -> None:
        """Refuse a folder that holds something other than this run, or its beginning.

        Raises:
            FileExistsError: It holds a run, and ``resume`` was not given; or things that are none.
            RecipeError: It holds another run, or one of an earlier version.
        """
        folder, path = str(self.folder), self.folder / RECIPE
        kept = [name for name in KEPT if next(self.folder.glob(name), None) is not None]
        if not path.exists():
            if kept:
                raise FileExistsError(
                    f"{folder!r} holds {', '.join(kept)}, and no {RECIPE} that says of what run; "
                    f"choose another folder (--out)"
                )
            return
        if not kept:
            return  # Nothing was kept of that run yet, so nothing is lost.
        if not self.resume:
            raise FileExistsError(
                f"{folder!r} holds a run already: go on with it (--resume), "
                f"or choose another folder (--out)"
            )
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            seed, resolved = stored["seed"], dict(stored["resolved"])
            earlier = "unroll" in resolved["training"]
        except (LookupError, RecursionError, TypeError, ValueError) as error:
            raise RecipeError(
                f"{str(path)!r} is damaged ({error!r}); restore it, or choose another folder"
            ) from error
        if earlier:
            raise RecipeError(
                f"{folder!r} holds a run of an earlier version of amalgam, which had "
                f"training.unroll; finish it with that version, or choose another folder"
            )
        now = self.recipe.as_dict()
        exact = {resolved.get("memory", {}).get("cells"), now["memory"]["cells"]} == {"float32"}
        for key in (*FREE, *(["memory"] if exact else [])):
            resolved.pop(key, None)
            now.pop(key, None)
        difference = _difference(seed, self.seed, "seed") or _difference(resolved, now, "recipe")
        if difference:
            raise RecipeError(
                f"{folder!r} holds another run: {difference}; "
                f"resume it as it was begun, or choose another folder"
            )

    def train(
        self,
        report: Callable[[dict[str, Any]], None] | None = None,
        begin: Callable[[str, int | None], None] = lambda what, meta_steps: None,
    ) -> list[Policy]:
        """Meta-train to the end.

        Args:
            report: Called with each meta-step's metrics; of replicates, the first one's.
            begin: Called before a policy is trained, with its name and its meta-steps, which are
                ``None`` where they depend on how training goes.

        Returns:
            The student, or all replicates.
        """
        with distributed.locked(self.folder):
            if self.recipe.choice is not None:
                begin("choice", self._choice_trainer.meta_steps)
                self._choice = self._train(self._choice_trainer, report)
            begin("student", self.trainer.meta_steps)
            self._train(self.trainer, report)
        return self.trainer.students

    @cached_property
    def _choice_trainer(self) -> Trainer:
        """The trainer of the choice that is trained first."""
        choice = self.recipe.choice
        if choice is None:
            raise RuntimeError("there is no choice to train")
        return self._trainer(
            [Choice(choice.policy, generator=generator_for(self.seed, "choice"))],
            Pool([]),
            self.folder / "choice",
            amalgamation=replace(self.recipe.amalgamation, on_policy=None),
            training=choice.training or self.recipe.training,
            strategy=choice.strategy.settings,
        )

    def _train(self, trainer: Trainer, report: Callable[[dict[str, Any]], None] | None) -> Policy:
        if self._tensorboard and distributed.rank() == 0:
            with MetricsWriter(trainer.folder) as writer:

                def follow_and_report(row: dict[str, Any]) -> None:
                    writer.follow()
                    if report is not None:
                        report(row)

                trained = trainer.run(resume=self.resume, report=follow_and_report)
                writer.follow()  # where the run was over already
        else:
            trained = trainer.run(resume=self.resume, report=report)
        self.meta_steps.append(trainer.meta_step)
        if distributed.rank() == 0:
            rows = [row for row in trainer.metrics() if not row.get("replicate")]
            if rows:
                plots.training(rows, trainer.folder / "plots" / "training.png")
            else:
                warnings.warn(
                    f"{str(trainer.folder / METRICS)!r} has no row; there is no training.png",
                    stacklevel=2,
                )
        return trained

    def evaluate(self, report: Callable[[str], None] = lambda what: None) -> Evaluation:
        """Train each evaluation task with every contender; write and plot the results.

        Adam and AdamW are tuned over the paper's rates. All rates are constant.

        Args:
            report: Called after each run with its task and contender.

        Returns:
            The evaluation, of one budget; of each task the replicates' results come first.
        """
        how, students = self.recipe.evaluation, self.trainer.students
        protocol = Protocol(
            "closing",
            horizon=how.steps,
            budgets=(1.0,),
            seeds=how.seeds,
            decays=("constant",),
            grids={"Adam": grid(lr=RATES), "AdamW": grid(lr=RATES)},
            one_setting=False,
            every=how.every,
            timed=False,
            curve_samples=None,
            # More would be no more exact.
            training_samples=2**15,
        )
        tasks = [self._here(task) for task in self.recipe.evaluation_tasks]
        found = Evaluation(protocol, (), ())
        if tasks:
            with Runner(
                tasks, device=self.device, report=lambda progress: report(progress.what)
            ) as runner:
                found = evaluate(runner, self._contenders(), protocol)
        record_closing(found, self.folder, replicates=len(students))
        return found

    def _contenders(self) -> list[Contender]:
        """The replicates, the teachers, and those that a choice chooses from."""
        students, choice = self.trainer.students, self.recipe.choice
        several = len(students) > 1
        names = [f"student {index}" if several else "student" for index in range(len(students))]
        return [
            *map(student_contender, names, students),
            # A policy that teaches is named after its file.
            *teacher_contenders(self.pool, names),
            *(teacher_contenders(Pool(choice.policy.teachers)) if choice is not None else []),
        ]


def _difference(stored: Any, given: Any, key: str) -> str | None:
    """The first key in which two nested values differ, and how."""
    if isinstance(stored, dict) and isinstance(given, dict):
        for name in {**stored, **given}:
            found = _difference(stored.get(name), given.get(name), f"{key}.{name}")
            if found:
                return found
        return None
    return None if stored == given else f"{key} is {stored!r} there and {given!r} here"
