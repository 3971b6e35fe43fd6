"""``student_step``: one step of a student over every coordinate.

Per coordinate, with m, v the moments and (h, c) the cells' state::

    m <- beta1 m + (1 - beta1) g             v <- beta2 v + (1 - beta2) g^2
    x = what the form makes of g, m and v
    for each layer: i, f, a, o = W_ih x + W_hh h + b      (a: the candidate)
                    c <- sigmoid(f) c + sigmoid(i) tanh(a);  x = h <- sigmoid(o) tanh(c)
    update = what the form makes of head . x + head_bias

There are two forms, RNNProp and nominal: :mod:`amalgam.operations.student_forms`.

Coordinates are the last, fastest dimension of every array: eager PyTorch runs that order 1.2 to 3
times as fast as the transposed one, and it is the order that fills whole vectors and sectors.
:mod:`amalgam.operations.student_step_in_place` has the form that trains models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amalgam.operations import lstm, registry
from amalgam.operations.checks import check_floating, check_like
from amalgam.operations.student_forms import (
    StepSettings,
    bias_by_coordinate,
    by_tensor,
    check_tensors,
)

_NAME = "student_step"


class StudentState(NamedTuple):
    """What the student carries from step to step, for N coordinates.

    Attributes:
        m: First moment of the gradient, shape (N,).
        v: Second moment, shape (N,).
        h: Outputs of the LSTM layers, shape (layers, hidden, N).
        c: Their cells, shape (layers, hidden, N).
    """

    m: Tensor
    v: Tensor
    h: Tensor
    c: Tensor


DEFAULTS = StepSettings()

# What errors call a state's four tensors, and gradients in them.
STATE_NAMES = tuple(f"state.{name}" for name in StudentState._fields)
NEW_NAMES = tuple(f"new.{name}" for name in StudentState._fields)
GRADIENT_NAMES = tuple(f"grads_out[{index}]" for index in range(1, 5))

# How the torch operators spell what the structures above hold.
STATE_SCHEMA = "Tensor m, Tensor v, Tensor h, Tensor c"
SETTINGS_SCHEMA = (
    "float alpha, float beta1, float beta2, float eps, Tensor? corrections, SymInt[] sizes"
)
_ARGUMENTS_SCHEMA = f"Tensor grad, {STATE_SCHEMA}, Tensor[] weights, {SETTINGS_SCHEMA}, str backend"


def student_step(
    grad: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    settings: StepSettings = DEFAULTS,
    *,
    backend: str = "auto",
) -> tuple[Tensor, StudentState]:
    """One step, differentiable in the gradient, the state and the weights (for meta-training).

    Args:
        grad: The optimizee's gradient, shape (N,), float32 or float64.
        state: The carried state, same dtype and device.
        weights: For each layer W_ih (4 hidden, inputs), W_hh (4 hidden, hidden), b (4 hidden,)
            with gates in the order input, forget, candidate, output; then the head (outputs,
            hidden) and its bias (outputs,). Same dtype and device. The first layer has 2 inputs and
            the head 1 output; of the nominal form 3 and 2, and the first b is (tensors, 4 hidden).
        settings: The student's constants, and the form.
        backend: ``"auto"``, or a backend's name. All but ``"reference"`` are once differentiable.

    Returns:
        The update (N,), to be subtracted from the parameters, and the new state.

    Raises:
        TypeError: ``grad`` is not a floating-point tensor.
        ValueError: Shapes, dtypes or devices do not fit together.
        RuntimeError: The backend asked for can't compute this here.
    """
    check_floating("grad", grad)
    chosen = registry.resolve(_NAME, backend, grad, grad, state, weights, settings)
    if chosen == registry.REFERENCE:
        _check(grad, state, weights, settings)
        return _reference(grad, state, weights, settings)
    update, *new = torch.ops.amalgam.student_step(grad, *state, list(weights), *settings, chosen)
    return update, StudentState(*new)


def _check(
    grad: Tensor, state: StudentState, weights: Sequence[Tensor], settings: StepSettings
) -> None:
    check_floating("grad", grad)
    check_weights(weights, state.h, grad, settings, ())
    if grad.dim() != 1:
        raise ValueError(f"grad must have shape (N,), not {tuple(grad.shape)}")
    check_state(state, grad.shape, state.h.shape[:2], grad, grad)
    check_tensors(settings, weights[2], grad.numel(), grad)


def check_weights(
    weights: Sequence[Tensor],
    h: Tensor,
    like: Tensor,
    settings: StepSettings,
    steps: Sequence[int],
) -> None:
    """Raise ValueError unless the weights fit the form, each other, the state and a dtype.

    Args:
        weights: The weights.
        h: The state's h, shape (layers, hidden, ...).
        like: A tensor of their dtype and device.
        settings: The form; where it has corrections, their number of tensors is the biases', too.
        steps: (T,) where there are T steps' biases, else ().
    """
    form, corrections = settings.form, settings.corrections
    biases = () if corrections is None else (*steps, *corrections.shape[-2:-1])
    lstm.check_weights(weights, h, like, form.features, form.outputs, biases)


def check_state(
    state: StudentState,
    shape: Sequence[int],
    architecture: Sequence[int],
    like: Tensor,
    cells_like: Tensor,
    names: Sequence[str] = STATE_NAMES,
) -> None:
    """Raise ValueError unless m, v have this shape, and h, c (layers, hidden) before it.

    In dtype and device m, v must be like ``like``, and h, c like ``cells_like``. Errors call the
    four by these names.
    """
    cells = (*architecture, *shape)
    m, v, h, c = names
    check_like(m, state.m, shape, like)
    check_like(v, state.v, shape, like)
    check_like(h, state.h, cells, cells_like)
    check_like(c, state.c, cells, cells_like)


def initial_state(
    like: Tensor,
    weights: Sequence[Tensor],
    cells_dtype: torch.dtype | None = None,
    moments_dtype: torch.dtype | None = None,
) -> StudentState:
    """The zero state for a tensor of coordinates.

    Args:
        like: A tensor of the coordinates' shape S and device.
        weights: The student's weights; the state takes their dtype.
        cells_dtype: Dtype of h and c where it is to be another: bfloat16 beside float32 halves
            the state, in the in-place form; int8 is for codes.
        moments_dtype: Bfloat16 likewise for m and v.

    Returns:
        m, v of shape S and h, c of shape (layers, hidden, *S), or as codes
        (layers, hidden + 1, *S), contiguous zeros.
    """
    layers, hidden = lstm.architecture(weights)

    def zeros(*shape: int, dtype: torch.dtype = weights[0].dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=like.device)

    cells = cells_dtype or weights[0].dtype
    moments = moments_dtype or weights[0].dtype
    columns = hidden + (cells == torch.int8)
    return StudentState(
        zeros(*like.shape, dtype=moments),
        zeros(*like.shape, dtype=moments),
        zeros(layers, columns, *like.shape, dtype=cells),
        zeros(layers, columns, *like.shape, dtype=cells),
    )


def update_moments(
    grad: Tensor, m: Tensor, v: Tensor, settings: StepSettings
) -> tuple[Tensor, Tensor]:
    """The moments after ``grad``, of any one shape; all that warm-up changes of the state."""
    new_m = settings.beta1 * m + (1 - settings.beta1) * grad
    new_v = settings.beta2 * v + (1 - settings.beta2) * grad.square()
    return new_m, new_v


# ---- what backends compute


@registry.reference.kernel(_NAME, dtypes=None)
def _reference(
    grad: Tensor, state: StudentState, weights: Sequence[Tensor], settings: StepSettings
) -> tuple[Tensor, StudentState]:
    form = settings.form
    m, v = update_moments(grad, state.m, state.v, settings)
    x, kept = form.seen(grad, m, v, settings)
    out, h, c = lstm.step(x, state.h, state.c, _with_columns(weights, settings))
    head, head_bias = weights[-2:]
    update = form.update(head @ out + head_bias[:, None], kept, settings)
    return update, StudentState(m, v, h, c)


@registry.reference.kernel(f"{_NAME}_backward", dtypes=None)
def _reference_backward(
    d_update: Tensor,
    d_state: StudentState,
    grad: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    settings: StepSettings,
) -> tuple[Tensor, StudentState, list[Tensor]]:
    """The step's vector-Jacobian product; only its inputs were kept, the gates come again."""
    form, beta1, beta2 = settings.form, settings.beta1, settings.beta2
    m, v = update_moments(grad, state.m, state.v, settings)
    x, kept = form.seen(grad, m, v, settings)
    spread = _with_columns(weights, settings)
    traced = lstm.trace(x, state.h, state.c, spread)
    out = traced.inputs[-1]
    head, head_bias = weights[-2:]
    d_o, beside = form.back_to_outputs(d_update, head @ out + head_bias[:, None], kept, settings)
    d_x, in_h, in_c, d_weights = lstm.backward(
        traced, head.T @ d_o, d_state.h, d_state.c, state.h, state.c, spread
    )
    d_weights += [d_o @ out.T, d_o.sum(1)]
    if settings.corrections is not None:
        d_weights[2] = by_tensor(d_weights[2], settings.sizes)

    d_grad, d_m, d_v = form.back_to_moments(d_x, beside, grad, m, v, kept, settings)
    d_m, d_v = d_state.m + d_m, d_state.v + d_v
    d_grad = d_grad + (1 - beta1) * d_m + 2 * (1 - beta2) * grad * d_v
    return d_grad, StudentState(beta1 * d_m, beta2 * d_v, in_h, in_c), d_weights


