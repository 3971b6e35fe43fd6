"""The steps of all students in one window, forward and backward.

:mod:`amalgam.meta.steps` steps one policy. Here its replicates step side by side, each with weights
of its own, to which noise may be added anew at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amalgam.meta.episode import Episodes
from amalgam.meta.finite import usable
from amalgam.meta.perturbation import InputNoise
from amalgam.meta.points import Point

# A step -> what is added to each student's weights in it.
WeightNoise = Callable[[int], Sequence[Sequence[Tensor]]]

# A purpose, a step, a row -> a generator for it, which begins anew at every call.
Draws = Callable[[str, int, int], torch.Generator]


@dataclass
class Adjoint:
    """Gradients of a window's loss in what there is before a step.

    Attributes:
        params: In the students' parameters, shape (R, N).
        states: In each student's state.
        weights: In each student's weights, summed over the steps so far.
    """

    params: Tensor
    states: list[Any]
    weights: list[list[Tensor]]


class StudentSteps:
    """Steps all students of a window.

    Args:
        episodes: Whose students they are.
        weights: Each student's weights, outside any graph.
        noise: Added to them at each step.
        draws: Where the policies' own noise and the input's comes from.
        input_noise: Standard deviation of the noise on the gradients that students see.
    """

    def __init__(
        self,
        episodes: Episodes,
        weights: Sequence[Sequence[Tensor]],
        noise: WeightNoise | None,
        draws: Draws | None,
        input_noise: float,
    ) -> None:
        self.weights = weights
        self._episodes = episodes
        self._noise = noise
        self._draws = draws
        self._input_noise = InputNoise(input_noise) if input_noise else None

    @property
    def noisy(self) -> bool:
        """Whether weights or gradients are given noise."""
        return self._noise is not None or self._input_noise is not None

    def forward(
        self, step: int, point: Point, grads: Tensor, moved: Tensor, reuse: bool
    ) -> tuple[Point, Tensor]:
        """One step of all students, without a graph.

        Args:
            step: The step's number.
            point: Where they stand.
            grads: Their gradients, shape (R, N).
            moved: Which rows are to move, shape (R,).
            reuse: Whether the new states may lie where the old ones do, if all rows move.

        Returns:
            The next point, and whether each row's update is usable, shape (R,).
        """
        if not moved.any():
            return point, moved
        reuse = reuse and bool(moved.all())
        updates, states = [], []
        inputs = zip(
            self._episodes.by_student(self._seen(step, grads)),
            point.states,
            self._weights_at(step),
            self._episodes.by_student(moved),
            strict=True,
        )
        for student, (seen, state, weights, to_move) in enumerate(inputs):
            update, new = self._episodes.steps.forward(
                seen, state, weights, to_move, self._draws_of(step, student), reuse
            )
            updates.append(update)
            states.append(new)
        update = torch.cat(updates) if len(updates) > 1 else updates[0]
        params = point.params - update
        if not moved.all():
            params = torch.where(moved[:, None], params, point.params)
        return Point(params, tuple(states)), usable(update)

    def backward(
        self, step: int, point: Point, grads: Tensor, moved: Tensor, adjoint: Adjoint
    ) -> Tensor:
        """Through one step, from its updates to states, weights and gradients.

        Args:
            step: The step's number.
            point: Where the students stood before it.
            grads: Their gradients there, shape (R, N).
            moved: Which rows moved, shape (R,).
            adjoint: The adjoint after the step. Its states become those before the step, and its
                weights get the step's share; its parameters stay.

        Returns:
            The gradients in ``grads``.
        """
        episodes = self._episodes
        d_updates = episodes.by_student(-adjoint.params)
        seen, weights = episodes.by_student(self._seen(step, grads)), self._weights_at(step)
        d_grads = torch.zeros_like(grads)
        for student, rows_moved in enumerate(episodes.by_student(moved)):
            if not rows_moved.any():
                continue
            d_grad, adjoint.states[student], d_weights = episodes.steps.backward(
                d_updates[student],
                adjoint.states[student],
                seen[student],
                point.states[student],
                weights[student],
                rows_moved,
                self._draws_of(step, student),
            )
            torch._foreach_add_(adjoint.weights[student], d_weights)
            episodes.by_student(d_grads)[student].copy_(d_grad)
        return d_grads

    def _seen(self, step: int, grads: Tensor) -> Tensor:
        """The gradients (R, N) as students see them."""
        if self._input_noise is None:
            return grads
        if self._draws is None:
            raise ValueError("draws must be given for input_noise, not None")
        noisy = [
            self._input_noise.add(grad, self._draws("input", step, row))
            for row, grad in enumerate(grads)
        ]
        return torch.stack(noisy)

    def _draws_of(self, step: int, student: int) -> Callable[[int], torch.Generator | None]:
        """Where the noise of a student's rows comes from in a step."""
        first = student * self._episodes.optimizees
        return lambda row: None if self._draws is None else self._draws("policy", step, first + row)

    def _weights_at(self, step: int) -> Sequence[Sequence[Tensor]]:
        if self._noise is None:
            return self.weights
        pairs = zip(self.weights, self._noise(step), strict=True)
        return [torch._foreach_add(list(ours), list(noise)) for ours, noise in pairs]
