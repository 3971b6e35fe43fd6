"""What students are meta-trained for: the settings, the meta-loss and the imitation loss.

The meta-loss is of the losses along the student's trajectory, the imitation loss of its distances
to the teachers'. Both are means over a window's steps; here are a step's terms and their slopes.
Source: Optimizer Amalgamation (ICLR 2022), sections 3.2 and 3.3, in the form of the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from amalgam import ops
from amalgam.hints import did_you_mean

MECHANISMS = ("mean", "min-max")
NORMALISERS = ("first-batch", "every-batch")
MODES = ("sum", "switch", "imitation", "meta")


@dataclass(frozen=True)
class Amalgamation:
    """How the student is held to its task and to its teachers.

    Attributes:
        mechanism: ``"mean"`` or ``"min-max"``: the mean, or at each step the largest, of the log
            distances to the teachers (paper, eq. 2 and 3).
        second_order: Whether the meta-gradient sees how updates change later gradients. Without,
            gradients count as constants: cheaper, and biased.
        scale_spread: Parameters are optimised as p / s with s = exp(U(-spread, spread)) drawn for
            each coordinate and episode; 0 for none.
        scale_teachers: Whether teachers, too, must cope with the scaling; otherwise they follow
            the unscaled trajectory.
        log_objective: Meta-loss of log losses and imitation loss of log distances; otherwise of
            the loss over the window's first, and of exp of the log distances.
        normaliser: The loss of the window's first parameters that the meta-loss is over: the
            ``"first-batch"``'s, which is known, or ``"every-batch"``'s own as in the authors'
            code, for a forward pass a step. To log losses it adds a constant that no gradient sees.
        huber_delta: Where given, parameter differences beyond it count linearly.
        eps: Added inside logs, and to divisors.
        stack: Whether optimizees of one shape run as one batched module; where ``None``, those
            that are faster so (see :attr:`amalgam.tasks.Task.stacks`).
        backend: Computes the student's and the teachers' operations.
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

    def __post_init__(self) -> None:
        """Refuse what can't be computed."""
        for name, known in (("mechanism", MECHANISMS), ("normaliser", NORMALISERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, not {getattr(self, name)!r}")
        if not self.scale_spread >= 0:
            raise ValueError(f"scale_spread must be 0 or more, not {self.scale_spread}")
        if self.huber_delta is not None and not self.huber_delta > 0:
            raise ValueError(f"huber_delta must be positive, not {self.huber_delta}")
        if not self.eps > 0:
            raise ValueError(f"eps must be positive, not {self.eps}")
        ops.check_backend(self.backend)


def loss_weights(
    mode: str, imitation_weight: float, generator: torch.Generator | None = None
) -> tuple[float, float]:
    """Weights of meta-loss and imitation loss in one window.

    Args:
        mode: ``"sum"``: 1 and the imitation weight; ``"switch"``: imitation alone with that
            probability, else the meta-loss alone; ``"imitation"`` or ``"meta"``: that one alone.
        imitation_weight: The stage's weight, or ``switch``'s probability.
        generator: Decides in ``switch``, which alone draws from it.

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
    """The terms of the meta-loss, and their slopes in the losses.

    Args:
        how: The settings.
        losses: The students' losses, shape (T, R).
        start: Losses of the window's first parameters, shape (R,) or (T, R).

    Returns:
        Both of shape (T, R).
    """
    if how.log_objective:
        return (losses + how.eps).log() - (start + how.eps).log(), 1 / (losses + how.eps)
    return losses / (start + how.eps), (1 / (start + how.eps)).expand_as(losses)


def imitation_terms(how: Amalgamation, distances: Tensor) -> Tensor:
    """A step's terms of the imitation loss.

    Args:
        how: The settings.
        distances: Log distances to the teachers, shape (R, K).

    Returns:
        Shape (R,).
    """
    reduced = distances.mean(1) if how.mechanism == "mean" else distances.amax(1)
    return reduced if how.log_objective else reduced.exp()


def imitation_slopes(how: Amalgamation, distances: Tensor) -> Tensor:
    """The gradient of one imitation term in its distances (K,); equal largest ones share it."""
    if how.mechanism == "mean":
        slopes = torch.full_like(distances, 1 / len(distances))
        reduced = distances.mean()
    else:
        reduced = distances.max()
        largest = distances == reduced
        slopes = largest.to(distances.dtype) / largest.sum()
    return slopes if how.log_objective else slopes * reduced.exp()
