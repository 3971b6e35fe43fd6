"""What weight decay does: where little data is trained on for long, and in short runs on more.

python bench/weight_decay.py run FILE.json           # the digits' two networks; also run-short
python bench/weight_decay.py table FILE.json         # Markdown, from the rows; also table-short

Every run has the same initial parameters and batches of a seed. On the digits validation losses are
read every 20 steps. The short runs are on tasks of the short protocol, at both decays of the rate.
All are on all validation data.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
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


SHORT, SHORT_SEEDS, SHORT_STEPS = ("mlp", "small-batch", "svhn", "dp"), range(3), 100
SHORT_DECAYS, RATE_DECAYS = (0.0, 1e-3, 3e-3, 1e-2), ("constant", "linear")


def run(file: Path) -> None:
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
    write(file, rows)


def run_short(file: Path) -> None:
    rows = []
    for task in map(tasks.load, SHORT):
        for name, decay, of_rate in itertools.product(STUDENTS, SHORT_DECAYS, RATE_DECAYS):
            make = functools.partial(STUDENTS[name], weight_decay=decay)
            how: dict[str, Any] = {"steps": SHORT_STEPS, "readings": Readings(), "decay": of_rate}
            curves = [train(task, make, seed=seed, **how) for seed in SHORT_SEEDS]
            row: dict[str, Any] = {
                "task": task.name,
                "optimizer": name,
                "weight_decay": decay,
                "decay": of_rate,
                "last": [curve.final for curve in curves],
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    write(file, rows)


def write(file: Path, rows: list[dict[str, Any]]) -> None:
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


def table_short(file: Path) -> str:
    """Losses over those of the same student at the same rates without weight decay, seed by seed.

    Geometric means over the seeds.
    """
    rows = json.loads(file.read_text())["rows"]
    losses = {(r["task"], r["optimizer"], r["weight_decay"], r["decay"]): r["last"] for r in rows}
    names = list(dict.fromkeys(row["task"] for row in rows))
    lines = [
        f"| optimizer | weight decay | {' | '.join(names)} |",
        "|---|" + "---:|" * (len(names) + 1),
    ]
    for name, of_rate, decay in itertools.product(STUDENTS, RATE_DECAYS, SHORT_DECAYS[1:]):
        cells = []
        for task in names:
            pairs = zip(
                losses[task, name, decay, of_rate], losses[task, name, 0.0, of_rate], strict=True
            )
            cells.append(f"{math.exp(fmean(math.log(with_it / at) for with_it, at in pairs)):.3f}")
        label = name if of_rate == "constant" else f"{name}, {of_rate}"
        lines.append(f"| {label} | {decay:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runs = {"run": run, "run-short": run_short}
    tables = {"table": table, "table-short": table_short}
    for name in (*runs, *tables):
        commands.add_parser(name).add_argument("file", type=Path)
    asked = parser.parse_args()
    if asked.command in tables:
        print(tables[asked.command](asked.file))
        return
    torch.set_num_threads(1)
    # The optimizer says that 1e-2 is much, which is the point.
    warnings.simplefilter("ignore")
    runs[asked.command](asked.file)


if __name__ == "__main__":
    main()
