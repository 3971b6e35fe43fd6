"""What a teacher is, and the analytical teachers, which fused kernels step side by side."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from amalgam import ops
from amalgam.layout import Layout
from amalgam.operations.teacher_kinds import TEACHER_KINDS
from amalgam.policies.policy import Policy
from amalgam.ranges import check_fields

LEARNING_RATES = {name: kind.lr for name, kind in TEACHER_KINDS.items()}


class AnyTeacher(Protocol):
    """What a pool and an optimizer need of a teacher: a way to step one flat vector.

    :class:`Teacher`, :class:`TorchTeacher` and :class:`PolicyTeacher` are teachers, and so is any
    object with these members. Its ``repr`` must say all that decides its steps: a run is resumed
    only with teachers of the same ``repr``.

    Its state is a nest of dictionaries with string keys, lists and tuples, of tensors, numbers,
    strings and ``None``, so that a checkpoint can hold it. A state that comes from a checkpoint has
    its tensors on the CPU: a teacher that steps elsewhere moves them.
    """

    @property
    def kind(self) -> str:
        """What it is, in a word, such as ``"adam"``."""
        ...

    @property
    def label(self) -> str:
        """What tells it from others of its kind, such as its learning rate."""
        ...

    @property
    def lr(self) -> float | None:
        """Its learning rate, or ``None`` where it has none that :meth:`at` could change."""
        ...

    @property
    def policy(self) -> Policy | None:
        """The learned policy that it is, or ``None``; its optimizer is then the policy's."""
        ...

    def at(self, lr: float) -> AnyTeacher:
        """The same teacher at another learning rate, 0 or more.

        Raises:
            ValueError: It has no learning rate.
        """
        ...

    def initial_state(self, like: Tensor, layout: Layout | None = None) -> Any:
        """The state before the first step.

        Args:
            like: The coordinates, shape (N,).
            layout: Which tensors they are, where that is known already.

        Raises:
            ValueError: It can't step one of the tensors.
        """
        ...

    def step(
        self, params: Tensor, grad: Tensor, state: Any, layout: Layout, backend: str = "auto"
    ) -> tuple[Tensor, Any]:
        """One step.

        Args:
            params: The parameters, shape (N,); not changed.
            grad: Their gradient, shape (N,).
            state: The carried state, on any device; not changed.
            layout: Which tensors the coordinates are.
            backend: What computes it, where that is a choice.

        Returns:
            The update (N,), to be subtracted, and the new state.
        """
        ...

    def warm_up(self, params: Tensor, grad: Tensor, state: Any, layout: Layout) -> Any:
        """The state after a warm-up step, in which SGD moves the parameters; as in :meth:`step`."""
        ...


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

    policy: ClassVar[None] = None

    kind: str
    lr: float | None = None
    beta1: float = 0.9
    beta2: float | None = None
    eps: float = 1e-10

    def __post_init__(self) -> None:
        """Fill in what depends on the kind, and refuse what can't be computed."""
        if self.kind not in ops.KINDS:
            raise ValueError(f"kind must be one of {list(ops.KINDS)}, not {self.kind!r}")
        if self.lr is None:
            object.__setattr__(self, "lr", TEACHER_KINDS[self.kind].lr)
        if self.beta2 is None:
            object.__setattr__(self, "beta2", TEACHER_KINDS[self.kind].beta2)
        check_fields(self, decays=("beta1", "beta2"), positive=("lr", "eps"))

    @property
    def label(self) -> str:
        """Its learning rate."""
        return f"{self.lr:g}"

    def at(self, lr: float) -> Teacher:
        """The same teacher at another learning rate, 0 or more."""
        # A scheduler may set a rate of 0, which is refused where a teacher is made.
        other = copy.copy(self)
        object.__setattr__(other, "lr", lr)
        return other

    def initial_state(self, like: Tensor, layout: Layout | None = None) -> dict[str, Tensor]:
        """Moments of zero, (1, N) each."""
        m = torch.zeros(1, *like.shape, dtype=like.dtype, device=like.device)
        return {"m": m, "v": m.clone()}

    def step(
        self,
        params: Tensor,
        grad: Tensor,
        state: dict[str, Tensor],
        layout: Layout,
        backend: str = "auto",
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step; see :meth:`AnyTeacher.step`. ``params`` and ``layout`` are not used."""
        m, v = (state[name].to(grad.device) for name in ("m", "v"))
        updates, m, v = step_together([self], grad[None], m, v, backend=backend)
        return updates[0], {"m": m, "v": v}

    def warm_up(
        self, params: Tensor, grad: Tensor, state: dict[str, Tensor], layout: Layout
    ) -> dict[str, Tensor]:
        """The state after a warm-up step: the moments see its gradient."""
        return self.step(params, grad, state, layout)[1]


def step_together(
    teachers: Sequence[Teacher], grads: Tensor, m: Tensor, v: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of K analytical teachers in one call of :func:`amalgam.ops.teacher_step`.

    Args:
        teachers: The teachers.
        grads: Each teacher's gradient, shape (K, N).
        m: Their first moments, likewise.
        v: Their second moments, likewise.
        backend: As in :func:`amalgam.ops.teacher_step`.

    Returns:
        The updates (to be subtracted), and the new m and v, each (K, N).
    """

    def column(name: str) -> list[Any]:
        return [getattr(teacher, name) for teacher in teachers]

    return ops.teacher_step(
        *(grads, m, v, column("kind")),
        *(column(name) for name in ("lr", "beta1", "beta2", "eps")),
        backend=backend,
    )
