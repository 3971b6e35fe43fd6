"""How a learning rate may decay over an episode."""

from __future__ import annotations

import math
from typing import Literal, get_args

LRDecay = Literal["constant", "linear", "cosine"]
"""The decays by name; all but the first end at zero."""

LR_DECAYS: tuple[LRDecay, ...] = get_args(LRDecay)


def check_decay(decay: str) -> None:
    """Refuse what is none of :data:`LR_DECAYS`.

    Raises:
        ValueError: It is none.
    """
    if decay not in LR_DECAYS:
        raise ValueError(f"decay must be one of {list(LR_DECAYS)}, not {decay!r}")


def factor_at(decay: str, step: int, horizon: int) -> float:
    """What is left of a learning rate at a step, as a share of the rate at the first one.

    Args:
        decay: One of :data:`LR_DECAYS`.
        step: The step, from 0.
        horizon: Steps of the episode; the rate is zero after the last one.
    """
    if decay == "linear":
        return 1 - step / horizon
    if decay == "cosine":
        return (1 + math.cos(math.pi * step / horizon)) / 2
    return 1.0
