"""A policy's steps as an unroll takes them: forward without a graph, and backward by hand.

A student trains B optimizees of N coordinates; what it carries for them is one *state* here,
whatever that is. Rows that stand still at a step keep theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from amalgam.layout import Layout
from amalgam.meta.finite import keep
from amalgam.operations import lstm
from amalgam.operations.student_step import backward_into, step_into
from amalgam.ops import StudentState
from amalgam.policies import Policy, Student

# A row's number at a step -> the source of the noise that a policy trains with there.
Draws = Callable[[int], torch.Generator | None]


class Steps(Protocol):
    """What an unroll asks of a policy."""

    def initial(self, like: Tensor) -> Any:
        """The state before the first step, for optimizees like these (B, N)."""

    def warm_up(self, grads: Tensor, state: Any, moved: Tensor) -> Any:
        """The state after a warm-up step's gradients (B, N), for rows that moved (B,)."""

    def forward(
        self,
        grads: Tensor,
        state: Any,
        weights: Sequence[Tensor],
        moved: Tensor,
        draws: Draws,
        reuse: bool,
    ) -> tuple[Tensor, Any]:
        """The updates (B, N), and the new state, which may lie where the old one does if reuse."""

    def backward(
        self,
        d_updates: Tensor,
        d_state: Any,
        grads: Tensor,
        state: Any,
        weights: Sequence[Tensor],
        moved: Tensor,
        draws: Draws,
    ) -> tuple[Tensor, Any, list[Tensor]]:
        """Gradients in grads, the old state (may lie where ``d_state`` does) and the weights."""

    def zeros(self, state: Any) -> Any:
        """A gradient of nothing in a state."""

    def release(self, state: Any) -> None:
        """Take back the memory of a state that nobody needs any more."""

    def stored(self, state: Any, cells: torch.dtype) -> Any:
        """The state with its cells in another dtype."""


class FusedSteps:
    """The student's steps by its fused operations, in memory that is used again and again.

    Args:
        student: The student.
        backend: Computes them.
    """

    def __init__(self, student: Student, backend: str) -> None:
        self._student = student
        self._settings = student.config.settings
        self._backend = backend
        self._spare: dict[tuple[torch.Size, torch.dtype], list[StudentState]] = {}

    def initial(self, like: Tensor) -> StudentState:
        """See :class:`Steps`; one zero is seen as all of it, for steps make another anyway."""
        weights = self._student.weights()
        layers, hidden = lstm.architecture(weights, 1)
        zero, n = weights[0].new_zeros(()), like.numel()
        cells = zero.expand(layers, hidden, n)
        return StudentState(zero.expand(n), zero.expand(n), cells, cells)

    def warm_up(self, grads: Tensor, state: StudentState, moved: Tensor) -> StudentState:
        """See :class:`Steps`."""
        new = self._student.warm_up(grads.reshape(-1), state)
        warmed: StudentState = keep(new, state, moved, grads.shape[1])
        return warmed

    def forward(
        self,
        grads: Tensor,
        state: StudentState,
        weights: Sequence[Tensor],
        moved: Tensor,
        draws: Draws,
        reuse: bool,
    ) -> tuple[Tensor, StudentState]:
        """See :class:`Steps`."""
        flat = grads.reshape(-1)
        new, source = (state if reuse else self._take(state)), state
        if not state.h.is_contiguous():
            # The first step's: in the new state's place there is one copy of it and not two.
            for to, value in zip(new, state, strict=True):
                to.copy_(value)
            source = new
        update = torch.empty_like(flat)
        step_into(update, new, flat, source, weights, self._settings, self._backend)
        return update.view(grads.shape), keep(new, state, moved, grads.shape[1])

    def backward(
        self,
        d_updates: Tensor,
        d_state: StudentState,
        grads: Tensor,
        state: StudentState,
        weights: Sequence[Tensor],
        moved: Tensor,
        draws: Draws,
    ) -> tuple[Tensor, StudentState, list[Tensor]]:
        """See :class:`Steps`."""
        n = grads.shape[1]
        went = d_state
        if not moved.all():
            d_updates = torch.where(moved[:, None], d_updates, 0)
            nothing = StudentState(*(torch.zeros_like(tensor) for tensor in d_state))
            went = keep(d_state, nothing, moved, n)
        d_grads, d_weights = backward_into(
            d_updates.reshape(-1),
            went,
            grads.reshape(-1),
            state,
            weights,
            self._settings,
            self._backend,
        )
        return d_grads.view(grads.shape), keep(went, d_state, moved, n), d_weights

    def zeros(self, state: StudentState) -> StudentState:
        """See :class:`Steps`."""
        zeros = self._take(state)
        for tensor in zeros:
            tensor.zero_()
        return zeros

    def release(self, state: StudentState) -> None:
        """See :class:`Steps`."""
        self._spare.setdefault((state.h.shape, state.h.dtype), []).append(state)

    def stored(self, state: StudentState, cells: torch.dtype) -> StudentState:
        """See :class:`Steps`."""
        stored = self._take(state, cells)
        for to, value in zip(stored, state, strict=True):
            to.copy_(value)
        return stored

    def _take(self, like: StudentState, cells: torch.dtype | None = None) -> StudentState:
        cells = cells or like.h.dtype
        spare = self._spare.get((like.h.shape, cells))
        if spare:
            return spare.pop()
        dtypes = (like.m.dtype, like.v.dtype, cells, cells)
        return StudentState(
            *(
                torch.empty(t.shape, dtype=dtype, device=t.device)
                for t, dtype in zip(like, dtypes, strict=True)
            )
        )


