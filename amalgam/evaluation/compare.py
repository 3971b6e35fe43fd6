"""Two optimizers against each other, paired over the seeds of one evaluation or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from amalgam.evaluation.intervals import Interval, Scores, log_ratios, over_seeds, over_tasks
from amalgam.evaluation.protocol import Evaluation, Result
from amalgam.evaluation.tables import Table


@dataclass(frozen=True)
class Comparison:
    """A contender's losses over another's.

    Attributes:
        name: The contender's name.
        reference: The other's.
        steps: The budget in steps.
        tasks: For each task that both ran on with the same seeds, the mean ratio of the validation
            losses over seeds, with Student's interval.
        overall: The interquartile mean over tasks and seeds, with a stratified bootstrap interval.
        left_out: Tasks left out, each with why.
    """

    name: str
    reference: str
    steps: int
    tasks: Mapping[str, Interval]
    overall: Interval
    left_out: Mapping[str, str]

    @property
    def won(self) -> int:
        """On how many tasks the contender's mean is the smaller one."""
        return sum(ratio.value < 1 for ratio in self.tasks.values())

    @property
    def clearly(self) -> tuple[int, int]:
        """On how many tasks the whole interval is below 1, and on how many it is above."""
        ratios = self.tasks.values()
        return sum(ratio.high < 1 for ratio in ratios), sum(ratio.low > 1 for ratio in ratios)


def contenders_of(evaluations: Mapping[str, Evaluation]) -> dict[str, list[Result]]:
    """The contenders of several evaluations, each with its results on all tasks, at all budgets.

    One that several evaluations have with the same numbers, as baselines from a cache, comes once;
    others of one name are told apart by their evaluation's.

    Args:
        evaluations: The evaluations, by name.

    Returns:
        For each contender's name its results, students first.
    """
    found: dict[str, dict[str, list[Result]]] = {}
    for where, evaluation in evaluations.items():
        for of_task in evaluation.results:
            for of_budget in of_task:
                for result in of_budget:
                    found.setdefault(result.name, {}).setdefault(where, []).append(result)
    named: dict[str, list[Result]] = {}
    for name, by_evaluation in found.items():
        several = list(by_evaluation.items())
        differ = any(not _agree(several[0][1], results) for _, results in several[1:])
        for where, results in several:
            label = f"{where}: {name}" if differ else name
            known = {(result.task, result.steps) for result in named.get(label, ())}
            more = [result for result in results if (result.task, result.steps) not in known]
            named.setdefault(label, []).extend(more)
    return dict(sorted(named.items(), key=lambda item: item[1][0].kind != "student"))


def _agree(ours: Sequence[Result], theirs: Sequence[Result]) -> bool:
    """Whether losses are the same wherever both have some."""
    known = {(result.task, result.steps): result.values("final") for result in ours}
    return all(
        np.array_equal(values, result.values("final"), equal_nan=True)
        for result in theirs
        if (values := known.get((result.task, result.steps))) is not None
    )


def compare(
    name: str, ours: Sequence[Result], reference: str, theirs: Sequence[Result], steps: int
) -> Comparison:
    """A contender's validation losses over another's, at one budget.

    Seeds that both ran are paired; seeds number the same initial parameters and batches.

    Args:
        name: The contender's name.
        ours: Its results.
        reference: The other's name.
        theirs: The other's results.
        steps: The budget in steps.
    """
    others = {result.task: result for result in theirs if result.steps == steps}
    tasks: dict[str, Interval] = {}
    left_out: dict[str, str] = {}
    scores: list[Scores] = []
    for result in ours:
        if result.steps != steps:
            continue
        other = others.get(result.task)
        if other is None:
            left_out[result.task] = f"{reference} did not run on it"
            continue
        both = min(len(result.curves), len(other.curves))
        if any(
            ours.losses[:1] != theirs.losses[:1]
            for ours, theirs in zip(result.curves[:both], other.curves, strict=False)
        ):
            left_out[result.task] = "its runs do not begin alike"
            continue
        logs = log_ratios(result.scores[:both], other.scores[:both])
        if logs is None:
            left_out[result.task] = "a loss is zero or negative"
            continue
        tasks[result.task] = over_seeds(logs).exp()
        scores.append(logs)
    return Comparison(name, reference, steps, tasks, over_tasks(scores).exp(), left_out)


def table(comparison: Comparison) -> Table:
    """A comparison as a table.

    Args:
        comparison: The comparison.
    """
    rows = [
        (task, _number(ratio.value), _ends(ratio), _verdict(ratio))
        for task, ratio in comparison.tasks.items()
    ]
    overall = comparison.overall
    rows.append(("all tasks", _number(overall.value), _ends(overall), _verdict(overall)))
    better, worse = comparison.clearly
    tasks = len(comparison.tasks)
    notes = [
        f"Ratios of validation losses after {comparison.steps} steps, paired over seeds; below 1 "
        f"{comparison.name} is better. Of a task the geometric mean and Student's 95% interval, of "
        f"all the interquartile mean and a stratified bootstrap's.",
        f"{comparison.name} has the smaller mean on {comparison.won} of {tasks} tasks; the "
        f"interval is below 1 on {better} and above 1 on {worse}.",
        *(f"Left out: {task}, as {why}." for task, why in comparison.left_out.items()),
    ]
    return Table(
        f"{comparison.name} over {comparison.reference}",
        ("task", "ratio", "95% interval", ""),
        tuple(rows),
        frozenset({len(rows) - 1}),
        tuple(notes),
    )


def _number(value: float) -> str:
    return "diverged" if np.isinf(value) else "" if np.isnan(value) else f"{value:.3f}"


def _ends(interval: Interval) -> str:
    if np.isnan(interval.low) or np.isnan(interval.high):
        return ""
    return f"[{interval.low:.3f}, {interval.high:.3f}]"


def _verdict(interval: Interval) -> str:
    return "better" if interval.high < 1 else "worse" if interval.low > 1 else ""


def labels_of(folders: Sequence[Path]) -> dict[str, Path]:
    """A name for each folder, its last part where that tells them apart.

    Args:
        folders: The folders.

    Raises:
        ValueError: One is given twice.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(f"folders must differ, not {', '.join(map(str, folders))}")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return dict(zip(names, folders, strict=True))
