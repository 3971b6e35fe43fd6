"""What weight decay does where little data is trained on for long: the digits' two networks.

python bench/weight_decay.py run FILE.json     # trains; a row for each optimizer, decay and task
python bench/weight_decay.py table FILE.json   # Markdown, from the rows

Every run has the same initial parameters and batches of a seed. Validation losses are read every 20
steps, on all validation data.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import warnings
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from amalgam import AmalgamatedOptimizer, tasks
from amalgam.evaluation import Readings, train
from amalgam.files import whole
from amalgam.version import describe

TESTED, SEEDS, STEPS, EVERY = ("digits-mlp", "digits-cnn"), range(5), 500, 20
STUDENTS: dict[str, Any] = {
    name: functools.partial(AmalgamatedOptimizer, student=name) for name in ("standard", "compact")
}
# Adam's and AdamW's best constant rates on these networks: docs/results.md.
RIVALS: dict[str, Any] = {
    "Adam, lr=0.02": functools.partial(torch.optim.Adam, lr=0.02),
    "AdamW, lr=0.01": functools.partial(torch.optim.AdamW, lr=0.01),
    "AdamW, lr=0.02": functools.partial(torch.optim.AdamW, lr=0.02),
}
CASES: list[tuple[str, float]] = [
    *((name, decay) for name in STUDENTS for decay in (0.0, 1e-4, 1e-3, 1e-2)),
    ("Adam, lr=0.02", 0.0),
    *((name, decay) for name in ("AdamW, lr=0.01", "AdamW, lr=0.02") for decay in (0.01, 0.1)),
]


def run(file: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the optimizer says that 1e-2 is much, which is the point
    readings = Readings(tuple(range(EVERY, STEPS, EVERY)))
    rows = []
    for task in map(tasks.load, TESTED):
        for name, decay in CASES:
            make = functools.partial((STUDENTS | RIVALS)[name], weight_decay=decay)
            curves = [train(task, make, steps=STEPS, seed=s, readings=readings) for s in SEEDS]
            row: dict[str, Any] = {
                "task": task.name,
                "optimizer": name,
                "weight_decay": decay,
                "best": [curve.best for curve in curves],
                "last": [curve.final for curve in curves],
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    machine = {**describe(), "torch": torch.__version__, "threads": 1}
    machine["machine"] = platform.processor() or platform.machine()
    with whole(file) as beside:
        beside.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def table(file: Path) -> str:
    """Means and standard deviations over seeds of the best reading and of the last."""
    rows = json.loads(file.read_text())["rows"]
    titles = [f"{task}: {what}" for task in TESTED for what in ("best", "last")]
    lines = [
        f"| optimizer | weight decay | {' | '.join(titles)} |",
        "|---|" + "---:|" * (len(titles) + 1),
    ]
    for name, decay in CASES:
        cells = []
        for task in TESTED:
            (row,) = (
                row
                for row in rows
                if (row["task"], row["optimizer"], row["weight_decay"]) == (task, name, decay)
            )
            cells += [f"{fmean(row[k]):.4f} ± {stdev(row[k]):.4f}" for k in ("best", "last")]
        lines.append(f"| {name} | {decay:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "table"):
        commands.add_parser(name).add_argument("file", type=Path)
    asked = parser.parse_args()
    if asked.command == "run":
        run(asked.file)
    else:
        print(table(asked.file))


if __name__ == "__main__":
    main()
