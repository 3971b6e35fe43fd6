"""Plots are drawn without a display, whole or not at all."""

import math
import re
from dataclasses import replace

import pytest

from amalgam.evaluation import Curve, Result, plots
from amalgam.evaluation.protocol import ONE_SETTING


def row(step: int, **more) -> dict:
    return {
        "meta_step": step,
        "meta_loss": 0.1 * step if step != 2 else None,
        "imitation_loss": -1.0,
        "last_loss": {"student": 0.5, "adam": 0.25},
        "followed": {"adam": 1.0},
    } | more


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_training(tmp_path, suffix) -> None:
    path = tmp_path / "deep" / f"training.{suffix}"
    plots.training([row(1), row(2), row(3, validation=-0.5)], path)
    assert path.stat().st_size > 5000
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_training_without_teachers(tmp_path) -> None:
    bare = {k: v for k, v in row(1).items() if k != "followed"}
    plots.training([bare], tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_curves(tmp_path) -> None:
    plots.curves([result("student", 2.0, 0.5), result("adam", 2.0, 0.0)], tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000
    _, axes = plots._drawn([result("student", 2.0, 0.5)])
    assert axes.get_xlim()[0] == 0


def result(name: str, *losses: float, kind: str = "student") -> Result:
    curve = Curve(tuple(range(len(losses))), losses, tuple(0.5 for _ in losses))
    return Result(name, "task", (curve, curve), kind)


@pytest.mark.parametrize(
    "odd",
    [(math.nan, math.nan), (2.0, math.inf), (-1.0, -2.0), (0.0, 0.0)],
    ids=["no number", "infinite", "negative", "zero"],
)
def test_curves_of_losses_without_a_logarithm(tmp_path, odd) -> None:
    plots.curves([result("odd", *odd), result("adam", 2.0, 1.0)], tmp_path / "x.png")
    plots.curves([result("odd", *odd)], tmp_path / "alone.png")
    drawn = plots.curves_svg([result("odd", *odd), result("adam", 2.0, 1.0)])
    label = "odd" if math.isfinite(odd[-1]) else "odd (diverged 2 of 2)"
    assert f">{label}</text>" in drawn


def test_a_pages_plots_take_its_colour_and_load_nothing() -> None:
    others = [result(f"SGD {index}", 2.0, 1.0, kind="baseline") for index in range(9)]
    drawn = plots.curves_svg([result("student", 2.0, 0.5), *others])
    assert drawn.startswith("<svg")
    assert "currentColor" in drawn
    assert ">other baselines</text>" in drawn
    assert ">student</text>" in drawn
    assert not re.search(r"(href|src)=\"(?!#)", drawn)
    again = plots.curves_svg([result("student", 2.0, 0.5), *others])
    assert drawn == again


def test_whom_students_are_compared_with_is_never_among_the_others() -> None:
    """Ten students at two decays each, of eight colours."""
    students = [
        replace(result(f"s{index}{suffix}", 2.0, 0.5), decay=decay)
        for index in range(10)
        for suffix, decay in (("", "constant"), (", linear", "linear"))
    ]
    baselines = [
        result(name, 2.0, last, kind="baseline")
        for name, last in (("Adam", 1.0), ("SGD", 0.8), ("Muon", 0.7), (ONE_SETTING, 0.9))
    ]
    drawn = plots.curves_svg([*students, *baselines])
    shown = ["Adam", "Muon", ONE_SETTING, *(f"s{n}" for n in range(5))]
    for label in [*shown, *(f"s{n}, linear" for n in range(5)), "others"]:
        assert f">{label}</text>" in drawn
    for label in ("SGD", "s5", "s5, linear", "other baselines"):
        assert f">{label}</text>" not in drawn
