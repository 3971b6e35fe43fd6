"""Policies' steps in a window: forward without a graph, and backward without autograd's tape.

S policies of one kind, each with weights of its own, step side by side. Each trains B optimizees of
N coordinates; each optimizee is a *row*, R = S * B in all. All that the policies carry from step to
step for these rows is one *state*, of whatever type. A row that does not move in a step keeps its
part of the state.

:class:`FusedSteps` takes the steps of students, :class:`AutogradSteps` those of any other policies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from amalgam import nests
from amalgam.layout import Layout
from amalgam.meta.finite import keep
from amalgam.operations.kept import KeptOfOneStream
from amalgam.operations.student_step import backward_into, step_into
from amalgam.ops import StepSettings, StudentState
from amalgam.policies import FusedStudent, Policy
from amalgam.policies.fused_student import TensorContext
from amalgam.policies.orthogonal import orthogonalized_rows, orthogonalized_rows_backward
from amalgam.seeding import global_states

# Called with a row's number, of all rows; returns the generator of the noise that its policy trains
# with, for a certain step.
RowDraws = Callable[[int], torch.Generator | None]


class PolicySteps(Protocol):
    """What the unroll engine (:class:`amalgam.meta.Unroll`) asks of a policy.

    Attributes:
        by_coordinates: Whether :func:`amalgam.ops.student_unroll_backward` can go back through
            these steps. If so, first-order meta-gradients need no kept points, as long as no noise
            is drawn at every step.
        finishes: Whether :meth:`finished` changes updates.
    """

    by_coordinates: bool
    finishes: bool

    def initial(self, like: Tensor) -> Any:
        """The state before the first step, for parameters of this shape (S, B, N)."""

    def warm_up(self, grads: Tensor, state: Any, moved: Tensor) -> Any:
        """The state after a warm-up step.

        Args:
            grads: The gradients, shape (S, B, N).
            state: The state before the step; not changed.
            moved: Which rows take the step, shape (S, B).
        """

    def context(self, params: Tensor, state: Any, grads: Tensor, left: Tensor | None) -> Any:
        """What policies are told of whole tensors in the step after a state; ``None`` if nothing.

        Where ``by_coordinates``, the backward pass by coordinates asks for it again.

        Args:
            params: The parameters before the step, shape (S, B, N).
            state: The state before it.
            grads: The gradients, shape (S, B, N).
            left: What schedules have left of the rows' learning rates, shape (S, B); ``None`` where
                there is no schedule.
        """

    def forward(
        self,
        params: Tensor,
        grads: Tensor,
        state: Any,
        weights: Sequence[Tensor],
        moved: Tensor | None,
        draws: RowDraws,
        left: Tensor | None,
        reuse: bool,
    ) -> tuple[Tensor, Any]:
        """One step.

        Args:
            params: The parameters before the step, shape (S, B, N).
            grads: The gradients, shape (S, B, N).
            state: The state before the step; not changed unless ``reuse``.
            weights: The policies' weights, each with a first dimension of S; never written to.
            moved: Which rows are to move, shape (S, B); ``None`` means all.
            draws: Returns the generator of a row's noise that its policy trains with.
            left: As in :meth:`context`.
            reuse: Whether the new state may overwrite the old one.

        Returns:
            The updates (S, B, N), to be subtracted as :meth:`finished` makes them, and the new
            state.
        """

    def finished(self, updates: Tensor) -> Tensor:
        """The policies' updates, of what :meth:`forward` gave, (rows, N), of any number of rows."""

    def finished_backward(self, d_updates: Tensor, updates: Tensor) -> Tensor:
        """Back through :meth:`finished`, without a graph.

        Args:
            d_updates: Gradients with respect to what it returned, shape (rows, N).
            updates: What it was given.
        """

    def backward(
        self,
        d_updates: Tensor,
        d_state: Any,
        params: Tensor,
        grads: Tensor,
        state: Any,
        weights: Sequence[Tensor],
        moved: Tensor | None,
        draws: RowDraws,
        left: Tensor | None,
    ) -> tuple[Tensor, Any, list[Tensor]]:
        """Back through one step.

        Args:
            d_updates: Gradients with respect to the updates that :meth:`forward` gave, shape
                (S, B, N).
            d_state: The gradient with respect to the new state. It may be overwritten with the one
                that is returned.
            params: As in :meth:`forward`, like all that follows.
            grads: The gradients.
            state: The state before the step.
            weights: The policies' weights.
            moved: Which rows moved; ``None`` means all.
            draws: Returns the generator of a row's noise, as in the forward step.
            left: As in :meth:`context`.

        Returns:
            Gradients with respect to ``grads``, to the state before the step, and to the weights.
        """

    def zeros(self, state: Any) -> Any:
        """A gradient of zero with respect to a state, to begin :meth:`backward` with."""

    def release(self, state: Any) -> None:
        """Let later states use the memory of one that nobody needs any more.

        The same goes for a gradient with respect to a state.
        """

    def apart(self) -> AbstractContextManager[None]:
        """Within the block, memory is other than before and after it."""

    def stored(self, state: Any, cells: torch.dtype) -> Any:
        """A copy of the state to keep, whose recurrent state (h and c) has the dtype ``cells``.

        It may be the state itself if the policy has no such copy.
        """


