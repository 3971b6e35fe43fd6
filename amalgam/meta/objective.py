"""What students are meta-trained for: the meta-loss, the imitation loss, and their settings.

The meta-loss depends on the optimizee's losses along the student's trajectory. The imitation loss
depends on the distances between the student's trajectory and the teachers'. Both are means over a
window's steps; the meta-loss may be the last step's term instead. This module computes the terms
and their derivatives.
Source: Optimizer Amalgamation (ICLR 2022), sections 3.2 and 3.3, in the form of the authors' code.

The meta-loss's term of step t is a loss at p_t, the parameters before the step. Taken on the step's
own batch, it is already a loss of samples that none of the differentiated steps saw, as long as the
window is within an epoch: p_t depends on the student's weights through the batches before t alone,
and an epoch repeats no sample. Taking the term on the next batch would change nothing. What is
biased is all beyond one epoch. A window that is longer sees samples again. A later window, which
shuffles anew, begins from parameters that the windows before it have fitted to these very samples;
so does the first one, after a warm-up. Where data are few, the student is then rewarded for fitting
the training samples, whatever that does to the loss of others. With ``Amalgamation.held_out`` the
term is the loss at p_t of samples that the whole episode leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from amalgam import ops
from amalgam.hints import did_you_mean
from amalgam.meta.on_policy import OnPolicy
from amalgam.ranges import check_fields, check_kind

MECHANISMS = ("mean", "min-max")
OBJECTIVES = ("mean", "final")
NORMALISERS = ("first-batch", "every-batch")
AUTOCASTS = (None, "bfloat16")
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
        objective: What a window's meta-loss is: the mean of the terms over its steps (``"mean"``),
            or the last step's term alone (``"final"``), which does not mind how the loss gets
            there. A final loss that is not finite gives its place to the last one that is. The
            imitation loss is a mean over the steps in any case. Source of ``"final"``: VeLO (Metz
            et al., 2022), there of whole episodes; here of each window.
        held_out: The share of a task's training samples that each optimizee leaves out in an
            episode, drawn anew for each. The meta-loss is then taken on batches of these samples,
            and shows whether the student generalises, not how fast it fits what it sees. It costs
            one more forward and backward pass of the students' optimizees per step, and as much
            tape as their gradients. With ``objective="final"`` only the first and the last step's
            losses are looked at, so it costs next to nothing. Training samples, because a task's
            validation data judge: students are compared, and the weights to keep chosen, on data
            that did not make them. 0 means that the term of a step is the loss of its own batch.
        log_objective: Whether the terms of both losses are logs. If true, the meta-loss's terms are
            log(loss) - log(normaliser), and the imitation loss's are log distances. If false, they
            are loss / abs(normaliser), and exp(log distance). Losses that become negative need
            false.
        normaliser: What each step's loss is divided by: the loss of the window's first parameters,
            on the window's first batch (``"first-batch"``), which is computed anyway, or on the
            step's own batch (``"every-batch"``, as in the authors' code), which costs one more
            forward pass per step. Where samples are held out, the batches are theirs. A first batch
            whose loss or gradient is not finite does not count as the first. With
            ``log_objective`` it only adds a constant, and the meta-gradient does not depend on it.
        huber_delta: Where given, differences of parameters beyond it count linearly in distances.
        eps: Added to losses and distances inside logs, and to divisors.
        stack: Whether optimizees of one shape run as one batched module. Where ``None``, they do
            where that is faster (see :meth:`amalgam.tasks.Task.stacks`).
        autocast: ``"bfloat16"`` lets PyTorch compute optimizees' losses and gradients in it where
            that is safe (:class:`torch.autocast`); parameters, steps and distances stay as they
            are. Where ``None``, optimizees compute in their own dtypes.
        backend: The backend that computes the students' and the teachers' operations.
        cuda_graph: Whether, on a GPU, a window and its meta-gradient run as one CUDA graph, if they
            can (:mod:`amalgam.meta.cuda_graph`). The numbers are the same.
        on_policy: Where given, teachers act at the students' parameters in place of training
            optimizees of their own: see :mod:`amalgam.meta.on_policy`. Then ``huber_delta`` has no
            effect, and ``log_objective`` none on the imitation loss.
    """

    mechanism: Literal["mean", "min-max"] = "min-max"
    second_order: bool = True
    scale_spread: float = 3.0
    scale_teachers: bool = False
    objective: Literal["mean", "final"] = "mean"
    held_out: float = 0.0
    log_objective: bool = True
    normaliser: Literal["first-batch", "every-batch"] = "first-batch"
    huber_delta: float | None = None
    eps: float = 1e-10
    stack: bool | None = None
    autocast: Literal["bfloat16"] | None = None
    backend: str = "auto"
    cuda_graph: bool = field(default=True, repr=False)  # a run may resume with another
    on_policy: OnPolicy | None = None

    def __post_init__(self) -> None:
        """Refuse what can't be computed."""
        for name, known in (
            ("mechanism", MECHANISMS),
            ("objective", OBJECTIVES),
            ("normaliser", NORMALISERS),
            ("autocast", AUTOCASTS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, not {getattr(self, name)!r}")
        check_fields(
            self,
            positive=("huber_delta", "eps"),
            not_negative=("scale_spread",),
            decays=("held_out",),
        )
        if self.scale_spread > MOST_SPREAD:
            raise ValueError(
                f"scale_spread must be at most {MOST_SPREAD}, beyond which float32 does not hold "
                f"the square of exp(scale_spread), not {self.scale_spread}"
            )
        check_kind("on_policy", self.on_policy, OnPolicy | None, "an OnPolicy or None")
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
        losses: The losses that the meta-loss takes of the students' optimizees, shape (T, R).
        start: The normaliser, shape (R,) or (T, R).

    Returns:
        The terms and the derivatives, each of shape (T, R).
    """
    if how.log_objective:
        return (losses + how.eps).log() - (start + how.eps).log(), 1 / (losses + how.eps)
    # A loss below zero is to fall further, too.
    scale = start.abs() + how.eps
    return losses / scale, (1 / scale).expand_as(losses)


def last_of(counted: Tensor) -> Tensor:
    """The last of the steps that count, for each row.

    Args:
        counted: Which steps count, shape (T, R).

    Returns:
        Whether each step is a row's last that counts, shape (T, R).
    """
    from_here_on = counted.int().flip(0).cumsum(0).flip(0)
    return counted & (from_here_on == 1)


def without_log(losses: Tensor, eps: float) -> Tensor:
    """Which losses have no log when ``eps`` is added; what is not finite is let pass."""
    return (losses > -math.inf) & (losses <= -eps)


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
    """The terms of the imitation loss.

    Args:
        how: The settings.
        distances: Log distances to the teachers, or the teachers' on-policy terms, shape (..., K).

    Returns:
        One term per step and row, shape (...).
    """
    reduced = distances.mean(-1) if how.mechanism == "mean" else distances.amax(-1)
    return reduced.exp() if how.exp_distances else reduced


def imitation_slopes(how: Amalgamation, distances: Tensor) -> Tensor:
    """The gradient of the rows' imitation terms with respect to what they are made of, (R, K).

    Where several distances are the largest, they share the gradient alike.

    Args:
        how: The settings of the losses.
        distances: The rows' log distances or on-policy terms, shape (R, K).
    """
    if how.mechanism == "mean":
        slopes = torch.full_like(distances, 1 / distances.shape[-1])
        reduced = distances.mean(-1, keepdim=True)
    else:
        reduced = distances.amax(-1, keepdim=True)
        largest = distances == reduced
        slopes = largest.to(distances.dtype) / largest.sum(-1, keepdim=True)
    return slopes * reduced.exp() if how.exp_distances else slopes
