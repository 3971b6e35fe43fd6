"""Students and their teachers, who train the same optimizees side by side.

An *episode* begins with random optimizees, each given to its student and to all teachers, and a
warm-up by SGD; then come *windows* of steps through which the meta-gradient flows, parameters and
states carried from window to window as constants. Source: Optimizer Amalgamation (ICLR 2022),
sections 3.2 and 3.3, in the form of the authors' code.

Several optimizees run as one: R = S B *rows*, of S students (replicates) with B optimizees each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from amalgam import ops
from amalgam.meta.finite import usable
from amalgam.meta.memory import Memory
from amalgam.meta.steps import AutogradSteps, FusedSteps, Steps
from amalgam.policies import Policy, Pool, Student
from amalgam.tasks import Batch, Task

MECHANISMS = ("mean", "min-max")
NORMALISERS = ("first-batch", "every-batch")


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
        normaliser: The loss of the window's first parameters that the meta-loss is over: the
            ``"first-batch"``'s, which is known, or ``"every-batch"``'s own as in the authors'
            code, for a forward pass a step. To log losses it adds a constant that no gradient sees.
        huber_delta: Where given, parameter differences beyond it count linearly.
        eps: Added inside logs, and to divisors.
        stack: Whether optimizees of one shape run as one batched module; where ``None``, those
            that are faster so (see :attr:`amalgam.tasks.Task.stacks`).
        backend: Computes the student's and the teachers' operations.
    """

    mechanism: Literal["mean", "min-max"] = "min-max"
    second_order: bool = True
    scale_spread: float = 3.0
    scale_teachers: bool = False
    log_objective: bool = True
    normaliser: Literal["first-batch", "every-batch"] = "first-batch"
    huber_delta: float | None = None
    eps: float = 1e-10
    stack: bool | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        """Refuse what can't be computed."""
        for name, known in (("mechanism", MECHANISMS), ("normaliser", NORMALISERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, not {getattr(self, name)!r}")
        if not self.scale_spread >= 0:
            raise ValueError(f"scale_spread must be 0 or more, not {self.scale_spread}")
        if self.huber_delta is not None and not self.huber_delta > 0:
            raise ValueError(f"huber_delta must be positive, not {self.huber_delta}")
        if not self.eps > 0:
            raise ValueError(f"eps must be positive, not {self.eps}")
        ops.check_backend(self.backend)


class Trajectories(NamedTuple):
    """Where everybody stands in an episode: R rows of N coordinates, S students, K teachers.

    Attributes:
        scale: The episode's scaling s, shape (R, N); all parameters here are p / s.
        params: The students' parameters, shape (R, N).
        states: The students' states, one for each, of its rows' coordinates one after another.
        teacher_params: The teachers' parameters, shape (K, R, N), or (K, 1, N) where rows share.
        teacher_state: The teachers' states: one of R N coordinates, or one a row where some of them
            look at whole tensors.
    """

    scale: Tensor
    params: Tensor
    states: tuple[Any, ...]
    teacher_params: Tensor
    teacher_state: tuple[Any, ...]


class Rows:
    """Optimizees of one task that run as one, each with its student and its teachers.

    Args:
        task: The optimizee and its data; its device is everybody's.
        student: The learned optimizer, or several of one kind and configuration: replicates, which
            share nothing but the machine.
        pool: The teachers; may be empty.
        amalgamation: How the students are held to both.
        memory: What windows may keep for their way back.
        optimizees: B, how many each student trains at once; its losses are their means.
        shared: Whether all rows have the same optimizee and batches; the teachers then run once.
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
        self.steps: Steps = (
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
        # Up to the exponential where they are drawn: its last bits are the device's own.
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
                tuple(self.steps.initial(rows) for rows in self.by_student(params)),
                params[: self.teacher_rows].expand(len(self.pool), -1, -1).clone(),
                tuple(
                    self.pool.initial_state(params[rows].reshape(-1), self.task.layout)
                    for rows in self._pool_rows
                ),
            )

    def by_student(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows (R, ...) as each student's own, (B, ...)."""
        return rows.split(self.optimizees)

    def warm_up(
        self, begin: Trajectories, batches: Sequence[Batch], lr: float | None = None
    ) -> Trajectories:
        """SGD at the student's warm-up rate; every policy sees the gradients, none acts.

        The LSTM waits, moments move; afterwards all go on from the same parameters.

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
                    self.steps.warm_up(rows, state, mine)
                    for rows, state, mine in zip(
                        self.by_student(grads), states, self.by_student(ok), strict=True
                    )
                )
                own = slice(self.teacher_rows)
                everybody = params[own].expand(len(self.pool), -1, -1)
                seen = self.to_teachers(grads[own], scale[own]).expand_as(everybody)
                went = ok[own].expand(len(self.pool), -1)
                _, teacher_state = self._pool_step(
                    everybody, teacher_state, seen, scale[own], went, warming=True
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
                # The graph holds what it saves until the end: no address comes twice.
                _kept = self.gradients(params, scale, batch, graph=True)
            for given in batch:
                sizes.pop(given.untyped_storage().data_ptr(), None)
            self._graph_bytes = sum(sizes.values())
        return self._graph_bytes

    def to_teachers(self, grads: Tensor, scale: Tensor) -> Tensor:
        """Gradients in scaled parameters as the teachers are to see them."""
        return grads if self.amalgamation.scale_teachers else grads / scale

    def teachers_step(
        self, params: Tensor, state: tuple[Any, ...], grads: Tensor, scale: Tensor
    ) -> tuple[Tensor, tuple[Any, ...], Tensor]:
        """The teachers' new parameters (K, R, N) and state, and who did step (K, R)."""
        scale = scale[: self.teacher_rows]
        seen = self.to_teachers(grads, scale)
        ok = usable(seen)
        with torch.no_grad():
            updates, new = self._pool_step(params, state, seen, scale, ok)
            went = ok & usable(updates)
            if not torch.equal(went, ok):
                updates, new = self._pool_step(params, state, seen, scale, went)
            return params - updates, new, went

    def _pool_step(
        self,
        params: Tensor,
        state: tuple[Any, ...],
        seen: Tensor,
        scale: Tensor,
        ok: Tensor,
        warming: bool = False,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Updates (K, R, N) of scaled parameters, and the new state, of those that are ok (K, R).

        Args:
            params: The teachers' parameters, (K, R, N).
            state: Their states.
            seen: The gradients that they see, (K, R, N).
            scale: The scaling, (R, N).
            ok: Who is to step, (K, R).
            warming: Whether states move and nobody does: updates are zero.
        """
        if not len(self.pool):
            return params, state
        how = self.amalgamation
        own = params if how.scale_teachers else params * scale
        updates, states = torch.zeros_like(params), []
        for rows, old in zip(self._pool_rows, state, strict=True):
            k, _, n = params.shape
            grads, at = seen[:, rows].reshape(k, -1), own[:, rows].reshape(k, -1)
            told: Any = {"params": at, "layout": self.task.layout, "backend": how.backend}
            if warming:
                new = self.pool.warm_up(grads, old, **told)
            else:
                of_rows, new = self.pool.step(grads, old, **told)
                updates[:, rows] = of_rows.view(k, -1, n)
            states.append(self.pool.keep(ok[:, rows], new, old))
        if not how.scale_teachers:
            updates /= scale
        return torch.where(ok[..., None], updates, 0), tuple(states)

    @property
    def _pool_rows(self) -> list[slice]:
        """The rows that teachers step as one: all, or each on its own where they see tensors."""
        if self.pool.coordinatewise:
            return [slice(0, self.teacher_rows)]
        return [slice(row, row + 1) for row in range(self.teacher_rows)]
