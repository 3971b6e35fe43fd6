"""What a pace is worth: students with several ``pacing`` beside Adam, on draws of families.

python bench/pace.py FILE.json [STUDENT...]   # rows; what is there is not computed again
python bench/pace.py FILE.json --table        # Markdown

A row is the mean log validation loss of an optimizer at a constant rate after so many steps, over
two draws each of the four families that "standard" is meta-validated on. Adam's best is the best of
its three rates on each draw, after the fact. Everything runs in one thread.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from amalgam import AmalgamatedOptimizer, recipes
from amalgam.evaluation.runs import MakeOptimizer, Readings, train
from amalgam.files import whole
from amalgam.policies import NominalStudent, load_policy
from amalgam.seeding import generator_for
from amalgam.tasks import Task
from amalgam.tasks.family import draw
from amalgam.version import describe

RATES = (0.003, 0.01, 0.03)
PACINGS = (0.0, 0.01, 0.03, 0.1)
STEPS = (100, 400, 1600)
DRAWS = 2


def tasks() -> list[Task]:
    """The draws of meta-validation."""
    families = [choice.task for choice in recipes.load("standard").validation]
    return [
        draw(family, generator_for(0, "validation", family.name, number))
        for family in families
        for number in range(DRAWS)
    ]


def with_pacing(name: str, pacing: float) -> NominalStudent:
    """A student with another pacing than the one that it was trained with."""
    student = load_policy(name)
    if not isinstance(student, NominalStudent):
        raise ValueError(f"student must be a nominal one, not {name!r}")
    other = NominalStudent(replace(student.config, pacing=pacing))
    other.load_state_dict(student.state_dict())
    return other


def contenders(students: list[str]) -> dict[str, MakeOptimizer]:
    """Adam at each rate; an untrained student and each of these with each pacing."""
    found: dict[str, MakeOptimizer] = {
        f"Adam {lr:g}": partial(torch.optim.Adam, lr=lr) for lr in RATES
    }
    config = load_policy("standard").config
    untrained = NominalStudent(config)  # type: ignore[arg-type]
    for pacing in PACINGS:
        made = NominalStudent(replace(untrained.config, pacing=pacing))
        found[f"untrained, pacing {pacing:g}"] = partial(AmalgamatedOptimizer, student=made)
        for name in students:
            of = with_pacing(name, pacing)
            found[f"{Path(name).stem}, pacing {pacing:g}"] = partial(
                AmalgamatedOptimizer, student=of
            )
    return found


def losses(make: MakeOptimizer, drawn: list[Task], steps: int) -> list[float]:
    """The log validation loss on each task after so many steps."""
    found = []
    for number, task in enumerate(drawn):
        curve = train(task, make, steps=steps, seed=number % DRAWS, readings=Readings())
        found.append(math.log(curve.final) if curve.final > 0 else math.nan)
    return found


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Means over draws, with Adam's best after the fact."""
    steps = sorted({int(at) for row in rows.values() for at in row})
    lines = [
        "| optimizer | " + " | ".join(f"after {at}" for at in steps) + " |",
        "|---|" + "---:|" * len(steps),
    ]
    means = {name: [fmean(row[str(at)]) for at in steps] for name, row in rows.items()}
    adam = [row for name, row in rows.items() if name.startswith("Adam")]
    means["Adam, the best of three on each draw"] = [
        fmean(map(min, zip(*(row[str(at)] for row in adam), strict=True))) for at in steps
    ]
    lines += [
        f"| {name} | " + " | ".join(f"{mean:.3f}" for mean in of) + " |"
        for name, of in means.items()
    ]
    return "\n".join(lines)


def main() -> None:
    """Compute what is missing, or show the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("students", nargs="*", default=["standard"])
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    content: dict[str, Any] = {"about": describe(), "rows": {}}
    if given.file.exists():
        content = json.loads(given.file.read_text(encoding="utf-8"))
    if given.table:
        print(table(content["rows"]))
        return
    torch.set_num_threads(1)
    drawn = tasks()
    for name, make in contenders(given.students).items():
        row = content["rows"].setdefault(name, {})
        for steps in given.steps:
            if str(steps) not in row:
                row[str(steps)] = losses(make, drawn, steps)
                print(f"{name}, {steps}: {fmean(row[str(steps)]):.4f}", flush=True)
                with whole(given.file) as beside:
                    beside.write_text(json.dumps(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
