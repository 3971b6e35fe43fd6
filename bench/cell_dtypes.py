"""What it does to a training run that the LSTM's state is kept in fewer bits.

python bench/cell_dtypes.py run FILE.json     # trains; a row for each run
python bench/cell_dtypes.py table FILE.json   # Markdown, from the rows

Every run of a task, student and seed begins at the same parameters and takes the same batches. Its
row has the loss on all validation data at the end, and how far the parameters ended from those with
float32 cells, over how far these came. The yardstick is a run with float32 cells that begins one
last bit of every parameter away.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from amalgam import AmalgamatedOptimizer, tasks
from amalgam.files import whole
from amalgam.tasks import Task
from amalgam.version import describe

RUNS = ("standard", "digits-mlp"), ("standard", "digits-cnn"), ("digits", "digits-mlp")
SEEDS = range(3)
STEPS = 1000
EXACT, NEAR = "float32", "float32, one last bit away"
CELLS: dict[str, dict[str, Any]] = {
    EXACT: {},
    NEAR: {},
    "bfloat16": {"cells_dtype": torch.bfloat16},
    "bfloat16, stochastic": {"cells_dtype": torch.bfloat16, "rounding": "stochastic"},
    "int8": {"cells_dtype": torch.int8},
    "int8, stochastic": {"cells_dtype": torch.int8, "rounding": "stochastic"},
}


def flat(module: nn.Module) -> Tensor:
    return torch.cat([param.detach().reshape(-1) for param in module.parameters()])


def trained(task: Task, student: str, seed: int, cells: str) -> tuple[Tensor, Tensor, float]:
    """Parameters before and after a run, and the validation loss after it."""
    generator = torch.Generator().manual_seed(seed)
    module = task.init_module(generator)
    if cells == NEAR:
        with torch.no_grad():
            for param in module.parameters():
                param.copy_(param.nextafter(torch.tensor(math.inf)))
    before = flat(module)
    optimizer = AmalgamatedOptimizer(module.parameters(), student=student, **CELLS[cells])
    for batch in task.batches(generator, STEPS):
        optimizer.zero_grad()
        task.loss(module(*batch[:-1]), batch[-1]).backward()
        optimizer.step()
    with torch.no_grad():
        loss = task.loss(module(*task.validation[:-1]), task.validation[-1]).item()
    return before, flat(module), loss


def rows_of(name: str, student: str, seed: int) -> list[dict[str, Any]]:
    task, rows = tasks.load(name), []
    runs = {cells: trained(task, student, seed, cells) for cells in CELLS}
    before, exact, _ = runs[EXACT]
    for cells, (_, after, loss) in runs.items():
        distance = ((after - exact).norm() / (exact - before).norm()).item()
        rows.append(
            {
                **{"task": name, "student": student, "seed": seed, "steps": STEPS, "cells": cells},
                **{"validation_loss": loss, "distance": distance},
            }
        )
    return rows


def run(file: Path) -> None:
    torch.set_num_threads(1)
    machine = {
        **describe(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    rows: list[dict[str, Any]] = []
    for student, task in RUNS:
        for seed in SEEDS:
            rows += rows_of(task, student, seed)
    with whole(file) as partial:
        partial.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def table(file: Path) -> str:
    """Means over the seeds, and of the loss the largest change from float32's of the same seed."""
    rows = json.loads(file.read_text())["rows"]
    lines = [
        "| student | task | cells | validation loss | largest change of it | distance |",
        "|---|---|---|---|---|---|",
    ]
    exact: dict[int, float] = {}
    for first in (row for row in rows if row["seed"] == SEEDS[0]):
        alike = [row for row in rows if {**row, **_of_run(first)} == row]
        losses = {row["seed"]: row["validation_loss"] for row in alike}
        if first["cells"] == EXACT:
            exact = losses
        change = max((loss / exact[seed] - 1 for seed, loss in losses.items()), key=abs)
        distance = fmean(row["distance"] for row in alike)
        lines.append(
            f"| {first['student']} | {first['task']} | {first['cells']} "
            f"| {fmean(losses.values()):.4f} | {change:+.3%} | {distance:.1e} |"
        )
    return "\n".join(lines)


def _of_run(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("task", "student", "cells")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.file)
    else:
        print(table(arguments.file))


if __name__ == "__main__":
    main()
