"""One window, forward: its losses, and the tape for the backward pass.

All students and teachers take a step on each batch. A :class:`amalgam.meta.tape.Tape` records what
the backward pass through the students' steps needs. :func:`run_window` makes one differentiable
function of the two for autograd.

A window is run *trusting*: all rows take all steps, whether values are finite is noted where they
are, and whether anything should have been skipped is looked at once, in the end. If so, the window
is run again *carefully*, with a look at every step. So the host waits once a window for a device
that computes while the host goes on. Where nothing is skipped, both give the same bits. A trusting
run, too, leaves parameters where they are rather than make them unusable: what a loss does with
such parameters, which it never sees otherwise, nobody knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amalgam import device, nests
from amalgam.meta.conditions import StepConditions
from amalgam.meta.episode import Episodes, Trajectories
from amalgam.meta.finite import largest, small, usable
from amalgam.meta.memory import Plan, plan
from amalgam.meta.objective import (
    check_logs,
    imitation_slopes,
    imitation_terms,
    last_of,
    meta_terms,
    without_log,
)
from amalgam.meta.on_policy import Blend, Comparison
from amalgam.meta.points import KeptPoints, Point
from amalgam.meta.student_steps import Draws, StudentSteps, WeightNoise, of_students
from amalgam.meta.tape import Tape
from amalgam.meta.teaching import Teaching
from amalgam.operations.teacher_distance import distances_and_slope
from amalgam.tasks import Batch
from amalgam.tasks.task import rows_of


@dataclass(frozen=True)
class Window:
    """What one window of T steps gave, for S students, R rows and K teachers.

    ``meta_loss`` and ``imitation_loss`` are to be minimised: lower is better. Both are means over
    the window's steps and the student's optimizees, and autograd reaches the students' weights from
    them. All else here is outside autograd's graph.

    Attributes:
        meta_loss: How large each student's losses are relative to those of the parameters that the
            window began with, shape (S,). The mean of log(loss) - log(loss at the start), or of
            loss / abs(loss at the start) where ``Amalgamation.log_objective`` is false. A step that
            is not among ``counted`` counts as 0 in the mean. With ``Amalgamation.objective =
            "final"`` it is the term of the last step among them.
        imitation_loss: How far each student is from its teachers, shape (S,); 0 without teachers.
            ``Amalgamation.mechanism`` makes one log distance of those to the K teachers: their mean
            or the largest. This is its mean, or the mean of its exp where ``log_objective`` is
            false. On-policy, :attr:`amalgam.meta.on_policy.Comparison.terms` stand for the
            distances, and a step that the student skips counts as 0.
        end: Where students and teachers stand after the window.
        losses: The optimizees' losses before each step, shape (T, R, 1 + K): the student's first,
            then the teachers'. On-policy teachers have no optimizees: then the shape is (T, R, 1).
        distances: The student's log distances to the teachers after each step, shape (T, R, K);
            on-policy, the teachers' terms of the imitation loss in each step.
        skipped: How many steps each trajectory skipped because of values that were not finite,
            shape (R, 1 + K): the student's first, then the teachers'.
        cosines: Between the student's updates and on-policy teachers', means over tensors, shape
            (T, R, K); (T, R, 0) off-policy.
        log_ratios: Logs of the student's updates' norms over on-policy teachers', likewise.
        counted: Which of a student's losses the meta-loss may take, shape (T, R): where loss and
            gradient of the step's batch are finite, or where the loss of held-out samples is, and
            was looked at.
    """

    meta_loss: Tensor
    imitation_loss: Tensor
    end: Trajectories
    losses: Tensor
    distances: Tensor
    skipped: Tensor
    cosines: Tensor
    log_ratios: Tensor
    counted: Tensor

    @property
    def failed(self) -> Tensor:
        """Which of the students' rows took no step, or had no finite loss, shape (R,)."""
        return (self.skipped[:, 0] == len(self.losses)) | ~self.counted.any(0)

    def map(self, change: Callable[[Any], Any]) -> Window:
        """The window with all its tensors, and its end, changed."""
        return Window(*(change(getattr(self, field.name)) for field in fields(self)))

    def read(self, *others: Tensor) -> tuple[Window, list[Tensor]]:
        """The window with all but its end on the CPU, and other tensors likewise, by one copy."""
        names = [f.name for f in fields(self) if f.name != "end"]
        found = device.read([*(getattr(self, name) for name in names), *others])
        ours: dict[str, Any] = dict(zip(names, found, strict=False))
        return replace(self, **ours), found[len(names) :]


