"""Unrolls: the student and its teachers train the same optimizee side by side.

An *episode* begins with one random optimizee, given to all, and a warm-up by SGD; then come
*windows* of steps through which the meta-gradient flows, parameters and states carried from
window to window as constants. Source: Optimizer Amalgamation (ICLR 2022), sections 3.2 and 3.3, in
the form of the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from amalgam import ops
from amalgam.ops import StudentState
from amalgam.policies import Pool, PoolState, Student
from amalgam.tasks import Batch, Task

MECHANISMS = ("mean", "min-max")


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
        huber_delta: Where given, parameter differences beyond it count linearly.
        eps: Added inside logs, and to divisors.
        backend: Computes the student's and the teachers' operations.
    """

    mechanism: Literal["mean", "min-max"] = "min-max"
    second_order: bool = True
    scale_spread: float = 3.0
    scale_teachers: bool = False
    log_objective: bool = True
    huber_delta: float | None = None
    eps: float = 1e-10
    backend: str = "auto"

    def __post_init__(self) -> None:
        """Refuse what can't be computed."""
        if self.mechanism not in MECHANISMS:
            raise ValueError(f"mechanism must be one of {MECHANISMS}, not {self.mechanism!r}")
        if not self.scale_spread >= 0:
            raise ValueError(f"scale_spread must be 0 or more, not {self.scale_spread}")
        if self.huber_delta is not None and not self.huber_delta > 0:
            raise ValueError(f"huber_delta must be positive, not {self.huber_delta}")
        if not self.eps > 0:
            raise ValueError(f"eps must be positive, not {self.eps}")
        ops.check_backend(self.backend)


class Trajectories(NamedTuple):
    """Where everybody stands in an episode, for N coordinates and K teachers.

    Attributes:
        scale: The episode's scaling s, shape (N,); all parameters here are p / s.
        params: The student's parameters, shape (N,).
        state: The student's state.
        teacher_params: The teachers' parameters, shape (K, N).
        teacher_state: The teachers' state.
    """

    scale: Tensor
    params: Tensor
    state: StudentState
    teacher_params: Tensor
    teacher_state: PoolState


@dataclass(frozen=True)
class Window:
    """What one window of T steps gave.

    Attributes:
        meta_loss: Mean log improvement of the loss over the window's start, a scalar in the graph.
        imitation_loss: Mean reduced distance to the teachers, a scalar in the graph.
        end: Where everybody stands after it, outside the graph.
        losses: Losses before each step, shape (T, 1 + K), the student's first.
        distances: Log distances to the teachers after each step, shape (T, K).
        skipped: Steps that a non-finite value made each trajectory skip, shape (1 + K,), the
            student's first.
    """

    meta_loss: Tensor
    imitation_loss: Tensor
    end: Trajectories
    losses: Tensor
    distances: Tensor
    skipped: Tensor


