"""What a recipe holds, as dataclasses; what they describe is made once, when they are."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from amalgam import policies, tasks
from amalgam.device import resolve
from amalgam.meta import Amalgamation, Conditions, Memory, Stages, Training, Truncation
from amalgam.meta.curriculum import choice_strategy
from amalgam.policies import ChoiceConfig, Pool
from amalgam.ranges import check_fields
from amalgam.recipes.kinds import (
    CHOICE_STRATEGY,
    ESTIMATOR,
    PERTURBATION,
    POLICY,
    STRATEGY,
    AnyEstimator,
    AnyPerturbation,
    AnyPolicy,
    AnyStrategy,
    ChoiceStrategy,
    Chosen,
    MadeOnce,
    TeacherChoice,
)
from amalgam.tasks import Task, TaskFamily


@dataclass(frozen=True)
class ValidationTask(MadeOnce):
    """A task, or a family of tasks, to meta-validate on.

    Attributes:
        name: One of :data:`amalgam.tasks.TASKS` or :data:`amalgam.tasks.FAMILIES`; or the dotted
            path of a function that takes ``batch_size=`` and returns a task or a family.
        batch_size: Samples per step; of a family that comes with the package, the largest batch
            that it draws.
        arguments: Further arguments of the function.
    """

    name: str
    batch_size: int = 128
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what does not exist."""
        check_fields(self, counts=("batch_size",))
        _ = self.task

    @cached_property
    def task(self) -> Task | TaskFamily:
        """The task or family, made once; on the CPU, as far as its function makes it there."""
        return tasks.load_for_training(self.name, self.batch_size, self.arguments)


@dataclass(frozen=True)
class TaskChoice(ValidationTask):
    """A task, or a family of tasks, to meta-train on.

    Attributes:
        weight: How often it is taken, relative to the weights of the others.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what does not exist."""
        super().__post_init__()
        check_fields(self, positive=("weight",))


@dataclass(frozen=True)
class EvaluationTask:
    """A task to evaluate on, with arguments.

    Attributes:
        name: As in :func:`amalgam.tasks.load`.
        arguments: Further arguments of the function.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ChoiceTraining:
    """The optimal choice that is trained first, and then teaches the student (paper, eq. 4).

    It is trained by the meta-loss alone, without teachers.

    Attributes:
        policy: Its pool, architecture and constants.
        strategy: How it is trained; by default as the authors do.
        training: Likewise; where absent, as the student is.
    """

    policy: ChoiceConfig = field(default_factory=ChoiceConfig)
    strategy: ChoiceStrategy = field(default_factory=lambda: Chosen("choice", choice_strategy()))
    training: Training | None = None


@dataclass(frozen=True)
class Evaluation:
    """What the run's closing table compares, and how.

    Attributes:
        tasks: Tasks to train with every contender, each of which has a table of its own. A name
            stands for a task without arguments. Their batch size is that of the recipe's first
            task.
        steps: Steps of each run, the student's warm-up included.
        seeds: Runs of each contender.
        every: Steps between two readings of the validation loss.
    """

    tasks: tuple[str | EvaluationTask, ...] = ("digits-mlp",)
    steps: int = 500
    seeds: int = 5
    every: int = 20

    def __post_init__(self) -> None:
        """Refuse what can't be run."""
        check_fields(self, counts=("steps", "seeds", "every"))


