"""What an evaluation writes: ``evaluation.json``, ``evaluation.md`` and a plot per task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amalgam import files
from amalgam.evaluation import plots, tables
from amalgam.evaluation.protocol import Result, spread
from amalgam.version import describe


def title(results: Sequence[Result], steps: int) -> str:
    """The title of one task's table.

    Args:
        results: The task's results, at least one.
        steps: Steps of each run.
    """
    seeds = len(results[0].curves)
    return f"{results[0].task}: validation after {steps} steps, {seeds} seed{'s' * (seeds > 1)}"


def between_replicates(results: Sequence[Result], replicates: int) -> str:
    """A sentence that says how much a task's replicates differ.

    Args:
        results: The task's results, those of the replicates first.
        replicates: How many replicates there are, at least 2.
    """
    deviation = spread(results[:replicates])
    return (
        f"{results[0].task}: between {replicates} replicates the mean log final loss deviates by "
        f"{deviation:.4f}"
    )


def record(
    results: Sequence[Sequence[Result]], folder: Path, *, steps: int, replicates: int = 1
) -> None:
    """Write ``evaluation.json``, ``evaluation.md`` and a plot for each task.

    Args:
        results: For each task, its results, those of the replicates first.
        folder: Where to write; made where missing.
        steps: Steps of each run.
        replicates: How many replicates there are.
    """
    content: dict[str, Any] = {
        "steps": steps,
        **describe(),
        "results": [result.as_dict() for of_task in results for result in of_task],
    }
    shown = [tables.markdown(title(of_task, steps), of_task) for of_task in results]
    if replicates > 1:
        content["spread"] = {of_task[0].task: spread(of_task[:replicates]) for of_task in results}
        shown += [between_replicates(of_task, replicates) + "\n" for of_task in results]
    _write(folder / "evaluation.json", json.dumps(content) + "\n")
    _write(folder / "evaluation.md", "\n".join(shown))
    for of_task in results:
        plots.curves(of_task, folder / "plots" / f"{of_task[0].task}.png")


def _write(path: Path, text: str) -> None:
    with files.whole(path) as beside:
        beside.write_text(text, encoding="utf-8")
