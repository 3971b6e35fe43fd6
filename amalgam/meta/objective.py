"""What students are meta-trained for: the meta-loss, the imitation loss, and their settings.

The meta-loss depends on the optimizee's losses along the student's trajectory. The imitation loss
depends on the distances between the student's trajectory and the teachers'. Both are means over a
window's steps. This module computes the terms of these means and the terms' derivatives.
Source: Optimizer Amalgamation (ICLR 2022), sections 3.2 and 3.3, in the form of the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from amalgam import ops
from amalgam.hints import did_you_mean
from amalgam.meta.on_policy import OnPolicy
from amalgam.ranges import check_fields

MECHANISMS = ("mean", "min-max")
NORMALISERS = ("first-batch", "every-batch")
MODES = ("sum", "switch", "imitation", "meta")
MOST_SPREAD = 40


@dataclass(frozen=True)
class Amalgamation:
    """Settings of the meta-loss and the imitation loss, and how they are computed.

    Attributes:
        mechanism: How the log distances to the teachers become one imitation term per step: their
            mean for ``"mean"``, the largest for ``"min-max"`` (paper, eq. 2 and 3). With
            ``on_policy`` the teachers' terms are reduced alike.
        second_order: Whether the meta-gradient accounts for how an update changes later gradients
            of the optimizee. If not, these gradients count as constants: cheaper, and biased.
        scale_spread: Parameters are optimised as p / s, where s = exp(U(-spread, spread)) is drawn
            for each coordinate and episode. 0 means no scaling.
        scale_teachers: Whether teachers, too, work on scaled parameters. If not, they see unscaled
            parameters and gradients.
        log_objective: Whether the terms of both losses are logs. If true, the meta-loss's terms are
            log(loss) - log(normaliser), and the imitation loss's are log distances. If false, they
            are loss / abs(normaliser), and exp(log distance). Losses that become negative need
            false.
        normaliser: What each step's loss is divided by: the loss of the window's first parameters,
            on the window's first batch (``"first-batch"``), which is computed anyway, or on the
            step's own batch (``"every-batch"``, as in the authors' code), which costs one more
            forward pass per step. A first batch whose loss or gradient is not finite does not
            count as the first. With ``log_objective`` it only adds a constant, and the
            meta-gradient does not depend on it.
        huber_delta: Where given, differences of parameters beyond it count linearly in distances.
        eps: Added to losses and distances inside logs, and to divisors.
        stack: Whether optimizees of one shape run as one batched module. Where ``None``, they do
            where that is faster (see :attr:`amalgam.tasks.Task.stacks`).
        backend: The backend that computes the students' and the teachers' operations.
        on_policy: Where given, teachers act at the students' parameters in place of training
            optimizees of their own: see :mod:`amalgam.meta.on_policy`. Then ``huber_delta`` has no
            effect, and ``log_objective`` none on the imitation loss.
    """

    mechanism: Literal["mean", "min-max"] = "min-max"
    second_order: bool = True
    scale_spread: float = 3.0
    scale_teachers: bool = False
    log_objective: bool = True
    normaliser: Literal["first-batch", "every-batch"] = "first-batch"
    huber_delta: float | None = None
    eps: float = 1e-10
    stack: bool | None = None
    backend: str = "auto"
    on_policy: OnPolicy | None = None

    def __post_init__(self) -> None:
        """Refuse what can't be computed."""
        for name, known in (("mechanism", MECHANISMS), ("normaliser", NORMALISERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, not {getattr(self, name)!r}")
        check_fields(self, positive=("huber_delta", "eps"), not_negative=("scale_spread",))
        if self.scale_spread > MOST_SPREAD:
            raise ValueError(
                f"scale_spread must be at most {MOST_SPREAD}, beyond which float32 does not hold "
                f"the square of exp(scale_spread), not {self.scale_spread}"
            )
        ops.check_backend(self.backend)

    @property
    def exp_distances(self) -> bool:
        """Whether the imitation loss's terms are exps of what they are reduced from."""
        return not self.log_objective and self.on_policy is None


def loss_weights(
    mode: str, imitation_weight: float, generator: torch.Generator | None = None
) -> tuple[float, float]:
    """The weights of the meta-loss and of the imitation loss in one window's loss.

    Args:
        mode: ``"sum"`` weighs the meta-loss by 1 and the imitation loss by ``imitation_weight``.
            ``"switch"`` takes the imitation loss alone with the probability ``imitation_weight``,
            and otherwise the meta-loss alone. ``"imitation"`` and ``"meta"`` always take that loss
            alone.
        imitation_weight: The period's weight of the imitation loss.
        generator: Decides in the mode ``"switch"``; the other modes do not use it.

    Raises:
        ValueError: There is no such mode, or ``switch`` has no generator.
    """
    if mode == "sum":
        return 1.0, imitation_weight
    if mode == "imitation":
        return 0.0, 1.0
    if mode == "meta":
        return 1.0, 0.0
    if mode != "switch":
        raise ValueError(
            f"mode must be one of {list(MODES)}, not {mode!r}{did_you_mean(mode, MODES)}"
        )
    if generator is None:
        raise ValueError("generator must be given for the mode 'switch', not None")
    drawn = torch.rand((), generator=generator, dtype=torch.float64, device=generator.device)
    return (0.0, 1.0) if drawn.item() < imitation_weight else (1.0, 0.0)


def meta_terms(how: Amalgamation, losses: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """The terms of the meta-loss, and each one's derivative with respect to its loss.

    Args:
        how: The settings.
        losses: The losses of the students' optimizees, shape (T, R).
        start: The normaliser, shape (R,) or (T, R).

    Returns:
        The terms and the derivatives, each of shape (T, R).
    """
    if how.log_objective:
        return (losses + how.eps).log() - (start + how.eps).log(), 1 / (losses + how.eps)
    # A loss below zero is to fall further, too.
    scale = start.abs() + how.eps
    return losses / scale, (1 / scale).expand_as(losses)


def check_logs(losses: Iterable[float], eps: float, task: str) -> None:
    """Refuse losses that have no logs.

    Args:
        losses: The losses; what is not finite is let pass.
        eps: Added to them inside logs.
        task: The task's name, for the message.

    Raises:
        ValueError: One of them is negative.
    """
    negative = next((loss for loss in losses if -math.inf < loss <= -eps), None)
    if negative is not None:
        raise ValueError(
            f"log_objective must be False for task {task!r}: one of its losses was {negative:g}, "
            f"and what is below zero has no log; set Amalgamation(log_objective=False), in a "
            f"recipe amalgamation.log_objective = false"
        )


def imitation_terms(how: Amalgamation, distances: Tensor) -> Tensor:
    """One step's terms of the imitation loss.

    Args:
        how: The settings.
        distances: Log distances to the teachers, or the teachers' on-policy terms, shape (R, K).

    Returns:
        One term per row, shape (R,).
    """
    reduced = distances.mean(1) if how.mechanism == "mean" else distances.amax(1)
    return reduced.exp() if how.exp_distances else reduced


def imitation_slopes(how: Amalgamation, distances: Tensor) -> Tensor:
    """The gradient of one row's imitation term with respect to what it is made of, shape (K,).

    Where several distances are the largest, they share the gradient alike.

    Args:
        how: The settings of the losses.
        distances: The row's log distances or on-policy terms, shape (K,).
    """
    if how.mechanism == "mean":
        slopes = torch.full_like(distances, 1 / len(distances))
        reduced = distances.mean()
    else:
        reduced = distances.max()
        largest = distances == reduced
        slopes = largest.to(distances.dtype) / largest.sum()
    return slopes * reduced.exp() if how.exp_distances else slopes
