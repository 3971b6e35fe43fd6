"""What an evaluation writes: tables, all numbers, curves, and a web page.

``evaluation.json`` holds everything, for :func:`read` and other programs; ``evaluation.csv`` every
reading at a budget; ``evaluation.md`` the tables; ``report.html`` tables and curves on one page
that loads nothing from elsewhere; ``plots/`` the curves.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from amalgam import files
from amalgam.evaluation import page, paper, plots, tables
from amalgam.evaluation.protocol import Evaluation, Protocol, Result, Tuning, spread
from amalgam.evaluation.runner import About
from amalgam.evaluation.runs import to_json
from amalgam.version import describe

JSON = "evaluation.json"
PAGE = "report.html"
_PAPER = "paper"


def between_replicates(results: Sequence[Result], replicates: int) -> str:
    """A sentence that says how much a task's replicates differ.

    Args:
        results: The task's results, those of the replicates first.
        replicates: How many replicates there are, at least 2.
    """
    deviation = spread(results[:replicates])
    said = (
        "has no deviation, as one diverged or has a loss without a logarithm"
        if math.isnan(deviation)
        else f"deviates by {deviation:.4f}"
    )
    return f"{results[0].task}: between {replicates} replicates the mean log final loss {said}"


def record_closing(evaluation: Evaluation, folder: Path, *, replicates: int = 1) -> None:
    """Write a meta-training run's closing evaluation: JSON, Markdown and a plot for each task.

    Args:
        evaluation: The evaluation, of one budget; of each task the replicates' results come first.
        folder: Where to write; made where missing.
        replicates: How many replicates there are.
    """
    results = evaluation.at(evaluation.horizon)
    content = _content(evaluation)
    shown = [table.markdown() for table in tables_of(evaluation)]
    if replicates > 1:
        spreads = {of_task[0].task: spread(of_task[:replicates]) for of_task in results}
        content["spread"] = {
            task: value if math.isfinite(value) else None for task, value in spreads.items()
        }
        shown += [between_replicates(of_task, replicates) + "\n" for of_task in results]
    _write(folder / JSON, json.dumps(content) + "\n")
    _write(folder / "evaluation.md", "\n".join(shown))
    for of_task in results:
        plots.curves(of_task, folder / "plots" / f"{of_task[0].task}.png")


def tables_of(evaluation: Evaluation, *, wide: bool = True) -> list[tables.Table]:
    """Each task's table.

    Args:
        evaluation: The evaluation.
        wide: Whether to add the columns that a narrow terminal has no room for.
    """
    return [
        tables.of_task(of_budgets, evaluation.horizon, wide=wide, parameters=about.parameters)
        for about, of_budgets in zip(evaluation.tasks, evaluation.results, strict=True)
    ]


def record(evaluation: Evaluation, folder: Path, about: dict[str, Any]) -> None:
    """Write all that the module's first lines name.

    Args:
        evaluation: The evaluation.
        folder: Where to write; made where missing.
        about: What was asked for, JSON-serialisable; a later evaluation in the folder compares it.
    """
    content = {"asked": about, **_content(evaluation)}
    shown = [tables.over_all_tasks(evaluation), *tables_of(evaluation)]
    shown.append(tables.of_tunings(evaluation))
    marked = page.stand_ins(evaluation.tasks)
    _write(folder / JSON, json.dumps(content) + "\n")
    _write(folder / "evaluation.csv", tables.comma_separated(evaluation))
    _write(
        folder / "evaluation.md",
        "\n".join([*(table.markdown() for table in shown), *([marked + "\n"] * bool(marked))]),
    )
    for of_budgets in evaluation.results:
        plots.curves(of_budgets[-1], folder / "plots" / f"{of_budgets[0][0].task}.png")
    _write(folder / PAGE, page.of_evaluation(evaluation))


def record_papers(
    results: Sequence[Sequence[paper.PaperResult]],
    folder: Path,
    about: dict[str, Any],
    epochs: int,
    tasks: Sequence[About],
) -> None:
    """Write an evaluation by the paper's protocol, in the files that :func:`record` writes.

    Args:
        results: For each task, the contenders' results.
        folder: Where to write; made where missing.
        about: As :func:`record` takes it.
        epochs: Epochs of each run.
        tasks: What is known of the tasks.
    """
    content = {
        "asked": about,
        **describe(),
        "protocol": {"name": _PAPER, "epochs": epochs},
        "results": [
            {
                **one.result.as_dict(),
                "best_log_losses": [to_json(x) for x in one.best],
                "optimization_stability": [to_json(x) for x in one.stability],
            }
            for of_task in results
            for one in of_task
        ],
    }
    shown = [paper.table(of_task, epochs).markdown() for of_task in results]
    marked = page.stand_ins(tasks)
    _write(folder / JSON, json.dumps(content) + "\n")
    _write(folder / "evaluation.csv", paper.comma_separated(results, epochs))
    _write(folder / "evaluation.md", "\n".join([*shown, *([marked + "\n"] * bool(marked))]))
    for of_task in results:
        plots.curves(
            [one.result for one in of_task],
            folder / "plots" / f"{of_task[0].result.task}.png",
        )
    _write(folder / PAGE, page.of_papers(results, tasks, epochs))


def _content(evaluation: Evaluation) -> dict[str, Any]:
    return {
        **describe(),
        "protocol": evaluation.protocol.about(),
        "tasks": [
            {name: value for name, value in asdict(about).items() if name != "seconds"}
            for about in evaluation.tasks
        ],
        "results": [
            result.as_dict()
            for of_task in evaluation.results
            for of_budget in of_task
            for result in of_budget
        ],
        "tunings": [
            {**asdict(tuned), "losses": [to_json(x) for x in tuned.losses]}
            for tuned in evaluation.tunings
        ],
    }


def read(folder: Path) -> Evaluation:
    """The evaluation that :func:`record` or :func:`record_closing` wrote to a folder.

    Args:
        folder: The folder.

    Raises:
        FileNotFoundError: There is none.
        ValueError: The file is damaged, an earlier version's, or of the paper's protocol.
    """
    path = folder / JSON
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} holds no {JSON}: it is no evaluation's folder")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["protocol"]["name"] != _PAPER:
            return _evaluation(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{str(path)!r} is no evaluation of this version of amalgam ({error}); evaluate anew"
        ) from error
    raise ValueError(
        f"{str(folder)!r} holds an evaluation by the paper's protocol, and only those by the "
        f"protocol 'tuned' are compared; its tables are in evaluation.md, its runs in "
        f"evaluation.csv"
    )


def _evaluation(content: dict[str, Any]) -> Evaluation:
    """The evaluation that a file's content is of; any of several errors where it is damaged."""
    told = dict(content["protocol"])
    del told["horizon_steps"]
    told["grids"] = {
        name: tuple(tuple(setting.items()) for setting in settings)
        for name, settings in told["grids"].items()
    }
    for name in ("budgets", "decays"):
        told[name] = tuple(told[name])
    protocol = Protocol(**told)
    tasks = tuple(About(**about, seconds=math.nan) for about in content["tasks"])
    results = tuple(
        tuple(
            tuple(
                Result.from_dict(result)
                for result in content["results"]
                if result["task"] == task.name and result["steps"] == steps
            )
            for steps in protocol.steps
        )
        for task in tasks
    )
    tunings = tuple(
        Tuning(
            **{
                **tuned,
                "settings": tuple(tuned["settings"]),
                "losses": tuple(map(float, tuned["losses"])),
                "edge": tuple(tuned["edge"]),
            }
        )
        for tuned in content["tunings"]
    )
    return Evaluation(protocol, tasks, results, tunings)


def _write(path: Path, text: str) -> None:
    with files.whole(path) as beside:
        beside.write_text(text, encoding="utf-8")
