"""What the examples share: their optimizers and schedules, and the table, rows and plot of runs."""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from amalgam import AmalgamatedOptimizer
from amalgam.files import whole
from amalgam.version import describe

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
"""AdamW's learning rates."""

SCHEDULES: dict[str, Callable[[Optimizer, int], LRScheduler]] = {
    "constant": lambda optimizer, steps: LambdaLR(optimizer, lambda step: 1.0),
    "cosine": lambda optimizer, steps: CosineAnnealingLR(optimizer, steps),
}
LAST = 20
"""The final training loss is the mean over so many steps."""

_COLOURS = ("#d1495b", "#00998c", "#c98a1b", "#8d63b8", "#5a9a4a")
_OWN_COLOUR = "#3b6fd4"


MakeOptimizer = Callable[[Any], Optimizer]


def optimizers(kind: str) -> dict[str, MakeOptimizer]:
    """The optimizers to compare, by the name that tables give them; none decays weights.

    Args:
        kind: ``"adamw"``, ``"amalgamated"`` or ``"both"``.
    """
    made: dict[str, MakeOptimizer] = {}
    if kind in ("adamw", "both"):
        for rate in RATES:
            made[f"AdamW(lr={rate:g})"] = partial(torch.optim.AdamW, lr=rate, weight_decay=0.0)
    if kind in ("amalgamated", "both"):
        made["AmalgamatedOptimizer()"] = AmalgamatedOptimizer
    return made


class Run(NamedTuple):
    """One training run.

    Attributes:
        optimizer: Its name.
        schedule: One of :data:`SCHEDULES`.
        seed: Of the model's first parameters and of the batches.
        losses: The training loss of every step's batch, before the step.
        validation: The validation loss after some steps, by the number of steps taken.
        accuracy: The share of validation samples that were right at the end.
    """

    optimizer: str
    schedule: str
    seed: int
    losses: list[float]
    validation: dict[int, float]
    accuracy: float

    @property
    def final_training_loss(self) -> float:
        """The mean over the last steps."""
        return statistics.fmean(self.losses[-LAST:])

    @property
    def final_validation_loss(self) -> float:
        """After the last step."""
        return self.validation[len(self.losses)]


def parser(description: str | None, steps: int, seeds: int) -> argparse.ArgumentParser:
    """The options of every example.

    Args:
        description: What the example does.
        steps: Steps of a run, by default.
        seeds: Runs of one optimizer and schedule, by default.
    """
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--optimizer", choices=["adamw", "amalgamated", "both"], default="both")
    made.add_argument("--steps", type=_count, default=steps, help=f"of a run; {steps} by default")
    made.add_argument("--seeds", type=_count, default=seeds, help=f"how many; {seeds} by default")
    made.add_argument("--out", type=Path, help="the folder for the table, the rows and the plot")
    return made


def _count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, not {text!r}")
    return count


def compare(
    train: Callable[[str, MakeOptimizer, str, int, int], Run],
    title: str,
    options: argparse.Namespace,
) -> None:
    """Train with every optimizer, schedule and seed that the options ask for, and report.

    Args:
        train: Makes a run from the optimizer's name and constructor, the schedule, the seed and the
            number of steps.
        title: What is trained; what stands before the colon names the files.
        options: What :func:`parser` parsed.
    """
    runs = []
    where = machine()  # a commit made meanwhile is not what ran
    for schedule in SCHEDULES:
        for name, make_optimizer in optimizers(options.optimizer).items():
            for seed in range(options.seeds):
                run = train(name, make_optimizer, schedule, seed, options.steps)
                print(
                    f"{name}, {schedule}, seed {seed}: {run.final_validation_loss:.4f}", flush=True
                )
                runs.append(run)
    report(runs, title, where, options.out)


def report(runs: Sequence[Run], title: str, where: str, out: Path | None) -> None:
    """Print a table of the runs; into a folder, write it with the rows and the curves.

    Args:
        runs: At least one.
        title: As :func:`compare` takes it.
        where: What :func:`machine` said.
        out: The folder, or ``None``.
    """
    text = f"{title}\n\n{table(runs)}\n\n{where}\n"
    print(text)
    if out is None:
        return
    stem = title.split(":")[0].replace(" ", "-")
    with whole(out / f"{stem}.md") as path:
        path.write_text(text, encoding="utf-8")
    with whole(out / f"{stem}.csv") as path:
        _write_rows(runs, path)
    with whole(out / f"{stem}.png") as path:
        _plot(runs, title, path)


def machine() -> str:
    """Where the runs were made, and of what versions."""
    described = describe()
    processor = next(
        (
            line.split(":")[1].strip()
            for line in _lines_of("/proc/cpuinfo")
            if line.startswith("model name")
        ),
        platform.processor() or platform.machine(),
    )
    return (
        f"{processor}, {torch.get_num_threads()} of {os.cpu_count()} cores; "
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"amalgam {described['amalgam_version']} at {described['commit']}"
    )


def table(runs: Sequence[Run]) -> str:
    """A Markdown table: the mean and, of several seeds, the standard deviation of each result."""
    alike = defaultdict(list)
    for run in runs:
        alike[run.optimizer, run.schedule].append(run)
    lines = [
        "| optimizer | schedule | training loss | validation loss | accuracy |",
        "|---|---|---:|---:|---:|",
    ]
    for (optimizer, schedule), of_seeds in alike.items():
        training = _mean([run.final_training_loss for run in of_seeds])
        validation = _mean([run.final_validation_loss for run in of_seeds])
        accuracy = statistics.fmean(run.accuracy for run in of_seeds)
        lines.append(
            f"| {optimizer} | {schedule} | {training} | {validation} | {100 * accuracy:.1f}% |"
        )
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


def _lines_of(path: str) -> list[str]:
    found = Path(path)
    return found.read_text(encoding="utf-8").splitlines() if found.exists() else []


def _write_rows(runs: Sequence[Run], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["optimizer", "schedule", "seed", "step", "training_loss", "validation"])
        for run in runs:
            head = run.optimizer, run.schedule, run.seed
            for step, loss in enumerate([*run.losses, ""]):
                trained = f"{loss:.5f}" if loss != "" else ""
                validated = f"{run.validation[step]:.5f}" if step in run.validation else ""
                writer.writerow([*head, step, trained, validated])


def _plot(runs: Sequence[Run], title: str, path: Path) -> None:
    """Validation loss over steps, one plot a schedule; the mean over seeds."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    schedules = list(dict.fromkeys(run.schedule for run in runs))
    names = list(dict.fromkeys(run.optimizer for run in runs))
    axes = figure.subplots(1, len(schedules), squeeze=False, sharey=True)[0]
    others = iter(_COLOURS)
    colours = {
        name: _OWN_COLOUR if name.startswith("Amalgamated") else next(others) for name in names
    }
    for ax, schedule in zip(axes, schedules, strict=True):
        for name in names:
            curves = [r.validation for r in runs if (r.optimizer, r.schedule) == (name, schedule)]
            steps = list(curves[0])
            means = [statistics.fmean(curve[step] for curve in curves) for step in steps]
            ax.plot(steps, means, ".-", color=colours[name], label=name)
        ax.set(title=schedule, xlabel="step", yscale="log")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("validation loss")
    axes[0].legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110, format="png")