class WindowInputs(NamedTuple):
    """What a window is run with; :meth:`amalgam.meta.Unroll.window` says what each is."""

    begin: Trajectories
    batches: Sequence[Batch]
    weights: Sequence[Sequence[Tensor]]
    noise: WeightNoise | None = None
    draws: Draws | None = None
    input_noise: float = 0.0
    conditions: StepConditions | None = None
    teaching: Teaching | None = None
    held_out: Sequence[Batch] | None = None


class Gradient(NamedTuple):
    """A window and its meta-gradient, outside autograd's graph.

    Attributes:
        window: What the window gave.
        grads: The gradients of each student's loss with respect to its weights; ``None`` where
            none of these requires any.
        wrong: Whether anything was skipped, or should have been, or has no log, shape ().
    """

    window: Window
    grads: list[list[Tensor]] | None
    wrong: Tensor


def run_window(episodes: Episodes, given: WindowInputs) -> Window:
    """Run a window whose losses autograd can differentiate with respect to the weights."""
    run, window = _run(episodes, given)
    if not run.recorded:
        return window
    flat = chain.from_iterable(given.weights)
    meta_loss, imitation_loss = _Differentiable.apply(run.tape, window, *flat)
    return replace(window, meta_loss=meta_loss, imitation_loss=imitation_loss)


def meta_gradient(episodes: Episodes, given: WindowInputs, coefficients: Tensor) -> Gradient:
    """Run a window, and take the gradients of a sum of its two losses.

    Args:
        episodes: The engine.
        given: What the window is run with.
        coefficients: The weights of the meta-loss and of the imitation loss in the sum, shape (2,).
    """
    run, window = _run(episodes, given)
    return Gradient(window, run.gradients(coefficients), run.wrong)


def trusting_gradient(episodes: Episodes, given: WindowInputs, coefficients: Tensor) -> Gradient:
    """:func:`meta_gradient`, trusting, without a look at ``wrong``: nothing here waits."""
    run = _Run(episodes, given, trusting=True)
    window = run()
    return Gradient(window, run.gradients(coefficients), run.wrong)


def check_budget(episodes: Episodes, given: WindowInputs) -> None:
    """Raise ValueError unless the budget of memory suffices for such a window.

    Only a budget that was set is looked at. Noise that is drawn at every step may need one where
    this window needs none.
    """
    if episodes.memory.budget is not None:
        run = _Run(episodes, given, trusting=False)
        if run.tape.by_steps:
            run.plan()


def _run(episodes: Episodes, given: WindowInputs) -> tuple[_Run, Window]:
    """Run a window, trusting if the engine is, and carefully if that has failed."""
    run = _Run(episodes, given, trusting=episodes.trusting)
    window, failed = run(), bool(run.wrong)
    if run.trusting and failed:
        del run, window  # their memory is the next run's
        run = _Run(episodes, given, trusting=False)
        window, failed = run(), bool(run.wrong)
    episodes.trusting = episodes.may_trust and not failed
    return run, window


