"""What teachers do in a window that depends on the run and on the episode."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

from amalgam.device import put
from amalgam.policies import Pool


class Teaching(NamedTuple):
    """What K teachers do in a window of T steps, for R rows.

    Attributes:
        fade: The share of an on-policy teacher's update in the executed steps, in [0, 1].
        executed: The index of that teacher, for each row, shape (R,), int64; ``None`` for none.
        factors: What is left of each teacher's learning rate in each step, a factor on its updates,
            shape (T, K); ``None`` where all rates are constant.
    """

    fade: float = 0.0
    executed: Tensor | None = None
    factors: Tensor | None = None

    @classmethod
    def of(
        cls,
        pool: Pool,
        first: int,
        steps: int,
        horizon: int,
        like: Tensor,
        fade: float = 0.0,
        executed: Tensor | None = None,
    ) -> Self:
        """What a pool does in a window.

        Args:
            pool: The teachers.
            first: How many of the episode's steps came before the window.
            steps: Steps of the window.
            horizon: Steps of the episode.
            like: Whose dtype and device ``factors`` gets.
            fade: See :class:`Teaching`.
            executed: See :class:`Teaching`.
        """
        if not pool.decays:
            return cls(fade, executed)
        factors = [pool.lr_factors(first + step, horizon) for step in range(steps)]
        left = torch.tensor(factors, dtype=torch.float64).to(like.dtype)
        return cls(fade, executed, put(left, like.device))
