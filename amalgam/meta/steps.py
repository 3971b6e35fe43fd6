"""A policy's steps as an unroll takes them: forward without a graph, and backward by hand.

The carried state of one student and its optimizees is a *state* here, whatever the policy keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from amalgam.ops import StudentState
from amalgam.ops.student_step import backward_into, step_into
from amalgam.policies import Student


class Steps(Protocol):
    """What an unroll asks of a policy."""

    in_place: bool

    def forward(
        self, grad: Tensor, state: Any, weights: Sequence[Tensor], reuse: bool
    ) -> tuple[Tensor, Any]:
        """The update and the new state, which may lie where the old one does if ``reuse``."""

    def backward(
        self, d_update: Tensor, d_state: Any, grad: Tensor, state: Any, weights: Sequence[Tensor]
    ) -> tuple[Tensor, Any, list[Tensor]]:
        """Gradients in grad, the old state (may lie where ``d_state`` does) and the weights."""

    def zeros(self, state: Any) -> Any:
        """A gradient of nothing in a state."""

    def release(self, state: Any) -> None:
        """Take back the memory of a state that nobody needs any more."""


class FusedSteps:
    """The student's steps by its fused operations, in memory that is used again and again.

    Args:
        student: The student.
        backend: Computes them.
    """

    in_place = True

    def __init__(self, student: Student, backend: str) -> None:
        self._settings = student.config.settings
        self._backend = backend
        self._spare: list[StudentState] = []

    def forward(
        self, grad: Tensor, state: StudentState, weights: Sequence[Tensor], reuse: bool
    ) -> tuple[Tensor, StudentState]:
        """See :class:`Steps`."""
        new = state if reuse else self._take(state)
        update = torch.empty_like(grad)
        step_into((update, *new), grad, state, weights, self._settings, self._backend)
        return update, new

    def backward(
        self,
        d_update: Tensor,
        d_state: StudentState,
        grad: Tensor,
        state: StudentState,
        weights: Sequence[Tensor],
    ) -> tuple[Tensor, StudentState, list[Tensor]]:
        """See :class:`Steps`."""
        d_grad, d_weights = backward_into(
            d_update, d_state, grad, state, weights, self._settings, self._backend
        )
        return d_grad, d_state, d_weights

    def zeros(self, state: StudentState) -> StudentState:
        """See :class:`Steps`."""
        zeros = self._take(state)
        for tensor in zeros:
            tensor.zero_()
        return zeros

    def release(self, state: StudentState) -> None:
        """See :class:`Steps`."""
        self._spare.append(state)

    def _take(self, like: StudentState) -> StudentState:
        while self._spare:
            spare = self._spare.pop()
            if spare.h.shape == like.h.shape and spare.h.dtype == like.h.dtype:
                return spare
        return StudentState(*(torch.empty_like(tensor) for tensor in like))


class AutogradSteps:
    """Any policy's steps, differentiated by autograd.

    Args:
        policy: Has ``step(grad, state, weights, backend=) -> (update, state)``, its state a tuple
            in which tensors and numbers stand.
        backend: Computes what is fused in it.
    """

    in_place = False

    def __init__(self, policy: Any, backend: str) -> None:
        self._policy = policy
        self._backend = backend

    def forward(
        self, grad: Tensor, state: Any, weights: Sequence[Tensor], reuse: bool
    ) -> tuple[Tensor, Any]:
        """See :class:`Steps`."""
        with torch.no_grad():
            update, new = self._policy.step(grad, state, weights, backend=self._backend)
        return update, new

    def backward(
        self, d_update: Tensor, d_state: Any, grad: Tensor, state: Any, weights: Sequence[Tensor]
    ) -> tuple[Tensor, Any, list[Tensor]]:
        """See :class:`Steps`."""
        old, rebuild = _tensors_of(state)
        leaves = [t.detach().requires_grad_() for t in (grad, *old, *weights)]
        with torch.enable_grad():
            update, new = self._policy.step(
                leaves[0],
                rebuild(leaves[1 : 1 + len(old)]),
                leaves[1 + len(old) :],
                backend=self._backend,
            )
        pairs = [
            (out, d)
            for out, d in zip((update, *_tensors_of(new)[0]), (d_update, *d_state), strict=True)
            if out.requires_grad
        ]
        found = torch.autograd.grad(
            [out for out, _ in pairs],
            leaves,
            [d for _, d in pairs],
            allow_unused=True,
            materialize_grads=True,
        )
        return found[0], list(found[1 : 1 + len(old)]), list(found[1 + len(old) :])

    def zeros(self, state: Any) -> list[Tensor]:
        """See :class:`Steps`."""
        return [torch.zeros_like(tensor) for tensor in _tensors_of(state)[0]]

    def release(self, state: Any) -> None:
        """See :class:`Steps`."""


class _Rebuild(NamedTuple):
    """Puts tensors back where they stood in a state."""

    state: Any

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        left = iter(tensors)

        def put(part: Any) -> Any:
            if isinstance(part, Tensor):
                return next(left)
            if isinstance(part, tuple):
                parts = [put(inner) for inner in part]
                return type(part)(*parts) if hasattr(part, "_fields") else tuple(parts)
            return part

        return put(self.state)


def _tensors_of(state: Any) -> tuple[list[Tensor], _Rebuild]:
    """The floating-point tensors that stand in a nest of tuples, and what puts others there."""

    def walk(part: Any) -> list[Tensor]:
        if isinstance(part, Tensor):
            return [part]
        return [t for inner in part for t in walk(inner)] if isinstance(part, tuple) else []

    return walk(state), _Rebuild(state)
