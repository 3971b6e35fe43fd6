"""Small runs of the trainer, and killing them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from amalgam.meta import Amalgamation, Stage, Stages, Trainer, Training
from amalgam.meta.perturbation import KINDS, Perturbation
from amalgam.meta.run_folder import METRICS
from amalgam.policies import (
    DM,
    AdamLR,
    Choice,
    ChoiceConfig,
    DMConfig,
    DynamicRateConfig,
    NominalConfig,
    NominalStudent,
    Policy,
    Pool,
    RMSPropLR,
    RNNPropExt,
    RNNPropExtConfig,
    ScaleHierarchical,
    ScaleHierarchicalConfig,
    Student,
    StudentConfig,
)
from amalgam.seeding import generator_for
from amalgam.tasks import Task


def linear_task(inputs: int = 4, name: str = "linear") -> Task:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, inputs, generator=generator)
    y = (x[:, 0] > 0).long()
    return Task(
        name, lambda: nn.Linear(inputs, 2), (x[:48], y[:48]), (x[48:], y[48:]), batch_size=16
    )


@dataclass(frozen=True)
class LinearFamily:
    """Linear tasks of 2 to 7 inputs, with batches of half or a quarter of their data."""

    name: str = "linears"
    batch_size: int = 24

    def draw(self, generator: torch.Generator) -> Task:
        inputs, scale = torch.randint(2, 8, (2,), generator=generator).tolist()
        size = self.batch_size // int(torch.randint(1, 3, (), generator=generator))
        x = scale * torch.randn((64, inputs), generator=generator)
        y = (x[:, 0] > 0).long()
        data = (x[:48], y[:48]), (x[48:], y[48:])
        name = f"{self.name}[{inputs}, {scale}, {size}, {x[0, 0].item():.6f}]"
        return Task(name, lambda: nn.Linear(inputs, 2), *data, batch_size=size)

    def describe(self) -> str:
        return f"{self.name}, batches up to {self.batch_size}"


def tiny_student(seed: int, **changes: Any) -> Student:
    config = StudentConfig(**{"hidden": 4, "layers": 1, "warmup_steps": 2} | changes)
    return Student(config, generator=generator_for(seed, "student"))


def perturbation_of(kind: str, **fields: Any) -> Perturbation:
    """A perturbation by its name in recipes."""
    constructor, settled = KINDS[kind]
    made: Perturbation = constructor(**settled, **fields)
    return made


SMALL = {"layers": 1, "hidden": 3, "warmup_steps": 2}


def policies() -> dict[str, Policy]:
    generator = generator_for(0)
    units = {"param_units": 3, "tensor_units": 2, "global_units": 2, "warmup_steps": 2}
    return {
        "student": tiny_student(7),
        "nominal": NominalStudent(
            NominalConfig(
                inputs=("time", "rank", "fan_in", "rms"), pacing=0.2, steady_agreement=0.1, **SMALL
            ),
            generator=generator_for(0),
        ),
        "choice": Choice(ChoiceConfig("small", **SMALL), generator=generator),
        "hard-choice": Choice(ChoiceConfig("small", hardness=2.0, **SMALL), generator=generator),
        "dm": DM(DMConfig(**SMALL), generator=generator),
        "rnnprop_ext": RNNPropExt(RNNPropExtConfig(**SMALL), generator=generator),
        "adam_lr": AdamLR(DynamicRateConfig(**SMALL), generator=generator),
        "rmsprop_lr": RMSPropLR(DynamicRateConfig(**SMALL), generator=generator),
        "scale": ScaleHierarchical(ScaleHierarchicalConfig(**units), generator=generator),
    }


def trainer(
    folder: Path,
    students: Policy | list[Policy] | None = None,
    tasks: Any = None,
    pool: Any = ("adam", "sgd"),
    **changes: Any,
) -> Trainer:
    settings: dict[str, Any] = {
        "amalgamation": Amalgamation(scale_spread=1.0, backend="reference"),
        "training": Training(
            validate_every=3, validation_steps=6, validation_seeds=1, checkpoint_every=2
        ),
        "strategy": Stages((Stage(3, 1, 0.2), Stage(2, 2, 0.05)), 4),
        "seed": 7,
        "device": "cpu",
    } | changes
    return Trainer(
        students or tiny_student(settings["seed"]),
        tasks or linear_task(),
        pool if isinstance(pool, Pool) else Pool(pool),
        folder=folder,
        **settings,
    )


def metrics(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    for row in rows:
        del row["seconds"]
        row.pop("waited", None)
    return rows


class Killed(Exception):
    pass


def killer(at: int) -> Callable[[dict[str, Any]], None]:
    def kill(row: dict[str, Any]) -> None:
        if row["meta_step"] == at:
            raise Killed

    return kill


def resumes_to_the_same_bits(make: Callable[[Path], Trainer], folder: Path) -> list[Any]:
    """Runs it whole, and twice with kills at every other meta-step; the whole's rows.

    What is resumed goes on for two meta-steps, so that a fault shows that does not at once.
    """
    whole = make(folder / "whole").run()
    rows = metrics(folder / "whole")
    steps = rows[-1]["meta_step"]
    for first in (1, 2):
        cut = folder / f"cut-{first}"
        for at in range(first, steps + 1, 2):
            with pytest.raises(Killed):
                make(cut).run(resume=at > first, report=killer(at))
        resumed = make(cut).run(resume=True)
        assert all(map(torch.equal, whole.weights(), resumed.weights())), first
        assert metrics(cut) == rows, first
        assert resumed.provenance == whole.provenance, first
    return rows
