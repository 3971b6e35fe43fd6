"""Optimizees and their data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from amalgam import dotted
from amalgam.hints import did_you_mean
from amalgam.layout import Layout
from amalgam.tasks.digits import digits_cnn, digits_mlp
from amalgam.tasks.paper import train
from amalgam.tasks.small import HELD_OUT, SMALL, small
from amalgam.tasks.task import Batch, Batches, Task

TASKS: dict[str, Callable[..., Task]] = {
    "digits-mlp": digits_mlp,
    "digits-cnn": digits_cnn,
    "small": small,
    "train": train,
}


def load(name: str, batch_size: int = 128, arguments: Mapping[str, Any] | None = None) -> Task:
    """Make the task of that name.

    Args:
        name: One of :data:`TASKS`; or the dotted path of a function that takes ``batch_size=`` and
            returns a :class:`Task`, such as ``"my.module.make_task"``.
        batch_size: Samples per step.
        arguments: Further keyword arguments of the function.

    Raises:
        ValueError: There is no such task, the function can't be imported, does not take these
            arguments or does not return a task, or the data has fewer samples than a batch.
    """
    if name not in TASKS and "." not in name:
        raise ValueError(
            f"task must be one of {list(TASKS)}, or the dotted path of a function such as "
            f"'my.module.make_task', not {name!r}{did_you_mean(name, TASKS)}"
        )
    make = TASKS.get(name) or dotted.find(name, "task", "a function", "my.module.make_task")
    if not callable(make):
        raise ValueError(
            f"task must be a function that takes batch_size= and returns a Task, but {name!r} is "
            f"{make!r}"
        )
    given = {"batch_size": batch_size, **(arguments or {})}
    dotted.check_arguments(make, name, "task", given)
    task = make(**given)
    if not isinstance(task, Task):
        raise ValueError(f"task {name!r} must return an amalgam.tasks.Task, not {task!r}")
    return task


__all__ = [
    "HELD_OUT",
    "SMALL",
    "TASKS",
    "Batch",
    "Batches",
    "Layout",
    "Task",
    "digits_cnn",
    "digits_mlp",
    "load",
    "small",
    "train",
]
