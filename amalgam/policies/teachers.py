"""The teachers: a pool of analytical optimizers that step side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from amalgam import ops

LEARNING_RATES = {
    "sgd": 0.2,
    "momentum": 0.5,
    "rmsprop": 0.005,
    "adam": 0.005,
    "powersign": 0.1,
    "addsign": 0.1,
    "adaptive_powersign": 0.005,
    "adaptive_addsign": 0.005,
}


@dataclass(frozen=True)
class Teacher:
    """One analytical teacher; its update rule stands in :mod:`amalgam.ops.teacher_step`.

    Attributes:
        kind: One of :data:`amalgam.ops.KINDS`.
        lr: Learning rate; the paper's for that kind where ``None`` (the two adaptive variants,
            which it does not rate, take RMSProp's).
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1); 0.9 for RMSProp, else 0.999, where ``None``.
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
            object.__setattr__(self, "lr", LEARNING_RATES[self.kind])
        if self.beta2 is None:
            object.__setattr__(self, "beta2", 0.9 if self.kind == "rmsprop" else 0.999)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)}")
        for name in ("lr", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")


class PoolState(NamedTuple):
    """What K teachers carry from step to step, for N coordinates each.

    Attributes:
        m: First moments, shape (K, N); rows of teachers without one stay zero.
        v: Second moments, likewise.
    """

    m: Tensor
    v: Tensor


class Pool:
    """Several teachers, each on its own trajectory.

    Args:
        teachers: The teachers, or their kinds for those with default settings.

    Raises:
        TypeError: ``teachers`` is a string.
        ValueError: A kind that does not exist.
    """

    def __init__(self, teachers: Sequence[Teacher | str]) -> None:
        if isinstance(teachers, str):
            raise TypeError(f"teachers must be a sequence, as in [{teachers!r}], not a string")
        self.teachers = tuple(t if isinstance(t, Teacher) else Teacher(t) for t in teachers)

    def __len__(self) -> int:
        """How many teachers there are."""
        return len(self.teachers)

    @property
    def names(self) -> tuple[str, ...]:
        """The teachers' kinds; where one stands twice, with its learning rate."""
        kinds = [teacher.kind for teacher in self.teachers]
        return tuple(
            t.kind if kinds.count(t.kind) == 1 else f"{t.kind}({t.lr:g})" for t in self.teachers
        )

    def initial_state(self, like: Tensor) -> PoolState:
        """The zero state for coordinates like these, of shape (N,)."""
        shape = (len(self), *like.shape)
        zeros = torch.zeros(shape, dtype=like.dtype, device=like.device)
        return PoolState(zeros, zeros.clone())

    def step(
        self, grads: Tensor, state: PoolState, *, backend: str = "auto"
    ) -> tuple[Tensor, PoolState]:
        """One step of every teacher.

        Args:
            grads: Each teacher's gradient, shape (K, N).
            state: The carried state.
            backend: As in :func:`amalgam.ops.teacher_step`.

        Returns:
            The updates (K, N), to be subtracted, and the new state.
        """
        updates, m, v = ops.teacher_step(
            grads,
            *state,
            kinds=[t.kind for t in self.teachers],
            lr=self._column("lr"),
            beta1=self._column("beta1"),
            beta2=self._column("beta2"),
            eps=self._column("eps"),
            backend=backend,
        )
        return updates, PoolState(m, v)

    def warm_up(self, grads: Tensor, state: PoolState, *, backend: str = "auto") -> PoolState:
        """The state after a warm-up step's gradients (K, N): the moments move."""
        return self.step(grads, state, backend=backend)[1]

    def _column(self, name: str) -> list[float]:
        return [getattr(teacher, name) for teacher in self.teachers]
