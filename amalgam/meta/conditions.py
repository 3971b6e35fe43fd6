"""Conditions that each episode draws for its students, so that they meet what users will set.

In one step a student with the update u of the gradient that it sees moves its parameters p by::

    p <- p (1 - lr_t * weight_decay) - lr_t * u

with lr_t the episode's learning rate at that step. The gradient that the student sees is the
optimizee's times the loss's scale. The losses themselves, as recorded and as meta-trained on, are
not scaled. Teachers know nothing of conditions: they train each optimizee as they always do.
On-policy (:mod:`amalgam.meta.on_policy`) u is the executed update, to which a teacher may have
added its own; that was made of the optimizee's gradient, not scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from amalgam.device import put
from amalgam.lr_decays import LR_DECAYS, LRDecay, factor_at
from amalgam.ranges import check_fields


class Drawn(NamedTuple):
    """The conditions of one optimizee in an episode.

    Attributes:
        weight_decay: The decoupled weight decay, multiplied by the learning rate.
        lr: The learning rate at the first step, a factor on the student's updates.
        lr_decay: How it goes on: one of :data:`amalgam.lr_decays.LR_DECAYS`.
        loss_scale: The factor on the gradients that the student sees.
    """

    weight_decay: float
    lr: float
    lr_decay: str
    loss_scale: float

    def left_at(self, step: int, horizon: int) -> float:
        """What is left of the learning rate at a step of an episode, as a share of the first one's.

        Args:
            step: The step, from 0, after the warm-up.
            horizon: Steps of the episode; the rate decays to zero over them.
        """
        return factor_at(self.lr_decay, step, horizon)


@dataclass(frozen=True)
class Conditions:
    """What an episode draws for each of its students' optimizees; by default nothing.

    They hold for the students alone and in meta-training alone, not in meta-validations. The steps
    of the warm-up by SGD are as without them, but the students see its gradients scaled.

    Attributes:
        weight_decay: The smallest and the largest decoupled weight decay, drawn log-uniform; where
            absent, there is none.
        weight_decay_zero: The probability that there is none all the same.
        lr: The smallest and the largest learning rate, drawn log-uniform.
        lr_decays: How the learning rate may go on, to zero over the episode's horizon: one of them
            is drawn, each as likely as the others.
        loss_scale: The smallest and the largest exponent of ten in the loss's scale, drawn uniform.
    """

    weight_decay: tuple[float, float] | None = None
    weight_decay_zero: float = 0.5
    lr: tuple[float, float] = (1.0, 1.0)
    lr_decays: tuple[LRDecay, ...] = ("constant",)
    loss_scale: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        """Refuse what can't be drawn."""
        for name in ("weight_decay", "lr", "lr_decays", "loss_scale"):
            found = getattr(self, name)
            if found is None and name == "weight_decay":
                continue
            if not isinstance(found, list | tuple):
                raise ValueError(f"{name} must be a list, not {found!r}")
            object.__setattr__(self, name, tuple(found))
        check_fields(
            self,
            shares=("weight_decay_zero",),
            positive=("weight_decay", "lr"),
            exponents=("loss_scale",),
        )
        for name in ("weight_decay", "lr"):
            found = getattr(self, name)
            if found is not None and not (len(found) == 2 and found[0] <= found[1]):
                raise ValueError(
                    f"{name} must be two positive and finite numbers, the smaller one first, not "
                    f"{found}"
                )
        if self.weight_decay is not None and not self.weight_decay[1] * self.lr[1] < 1:
            raise ValueError(
                f"weight_decay must be below 1 / {self.lr[1]}, so that a step leaves something of "
                f"the parameters, not {self.weight_decay[1]}"
            )
        if not self.lr_decays or not set(self.lr_decays) <= set(LR_DECAYS):
            raise ValueError(
                f"lr_decays must be one or more of {list(LR_DECAYS)}, not {list(self.lr_decays)}"
            )
        if len(self.loss_scale) != 2 or not self.loss_scale[0] <= self.loss_scale[1]:
            raise ValueError(
                f"loss_scale must be two exponents, the smaller one first, not {self.loss_scale}"
            )

    @property
    def any(self) -> bool:
        """Whether there is anything to draw."""
        return (
            self.weight_decay is not None
            or self.lr != (1.0, 1.0)
            or self.lr_decays != ("constant",)
            or self.loss_scale != (0.0, 0.0)
        )

    def draw(self, generator: torch.Generator) -> Drawn:
        """Draw the conditions of one optimizee."""
        zero, decay, lr, kind, scale = torch.rand(
            5, generator=generator, dtype=torch.float64
        ).tolist()
        weight_decay = 0.0
        if self.weight_decay is not None and zero >= self.weight_decay_zero:
            weight_decay = _log_uniform(self.weight_decay, decay)
        low, high = self.loss_scale
        return Drawn(
            weight_decay,
            _log_uniform(self.lr, lr),
            self.lr_decays[int(kind * len(self.lr_decays))],
            10 ** (low + (high - low) * scale),
        )


class StepConditions(NamedTuple):
    """The conditions in each of a window's T steps, for R rows.

    Attributes:
        lr: The learning rates, shape (T, R).
        kept: What weight decay leaves of the parameters, 1 - lr * weight_decay, shape (T, R).
        loss_scale: The factors on the gradients that the students see, shape (R,).
        left: What is left of the learning rates, as shares of those of the first steps, shape
            (T, R).
    """

    lr: Tensor
    kept: Tensor
    loss_scale: Tensor
    left: Tensor

    @classmethod
    def of(
        cls, rows: Sequence[Drawn], first: int, steps: int, horizon: int, like: Tensor
    ) -> StepConditions:
        """The conditions in a window.

        Args:
            rows: Each row's conditions in the episode.
            first: How many of the episode's steps came before the window.
            steps: Steps of the window.
            horizon: Steps of the episode.
            like: Whose dtype and device the tensors get.
        """
        left = torch.tensor(
            [[row.left_at(first + step, horizon) for row in rows] for step in range(steps)],
            dtype=torch.float64,
        ).view(steps, len(rows))
        numbers = ((row.lr, row.weight_decay) for row in rows)
        rates, decays = torch.tensor([*numbers], dtype=torch.float64).view(-1, 2).unbind(1)
        lr = left * rates
        by_step = (lr, 1 - lr * decays, left)
        lr, kept, left = (put(each.to(like.dtype), like.device) for each in by_step)
        return cls(lr, kept, loss_scales(rows, like), left)


def loss_scales(rows: Sequence[Drawn], like: Tensor) -> Tensor:
    """The rows' factors on the gradients that students see, shape (R,), of ``like``'s dtype."""
    scales = torch.tensor([row.loss_scale for row in rows], dtype=torch.float64)
    return put(scales.to(like.dtype), like.device)


def _log_uniform(ends: tuple[float, float], drawn: float) -> float:
    low, high = ends
    return low * (high / low) ** drawn
