"""Plots of a meta-training run and of an evaluation."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from amalgam import files
from amalgam.evaluation import tables
from amalgam.evaluation.protocol import ONE_SETTING, oracle_of, reference_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from amalgam.evaluation import Result

_COLOURS = ("#3b6fd4", "#d1495b", "#00998c", "#c98a1b", "#5a9a4a", "#8d63b8", "#c65fa5", "#b5651d")


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

    Lines are geometric means over seeds, bands reach from the smallest to the largest. Where a loss
    is zero or negative, the axis is linear and lines are arithmetic means. A line ends where no
    seed's loss is finite.

    Args:
        results: The contenders' results, at least one, all on one task.
        path: The file to write, ``.png``, ``.svg`` or ``.pdf``.
    """
    figure, _ = _drawn(results)
    _save(figure, path)


def curves_svg(results: Sequence[Result]) -> str:
    """The same as an SVG element for a web page, whose text and axes have the page's colour.

    Args:
        results: As :func:`curves` takes them.
    """
    import matplotlib

    # Ids are hashes of what they name; with the task in them no two plots of a page share one.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": results[0].task}):
        figure, axes = _drawn(results, ink=_INK)
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    drawn = file.getvalue()
    return drawn[drawn.index("<svg") :].replace(_INK, "currentColor")


# matplotlib knows no "currentColor", so a colour that nothing else has stands for it.
_INK = "#010203"
_GREY = "#9a9a9a"


def _drawn(results: Sequence[Result], ink: str = "black") -> tuple[Figure, Any]:
    """One task's curves."""
    figure, axes = _figure(1, 1, figsize=(6.8, 4.5))
    ax = axes[0, 0]
    losses = [np.array([curve.losses for curve in result.curves]) for result in results]
    known = np.concatenate([each[np.isfinite(each)] for each in losses])
    logarithmic = bool((known > 0).all())
    foremost = _foremost(results)
    colours = dict(zip(dict.fromkeys(map(_contender, foremost)), _COLOURS, strict=False))
    for result, each in zip(results, losses, strict=True):
        stands_out = result in foremost
        colour = colours[_contender(result)] if stands_out else _GREY
        with np.errstate(all="ignore"), warnings.catch_warnings():
            # A step at which no seed's loss is finite has no mean; NaN is what it should be.
            warnings.simplefilter("ignore", RuntimeWarning)
            finite = np.where(np.isfinite(each), each, np.nan)
            middle = np.exp(np.nanmean(np.log(finite), 0)) if logarithmic else np.nanmean(finite, 0)
            low, high = np.nanmin(finite, 0), np.nanmax(finite, 0)
        steps = result.curves[0].steps
        label = f"{result.name} ({tables.diverged(result)})" if result.diverged else result.name
        ax.plot(
            steps,
            middle,
            color=colour,
            lw=(2 if result.kind == "student" else 1.4) if stands_out else 0.8,
            ls="--" if result.decay == "linear" else "-",
            label=label if stands_out else None,
            zorder=3 if stands_out else 2,
        )
        if stands_out:
            ax.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
    others = [result for result in results if result not in foremost]
    if others:
        students = any(result.kind == "student" for result in others)
        label = "others" if students else "other baselines"
        ax.plot([], [], color=_GREY, lw=0.8, label=label)
    seeds = len(results[0].curves)
    title = f"{results[0].task}, {seeds} seed{'s' if seeds > 1 else ''}"
    ax.set_title(title, color=ink)
    ax.set_xlabel("step", color=ink)
    ax.set_ylabel("validation loss", color=ink)
    if logarithmic and len(known):
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        # Within a decade there may be no other labels.
        decade = known.max() / known.min() < 10
        ax.yaxis.set_minor_formatter("{x:g}" if decade else "")
    ax.set_xscale("symlog", linthresh=10)
    ax.set_xlim(left=0)  # margins on this scale would reach far below 0
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.tick_params(which="both", colors=ink)
    for spine in ax.spines.values():
        spine.set_edgecolor(ink)
    ax.legend(frameon=False, fontsize=8, labelcolor=ink)
    return figure, ax


def _contender(result: Result) -> str:
    """Whose result it is, however its rate goes on: those have one colour."""
    return result.name.removesuffix(f", {result.decay}")


def _foremost(results: Sequence[Result]) -> list[Result]:
    """The results to tell apart by colour: all, or else those that an evaluation is about.

    Where there are more students than colours, the first ones.
    """
    if len(set(map(_contender, results))) <= len(_COLOURS):
        return list(results)
    found = [one for one in (reference_of(results), oracle_of(results)) if one is not None]
    found += [result for result in results if result.name == ONE_SETTING]
    found += [result for result in results if result.kind == "student"]
    named = list(dict.fromkeys(map(_contender, found)))[: len(_COLOURS)]
    # Without repeats, in the table's order.
    return [one for one in results if one in found and _contender(one) in named]
