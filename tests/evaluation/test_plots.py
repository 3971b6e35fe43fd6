"""Plots are drawn without a display, whole or not at all."""

import pytest

from amalgam.evaluation import Curve, Result, plots


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
    curve = Curve((0, 10), (2.0, 0.0), (0.1, 0.9), 0.1)
    results = [Result(name, "task", (curve, curve)) for name in ("student", "adam")]
    plots.curves(results, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000
