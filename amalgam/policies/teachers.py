"""The teachers: a pool of optimizers that step side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amalgam import ops
from amalgam.layout import Layout
from amalgam.operations.teacher_kinds import TEACHER_KINDS
from amalgam.policies import torch_teacher
from amalgam.policies.policy_teacher import PolicyTeacher
from amalgam.policies.torch_teacher import TorchState, TorchTeacher

LEARNING_RATES = {name: kind.lr for name, kind in TEACHER_KINDS.items()}


@dataclass(frozen=True)
class Teacher:
    """One analytical teacher; its update rule stands in :mod:`amalgam.operations.teacher_kinds`.

    Attributes:
        kind: One of :data:`amalgam.ops.KINDS`.
        lr: Learning rate; the kind's default where ``None``, mostly the paper's.
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1); the kind's default where ``None``.
        eps: Added to the second moment inside the root.
    """

    kind: str
    lr: float | None = None
    beta1: float = 0.9
    beta2: float | None = None
    eps: float = 1e-10

    def __post_init__(self) -> None:
        """Fill what depends on the kind, and refuse what can't be."""
        if self.kind not in ops.KINDS:
            raise ValueError(f"kind must be one of {list(ops.KINDS)}, not {self.kind!r}")
        if self.lr is None:
            object.__setattr__(self, "lr", TEACHER_KINDS[self.kind].lr)
        if self.beta2 is None:
            object.__setattr__(self, "beta2", TEACHER_KINDS[self.kind].beta2)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)}")
        for name in ("lr", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")


class PoolState(NamedTuple):
    """What K analytical teachers carry from step to step, for N coordinates each.

    Attributes:
        m: First moments, shape (K, N); rows of teachers without one stay zero.
        v: Second moments, likewise.
    """

    m: Tensor
    v: Tensor


class MixedPoolState(NamedTuple):
    """What K teachers carry of which some are :class:`TorchTeacher` or :class:`PolicyTeacher`.

    Attributes:
        m: The analytical teachers' first moments, shape (A, N).
        v: Their second moments, likewise.
        torch: The others' states, one each.
    """

    m: Tensor
    v: Tensor
    torch: tuple[TorchState, ...]


AnyTeacher = Teacher | TorchTeacher | PolicyTeacher


class Pool:
    """Several teachers, each on its own trajectory.

    What they carry is a :class:`PoolState`, or a :class:`MixedPoolState` where one of them is not
    analytical; :func:`state_tensors` says what of it a file is to keep.

    Args:
        teachers: The teachers, analytical ones, torch's, or frozen policies, or kinds for
            analytical ones with default settings.

    Raises:
        TypeError: ``teachers`` is a string.
        ValueError: A kind that does not exist.
    """

    def __init__(self, teachers: Sequence[AnyTeacher | str]) -> None:
        if isinstance(teachers, str):
            raise TypeError(f"teachers must be a sequence, as in [{teachers!r}], not a string")
        self.teachers: tuple[AnyTeacher, ...] = tuple(
            Teacher(t) if isinstance(t, str) else t for t in teachers
        )
        self._analytical = {k: t for k, t in enumerate(self.teachers) if isinstance(t, Teacher)}
        self._torch = {k: t for k, t in enumerate(self.teachers) if not isinstance(t, Teacher)}

    def __len__(self) -> int:
        """How many teachers there are."""
        return len(self.teachers)

    @property
    def names(self) -> tuple[str, ...]:
        """The teachers' kinds; where one stands twice, with what tells them apart."""
        kinds = [teacher.kind for teacher in self.teachers]
        return tuple(
            t.kind if kinds.count(t.kind) == 1 else f"{t.kind}({_apart(t)})" for t in self.teachers
        )

    def initial_state(self, like: Tensor, layout: Layout | None = None) -> Any:
        """The state before the first step.

        Args:
            like: The coordinates, shape (N,).
            layout: Which tensors they are. Where given, a teacher that refuses one of them says
                so here, and not in the first step.

        Raises:
            ValueError: A :class:`TorchTeacher` refuses a tensor, and has no optimizer for others.
        """
        if layout is not None:
            for teacher in self._torch.values():
                if isinstance(teacher, TorchTeacher):
                    teacher.routes(layout, like)
        shape = (len(self._analytical), *like.shape)
        zeros = torch.zeros(shape, dtype=like.dtype, device=like.device)
        if not self._torch:
            return PoolState(zeros, zeros.clone())
        return MixedPoolState(zeros, zeros.clone(), tuple({} for _ in self._torch))

    def step(
        self,
        grads: Tensor,
        state: Any,
        *,
        params: Tensor | None = None,
        layout: Layout | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, Any]:
        """One step of every teacher.

        Args:
            grads: Each teacher's gradient, shape (K, N).
            state: The carried state; not changed.
            params: Each teacher's parameters, shape (K, N), in the coordinates that the gradients
                are in; not changed. Analytical teachers do not look at them.
            layout: Which tensors the coordinates are; likewise.
            backend: As in :func:`amalgam.ops.teacher_step`, for the analytical teachers.

        Returns:
            The updates (K, N), to be subtracted, and the new state. Gradients reach the
            analytical teachers' updates, not the others'.

        Raises:
            ValueError: The pool has a teacher that is not analytical, and ``params`` or ``layout``
                is absent or does not fit, or that teacher refuses a tensor.
        """
        return self._step(grads, state, params, layout, backend, warming=False)

    def _step(
        self,
        grads: Tensor,
        state: Any,
        params: Tensor | None,
        layout: Layout | None,
        backend: str,
        warming: bool,
    ) -> tuple[Tensor, Any]:
        if isinstance(state, PoolState):
            updates, moments = self._analytical_step(grads, state, backend)
            return updates, moments
        if params is None or layout is None:
            absent = "params" if params is None else "layout"
            looking = next(iter(self._torch.values()))
            raise ValueError(f"{absent} must be given: {looking} looks at it")
        if params.shape != grads.shape:
            raise ValueError(
                f"params must have the shape of grads, {tuple(grads.shape)}, "
                f"not {tuple(params.shape)}"
            )
        if layout.numel != grads.shape[1]:
            raise ValueError(
                f"layout must have as many coordinates as grads, {grads.shape[1]}, "
                f"not {layout.numel}"
            )
        rows: dict[int, Tensor] = {}
        updates, moments = self._analytical_step(
            self._of_analytical(grads), PoolState(state.m, state.v), backend
        )
        rows |= dict(zip(self._analytical, updates, strict=True))
        carried = []
        for (k, teacher), old in zip(self._torch.items(), state.torch, strict=True):
            if isinstance(teacher, TorchTeacher):
                rows[k], new = teacher.step(params[k], grads[k], old, layout)
            elif warming:
                rows[k], new = (
                    torch.zeros_like(grads[k]),
                    teacher.warm_up(grads[k], old, layout),
                )
            else:
                rows[k], new = teacher.step(grads[k], old, layout, backend)
            carried.append(new)
        in_order = torch.stack([rows[k] for k in range(len(self))])
        return in_order, MixedPoolState(moments.m, moments.v, tuple(carried))

    def warm_up(
        self,
        grads: Tensor,
        state: Any,
        *,
        params: Tensor | None = None,
        layout: Layout | None = None,
        backend: str = "auto",
    ) -> Any:
        """The state after a warm-up step's gradients (K, N): what teachers carry moves, they stay.

        Of frozen policies that is what their own warm-up moves: moments, and no LSTM.

        Args and Raises: see :meth:`step`.
        """
        return self._step(grads, state, params, layout, backend, warming=True)[1]

    @property
    def coordinatewise(self) -> bool:
        """Whether all teachers' updates of a coordinate depend on its own gradients alone."""
        return not self._torch

    def keep(self, moved: Tensor, new: Any, old: Any) -> Any:
        """The new state of the teachers that moved, and the old one of the others.

        Args:
            moved: Who did, booleans (K,) or, where the coordinates are several optimizees' one
                after another, (K, optimizees).
            new: The state after the step.
            old: The state before it.
        """
        if moved.all():
            return new
        rows = self._of_analytical(moved.reshape(len(self), -1))
        rows = rows.repeat_interleave(new.m.shape[1] // max(rows.shape[1], 1), 1)
        m, v = torch.where(rows, new.m, old.m), torch.where(rows, new.v, old.v)
        if isinstance(new, PoolState) or isinstance(old, PoolState):
            return PoolState(m, v)
        pairs = zip(self._torch, new.torch, old.torch, strict=True)
        return MixedPoolState(m, v, tuple(n if moved[k] else o for k, n, o in pairs))

    def _of_analytical(self, rows: Tensor) -> Tensor:
        """The analytical teachers' rows, of (K, ...)."""
        # An index would be a list of the host's, for whose copy to a GPU every step waits.
        return torch.stack([rows[k] for k in self._analytical]) if self._analytical else rows[:0]

    def _analytical_step(
        self, grads: Tensor, state: PoolState, backend: str
    ) -> tuple[Tensor, PoolState]:
        updates, m, v = ops.teacher_step(
            grads,
            *state,
            kinds=[t.kind for t in self._analytical.values()],
            lr=self._column("lr"),
            beta1=self._column("beta1"),
            beta2=self._column("beta2"),
            eps=self._column("eps"),
            backend=backend,
        )
        return updates, PoolState(m, v)

    def _column(self, name: str) -> list[float]:
        return [getattr(teacher, name) for teacher in self._analytical.values()]


def _apart(teacher: AnyTeacher) -> str:
    """What tells a teacher from others of its kind."""
    return teacher.digest if isinstance(teacher, PolicyTeacher) else f"{teacher.lr:g}"


def state_tensors(state: PoolState | MixedPoolState) -> dict[str, Tensor]:
    """A pool's state as tensors by name, to be kept in a file; see :func:`state_from_tensors`."""
    tensors = {"m": state.m, "v": state.v}
    if isinstance(state, MixedPoolState):
        tensors["torch"] = torch.tensor(len(state.torch))
        for index, carried in enumerate(state.torch):
            for name, tensor in torch_teacher.to_tensors(carried):
                tensors[f"torch.{index}.{name}"] = tensor
    return tensors


def state_from_tensors(
    tensors: Mapping[str, Tensor], device: torch.device | None = None
) -> PoolState | MixedPoolState:
    """The state whose :func:`state_tensors` these are, to the same bits.

    Args:
        tensors: The tensors.
        device: Where the pool is to step; where the tensors are where absent. Teachers that are
            not analytical take theirs from anywhere, and know what they want where.

    Raises:
        KeyError: ``m`` or ``v`` is absent.
    """
    m, v = (tensors[name].to(device=device) for name in PoolState._fields)
    if "torch" not in tensors:
        return PoolState(m, v)
    carried: list[dict[str, Tensor]] = [{} for _ in range(int(tensors["torch"]))]
    for name, tensor in tensors.items():
        if name.startswith("torch."):
            index, _, rest = name.removeprefix("torch.").partition(".")
            carried[int(index)][rest] = tensor
    states = tuple(torch_teacher.from_tensors(entries) for entries in carried)
    return MixedPoolState(m, v, states)
