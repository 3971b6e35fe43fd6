"""Points of a window: where the students stand before a step, and which of them are kept.

The backward pass needs the point of every step, the last step's first. :class:`KeptPoints` keeps as
many as :mod:`amalgam.meta.memory` plans. It computes each other point again from the nearest kept
one before it.
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
        state: Their state, as :class:`amalgam.meta.steps.PolicySteps` has it.
    """

    params: Tensor
    state: Any


# Called with a step's number and its point; returns the point of the next step.
Advance = Callable[[int, Point], Point]


class KeptPoints:
    """The points that a window keeps, and the memory of their states.

    It is called in this order. Forward: :meth:`follow` once, if points are needed at all; then
    :meth:`offer` with each step's point, and :meth:`hold` with the state that the window gives to
    its caller. Backward, for each step from the last to the first: :meth:`restore`, then
    :meth:`drop` with the point that it returned. :meth:`is_free` says at any time whether a step
    may overwrite the point that it begins from.

    Args:
        steps: The policy's steps, which get the memory of released states for later ones.
        first: The point of step 0, which is always kept, unrounded.
        cells: The dtype of the recurrent state (h and c) in all other kept points; see
            :class:`amalgam.meta.Memory`.
    """

    def __init__(self, steps: PolicySteps, first: Point, cells: str) -> None:
        self._steps = steps
        self._rounded = cells != "float32"
        self._kept: list[tuple[int, Point]] = [(0, first)]
        self._held: list[Any] = []
        self._plan: Plan | None = None
        self._next = self._end = 0

    @property
    def first(self) -> Point:
        """The point of step 0."""
        return self._kept[0][1]

    def stored(self, point: Point) -> Point:
        """The point as it is to be kept: itself, or a copy with h and c in bfloat16."""
        return self._with_cells(point, torch.bfloat16)

    def follow(self, plan: Plan, steps: int) -> None:
        """From now on let :meth:`offer` keep points by a plan.

        Args:
            plan: The plan.
            steps: Steps of the window.
        """
        self._plan, self._end = plan, steps
        self._next = self._step_to_keep(plan, 0, steps)

    def offer(self, step: int, point: Point) -> None:
        """Keep a step's point if the plan says so; without a plan none is kept."""
        if self._plan is not None and step == self._next:
            self._kept.append((step, self.stored(point)))
            self._next = self._step_to_keep(self._plan, step, self._end)

    def hold(self, state: Any) -> None:
        """Never reuse the memory of this state, because somebody else refers to it."""
        self._held.append(state)

    def is_free(self, point: Point) -> bool:
        """Whether the memory of the point's state may be reused once its step is done.

        It may unless the point is kept or its state is held.
        """
        held = (*self._held, *(kept.state for _, kept in self._kept))
        return all(point.state is not state for state in held)

    def restore(self, step: int, advance: Advance) -> Point:
        """A step's point: the last kept one, or computed again from it.

        On the way from the last kept point to the step it keeps further points, by the plan.

        Args:
            step: The step, not before the last kept point's.
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
        """Release a point that :meth:`restore` returned, and keep it no longer (but step 0's)."""
        if step and self._kept[-1][0] == step:
            _, kept = self._kept.pop()
            if kept is not point:
                self.release(kept)
        self.release(point)

    def release(self, point: Point) -> None:
        """Let later states use the memory of a point's, unless it is not free."""
        if self.is_free(point):
            self._steps.release(point.state)

    def _step_to_keep(self, plan: Plan, step: int, end: int) -> int:
        """The step whose point to keep next, after this one's.

        Of the steps before ``end``, the last is reversed first. Its point is at hand then, so it
        needs no place among the kept ones.
        """
        free = plan.points - (len(self._kept) - 1)
        return min(step + plan.next_kept(end - step, free), end - 1) if free else end - 1

    def _with_cells(self, point: Point, cells: torch.dtype) -> Point:
        if not self._rounded:
            return point
        return Point(point.params, self._steps.stored(point.state, cells))
