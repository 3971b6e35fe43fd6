"""Backend ``triton``: the kernels of ``amalgam.kernels``, compiled at their first use."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from amalgam.backends.arguments import (
    checked_choice,
    checked_in_place,
    checked_pool,
    checked_state,
    checked_teachers,
    checked_weights,
)
from amalgam.backends.pointers import checked
from amalgam.operations.registry import Numerics, register_backend
from amalgam.operations.student_step import register_into
from amalgam.operations.student_unroll_backward import by_steps

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

    k, n = teachers.shape
    student = checked("student", student, (n,), student)
    teachers = checked("teachers", teachers, (k, n), student)
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

    k, n = teachers.shape
    student = checked("student", student, (n,), student)
    teachers = checked("teachers", teachers, (k, n), student)
    grad = checked("grad", grad, (k,), student)
    total = checked("total", total, (k,), student)
    return kernels.teacher_distance_backward(
        grad, student, teachers, total, eps, huber_delta, need_teachers
    )


@backend.kernel("teacher_step")
def _teacher_step(
    grads: Tensor,
    m: Tensor,
    v: Tensor,
    kinds: Sequence[int],
    lr: Sequence[float],
    beta1: Sequence[float],
    beta2: Sequence[float],
    eps: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    from amalgam.kernels import teacher_step as kernels

    grads, m, v = checked_pool(("grads", "m", "v"), (grads, m, v))
    checked_teachers(len(grads), kinds, lr, beta1, beta2, eps)
    return kernels.teacher_step(grads, m, v, kinds, lr, beta1, beta2, eps)


@backend.kernel("teacher_step_backward")
def _teacher_step_backward(
    grads_out: Sequence[Tensor],
    grads: Tensor,
    m: Tensor,
    v: Tensor,
    kinds: Sequence[int],
    lr: Sequence[float],
    beta1: Sequence[float],
    beta2: Sequence[float],
    eps: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    from amalgam.kernels import teacher_step as kernels

    names = ("grads", "m", "v", "grads_out[0]", "grads_out[1]", "grads_out[2]")
    grads, m, v, *grads_out = checked_pool(names, (grads, m, v, *grads_out))
    checked_teachers(len(grads), kinds, lr, beta1, beta2, eps)
    return kernels.teacher_step_backward(grads_out, grads, m, v, kinds, lr, beta1, beta2, eps)


SINGLE = frozenset({torch.float32})

# Of student_unroll_backward: coordinates that fill a GPU, and bytes of their states to hold.
UNROLL_CHUNK = 1 << 16
UNROLL_HELD = 3 << 30


@backend.kernel("student_step", dtypes=SINGLE, takes_numerics=True)
def _student_step(
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    h: Tensor,
    c: Tensor,
    weights: Sequence[Tensor],
    alpha: float,
    beta1: float,
    beta2: float,
    eps: float,
    *,
    numerics: Numerics,
) -> tuple[Tensor, ...]:
    from amalgam.kernels import student_step as kernels

    inputs = checked_state((grad, m, v, h, c))
    weights = checked_weights(weights, grad)
    return kernels.student_step(inputs, weights, (alpha, beta1, beta2, eps), *numerics)


@backend.kernel("student_step_backward", dtypes=SINGLE, takes_numerics=True)
def _student_step_backward(
    grads_out: Sequence[Tensor],
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    h: Tensor,
    c: Tensor,
    weights: Sequence[Tensor],
    alpha: float,
    beta1: float,
    beta2: float,
    eps: float,
    *,
    numerics: Numerics,
) -> tuple[Tensor | list[Tensor], ...]:
    from amalgam.kernels import student_step as kernels

    inputs = checked_state((grad, m, v, h, c))
    grads_out = checked_state(tuple(grads_out), like=grad, shapes=inputs)
    weights = checked_weights(weights, grad)
    settings = (alpha, beta1, beta2, eps)
    return kernels.student_step_backward(grads_out, inputs, weights, settings, numerics.precision)


register_into(backend, dtypes=SINGLE, takes_numerics=True)


@backend.kernel("student_step_", dtypes=SINGLE, takes_numerics=True)
def _student_step_in_place(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    h: Sequence[Tensor],
    c: Sequence[Tensor],
    weights: Sequence[Tensor],
    alpha: float,
    beta1: float,
    beta2: float,
    eps: float,
    lr: float,
    weight_decay: float,
    control: Tensor | None = None,
    steps: Sequence[Tensor] = (),
    warmup_steps: int = 0,
    seeds: Sequence[int] = (),
    *,
    numerics: Numerics,
) -> None:
    from amalgam.kernels import student_step_in_place as kernels

    weights = checked_weights(weights, m[0])
    tensors, put_back = checked_in_place(params, grads, m, v, h, c)
    settings = (alpha, beta1, beta2, eps)
    kernels.student_step_in_place(
        *(tensors, weights, settings, lr, weight_decay, control, steps, warmup_steps, seeds),
        *numerics,
    )
    put_back()


@backend.kernel("student_unroll_backward", dtypes=SINGLE, takes_numerics=True)
def _student_unroll_backward(
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
    *,
    numerics: Numerics,
) -> list[Tensor]:
    return by_steps(
        functools.partial(_student_step, numerics=numerics),
        functools.partial(_student_step_backward, numerics=numerics),
        (grads, adjoints, m, v, h, c),
        checked_weights(weights, grads),
        (alpha, beta1, beta2, eps),
        chunk=UNROLL_CHUNK,
        held=UNROLL_HELD,
    )


@backend.kernel("choice_step", dtypes=SINGLE, takes_numerics=True)
def _choice_step(
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    h: Tensor,
    c: Tensor,
    weights: Sequence[Tensor],
    ranks: Tensor,
    kinds: Sequence[int],
    lr: Sequence[float],
    beta1: Sequence[float],
    beta2: Sequence[float],
    eps: Sequence[float],
    time: float,
    learning_rate: float,
    *,
    numerics: Numerics,
) -> tuple[Tensor, ...]:
    from amalgam.kernels import choice_step as kernels

    pool = kinds, lr, beta1, beta2, eps
    checked_teachers(len(kinds), *pool)
    inputs, weights = checked_choice(len(kinds), (grad, m, v, h, c, ranks), weights)
    return kernels.choice_step(inputs, weights, pool, time, learning_rate, *numerics)


@backend.kernel("choice_step_backward", dtypes=SINGLE, takes_numerics=True)
def _choice_step_backward(
    grads_out: Sequence[Tensor],
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    h: Tensor,
    c: Tensor,
    weights: Sequence[Tensor],
    ranks: Tensor,
    kinds: Sequence[int],
    lr: Sequence[float],
    beta1: Sequence[float],
    beta2: Sequence[float],
    eps: Sequence[float],
    time: float,
    learning_rate: float,
    *,
    numerics: Numerics,
) -> tuple[Tensor | list[Tensor], ...]:
    from amalgam.kernels import choice_step as kernels

    pool = kinds, lr, beta1, beta2, eps
    checked_teachers(len(kinds), *pool)
    inputs, weights = checked_choice(len(kinds), (grad, m, v, h, c, ranks), weights)
    grads_out = [
        checked(f"grads_out[{index}]", tensor, shaped.shape, grad)
        for index, (tensor, shaped) in enumerate(zip(grads_out, (*inputs[:5], m), strict=True))
    ]
    return kernels.choice_step_backward(
        grads_out, inputs, weights, pool, time, learning_rate, numerics.precision
    )
