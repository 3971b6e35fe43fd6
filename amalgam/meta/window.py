"""A recorded window, and the meta-gradient back through it in memory that does not grow with it.

Forward, no graph is kept: of each step its gradients and the imitation loss's slopes, and of some
steps the point they began from (:mod:`amalgam.meta.memory`). Backward, by hand, from the adjoints
of parameters p and state s after step t to those before it::

    a_u = -(a_p + slopes of the imitation loss)              p_{t+1} = p_t - u_t
    a_g, a_s, a_w = student_step_backward(a_u, a_s)          u_t, s_{t+1} = student(g_t, s_t; w)
    a_p <- a_p + slope of the meta-loss g_t + H_t a_g        g_t = gradient at p_t, H_t its Jacobian

Where gradients count as constants (first order), H_t is left out; a_u is then a sum over later
steps that the student does not enter, and :func:`amalgam.ops.student_unroll_backward` does the
rest coordinate by coordinate, without any point kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amalgam import ops
from amalgam.meta.episode import Rows, Trajectories
from amalgam.meta.finite import usable
from amalgam.meta.memory import Plan, plan
from amalgam.meta.perturbation import InputNoise
from amalgam.meta.steps import FusedSteps
from amalgam.operations import registry
from amalgam.ops import StudentState
from amalgam.tasks import Batch

# Coordinates whose adjoints are made at once: few enough to be small beside the record, many enough
# for all cores.
_LEAST_CHUNK, _MOST_CHUNK, _CHUNKS = 1024, 65536, 16

# A step -> what is added to each student's weights there.
Noise = Callable[[int], Sequence[Sequence[Tensor]]]

# A purpose, a step, a row -> random numbers for it, anew at every call.
Draws = Callable[[str, int, int], torch.Generator]


class Point(NamedTuple):
    """Where the students stand before a step."""

    params: Tensor
    states: tuple[Any, ...]


def through(recording: Recording, weights: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """The recording's meta-loss and imitation loss, (S,) each, in the weights' graph."""
    if not recording.recorded:
        return recording.meta_loss, recording.imitation_loss
    losses: tuple[Tensor, Tensor] = _Through.apply(recording, *chain.from_iterable(weights))
    return losses


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: Recording, *weights: Tensor) -> tuple[Tensor, Tensor]:
        ctx.recording = recording
        return recording.meta_loss.clone(), recording.imitation_loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_meta: Tensor, d_imitation: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.recording.backward(d_meta, d_imitation)


class Recording:
    """Runs a window and keeps what its way back needs.

    Args:
        unroll: Whose window it is.
        begin: Where everybody stands.
        batches: One a step.
        weights: Each student's weights.
        noise: Added to them at each step.
        draws: Where the policies' own noise and the input's comes from.
        input_noise: Standard deviation of the noise on what students see.
    """

    def __init__(
        self,
        unroll: Rows,
        begin: Trajectories,
        batches: Sequence[Batch],
        weights: Sequence[Sequence[Tensor]],
        noise: Noise | None,
        draws: Draws | None,
        input_noise: float,
    ) -> None:
        self.unroll = unroll
        self.begin = begin
        self.batches = batches
        self.how = unroll.amalgamation
        self.recorded = torch.is_grad_enabled() and any(
            w.requires_grad for w in chain.from_iterable(weights)
        )
        self._weights = [[w.detach() for w in of] for of in weights]
        self._noise = noise
        self._draws = draws
        self._input_noise = InputNoise(input_noise) if input_noise else None
        fused = isinstance(unroll.steps, FusedSteps)
        self._by_steps = self.recorded and (
            self.how.second_order or noise is not None or input_noise > 0 or not fused
        )
        self._kept: list[tuple[int, Point]] = []
        self._graphs: dict[int, tuple[Tensor, Tensor]] = {}
        with torch.no_grad():
            self._run()

    # ---- forward

    def _run(self) -> None:
        unroll, begin, steps = self.unroll, self.begin, len(self.batches)
        rows, n = begin.params.shape
        teachers, state = begin.teacher_params, begin.teacher_state
        k = len(teachers)
        like = begin.params
        self._grads = like.new_empty((steps if self.recorded else 0, rows, n))
        self._slopes = like.new_empty((steps if self.recorded and k else 0, rows, n))
        # Made whole: small tensors made one by one would keep the heap between them from shrinking.
        self.losses = like.new_empty((steps, rows, 1 + k))
        self.distances = like.new_empty((steps, rows, k))
        self._moved = torch.zeros((steps, rows), dtype=torch.bool, device=like.device)
        counted, reduced = torch.zeros_like(self._moved), like.new_empty((steps, rows))
        skipped = torch.zeros((rows, 1 + k), dtype=torch.long, device=like.device)

        point = Point(begin.params, begin.states)
        self._kept = [(0, point)]
        if self._by_steps and steps:
            self._plan = self._make_plan()
            self._next = self._next_kept(0, steps)
        for t, batch in enumerate(self.batches):
            loss, grad, teacher_losses, teacher_grads = self._gradients(t, point, teachers, batch)
            ok = loss.isfinite() & usable(grad)
            counted[t] = ok
            grad = torch.where(ok[:, None], grad, 0)
            if self.recorded:
                self._grads[t] = grad
            point, moved = self._step(t, point, grad, ok)
            self._moved[t] = moved
            skipped[:, 0] += ~moved
            self._keep(t + 1, point)

            if k:
                teachers, state, teachers_ok = unroll.teachers_step(
                    teachers, state, teacher_grads, begin.scale
                )
                skipped[:, 1:] += ~teachers_ok.T
            self.losses[t, :, :1], self.losses[t, :, 1:] = loss[:, None], teacher_losses
            self.distances[t], reduced[t] = self._distances(t, point.params, teachers)
        self.skipped = skipped
        self.end = begin._replace(
            params=point.params,
            states=point.states,
            teacher_params=teachers,
            teacher_state=state,
        )
        self._sum_up(counted, reduced)

    def _gradients(
        self, t: int, point: Point, teachers: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Losses (R,) and gradients (R, N) of the students, (R, K) and (K, R, N) of teachers."""
        unroll, scale, k = self.unroll, self.begin.scale, len(teachers)
        student, of_teachers = point.params[:, None], teachers.transpose(0, 1)
        curved = self._by_steps and self.how.second_order
        graph = curved and t >= len(self.batches) - self._plan.graphs
        # At an episode's first step all stand where the student does.
        together = t == 0 and k > 0 and bool((of_teachers == student).all())
        # With others the student's bits would be others than when its graph is built again.
        if curved or together or not k or unroll.shared:
            loss, grad, kept = unroll.gradients(student, scale, batch, graph)
            if kept is not None:
                self._graphs[t] = kept
            if together:
                own = slice(unroll.teacher_rows)
                shared = grad[own].expand(-1, k, -1).transpose(0, 1)
                return loss[:, 0], grad[:, 0], loss[own].expand(-1, k), shared
            if not k:
                return loss[:, 0], grad[:, 0], loss[:, :0], grad[:, :0].transpose(0, 1)
            own = slice(unroll.teacher_rows)
            batch = tuple(tensor[own] for tensor in batch)
            losses, grads, _ = unroll.gradients(of_teachers, scale[own], batch)
            return loss[:, 0], grad[:, 0], losses, grads.transpose(0, 1)
        losses, grads, _ = unroll.gradients(torch.cat((student, of_teachers), 1), scale, batch)
        return losses[:, 0], grads[:, 0], losses[:, 1:], grads[:, 1:].transpose(0, 1)

    def _step(self, t: int, point: Point, grad: Tensor, ok: Tensor) -> tuple[Point, Tensor]:
        """The students' step t, and which rows took it (R,)."""
        after, updates_ok = self._advance(t, point, grad, ok)
        moved = ok & updates_ok
        if not torch.equal(moved, ok):
            # Known only after the step, which may have been taken in place: again, up to here.
            point = self._replayed(t) if self.recorded else point
            after, _ = self._advance(t, point, grad, moved)
        return after, moved

    def _replayed(self, t: int) -> Point:
        """The point before step t, from the first."""
        _, point = self._kept[0]
        for step in range(t):
            point, _ = self._advance(step, point, self._grads[step], self._moved[step])
        return point

    def _advance(self, t: int, point: Point, grad: Tensor, moved: Tensor) -> tuple[Point, Tensor]:
        """One step of all students without a graph, and whose updates are usable (R,).

        The point's memory is used again unless the point is kept.
        """
        unroll = self.unroll
        if not moved.any():
            return point, moved
        reuse = bool(moved.all()) and self._may_go(point)
        updates, states = [], []
        for s, (rows, mine, state, weights) in enumerate(
            zip(
                unroll.by_student(self._seen(t, grad)),
                unroll.by_student(moved),
                point.states,
                self._weights_at(t),
                strict=True,
            )
        ):
            update, new = unroll.steps.forward(
                rows, state, weights, mine, self._draws_of(t, s), reuse
            )
            updates.append(update)
            states.append(new)
        update = torch.cat(updates) if len(updates) > 1 else updates[0]
        params = point.params - update
        if not moved.all():
            params = torch.where(moved[:, None], params, point.params)
        return Point(params, tuple(states)), usable(update)

    def _may_go(self, point: Point) -> bool:
        """Whether nobody needs a point's state any more once it is stepped from.

        A step that turns out unusable takes those before it again, by their gradients: without a
        record, steps stay out of place.
        """
        held = (self.begin.states, *(kept.states for _, kept in self._kept))
        return self.recorded and all(point.states[0] is not states[0] for states in held)

    def _keep(self, t: int, point: Point) -> None:
        """Keep the point before step t on the way forward, if it is its turn."""
        if self._by_steps and t == self._next:
            self._kept.append((t, self._stored(point)))
            self._next = self._next_kept(t, len(self.batches))

    def _next_kept(self, t: int, end: int) -> int:
        """The step whose point to keep after that of step t, where step end - 1 is to be reversed.

        That step's own is what is there at last: it needs no place among the kept.
        """
        free = self._plan.points - (len(self._kept) - 1)
        return min(t + self._plan.next_kept(end - t, free), end - 1) if free else end - 1

    def _stored(self, point: Point) -> Point:
        """A point as it is kept: as it is, or h and c rounded."""
        return self._in_cells(point, torch.bfloat16)

    def _loaded(self, point: Point) -> Point:
        return self._in_cells(point, point.params.dtype)

    def _in_cells(self, point: Point, cells: torch.dtype) -> Point:
        if self.unroll.memory.cells == "float32":
            return point
        return Point(
            point.params, tuple(self.unroll.steps.stored(of, cells) for of in point.states)
        )

    def _release(self, point: Point) -> None:
        """Let the memory of a point be used again, unless somebody else holds it."""
        held = (self.begin.states, self.end.states, *(kept.states for _, kept in self._kept))
        if all(point.states[0] is not states[0] for states in held):
            for mine in point.states:
                self.unroll.steps.release(mine)

    def _make_plan(self) -> Plan:
        unroll, begin, steps = self.unroll, self.begin, len(self.batches)
        memory, device = unroll.memory, begin.params.device
        first = Point(begin.params, begin.states)
        stored = self._stored(first)
        point_bytes = _bytes(stored)
        if stored is not first:
            for mine in stored.states:
                unroll.steps.release(mine)
        # There in any case: the record, the adjoints, the point being stepped, and the last one.
        fixed = _bytes((self._grads, self._slopes)) + 3 * point_bytes
        budget = memory.bytes(device, fixed + point_bytes) - fixed
        graph_bytes = 0
        if self.how.second_order and memory.segment is None:  # by hand, no graph is kept
            graph_bytes = unroll.graph_bytes(begin.params[:, None], begin.scale, self.batches[0])
        return plan(steps, memory, budget, point_bytes, graph_bytes)

    def _distances(self, t: int, params: Tensor, teachers: Tensor) -> tuple[Tensor, Tensor]:
        """Log distances to the teachers (R, K) and the imitation loss's terms (R,)."""
        unroll, how, rows = self.unroll, self.how, len(params)
        if not len(teachers):
            return params.new_empty((rows, 0)), params.new_zeros(rows)
        found = []
        for row in range(rows):
            those = teachers[:, row % unroll.teacher_rows]
            distance, total = registry.compute(
                "teacher_distance", how.backend, params, params[row], those, how.eps,
                how.huber_delta,
            )  # fmt: skip
            found.append(distance)
            if self.recorded:
                slope, _ = registry.compute(
                    "teacher_distance_backward", how.backend, params,
                    self._shares(distance), params[row], those, total, how.eps, how.huber_delta,
                    False,
                )  # fmt: skip
                self._slopes[t, row] = slope
        distances = torch.stack(found)
        reduced = distances.mean(1) if how.mechanism == "mean" else distances.amax(1)
        return distances, reduced if how.log_objective else reduced.exp()

    def _shares(self, distance: Tensor) -> Tensor:
        """The imitation term's gradient in the distances (K,); equal largest ones share it."""
        if self.how.mechanism == "mean":
            shares = torch.full_like(distance, 1 / len(distance))
            reduced = distance.mean()
        else:
            reduced = distance.max()
            largest = distance == reduced
            shares = largest.to(distance.dtype) / largest.sum()
        return shares if self.how.log_objective else shares * reduced.exp()

    def _sum_up(self, ok: Tensor, reduced: Tensor) -> None:
        """The window's losses (S,), and the meta-loss's slopes in the students' losses (T, R)."""
        how, eps, steps = self.how, self.how.eps, len(self.batches)
        students = len(self.unroll.students)
        if not steps:
            self.meta_loss = self.imitation_loss = self.begin.params.new_zeros(students)
            return
        loss = self.losses[..., 0]
        start = self._start_losses(ok, loss)
        share = steps * self.unroll.optimizees
        if how.log_objective:
            terms, slopes = (loss + eps).log() - (start + eps).log(), 1 / (loss + eps)
        else:
            terms, slopes = loss / (start + eps), (1 / (start + eps)).expand_as(loss)
        self._loss_slopes = torch.where(ok, slopes, 0) / share

        def per_student(terms: Tensor) -> Tensor:
            return (terms.sum(0) / share).view(students, -1).sum(1)

        self.meta_loss = per_student(torch.where(ok, terms, 0))
        self.imitation_loss = per_student(reduced)

    def _start_losses(self, ok: Tensor, loss: Tensor) -> Tensor:
        """Losses of the window's first parameters, (R,) of the first batch or (T, R) of every."""
        if self.how.normaliser == "first-batch":
            first = ok.int().argmax(0, keepdim=True)
            return loss.gather(0, first)[0]
        unroll = self.unroll
        params = (self.begin.params * self.begin.scale)[:, None]
        every = [unroll.task.objectives(params, batch, self.how.stack) for batch in self.batches]
        return torch.stack(every)[..., 0]

    # ---- backward

    def backward(self, d_meta: Tensor, d_imitation: Tensor) -> list[Tensor]:
        """Gradients in all students' weights, of gradients (S,) in their losses."""
        share = len(self.batches) * self.unroll.optimizees
        each = self.unroll.optimizees
        of_slopes = d_imitation.repeat_interleave(each) / share
        of_grads = self._loss_slopes * d_meta.repeat_interleave(each)
        back = self._back_by_steps if self._by_steps else self._back_by_coordinates
        return list(chain.from_iterable(back(of_slopes, of_grads)))

    def _back_by_coordinates(self, of_slopes: Tensor, of_grads: Tensor) -> list[list[Tensor]]:
        """First order: gradients in each student's weights.

        Args:
            of_slopes: What the imitation loss's slopes count, (R,).
            of_grads: What the students' gradients count, (T, R).
        """
        settings = self.unroll.students[0].config.settings
        each, (_, n) = self.unroll.optimizees, self.begin.params.shape
        chunk = min(max(n // _CHUNKS, _LEAST_CHUNK), _MOST_CHUNK)
        found = []
        for s, (state, weights) in enumerate(zip(self.begin.states, self._weights, strict=True)):
            total = [torch.zeros_like(w) for w in weights]
            for index in range(each):
                row = s * each + index
                went = self._moved[:, row]
                for first in range(0, n, chunk):
                    part = slice(first, min(n, first + chunk))
                    adjoints = self._adjoints(row, part, of_slopes[row], of_grads[:, row])
                    grads = self._grads[:, row, part]
                    if not went.all():
                        adjoints, grads = adjoints[went], grads[went]
                    inner = slice(index * n + part.start, index * n + part.stop)
                    of_part = ops.student_unroll_backward(
                        grads,
                        adjoints,
                        StudentState(*(t[..., inner].contiguous() for t in state)),
                        weights,
                        settings,
                        backend=self.how.backend,
                    )
                    torch._foreach_add_(total, of_part)
            found.append(total)
        return found

    def _adjoints(self, row: int, part: slice, of_slopes: Tensor, of_grads: Tensor) -> Tensor:
        """Gradients in the updates of a row's coordinates, (T, coordinates)."""
        grads = self._grads[:, row, part]
        if len(self._slopes):
            sums = -of_slopes * self._slopes[:, row, part]
        else:
            sums = torch.zeros_like(grads)
        sums[:-1].addcmul_(of_grads[1:, None], grads[1:], value=-1)
        for t in range(len(sums) - 2, -1, -1):
            sums[t] += sums[t + 1]
        return sums

    def _back_by_steps(self, of_slopes: Tensor, of_grads: Tensor) -> list[list[Tensor]]:
        """First or second order, the last step first; see :meth:`_back_by_coordinates`."""
        steps, unroll = len(self.batches), self.unroll
        adjoint = _Adjoint(
            torch.zeros_like(self.begin.params),
            [unroll.steps.zeros(state) for state in self.begin.states],
            [[torch.zeros_like(w) for w in of] for of in self._weights],
        )
        for end in range(steps, 0, -1):
            at, point = self._kept[-1]
            point = self._loaded(point)
            while at < end - 1:
                goal = self._next_kept(at, end)
                for t in range(at, goal):
                    point, _ = self._advance(t, point, self._grads[t], self._moved[t])
                at = goal
                if at < end - 1:
                    self._kept.append((at, self._stored(point)))
            self._back(end - 1, point, adjoint, of_slopes, of_grads[end - 1])
            if self._kept[-1][0] == end - 1 and end > 1:
                _, stored = self._kept.pop()
                if stored is not point:
                    self._release(stored)
            self._release(point)
        for state in adjoint.states:
            unroll.steps.release(state)
        return adjoint.weights

    def _back(
        self, t: int, point: Point, adjoint: _Adjoint, of_slopes: Tensor, of_grads: Tensor
    ) -> None:
        """From the adjoints after step t to those before it, in place."""
        unroll, moved, grads = self.unroll, self._moved[t], self._grads[t]
        if len(self._slopes):
            adjoint.params += of_slopes[:, None] * self._slopes[t]
        d_updates = unroll.by_student(-adjoint.params)
        seen = unroll.by_student(self._seen(t, grads))
        d_grads = torch.zeros_like(grads)
        for s, mine in enumerate(unroll.by_student(moved)):
            if not mine.any():
                continue
            d_grad, adjoint.states[s], d_weights = unroll.steps.backward(
                d_updates[s],
                adjoint.states[s],
                seen[s],
                point.states[s],
                self._weights_at(t)[s],
                mine,
                self._draws_of(t, s),
            )
            torch._foreach_add_(adjoint.weights[s], d_weights)
            unroll.by_student(d_grads)[s].copy_(d_grad)
        adjoint.params += of_grads[:, None] * grads
        if self.how.second_order:
            curved = self._hessian_product(t, point, torch.where(moved[:, None], d_grads, 0))
            adjoint.params += torch.where(moved[:, None], curved, 0)

    def _hessian_product(self, t: int, point: Point, vector: Tensor) -> Tensor:
        """The gradients' Jacobian before step t, which is symmetric, times a vector (R, N)."""
        kept = self._graphs.pop(t, None)
        if kept is None:
            params = point.params[:, None]
            _, _, kept = self.unroll.gradients(params, self.begin.scale, self.batches[t], True)
        assert kept is not None
        leaf, grads = kept
        if not grads.requires_grad:  # a loss whose gradient is constant
            return torch.zeros_like(vector)
        (product,) = torch.autograd.grad(
            grads, leaf, vector[:, None], allow_unused=True, materialize_grads=True
        )
        return product[:, 0]

    def _seen(self, t: int, grads: Tensor) -> Tensor:
        """The gradients (R, N) as students see them."""
        if self._input_noise is None:
            return grads
        if self._draws is None:
            raise ValueError("draws must be given for input_noise, not None")
        noisy = [
            self._input_noise.add(row, self._draws("input", t, index))
            for index, row in enumerate(grads)
        ]
        return torch.stack(noisy)

    def _draws_of(self, t: int, s: int) -> Callable[[int], torch.Generator | None]:
        """Where the noise of a student's rows comes from at a step."""
        first = s * self.unroll.optimizees
        return lambda row: None if self._draws is None else self._draws("policy", t, first + row)

    def _weights_at(self, t: int) -> Sequence[Sequence[Tensor]]:
        if self._noise is None:
            return self._weights
        noisy = zip(self._weights, self._noise(t), strict=True)
        return [torch._foreach_add(of, noise) for of, noise in noisy]  # type: ignore[arg-type]


@dataclass
class _Adjoint:
    """Gradients in parameters (R, N), in each student's state, and so far in its weights."""

    params: Tensor
    states: list[Any]
    weights: list[list[Tensor]]


def _bytes(value: Any) -> int:
    """Bytes of the tensors in a nest of tuples."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, tuple) else 0