@dataclass(frozen=True)
class Recipe(MadeOnce):
    """One experiment, complete.

    Attributes:
        description: What it is for.
        tasks: The optimizees and data to meta-train on, or families of tasks; in a file ``[task]``
            is a single one.
        validation: Tasks and families to meta-validate on, by which the weights to keep are chosen;
            where absent, those to meta-train on.
        teachers: The pool; ``[]`` for the meta-loss alone.
        policy: The student's kind, architecture and constants; in a file ``[student]`` is short for
            a policy of that kind.
        choice: The choice to train first, as the one teacher.
        amalgamation: How the student is held to task and teachers.
        training: How meta-training proceeds.
        strategy: Which unrolls are trained, period by period; ``Stages()`` where a file gives none.
        estimator: How meta-gradients are estimated.
        memory: How much memory a window may take for its backward pass.
        perturbation: Perturbation of the weights that the meta-gradient is taken at.
        conditions: What each episode of the student's meta-training draws: weight decay, learning
            rates, the loss's scale. A choice that is trained first meets none.
        replicates: Students that are trained side by side, each from a seed of its own.
        evaluation: The closing table.
        threads: PyTorch's intra-op threads, on which the last bits of its sums depend; where
            absent, as many as the process has. One is as fast as many for optimizees of a few
            thousand parameters, and gives the same numbers on machines of any size.
        device: Where everything is computed, as in :func:`amalgam.device.resolve`. Random draws
            are the same on every device, the last bits of sums are not.
    """

    tasks: tuple[TaskChoice, ...]
    teachers: tuple[TeacherChoice, ...] = ()
    validation: tuple[ValidationTask, ...] = ()
    description: str = ""
    policy: AnyPolicy = field(default_factory=lambda: Chosen("student", policies.StudentConfig()))
    choice: ChoiceTraining | None = None
    amalgamation: Amalgamation = field(default_factory=Amalgamation)
    training: Training = field(default_factory=Training)
    strategy: AnyStrategy = field(default_factory=lambda: Chosen("stages", Stages()))
    estimator: AnyEstimator = field(default_factory=lambda: Chosen("truncation", Truncation()))
    memory: Memory = field(default_factory=Memory)
    perturbation: AnyPerturbation | None = None
    conditions: Conditions = field(default_factory=Conditions)
    replicates: int = 1
    evaluation: Evaluation = field(default_factory=Evaluation)
    threads: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        """Refuse what can't be run."""
        check_fields(self, counts=("threads", "replicates"))
        resolve(self.device)
        if not self.tasks:
            raise ValueError("tasks must hold at least one task")
        if self.choice is not None and self.teachers:
            raise ValueError(
                "teachers must be none beside a choice, which is the one teacher; "
                "those that it chooses from are choice.policy.teachers"
            )
        if self.replicates > 1 and self.strategy.settings.goes_back:
            raise ValueError(
                f"replicates must be 1 with a strategy that goes back to earlier weights, as "
                f"{self.strategy.kind!r} does, not {self.replicates}; train by stages, or one "
                f"after another (--seed)"
            )
        self.training.check_schedule(self.strategy.settings.meta_steps)
        names = self.pool.names
        if len(set(names)) < len(names):
            raise ValueError(
                f"teachers must differ in kind, learning rate or decay, not {list(names)}"
            )
        try:
            evaluated = [task.name for task in self.evaluation_tasks]
        except ValueError as error:
            raise ValueError(f"evaluation.tasks: {error}") from error
        # Their rows and files are named after them.
        if len(set(evaluated)) < len(evaluated):
            raise ValueError(f"evaluation.tasks must differ in their names, not be {evaluated}")

    @cached_property
    def pool(self) -> Pool:
        """The teachers; a choice that is to be trained first is not among them."""
        return Pool([t.teacher for t in self.teachers], [t.lr_decay for t in self.teachers])

    @cached_property
    def evaluation_tasks(self) -> tuple[Task, ...]:
        """The tasks of the closing table; one that is also meta-trained on is the same object."""
        size = self.tasks[0].batch_size
        made = [
            ((one.name, one.batch_size, one.arguments), one.task)
            for one in self.tasks
            if isinstance(one.task, Task)
        ]
        found = []
        for entry in self.evaluation.tasks:
            one = EvaluationTask(entry) if isinstance(entry, str) else entry
            wanted = (one.name, size, one.arguments)
            known = next((task for key, task in made if key == wanted), None)
            found.append(known or tasks.load(*wanted))
            made.append((wanted, found[-1]))
        return tuple(found)

    def as_dict(self) -> dict[str, Any]:
        """The recipe as JSON can hold it, everything that was left to defaults spelled out."""
        content = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        for name, kinds in _CHOSEN.items():
            chosen = getattr(self, name)
            content[name] = chosen and kinds.as_table(chosen)
        if self.choice is not None:
            content["choice"]["strategy"] = CHOICE_STRATEGY.as_table(self.choice.strategy)
        for name in ("perturbation", "choice", "validation"):
            if not content[name]:
                del content[name]
        resolved: dict[str, Any] = json.loads(json.dumps(content))
        return resolved


_CHOSEN = {
    "policy": POLICY,
    "strategy": STRATEGY,
    "estimator": ESTIMATOR,
    "perturbation": PERTURBATION,
}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
