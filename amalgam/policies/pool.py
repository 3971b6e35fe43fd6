"""A pool: teachers that step side by side, each on its own trajectory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amalgam import nests
from amalgam.hints import did_you_mean
from amalgam.layout import Layout
from amalgam.lr_decays import LR_DECAYS, factor_at
from amalgam.policies.teachers import AnyTeacher, Teacher, step_together

_MEMBERS = tuple(name for name in vars(AnyTeacher) if not name.startswith("_"))


class PoolState(NamedTuple):
    """The state of a pool, for N coordinates.

    Attributes:
        m: First moments of the A analytical teachers, shape (A, N); rows of teachers without one
            stay zero.
        v: Their second moments, likewise.
        others: The states of the other teachers, one each.
    """

    m: Tensor
    v: Tensor
    others: tuple[Any, ...] = ()


class Pool:
    """Several teachers, each on its own trajectory.

    One call of a fused kernel steps all analytical teachers; the others step one by one. The state
    is a :class:`PoolState`, which :func:`state_tensors` makes fit for a file.

    Args:
        teachers: The teachers: :class:`Teacher`, :class:`TorchTeacher`, :class:`PolicyTeacher`, or
            any :class:`AnyTeacher`; a kind stands for the analytical one with default settings.
        lr_decays: How each teacher's learning rate goes on over an episode, one of
            :data:`amalgam.lr_decays.LR_DECAYS` a teacher; constant where absent. Meta-training
            multiplies the updates by :meth:`lr_factors`; :meth:`step` does not.

    Raises:
        TypeError: ``teachers`` is a string, or one of them is no teacher.
        ValueError: A kind or a decay that does not exist, or not as many decays as teachers.
    """

    def __init__(
        self, teachers: Sequence[AnyTeacher | str], lr_decays: Sequence[str] | None = None
    ) -> None:
        if isinstance(teachers, str):
            raise TypeError(f"teachers must be a sequence, as in [{teachers!r}], not a string")
        self.teachers: tuple[AnyTeacher, ...] = tuple(
            Teacher(t) if isinstance(t, str) else t for t in teachers
        )
        for index, teacher in enumerate(self.teachers):
            _check(teacher, f"teachers[{index}]")
        self.lr_decays = tuple(lr_decays or ["constant"] * len(self.teachers))
        if len(self.lr_decays) != len(self.teachers):
            raise ValueError(
                f"lr_decays must be {len(self.teachers)}, a teacher each, not {self.lr_decays}"
            )
        for decay in self.lr_decays:
            if decay not in LR_DECAYS:
                raise ValueError(
                    f"lr_decays must be of {list(LR_DECAYS)}, not {decay!r}"
                    f"{did_you_mean(decay, LR_DECAYS)}"
                )
        self._analytical = {k: t for k, t in enumerate(self.teachers) if isinstance(t, Teacher)}
        self._others = {k: t for k, t in enumerate(self.teachers) if k not in self._analytical}

    def __len__(self) -> int:
        """How many teachers there are."""
        return len(self.teachers)

    @property
    def names(self) -> tuple[str, ...]:
        """The teachers' kinds, with their labels and decays where a kind stands twice."""
        kinds = [teacher.kind for teacher in self.teachers]
        return tuple(
            t.kind
            if kinds.count(t.kind) == 1
            else f"{t.kind}({t.label}{'' if decay == 'constant' else f', {decay}'})"
            for t, decay in zip(self.teachers, self.lr_decays, strict=True)
        )

    @property
    def decays(self) -> bool:
        """Whether any teacher's learning rate decays over an episode."""
        return any(decay != "constant" for decay in self.lr_decays)

    def lr_factors(self, step: int, horizon: int) -> list[float]:
        """What is left of each teacher's learning rate at a step of an episode, a factor each.

        Args:
            step: The step, from 0, after the warm-up.
            horizon: Steps of the episode.
        """
        return [factor_at(decay, step, horizon) for decay in self.lr_decays]

    @property
    def coordinatewise(self) -> bool:
        """Whether all teachers' updates of a coordinate depend on its own gradients alone."""
        return not self._others

    def initial_state(self, like: Tensor, layout: Layout | None = None) -> PoolState:
        """The state before the first step.

        Args:
            like: The coordinates, shape (N,).
            layout: Which tensors they are. Where given, a teacher that refuses one of them says
                so here, and not in the first step.

        Raises:
            ValueError: A teacher refuses a tensor.
            TypeError: A teacher's state is nothing that a file can hold.
        """
        shape = (len(self._analytical), *like.shape)
        zeros = torch.zeros(shape, dtype=like.dtype, device=like.device)
        others = tuple(t.initial_state(like, layout) for t in self._others.values())
        for teacher, state in zip(self._others.values(), others, strict=True):
            try:
                nests.to_named(state)
            except TypeError as error:
                raise TypeError(f"{teacher}: {error}") from error
        return PoolState(zeros, zeros.clone(), others)

    def step(
        self,
        grads: Tensor,
        state: PoolState,
        *,
        params: Tensor | None = None,
        layout: Layout | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, PoolState]:
        """One step of every teacher.

        Args:
            grads: Each teacher's gradient, shape (K, N).
            state: The carried state; not changed.
            params: Each teacher's parameters, shape (K, N), in the coordinates that the gradients
                are in; not changed. Analytical teachers do not use them.
            layout: Which tensors the coordinates are; likewise.
            backend: As in :func:`amalgam.ops.teacher_step`, and for the steps of policies.

        Returns:
            The updates (K, N), to be subtracted, and the new state. Gradients reach the
            analytical teachers' updates, not the others'.

        Raises:
            ValueError: The pool has a teacher that is not analytical, and ``params`` or ``layout``
                is absent or does not fit, or that teacher refuses a tensor.
        """
        calls = self._calls(grads, state, params, layout)
        updates, m, v = self._step_analytical(grads, state, backend)
        if not calls:
            return updates, PoolState(m, v)
        rows = dict(zip(self._analytical, updates, strict=True))
        others = []
        with torch.no_grad():
            for k, teacher, arguments in calls:
                update, new = teacher.step(*arguments, backend)
                if update.shape != grads[k].shape:
                    raise ValueError(
                        f"the update of {teacher} must have the shape of its gradient, "
                        f"{tuple(grads[k].shape)}, not {tuple(update.shape)}"
                    )
                rows[k] = update
                others.append(new)
        return torch.stack([rows[k] for k in range(len(self))]), PoolState(m, v, tuple(others))

    def warm_up(
        self,
        grads: Tensor,
        state: PoolState,
        *,
        params: Tensor | None = None,
        layout: Layout | None = None,
        backend: str = "auto",
    ) -> PoolState:
        """The state after a warm-up step's gradients (K, N); no teacher moves its parameters.

        The moments of analytical teachers move; the other teachers have a ``warm_up`` of their own.

        Args and Raises: see :meth:`step`.
        """
        calls = self._calls(grads, state, params, layout)
        _, m, v = self._step_analytical(grads, state, backend)
        with torch.no_grad():
            others = tuple(teacher.warm_up(*arguments) for _, teacher, arguments in calls)
        return PoolState(m, v, others)

    def keep(self, moved: Tensor | None, new: PoolState, old: PoolState) -> PoolState:
        """The new state of the teachers that moved, and the old one of the others.

        Args:
            moved: Which teachers moved, booleans (K,); or (K, optimizees), where the coordinates
                are those of several optimizees, one after another; ``None`` means all.
            new: The state after the step.
            old: The state before it.
        """
        if moved is None or moved.all():
            return new
        rows = self._of_analytical(moved.reshape(len(self), -1))
        rows = rows.repeat_interleave(new.m.shape[1] // max(rows.shape[1], 1), 1)
        m, v = torch.where(rows, new.m, old.m), torch.where(rows, new.v, old.v)
        pairs = zip(self._others, new.others, old.others, strict=True)
        return PoolState(m, v, tuple(n if moved[k] else o for k, n, o in pairs))

    def _step_analytical(
        self, grads: Tensor, state: PoolState, backend: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The analytical teachers' updates and moments, (A, N) each, from gradients (K, N)."""
        if self._others:
            grads = self._of_analytical(grads)
        teachers = list(self._analytical.values())
        return step_together(teachers, grads, state.m, state.v, backend=backend)

    def _calls(
        self, grads: Tensor, state: PoolState, params: Tensor | None, layout: Layout | None
    ) -> list[tuple[int, AnyTeacher, tuple[Tensor, Tensor, Any, Layout]]]:
        """The teachers that step one by one: place in the pool, teacher, and arguments of its step.

        Raises:
            ValueError: There are such teachers, and ``params`` or ``layout`` is absent or does not
                fit.
        """
        if not self._others:
            return []
        if params is None or layout is None:
            absent = "params" if params is None else "layout"
            user = next(iter(self._others.values()))
            raise ValueError(f"{absent} must be given: {user} looks at it")
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
        pairs = zip(self._others.items(), state.others, strict=True)
        return [(k, t, (params[k], grads[k], old, layout)) for (k, t), old in pairs]

    def _of_analytical(self, rows: Tensor) -> Tensor:
        """The analytical teachers' rows, of (K, ...)."""
        # Indexing by a list would copy that list to the GPU in every step, and wait for it.
        return torch.stack([rows[k] for k in self._analytical]) if self._analytical else rows[:0]


def _check(teacher: object, name: str) -> None:
    """Raise TypeError unless an object is a teacher."""
    absent = [member for member in _MEMBERS if not hasattr(teacher, member)]
    if absent:
        raise TypeError(
            f"{name} must be a kind or a teacher (see amalgam.policies.AnyTeacher), not "
            f"{teacher!r}, which lacks {', '.join(absent)}"
        )
    if type(teacher).__repr__ is object.__repr__:
        raise TypeError(
            f"{name} must say in its repr() all that decides its steps, as runs are resumed only "
            f"with teachers of the same repr; give {type(teacher).__qualname__} a __repr__, or "
            f"make it a dataclass"
        )


def state_tensors(state: PoolState) -> dict[str, Tensor]:
    """A pool's state as tensors by name, to be kept in a file; see :func:`state_from_tensors`.

    Raises:
        TypeError: A teacher's state is nothing that a file can hold.
    """
    tensors = {"m": state.m, "v": state.v}
    for index, other in enumerate(state.others):
        tensors |= {f"others.{index}.{name}": t for name, t in nests.to_named(other).items()}
    return tensors


def state_from_tensors(
    tensors: Mapping[str, Tensor], device: torch.device | None = None
) -> PoolState:
    """The state whose :func:`state_tensors` these are, to the same bits.

    Args:
        tensors: The tensors.
        device: Where the pool is to step; where the tensors are where absent. The states of
            teachers that are not analytical stay where the tensors are; such teachers move them.

    Raises:
        KeyError: ``m`` or ``v`` is absent.
        ValueError: An earlier version of amalgam made them.
    """
    if "torch" in tensors:
        raise ValueError(
            "the pool's state is of an earlier version of amalgam, which kept the states of "
            "teachers that are not analytical in another form; begin the run anew in another "
            "folder, or go on with it by that version"
        )
    m, v = (tensors[name].to(device=device) for name in ("m", "v"))
    others: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("others."):
            index, _, rest = name.removeprefix("others.").partition(".")
            others.setdefault(int(index), {})[rest] = tensor
    return PoolState(m, v, tuple(nests.from_named(others[i]) for i in range(len(others))))
