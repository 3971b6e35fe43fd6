"""Plots of a meta-training run and of an evaluation."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from amalgam import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from amalgam.evaluation import Result

_COLOURS = ("#1b1b1b", "#d1495b", "#00798c", "#edae49", "#66a182", "#7d5ba6", "#8d96a3", "#b5651d")


def _figure(rows: int, columns: int, **options: Any) -> tuple[Figure, Any]:
    """Axes that need no display, whatever backend the caller's matplotlib is set to."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", **options)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    with files.whole(path) as beside:
        figure.savefig(beside, dpi=120, format=Path(path).suffix.removeprefix("."))


def training(metrics: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Plot meta-training: losses, trajectories, and which teacher the student followed.

    Args:
        metrics: The rows of a run's ``metrics.jsonl``, at least one.
        path: The file to write, ``.png``, ``.svg`` or ``.pdf``.
    """
    figure, axes = _figure(2, 2, figsize=(11, 7))
    steps = [row["meta_step"] for row in metrics]

    def series(key: str, name: str | None = None) -> list[float]:
        values = (row[key] if name is None else row[key][name] for row in metrics)
        return [float("nan") if value is None else value for value in values]

    ax = axes[0, 0]
    ax.plot(steps, series("meta_loss"), color=_COLOURS[0], lw=1, label="meta-loss")
    ax.plot(steps, series("imitation_loss"), color=_COLOURS[1], lw=1, label="imitation loss")
    ax.set(xlabel="meta-step", title="meta-training losses")
    ax.legend(frameon=False)

    ax = axes[0, 1]
    for name, colour in zip(metrics[0]["last_loss"], _COLOURS, strict=False):
        ax.plot(steps, series("last_loss", name), color=colour, lw=1, label=name)
    ax.set(xlabel="meta-step", yscale="log", title="training loss at the end of each window")
    ax.legend(frameon=False)

    ax = axes[1, 0]
    # Strategies that go back validate by the meta-loss, the others by the final loss.
    key = "meta_validation" if any("meta_validation" in row for row in metrics) else "validation"
    validated = [row for row in metrics if row.get(key) is not None]
    ax.plot(
        [row["meta_step"] for row in validated],
        [row[key] for row in validated],
        "o-",
        color=_COLOURS[0],
        ms=3,
        lw=1,
    )
    measure = "mean log of the final loss" if key == "validation" else "mean meta-loss"
    ax.set(xlabel="meta-step", title=f"meta-validation: {measure}")

    ax = axes[1, 1]
    teachers = list(metrics[0].get("followed", ()))
    if teachers:
        shares = np.array([series("followed", name) for name in teachers])
        ax.stackplot(steps, shares, labels=teachers, colors=_COLOURS[1:], step="mid", alpha=0.85)
        ax.legend(frameon=False, loc="lower left")
    ax.set(
        xlabel="meta-step",
        ylim=(0, 1),
        title="share of steps at which each teacher was the nearest",
    )
    _save(figure, path)


def curves(results: Sequence[Result], path: str | os.PathLike[str]) -> None:
    """Plot the validation loss over steps of every contender on one task.

    Lines are geometric means over seeds, bands reach from the smallest to the largest.

    Args:
        results: The contenders' results, at least one, all on one task.
        path: The file to write, ``.png``, ``.svg`` or ``.pdf``.
    """
    figure, axes = _figure(1, 1, figsize=(7.5, 4.8))
    ax = axes[0, 0]
    for index, result in enumerate(results):
        colour = _COLOURS[index % len(_COLOURS)]
        losses = np.maximum([curve.losses for curve in result.curves], 1e-12)
        steps = result.curves[0].steps
        middle = np.exp(np.log(losses).mean(0))
        ax.plot(steps, middle, color=colour, lw=2.2 if index == 0 else 1.3, label=result.name)
        ax.fill_between(steps, losses.min(0), losses.max(0), color=colour, alpha=0.12, lw=0)
    seeds = len(results[0].curves)
    ax.set(
        xlabel="step",
        ylabel="validation loss",
        yscale="log",
        title=f"{results[0].task}, {seeds} seed{'s' if seeds > 1 else ''}",
    )
    ax.legend(frameon=False, fontsize=8)
    _save(figure, path)
