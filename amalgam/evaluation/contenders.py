"""The optimizers that an evaluation compares: learned ones, teachers, and torch's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from amalgam.evaluation.protocol import Contender, tune
from amalgam.optimizers import optimizer_of, optimizer_of_teacher
from amalgam.policies import Policy, Pool
from amalgam.tasks import Task


def student_contender(name: str, student: Policy) -> Contender:
    """A learned policy as a contender, with the warm-up that it was trained with."""
    return Contender(name, partial(optimizer_of, policy=student))


def teacher_contenders(pool: Pool) -> list[Contender]:
    """A pool's teachers as contenders, each on its own."""
    return [
        Contender(name, partial(optimizer_of_teacher, teacher=teacher))
        for name, teacher in zip(pool.names, pool.teachers, strict=True)
    ]


def torch_contenders(
    task: Task, *, steps: int, report: Callable[[str], None] = lambda what: None
) -> list[Contender]:
    """torch.optim's Adam and AdamW, each at the learning rate that suits the task best.

    Args:
        task: Optimizee and data, on the device to train on.
        steps: Steps of each run; rates are tuned for runs of that length.
        report: Called before an optimizer is tuned, with ``"tuning Adam"`` or the like.
    """
    contenders = []
    for kind in (torch.optim.Adam, torch.optim.AdamW):
        report(f"tuning {kind.__name__}")
        rate = tune(task, kind, steps=steps)
        contenders.append(Contender(f"torch {kind.__name__}({rate:g})", partial(kind, lr=rate)))
    return contenders