class _Differentiable(torch.autograd.Function):
    """The losses of a window that has been run, as a function of the weights."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, window: Window, *weights: Tensor) -> tuple[Tensor, Tensor]:
        ctx.tape = tape
        return window.meta_loss.clone(), window.imitation_loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_meta: Tensor, d_imitation: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.tape.backward(d_meta, d_imitation)


class _Gradients(NamedTuple):
    """Losses and gradients before a step.

    Attributes:
        losses: The students' losses, shape (R,).
        grads: The students' gradients, shape (R, N).
        teacher_losses: The teachers' losses, shape (R, K), or (1, K) where rows share.
        teacher_grads: The teachers' gradients, shape (K, R, N), or (K, 1, N) where rows share.
    """

    losses: Tensor
    grads: Tensor
    teacher_losses: Tensor
    teacher_grads: Tensor


class _Run:
    """Runs one window forward, trusting or not.

    Attributes:
        trusting: Whether it trusts.
        recorded: Whether a meta-gradient is wanted.
        tape: What its backward pass needs.
        wrong: Afterwards, whether anything in it was skipped, or should have been, or has no log,
            shape (). To look is to wait for the device.
    """

    def __init__(self, episodes: Episodes, given: WindowInputs, *, trusting: bool) -> None:
        begin, batches, weights, noise, draws, input_noise, conditions, teaching, held_out = given
        if held_out is not None and len(held_out) != len(batches):
            raise ValueError(
                f"held_out must hold {len(batches)} batches, one for each step, not {len(held_out)}"
            )
        self.trusting = trusting
        self._episodes = episodes
        self._begin = begin
        self._batches = batches
        self._held_out = held_out
        self._how = how = episodes.amalgamation
        self.recorded = torch.is_grad_enabled() and any(
            w.requires_grad for w in chain.from_iterable(weights)
        )
        detached = [[w.detach() for w in ours] for ours in weights]
        constants = of_students("weights", detached, len(episodes.students))
        point = Point(begin.params, begin.state)
        like, t, k = begin.params, len(batches), len(begin.teacher_params)
        self._on_policy, self._teaching, blend = episodes.on_policy, teaching or Teaching(), None
        if self._on_policy is not None and self._teaching.fade:
            added = like.new_empty((t if self.recorded else 1, *like.shape))
            blend = Blend(1 - self._teaching.fade, added)
        raw = None
        if self.recorded and episodes.steps.finishes:
            raw = like.new_empty((t, *like.shape))
        steps = StudentSteps(episodes, constants, noise, draws, input_noise, conditions, blend, raw)
        grads = like.new_empty((t if self.recorded else 0, *like.shape))
        judged = len(grads) if how.objective == "mean" else min(len(grads), 1)
        moved = torch.zeros((t, len(like)), dtype=torch.bool, device=like.device)
        self.tape = Tape(
            episodes,
            begin,
            batches,
            steps,
            KeptPoints(episodes.steps, point, episodes.memory.cells),
            by_steps=self.recorded
            and (how.second_order or steps.noisy or not episodes.steps.by_coordinates),
            grads=grads,
            loss_grads=grads if held_out is None else like.new_empty((judged, *like.shape)),
            slopes=like.new_empty((t if self.recorded and k else 0, *like.shape)),
            moved=None if trusting else moved,
            loss_slopes=like.new_empty((0, len(like))),
        )
        # Made whole: small tensors made one by one would keep the heap between them from shrinking.
        apart, compared = (k, 0) if self._on_policy is None else (0, k)
        self._losses = like.new_empty((t, len(like), 1 + apart))
        self._distances = like.new_empty((t, len(like), k))
        self._cosines, self._log_ratios = like.new_empty((2, t, len(like), compared))
        # What a trusting run notes: largest magnitudes, of gradients and of updates.
        noted = t if trusting else 0
        self._of_students = like.new_empty((noted, 2, len(like)))
        self._of_teachers = like.new_empty((noted, 2, *begin.teacher_params.shape[:2]))
        # The losses that the meta-loss takes.
        self._taken = self._losses[..., 0] if held_out is None else like.new_empty((t, len(like)))
        self._counted = torch.ones_like(moved)
        self._graphs = 0
        self.wrong = torch.zeros((), dtype=torch.bool, device=like.device)

    def gradients(self, coefficients: Tensor) -> list[list[Tensor]] | None:
        """Gradients of the losses' sum by coefficients (2,), for each student's weights."""
        if not self.recorded:
            return None
        students = len(self._episodes.students)
        with torch.no_grad():
            flat = self.tape.backward(*(each.expand(students) for each in coefficients))
        each = len(flat) // students
        return [flat[first : first + each] for first in range(0, len(flat), each)]

    @torch.no_grad()
    def __call__(self) -> Window:
        """Take all steps, outside autograd's graph, and return what the window gave."""
        begin, tape = self._begin, self.tape
        teachers, state = begin.teacher_params, begin.teacher_state
        point, k = tape.points.first, len(teachers)
        skipped = torch.zeros((len(begin.params), 1 + k), dtype=torch.long, device=teachers.device)
        if tape.by_steps and len(self._batches):
            chosen = self.plan()
            self._graphs = chosen.graphs
            tape.points.follow(chosen, len(self._batches))
        on_policy = self._on_policy is not None
        for t, batch in enumerate(self._batches):
            losses, grads, teacher_losses, teacher_grads = self._gradients(
                t, point, teachers[:0] if on_policy else teachers, batch
            )
            ok = None
            if self.trusting:
                largest(grads, self._of_students[t, 0])
            else:
                ok = losses.isfinite() & self._usable(grads)
                grads = torch.where(ok[:, None], grads, 0)
                self._counted[t] = ok
            if self._held_out is not None:
                self._look_at_held_out(t, point)
            if self.recorded:
                tape.grads[t] = grads
                if not tape.by_steps:
                    self._note_context(t, point, tape.steps.scaled(grads))
            if on_policy:
                teachers, teacher_grads = (x.expand_as(teachers) for x in (point.params, grads))
            if k:
                factors = self._teaching.factors
                with self._episodes.teachers_draw(batch):
                    updates, state, acted = self._episodes.teachers_updates(
                        teachers,
                        state,
                        teacher_grads,
                        begin.scale,
                        ok if on_policy else None,
                        None if factors is None else factors[t],
                        self._of_teachers[t] if self.trusting else None,
                    )
                if acted is not None:
                    skipped[:, 1:] += ~acted.T
                if tape.steps.blend is not None:
                    self._add(updates, to=tape.steps.blend.of_teachers(t))
            point, own = self._step(t, point, grads, ok)
            if tape.moved is not None:
                skipped[:, 0] += ~tape.moved[t]
            tape.points.offer(t + 1, point)
            self._losses[t, :, :1], self._losses[t, :, 1:] = losses[:, None], teacher_losses
            if on_policy:
                self._distances[t] = self._compare(t, own, updates)
            elif k:
                stepped = teachers - updates
                if self.trusting:
                    usable_updates = small(self._of_teachers[t, 1])[..., None]
                    stepped = torch.where(usable_updates, stepped, teachers)
                teachers = stepped
                self._distances[t] = self._measure(t, point.params, teachers)
        tape.points.hold(point.state)
        if on_policy:
            teachers = point.params.expand_as(teachers).clone()
        end = Trajectories(begin.scale, point.params, point.state, teachers, state)
        self.wrong |= self._unusable() if self.trusting else skipped.any()
        return Window(
            *self._mean_losses(),
            end,
            self._losses,
            self._distances,
            skipped,
            self._cosines,
            self._log_ratios,
            self._counted,
        )

    def _usable(self, grads: Tensor) -> Tensor:
        """Whether the students' gradients (R, N) are, as they are and as they are seen."""
        if self.tape.steps.conditions is None:
            return usable(grads)
        return usable(self.tape.steps.scaled(grads)) & usable(grads)

    def _unusable(self) -> Tensor:
        """Whether anything should have been skipped in a run that skips nothing."""
        of_students, conditions = self._of_students, self.tape.steps.conditions
        fine = small(of_students).all() & small(self._of_teachers).all()
        fine &= self._losses[..., 0].isfinite().all()
        if conditions is not None:
            fine &= small(of_students[:, 0] * conditions.loss_scale.abs()).all()
        return ~fine

    def _gradients(self, t: int, point: Point, teachers: Tensor, batch: Batch) -> _Gradients:
        """Losses and gradients of students and teachers before step t."""
        episodes, scale, k = self._episodes, self._begin.scale, len(teachers)
        student, by_row = point.params[:, None], teachers.transpose(0, 1)
        curved = self.tape.by_steps and self._how.second_order
        graph = curved and t >= len(self._batches) - self._graphs
        # At an episode's first step all teachers stand where the student does.
        together = t == 0 and k > 0 and self._begin.together
        # In one batch with teachers the student's gradients would have other last bits than in the
        # backward pass, which builds their graph again for the student alone.
        if not (curved or together or not k or episodes.shared):
            losses, grads, _ = episodes.gradients(torch.cat((student, by_row), 1), scale, batch)
            return _Gradients(
                losses[:, 0], grads[:, 0], losses[:, 1:], grads[:, 1:].transpose(0, 1)
            )
        losses, grads, kept = episodes.gradients(student, scale, batch, graph)
        if kept is not None:
            self.tape.graphs[t] = kept
        own = slice(episodes.teacher_rows)
        if together:
            teacher_losses = losses[own].expand(-1, k)
            teacher_grads = grads[own].expand(-1, k, -1)
        elif k:
            batch = rows_of(batch, own)
            teacher_losses, teacher_grads, _ = episodes.gradients(by_row, scale[own], batch)
        else:
            teacher_losses, teacher_grads = losses[:, :0], grads[:, :0]
        return _Gradients(losses[:, 0], grads[:, 0], teacher_losses, teacher_grads.transpose(0, 1))

    def _look_at_held_out(self, t: int, point: Point) -> None:
        """Look at the loss before step t on held-out samples; its gradient goes on the tape.

        Where the meta-loss is the final loss alone, only the first and the last one are looked at.
        """
        assert self._held_out is not None
        steps = len(self._batches)
        if self._how.objective == "final" and t not in (0, steps - 1):
            self._taken[t] = math.nan
            return
        episodes, scale, batch = self._episodes, self._begin.scale, self._held_out[t]
        on_tape = t - steps + len(self.tape.loss_grads)
        if on_tape >= 0:
            losses, grads, _ = episodes.gradients(point.params[:, None], scale, batch)
            grads = grads[:, 0]
            self.tape.loss_grads[on_tape] = torch.where(usable(grads)[:, None], grads, 0)
        else:
            params = (point.params * scale)[:, None]
            losses = episodes.objectives(params, batch)
        self._taken[t] = losses[:, 0]

    def _step(self, t: int, point: Point, grads: Tensor, ok: Tensor | None) -> tuple[Point, Tensor]:
        """The students' point after step t, and their updates (R, N).

        Args:
            t: The step.
            point: Where they stand before it.
            grads: Their gradients, shape (R, N).
            ok: Which rows may take it, shape (R,); ``None`` in a run that trusts that all may.
        """
        tape = self.tape
        # Without a record the steps so far could not be taken again, so none is taken in place.
        reuse = self.recorded and tape.points.is_free(point)
        before = point.params
        after, updates = tape.steps.forward(t, point, grads, ok, reuse)
        if ok is None:
            moved = small(largest(updates, self._of_students[t, 1]))[:, None]
            return after._replace(params=torch.where(moved, after.params, before)), updates
        moved = ok & usable(updates)
        if not torch.equal(moved, ok):
            # It shows only after the step, which may have overwritten the point it began from.
            if self.recorded:
                point = tape.points.first
                for step in range(t):
                    point = tape.advance(step, point)
            reuse = self.recorded and tape.points.is_free(point)
            after, updates = tape.steps.forward(t, point, grads, moved, reuse)
        assert tape.moved is not None
        tape.moved[t] = moved
        return after, updates

    def _add(self, updates: Tensor, *, to: Tensor) -> None:
        """Keep what the executed teachers add to the executed step, of their updates (K, R, N)."""
        executed = self._teaching.executed
        assert executed is not None
        rows = torch.arange(len(executed), device=executed.device)
        torch.mul(updates[executed, rows], self._teaching.fade, out=to)

    def _compare(self, t: int, own: Tensor, updates: Tensor) -> Tensor:
        """The on-policy terms of step t, shape (R, K); their gradients go on the tape.

        Args:
            t: The step.
            own: The students' updates, shape (R, N).
            updates: The teachers' updates, shape (K, R, N).
        """
        assert self._on_policy is not None
        found = Comparison(self._on_policy, own, updates, self._episodes.task.layout)
        self._cosines[t], self._log_ratios[t] = found.cosines, found.log_ratios
        if self.recorded:
            self.tape.slopes[t] = found.gradient(imitation_slopes(self._how, found.terms))
        return found.terms

    def _note_context(self, t: int, point: Point, grads: Tensor) -> None:
        """Put on the tape what the students are told of tensors in step t, from a point."""
        steps, of = self._episodes.steps, self._episodes.by_student
        left = self.tape.steps.left(t)
        context = steps.context(of(point.params), point.state, of(grads), left)
        if context is not None:
            self.tape.contexts.append(context)

    def plan(self) -> Plan:
        """What to keep in the memory that the tape and the backward pass itself leave."""
        episodes, begin, points = self._episodes, self._begin, self.tape.points
        stored = points.stored(points.first)
        point_bytes = nests.bytes_of(stored)
        if stored is not points.first:
            episodes.steps.release(stored.state)
        # Held in any case: the tape, the adjoints, the point being stepped, and the last one.
        of_losses = () if self._held_out is None else (self.tape.loss_grads,)
        steps = self.tape.steps
        taped = (self.tape.grads, self.tape.slopes, steps.blend, steps.raw, *of_losses)
        # A GPU's kernels write the adjoints of states beside those that they read.
        points_held = 3 if begin.params.device.type == "cpu" else 4
        fixed = nests.bytes_of(taped) + points_held * point_bytes
        budget = episodes.memory.budget_bytes(begin.params.device, fixed + point_bytes)
        graph_bytes = 0
        if self._how.second_order and episodes.memory.segment is None:  # segments keep no graph
            params = begin.params[:, None]
            graph_bytes = episodes.graph_bytes(params, begin.scale, self._batches[0])
        return plan(
            len(self._batches), episodes.memory, budget, point_bytes, graph_bytes, fixed=fixed
        )

    def _measure(self, t: int, params: Tensor, teachers: Tensor) -> Tensor:
        """Log distances to the teachers (R, K); the imitation terms' gradients go on the tape."""
        how = self._how
        distances, slopes = distances_and_slope(
            params,
            teachers,
            partial(imitation_slopes, how) if self.recorded else None,
            eps=how.eps,
            huber_delta=how.huber_delta,
            backend=how.backend,
        )
        if slopes is not None:
            self.tape.slopes[t] = slopes
        return distances

    def _mean_losses(self) -> tuple[Tensor, Tensor]:
        """Meta-losses and imitation losses (S,); the meta-losses' derivatives go on the tape."""
        steps, students = len(self._batches), len(self._episodes.students)
        if not steps:
            nothing = self._begin.params.new_zeros(students)
            return nothing, nothing
        if self._held_out is not None:
            self._counted = self._taken.isfinite()
        losses, counted = self._taken, self._counted
        start = self._start_losses(losses)
        if self._how.log_objective:
            for each in (losses, start):
                if self.trusting:
                    self.wrong |= without_log(each, self._how.eps).any()
                else:
                    check_logs(each.flatten().tolist(), self._how.eps, self._episodes.task.name)
        terms, slopes = meta_terms(self._how, losses, start)
        of_steps = steps
        if self._how.objective == "final":
            counted, of_steps = last_of(counted), 1
        share = of_steps * self._episodes.optimizees
        self.tape.loss_slopes = torch.where(counted, slopes, 0) / share

        def per_student(terms: Tensor, share: int) -> Tensor:
            return (terms.sum(0) / share).view(students, -1).sum(1)

        return (
            per_student(torch.where(counted, terms, 0), share),
            per_student(self._imitation(), steps * self._episodes.optimizees),
        )

    def _imitation(self) -> Tensor:
        """The terms of the imitation loss, shape (T, R); 0 without teachers."""
        if self._distances.shape[-1]:
            return imitation_terms(self._how, self._distances)
        return self._distances.new_zeros(self._distances.shape[:2])

    def _start_losses(self, losses: Tensor) -> Tensor:
        """Losses of the window's first parameters: on its first batch (R,), or on each (T, R).

        The batches are those of held-out samples where there are any.
        """
        if self._how.normaliser == "first-batch":
            first = self._counted.int().argmax(0, keepdim=True)
            return losses.gather(0, first)[0]
        begin = self._begin
        params = (begin.params * begin.scale)[:, None]
        batches = self._batches if self._held_out is None else self._held_out
        every = [self._episodes.objectives(params, batch) for batch in batches]
        return torch.stack(every)[..., 0]
