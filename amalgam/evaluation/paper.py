"""The paper's own protocol and metrics (Optimizer Amalgamation, section 5 and appendix C).

Every contender trains ten optimizees for 25 epochs; students go on from their warm-up at a constant
rate, teachers stand at the paper's rates. What is read after each epoch decides: the best log
validation loss, and how much the losses fluctuate within a run, between runs and between
replicates.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from amalgam.evaluation.contenders import Contender, contenders_of
from amalgam.evaluation.protocol import Result
from amalgam.evaluation.runner import Run, Runner
from amalgam.evaluation.runs import Curve, Readings
from amalgam.evaluation.tables import Table, diverged, number

EPOCHS, RUNS = 25, 10
_SMOOTHING = 2.0  # epochs; the authors' code filters with it


@dataclass(frozen=True)
class PaperResult:
    """A contender's metrics on one task, of its runs.

    Attributes:
        result: The runs.
        best: Of each run, the smallest log validation loss of all epochs; NaN where there is none.
        stability: Of each run, its optimization stability; see :func:`optimization_stability`.
    """

    result: Result
    best: tuple[float, ...]
    stability: tuple[float, ...]

    @property
    def mean_best(self) -> float:
        """Mean over runs of the best log validation loss; NaN where a run has none."""
        return fmean(self.best)

    @property
    def evaluation_stability(self) -> float:
        """Standard deviation over runs of the best log validation loss; smaller is more stable."""
        return float(np.std(self.best, ddof=1)) if len(self.best) > 1 else math.nan


def optimization_stability(losses: Sequence[float]) -> float:
    """How much a validation loss fluctuates about its smoothed course.

    It is the standard deviation over epochs of ``log(smoothed) - log(loss)``, where the smoothed
    loss is a Gaussian filter's with a standard deviation of two epochs; smaller is more stable.

    Args:
        losses: A run's validation losses after each epoch.

    Returns:
        The deviation; NaN where a loss is not finite or has no logarithm.
    """
    from scipy.ndimage import gaussian_filter1d

    values = np.asarray(losses, float)
    if not np.isfinite(values).all() or (values <= 0).any():
        return math.nan
    smoothed = gaussian_filter1d(values, _SMOOTHING, mode="nearest")
    return float(np.std(np.log(smoothed) - np.log(values)))


def meta_stability(replicates: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Standard deviations between replicates and within them.

    They are those of a linear model with a random intercept for each replicate, estimated from the
    mean squares, which for as many runs of each is restricted maximum likelihood.

    Args:
        replicates: For each replicate its runs' best log validation losses, as many of each.

    Returns:
        Between replicates (the paper's meta-stability), and within (its evaluation stability); NaN
        where there are fewer than two of either, or a value is not finite.

    Raises:
        ValueError: Replicates have different numbers of runs.
    """
    if len({len(runs) for runs in replicates}) > 1:
        raise ValueError(f"replicates must have as many runs, not {[len(r) for r in replicates]}")
    values = np.asarray(replicates, float)
    if values.ndim != 2 or min(values.shape) < 2 or not np.isfinite(values).all():
        return math.nan, math.nan
    runs = values.shape[1]
    within = values.var(1, ddof=1).mean()
    between = max(values.mean(1).var(ddof=1) - within / runs, 0.0)
    return math.sqrt(between), math.sqrt(within)


def evaluate(
    runner: Runner,
    contenders: Sequence[Contender],
    *,
    epochs: int = EPOCHS,
    runs: int = RUNS,
    training_samples: int | None = 10_000,
) -> list[list[PaperResult]]:
    """Train every task with every contender for so many epochs.

    Args:
        runner: Makes the runs, of its tasks.
        contenders: What to compare; each at a constant rate.
        epochs: Epochs of each run.
        runs: Runs of each contender.
        training_samples: Training samples of each reading; all where ``None``.

    Returns:
        For each task, the contenders' results, in their order.

    Raises:
        TypeError: One of the contenders is none.
        ValueError: There is no contender, epoch or run.
    """
    contenders = contenders_of(contenders)
    for name, count in (("contenders", len(contenders)), ("epochs", epochs), ("runs", runs)):
        if count < 1:
            raise ValueError(f"{name} must be 1 or more, not {count}")
    tasks = range(len(runner.about))
    steps = [about.epoch * epochs for about in runner.about]
    runner.total += sum(runner.cost(task, steps[task]) * runs * len(contenders) for task in tasks)
    made = iter(
        runner.run(
            [
                Run(
                    task,
                    contender,
                    seed,
                    steps[task],
                    Readings(
                        full=tuple(
                            range(
                                runner.about[task].epoch, steps[task] + 1, runner.about[task].epoch
                            )
                        ),
                        curve_samples=1000,
                        training_samples=training_samples,
                    ),
                )
                for task in tasks
                for contender in contenders
                for seed in range(runs)
            ]
        )
    )
    return [
        [
            _judged(
                Result(
                    contender.name,
                    runner.about[task].name,
                    tuple(next(made) for _ in range(runs)),
                    contender.kind,
                    steps=steps[task],
                )
            )
            for contender in contenders
        ]
        for task in tasks
    ]


