"""What a meta-step leaves in ``metrics.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from amalgam.meta.window import Window
from amalgam.policies import Pool


def finite_json(value: Any) -> Any:
    """The value as JSON can hold it: a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {key: finite_json(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def window_metrics(window: Window, pool: Pool, rows: slice) -> dict[str, Any]:
    """Losses, distances and skipped steps of some rows of a window, by student and teacher.

    Args:
        window: The window.
        pool: Its teachers.
        rows: Which rows: those of one replicate.
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
