"""Episodes without any meta-gradient: how they begin, the warm-up, and the teachers' steps.

An *optimizee* is a model that is trained. An *episode* begins with random optimizees; a student and
all teachers (the *pool*) each train their own copy of every optimizee. A *warm-up* by SGD comes
first, then *windows* of steps (:mod:`amalgam.meta.window`). From one window to the next, parameters
and states are carried as constants. Source: Optimizer Amalgamation (ICLR 2022), sections 3.2 and
3.3, in the form of the authors' code.

Several optimizees run side by side. Each is a *row*, an index of the first dimension of most
tensors here. S students (replicates or particles) with B optimizees each make R = S * B rows, one
student's after another's. Each optimizee has N parameters, its *coordinates*.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amalgam.heap import graph_bytes
from amalgam.meta.finite import largest, usable
from amalgam.meta.memory import Memory
from amalgam.meta.objective import Amalgamation
from amalgam.meta.on_policy import OnPolicy
from amalgam.meta.steps import AutogradSteps, FusedSteps, PolicySteps
from amalgam.policies import FusedStudent, Policy, Pool
from amalgam.ranges import check_kind, several_of
from amalgam.seeding import drawing
from amalgam.tasks import Batch, Task, convolution
from amalgam.tasks.task import SecondOrder, SeededBatch

_OF_TEACHERS = 1 << 63  # a bit that no batch's seed has


class Trajectories(NamedTuple):
    """Where students and teachers stand: R rows of N coordinates, S students, K teachers.

    With ``Episodes.shared`` off-policy teachers have a single row, and R is 1 in their shapes.

    Attributes:
        scale: The episode's scaling s, shape (R, N). All parameters here are scaled: p / s.
        params: The students' parameters, shape (R, N).
        state: The students' state. Of :class:`amalgam.policies.FusedStudent` its tensors have a
            first dimension of S, and hold the B * N coordinates of a student's rows, one row after
            another; of any other policy it is a tuple of one state per row.
        teacher_params: The teachers' parameters, shape (K, R, N); on-policy the students'.
        teacher_state: The pool's states, each a :class:`amalgam.policies.PoolState`. A single one
            for all R * N coordinates if all teachers work coordinate by coordinate; otherwise one
            per row, for its N coordinates.
        together: Whether all teachers stand where their student does, as they do at an episode's
            beginning. Then one gradient is everybody's. Nobody compares: who puts other parameters
            in their place sets it to false.
    """

    scale: Tensor
    params: Tensor
    state: Any
    teacher_params: Tensor
    teacher_state: tuple[Any, ...]
    together: bool = False


class Episodes:
    """Begins episodes of one task, warms them up, and takes the teachers' steps.

    Args:
        task: The optimizee and its data. All tensors are on the task's device.
        student: The student, or several students of one kind and configuration: replicates, which
            are trained independently, or particles.
        pool: The teachers; may be empty.
        amalgamation: Settings of the meta-loss and the imitation loss, and how they are computed.
        memory: How much a window may keep for its backward pass.
        optimizees: B, the number of optimizees that each student trains side by side. A student's
            losses are means over them.
        shared: Whether all rows have the same optimizee and batches, as particles do. Off-policy
            teachers then run once, on a single row. The caller has to give every row the same ones.

    Attributes:
        trusting: Whether the next window is run in trust that nothing is skipped in it; see
            :mod:`amalgam.meta.window`. A window in which something was has the next one run with
            care. The numbers are the same in any case.
    """

    def __init__(
        self,
        task: Task,
        student: Policy | Sequence[Policy],
        pool: Pool,
        amalgamation: Amalgamation,
        *,
        memory: Memory | None = None,
        optimizees: int = 1,
        shared: bool = False,
    ) -> None:
        check_kind("task", task, Task, "a Task, such as tasks.load('digits-mlp')")
        check_kind("pool", pool, Pool, "a Pool, such as Pool(['adam'])")
        check_kind("amalgamation", amalgamation, Amalgamation, "an Amalgamation")
        self.task = task
        self.students = tuple(several_of("student", student, Policy, "a policy, such as Student()"))
        if len({(type(one), str(one.config)) for one in self.students}) != 1:
            raise ValueError("student must be one, or several of one kind and configuration")
        elsewhere = {w.device for one in self.students for w in one.weights()} - {task.device}
        if elsewhere:
            raise ValueError(
                f"student must be on the task's device, {task.device}, not on "
                f"{', '.join(map(str, elsewhere))}; move either with .to()"
            )
        if amalgamation.stack and task.unstackable is not None:
            raise ValueError(
                f"stack must be None or False for task {task.name!r}, not True: {task.unstackable}"
            )
        if optimizees < 1:
            raise ValueError(f"optimizees must be 1 or more, not {optimizees}")
        self.pool = pool
        self.amalgamation = amalgamation
        self.memory = memory or Memory()
        self.optimizees = optimizees
        self.shared = shared
        self.trusting = self.may_trust
        self._graph_bytes: int | None = None
        first = self.students[0]
        self._dtype = first.weights()[0].dtype
        self.steps: PolicySteps = (
            FusedSteps(first, task.layout, amalgamation.backend)
            if isinstance(first, FusedStudent)
            else AutogradSteps(first, task.layout, amalgamation.backend)
        )

    @property
    def may_trust(self) -> bool:
        """Whether students and teachers can be given values that are not finite.

        Those of the fused operations can. What others make of such values nobody knows.
        """
        return isinstance(self.students[0], FusedStudent) and self.pool.coordinatewise

    @property
    def rows(self) -> int:
        """R, the number of optimizees that run side by side."""
        return len(self.students) * self.optimizees

    @property
    def on_policy(self) -> OnPolicy | None:
        """The settings of on-policy teachers; ``None`` where they are off-policy or none."""
        return self.amalgamation.on_policy if len(self.pool) else None

    @property
    def teacher_rows(self) -> int:
        """The number of rows that the teachers have: R, or 1 where rows share."""
        return 1 if self.shared and self.on_policy is None else self.rows

    def begin(self, *generators: torch.Generator) -> Trajectories:
        """Begin an episode, before any warm-up.

        Each row gets a random optimizee, from which its student and all teachers begin, and a
        random scaling. All states are initial ones.

        Args:
            *generators: One per row; they decide the optimizee and the scaling.
        """
        params = torch.stack([self.task.init_params(generator) for generator in generators])
        params = params.to(self._dtype)
        spread = self.amalgamation.scale_spread
        # The exponential is taken on the CPU, too: its last bits differ from device to device.
        uniform = torch.stack(
            [
                torch.rand(params.shape[1:], generator=each, dtype=params.dtype, device=each.device)
                for each in generators
            ]
        )
        scale = ((2 * uniform - 1) * spread).exp()
        return self.start_from(params, scale.to(params.device))

    def start_from(self, params: Tensor, scale: Tensor) -> Trajectories:
        """Begin an episode from given parameters (R, N), not yet scaled, and a scaling (R, N).

        Both are in the dtype of the students' weights, whatever the optimizee's is.
        """
        if params.shape != (self.rows, self.task.layout.numel):
            raise ValueError(
                f"params must have shape {(self.rows, self.task.layout.numel)}, "
                f"not {tuple(params.shape)}"
            )
        params = params.to(self._dtype) / scale
        with torch.no_grad():
            return Trajectories(
                scale,
                params,
                self.steps.initial(self.by_student(params)),
                params[: self.teacher_rows].expand(len(self.pool), -1, -1).clone(),
                tuple(
                    self.pool.initial_state(params[rows].reshape(-1), self.task.layout)
                    for rows in self._pool_rows
                ),
                together=True,
            )

    def by_student(self, rows: Tensor) -> Tensor:
        """A tensor of rows (R, ...) as one of students and their rows (S, B, ...)."""
        return rows.unflatten(0, (len(self.students), self.optimizees))

    def warm_up(
        self,
        begin: Trajectories,
        batches: Sequence[Batch],
        lr: float | None = None,
        loss_scale: Tensor | None = None,
    ) -> Trajectories:
        """Take the warm-up's steps, which are plain SGD's.

        Students and teachers do not act, but their states see the gradients (``warm_up`` of
        policies and of the pool), so that their moments are warm. Afterwards the teachers begin
        from the student's parameters. A row skips a step whose gradient is not finite.

        Args:
            begin: Where students and teachers stand.
            batches: One batch per step, each tensor of shape (R, samples, ...).
            lr: SGD's learning rate; where ``None``, ``warmup_lr`` of the student's configuration.
            loss_scale: A factor on the gradients that the students' states see, shape (R,), and on
                nothing else.
        """
        scale, params, state, _, teacher_state, _ = begin
        lr = self.students[0].config.warmup_lr if lr is None else lr
        for batch in batches:
            _, grads, _ = self.gradients(params[:, None], scale, batch)
            grads = grads[:, 0]
            to_students = grads if loss_scale is None else grads * loss_scale[:, None]
            ok = usable(grads) & usable(to_students)
            if not ok.any():
                continue
            with torch.no_grad():
                params = torch.where(ok[:, None], params - lr * grads, params)
                seen = self.by_student(to_students)
                state = self.steps.warm_up(seen, state, self.by_student(ok))
                own = slice(self.teacher_rows)
                everybody = params[own].expand(len(self.pool), -1, -1)
                seen = self.to_teachers(grads[own], scale[own]).expand_as(everybody)
                moved = ok[own].expand(len(self.pool), -1)
                with self.teachers_draw(batch):
                    _, teacher_state = self._pool_step(
                        everybody, teacher_state, seen, scale[own], moved, warming=True
                    )
        teacher_params = params[: self.teacher_rows].expand(len(self.pool), -1, -1).clone()
        return Trajectories(scale, params, state, teacher_params, teacher_state, together=True)

    def gradients(
        self, params: Tensor, scale: Tensor, batch: Batch, graph: bool = False
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """The optimizees' losses, and their gradients with respect to the scaled parameters.

        Args:
            params: Scaled parameters, shape (R, M, N): M parameter vectors per row, each with a
                loss of its own on the row's batch.
            scale: The rows' scaling, shape (R, N).
            batch: Each tensor of shape (R, samples, ...).
            graph: Whether to keep a graph of the gradients, for Hessian products.

        Returns:
            Losses (R, M) and gradients (R, M, N), outside any graph. Third, with ``graph``, the
            leaf (R, M, N) that holds ``params`` and the gradients (R, M, N) in its graph; without,
            ``None``.

        Raises:
            ValueError: A graph is wanted of gradients that can't be differentiated.
        """
        leaf = params.detach().requires_grad_()
        # What is kept and what is computed again must have the same bits, so the same kernels.
        kernels, failure = SecondOrder(nullcontext, None)
        if self.amalgamation.second_order:
            kernels, failure = self.task.second_order
        if graph and failure is not None:
            raise ValueError(
                f"second_order must be False for task {self.task.name!r}, whose gradients can't be "
                f"differentiated: {failure}"
            )
        with torch.enable_grad(), kernels():
            losses = self.objectives(leaf * scale[:, None], batch)
            with self.task.drawing(batch):
                (grads,) = torch.autograd.grad(losses.sum(), leaf, create_graph=graph)
        return losses.detach(), grads.detach(), (leaf, grads) if graph else None

    def objectives(self, params: Tensor, batch: Batch) -> Tensor:
        """The optimizees' losses (R, M) at parameters (R, M, N) that are not scaled."""
        how = self.amalgamation
        casts: AbstractContextManager[Any] = nullcontext()
        if how.autocast is not None:
            casts = convolution.autocast(params.device.type, getattr(torch, how.autocast))
        with casts:
            return self.task.objectives(params, batch, how.stack)

    def graph_bytes(self, params: Tensor, scale: Tensor, batch: Batch) -> int:
        """Bytes of the graph that :meth:`gradients` keeps; measured once, then remembered."""
        if self._graph_bytes is None:
            self._graph_bytes = graph_bytes(
                lambda: self.gradients(params, scale, batch, graph=True), batch
            )
        return self._graph_bytes

    def to_teachers(self, grads: Tensor, scale: Tensor) -> Tensor:
        """The gradients that the teachers see, of gradients with respect to scaled parameters.

        They see these as they are with ``Amalgamation.scale_teachers``, and otherwise the gradients
        with respect to the unscaled parameters.
        """
        return grads if self.amalgamation.scale_teachers else grads / scale

    def teachers_updates(
        self,
        params: Tensor,
        state: tuple[Any, ...],
        grads: Tensor,
        scale: Tensor,
        ok: Tensor | None = None,
        factors: Tensor | None = None,
        noted: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Any, ...], Tensor | None]:
        """The updates that all teachers make in all their rows.

        Args:
            params: The scaled parameters that they are at, shape (K, R, N).
            state: The pool's states, as in :class:`Trajectories`.
            grads: Gradients with respect to the scaled parameters, shape (K, R, N).
            scale: The scaling, of all rows.
            ok: In which rows teachers may act, shape (R,); in all where absent.
            factors: Factors on the teachers' updates, shape (K,); 1 where absent.
            noted: Gets the largest magnitudes of gradients and of updates, shape (2, K, R). Where
                it is given, all teachers act, come what may.

        Returns:
            The updates (K, R, N), to be subtracted, the new states, and which teachers acted in
            which rows, shape (K, R); ``None`` where all did. Where a gradient or an update is not
            finite, a teacher does not act: its update is 0, and its state stays.
        """
        scale = scale[: self.teacher_rows]
        seen = self.to_teachers(grads, scale)
        acted = None
        with torch.no_grad():
            if noted is not None:
                updates, new = self._pool_step(params, state, seen, scale, None)
                for values, out in zip((seen, updates), noted, strict=True):
                    largest(values, out)
            else:
                may_act = usable(seen) if ok is None else usable(seen) & ok
                updates, new = self._pool_step(params, state, seen, scale, may_act)
                acted = may_act & usable(updates)
                if not torch.equal(acted, may_act):
                    updates, new = self._pool_step(params, state, seen, scale, acted)
            if factors is not None:
                updates = updates * factors[:, None, None]
            return updates, new, acted

    def teachers_draw(self, batch: Batch) -> AbstractContextManager[None]:
        """Inside, teachers that draw do so by a batch's seed, if it has one.

        They draw other numbers than optimizees do on that batch, which begin by the seed itself.
        """
        if self.pool.coordinatewise or not isinstance(batch, SeededBatch):
            return nullcontext()
        return drawing(batch.seeds[0] ^ _OF_TEACHERS, self.task.device)

    def _pool_step(
        self,
        params: Tensor,
        state: tuple[Any, ...],
        seen: Tensor,
        scale: Tensor,
        ok: Tensor | None,
        warming: bool = False,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """The teachers' updates of scaled parameters, and their new states.

        Args:
            params: The teachers' scaled parameters, shape (K, R, N).
            state: Their states, as in :class:`Trajectories`.
            seen: The gradients that they see, shape (K, R, N).
            scale: The scaling of these rows, shape (R, N).
            ok: Which teachers are to step in which rows, shape (K, R); ``None`` means all in all.
                All others keep their state, and their updates are zero.
            warming: Whether this is a step of the warm-up: states move, and all updates are zero.

        Returns:
            Updates (K, R, N), to be subtracted, and the new states.
        """
        if not len(self.pool):
            return params, state
        how = self.amalgamation
        # Teachers that work coordinate by coordinate do not look at parameters.
        own = params if how.scale_teachers or self.pool.coordinatewise else params * scale
        updates, states = [], []
        for rows, old in zip(self._pool_rows, state, strict=True):
            k, _, n = params.shape
            grads = seen[:, rows].reshape(k, -1)
            options: Any = {
                "params": own[:, rows].reshape(k, -1),
                "layout": self.task.layout,
                "backend": how.backend,
            }
            if warming:
                new = self.pool.warm_up(grads, old, **options)
            else:
                flat, new = self.pool.step(grads, old, **options)
                updates.append(flat.view(k, -1, n))
            states.append(self.pool.keep(None if ok is None else ok[:, rows], new, old))
        if warming:
            return torch.zeros_like(params), tuple(states)
        every = torch.cat(updates, 1) if len(updates) > 1 else updates[0]
        if not how.scale_teachers:
            every = every / scale
        return every if ok is None else torch.where(ok[..., None], every, 0), tuple(states)

    @property
    def _pool_rows(self) -> list[slice]:
        """The rows of each pool state: all, or one where some teacher sees whole tensors."""
        if self.pool.coordinatewise:
            return [slice(0, self.teacher_rows)]
        return [slice(row, row + 1) for row in range(self.teacher_rows)]