def _judged(result: Result) -> PaperResult:
    return PaperResult(
        result,
        tuple(_best(curve) for curve in result.curves),
        tuple(
            optimization_stability([reading.loss for reading in curve.full[1:]])
            for curve in result.curves
        ),
    )


def _best(curve: Curve) -> float:
    finite = [reading.loss for reading in curve.full[1:] if math.isfinite(reading.loss)]
    return math.log(min(finite)) if finite and min(finite) > 0 else math.nan


def table(results: Sequence[PaperResult], epochs: int) -> Table:
    """One task's table, the best contender in it marked, and the students' meta-stability.

    Args:
        results: The contenders' results, at least one.
        epochs: Epochs of each run.
    """
    rows = []
    for one in results:
        accuracy = _best_accuracy(one.result.curves)
        rows.append(
            (
                one.result.name,
                ", ".join(filter(None, (_shown(one.mean_best), diverged(one.result)))),
                _shown(one.evaluation_stability),
                _shown(float(np.mean(one.stability))),
                "" if math.isnan(accuracy) else f"{accuracy:.1%}",
            )
        )
    known = [one for one in results if not math.isnan(one.mean_best)]
    best = min(known, key=lambda one: one.mean_best, default=None)
    teachers = [one for one in known if one.result.kind == "teacher"]
    notes = []
    if teachers:
        oracle = min(teachers, key=lambda one: one.mean_best)
        notes.append(
            f"Oracle, the teacher with the best log validation loss: {oracle.result.name}."
        )
    students = [one.best for one in results if one.result.kind == "student"]
    between, within = meta_stability(students) if len(students) > 1 else (math.nan, math.nan)
    if not math.isnan(between):
        notes.append(
            f"The {len(students)} students as replicates: meta-stability {number(between)}, "
            f"evaluation stability {number(within)}."
        )
    runs = len(results[0].result.curves)
    return Table(
        f"{results[0].result.task}: {epochs} epochs, {runs} runs, the paper's protocol",
        (
            "optimizer",
            "best log validation loss",
            "evaluation stability",
            "optimization stability",
            "best accuracy",
        ),
        tuple(rows),
        frozenset(() if best is None else {results.index(best)}),
        tuple(notes),
    )


def comma_separated(results: Sequence[Sequence[PaperResult]], epochs: int) -> str:
    """Every run, one a line, as CSV.

    Args:
        results: For each task, the contenders' results.
        epochs: Epochs of each run.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        (
            *("task", "optimizer", "kind", "settings", "epochs", "seed"),
            *("best_log_validation_loss", "optimization_stability", "best_accuracy"),
            *("diverged", "seconds_a_step", "state_bytes"),
        )
    )
    for one in (one for of_task in results for one in of_task):
        runs = zip(one.result.curves, one.best, one.stability, strict=True)
        for seed, (curve, best, stability) in enumerate(runs):
            writer.writerow(
                (
                    *(one.result.task, one.result.name, one.result.kind, one.result.settings),
                    *(epochs, seed, best, stability, _best_accuracy([curve])),
                    *(int(curve.diverged), curve.seconds, curve.state_bytes),
                )
            )
    return file.getvalue()


def _best_accuracy(curves: Sequence[Curve]) -> float:
    """The largest validation accuracy after any epoch; NaN where there is none."""
    read = [reading.accuracy for curve in curves for reading in curve.full[1:]]
    return max(read, default=math.nan)


def _shown(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"
