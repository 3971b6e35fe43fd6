"""Means and intervals over tasks and seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from amalgam.evaluation.intervals import Interval, log_ratios, over_seeds, over_tasks

INFINITE = math.inf


def test_ratios_are_paired_and_diverged_runs_count_as_infinite_losses() -> None:
    logs = log_ratios([1.0, 2.0, math.nan, INFINITE, 1.0], [2.0, 1.0, 1.0, math.nan, INFINITE])
    assert logs is not None
    assert logs.tolist() == pytest.approx([-math.log(2), math.log(2), INFINITE, 0, -INFINITE])
    assert log_ratios([1.0, 0.0], [1.0, 1.0]) is None
    assert log_ratios([1.0], [-1.0]) is None


def test_over_tasks_is_the_interquartile_mean() -> None:
    scores = [np.array([0.0, 1.0]), np.array([2.0, 3.0]), np.array([4.0, 5.0]), np.array([6, 90.0])]
    found = over_tasks(scores)
    assert found.value == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert found.low <= found.value <= found.high
    assert over_tasks(scores) == found
    # Seeds are drawn within their task: where they agree there is nothing to draw.
    alike = [np.full(3, value) for value in (1.0, 2.0, 3.0, 4.0)]
    assert over_tasks(alike) == Interval(2.5, 2.5, 2.5)


def test_the_intervals_cover_what_they_should() -> None:
    generator = np.random.default_rng(0)
    tasks, seeds, trials = 6, 8, 200
    hits = 0
    for _ in range(trials):
        found = over_tasks(list(generator.normal(0.3, 1.0, (tasks, seeds))))
        hits += found.low <= 0.3 <= found.high
    # Percentile bootstraps of few values are somewhat narrow.
    assert 0.85 * trials < hits < 0.99 * trials


def test_a_quarter_of_diverged_runs_is_trimmed_and_more_are_not() -> None:
    few = [np.array([0.1, 0.1, 0.1, INFINITE])] * 3
    found = over_tasks(few)
    assert found.value == pytest.approx(0.1)
    assert found.high == INFINITE
    many = [np.array([0.1, INFINITE, INFINITE, INFINITE])] * 3
    assert over_tasks(many).value == INFINITE
    assert over_tasks(many).exp().value == INFINITE


def test_too_few_values_have_no_interval() -> None:
    single = over_tasks([np.array([0.5]), np.array([0.7])])
    assert single.value == pytest.approx(0.6)
    assert math.isnan(single.low)
    assert all(map(math.isnan, over_tasks([])))
    assert all(map(math.isnan, over_tasks([]).exp()))
    assert math.isnan(over_seeds(np.array([0.5])).low)
    assert math.isnan(over_seeds(np.array([0.5, INFINITE])).low)


def test_over_seeds_is_students_interval() -> None:
    # t with 2 degrees of freedom has its 97.5% quantile at 4.3027.
    found = over_seeds(np.array([1.0, 2.0, 3.0]))
    assert found.value == 2
    assert found.high == pytest.approx(2 + 4.302653 / math.sqrt(3), rel=1e-6)
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), rel=1e-6)
    assert over_seeds(np.zeros(4)) == (0, 0, 0)