class Unroll:
    """Runs episodes of one task, student and pool.

    Args:
        task: The optimizee and its data.
        student: The learned optimizer; its configuration says how warm-up runs.
        pool: The teachers; may be empty.
        amalgamation: How the student is held to both.
    """

    def __init__(
        self, task: Task, student: Student, pool: Pool, amalgamation: Amalgamation
    ) -> None:
        self.task = task
        self.student = student
        self.pool = pool
        self.amalgamation = amalgamation

    def begin(self, generator: torch.Generator) -> Trajectories:
        """A new episode: one random optimizee for all, zero states, a fresh scaling."""
        params = self.task.init_params(generator)
        spread = self.amalgamation.scale_spread
        uniform = torch.rand(params.shape, generator=generator, dtype=params.dtype)
        return self.start_from(params, ((2 * uniform - 1) * spread).exp())

    def start_from(self, params: Tensor, scale: Tensor) -> Trajectories:
        """An episode from given parameters (N,), not yet scaled, and their scaling (N,)."""
        params = params / scale
        with torch.no_grad():
            return Trajectories(
                scale,
                params,
                self.student.initial_state(params),
                params.expand(len(self.pool), -1).clone(),
                self.pool.initial_state(params),
            )

    def warm_up(self, begin: Trajectories, batches: Iterable[Batch]) -> Trajectories:
        """SGD at the student's warm-up rate; every policy sees the gradients, none acts.

        The LSTM waits, moments move; afterwards all go on from the same parameters.
        """
        scale, params, state, _, teacher_state = begin
        for batch in batches:
            _, grad = self._gradient(params, scale, batch)
            with torch.no_grad():
                if not _usable(grad):
                    continue
                params = params - self.student.config.warmup_lr * grad
                state = self.student.warm_up(grad, state)
                teacher_grads = self._to_teachers(grad, scale).expand(len(self.pool), -1)
                teacher_state = self.pool.warm_up(
                    teacher_grads, teacher_state, backend=self.amalgamation.backend
                )
        teacher_params = params.expand(len(self.pool), -1).clone()
        return Trajectories(scale, params, state, teacher_params, teacher_state)

    def window(
        self,
        begin: Trajectories,
        batches: Sequence[Batch],
        weights: Sequence[Tensor] | None = None,
    ) -> Window:
        """Everybody takes a step on each batch; the losses' graph reaches the student's weights.

        A step whose gradient or update is not finite leaves that trajectory and its state as they
        were and is counted; its loss, which has no usable gradient, is left out of the meta-loss.

        Args:
            begin: Where everybody stands; not changed.
            batches: One a step.
            weights: Weights to use in place of the student's own.
        """
        how, scale, count = self.amalgamation, begin.scale, len(batches)
        params = begin.params.detach().requires_grad_()
        state, teacher_params, teacher_state = (
            begin.state,
            begin.teacher_params,
            begin.teacher_state,
        )
        meta_loss = imitation_loss = params.new_zeros(())
        losses, distances = [], []
        skipped = torch.zeros(1 + len(self.pool), dtype=torch.long)

        for batch in batches:
            loss, grad = self._gradient(params, scale, batch, how.second_order)
            moved = False
            if loss.isfinite() and _usable(grad):
                meta_loss = meta_loss + self._improvement(loss, begin, batch) / count
                update, new_state = self.student.step(grad, state, weights, backend=how.backend)
                if _usable(update):
                    params, state, moved = params - update, new_state, True
            skipped[0] += not moved

            teacher_losses, teacher_params, teacher_state, ok = self._teachers_step(
                teacher_params, teacher_state, scale, batch
            )
            skipped[1:] += ~ok
            losses.append(torch.cat((loss.detach()[None], teacher_losses)))

            distance = ops.teacher_distance(
                params,
                teacher_params,
                eps=how.eps,
                huber_delta=how.huber_delta,
                backend=how.backend,
            )
            distances.append(distance.detach())
            if len(self.pool):
                reduced = distance.mean() if how.mechanism == "mean" else distance.max()
                imitation = reduced if how.log_objective else reduced.exp()
                imitation_loss = imitation_loss + imitation / count

        end = Trajectories(
            scale,
            params.detach(),
            StudentState(*(t.detach() for t in state)),
            teacher_params,
            teacher_state,
        )
        return Window(
            meta_loss, imitation_loss, end, torch.stack(losses), torch.stack(distances), skipped
        )

    def _gradient(
        self, params: Tensor, scale: Tensor, batch: Batch, create_graph: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The loss and its gradient in the scaled parameters.

        Without ``create_graph`` the loss comes back linearised: same value, same gradient in
        ``params``, but nothing of the optimizee's graph kept.
        """
        leaf = params if create_graph else params.detach().requires_grad_()
        loss = self.task.objective(leaf * scale, batch)
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=create_graph)
        if not create_graph:
            loss = loss.detach()
            if params.requires_grad:
                loss = loss + (grad * (params - params.detach())).sum()
        return loss, grad

    def _improvement(self, loss: Tensor, begin: Trajectories, batch: Batch) -> Tensor:
        """The meta-loss's term: log loss less that of the window's first parameters (eq. 3.2)."""
        eps = self.amalgamation.eps
        with torch.no_grad():
            start = self.task.objective(begin.params * begin.scale, batch)
        if self.amalgamation.log_objective:
            return (loss + eps).log() - (start + eps).log()
        return loss / (start + eps)

    def _to_teachers(self, grad: Tensor, scale: Tensor) -> Tensor:
        """A gradient in scaled parameters as the teachers are to see it."""
        return grad if self.amalgamation.scale_teachers else grad / scale

    def _teachers_step(
        self, params: Tensor, state: PoolState, scale: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor, PoolState, Tensor]:
        """All teachers' losses (K,), new parameters and state, and who did step (K,)."""
        if not len(self.pool):
            return params.new_empty(0), params, state, torch.ones(0, dtype=torch.bool)
        pairs = [self._gradient(teacher, scale, batch) for teacher in params]
        grads = self._to_teachers(torch.stack([grad for _, grad in pairs]), scale)
        with torch.no_grad():
            updates, new_state = self.pool.step(grads, state, backend=self.amalgamation.backend)
            if not self.amalgamation.scale_teachers:
                updates = updates / scale
            ok = _usable(grads) & _usable(updates)
            if not ok.all():
                updates = torch.where(ok[:, None], updates, 0)
                new_state = PoolState(
                    *(
                        torch.where(ok[:, None], new, old)
                        for new, old in zip(new_state, state, strict=True)
                    )
                )
            losses = torch.stack([loss for loss, _ in pairs])
            return losses, params - updates, new_state, ok.cpu()


def _usable(values: Tensor) -> Tensor:
    """Whether all values along the last dimension are finite and have finite squares."""
    if not values.shape[-1]:
        return torch.ones(values.shape[:-1], dtype=torch.bool)
    return values.detach().abs().amax(-1) < math.sqrt(torch.finfo(values.dtype).max)
