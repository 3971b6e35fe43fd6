"""The backward pass through a window, in memory that need not grow with the window's steps.

The forward run leaves a :class:`Tape`. The tape holds, for each step, the students' gradients and
the gradient of the imitation loss, and for some steps the point that the step began from. The
students' steps leave no graph.

The adjoint a_x is the gradient of the window's loss with respect to x. Here p are the parameters,
s is the student's state, u is its update, g is the optimizee's gradient and w are the student's
weights. Step t computes::

    g_t = gradient of the optimizee's loss l_t at p_t
    u_t, s_{t+1} = student(g_t, s_t; w)
    p_{t+1} = p_t - u_t

The backward pass knows a_p and a_s after step t, and computes them before it (``*`` is a product)::

    a_p = a_p + d(imitation loss)/d(p_{t+1})
    a_u = -a_p
    a_g, a_s, share of a_w = student_step_backward(a_u, a_s)
    a_p = a_p + d(meta-loss)/d(l_t) * g_t + H_t @ a_g

Where the meta-loss is taken on held-out samples, the gradient of their loss at p_t stands in the
place of g_t in the last line.

With :class:`amalgam.meta.conditions.StepConditions` the student sees c g_t, where c is the loss's
scale, and p_{t+1} = k_t p_t - lr_t u_t. Then a_u = -lr_t a_p, a_g gets the factor c, and a_p gets
the factor k_t before the last line.

On-policy (:mod:`amalgam.meta.on_policy`) the imitation loss depends on u_t directly, and the
executed step is (1 - fade) u_t and a constant. Then the first line above falls away, and a_u gets
the factor 1 - fade and d(imitation loss)/d(u_t) added.

A student with ``orthogonal`` orthogonalises what :func:`amalgam.ops.student_step` gives. The tape
keeps that, and a_u goes back through :mod:`amalgam.operations.orthogonal` before all else.

H_t is the Jacobian of g_t with respect to p_t, that is the Hessian of l_t; ``H_t @ a_g`` is its
product with the vector a_g. First-order meta-gradients count g_t as a constant and leave out this
product. Then a_u is a sum over the later steps that does not depend on the student, and
:func:`amalgam.ops.student_unroll_backward` does the rest coordinate by coordinate. It needs no kept
points; :attr:`Tape.by_steps` says when this is not possible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from amalgam import ops
from amalgam.meta.episode import Episodes, Trajectories
from amalgam.meta.points import KeptPoints, Point
from amalgam.meta.student_steps import Adjoint, StudentSteps
from amalgam.operations.student_forms import tensors_of_part
from amalgam.ops import StudentState
from amalgam.policies.fused_student import FusedStudent, TensorContext
from amalgam.tasks import Batch

# Coordinates whose adjoints are made at once: few enough to be small beside the tape, many enough
# for all cores.
_LEAST_CHUNK, _MOST_CHUNK, _CHUNKS = 1024, 65536, 16


@dataclass
class Tape:
    """What a window's forward run leaves for its backward pass.

    Attributes:
        episodes: The engine that runs the window.
        begin: Where students and teachers stood before the window.
        batches: One batch per step.
        steps: Takes the students' steps, forward and backward.
        points: The points that are kept.
        by_steps: Whether the backward pass goes step by step from point to point. It does for
            second-order meta-gradients, for noise that is drawn at every step on the weights or
            the input, and for policies without ``PolicySteps.by_coordinates``. Otherwise it goes
            coordinate by coordinate and needs no points.
        grads: The students' gradients, shape (T, R, N). Empty where no meta-gradient is wanted.
        loss_grads: The gradients of the losses that the meta-loss takes, shape (T, R, N): ``grads``
            itself unless these are losses of held-out samples. Where it takes the final one of
            those alone, they are the last step's, shape (1, R, N).
        slopes: The gradient of each imitation term with respect to the parameters after the step,
            shape (T, R, N); on-policy with respect to the step's update. Empty without teachers,
            and where no meta-gradient is wanted.
        moved: Which rows took each step, shape (T, R); ``None`` where it is known without a look
            that all took all.
        loss_slopes: The derivatives of the meta-losses with respect to the losses that they take,
            shape (T, R).
        contexts: What students were told of all rows' tensors in each step, T; empty where the
            backward pass goes by steps.
        graphs: For some steps, what :meth:`amalgam.meta.episode.Episodes.gradients` returns for
            second order: the leaf, and the gradients in their graph.
    """

    episodes: Episodes
    begin: Trajectories
    batches: Sequence[Batch]
    steps: StudentSteps
    points: KeptPoints
    by_steps: bool
    grads: Tensor
    loss_grads: Tensor
    slopes: Tensor
    moved: Tensor | None
    loss_slopes: Tensor
    contexts: list[TensorContext] = field(default_factory=list)
    graphs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def advance(self, step: int, point: Point) -> Point:
        """Take a recorded step again, in the point's own memory unless that is still needed."""
        reuse = self.points.is_free(point)
        after, _ = self.steps.forward(step, point, self.grads[step], self._moved(step), reuse)
        return after

    def _moved(self, step: int) -> Tensor | None:
        """Which rows took a step, shape (R,); ``None`` where it is known that all did."""
        return None if self.moved is None else self.moved[step]

    def backward(self, d_meta: Tensor, d_imitation: Tensor) -> list[Tensor]:
        """Gradients with respect to all students' weights, one student's after another's.

        Args:
            d_meta: Gradients with respect to the students' meta-losses, shape (S,).
            d_imitation: Gradients with respect to their imitation losses, shape (S,).
        """
        each = self.episodes.optimizees
        d_slopes = d_imitation.repeat_interleave(each) / (len(self.batches) * each)
        d_grads = self.loss_slopes * d_meta.repeat_interleave(each)
        back = self._back_by_steps if self.by_steps else self._back_by_coordinates
        by_weight = (found.unbind() for found in back(d_slopes, d_grads))
        return list(chain.from_iterable(zip(*by_weight, strict=True)))

    def _back_by_coordinates(self, d_slopes: Tensor, d_grads: Tensor) -> list[Tensor]:
        """First order: gradients with respect to the students' weights.

        Args:
            d_slopes: The factor on ``slopes`` in the adjoints, shape (R,).
            d_grads: The factor on the gradients of the meta-loss's losses, shape (T, R).
        """
        each, (_, n) = self.episodes.optimizees, self.begin.params.shape
        chunk = min(max(n // _CHUNKS, _LEAST_CHUNK), _MOST_CHUNK)
        found, steps = [torch.zeros_like(w) for w in self.steps.weights], len(self.batches)
        for student in range(len(self.episodes.students)):
            total = [of_weight[student] for of_weight in found]
            for index in range(each):
                row = student * each + index
                if not steps or not (self.moved is None or self.moved[:, row].any()):
                    continue
                adjoints = partial(self._update_adjoints, row, d_slopes[row], d_grads[:, row])
                if self.steps.raw is not None:  # matrices are orthogonalised whole
                    back = self.episodes.steps.finished_backward
                    whole = back(adjoints(slice(0, n)), self.steps.raw[:, row])
                    adjoints = partial(_columns, whole)
                for first in range(0, n, chunk):
                    part = slice(first, min(n, first + chunk))
                    share = self._back_of_part(student, index, part, adjoints(part))
                    torch._foreach_add_(total, share)
        return found

    def _back_of_part(
        self, student: int, index: int, part: slice, adjoints: Tensor
    ) -> list[Tensor]:
        """What some coordinates of one optimizee add to the gradients of its student's weights.

        Args:
            student: The student.
            index: The optimizee, of the student's.
            part: The coordinates.
            adjoints: The gradients with respect to their updates, shape (T, coordinates).
        """
        episodes, n = self.episodes, self.begin.params.shape[1]
        row = student * episodes.optimizees + index
        grads = self.grads[:, row, part]
        moved = None if self.moved is None else self.moved[:, row]
        conditions = self.steps.conditions
        if conditions is not None:
            grads = grads * conditions.loss_scale[row]
        if moved is not None and not moved.all():
            adjoints, grads = adjoints[moved], grads[moved]
        in_state = slice(index * n + part.start, index * n + part.stop)
        policy = episodes.students[0]
        assert isinstance(policy, FusedStudent)
        state = StudentState(
            *(tensor[student, ..., in_state].contiguous() for tensor in self.begin.state[:4])
        )
        context = self._context_of_part(row, part, moved)
        own = [weight[student] for weight in self.steps.weights]
        weights, settings = policy.folded(own, context)
        found = ops.student_unroll_backward(
            grads, adjoints, state, weights, settings, backend=episodes.amalgamation.backend
        )
        if context is not None:  # one bias a step and tensor
            found[2] = found[2].flatten(0, 1)
            context = context._replace(inputs=context.inputs.flatten(0, 1))
        return policy.unfolded(found, context)

    def _context_of_part(self, row: int, part: slice, moved: Tensor | None) -> TensorContext | None:
        """What a row's student was told in the steps that it took, of some coordinates' tensors."""
        taken = self.contexts
        if not taken:
            return None
        if moved is not None:
            taken = [context for context, ok in zip(taken, moved.tolist(), strict=True) if ok]
        tensors = len(taken[0].sizes) // len(self.begin.params)
        among, inside = tensors_of_part(taken[0].sizes[:tensors], part)
        own = slice(row * tensors + among.start, row * tensors + among.stop)
        inputs, corrections = (
            torch.stack([getattr(context, name)[own] for context in taken])
            for name in ("inputs", "corrections")
        )
        return TensorContext(inputs, corrections, inside)

    def _update_adjoints(self, row: int, d_slopes: Tensor, d_grads: Tensor, part: slice) -> Tensor:
        """Gradients with respect to the updates of a row's coordinates, shape (T, coordinates)."""
        on_policy = self.episodes.on_policy is not None
        if len(self.slopes) and not on_policy:
            sums = -d_slopes * self.slopes[:, row, part]
        else:
            sums = torch.zeros_like(self.grads[:, row, part])
        # What step 0 begins from is constant.
        losses = self.loss_grads[max(1 + len(self.loss_grads) - len(sums), 0) :, row, part]
        first = len(sums) - len(losses)
        sums[first - 1 : -1].addcmul_(d_grads[first:, None], losses, value=-1)
        conditions, blend = self.steps.conditions, self.steps.blend
        if conditions is None:
            for t in range(len(sums) - 2, -1, -1):
                sums[t] += sums[t + 1]
        else:
            kept = conditions.kept[:, row]
            if self.moved is not None:
                kept = torch.where(self.moved[:, row], kept, 1)
            for t in range(len(sums) - 2, -1, -1):
                sums[t].addcmul_(sums[t + 1], kept[t + 1])
            sums.mul_(conditions.lr[:, row, None])
        if blend is not None:
            sums.mul_(blend.own)
        return sums.add_(d_slopes * self.slopes[:, row, part]) if on_policy else sums

    def _back_by_steps(self, d_slopes: Tensor, d_grads: Tensor) -> list[Tensor]:
        """First or second order, the last step first; see :meth:`_back_by_coordinates`."""
        policy_steps = self.episodes.steps
        adjoint = Adjoint(
            torch.zeros_like(self.begin.params),
            policy_steps.zeros(self.begin.state),
            [torch.zeros_like(w) for w in self.steps.weights],
        )
        for step in range(len(self.batches) - 1, -1, -1):
            point = self.points.restore(step, self.advance)
            self._back_of_step(step, point, adjoint, d_slopes, d_grads[step])
            self.points.drop(step, point)
        policy_steps.release(adjoint.state)
        return adjoint.weights

    def _back_of_step(
        self, step: int, point: Point, adjoint: Adjoint, d_slopes: Tensor, d_grads: Tensor
    ) -> None:
        """Turn the adjoints after a step into those before it, in place."""
        moved, grads = self._moved(step), self.grads[step]
        d_imitation = d_slopes[:, None] * self.slopes[step] if len(self.slopes) else None
        if d_imitation is not None and self.episodes.on_policy is None:
            adjoint.params += d_imitation
            d_imitation = None
        d_seen = self.steps.backward(step, point, grads, moved, adjoint, d_imitation)
        of_loss = step - len(self.batches) + len(self.loss_grads)
        if of_loss >= 0:
            adjoint.params += d_grads[:, None] * self.loss_grads[of_loss]
        if self.episodes.amalgamation.second_order:
            curved = self._hessian_product(step, point, _where(moved, d_seen))
            adjoint.params += _where(moved, curved)

    def _hessian_product(self, step: int, point: Point, vector: Tensor) -> Tensor:
        """The product of each row's Hessian before a step and a vector (R, N)."""
        kept = self.graphs.pop(step, None)
        if kept is None:
            params, batch = point.params[:, None], self.batches[step]
            _, _, kept = self.episodes.gradients(params, self.begin.scale, batch, True)
        assert kept is not None
        leaf, grads = kept
        if not grads.requires_grad:  # a loss whose gradient is constant
            return torch.zeros_like(vector)
        with self.episodes.task.drawing(self.batches[step]):
            (product,) = torch.autograd.grad(
                grads, leaf, vector[:, None], allow_unused=True, materialize_grads=True
            )
        return product[:, 0]


def _where(moved: Tensor | None, rows: Tensor) -> Tensor:
    """The rows (R, N) that moved, and zeros for the others."""
    return rows if moved is None else torch.where(moved[:, None], rows, 0)


def _columns(rows: Tensor, part: slice) -> Tensor:
    return rows[:, part]
