"""The paper's metrics, and its protocol on a small task."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from amalgam.evaluation import Contender, Runner, paper
from amalgam.tasks import Task


def test_optimization_stability_is_what_a_gaussian_filter_takes_away() -> None:
    assert paper.optimization_stability([2.0] * 10) == pytest.approx(0, abs=1e-12)
    losses = np.exp(-np.arange(12) / 5) * np.where(np.arange(12) % 2, 1.1, 1.0)
    # The filter written out: weights to four deviations, the first and last value repeated.
    offsets = np.arange(-8, 9)
    weights = np.exp(-0.5 * (offsets / 2.0) ** 2)
    weights /= weights.sum()
    padded = np.pad(losses, 8, mode="edge")
    smoothed = np.array([(weights * padded[i : i + 17]).sum() for i in range(12)])
    expected = float(np.std(np.log(smoothed) - np.log(losses)))
    assert paper.optimization_stability(losses.tolist()) == pytest.approx(expected)
    for odd in (math.nan, math.inf, 0.0, -1.0):
        assert math.isnan(paper.optimization_stability([1.0, odd, 1.0]))


def test_meta_stability_takes_the_deviation_of_runs_out_of_that_of_replicates() -> None:
    generator = np.random.default_rng(0)
    replicates, runs = 400, 10
    values = generator.normal(0, 0.5, (replicates, 1)) + generator.normal(
        0, 0.2, (replicates, runs)
    )
    between, within = paper.meta_stability(values.tolist())
    assert between == pytest.approx(0.5, rel=0.1)
    assert within == pytest.approx(0.2, rel=0.05)
    alike = generator.normal(0, 0.2, (2, 3))
    alike -= alike.mean(1, keepdims=True)
    assert paper.meta_stability(alike.tolist())[0] == 0
    assert all(map(math.isnan, paper.meta_stability([[1.0, 2.0]])))
    assert all(map(math.isnan, paper.meta_stability([[1.0, math.nan], [1.0, 2.0]])))
    with pytest.raises(ValueError, match=r"as many runs, not \[1, 2\]"):
        paper.meta_stability([[1.0], [1.0, 2.0]])


def test_the_protocol_reads_every_epoch() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 4, generator=generator)
    y = (x[:, 0] > 0).long()
    task = Task(
        "linear", lambda: nn.Linear(4, 2), (x[:40], y[:40]), (x[40:], y[40:]), batch_size=16
    )
    contenders = [
        Contender("one", partial(torch.optim.SGD, lr=0.5), "student"),
        Contender("two", partial(torch.optim.SGD, lr=0.1), "student"),
        Contender("lost", partial(torch.optim.SGD, lr=1e20, weight_decay=1e20), "teacher"),
        Contender("teacher", partial(torch.optim.SGD, lr=0.2), "teacher"),
    ]
    with Runner([task]) as runner:
        (found,) = paper.evaluate(runner, contenders, epochs=3, runs=2)
    one, _, lost, _ = found
    curve = one.result.curves[0]
    assert [reading.step for reading in curve.full] == [0, 2, 4, 6]
    assert one.best[0] == math.log(min(reading.loss for reading in curve.full[1:]))
    assert one.stability[0] == paper.optimization_stability([r.loss for r in curve.full[1:]])
    assert one.evaluation_stability == pytest.approx(float(np.std(one.best, ddof=1)))
    assert all(map(math.isnan, lost.best))
    table = paper.table(found, 3)
    assert table.rows[2][1] == "diverged 2 of 2"
    assert "Oracle, the teacher with the best log validation loss: teacher." in table.notes
    between, _ = paper.meta_stability([one.best, found[1].best])
    assert any(f"meta-stability {between:.4g}"[:20] in note for note in table.notes)
