"""Optimizees and their data."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

from amalgam import dotted
from amalgam.hints import did_you_mean
from amalgam.layout import Layout
from amalgam.tasks.digits import digits_cnn, digits_mlp
from amalgam.tasks.paper import GROUPS, PAPER, SHORT, image_task
from amalgam.tasks.paper import TASKS as _OF_THE_PAPER
from amalgam.tasks.private import PrivateGradient
from amalgam.tasks.small import HELD_OUT, SMALL, small
from amalgam.tasks.task import Batch, Batches, SeededBatch, Task

TASKS: dict[str, Callable[..., Task]] = {
    "digits-mlp": digits_mlp,
    "digits-cnn": digits_cnn,
    "small": small,
    **_OF_THE_PAPER,
}


def load(
    name: str,
    batch_size: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    *,
    data: str | os.PathLike[str] | None = None,
) -> Task:
    """Make the task of that name.

    Args:
        name: One of :data:`TASKS`; or the dotted path of a function that takes ``batch_size=`` and
            returns a :class:`Task`, such as ``"my.module.make_task"``.
        batch_size: Samples per step; where ``None``, the task's own, or 128 if it has none.
        arguments: Further keyword arguments of the function.
        data: The same as ``arguments={"data": ...}``: for a task on images where they come from,
            :func:`amalgam.tasks.datasets.load`.

    Raises:
        ValueError: There is no such task, the function can't be imported, does not take these
            arguments or does not return a task, the data has fewer samples than a batch, or can't
            be read as it is.
        FileNotFoundError: The folder of published data does not hold the task's.
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
    given = dict(arguments or {})
    if data is not None:
        given["data"] = data
    if batch_size is None and _needs_batch_size(make):
        batch_size = 128
    if batch_size is not None:
        given.setdefault("batch_size", batch_size)
    dotted.check_arguments(make, name, "task", given)
    task = make(**given)
    if not isinstance(task, Task):
        raise ValueError(f"task {name!r} must return an amalgam.tasks.Task, not {task!r}")
    return task


def _needs_batch_size(make: Callable[..., Task]) -> bool:
    """Whether a function can't be called without a batch size."""
    parameter = inspect.signature(make).parameters.get("batch_size")
    return parameter is not None and parameter.default is parameter.empty


__all__ = [
    "GROUPS",
    "HELD_OUT",
    "PAPER",
    "SHORT",
    "SMALL",
    "TASKS",
    "Batch",
    "Batches",
    "Layout",
    "PrivateGradient",
    "SeededBatch",
    "Task",
    "digits_cnn",
    "digits_mlp",
    "image_task",
    "load",
    "small",
]
