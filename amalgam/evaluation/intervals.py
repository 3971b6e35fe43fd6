"""Means over tasks and differences over seeds, with confidence intervals.

Over tasks: the interquartile mean of all tasks' and seeds' scores, with a percentile bootstrap that
draws seeds anew within each task (Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of
the Statistical Precipice", whose library is rliable). Over seeds of one task: Student's interval of
the mean paired difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]

CONFIDENCE = 0.95
_RESAMPLES = 2000


class Interval(NamedTuple):
    """An estimate and its confidence interval.

    Attributes:
        value: The estimate.
        low: The interval's lower end; NaN where there are too few values for one.
        high: Its upper end, likewise.
    """

    value: float
    low: float
    high: float

    def exp(self) -> Interval:
        """Of logarithms of ratios, the ratios."""
        return Interval(*(_exp(x) for x in self))


def _exp(x: float) -> float:
    return math.inf if x > 700 else math.exp(x)


def log_ratios(losses: Sequence[float], others: Sequence[float]) -> Scores | None:
    """``log(loss / other)`` pair by pair; what is not finite counts as an infinite loss.

    Args:
        losses: Losses of paired runs.
        others: Those of the runs they are compared with.

    Returns:
        The logarithms, shape (runs,): 0 where both are infinite; ``None`` where a loss is zero or
        negative, and no ratio tells anything.
    """
    ours, theirs = (
        np.where(np.isfinite(values), values, np.inf)
        for values in (np.asarray(losses, float), np.asarray(others, float))
    )
    if (ours <= 0).any() or (theirs <= 0).any():
        return None
    logs = np.zeros(len(ours))
    differ = ~(np.isinf(ours) & np.isinf(theirs))
    logs[differ] = np.log(ours[differ]) - np.log(theirs[differ])
    return logs


def over_tasks(scores: Sequence[Scores]) -> Interval:
    """The interquartile mean of all scores, with a stratified bootstrap interval.

    Args:
        scores: For each task the scores of its runs, shape (seeds,); they may be infinite.

    Returns:
        The mean; NaN where there are no scores. The interval is NaN where a task has a single run.
    """
    from scipy.stats import bootstrap, trim_mean

    if not scores:
        return Interval(*[math.nan] * 3)

    def statistic(*of_tasks: Scores, axis: int = -1) -> Scores:
        # A mean of infinities of both signs is no number.
        with np.errstate(invalid="ignore"):
            mean: Scores = trim_mean(np.concatenate(of_tasks, axis=axis), 0.25, axis=axis)
        return mean

    value = float(statistic(*scores))
    if min(map(len, scores)) < 2:
        return Interval(value, math.nan, math.nan)
    with np.errstate(invalid="ignore"):
        drawn = bootstrap(
            tuple(scores),
            statistic,
            n_resamples=_RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(0),
        ).bootstrap_distribution
    # Without interpolation, which makes NaN between infinities.
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], method="inverted_cdf")
    return Interval(value, float(low), float(high))


def over_seeds(differences: Scores) -> Interval:
    """The mean of paired differences on one task, with Student's interval.

    Args:
        differences: One for each seed, shape (seeds,); they may be infinite.

    Returns:
        The mean. The interval is NaN where there is a single seed or an infinite difference.
    """
    from scipy.stats import t as student_t

    with np.errstate(invalid="ignore"):
        value = float(np.mean(differences))
    if len(differences) < 2 or not np.isfinite(differences).all():
        return Interval(value, math.nan, math.nan)
    quantile = student_t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1)
    half = float(quantile * np.std(differences, ddof=1) / math.sqrt(len(differences)))
    return Interval(value, value - half, value + half)