class _Folds(NamedTuple):
    """What students' weights are to the operation, but for what depends on a step's context.

    Attributes:
        of: The weights, the very list: who draws noise for a step makes another one.
        made: What they are.
    """

    of: Sequence[Tensor] | None = None
    made: Sequence[Tensor] = ()


class FusedSteps:
    """Students' steps by their fused operations; released states' memory serves later states.

    A state's tensors have a first dimension of S; each student's coordinates, or tensors, are those
    of its B optimizees, one's after another's.

    Args:
        student: A student of the kind.
        layout: Which tensors an optimizee's coordinates belong to.
        backend: The backend that computes the operations.
    """

    by_coordinates = True

    def __init__(self, student: FusedStudent, layout: Layout, backend: str) -> None:
        self.finishes = student.orthogonal
        self._student = student
        self._layout = layout
        self._backend = backend
        self._spare: dict[tuple[torch.Size, torch.dtype], list[Any]] = {}
        self._kept, self._folds = KeptOfOneStream(), _Folds()

    def initial(self, like: Tensor) -> Any:
        """See :class:`PolicySteps`; the tensors are views of one zero, which no step writes to."""
        none: Any = self._student.initial_state(
            like.new_empty((*like.shape[1:-1], 0)), self._layout
        )
        students, rows, n = like.shape
        zero = self._student.weights()[0].new_zeros(())
        moments = zero.expand(students, rows * n)
        cells = zero.expand(students, *none.h.shape[:2], rows * n)
        rest = (tensor.repeat(students, rows) for tensor in none[4:])
        return type(none)(moments, moments, cells, cells, *rest)

    def warm_up(self, grads: Tensor, state: Any, moved: Tensor) -> Any:
        """See :class:`PolicySteps`."""
        return keep(self._student.warm_up(grads.flatten(1), state), state, moved)

    def context(
        self, params: Tensor, state: Any, grads: Tensor, left: Tensor | None
    ) -> TensorContext | None:
        """See :class:`PolicySteps`; of the rows' tensors, one row's after another's."""
        m, v, h, c, *rest = state
        flat = type(state)(m.reshape(-1), v, h, c, *(tensor.reshape(-1) for tensor in rest))
        given = flat, params.reshape(-1), self._layout, grads.reshape(-1)
        if left is None or not self._student.paced:
            return self._student.context(*given)
        of_tensors = left.reshape(-1, 1).expand(-1, flat.pace.numel() // left.numel())
        return self._student.context(*given, of_tensors.reshape(-1))

    def forward(
        self,
        params: Tensor,
        grads: Tensor,
        state: Any,
        weights: Sequence[Tensor],
        moved: Tensor | None,
        draws: RowDraws,
        left: Tensor | None,
        reuse: bool,
    ) -> tuple[Tensor, Any]:
        """See :class:`PolicySteps`."""
        flat = grads.flatten(1)
        into, source = _fused(state if reuse else self._take(state)), _fused(state)
        if not state.h.is_contiguous():
            # The kernel takes contiguous states only, so the initial state is copied to where the
            # new state will lie.
            for to, value in zip(into, source, strict=True):
                to.copy_(value)
            source = into
        update = flat.new_empty(flat.shape)
        context = self._context_by_student(params, state, grads, left)
        folded = self._folded(weights, context)
        with self._kept:
            step_into(update, into, flat, source, *folded, self._backend)
        new = self._student.carried(into, state, context)
        return update.view(grads.shape), keep(new, state, moved)

    def backward(
        self,
        d_updates: Tensor,
        d_state: Any,
        params: Tensor,
        grads: Tensor,
        state: Any,
        weights: Sequence[Tensor],
        moved: Tensor | None,
        draws: RowDraws,
        left: Tensor | None,
    ) -> tuple[Tensor, Any, list[Tensor]]:
        """See :class:`PolicySteps`."""
        d_moved = d_state
        if moved is not None:
            moved = None if moved.all() else moved
        if moved is not None:
            d_updates = torch.where(moved[..., None], d_updates, 0)
            nothing = type(d_state)(*(torch.zeros_like(tensor) for tensor in d_state))
            d_moved = keep(d_state, nothing, moved)
        context = self._context_by_student(params, state, grads, left)
        folded = self._folded(weights, context)
        with self._kept:
            d_grads, d_folded = backward_into(
                d_updates.flatten(1),
                _fused(d_moved),
                grads.flatten(1),
                _fused(state),
                *folded,
                self._backend,
            )
        d_weights = self._unfolded(d_folded, context)
        if moved is not None:
            some = moved.any(1)
            d_weights = [torch.where(_like(some, d), d, 0) for d in d_weights]
        return d_grads.view(grads.shape), keep(d_moved, d_state, moved), d_weights

    def _context_by_student(
        self, params: Tensor, state: Any, grads: Tensor, left: Tensor | None
    ) -> TensorContext | None:
        """:meth:`context` with a first dimension of S; sizes are those of every student."""
        context = self.context(params, state, grads, left)
        if context is None:
            return None
        inputs, corrections, sizes, pace = context
        students = len(grads)
        inputs, corrections = (t.unflatten(0, (students, -1)) for t in (inputs, corrections))
        pace = None if pace is None else pace.view(students, -1)
        return TensorContext(inputs, corrections, sizes[: len(sizes) // students], pace)

    def _folded(
        self, weights: Sequence[Tensor], context: TensorContext | None
    ) -> tuple[Sequence[Tensor], StepSettings]:
        """The operation's weights and settings of all students, in a context by student."""
        # PyTorch's products of one matrix in a stack are slower, and of other last bits.
        alone = len(weights[0]) == 1
        own = [w[0] for w in weights] if alone else weights
        if weights is not self._folds.of:
            self._folds = _Folds(weights, self._student.operation_weights(own))
            self._kept = KeptOfOneStream()
        context = _of_one(context) if alone else context
        folded, settings = self._student.with_context(self._folds.made, own, context)
        if not alone:
            return folded, settings
        if settings.corrections is not None:
            settings = settings._replace(corrections=settings.corrections[None])
        return [weight[None] for weight in folded], settings

    def _unfolded(self, found: Sequence[Tensor], context: TensorContext | None) -> list[Tensor]:
        """Gradients in the students' weights, of those in the operation's."""
        if len(found[0]) > 1:
            return self._student.unfolded(found, context)
        return [d[None] for d in self._student.unfolded([d[0] for d in found], _of_one(context))]

    def finished(self, updates: Tensor) -> Tensor:
        """See :class:`PolicySteps`."""
        return orthogonalized_rows(updates, self._layout) if self.finishes else updates

    def finished_backward(self, d_updates: Tensor, updates: Tensor) -> Tensor:
        """See :class:`PolicySteps`."""
        if not self.finishes:
            return d_updates
        return orthogonalized_rows_backward(d_updates, updates, self._layout)

    def zeros(self, state: Any) -> Any:
        """See :class:`PolicySteps`."""
        zeros = self._take(state)
        for tensor in zeros:
            tensor.zero_()
        return zeros

    def release(self, state: Any) -> None:
        """See :class:`PolicySteps`."""
        self._spare.setdefault((state.h.shape, state.h.dtype), []).append(state)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """See :class:`PolicySteps`."""
        before = self._spare, self._kept, self._folds
        self._spare, self._kept, self._folds = {}, KeptOfOneStream(), _Folds()
        try:
            yield
        finally:
            self._spare, self._kept, self._folds = before

    def stored(self, state: Any, cells: torch.dtype) -> Any:
        """See :class:`PolicySteps`."""
        stored = self._take(state, cells)
        for to, value in zip(stored, state, strict=True):
            to.copy_(value)
        return stored

    def _take(self, like: Any, cells: torch.dtype | None = None) -> Any:
        cells = cells or like.h.dtype
        spare = self._spare.get((like.h.shape, cells))
        if spare:
            return spare.pop()
        dtypes = (like.m.dtype, like.v.dtype, cells, cells, *(t.dtype for t in like[4:]))
        return type(like)(
            *(
                torch.empty(t.shape, dtype=dtype, device=t.device)
                for t, dtype in zip(like, dtypes, strict=True)
            )
        )


def _fused(state: Any) -> StudentState:
    """What the operations read and write of students' state."""
    return state if isinstance(state, StudentState) else StudentState(*state[:4])


def _of_one(context: TensorContext | None) -> TensorContext | None:
    """The context of a single student, without the dimension of students."""
    if context is None:
        return None
    inputs, corrections, sizes, pace = context
    return TensorContext(inputs[0], corrections[0], sizes, None if pace is None else pace[0])


def _like(flags: Tensor, tensor: Tensor) -> Tensor:
    """Flags (S,) as they broadcast with a tensor (S, ...)."""
    return flags.view(-1, *[1] * (tensor.dim() - 1))


class AutogradSteps:
    """Any policies' steps, one row after another; autograd differentiates each step on its own.

    A state here is a tuple of one policy state per row. A gradient with respect to it is a list
    that holds one list of tensors per row.

    Args:
        policy: The policy.
        layout: Which tensors an optimizee's coordinates belong to.
        backend: The backend that computes the policy's fused operations.
    """

    by_coordinates = False
    finishes = False

    def __init__(self, policy: Policy, layout: Layout, backend: str) -> None:
        self._policy = policy
        self._layout = layout
        self._backend = backend
        self._tried = False

    def initial(self, like: Tensor) -> tuple[Any, ...]:
        """See :class:`PolicySteps`."""
        return tuple(self._policy.initial_state(row, self._layout) for row in like.flatten(0, 1))

    def warm_up(self, grads: Tensor, state: tuple[Any, ...], moved: Tensor) -> tuple[Any, ...]:
        """See :class:`PolicySteps`."""
        return tuple(
            self._policy.warm_up(grad, old, layout=self._layout) if ok else old
            for grad, old, ok in zip(grads.flatten(0, 1), state, moved.flatten(), strict=True)
        )

    def context(
        self, params: Tensor, state: tuple[Any, ...], grads: Tensor, left: Tensor | None
    ) -> None:
        """See :class:`PolicySteps`; nothing, as it is not asked for."""

    def forward(
        self,
        params: Tensor,
        grads: Tensor,
        state: tuple[Any, ...],
        weights: Sequence[Tensor],
        moved: Tensor | None,
        draws: RowDraws,
        left: Tensor | None,
        reuse: bool,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """See :class:`PolicySteps`."""
        updates, new = list(torch.zeros_like(grads).flatten(0, 1)), list(state)
        for row, student, index in _rows(moved, grads):
            ours = [weight[student] for weight in weights]
            of_row = params[student, index], grads[student, index]
            updates[row], new[row] = self._step(*of_row, state[row], ours, draws(row))
        return torch.stack(updates).view(grads.shape), tuple(new)

    def backward(
        self,
        d_updates: Tensor,
        d_state: list[list[Tensor]],
        params: Tensor,
        grads: Tensor,
        state: tuple[Any, ...],
        weights: Sequence[Tensor],
        moved: Tensor | None,
        draws: RowDraws,
        left: Tensor | None,
    ) -> tuple[Tensor, list[list[Tensor]], list[Tensor]]:
        """See :class:`PolicySteps`."""
        d_grads, before = torch.zeros_like(grads), list(d_state)
        d_weights = [torch.zeros_like(w) for w in weights]
        for row, student, index in _rows(moved, grads):
            old, ours = nests.tensors(state[row]), [weight[student] for weight in weights]
            leaves = [t.detach().requires_grad_() for t in (grads[student, index], *old, *ours)]
            rest = len(old) + 1
            with torch.enable_grad():
                update, new = self._step(
                    params[student, index],
                    leaves[0],
                    nests.with_tensors(state[row], leaves[1:rest]),
                    leaves[rest:],
                    draws(row),
                )
            outs = (update, *nests.tensors(new))
            d_outs = (d_updates[student, index], *d_state[row])
            pairs = [(o, d) for o, d in zip(outs, d_outs, strict=True) if o.requires_grad]
            found = torch.autograd.grad(
                [out for out, _ in pairs],
                leaves,
                [d for _, d in pairs],
                allow_unused=True,
                materialize_grads=True,
            )
            d_grads[student, index] = found[0]
            before[row] = list(found[1:rest])
            torch._foreach_add_([d[student] for d in d_weights], found[rest:])
        return d_grads, before, d_weights

    def finished(self, updates: Tensor) -> Tensor:
        """See :class:`PolicySteps`; the policy's own step makes them whole."""
        return updates

    def finished_backward(self, d_updates: Tensor, updates: Tensor) -> Tensor:
        """See :class:`PolicySteps`."""
        return d_updates

    def zeros(self, state: tuple[Any, ...]) -> list[list[Tensor]]:
        """See :class:`PolicySteps`."""
        return [[torch.zeros_like(tensor) for tensor in nests.tensors(row)] for row in state]

    def release(self, state: tuple[Any, ...]) -> None:
        """See :class:`PolicySteps`; does nothing, because every step has memory of its own."""

    def apart(self) -> AbstractContextManager[None]:
        """See :class:`PolicySteps`."""
        return nullcontext()

    def stored(self, state: tuple[Any, ...], cells: torch.dtype) -> tuple[Any, ...]:
        """See :class:`PolicySteps`; returns the state itself, whatever ``cells`` says."""
        return state

    def _step(
        self,
        params: Tensor,
        grad: Tensor,
        state: Any,
        weights: Sequence[Tensor],
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Any]:
        seen = {"params": params} if self._policy.sees_params else {}
        before = None if self._tried else global_states(grad.device)
        stepped = self._policy.step(
            grad,
            state,
            weights,
            layout=self._layout,
            generator=generator,
            backend=self._backend,
            **seen,
        )
        if before is not None:
            self._tried = True
            if not all(map(torch.equal, global_states(grad.device), before)):
                raise ValueError(
                    f"policy {self._policy.kind!r} draws by torch's global generator, so that a "
                    f"step taken again would draw other numbers; draw by the generator that step() "
                    f"is given"
                )
        return stepped


def _rows(moved: Tensor | None, grads: Tensor) -> list[tuple[int, int, int]]:
    """Of rows that move, of gradients (S, B, N): the number of all, the student, and its own."""
    students, each = grads.shape[:2]
    rows = range(students * each) if moved is None else moved.flatten().nonzero().flatten().tolist()
    return [(row, *divmod(row, each)) for row in rows]
