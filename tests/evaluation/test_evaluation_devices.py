"""Optimizees trained on another device than the CPU, by optimizers of every kind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from elsewhere import ELSEWHERE, Elsewhere
from torch import nn
from torch.optim import Optimizer

from amalgam import AmalgamatedOptimizer, PolicyOptimizer, Student, StudentConfig, TeacherOptimizer
from amalgam.evaluation import Readings, train
from amalgam.policies import (
    Choice,
    ChoiceConfig,
    ScaleHierarchical,
    ScaleHierarchicalConfig,
    Teacher,
    TorchTeacher,
)
from amalgam.seeding import generator_for
from amalgam.tasks import Task

READINGS = Readings((2, 4), (5,))
SMALL: dict[str, Any] = {"layers": 1, "hidden": 3, "warmup_steps": 2}


def task() -> Task:
    x = torch.randn(60, 4, generator=generator_for(1))
    y = (x[:, 0] > 0).long()

    def build() -> nn.Module:
        # Of a bias before the norm, gradients are rounding errors, and Adam makes steps of them.
        return nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3), nn.Linear(3, 2))

    return Task("net", build, (x[:40], y[:40]), (x[40:], y[40:]), batch_size=8)


def student() -> Student:
    return Student(StudentConfig(**SMALL), generator=generator_for(2))


def learned() -> dict[str, Callable[[Any], Optimizer]]:
    """Made on the CPU, as a file gives them."""
    choice = Choice(ChoiceConfig("small", **SMALL), generator=generator_for(3))
    scale = ScaleHierarchical(ScaleHierarchicalConfig(warmup_steps=2), generator=generator_for(4))
    muon = TorchTeacher("torch.optim.Muon", lr=0.02, others=("torch.optim.AdamW", {"lr": 0.01}))
    return {
        "torch": partial(torch.optim.Adam, lr=0.01),
        "student": partial(AmalgamatedOptimizer, student=student(), backend="reference"),
        "capturable": partial(
            AmalgamatedOptimizer, student=student(), backend="reference", capturable=True
        ),
        "choice": partial(PolicyOptimizer, policy=choice, backend="reference"),
        "hierarchical": partial(PolicyOptimizer, policy=scale),
        "teacher": partial(TeacherOptimizer, teacher=Teacher("momentum", 0.1)),
        "torch teacher": partial(TeacherOptimizer, teacher=muon),
    }


@pytest.mark.parametrize("name", learned())
def test_a_curve_elsewhere_is_the_cpus(name) -> None:
    here = train(task(), learned()[name], steps=5, seed=3, readings=READINGS)
    make = learned()[name]
    with Elsewhere():
        there = train(task().to(ELSEWHERE), make, steps=5, seed=3, readings=READINGS)
    # A teacher is computed by the fastest backend, which is another on each device.
    assert there.losses == pytest.approx(here.losses, rel=1e-6 if name == "teacher" else 0)
    assert there.accuracies == here.accuracies
    assert there.full[-1] == pytest.approx(here.full[-1], rel=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("name", learned())
def test_a_curve_on_a_gpu_is_close_to_the_cpus(name) -> None:
    here = train(task(), learned()[name], steps=5, seed=3, readings=READINGS)
    there = train(task().to("cuda"), learned()[name], steps=5, seed=3, readings=READINGS)
    assert there.losses == pytest.approx(here.losses, rel=1e-4)
