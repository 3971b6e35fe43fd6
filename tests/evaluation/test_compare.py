"""Comparisons are paired, and say what they leave out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from amalgam.evaluation import Curve, Evaluation, Protocol, Reading, Result
from amalgam.evaluation.compare import compare, contenders_of, labels_of, table

PROTOCOL = Protocol("small", horizon=2, budgets=(1.0,), seeds=3)


def result(
    name: str, task: str, *finals: float, first: float = 3.0, kind: str = "student"
) -> Result:
    curves = tuple(
        Curve(
            (0, 2),
            (first + seed, final),
            (0.1, 0.5),
            (Reading(0, 3.0, 0.1, 300.0, 0.1), Reading(2, final, 0.5, final, 0.5)),
        )
        for seed, final in enumerate(finals)
    )
    return Result(name, task, curves, kind, steps=2)


def test_seeds_are_paired_and_tasks_counted() -> None:
    ours = [
        result("ours", "better", 1.0, 10.0, 100.0),
        result("ours", "worse", 4.0, 4.0, 4.0),
        result("ours", "lost", 1.0, math.nan, 1.0),
        result("ours", "alone", 1.0, 1.0, 1.0),
        result("ours", "negative", -1.0, 1.0, 1.0),
        result("ours", "other start", 1.0, 1.0, 1.0, first=7.0),
    ]
    theirs = [
        result("theirs", "better", 2.0, 20.0, 200.0),
        result("theirs", "worse", 1.0, 1.0, 1.0),
        result("theirs", "lost", 1.0, 1.0, 1.0),
        result("theirs", "negative", 1.0, 1.0, 1.0),
        result("theirs", "other start", 1.0, 1.0, 1.0),
    ]
    found = compare("ours", ours, "theirs", theirs, 2)
    # Runs differ by factors of ten, and the pairs not at all.
    assert found.tasks["better"] == pytest.approx((0.5, 0.5, 0.5))
    assert found.tasks["worse"] == pytest.approx((4, 4, 4))
    assert found.tasks["lost"].value == math.inf
    assert set(found.left_out) == {"alone", "negative", "other start"}
    assert found.won == 1
    assert found.clearly == (1, 1)
    shown = table(found).text(120)
    assert "1 of 3 tasks; the interval is below 1 on 1 and above 1 on 1." in " ".join(shown.split())
    assert "Left out: alone, as theirs did not run on it." in shown
    back = compare("theirs", theirs, "ours", ours, 2)
    assert back.tasks["better"] == pytest.approx((2, 2, 2))


def evaluation(*results: Result) -> Evaluation:
    return Evaluation(PROTOCOL, (), ((results,),))


def test_what_several_evaluations_share_comes_once() -> None:
    adam = result("Adam", "task", 1.0, 2.0, 3.0, kind="baseline")
    here = evaluation(adam, result("student", "task", 1.0, 1.0, 1.0))
    there = evaluation(adam, result("student", "task", 2.0, 2.0, 2.0))
    found = contenders_of({"here": here, "there": there})
    assert list(found) == ["here: student", "there: student", "Adam"]
    assert len(found["Adam"]) == 1
    compared = compare("a", found["here: student"], "b", found["there: student"], 2)
    assert compared.overall == pytest.approx((0.5, 0.5, 0.5))


def test_folders_have_names(tmp_path: Path) -> None:
    assert list(labels_of([tmp_path / "a", tmp_path / "b"])) == ["a", "b"]
    alike = [tmp_path / "a" / "x", tmp_path / "b" / "x"]
    assert list(labels_of(alike)) == list(map(str, alike))
    with pytest.raises(ValueError, match="folders must differ"):
        labels_of([tmp_path, tmp_path / "."])
