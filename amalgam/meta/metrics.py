"""What a meta-step writes to ``metrics.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

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
        over rows. For each teacher: ``distance``, its mean log distance; ``followed``, the share of
        steps and rows in which it was the nearest teacher.
    """
    names = ("student", *pool.names)
    losses, distances = window.losses[:, rows].mean(1), window.distances[:, rows]

    def by_name(keys: Sequence[str], values: Tensor) -> dict[str, Any]:
        return dict(zip(keys, values.tolist(), strict=True))

    metrics: dict[str, Any] = {
        "loss": by_name(names, losses.mean(0)),
        "last_loss": by_name(names, losses[-1]),
        "skipped_steps": by_name(names, window.skipped[rows].sum(0)),
    }
    if len(pool):
        nearest = torch.nn.functional.one_hot(distances.argmin(2), len(pool))
        metrics["distance"] = by_name(pool.names, distances.mean((0, 1)))
        metrics["followed"] = by_name(pool.names, nearest.double().mean((0, 1)))
    return metrics
