"""The protocol compares like with like, and its tables say what it found."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from amalgam.evaluation import (
    Contender,
    Curve,
    Result,
    contenders,
    evaluate,
    protocol,
    tables,
    train,
    tune,
)
from amalgam.tasks import Task


@pytest.fixture
def task() -> Task:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 4, generator=generator)
    y = (x[:, 0] > 0).long()
    return Task("linear", lambda: nn.Linear(4, 2), (x[:40], y[:40]), (x[40:], y[40:]), batch_size=8)


SGD = Contender("sgd", partial(torch.optim.SGD, lr=0.5))
STILL = Contender("still", partial(torch.optim.SGD, lr=0.0))


def test_train_reads_where_asked(task) -> None:
    curve = train(task, SGD.make, steps=7, seed=0, every=3)
    assert curve.steps == (0, 3, 6, 7)
    assert curve.losses[-1] < curve.losses[0]
    assert curve.final == curve.losses[-1]
    assert curve.best == min(curve.losses)
    assert all(0 <= a <= 1 for a in curve.accuracies)


def test_measured_in_pieces_it_is_the_same(task, monkeypatch) -> None:
    """Pieces of 7 samples, of 20 and of 40: the last ones are smaller."""
    whole = train(task, SGD.make, steps=5, seed=0, every=5)
    monkeypatch.setattr(protocol, "_TOGETHER", 7)
    pieces = train(task, SGD.make, steps=5, seed=0, every=5)
    assert pieces.losses == pytest.approx(whole.losses, rel=1e-6)
    assert pieces.accuracies == pytest.approx(whole.accuracies)
    assert pieces.training == pytest.approx(whole.training, rel=1e-6)


def test_the_seed_decides(task) -> None:
    one, two, other = (train(task, SGD.make, steps=5, seed=s, every=1) for s in (0, 0, 1))
    assert one == two
    assert one.losses != other.losses


def test_contenders_start_alike(task) -> None:
    results = evaluate(task, [SGD, STILL], steps=4, seeds=3, every=2, first_seed=5)
    for ours, theirs in zip(results[0].curves, results[1].curves, strict=True):
        assert ours.losses[0] == theirs.losses[0] == theirs.final
        assert ours.final != theirs.final
    assert len({curve.losses[0] for curve in results[0].curves}) == 3


def test_tuning_finds_the_rate(task) -> None:
    assert tune(task, torch.optim.SGD, steps=30, rates=(0.0, 1e-6, 0.5)) == 0.5


def test_reports_name_what_is_about_to_run(task, monkeypatch) -> None:
    """Whoever shows the last report shows what goes on: "tuning Adam" until that is over."""
    events = []
    measured = train

    def watched(*arguments, **options):
        events.append("a run")
        return measured(*arguments, **options)

    monkeypatch.setattr(protocol, "train", watched)
    everybody = [SGD, *contenders.torch_contenders(task, steps=1, report=events.append)]
    rates = len(protocol.RATES)
    tuning = ["tuning Adam", *["a run"] * rates, "tuning AdamW", *["a run"] * rates]
    assert events == tuning
    evaluate(task, everybody, steps=1, seeds=2, report=events.append)
    names = [contender.name for contender in everybody for _ in range(2)]
    assert events[len(tuning) :: 2] == names
    assert events[len(tuning) + 1 :: 2] == ["a run"] * len(names)


def test_summaries_and_tables() -> None:
    curves = (
        Curve((0, 1, 2), (3.0, 1.0, 2.0), (0.1, 0.5, 0.4), 0.25),
        Curve((0, 1, 2), (3.0, 2.0, 4.0), (0.1, 0.5, 0.6), 0.75),
    )
    result = Result("ours", "task", curves)
    assert result.summary("final") == (3.0, pytest.approx(math.sqrt(2)))
    assert result.summary("best") == (1.5, pytest.approx(math.sqrt(0.5)))
    assert result.accuracy == 0.5
    lone = Result("diverged", "task", (Curve((0,), (math.nan,), (0.1,), math.nan),))
    text = tables.markdown("title", [lone, result])
    assert (
        "| **ours** | **3.0000 ± 1.4142** | **1.5000 ± 0.7071** | **50.0%** | **0.5000 ± 0.3536** |"
        in text
    )
    assert "| diverged | nan | nan | 10.0% | nan |" in text
