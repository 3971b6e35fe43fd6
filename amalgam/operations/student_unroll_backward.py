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
from amalgam.operations.student_step import (
    DEFAULTS,
    FEATURES,
    OUTPUTS,
    StepSettings,
    StudentState,
    check_floating,
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
    if grads.dim() != 2:
        raise ValueError(f"grads must have shape (T, N), not {tuple(grads.shape)}")
    if adjoints.shape != grads.shape:
        raise ValueError(
            f"adjoints must have shape {tuple(grads.shape)} as grads has, "
            f"not {tuple(adjoints.shape)}"
        )
    if adjoints.dtype != grads.dtype or adjoints.device != grads.device:
        raise ValueError(
            f"adjoints must be {grads.dtype} on {grads.device} as grads is, "
            f"not {adjoints.dtype} on {adjoints.device}"
        )
    lstm.check_weights(weights, state.h, grads, FEATURES, OUTPUTS)
    check_state(state, grads, grads.shape[1:], state.h.shape[:2], grads)
    chosen = registry.resolve(_NAME, backend, grads)
    return torch.ops.amalgam.student_unroll_backward(
        grads, adjoints, *state, list(weights), *settings, chosen
    )


def by_steps(
    step: Callable[..., Sequence[Tensor]],
    backward: Callable[..., Sequence[Any]],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    settings: Sequence[float],
    *,
    chunk: int,
    held: int,
) -> list[Tensor]:
    """The operation, composed of a backend's kernels for one step.

    Args:
        step: The kernel of ``student_step``.
        backward: The kernel of ``student_step_backward``.
        inputs: grads and adjoints (T, N), m and v (N,), h and c (layers, hidden, N).
        weights: The student's weights.
        settings: alpha, beta1, beta2 and eps.
        chunk: How many coordinates to compute at a time.
        held: Bytes that the states of a chunk may take. Where all T need more, those at the begin
            of some sqrt(T) segments are held, and those of a segment are computed again.

    Returns:
        The gradients of the weights.
    """
    totals = [torch.zeros_like(weight) for weight in weights]
    for parts in zip(*(tensor.split(chunk, -1) for tensor in inputs), strict=True):
        grads, adjoints, *first = (part.contiguous() for part in parts)
        steps, n = grads.shape
        if not steps or not n:
            continue
        each = sum(tensor.numel() * tensor.element_size() for tensor in first)
        length = steps if steps * each <= held else math.isqrt(steps - 1) + 1

        checkpoints: list[Sequence[Tensor]] = [first]
        segments = list(zip(grads.split(length), adjoints.split(length), strict=True))
        for seen, _ in segments[:-1]:
            state = checkpoints[-1]
            for grad in seen:
                state = step(grad, *state, weights, *settings)[1:]
            checkpoints.append(state)
        d_state: Sequence[Tensor] = [torch.zeros_like(tensor) for tensor in first]
        for seen, slopes in reversed(segments):
            states = [checkpoints.pop()]
            for grad in seen[:-1]:
                states.append(step(grad, *states[-1], weights, *settings)[1:])
            for grad, slope in zip(reversed(seen.unbind()), reversed(slopes.unbind()), strict=True):
                grads_out = (slope, *d_state)
                _, *d_state, in_weights = backward(
                    grads_out, grad, *states.pop(), weights, *settings
                )
                for total, in_weight in zip(totals, in_weights, strict=True):
                    total += in_weight
    return totals


@registry.reference.kernel(_NAME, dtypes=None)
def _reference(
    grads: Tensor,
    adjoints: Tensor,
    m: Tensor,
    v: Tensor,
    h: Tensor,
    c: Tensor,
    weights: Sequence[Tensor],
    alpha: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> list[Tensor]:
    kernels = registry.reference.kernels
    return by_steps(
        kernels["student_step"].function,
        kernels["student_step_backward"].function,
        (grads, adjoints, m, v, h, c),
        weights,
        (alpha, beta1, beta2, eps),
        chunk=CHUNK,
        held=HELD,
    )


@torch.library.custom_op("amalgam::student_unroll_backward", mutates_args=())
def _op(
    grads: Tensor,
    adjoints: Tensor,
    m: Tensor,
    v: Tensor,
    h: Tensor,
    c: Tensor,
    weights: Sequence[Tensor],
    alpha: float,
    beta1: float,
    beta2: float,
    eps: float,
    backend: str,
) -> list[Tensor]:
    return registry.compute(
        _NAME,
        backend,
        grads,
        *(grads, adjoints, m, v, h, c, weights, alpha, beta1, beta2, eps),
    )


@_op.register_fake
def _(grads, adjoints, m, v, h, c, weights, alpha, beta1, beta2, eps, backend):  # type: ignore[no-untyped-def]
    return [weight.new_empty(weight.shape) for weight in weights]


registry.refuse_differentiation(
    _op,
    "student_unroll_backward is a gradient and has none itself; differentiate an unroll of "
    "student_step with backend='reference', which is differentiable to any order",
)
