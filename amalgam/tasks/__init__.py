"""Optimizees and their data."""

from __future__ import annotations

from collections.abc import Callable

from amalgam.hints import did_you_mean
from amalgam.layout import Layout
from amalgam.tasks.digits import digits_cnn, digits_mlp
from amalgam.tasks.task import Batch, Batches, Task

TASKS: dict[str, Callable[[int], Task]] = {"digits-mlp": digits_mlp, "digits-cnn": digits_cnn}


def load(name: str, batch_size: int = 128) -> Task:
    """The task of that name.

    Args:
        name: One of :data:`TASKS`.
        batch_size: Samples a step.

    Raises:
        ValueError: There is no such task, or its data has fewer samples than a batch.
    """
    if name not in TASKS:
        hint = did_you_mean(name, TASKS)
        raise ValueError(f"task must be one of {list(TASKS)}, not {name!r}{hint}")
    return TASKS[name](batch_size)


__all__ = ["TASKS", "Batch", "Batches", "Layout", "Task", "digits_cnn", "digits_mlp", "load"]
