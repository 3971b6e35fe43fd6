"""What a meta-step writes to ``metrics.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from amalgam.meta.meta_step import SlotWindow
from amalgam.meta.window import Window
from amalgam.policies import Pool


def finite_json(value: Any) -> Any:
    """The value as JSON can hold it: a number that is not finite becomes null.

    Metrics are for people and plots, so it is enough that such a number shows as missing.
    :meth:`amalgam.meta.periods.Record.to_json` writes strings instead: it is read back, and
    strategies tell NaN from infinity.
    """
    if isinstance(value, dict):
        return {key: finite_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def window_metrics(window: Window, pool: Pool, rows: slice) -> dict[str, Any]:
    """A replicate's metrics of one window.

    Args:
        window: The window.
        pool: The teachers.
        rows: The replicate's rows.

    Returns:
        For the student and each teacher by name: ``loss``, the mean over steps and rows of the
        loss; ``last_loss``, the mean over rows before the last step; ``skipped_steps``, the sum
        over rows. For each teacher: ``distance``, its mean log distance, or on-policy its mean term
        of the imitation loss; ``followed``, the share of steps and rows in which it was the nearest
        teacher. On-policy teachers have no losses of their own, and ``cosine`` and ``log_ratio``:
        the means of the cosine between the student's update and the teacher's, and of the log of
        its norm over the teacher's.
    """
    names = ("student", *pool.names)
    losses, distances = window.losses[:, rows].mean(1), window.distances[:, rows]
    with_losses = names[: losses.shape[1]]

    def by_name(keys: Sequence[str], values: Tensor) -> dict[str, Any]:
        return dict(zip(keys, values.tolist(), strict=True))

    metrics: dict[str, Any] = {
        "loss": by_name(with_losses, losses.mean(0)),
        "last_loss": by_name(with_losses, losses[-1]),
        "skipped_steps": by_name(names, window.skipped[rows].sum(0)),
    }
    if len(pool):
        nearest = torch.nn.functional.one_hot(distances.argmin(2), len(pool))
        metrics["distance"] = by_name(pool.names, distances.mean((0, 1)))
        metrics["followed"] = by_name(pool.names, nearest.double().mean((0, 1)))
    if window.cosines.shape[2]:
        metrics["cosine"] = by_name(pool.names, window.cosines[:, rows].mean((0, 1)))
        metrics["log_ratio"] = by_name(pool.names, window.log_ratios[:, rows].mean((0, 1)))
    return metrics


def slot_metrics(part: SlotWindow, index: int, unroll: int) -> dict[str, Any]:
    """A replicate's metrics of one slot's window.

    Args:
        part: The window.
        index: The replicate's number.
        unroll: Steps per window.

    Returns:
        ``slot``; ``task``, its name; ``episode``, its number; ``step``, how many of the episode's
        steps came before the window; ``horizon``, how many steps the episode has; ``meta_loss`` and
        ``imitation_loss``; ``grad_norm``, before any clipping.
    """
    episode, window = part.episode, part.window
    return {
        "slot": part.slot,
        "task": part.task.name,
        "episode": episode.number,
        "step": episode.window * unroll,
        "horizon": episode.windows * unroll,
        "meta_loss": window.meta_loss[index].item(),
        "imitation_loss": window.imitation_loss[index].item(),
        "grad_norm": part.norms[index],
    }


def over_slots(slots: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What :func:`window_metrics` gave for several slots as one: sums of counts, means of all else.

    Args:
        slots: One entry per slot.
    """
    metrics: dict[str, Any] = {}
    for key, by_name in slots[0].items():
        metrics[key] = {}
        for name in by_name:
            total = math.fsum(slot[key][name] for slot in slots)
            metrics[key][name] = round(total) if key == "skipped_steps" else total / len(slots)
    return metrics
