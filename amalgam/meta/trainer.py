"""Meta-training: a student, its tasks and its pool in; a better student out, in a run folder.

Killed at any moment and resumed, a run ends in the same numbers: what is random derives from the
seed and from how far the run is (:mod:`amalgam.meta.sampling`), and a checkpoint holds the rest
(:mod:`amalgam.meta.run_state`, :mod:`amalgam.meta.run_folder`).

Under ``torchrun`` every process trains optimizees of its own with the same students, or slots of
its own with :class:`amalgam.meta.MetaBatch`; meta-gradients are averaged, and the first process
alone writes to the folder.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import IO, Any

import torch

from amalgam import distributed
from amalgam.device import resolve
from amalgam.evaluation import cache
from amalgam.meta import validation
from amalgam.meta.conditions import Conditions
from amalgam.meta.estimators import Estimator, Truncation
from amalgam.meta.memory import Memory
from amalgam.meta.meta_step import MetaStep, MetaSteps
from amalgam.meta.metrics import finite_json, over_slots, slot_metrics, window_metrics
from amalgam.meta.objective import Amalgamation
from amalgam.meta.periods import INITIAL, Finish, Period, Record, Strategy
from amalgam.meta.perturbation import Perturbation
from amalgam.meta.replicate import Replicate
from amalgam.meta.run_folder import METRICS, RunFolder
from amalgam.meta.run_state import RunState
from amalgam.meta.stages import Stages
from amalgam.meta.training import Training
from amalgam.meta.unroll import Unroll
from amalgam.policies import Policy, Pool
from amalgam.ranges import check_kind, several_of
from amalgam.tasks import Task, TaskFamily

# What arguments are, and how errors say it.
_KINDS: dict[str, tuple[Any, str]] = {
    "pool": (Pool, "a Pool, such as Pool(['adam'])"),
    "amalgamation": (Amalgamation, "an Amalgamation, such as Amalgamation(mechanism='mean')"),
    "training": (Training, "a Training, such as Training(meta_lr=0.01)"),
    "strategy": (Strategy, "a Strategy, such as Stages()"),
    "estimator": (Estimator, "an Estimator, such as PersistentEvolution()"),
    "memory": (Memory, "a Memory, such as Memory(budget='2GiB')"),
    "perturbation": (Perturbation | None, "a Perturbation, such as Gaussian(0.01)"),
    "conditions": (Conditions, "Conditions, such as Conditions(weight_decay=(1e-3, 0.1))"),
    "seed": (Integral, "a whole number"),
}

# Called with the metrics of a meta-step.
Report = Callable[[dict[str, Any]], None]


class NothingLearned(RuntimeError):
    """A run is over, and a student is no better than before: it was not saved."""


class Trainer:
    """Meta-trains a student, or several replicates of one side by side.

    Args:
        student: The student, or the replicates. The weights are moved to ``device`` and trained
            there, in place.
        task: The optimizee and its data, or a family that every episode draws its task from, or
            several of either. Every episode takes one of them.
        pool: The teachers.
        folder: The run's folder (:mod:`amalgam.meta.run_folder`), made if missing.
        amalgamation: Settings of the meta-loss and the imitation loss, and how they are computed.
        training: Settings of meta-training that hold for any strategy.
        strategy: Chooses which unrolls to train, period by period; ``Stages()`` where absent.
            Several replicates need a strategy that does not go back to earlier weights.
        estimator: Computes the meta-gradients; ``Truncation()`` where absent.
        memory: How much a window may keep for its backward pass.
        perturbation: Perturbs the weights at which the meta-gradient is computed.
        conditions: What each episode draws for the students' steps: weight decay, learning rates,
            the loss's scale. Nothing where absent.
        task_weights: Each task's share of the episodes, relative to the sum of all shares: the task
            of an episode is drawn by them. Equal shares where absent.
        validation: Tasks and families to meta-validate on, in the place of those to train on. A
            family's draws are the same in every validation of every run, and none of training's.
        seed: Decides everything random. Replicate i draws its optimizees, their conditions, the
            teachers whose updates are executed, batches and noise by ``seed + i``. What all
            replicates have in common is drawn by ``seed``: the task and the horizon of an episode,
            what a family draws for it and, for ``il_mode="switch"``, the loss of a window.
        device: Where everything is computed, as in :func:`amalgam.device.resolve`; ``"auto"`` is a
            GPU if there is one. Everything random is drawn on the CPU, and so is the same on any
            device. Files hold CPU tensors, so a run may be resumed on another device.
        provenance: Facts to save with the student, beside those that the trainer knows itself.

    Raises:
        TypeError: An argument is of another kind, or does not say in its ``repr`` by what a run
            that is resumed could know it again; the message says what would work.
        ValueError: There is no student, or the strategy, the estimator or the task weights do not
            fit the others; the message says what would work.
    """

    def __init__(
        self,
        student: Policy | Sequence[Policy],
        task: Task | TaskFamily | Sequence[Task | TaskFamily],
        pool: Pool,
        *,
        folder: str | os.PathLike[str],
        amalgamation: Amalgamation | None = None,
        training: Training | None = None,
        strategy: Strategy | None = None,
        estimator: Estimator | None = None,
        memory: Memory | None = None,
        perturbation: Perturbation | None = None,
        conditions: Conditions | None = None,
        task_weights: Sequence[float] | None = None,
        validation: Task | TaskFamily | Sequence[Task | TaskFamily] = (),
        seed: int = 0,
        device: str | torch.device = "auto",
        provenance: dict[str, Any] | None = None,
    ) -> None:
        self.device = resolve(device)
        students = several_of("student", student, Policy, "a policy, such as Student()")
        tasks, validated = (
            several_of(name, sources, Task | TaskFamily, "a task or a family, as of tasks.load()")
            for name, sources in (("task", task), ("validation", validation))
        )
        check_kind("folder", folder, str | os.PathLike, "a path")
        self.tasks = tuple(map(self._here, tasks))
        given = [1.0] * len(self.tasks) if task_weights is None else task_weights
        weights = several_of("task_weights", given, Real, "a number")
        self.task_weights = tuple(map(float, weights))
        self.validation = tuple(map(self._here, validated))
        self.pool = pool
        self.amalgamation = amalgamation or Amalgamation()
        self.training = training or Training()
        self.strategy = strategy or Stages()
        self.estimator = estimator or Truncation()
        self.memory = memory or Memory()
        self.perturbation = perturbation
        self.conditions = conditions or Conditions()
        self.seed = seed
        self.folder = Path(folder)
        check_kind("provenance", provenance, dict | None, "a dictionary")
        self.provenance = dict(provenance or {})
        self._check(students)
        self._state = RunState([Replicate(one.to(self.device), self.training) for one in students])
        self._meta_steps = MetaSteps(
            self._state,
            self.tasks,
            self.pool,
            self.amalgamation,
            self.training,
            self.estimator,
            memory=self.memory,
            perturbation=self.perturbation,
            conditions=self.conditions,
            task_weights=self.task_weights,
            seed=seed,
            meta_steps=self.strategy.meta_steps,
            device=self.device,
        )
        identity = self._identity()
        _check_known_again(identity)
        self._files = RunFolder(self.folder, identity)
        self._checked = False

    def _here(self, task: Task | TaskFamily) -> Task | TaskFamily:
        """A task on the run's device; a family's draws are moved there when they are drawn."""
        return task.to(self.device) if isinstance(task, Task) else task

    def _check(self, students: Sequence[Policy]) -> None:
        for name, (kinds, words) in _KINDS.items():
            check_kind(name, getattr(self, name), kinds, words)
        if not students:
            raise ValueError("student must be one or more, not none")
        if len(set(map(id, students))) < len(students):
            raise ValueError("student must hold each replicate once; copy.deepcopy makes another")
        frozen = sorted(
            name
            for student in students
            for name, weight in student.named_parameters()
            if not weight.requires_grad
        )
        if frozen:
            raise ValueError(
                f"student must have weights that all require gradients, for all are trained, but "
                f"{frozen[0]!r} requires none; student.requires_grad_() makes them"
            )
        if not self.tasks:
            raise ValueError("task must be one or more, not none")
        if len(students) > 1 and self.strategy.goes_back:
            raise ValueError(
                f"strategy goes back to earlier weights, which {len(students)} replicates would "
                f"have to do together; train them one by one, or by stages"
            )
        if self.amalgamation.on_policy is not None and not len(self.pool):
            raise ValueError("pool must have teachers for on-policy amalgamation, not none")
        self.training.check_schedule(self.strategy.meta_steps)
        self.estimator.check(
            students=len(students),
            optimizees=self.training.optimizees,
            perturbation=self.perturbation,
            input_noise=self.training.input_noise,
        )
        if len(self.task_weights) != len(self.tasks) or not all(
            1e-6 <= weight <= 1e6 for weight in self.task_weights
        ):
            raise ValueError(
                f"task_weights must be {len(self.tasks)} positive numbers, a task each, from 1e-6 "
                f"to 1e6, not {list(self.task_weights)}"
            )

    def _identity(self) -> dict[str, str]:
        """The settings, by name, that a checkpoint and a run that resumes it must share."""
        memory = str(self.memory) if self.memory.cells != "float32" else ""
        decays = f", lr_decays {self.pool.lr_decays}" if self.pool.decays else ""
        return {
            "seed": str(self.seed),
            "processes": str(distributed.world()),
            "tasks": "; ".join(
                [
                    *(
                        f"{_settings(task)}, weight {weight:g}"
                        for task, weight in zip(self.tasks, self.task_weights, strict=True)
                    ),
                    *(f"validation: {_settings(task)}" for task in self.validation),
                ]
            ),
            "optimizees": "; ".join(
                f"{task.name}: {cache.named(task.loss)}, {cache.begins(_home(task), digits=3)}"
                for task in (*self.tasks, *self.validation)
                if isinstance(task, Task)
            ),
            "student": f"{self.student.kind} {self.student.config}, {len(self.students)}",
            "dtype": ", ".join(sorted({str(weight.dtype) for weight in self.student.weights()})),
            "teachers": f"{self.pool.teachers}{decays}",
            "amalgamation": str(self.amalgamation),
            "training": str(self.training),
            "estimator": str(self.estimator),
            "perturbation": str(self.perturbation),
            "conditions": str(self.conditions),
            "memory": memory,
            "strategy": str(self.strategy),
        }

    @property
    def student(self) -> Policy:
        """The student, or the first replicate."""
        return self._state.replicates[0].student

    @property
    def students(self) -> list[Policy]:
        """The student, or all replicates."""
        return [replicate.student for replicate in self._state.replicates]

    @property
    def meta_steps(self) -> int | None:
        """Meta-steps of the whole run; ``None`` where they depend on the periods' results."""
        return self.strategy.meta_steps

    @property
    def meta_step(self) -> int:
        """Meta-steps taken so far."""
        return self._state.progress.meta_step

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl``, as far as they are there."""
        return self._files.metrics()

    def run(self, *, resume: bool = False, report: Report | None = None) -> Policy:
        """Meta-train to the end, and save each student with the weights to keep.

        If the strategy goes back to earlier weights, they are those of the period that it names at
        the end. Otherwise they are, for each replicate, those of its best meta-validation, or its
        last ones if no meta-validation had a finite score. With ``Training.average`` they are
        averaged ones in any case.

        Args:
            resume: Whether to go on from the folder's checkpoint if there is one.
            report: Called after each meta-step with its entry in ``metrics.jsonl`` (the first
                replicate's entry).

        Returns:
            The student (or the first replicate), with the weights that were saved.

        Raises:
            BlockingIOError: Another process has the folder.
            FileExistsError: The folder holds a run and ``resume`` was not asked for.
            NothingLearned: No meta-step changed a student, or its weights are not finite; such a
                student is not saved.
            ValueError: The checkpoint belongs to another run, has another format, or is damaged;
                the student can't be saved; or see :meth:`check`.
        """
        distributed.by_first(self.check)
        state = self._state
        with distributed.locked(self.folder):
            if self._files.open(resume=resume):
                self._files.load_checkpoint(state, self._engine_of, self.device)
            self._check_can_be_saved()
            if self.strategy.goes_back and not self.meta_step:
                self._files.save_period(INITIAL, state)
            with self._files.log(self.meta_step, len(state.replicates)) as log:
                coming = self.strategy.next(state.progress.records)
                while isinstance(coming, Period):
                    self._train(coming, log, report)
                    coming = self.strategy.next(state.progress.records)
            self._finish(coming)
        return self.student

    def check(self) -> None:
        """Compute a step of each task, forward and backward, before anything is written.

        :meth:`run` does so, once.

        Raises:
            ValueError: A backend can't compute it on this device, or the budget of memory is too
                small for the first period's windows.
        """
        if not self._checked:
            coming = self.strategy.next([])
            if isinstance(coming, Period):
                self._meta_steps.check(coming.training.unroll)
            self._checked = True

    def _check_can_be_saved(self) -> None:
        """Write the students as they will be written at the end, and remove them again."""
        for index, replicate in enumerate(self._state.replicates):
            student = replicate.student
            before = student.provenance
            student.provenance = self._provenance(index, kept=0)
            try:
                if distributed.rank() == 0:
                    self._files.try_student(student)
            except TypeError as error:
                raise ValueError(
                    f"the student's configuration and the provenance must be what JSON can hold: "
                    f"{error}"
                ) from error
            finally:
                student.provenance = before

    def _engine_of(self, slot: int) -> Unroll | None:
        """The engine of the episode that a slot is in the middle of, if it is in any."""
        coming = self.strategy.next(self._state.progress.records)
        return self._meta_steps.engine_of(slot, coming) if isinstance(coming, Period) else None

    def _train(self, period: Period, log: IO[str], report: Report | None) -> None:
        """Train a period, or, after a resume, what is left of it."""
        progress, every = self._state.progress, self.training.checkpoint_every
        if not progress.done and progress.checkpoint != period.begin_from:
            self._files.load_period(period.begin_from, self._state)
        over = False
        while not over:
            entries = self._meta_step(period)
            over = progress.done == period.training.meta_steps
            if over:
                entries[0] |= self._close(period)
            saves = over or progress.meta_step % every == 0
            if saves and distributed.world() > 1:
                entries[0]["waited"] = distributed.waited()
            for entry in entries:
                log.write(json.dumps(entry, allow_nan=False) + "\n")
            log.flush()
            if saves:
                self._files.save_checkpoint(self._state)
            if report is not None:
                report(entries[0])

    def _close(self, period: Period) -> dict[str, Any]:
        """End a period: validate it, add its record, save its weights if the strategy goes back.

        Returns:
            What the metrics of its last meta-step are to say about it: the validation, if any.
        """
        progress, metrics, score = self._state.progress, {}, math.nan
        if period.validation is not None:
            score = validation.by_meta_loss(
                self._state.replicates[0].judged,
                self.validation or self.tasks,
                period.validation,
                self.amalgamation,
                self.training,
                seed=self.seed,
            )
            metrics = finite_json({"meta_validation": score, "period": period.name})
        mean = math.fsum(progress.meta_losses) / len(progress.meta_losses)
        progress.records.append(Record.of(period, meta_loss=mean, validation=score))
        following = max(episode.number for episode in progress.running)
        # The episodes in slots have begun, the one that would follow without slots has not.
        progress.episodes = following if period.slots is None else following + 1
        progress.running = []
        self._state.slots.clear()
        progress.done, progress.checkpoint, progress.meta_losses = 0, period.name, []
        if self.strategy.goes_back:
            self._files.save_period(period.name, self._state)
        return metrics

    def _meta_step(self, period: Period) -> list[dict[str, Any]]:
        """Take a meta-step, and return its metrics: one entry per replicate."""
        started = time.perf_counter()
        on_policy, faded = self.amalgamation.on_policy, {}
        if on_policy is not None:
            faded = {"fade": on_policy.fade_at(self.meta_step)}
        step = self._meta_steps.take(period)
        entries = []
        for index, replicate in enumerate(self._state.replicates):
            entry = {
                "meta_step": self.meta_step,
                "stage": period.stage,
                "meta_loss": step.losses[0, index].item(),
                "imitation_loss": step.losses[1, index].item(),
                "grad_norm": step.norms[index],
                "skipped_meta_steps": replicate.skipped_meta_steps,
                **faded,
                "failed_episodes": self._state.progress.failed_episodes,
                **self._window_metrics(period, step, index),
            }
            if len(self.students) > 1:
                entry["replicate"] = index
            if self._is_time_to_validate():
                entry["validation"] = self._validate(index)
            entry["seconds"] = time.perf_counter() - started
            entries.append(finite_json(entry))
        return entries

    def _window_metrics(self, period: Period, step: MetaStep, index: int) -> dict[str, Any]:
        """What a meta-step's entry for a replicate says of its windows.

        In a period with slots it has all slots' windows in the first process, and is empty in the
        others.
        """
        rows = self._meta_steps.rows_of(index)
        if period.slots is None:
            (part,) = step.parts
            several = len(self.tasks) > 1 or isinstance(self.tasks[0], TaskFamily)
            named = {"task": part.task.name} if several else {}
            return {
                "episode": part.episode.number,
                "window": part.episode.window,
                **window_metrics(part.window, self.pool, rows),
                **named,
            }
        own = [
            (
                slot_metrics(part, index, period.training.unroll),
                window_metrics(part.window, self.pool, rows),
            )
            for part in step.parts
        ]
        everywhere = [pair for pairs in distributed.gather(own) for pair in pairs]
        if not everywhere:
            return {}
        everywhere.sort(key=lambda pair: pair[0]["slot"])
        return {
            **over_slots([ours for _, ours in everywhere]),
            "slots": [slot | ours for slot, ours in everywhere],
        }

    def _is_time_to_validate(self) -> bool:
        every = self.training.validate_every
        if not every or self.strategy.goes_back:
            return False
        return self.meta_step % every == 0 or self.meta_step == self.meta_steps

    def _validate(self, index: int) -> float:
        """Score a replicate, and remember its weights if the score is its best so far."""
        replicate = self._state.replicates[index]
        score = validation.of_student(
            replicate.judged,
            self.validation or self.tasks,
            self.training,
            self.amalgamation,
            seed=self.seed + index,
            device=self.device,
        )
        replicate.note_score(score, self.meta_step)
        return score

    def _validated_on(self) -> dict[str, str]:
        """What a student's provenance says of the tasks that it was validated on alone."""
        if not self.validation:
            return {}
        return {"validation_data": "; ".join(task.describe() for task in self.validation)}

    def _finish(self, end: Finish) -> None:
        """Give the students the weights to keep (see :meth:`run`), and save the students.

        Raises:
            NothingLearned: One of them learned nothing, and was not saved.
        """
        state = self._state
        faults = []
        if self.strategy.goes_back and end.checkpoint != state.progress.checkpoint:
            self._files.load_period(end.checkpoint, state)
        for index, replicate in enumerate(state.replicates):
            kept: int | str = self.meta_step
            if self.strategy.goes_back:
                kept = end.checkpoint
                replicate.take_average()
            elif math.isfinite(replicate.best_score):
                kept = replicate.best_meta_step
                replicate.take_best()
            else:
                replicate.take_average()
            replicate.student.provenance = self._provenance(index, kept)
            name = f"replicate {index}" if len(state.replicates) > 1 else "the student"
            if replicate.skipped_meta_steps == self.meta_step:
                faults.append(
                    f"{name} learned nothing: all {self.meta_step} meta-steps were skipped, as "
                    f"losses or meta-gradients were not finite"
                )
            elif not all(weight.isfinite().all() for weight in replicate.student.weights()):
                faults.append(f"the weights of {name} are not finite")
            elif distributed.rank() == 0:
                several = len(state.replicates) > 1
                replicate.student.save(self._files.student(index if several else None))
        if faults:
            raise NothingLearned(
                f"{'; '.join(faults)}; look at {str(self.folder / METRICS)!r}, and try smaller "
                f"learning rates (training.meta_lr, the teachers' lr, the student's warmup_lr), a "
                f"smaller amalgamation.scale_spread, or other data"
            )

    def _provenance(self, index: int, kept: int | str) -> dict[str, Any]:
        """What a replicate's file says of where it comes from.

        Args:
            index: The replicate's number.
            kept: The meta-step or period whose weights it has.
        """
        on_policy = "" if self.amalgamation.on_policy is None else ", on-policy"
        return {
            "seed": self.seed + index,
            "data": "; ".join(task.describe() for task in self.tasks),
            **self._validated_on(),
            "teachers": list(self.pool.names),
            "mechanism": self.amalgamation.mechanism + on_policy,
            "meta_steps": self.meta_step,
            "kept_meta_step": kept,
            "device": str(self.device),
            **self.provenance,
        }


def _settings(task: Task | TaskFamily) -> str:
    """What a run that resumes must share of a task."""
    if isinstance(task, Task):
        return f"{task.describe()}, batches of {task.batch_size}"
    return task.describe()


def _home(task: Task) -> Task:
    """The task on the CPU, so that a run may go on on another device, or where it is.

    A loss that holds tensors of a GPU, or a module with kernels for it alone, runs nowhere else.
    """
    try:
        return task.to("cpu")
    except Exception:
        return task


def _check_known_again(identity: Mapping[str, str]) -> None:
    """Raise TypeError where a setting has an address in memory, which the next process has not.

    So has the ``repr`` of an object whose class has none of its own.
    """
    for name, said in identity.items():
        place = re.search(r"<.*? at 0x[0-9a-f]+>", said, re.IGNORECASE)
        if place is not None:
            raise TypeError(
                f"{name} must say in its repr() all that decides what it does, as runs are resumed "
                f"only with the same repr, not {place.group()}; give its class a __repr__, or make "
                f"it a dataclass"
            )
