"""Optimizees and their data: tasks, and families that tasks are drawn from."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

from amalgam import dotted
from amalgam.hints import did_you_mean
from amalgam.layout import Layout
from amalgam.tasks.digits import digits_cnn, digits_mlp
from amalgam.tasks.families import FAMILIES
from amalgam.tasks.family import NetworkFamily, TaskFamily
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
    if name in FAMILIES:
        raise ValueError(
            f"task must be one of {list(TASKS)} or the dotted path of a function, not the family "
            f"{name!r}, from which only meta-training draws tasks"
        )
    if data is not None:
        arguments = {**(arguments or {}), "data": data}
    task = _make(name, batch_size, arguments)
    if not isinstance(task, Task):
        raise ValueError(f"task {name!r} must return an amalgam.tasks.Task, not {task!r}")
    return task


def load_for_training(
    name: str, batch_size: int | None = None, arguments: Mapping[str, Any] | None = None
) -> Task | TaskFamily:
    """Make the task or the task family of that name, to meta-train or meta-validate on.

    Args:
        name: One of :data:`TASKS` or :data:`FAMILIES`; or the dotted path of a function (or class)
            that takes ``batch_size=`` and returns a :class:`Task` or a :class:`TaskFamily`.
        batch_size: As for :func:`load`; of a family that comes with the package, the largest batch
            that it draws.
        arguments: Further keyword arguments of the function.

    Raises:
        ValueError: As :func:`load` does.
    """
    made = _make(name, batch_size, arguments)
    if not isinstance(made, Task | TaskFamily):
        raise ValueError(
            f"task {name!r} must return an amalgam.tasks.Task or TaskFamily, not {made!r}"
        )
    return made


def _make(name: str, batch_size: int | None, arguments: Mapping[str, Any] | None) -> Any:
    """What the function of that name returns."""
    known = {**TASKS, **FAMILIES}
    if name not in known and "." not in name:
        raise ValueError(
            f"task must be one of {list(known)}, or the dotted path of a function such as "
            f"'my.module.make_task', not {name!r}{did_you_mean(name, known)}"
        )
    try:
        make = known.get(name) or dotted.find(name, "task", "a function", "my.module.make_task")
    except ValueError as error:
        raise ValueError(f"{error}{did_you_mean(name, known)}") from error
    if not callable(make):
        raise ValueError(
            f"task must be a function that takes batch_size= and returns a Task, but {name!r} is "
            f"{make!r}"
        )
    if batch_size is None and _needs_batch_size(make):
        batch_size = 128
    sizes = {} if batch_size is None else {"batch_size": batch_size}
    given = {**sizes, **(arguments or {})}
    dotted.check_arguments(make, name, "task", given)
    return make(**given)


def _needs_batch_size(make: Callable[..., Task]) -> bool:
    """Whether a function can't be called without a batch size."""
    parameter = inspect.signature(make).parameters.get("batch_size")
    return parameter is not None and parameter.default is parameter.empty


__all__ = [
    "FAMILIES",
    "GROUPS",
    "HELD_OUT",
    "PAPER",
    "SHORT",
    "SMALL",
    "TASKS",
    "Batch",
    "Batches",
    "Layout",
    "NetworkFamily",
    "PrivateGradient",
    "SeededBatch",
    "Task",
    "TaskFamily",
    "digits_cnn",
    "digits_mlp",
    "image_task",
    "load",
    "load_for_training",
    "small",
]
