"""``student_unroll_backward``: the meta-gradient of many student steps in the student's weights.

Of T steps of :func:`amalgam.ops.student_step` from a state, with the gradients g_t that it saw and
the gradients a_t of a loss in its updates::

    update_t, state_t+1 = student_step(g_t, state_t, weights)
    result = d / d weights of  sum_t a_t . update_t       (the g_t and state_0 are constants)

That the g_t are constants, though they depend on the updates before them, makes it the first-order
meta-gradient (Learning to learn by gradient descent by gradient descent, Andrychowicz et al. 2016,
whose learned optimizers, and RNNProp, are trained so). It also makes coordinates independent: some
at a time are stepped from the initial state and differentiated backwards, and no state of all of
them but the initial one is ever stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from amalgam.operations import lstm, registry
from amalgam.operations.checks import check_floating, check_like
from amalgam.operations.student_step import (
    DEFAULTS,
    FEATURES,
    OUTPUTS,
    SETTINGS_SCHEMA,
    STATE_SCHEMA,
    StepSettings,
    StudentState,
    check_state,
)

_NAME = "student_unroll_backward"
CHUNK = 4096  # coordinates whose step's temporaries stay in cache
HELD = 1 << 28  # bytes of a chunk's states


def student_unroll_backward(
    grads: Tensor,
    adjoints: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    settings: StepSettings = DEFAULTS,
    *,
    backend: str = "auto",
) -> list[Tensor]:
    """First-order gradient of T steps' updates in the weights; not differentiable itself.

    Args:
        grads: What the student saw, shape (T, N), float32 or float64; T and N may be 0. Columns of
            a larger matrix, ``buffer[:, a:b]``, are read where they lie.
        adjoints: Gradients of the loss in the updates, likewise, of the same dtype and device.
        state: What the first step began with, of N coordinates, same dtype and device.
        weights: The student's, as in :func:`amalgam.ops.student_step`.
        settings: The student's constants.
        backend: ``"auto"``, or a backend's name.

    Returns:
        The gradients of the sum over steps and coordinates of ``adjoints`` times the updates, in
        the weights' order and shapes; zeros where there are no steps or coordinates.

    Raises:
        TypeError: ``grads`` or ``adjoints`` is not a floating-point tensor.
        ValueError: Shapes, dtypes or devices do not fit together.
        RuntimeError: The backend asked for can't compute this here; or, later, the result is
            differentiated.
    """
    for name, tensor in (("grads", grads), ("adjoints", adjoints)):
        check_floating(name, tensor)
    return torch.ops.amalgam.student_unroll_backward(
        grads, adjoints, *state, list(weights), *settings, backend
    )


def _check(grads: Tensor, adjoints: Tensor, state: StudentState, weights: Sequence[Tensor]) -> None:
    check_floating("grads", grads)
    if grads.dim() != 2:
        raise ValueError(f"grads must have shape (T, N), not {tuple(grads.shape)}")
    check_like("adjoints", adjoints, grads.shape, grads)
    lstm.check_weights(weights, state.h, grads, FEATURES, OUTPUTS)
    check_state(state, grads.shape[1:], state.h.shape[:2], grads, grads)


def by_steps(
    step: Callable[..., tuple[Tensor, StudentState]],
    backward: Callable[..., tuple[Tensor, StudentState, list[Tensor]]],
    grads: Tensor,
    adjoints: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    settings: StepSettings,
    *,
    chunk: int,
    held: int,
) -> list[Tensor]:
    """The operation, composed of a backend's kernels for one step.

    Args:
        step: The kernel of ``student_step``.
        backward: The kernel of ``student_step_backward``.
        grads: Shape (T, N).
        adjoints: Shape (T, N).
        state: Before the first step.
        weights: The student's weights.
        settings: Its constants.
        chunk: How many coordinates to compute at a time.
        held: Bytes that the states of a chunk may take. Where all T need more, those at the begin
            of some sqrt(T) segments are held, and those of a segment are computed again.

    Returns:
        The gradients of the weights.
    """
    totals = [torch.zeros_like(weight) for weight in weights]
    columns = zip(*(tensor.split(chunk, -1) for tensor in (grads, adjoints, *state)), strict=True)
    for column in columns:
        seen, slopes, *rest = (part.contiguous() for part in column)
        first = StudentState(*rest)
        steps, n = seen.shape
        if not steps or not n:
            continue
        each = sum(tensor.numel() * tensor.element_size() for tensor in first)
        length = steps if steps * each <= held else math.isqrt(steps - 1) + 1

        checkpoints = [first]
        segments = list(zip(seen.split(length), slopes.split(length), strict=True))
        for segment, _ in segments[:-1]:
            at_begin = checkpoints[-1]
            for grad in segment:
                _, at_begin = step(grad, at_begin, weights, settings)
            checkpoints.append(at_begin)
        d_state = StudentState(*map(torch.zeros_like, first))
        for segment, slopes_of_segment in reversed(segments):
            states = [checkpoints.pop()]
            for grad in segment[:-1]:
                states.append(step(grad, states[-1], weights, settings)[1])
            backwards = zip(
                reversed(segment.unbind()), reversed(slopes_of_segment.unbind()), strict=True
            )
            for grad, slope in backwards:
                _, d_state, d_weights = backward(
                    slope, d_state, grad, states.pop(), weights, settings
                )
                for total, d_weight in zip(totals, d_weights, strict=True):
                    total += d_weight
    return totals


@registry.reference.kernel(_NAME, dtypes=None)
def _reference(
    grads: Tensor,
    adjoints: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    settings: StepSettings,
) -> list[Tensor]:
    kernels = registry.reference.kernels
    return by_steps(
        kernels["student_step"].function,
        kernels["student_step_backward"].function,
        *(grads, adjoints, state, weights, settings),
        chunk=CHUNK,
        held=HELD,
    )


@torch.library.custom_op(
    "amalgam::student_unroll_backward",
    mutates_args=(),
    schema=f"(Tensor grads, Tensor adjoints, {STATE_SCHEMA}, Tensor[] weights, {SETTINGS_SCHEMA}, "
    "str backend) -> Tensor[]",
)
def _op(grads: Tensor, adjoints: Tensor, *rest: Any) -> list[Tensor]:
    m, v, h, c, weights, alpha, beta1, beta2, eps, backend = rest
    state, settings = StudentState(m, v, h, c), StepSettings(alpha, beta1, beta2, eps)
    _check(grads, adjoints, state, weights)
    return registry.compute(_NAME, backend, grads, grads, adjoints, state, weights, settings)


@_op.register_fake
def _(grads: Tensor, adjoints: Tensor, *rest: Any) -> list[Tensor]:
    return [weight.new_empty(weight.shape) for weight in rest[4]]


registry.refuse_differentiation(
    _op,
    "student_unroll_backward is a gradient and has none itself; differentiate an unroll of "
    "student_step with backend='reference', which is differentiable to any order",
)
