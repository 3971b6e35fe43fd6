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

from amalgam.operations import registry
from amalgam.operations.checks import check_floating, check_like
from amalgam.operations.student_forms import StepSettings, check_tensors, tensors_of_part
from amalgam.operations.student_step import (
    DEFAULTS,
    SETTINGS_SCHEMA,
    STATE_SCHEMA,
    StudentState,
    check_state,
    check_weights,
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
        weights: The student's, as in :func:`amalgam.ops.student_step`; of the nominal form the
            first b is each step's, (T, tensors, 4 hidden).
        settings: The student's constants, and the form; corrections are each step's, too, of shape
            (T, tensors, 3).
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


def _check(
    grads: Tensor,
    adjoints: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    settings: StepSettings,
) -> None:
    check_floating("grads", grads)
    if grads.dim() != 2:
        raise ValueError(f"grads must have shape (T, N), not {tuple(grads.shape)}")
    check_like("adjoints", adjoints, grads.shape, grads)
    check_weights(weights, state.h, grads, settings, grads.shape[:1])
    check_state(state, grads.shape[1:], state.h.shape[:2], grads, grads)
    check_tensors(settings, weights[2], grads.shape[1], grads)


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
    n, first = grads.shape[1], 0
    while first < n:
        part = slice(first, min(n, first + chunk))
        first = part.stop
        seen, slopes, *rest = (
            tensor[..., part].contiguous() for tensor in (grads, adjoints, *state)
        )
        inside, alike = _of_part(settings, part)
        ours = weights if inside is None else _with_bias(weights, weights[2][:, inside])
        begin = StudentState(*rest)
        steps = len(seen)
        if not steps:
            continue
        each = sum(tensor.numel() * tensor.element_size() for tensor in begin)
        length = steps if steps * each <= held else math.isqrt(steps - 1) + 1

        checkpoints = [begin]
        segments = [range(at, min(steps, at + length)) for at in range(0, steps, length)]
        for segment in segments[:-1]:
            at_begin = checkpoints[-1]
            for t in segment:
                _, at_begin = step(seen[t], at_begin, *of_step(ours, alike, t))
            checkpoints.append(at_begin)
        d_state = StudentState(*map(torch.zeros_like, begin))
        for segment in reversed(segments):
            states = [checkpoints.pop()]
            for t in segment[:-1]:
                states.append(step(seen[t], states[-1], *of_step(ours, alike, t))[1])
            for t in reversed(segment):
                _, d_state, d_weights = backward(
                    slopes[t], d_state, seen[t], states.pop(), *of_step(ours, alike, t)
                )
                for index, (total, d_weight) in enumerate(zip(totals, d_weights, strict=True)):
                    if inside is not None and index == 2:
                        total[t, inside] += d_weight
                    else:
                        total += d_weight
    return totals


def of_step(
    weights: Sequence[Tensor], settings: StepSettings, step: int
) -> tuple[Sequence[Tensor], StepSettings]:
    """The weights and settings of one step, of an unroll's."""
    if settings.corrections is None:
        return weights, settings
    own = settings._replace(corrections=settings.corrections[step])
    return _with_bias(weights, weights[2][step]), own


def _with_bias(weights: Sequence[Tensor], bias: Tensor) -> list[Tensor]:
    return [*weights[:2], bias, *weights[3:]]


def _of_part(settings: StepSettings, part: slice) -> tuple[slice | None, StepSettings]:
    """Which tensors of the nominal form have coordinates in a part, and the settings of these."""
    if settings.corrections is None:
        return None, settings
    tensors, inside = tensors_of_part(settings.sizes, part)
    corrections = settings.corrections[:, tensors]
    return tensors, settings._replace(corrections=corrections, sizes=inside)


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


def _structured(
    m: Tensor, v: Tensor, h: Tensor, c: Tensor, weights: Sequence[Tensor], *rest: Any
) -> tuple[StudentState, Sequence[Tensor], StepSettings, str]:
    *settings, backend = rest
    return StudentState(m, v, h, c), weights, StepSettings(*settings), backend


@torch.library.custom_op(
    "amalgam::student_unroll_backward",
    mutates_args=(),
    schema=f"(Tensor grads, Tensor adjoints, {STATE_SCHEMA}, Tensor[] weights, {SETTINGS_SCHEMA}, "
    "str backend) -> Tensor[]",
)
def _op(grads: Tensor, adjoints: Tensor, *rest: Any) -> list[Tensor]:
    state, weights, settings, backend = _structured(*rest)
    _check(grads, adjoints, state, weights, settings)
    return registry.compute(_NAME, backend, grads, grads, adjoints, state, weights, settings)


@_op.register_fake
def _(grads: Tensor, adjoints: Tensor, *rest: Any) -> list[Tensor]:
    state, weights, settings, _ = _structured(*rest)
    _check(grads, adjoints, state, weights, settings)
    return [weight.new_empty(weight.shape) for weight in weights]


registry.refuse_differentiation(
    _op,
    "student_unroll_backward is a gradient and has none itself; differentiate an unroll of "
    "student_step with backend='reference', which is differentiable to any order",
)