def _with_columns(weights: Sequence[Tensor], settings: StepSettings) -> Sequence[Tensor]:
    """The weights with a first bias a coordinate, in the nominal form."""
    if settings.corrections is None:
        return weights
    return [*weights[:2], bias_by_coordinate(weights[2], settings), *weights[3:]]


class OfStudents(NamedTuple):
    """What a step of several students is taken with: tensors with a first dimension of S students.

    The attributes are :func:`student_step`'s arguments.
    """

    grad: Tensor
    state: StudentState
    weights: Sequence[Tensor]
    settings: StepSettings

    def one(self, student: int) -> tuple[Tensor, StudentState, list[Tensor], StepSettings]:
        """One student's, without that dimension."""
        grad, state, weights, settings = self
        if settings.corrections is not None:
            settings = settings._replace(corrections=settings.corrections[student])
        return grad[student], one_of(state, student), [w[student] for w in weights], settings


def one_of(state: StudentState, student: int) -> StudentState:
    """One student's state, of several students'."""
    return StudentState(*(tensor[student] for tensor in state))


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape, one a student, as one tensor; a single one is not copied."""
    return parts[0][None] if len(parts) == 1 else torch.stack(list(parts))


@registry.reference.kernel(f"{_NAME}_into", dtypes=None)
def _reference_into(update: Tensor, new: StudentState, *arguments: Any) -> None:
    given = OfStudents(*arguments)
    for student in range(len(update)):
        computed, state = _reference(*given.one(student))
        targets = update[student], *one_of(new, student)
        for target, value in zip(targets, (computed, *state), strict=True):
            target.copy_(value)


@registry.reference.kernel(f"{_NAME}_backward_into", dtypes=None)
def _reference_backward_into(
    d_update: Tensor, d_state: StudentState, *arguments: Any
) -> tuple[Tensor, list[Tensor]]:
    given, found = OfStudents(*arguments), []
    for student in range(len(d_update)):
        d_new = one_of(d_state, student)
        one = d_update[student], d_new, *given.one(student)
        d_grad, d_old, d_weights = _reference_backward(*one)
        for target, value in zip(d_new, d_old, strict=True):
            target.copy_(value)
        found.append((d_grad, *d_weights))
    d_grad, *d_weights = map(stacked, zip(*found, strict=True))
    return d_grad, d_weights


def step_into(
    update: Tensor,
    new: StudentState,
    grad: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    settings: StepSettings,
    backend: str,
) -> None:
    """:func:`student_step` of S students at once, without a graph, into memory that there is.

    All tensors have a first dimension of S, 1 or more, and follow it as :func:`student_step` has
    them; sizes are those of every student.

    Args:
        update: Gets the updates, shape (S, N).
        new: Gets the new states; may be the old ones.
        grad: The gradients, shape (S, N), like all that follows.
        state: The carried states.
        weights: The weights.
        settings: The students' constants.
        backend: A backend's name, or ``"auto"``.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together; of compiled code also where
            results share memory or are not contiguous.
    """
    _check_of_students(grad, state, weights, settings)
    check_like("update", update, grad.shape, grad)
    _check_states(new, grad, state, NEW_NAMES)
    registry.compute(f"{_NAME}_into", backend, grad, update, new, grad, state, weights, settings)


def backward_into(
    d_update: Tensor,
    d_state: StudentState,
    grad: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    settings: StepSettings,
    backend: str,
) -> tuple[Tensor, list[Tensor]]:
    """The steps' vector-Jacobian products without a graph, from and into ``d_state``.

    Args:
        d_update: Gradients in the updates, shape (S, N).
        d_state: Gradients in the new states; get those in the old ones.
        grad: What the steps were taken with, as in :func:`step_into`, like all that follows.
        state: The states they began with.
        weights: The weights.
        settings: The students' constants.
        backend: A backend's name, or ``"auto"``.

    Returns:
        Gradients in ``grad`` and in the weights; the latter may share memory, and be strided.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together; of compiled code also where
            results share memory or are not contiguous.
    """
    _check_of_students(grad, state, weights, settings)
    check_like("grads_out[0]", d_update, grad.shape, grad)
    _check_states(d_state, grad, state, GRADIENT_NAMES)
    d_grad, d_weights = registry.compute(
        f"{_NAME}_backward_into", backend, grad, d_update, d_state, grad, state, weights, settings
    )
    return d_grad, d_weights


def _check_of_students(
    grad: Tensor, state: StudentState, weights: Sequence[Tensor], settings: StepSettings
) -> None:
    if grad.dim() != 2 or not len(grad):
        raise ValueError(f"grad must have shape (S, N), S 1 or more, not {tuple(grad.shape)}")
    given = OfStudents(grad, state, weights, settings)
    named = dict(zip(STATE_NAMES, state, strict=True))
    named |= {f"weights[{index}]": weight for index, weight in enumerate(weights)}
    if settings.corrections is not None:
        named["corrections"] = settings.corrections
    for name, tensor in named.items():
        if not tensor.dim() or len(tensor) != len(grad):
            raise ValueError(
                f"{name} must have a first dimension of {len(grad)} to fit grad, "
                f"not {tuple(tensor.shape)}"
            )
    _check(*given.one(0))


def _check_states(
    found: StudentState, grad: Tensor, state: StudentState, names: Sequence[str]
) -> None:
    for name, tensor, like in zip(names, found, state, strict=True):
        check_like(name, tensor, like.shape, grad)


def _check_backward(
    d_update: Tensor,
    d_state: StudentState,
    grad: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    settings: StepSettings,
) -> None:
    _check(grad, state, weights, settings)
    check_like("grads_out[0]", d_update, grad.shape, grad)
    check_state(d_state, grad.shape, state.h.shape[:2], grad, grad, GRADIENT_NAMES)


# ---- the torch operators


def _structured(
    grad: Tensor, m: Tensor, v: Tensor, h: Tensor, c: Tensor, weights: Sequence[Tensor], *rest: Any
) -> tuple[Tensor, StudentState, Sequence[Tensor], StepSettings, str]:
    *settings, backend = rest
    return grad, StudentState(m, v, h, c), weights, StepSettings(*settings), backend


@torch.library.custom_op(
    "amalgam::student_step",
    mutates_args=(),
    schema=f"({_ARGUMENTS_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _op(*flat: Any) -> tuple[Tensor, ...]:
    grad, state, weights, settings, backend = _structured(*flat)
    _check(grad, state, weights, settings)
    update, new = registry.compute(_NAME, backend, grad, grad, state, weights, settings)
    return update, *new


@torch.library.custom_op(
    "amalgam::student_step_backward",
    mutates_args=(),
    schema=f"(Tensor[] grads_out, {_ARGUMENTS_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])",
)
def _backward_op(grads_out: Sequence[Tensor], *flat: Any) -> tuple[Tensor | list[Tensor], ...]:
    grad, state, weights, settings, backend = _structured(*flat)
    d_update, *d_new = grads_out
    d_state = StudentState(*d_new)
    _check_backward(d_update, d_state, grad, state, weights, settings)
    d_grad, d_old, d_weights = registry.compute(
        f"{_NAME}_backward", backend, grad, d_update, d_state, grad, state, weights, settings
    )
    return d_grad, *d_old, d_weights


@_op.register_fake
def _(*flat: Any) -> tuple[Tensor, ...]:
    grad, state, weights, settings, _ = _structured(*flat)
    _check(grad, state, weights, settings)
    return tuple(tensor.new_empty(tensor.shape) for tensor in (grad, *state))


@_backward_op.register_fake
def _(grads_out: Sequence[Tensor], *flat: Any) -> tuple[Tensor | list[Tensor], ...]:
    grad, state, weights, *_ = _structured(*flat)
    found = (tensor.new_empty(tensor.shape) for tensor in (grad, *state))
    return *found, [weight.new_empty(weight.shape) for weight in weights]


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    grad, m, v, h, c, weights, *ctx.constants = inputs
    ctx.save_for_backward(grad, m, v, h, c, *weights)


def _autograd(ctx: Any, *grads_out: Tensor) -> tuple[Any, ...]:
    grad, m, v, h, c, *weights = ctx.saved_tensors
    *found, in_weights = torch.ops.amalgam.student_step_backward(
        list(grads_out), grad, m, v, h, c, weights, *ctx.constants
    )
    # An empty list takes no gradient for each of its elements; one of numbers takes one in all.
    return *found, in_weights, *([] if value == [] else None for value in ctx.constants)


_op.register_autograd(_autograd, setup_context=_setup_context)
registry.once_differentiable(_backward_op, _NAME)
