"""The steps of all students in one window, forward and backward.

:mod:`amalgam.meta.steps` takes the steps of one policy. Here several students (replicates or
particles) step side by side, each with weights of its own. Noise may be added to the weights, and
to the gradients that the students see, at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amalgam.meta.conditions import StepConditions
from amalgam.meta.episode import Episodes
from amalgam.meta.on_policy import Blend
from amalgam.meta.perturbation import InputNoise
from amalgam.meta.points import Point

# Called with a step's number; returns what is added to each student's weights in that step.
WeightNoise = Callable[[int], Sequence[Sequence[Tensor]]]

# Called with a purpose, a step's number and a row's; returns their generator in its initial state.
Draws = Callable[[str, int, int], torch.Generator]


@dataclass
class Adjoint:
    """Gradients of a window's loss on the backward pass, with respect to what a step begins from.

    Attributes:
        params: With respect to the students' parameters, shape (R, N).
        state: With respect to the students' state.
        weights: With respect to their weights, summed over the steps from there on, each with a
            first dimension of S.
    """

    params: Tensor
    state: Any
    weights: list[Tensor]


class StudentSteps:
    """Takes the steps of all students in one window.

    Args:
        episodes: The engine whose students they are.
        weights: The students' weights, outside any graph, each with a first dimension of S.
        noise: What is added to the weights at each step; ``None`` for nothing.
        draws: Returns generators for the policies' own noise and for ``input_noise``.
        input_noise: Standard deviation of the noise on the gradients that students see.
        conditions: Learning rates, weight decay and loss scales of the steps; ``None`` for none.
        blend: The teachers' part in the executed steps; ``None`` for none.
        raw: Where to keep the updates that policies finish, for the backward pass, shape (T, R, N);
            ``None`` where they finish none, or no meta-gradient is wanted.
    """

    def __init__(
        self,
        episodes: Episodes,
        weights: Sequence[Tensor],
        noise: WeightNoise | None,
        draws: Draws | None,
        input_noise: float,
        conditions: StepConditions | None = None,
        blend: Blend | None = None,
        raw: Tensor | None = None,
    ) -> None:
        self.weights = weights
        self.conditions = conditions
        self.blend = blend
        self.raw = raw
        self._episodes = episodes
        self._noise = noise
        self._draws = draws
        self._input_noise = InputNoise(input_noise) if input_noise else None

    @property
    def noisy(self) -> bool:
        """Whether each step adds noise to the weights or to the gradients."""
        return self._noise is not None or self._input_noise is not None

    def forward(
        self, step: int, point: Point, grads: Tensor, moved: Tensor | None, reuse: bool
    ) -> tuple[Point, Tensor]:
        """One step of all students, without a graph.

        Args:
            step: The step's number.
            point: Where the students stand.
            grads: Their gradients, shape (R, N).
            moved: Which rows move, shape (R,); the others stay where they stand. ``None`` means
                that all move.
            reuse: Whether the new state may overwrite the old one. It does so only if all rows
                move.

        Returns:
            The next point, and the students' updates, shape (R, N), 0 in rows that do not move.
            Rows with an unusable update are in the next point as it leaves them: the caller has to
            look.
        """
        if moved is not None:
            if not moved.any():
                return point, torch.zeros_like(point.params)
            moved = None if moved.all() else moved
        reuse = reuse and moved is None
        by_student = self._episodes.by_student
        updates, state = self._episodes.steps.forward(
            by_student(point.params),
            by_student(self._seen(step, grads)),
            point.state,
            self._weights_at(step),
            None if moved is None else by_student(moved),
            self._draws_of(step),
            self.left(step),
            reuse,
        )
        update = updates.flatten(0, 1)
        if self.raw is not None:
            self.raw[step] = update
        update = self._episodes.steps.finished(update)
        params = self._stepped(step, point.params, update)
        if moved is not None:
            params = torch.where(moved[:, None], params, point.params)
            update = torch.where(moved[:, None], update, 0)
        return Point(params, state), update

    def backward(
        self,
        step: int,
        point: Point,
        grads: Tensor,
        moved: Tensor | None,
        adjoint: Adjoint,
        d_imitation: Tensor | None = None,
    ) -> Tensor:
        """Back through one step, from its updates to states, weights and gradients.

        Args:
            step: The step's number.
            point: Where the students stood before it.
            grads: Their gradients there, shape (R, N).
            moved: Which rows moved, shape (R,); ``None`` means all.
            adjoint: The adjoint after the step; changed in place. ``state`` becomes that before
                the step, ``weights`` get the step's share added, and ``params`` lose what weight
                decay takes.
            d_imitation: The imitation losses' gradients with respect to the students' updates,
                shape (R, N), where they depend on these directly.

        Returns:
            The gradients with respect to ``grads``, shape (R, N).
        """
        episodes = self._episodes
        to_updates = self._back_to_updates(step, moved, adjoint)
        if d_imitation is not None:
            to_updates = to_updates + d_imitation
        if self.raw is not None:
            to_updates = episodes.steps.finished_backward(to_updates, self.raw[step])
        by_student = episodes.by_student
        d_grads, adjoint.state, d_weights = episodes.steps.backward(
            by_student(to_updates),
            adjoint.state,
            by_student(point.params),
            by_student(self._seen(step, grads)),
            point.state,
            self._weights_at(step),
            None if moved is None else by_student(moved),
            self._draws_of(step),
            self.left(step),
        )
        torch._foreach_add_(adjoint.weights, d_weights)
        return self.scaled(d_grads.flatten(0, 1))

    def _stepped(self, step: int, params: Tensor, update: Tensor) -> Tensor:
        """The parameters (R, N) after an update of all rows."""
        if self.blend is not None:
            update = self.blend.executed(step, update)
        if self.conditions is None:
            return params - update
        lr, kept = self.conditions.lr[step, :, None], self.conditions.kept[step, :, None]
        return params * kept - lr * update

    def _back_to_updates(self, step: int, moved: Tensor | None, adjoint: Adjoint) -> Tensor:
        """Back through :meth:`_stepped`: gradients with respect to the updates, shape (R, N).

        Those with respect to the parameters become what reaches them past the updates, in place.
        """
        if self.conditions is None:
            d_updates = -adjoint.params
        else:
            d_updates = -self.conditions.lr[step, :, None] * adjoint.params
            kept = self.conditions.kept[step]
            adjoint.params *= (kept if moved is None else torch.where(moved, kept, 1))[:, None]
        return d_updates if self.blend is None else self.blend.own * d_updates

    def left(self, step: int) -> Tensor | None:
        """What schedules have left of the rows' rates, shape (S, B); ``None`` where none is."""
        if self.conditions is None:
            return None
        return self._episodes.by_student(self.conditions.left[step])

    def scaled(self, grads: Tensor) -> Tensor:
        """Gradients (R, N) times the losses' scales; also gradients with respect to them."""
        return grads if self.conditions is None else grads * self.conditions.loss_scale[:, None]

    def _seen(self, step: int, grads: Tensor) -> Tensor:
        """The gradients (R, N) as students see them."""
        grads = self.scaled(grads)
        if self._input_noise is None:
            return grads
        if self._draws is None:
            raise ValueError("draws must be given for input_noise, not None")
        noisy = [
            self._input_noise.add(grad, self._draws("input", step, row))
            for row, grad in enumerate(grads)
        ]
        return torch.stack(noisy)

    def _draws_of(self, step: int) -> Callable[[int], torch.Generator | None]:
        """Returns the generator of a row's policy noise, by the row's number."""
        return lambda row: None if self._draws is None else self._draws("policy", step, row)

    def _weights_at(self, step: int) -> Sequence[Tensor]:
        if self._noise is None:
            return self.weights
        noise = of_students("noise(step)", self._noise(step), len(self._episodes.students))
        return torch._foreach_add(list(self.weights), noise)


def of_students(name: str, by_student: Sequence[Sequence[Tensor]], students: int) -> list[Tensor]:
    """Each student's tensors, a list a student, as copies with a first dimension of S.

    Args:
        name: What errors call the lists.
        by_student: The lists.
        students: S.

    Raises:
        ValueError: There is not one list for each student.
    """
    if len(by_student) != students:
        raise ValueError(
            f"{name} must hold {students} lists of tensors, one for each student, not "
            f"{len(by_student)}"
        )
    return [torch.stack(each) for each in zip(*by_student, strict=True)]
