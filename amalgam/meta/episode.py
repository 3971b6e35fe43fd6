"""Students and teachers side by side on optimizees of one task, before any meta-gradient.

An *episode* begins with random optimizees, each given to its student and to all teachers, and a
warm-up by SGD. Then come *windows* of steps (:mod:`amalgam.meta.window`), between which parameters
and states are carried as constants. Source: Optimizer Amalgamation (ICLR 2022), sections 3.2 and
3.3, in the form of the authors' code.

Several optimizees run as one. A *row* is one optimizee: S students (replicates) with B optimizees
each make R = S B rows, the first dimension of most tensors here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amalgam.meta.finite import usable
from amalgam.meta.memory import Memory
from amalgam.meta.objective import Amalgamation
from amalgam.meta.steps import AutogradSteps, FusedSteps, PolicySteps
from amalgam.policies import Policy, Pool, Student
from amalgam.tasks import Batch, Task


class Trajectories(NamedTuple):
    """Where students and teachers stand: R rows of N coordinates, S students, K teachers.

    Attributes:
        scale: The episode's scaling s, shape (R, N); all parameters here are p / s.
        params: The students' parameters, shape (R, N).
        states: The students' states, one a student; it holds the coordinates of the student's rows
            one row after another.
        teacher_params: The teachers' parameters, shape (K, R, N), or (K, 1, N) where rows share.
        teacher_state: The pool's states: a single one of R N coordinates, or one a row where some
            teachers look at whole tensors.
    """

    scale: Tensor
    params: Tensor
    states: tuple[Any, ...]
    teacher_params: Tensor
    teacher_state: tuple[Any, ...]


class Episodes:
    """Begins episodes of one task, warms up, and steps the teachers.

    Args:
        task: The optimizee and its data; its device is everybody's.
        student: The learned optimizer, or several of one kind and configuration: replicates, which
            are trained independently.
        pool: The teachers; may be empty.
        amalgamation: How the students are held to both.
        memory: What windows may keep for their way back.
        optimizees: B, how many each student trains at once; its losses are means over them.
        shared: Whether all rows have the same optimizee and batches; the teachers then run once,
            on a single row.
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
        self.task = task
        self.students = (student,) if isinstance(student, Policy) else tuple(student)
        if len({(type(one), str(one.config)) for one in self.students}) != 1:
            raise ValueError("student must be one, or several of one kind and configuration")
        elsewhere = {w.device for one in self.students for w in one.weights()} - {task.device}
        if elsewhere:
            raise ValueError(
                f"student must be on the task's device, {task.device}, not on "
                f"{', '.join(map(str, elsewhere))}; move either with .to()"
            )
        if optimizees < 1:
            raise ValueError(f"optimizees must be 1 or more, not {optimizees}")
        self.pool = pool
        self.amalgamation = amalgamation
        self.memory = memory or Memory()
        self.optimizees = optimizees
        self.shared = shared
        self._graph_bytes: int | None = None
        first = self.students[0]
        self.steps: PolicySteps = (
            FusedSteps(first, amalgamation.backend)
            if isinstance(first, Student)
            else AutogradSteps(first, task.layout, amalgamation.backend)
        )

    @property
    def rows(self) -> int:
        """R, how many optimizees run as one."""
        return len(self.students) * self.optimizees

    @property
    def teacher_rows(self) -> int:
        """How many rows the teachers have."""
        return 1 if self.shared else self.rows

    def begin(self, *generators: torch.Generator) -> Trajectories:
        """A new episode: a random optimizee a row for all, zero states, a fresh scaling.

        Args:
            *generators: One a row.
        """
        params = torch.stack([self.task.init_params(generator) for generator in generators])
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
        """An episode from given parameters (R, N), not yet scaled, and their scaling (R, N)."""
        if params.shape != (self.rows, self.task.layout.numel):
            raise ValueError(
                f"params must have shape {(self.rows, self.task.layout.numel)}, "
                f"not {tuple(params.shape)}"
            )
        params = params / scale
        with torch.no_grad():
            return Trajectories(
                scale,
                params,
                tuple(self.steps.initial(ours) for ours in self.by_student(params)),
                params[: self.teacher_rows].expand(len(self.pool), -1, -1).clone(),
                tuple(
                    self.pool.initial_state(params[rows].reshape(-1), self.task.layout)
                    for rows in self._pool_rows
                ),
            )

    def by_student(self, rows: Tensor) -> tuple[Tensor, ...]:
        """A tensor of rows (R, ...) split by student, into S tensors (B, ...)."""
        return rows.split(self.optimizees)

    def warm_up(
        self, begin: Trajectories, batches: Sequence[Batch], lr: float | None = None
    ) -> Trajectories:
        """SGD steps, whose gradients move every policy's moments, while no policy acts.

        Afterwards all go on from the same parameters.

        Args:
            begin: Where everybody stands.
            batches: One a step, each tensor (R, samples, ...).
            lr: SGD's learning rate; the student's own where ``None``.
        """
        scale, params, states, _, teacher_state = begin
        lr = self.students[0].config.warmup_lr if lr is None else lr
        for batch in batches:
            _, grads, _ = self.gradients(params[:, None], scale, batch)
            grads = grads[:, 0]
            ok = usable(grads)
            if not ok.any():
                continue
            with torch.no_grad():
                params = torch.where(ok[:, None], params - lr * grads, params)
                states = tuple(
                    self.steps.warm_up(seen, state, moved)
                    for seen, state, moved in zip(
                        self.by_student(grads), states, self.by_student(ok), strict=True
                    )
                )
                own = slice(self.teacher_rows)
                everybody = params[own].expand(len(self.pool), -1, -1)
                seen = self.to_teachers(grads[own], scale[own]).expand_as(everybody)
                moved = ok[own].expand(len(self.pool), -1)
                _, teacher_state = self._pool_step(
                    everybody, teacher_state, seen, scale[own], moved, warming=True
                )
        teacher_params = params[: self.teacher_rows].expand(len(self.pool), -1, -1).clone()
        return Trajectories(scale, params, states, teacher_params, teacher_state)

    def gradients(
        self, params: Tensor, scale: Tensor, batch: Batch, graph: bool = False
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Losses and their gradients in the scaled parameters.

        Args:
            params: Shape (R, M, N): M optimizees on each row's batch.
            scale: Shape (R, N).
            batch: Each tensor (R, samples, ...).
            graph: Whether to keep what the gradients' own gradients need.

        Returns:
            Losses (R, M), gradients (R, M, N), and the leaf and the gradients in its graph.
        """
        leaf = params.detach().requires_grad_()
        with torch.enable_grad():
            losses = self.task.objectives(leaf * scale[:, None], batch, self.amalgamation.stack)
            (grads,) = torch.autograd.grad(losses.sum(), leaf, create_graph=graph)
        return losses.detach(), grads.detach(), (leaf, grads) if graph else None

    def graph_bytes(self, params: Tensor, scale: Tensor, batch: Batch) -> int:
        """Size of the graph that :meth:`gradients` keeps, measured once."""
        if self._graph_bytes is None:
            sizes: dict[int, int] = {}

            def note(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                # The graph holds all that it saves until the end, so no address comes twice.
                _kept = self.gradients(params, scale, batch, graph=True)
            for given in batch:
                sizes.pop(given.untyped_storage().data_ptr(), None)
            self._graph_bytes = sum(sizes.values())
        return self._graph_bytes

    def to_teachers(self, grads: Tensor, scale: Tensor) -> Tensor:
        """What the teachers see of gradients in scaled parameters."""
        return grads if self.amalgamation.scale_teachers else grads / scale

    def teachers_step(
        self, params: Tensor, state: tuple[Any, ...], grads: Tensor, scale: Tensor
    ) -> tuple[Tensor, tuple[Any, ...], Tensor]:
        """The teachers' new parameters (K, R, N) and state, and which of them moved (K, R)."""
        scale = scale[: self.teacher_rows]
        seen = self.to_teachers(grads, scale)
        ok = usable(seen)
        with torch.no_grad():
            updates, new = self._pool_step(params, state, seen, scale, ok)
            moved = ok & usable(updates)
            if not torch.equal(moved, ok):
                updates, new = self._pool_step(params, state, seen, scale, moved)
            return params - updates, new, moved

    def _pool_step(
        self,
        params: Tensor,
        state: tuple[Any, ...],
        seen: Tensor,
        scale: Tensor,
        ok: Tensor,
        warming: bool = False,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """The teachers' updates of scaled parameters, and their new states.

        Args:
            params: The teachers' parameters, (K, R, N).
            state: Their states.
            seen: The gradients that they see, (K, R, N).
            scale: The scaling, (R, N).
            ok: Which teachers are to step in which rows, (K, R); others' updates are zero.
            warming: Whether only the states move, and all updates are zero.

        Returns:
            Updates (K, R, N), to be subtracted, and one state a pool step.
        """
        if not len(self.pool):
            return params, state
        how = self.amalgamation
        own = params if how.scale_teachers else params * scale
        updates, states = torch.zeros_like(params), []
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
                updates[:, rows] = flat.view(k, -1, n)
            states.append(self.pool.keep(ok[:, rows], new, old))
        if not how.scale_teachers:
            updates /= scale
        return torch.where(ok[..., None], updates, 0), tuple(states)

    @property
    def _pool_rows(self) -> list[slice]:
        """Which rows the pool steps as one: all, or each alone where teachers see tensors."""
        if self.pool.coordinatewise:
            return [slice(0, self.teacher_rows)]
        return [slice(row, row + 1) for row in range(self.teacher_rows)]
