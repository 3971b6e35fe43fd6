"""Points of a window: where the students stand before a step, and which of them are kept.

The way back needs every step's point, the last one first. :class:`KeptPoints` keeps as many as
:mod:`amalgam.meta.memory` plans, and computes the others again from the nearest one before them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amalgam.meta.memory import Plan
from amalgam.meta.steps import PolicySteps


class Point(NamedTuple):
    """Where the students stand before a step.

    Attributes:
        params: Their parameters, shape (R, N).
        states: Their states, one a student.
    """

    params: Tensor
    states: tuple[Any, ...]


# A step and its point -> the point of the step after it.
Advance = Callable[[int, Point], Point]


class KeptPoints:
    """The points that a window keeps, and the memory that they lie in.

    Args:
        steps: The policy's steps, whose memory the states lie in.
        first: The point of step 0, which is always kept, as it is.
        cells: In which dtype the others hold the student's h and c (``Memory.cells``).
    """

    def __init__(self, steps: PolicySteps, first: Point, cells: str) -> None:
        self._steps = steps
        self._rounded = cells != "float32"
        self._kept: list[tuple[int, Point]] = [(0, first)]
        self._lent: list[tuple[Any, ...]] = []
        self._plan: Plan | None = None
        self._next = self._end = 0

    @property
    def first(self) -> Point:
        """The point of step 0."""
        return self._kept[0][1]

    def stored(self, point: Point) -> Point:
        """The point as it is kept: the same one, or a copy with h and c rounded."""
        return self._with_cells(point, torch.bfloat16)

    def follow(self, plan: Plan, steps: int) -> None:
        """Keep by a plan what :meth:`offer` is given in a window of so many steps."""
        self._plan, self._end = plan, steps
        self._next = self._step_to_keep(plan, 0, steps)

    def offer(self, step: int, point: Point) -> None:
        """Keep the step's point if the plan says so; without a plan none is kept."""
        if self._plan is not None and step == self._next:
            self._kept.append((step, self.stored(point)))
            self._next = self._step_to_keep(self._plan, step, self._end)

    def lend(self, states: tuple[Any, ...]) -> None:
        """Note states that somebody else holds, so that their memory is not used again."""
        self._lent.append(states)

    def is_free(self, point: Point) -> bool:
        """Whether nobody needs the point's states once its step is done."""
        held = (*self._lent, *(kept.states for _, kept in self._kept))
        return all(point.states[0] is not states[0] for states in held)

    def restore(self, step: int, advance: Advance) -> Point:
        """The step's point, from the last kept one on; keeps more on the way, by the plan.

        Args:
            step: The step, not before the last kept one.
            advance: Takes a step again.
        """
        assert self._plan is not None
        reached, kept = self._kept[-1]
        point = self._with_cells(kept, kept.params.dtype)
        while reached < step:
            goal = self._step_to_keep(self._plan, reached, step + 1)
            for again in range(reached, goal):
                point = advance(again, point)
            reached = goal
            if reached < step:
                self._kept.append((reached, self.stored(point)))
        return point

    def drop(self, step: int, point: Point) -> None:
        """Give back the memory of a point that :meth:`restore` made, and of the kept one."""
        if step and self._kept[-1][0] == step:
            _, kept = self._kept.pop()
            if kept is not point:
                self.release(kept)
        self.release(point)

    def release(self, point: Point) -> None:
        """Let the memory of a point be used again, unless somebody holds it."""
        if self.is_free(point):
            for state in point.states:
                self._steps.release(state)

    def _step_to_keep(self, plan: Plan, step: int, end: int) -> int:
        """The step whose point to keep after this one, where step end - 1 is to be reversed first.

        The point of step end - 1 is the one at hand when that step is reversed, so it takes no
        place among the kept ones.
        """
        free = plan.points - (len(self._kept) - 1)
        return min(step + plan.next_kept(end - step, free), end - 1) if free else end - 1

    def _with_cells(self, point: Point, cells: torch.dtype) -> Point:
        if not self._rounded:
            return point
        return Point(point.params, tuple(self._steps.stored(s, cells) for s in point.states))
