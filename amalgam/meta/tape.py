"""The way back through a window, in memory that need not grow with its steps.

The forward run leaves a :class:`Tape`: of each step the students' gradients and the imitation
loss's slopes, and of some steps the point they began from. No graph is kept. Backward, by hand,
from the adjoints of parameters p and state s after step t to those before it::

    a_u = -(a_p + slopes of the imitation loss)              p_{t+1} = p_t - u_t
    a_g, a_s, a_w = student_step_backward(a_u, a_s)          u_t, s_{t+1} = student(g_t, s_t; w)
    a_p <- a_p + slope of the meta-loss g_t + H_t a_g        g_t = gradient at p_t, H_t its Jacobian

Where gradients count as constants (first order), H_t is left out. Then a_u is a sum over later
steps that the student does not enter, and :func:`amalgam.ops.student_unroll_backward` does the
rest coordinate by coordinate, without any point kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from amalgam import ops
from amalgam.meta.episode import Episodes, Trajectories
from amalgam.meta.points import KeptPoints, Point
from amalgam.meta.student_steps import Adjoint, StudentSteps
from amalgam.ops import StudentState
from amalgam.tasks import Batch

# Coordinates whose adjoints are made at once: few enough to be small beside the tape, many enough
# for all cores.
_LEAST_CHUNK, _MOST_CHUNK, _CHUNKS = 1024, 65536, 16


@dataclass
class Tape:
    """What a window's forward run leaves for its way back.

    Attributes:
        episodes: Whose window it is.
        begin: Where everybody stood before it.
        batches: One a step.
        steps: Steps the students.
        points: The points that are kept.
        by_steps: Whether the way back goes step by step, or coordinate by coordinate.
        grads: The students' gradients, shape (T, R, N); empty where nothing is recorded.
        slopes: The imitation terms' gradients in the parameters after each step, likewise; empty
            without teachers, too.
        moved: Which rows moved, shape (T, R).
        loss_slopes: The meta-loss's slopes in the students' losses, shape (T, R).
        graphs: Of some steps the leaf and the gradients in the graph of the optimizees' loss.
    """

    episodes: Episodes
    begin: Trajectories
    batches: Sequence[Batch]
    steps: StudentSteps
    points: KeptPoints
    by_steps: bool
    grads: Tensor
    slopes: Tensor
    moved: Tensor
    loss_slopes: Tensor
    graphs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def advance(self, step: int, point: Point) -> Point:
        """Take a recorded step again; the point's memory is used again unless somebody holds it."""
        reuse = self.points.is_free(point)
        after, _ = self.steps.forward(step, point, self.grads[step], self.moved[step], reuse)
        return after

    def backward(self, d_meta: Tensor, d_imitation: Tensor) -> list[Tensor]:
        """Gradients in all students' weights.

        Args:
            d_meta: Gradients in the students' meta-losses, shape (S,).
            d_imitation: Gradients in their imitation losses, shape (S,).
        """
        each = self.episodes.optimizees
        d_slopes = d_imitation.repeat_interleave(each) / (len(self.batches) * each)
        d_grads = self.loss_slopes * d_meta.repeat_interleave(each)
        back = self._back_by_steps if self.by_steps else self._back_by_coordinates
        return list(chain.from_iterable(back(d_slopes, d_grads)))

    def _back_by_coordinates(self, d_slopes: Tensor, d_grads: Tensor) -> list[list[Tensor]]:
        """First order: gradients in each student's weights.

        Args:
            d_slopes: What the imitation loss's slopes count, shape (R,).
            d_grads: What the students' gradients count, shape (T, R).
        """
        each, (_, n) = self.episodes.optimizees, self.begin.params.shape
        chunk = min(max(n // _CHUNKS, _LEAST_CHUNK), _MOST_CHUNK)
        found = []
        for student, weights in enumerate(self.steps.weights):
            total = [torch.zeros_like(w) for w in weights]
            for index in range(each):
                for first in range(0, n, chunk):
                    part = slice(first, min(n, first + chunk))
                    share = self._back_of_part(student, index, part, d_slopes, d_grads)
                    torch._foreach_add_(total, share)
            found.append(total)
        return found

    def _back_of_part(
        self, student: int, index: int, part: slice, d_slopes: Tensor, d_grads: Tensor
    ) -> list[Tensor]:
        """The share in a student's weights of some coordinates of one of its optimizees."""
        episodes, n = self.episodes, self.begin.params.shape[1]
        row = student * episodes.optimizees + index
        adjoints = self._update_adjoints(row, part, d_slopes[row], d_grads[:, row])
        grads, moved = self.grads[:, row, part], self.moved[:, row]
        if not moved.all():
            adjoints, grads = adjoints[moved], grads[moved]
        in_state = slice(index * n + part.start, index * n + part.stop)
        state = StudentState(
            *(tensor[..., in_state].contiguous() for tensor in self.begin.states[student])
        )
        share: list[Tensor] = ops.student_unroll_backward(
            grads,
            adjoints,
            state,
            self.steps.weights[student],
            episodes.students[0].config.settings,
            backend=episodes.amalgamation.backend,
        )
        return share

    def _update_adjoints(self, row: int, part: slice, d_slopes: Tensor, d_grads: Tensor) -> Tensor:
        """Gradients in the updates of a row's coordinates, shape (T, coordinates)."""
        grads = self.grads[:, row, part]
        if len(self.slopes):
            sums = -d_slopes * self.slopes[:, row, part]
        else:
            sums = torch.zeros_like(grads)
        sums[:-1].addcmul_(d_grads[1:, None], grads[1:], value=-1)
        for t in range(len(sums) - 2, -1, -1):
            sums[t] += sums[t + 1]
        return sums

    def _back_by_steps(self, d_slopes: Tensor, d_grads: Tensor) -> list[list[Tensor]]:
        """First or second order, the last step first; see :meth:`_back_by_coordinates`."""
        policy_steps = self.episodes.steps
        adjoint = Adjoint(
            torch.zeros_like(self.begin.params),
            [policy_steps.zeros(state) for state in self.begin.states],
            [[torch.zeros_like(w) for w in weights] for weights in self.steps.weights],
        )
        for step in range(len(self.batches) - 1, -1, -1):
            point = self.points.restore(step, self.advance)
            self._back_of_step(step, point, adjoint, d_slopes, d_grads[step])
            self.points.drop(step, point)
        for state in adjoint.states:
            policy_steps.release(state)
        return adjoint.weights

    def _back_of_step(
        self, step: int, point: Point, adjoint: Adjoint, d_slopes: Tensor, d_grads: Tensor
    ) -> None:
        """From the adjoints after a step to those before it, in place."""
        moved, grads = self.moved[step], self.grads[step]
        if len(self.slopes):
            adjoint.params += d_slopes[:, None] * self.slopes[step]
        d_seen = self.steps.backward(step, point, grads, moved, adjoint)
        adjoint.params += d_grads[:, None] * grads
        if self.episodes.amalgamation.second_order:
            curved = self._hessian_product(step, point, torch.where(moved[:, None], d_seen, 0))
            adjoint.params += torch.where(moved[:, None], curved, 0)

    def _hessian_product(self, step: int, point: Point, vector: Tensor) -> Tensor:
        """The gradients' Jacobian before a step, which is symmetric, times a vector (R, N)."""
        kept = self.graphs.pop(step, None)
        if kept is None:
            params, batch = point.params[:, None], self.batches[step]
            _, _, kept = self.episodes.gradients(params, self.begin.scale, batch, True)
        assert kept is not None
        leaf, grads = kept
        if not grads.requires_grad:  # a loss whose gradient is constant
            return torch.zeros_like(vector)
        (product,) = torch.autograd.grad(
            grads, leaf, vector[:, None], allow_unused=True, materialize_grads=True
        )
        return product[:, 0]