class AutogradSteps:
    """Any policy's steps, a row after another, differentiated by autograd.

    A state is a tuple of the rows' own, a gradient in it a list of the rows' tensors.

    Args:
        policy: The policy.
        layout: Which tensors an optimizee's coordinates are.
        backend: Computes what is fused in it.
    """

    def __init__(self, policy: Policy, layout: Layout, backend: str) -> None:
        self._policy = policy
        self._layout = layout
        self._backend = backend

    def initial(self, like: Tensor) -> tuple[Any, ...]:
        """See :class:`Steps`."""
        return tuple(self._policy.initial_state(row, self._layout) for row in like)

    def warm_up(self, grads: Tensor, state: tuple[Any, ...], moved: Tensor) -> tuple[Any, ...]:
        """See :class:`Steps`."""
        return tuple(
            self._policy.warm_up(grad, old, layout=self._layout) if ok else old
            for grad, old, ok in zip(grads, state, moved, strict=True)
        )

    def forward(
        self,
        grads: Tensor,
        state: tuple[Any, ...],
        weights: Sequence[Tensor],
        moved: Tensor,
        draws: Draws,
        reuse: bool,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """See :class:`Steps`."""
        updates, new = [], []
        for row, (grad, old, ok) in enumerate(zip(grads, state, moved, strict=True)):
            update, after = torch.zeros_like(grad), old
            if ok:
                update, after = self._step(grad, old, weights, draws(row))
            updates.append(update)
            new.append(after)
        return torch.stack(updates), tuple(new)

    def backward(
        self,
        d_updates: Tensor,
        d_state: list[list[Tensor]],
        grads: Tensor,
        state: tuple[Any, ...],
        weights: Sequence[Tensor],
        moved: Tensor,
        draws: Draws,
    ) -> tuple[Tensor, list[list[Tensor]], list[Tensor]]:
        """See :class:`Steps`."""
        d_grads, before = torch.zeros_like(grads), list(d_state)
        d_weights = [torch.zeros_like(w) for w in weights]
        for row in moved.nonzero().flatten().tolist():
            old = tensors_of(state[row])
            leaves = [t.detach().requires_grad_() for t in (grads[row], *old, *weights)]
            rest = len(old) + 1
            with torch.enable_grad():
                update, new = self._step(
                    leaves[0], with_tensors(state[row], leaves[1:rest]), leaves[rest:], draws(row)
                )
            outs = (update, *tensors_of(new))
            d_outs = (d_updates[row], *d_state[row])
            pairs = [(o, d) for o, d in zip(outs, d_outs, strict=True) if o.requires_grad]
            found = torch.autograd.grad(
                [out for out, _ in pairs],
                leaves,
                [d for _, d in pairs],
                allow_unused=True,
                materialize_grads=True,
            )
            d_grads[row] = found[0]
            before[row] = list(found[1:rest])
            torch._foreach_add_(d_weights, found[rest:])
        return d_grads, before, d_weights

    def zeros(self, state: tuple[Any, ...]) -> list[list[Tensor]]:
        """See :class:`Steps`."""
        return [[torch.zeros_like(tensor) for tensor in tensors_of(row)] for row in state]

    def release(self, state: tuple[Any, ...]) -> None:
        """See :class:`Steps`; every step has memory of its own."""

    def stored(self, state: tuple[Any, ...], cells: torch.dtype) -> tuple[Any, ...]:
        """See :class:`Steps`; kept as they are."""
        return state

    def _step(
        self,
        grad: Tensor,
        state: Any,
        weights: Sequence[Tensor],
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Any]:
        return self._policy.step(
            grad,
            state,
            weights,
            layout=self._layout,
            generator=generator,
            backend=self._backend,
        )


def tensors_of(state: Any) -> list[Tensor]:
    """The tensors that stand in a nest of tuples, in order."""
    if isinstance(state, Tensor):
        return [state]
    return [t for part in state for t in tensors_of(part)] if isinstance(state, tuple) else []


def with_tensors(state: Any, tensors: Sequence[Tensor]) -> Any:
    """The nest with other tensors in its tensors' places."""
    left = iter(tensors)

    def put(part: Any) -> Any:
        if isinstance(part, Tensor):
            return next(left)
        if isinstance(part, tuple):
            parts = [put(inner) for inner in part]
            return type(part)(*parts) if hasattr(part, "_fields") else tuple(parts)
        return part

    return put(state)
