"""Backend ``triton``: the kernels of ``amalgam.kernels``, compiled at their first use."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from amalgam.backends.memory import contiguous, dense_in_place
from amalgam.operations.choice_step import ChoiceArguments
from amalgam.operations.registry import Numerics, register_backend
from amalgam.operations.student_step import StepSettings, StudentState, register_into
from amalgam.operations.student_step_in_place import InPlaceStep
from amalgam.operations.student_unroll_backward import by_steps
from amalgam.operations.teacher_step import PoolSettings

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _probe() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return (
            "Triton is not installed; 'pip install triton' (it comes with CUDA builds of PyTorch)"
        )
    if importlib.util.find_spec("amalgam.kernels") is None:
        return "amalgam.kernels is not installed; 'pip install .' (or -e .) in the source tree does"
    if INTERPRETING or torch.cuda.is_available():
        return None
    return (
        "PyTorch sees no CUDA GPU here; TRITON_INTERPRET=1, set before Python starts, runs the "
        "kernels on the CPU, slowly, for tests"
    )


backend = register_backend(
    "triton",
    # Interpreted kernels are for tests: "auto" prefers even the reference.
    rank=-10 if INTERPRETING else 10,
    devices=frozenset({"cuda", "cpu"} if INTERPRETING else {"cuda"}),
    probe=_probe,
    about="Triton kernels, compiled at first use; interpreted on CPU if TRITON_INTERPRET=1",
)


@backend.kernel("teacher_distance")
def _teacher_distance(
    student: Tensor, teachers: Tensor, eps: float, huber_delta: float | None
) -> tuple[Tensor, Tensor]:
    from amalgam.kernels import teacher_distance as kernels

    student, teachers = contiguous((student, teachers))
    return kernels.teacher_distance(student, teachers, eps, huber_delta)


@backend.kernel("teacher_distance_backward")
def _teacher_distance_backward(
    grad: Tensor,
    student: Tensor,
    teachers: Tensor,
    total: Tensor,
    eps: float,
    huber_delta: float | None,
    need_teachers: bool,
) -> tuple[Tensor, Tensor]:
    from amalgam.kernels import teacher_distance as kernels

    grad, student, teachers, total = contiguous((grad, student, teachers, total))
    return kernels.teacher_distance_backward(
        grad, student, teachers, total, eps, huber_delta, need_teachers
    )


@backend.kernel("teacher_step")
def _teacher_step(
    grads: Tensor, m: Tensor, v: Tensor, pool: PoolSettings
) -> tuple[Tensor, Tensor, Tensor]:
    from amalgam.kernels import teacher_step as kernels

    grads, m, v = contiguous((grads, m, v))
    return kernels.teacher_step(grads, m, v, pool)


@backend.kernel("teacher_step_backward")
def _teacher_step_backward(
    grads_out: Sequence[Tensor], grads: Tensor, m: Tensor, v: Tensor, pool: PoolSettings
) -> tuple[Tensor, Tensor, Tensor]:
    from amalgam.kernels import teacher_step as kernels

    grads, m, v = contiguous((grads, m, v))
    return kernels.teacher_step_backward(contiguous(grads_out), grads, m, v, pool)


SINGLE = frozenset({torch.float32})

# Of student_unroll_backward: coordinates that fill a GPU, and bytes of their states to hold.
UNROLL_CHUNK = 1 << 16
UNROLL_HELD = 3 << 30


@backend.kernel("student_step", dtypes=SINGLE, takes_numerics=True)
def _student_step(
    grad: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    settings: StepSettings,
    *,
    numerics: Numerics,
) -> tuple[Tensor, StudentState]:
    from amalgam.kernels import student_step as kernels

    inputs, weights = contiguous((grad, *state)), contiguous(weights)
    update, *new = kernels.student_step(inputs, weights, settings, *numerics)
    return update, StudentState(*new)


@backend.kernel("student_step_backward", dtypes=SINGLE, takes_numerics=True)
def _student_step_backward(
    d_update: Tensor,
    d_state: StudentState,
    grad: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    settings: StepSettings,
    *,
    numerics: Numerics,
) -> tuple[Tensor, StudentState, list[Tensor]]:
    from amalgam.kernels import student_step as kernels

    grads_out, inputs = contiguous((d_update, *d_state)), contiguous((grad, *state))
    (d_grad, *d_old), d_weights = kernels.student_step_backward(
        grads_out, inputs, contiguous(weights), settings, numerics.precision
    )
    return d_grad, StudentState(*d_old), d_weights


register_into(backend, dtypes=SINGLE, takes_numerics=True)


@backend.kernel("student_step_", dtypes=SINGLE, takes_numerics=True)
def _student_step_in_place(step: InPlaceStep, *, numerics: Numerics) -> None:
    from amalgam.kernels import student_step_in_place as kernels

    params, grads, put_back = dense_in_place(step)
    step = step._replace(weights=contiguous(step.weights))
    kernels.student_step_in_place(step, params, grads, *numerics)
    put_back()


@backend.kernel("student_unroll_backward", dtypes=SINGLE, takes_numerics=True)
def _student_unroll_backward(
    grads: Tensor,
    adjoints: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    settings: StepSettings,
    *,
    numerics: Numerics,
) -> list[Tensor]:
    return by_steps(
        functools.partial(_student_step, numerics=numerics),
        functools.partial(_student_step_backward, numerics=numerics),
        *(grads, adjoints, state, contiguous(weights), settings),
        chunk=UNROLL_CHUNK,
        held=UNROLL_HELD,
    )


@backend.kernel("choice_step", dtypes=SINGLE, takes_numerics=True)
def _choice_step(
    grad: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    arguments: ChoiceArguments,
    *,
    numerics: Numerics,
) -> tuple[Tensor, StudentState, Tensor]:
    from amalgam.kernels import choice_step as kernels

    ranks, pool, time, learning_rate = arguments
    inputs = contiguous((grad, *state, ranks))
    update, *new, mixture = kernels.choice_step(
        inputs, contiguous(weights), pool, time, learning_rate, *numerics
    )
    return update, StudentState(*new), mixture


@backend.kernel("choice_step_backward", dtypes=SINGLE, takes_numerics=True)
def _choice_step_backward(
    d_update: Tensor,
    d_state: StudentState,
    d_mixture: Tensor,
    grad: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    arguments: ChoiceArguments,
    *,
    numerics: Numerics,
) -> tuple[Tensor, StudentState, list[Tensor]]:
    from amalgam.kernels import choice_step as kernels

    ranks, pool, time, learning_rate = arguments
    grads_out, inputs = contiguous((d_update, *d_state, d_mixture)), (grad, *state, ranks)
    (d_grad, *d_old), d_weights = kernels.choice_step_backward(
        grads_out,
        contiguous(inputs),
        contiguous(weights),
        pool,
        time,
        learning_rate,
        numerics.precision,
    )
    return d_grad, StudentState(*d_old), d_weights
