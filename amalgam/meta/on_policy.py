"""On-policy amalgamation: teachers act at the student's own parameters, on its own gradient.

Off-policy teachers train optimizees of their own, and imitation is a distance of parameters.
On-policy teachers have accumulators alone. In step t teacher k makes an update u_k of the gradient
at the student's parameters p, and the student makes its update u of the same gradient. So a step
costs one gradient of the optimizee in place of 1 + K, and the teachers say what they would do where
the student is. The imitation loss compares u with each u_k, tensor by tensor::

    term_k = mean over tensors of direction (1 - cos(u, u_k)) + magnitude log(|u| / |u_k|)^2

The step that is executed fades from a teacher's to the student's, as in ELO (2026,
arXiv:2607.06772)::

    p <- p - ((1 - fade) u + fade u_e)

Each row draws the teacher e anew in every episode. A mean of the teachers' updates would be led by
the one with the longest steps, and would visit states that none of them visits. Teachers' updates
are constants of the meta-gradient.

Terms are means over tensors, so that every layer counts alike, however large it and its steps are.
A tensor that the student or the teacher leaves where it is has no direction, and does not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from amalgam.layout import Layout
from amalgam.ranges import check_fields


@dataclass(frozen=True)
class OnPolicy:
    """Settings of on-policy amalgamation.

    Attributes:
        direction: Weight of 1 - cos(u, u_k) in the imitation loss.
        magnitude: Weight of log(|u| / |u_k|)^2 in the imitation loss.
        fade: The share of a teacher's update in the first meta-step's executed steps.
        imitation_floor: What is left of the strategy's imitation weight in the end, as a share.
        anneal_steps: The meta-steps in which ``fade`` falls linearly to 0, and the imitation weight
            to its floor.
    """

    direction: float = 1.0
    magnitude: float = 0.1
    fade: float = 1.0
    imitation_floor: float = 0.1
    anneal_steps: int = 100

    def __post_init__(self) -> None:
        """Refuse what can't be computed."""
        check_fields(
            self,
            counts=("anneal_steps",),
            shares=("fade", "imitation_floor"),
            not_negative=("direction", "magnitude"),
        )

    def fade_at(self, meta_step: int) -> float:
        """The share of a teacher's update in the executed steps, after so many meta-steps."""
        return self.fade * self._left(meta_step)

    def imitation_at(self, meta_step: int) -> float:
        """The factor on the strategy's imitation weight, after so many meta-steps."""
        return self.imitation_floor + (1 - self.imitation_floor) * self._left(meta_step)

    def _left(self, meta_step: int) -> float:
        return max(0.0, 1 - meta_step / self.anneal_steps)


class Blend(NamedTuple):
    """How a window's executed steps are made of the students' updates and the teachers'.

    Attributes:
        own: The factor on the students' updates.
        added: What the teachers add, shape (T, R, N); or (1, R, N), of the current step alone,
            where no step will be taken again.
    """

    own: float
    added: Tensor

    def executed(self, step: int, updates: Tensor) -> Tensor:
        """The executed updates (R, N) of a step, from the students' updates (R, N)."""
        return self.own * updates + self.of_teachers(step)

    def of_teachers(self, step: int) -> Tensor:
        """What the teachers add in a step, shape (R, N)."""
        return self.added[step % len(self.added)]


class Comparison:
    """The students' updates beside the teachers', tensor by tensor.

    Args:
        how: The terms' weights.
        updates: The students' updates, shape (R, N).
        teachers: The teachers' updates, shape (K, R, N).
        layout: Which tensors the coordinates are.

    Attributes:
        cosines: The mean over tensors of cos(u, u_k), shape (R, K).
        log_ratios: The mean over tensors of log(|u| / |u_k|), shape (R, K).
        terms: Each teacher's term of the imitation loss, shape (R, K).
    """

    def __init__(self, how: OnPolicy, updates: Tensor, teachers: Tensor, layout: Layout) -> None:
        k, self._how, self._updates = len(teachers), how, updates
        self._teachers = teachers.transpose(0, 1)
        own = updates[:, None]
        products = torch.cat((own.square(), self._teachers.square(), own * self._teachers), 1)
        # Not by index_add, whose sums have other last bits in every run on a GPU.
        sums = [part.sum(-1) for part in products.split(layout.sizes, -1)]
        self._tensor_of = layout.tensor_of(updates.device)
        squares, of_teachers, dots = torch.stack(sums, -1).split((1, k, k), 1)
        # What is smaller has no inverse.
        least = torch.finfo(updates.dtype).tiny
        counts = (squares > least) & (of_teachers > least)
        self._shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
        self._squares, of_teachers = squares.clamp(min=least), of_teachers.clamp(min=least)
        self._lengths = self._squares.sqrt() * of_teachers.sqrt()
        self._cosines = torch.where(counts, dots / self._lengths, 0)
        self._log_ratios = (self._squares.log() - of_teachers.log()) / 2
        self.cosines = self._mean(self._cosines)
        self.log_ratios = self._mean(self._log_ratios)
        self.terms = self._mean(
            how.direction * (1 - self._cosines) + how.magnitude * self._log_ratios.square()
        )

    def gradient(self, weights: Tensor) -> Tensor:
        """The gradient of a sum of the terms with respect to the students' updates, shape (R, N).

        Args:
            weights: The terms' weights in the sum, shape (R, K).
        """
        how, shares = self._how, self._shares * weights[..., None]
        along_teachers = -how.direction * shares / self._lengths
        along_own = how.direction * self._cosines + 2 * how.magnitude * self._log_ratios
        along_own = (shares * along_own).sum(1) / self._squares[:, 0]
        of_teachers = (along_teachers[..., self._tensor_of] * self._teachers).sum(1)
        return of_teachers + along_own[..., self._tensor_of] * self._updates

    def _mean(self, by_tensor: Tensor) -> Tensor:
        """The mean over the tensors that count, of (R, K, tensors); 0 where none does."""
        return (self._shares * by_tensor).sum(-1)
