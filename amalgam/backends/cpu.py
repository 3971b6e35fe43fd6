"""Backend ``cpu``: C++ on all cores, with the best instruction set of the machine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amalgam.backends import core
from amalgam.backends.arguments import (
    checked_choice,
    checked_in_place,
    checked_pool,
    checked_state,
    checked_teachers,
    checked_weights,
    written_state,
)
from amalgam.backends.pointers import checked, checked_rows, dtype_name
from amalgam.operations import lstm
from amalgam.operations.registry import register_backend
from amalgam.operations.rounding import key_of
from amalgam.operations.student_step import FEATURES, OUTPUTS, StepSettings, warm_up_


def _probe() -> str | None:
    return core.load()[1]


backend = register_backend(
    "cpu",
    rank=20,
    devices=frozenset({"cpu"}),
    probe=_probe,
    about="C++ on all cores; AVX-512, AVX2 or portable, chosen on this machine",
)


@backend.kernel("teacher_distance")
def _teacher_distance(
    student: Tensor, teachers: Tensor, eps: float, huber_delta: float | None
) -> tuple[Tensor, Tensor]:
    k, n = teachers.shape
    student = checked("student", student, (n,), student)
    teachers = checked("teachers", teachers, (k, n), student)
    distances, totals = student.new_empty(k), student.new_empty(k)
    function = getattr(core.core().cpu, f"teacher_distance_{dtype_name(student)}")
    function(
        student.data_ptr(),
        teachers.data_ptr(),
        distances.data_ptr(),
        totals.data_ptr(),
        n=n,
        k=k,
        eps=eps,
        huber_delta=core.NO_HUBER if huber_delta is None else huber_delta,
        threads=torch.get_num_threads(),
    )
    return distances, totals


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
    k, n = teachers.shape
    student = checked("student", student, (n,), student)
    teachers = checked("teachers", teachers, (k, n), student)
    grad = checked("grad", grad, (k,), student)
    total = checked("total", total, (k,), student)
    in_student = student.new_empty(n)
    in_teachers = student.new_empty((k, n) if need_teachers else (0,))
    function = getattr(core.core().cpu, f"teacher_distance_backward_{dtype_name(student)}")
    function(
        grad.data_ptr(),
        student.data_ptr(),
        teachers.data_ptr(),
        total.data_ptr(),
        in_student.data_ptr(),
        in_teachers.data_ptr() if need_teachers else 0,
        n=n,
        k=k,
        eps=eps,
        huber_delta=core.NO_HUBER if huber_delta is None else huber_delta,
        threads=torch.get_num_threads(),
    )
    return in_student, in_teachers


@backend.kernel("student_step")
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = tuple(tensor.new_empty(tensor.shape) for tensor in (grad, m, v, h, c))
    _student_step_into(outputs, grad, m, v, h, c, weights, alpha, beta1, beta2, eps)
    return outputs  # type: ignore[return-value]


@backend.kernel("student_step_into")
def _student_step_into(
    out: Sequence[Tensor],
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
) -> None:
    inputs = checked_state((grad, m, v, h, c))
    weights = checked_weights(weights, grad)
    update, *state = written_state(out, inputs)
    _run_student_step(
        [_addresses(grad.numel(), *inputs, *state, update, 0)],
        weights,
        (alpha, beta1, beta2, eps),
        grad=dtype_name(grad),
        cells=dtype_name(grad),
        out=dtype_name(grad),
        in_place=False,
        keep=0.0,
        lr=0.0,
        stochastic=False,
    )


@backend.kernel("student_step_backward")
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    in_grads = tuple(tensor.new_empty(tensor.shape) for tensor in (grad, m, v, h, c))
    in_weights = _run_student_step_backward(
        in_grads, grads_out, (grad, m, v, h, c), weights, (alpha, beta1, beta2, eps)
    )
    return *in_grads, in_weights  # type: ignore[return-value]


@backend.kernel("student_step_backward_into")
def _student_step_backward_into(
    d_update: Tensor,
    d_state: Sequence[Tensor],
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
) -> tuple[Tensor, list[Tensor]]:
    d_grad = grad.new_empty(grad.shape)
    in_weights = _run_student_step_backward(
        (d_grad, *d_state),
        (d_update, *d_state),
        (grad, m, v, h, c),
        weights,
        (alpha, beta1, beta2, eps),
    )
    return d_grad, in_weights


def _run_student_step_backward(
    in_grads: Sequence[Tensor],
    grads_out: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    constants: tuple[float, float, float, float],
) -> list[Tensor]:
    """Writes the gradients in the inputs and returns those in the weights."""
    grad, _, _, h, _ = inputs = checked_state(inputs)
    grads_out = checked_state(tuple(grads_out), like=grad, shapes=inputs)
    in_grads = written_state(in_grads, inputs)
    weights = checked_weights(weights, grad)
    in_weights = [weight.new_empty(weight.shape) for weight in weights]
    layers, hidden = h.shape[:2]
    getattr(core.core().cpu, f"student_step_backward_{dtype_name(grad)}")(
        _addresses(*grads_out),
        _addresses(*inputs),
        _addresses(*in_grads),
        _addresses(*weights),
        _addresses(*in_weights),
        n=grad.numel(),
        layers=layers,
        hidden=hidden,
        constants=constants,
        threads=torch.get_num_threads(),
    )
    return in_weights


@backend.kernel("student_step_")
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
) -> None:
    weights = checked_weights(weights, m[0])
    tensors, put_back = checked_in_place(params, grads, m, v, h, c)
    keep, warm_rate = 1 - lr * weight_decay, 0.0
    if control is not None:
        keep, lr, warm_rate, skip = control.tolist()
        if skip:
            return
    settings, no_step = StepSettings(alpha, beta1, beta2, eps), torch.zeros(())
    keys = [key_of(seed, steps[i] if steps else no_step) for i, seed in enumerate(seeds)]
    batches: dict[tuple[torch.dtype, ...], list[list[int]]] = {}
    for index, (param, grad, *state) in enumerate(tensors):
        key = keys[index] if seeds else None
        if steps and steps[index] < warmup_steps:
            row = h[0].shape[0] * h[0].shape[1]
            warm_up_(param, grad, state[0], state[1], settings, keep, warm_rate, key, row)
            continue
        bits = 0 if key is None else int(key)
        addresses = _addresses(param.numel(), grad, *state, *state, param, bits)
        batches.setdefault((grad.dtype, param.dtype), []).append(addresses)
    for (grad_dtype, param_dtype), batch in batches.items():
        _run_student_step(
            batch,
            weights,
            settings,
            grad=dtype_name(grad_dtype),
            cells=dtype_name(h[0]),
            out=dtype_name(param_dtype),
            in_place=True,
            keep=keep,
            lr=lr,
            stochastic=bool(seeds),
        )
    put_back()


def _run_student_step(
    tensors: list[list[int]],
    weights: Sequence[Tensor],
    constants: tuple[float, float, float, float],
    **how: object,
) -> None:
    function = getattr(core.core().cpu, f"student_step_{dtype_name(weights[0])}")
    function(
        tensors,
        _addresses(*weights),
        layers=(len(weights) - 2) // 3,
        hidden=weights[-2].shape[1],
        constants=constants,
        threads=torch.get_num_threads(),
        **how,
    )


def _addresses(*values: Tensor | int) -> list[int]:
    return [value.data_ptr() if isinstance(value, Tensor) else value for value in values]


@backend.kernel("student_unroll_backward")
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
) -> list[Tensor]:
    lstm.check_weights(weights, h, grads, FEATURES, OUTPUTS)
    steps, n = grads.shape
    layers, hidden = h.shape[:2]
    grads, grads_stride = checked_rows("grads", grads, (steps, n), grads)
    adjoints, adjoints_stride = checked_rows("adjoints", adjoints, (steps, n), grads)
    cells = layers, hidden, n
    state = [
        checked(f"state.{name}", tensor, shape, grads)
        for name, tensor, shape in zip(
            "mvhc", (m, v, h, c), ((n,), (n,), cells, cells), strict=True
        )
    ]
    weights = checked_weights(weights, grads)
    in_weights = [weight.new_empty(weight.shape) for weight in weights]
    getattr(core.core().cpu, f"student_unroll_backward_{dtype_name(grads)}")(
        grads.data_ptr(),
        adjoints.data_ptr(),
        _addresses(*state),
        _addresses(*weights),
        _addresses(*in_weights),
        steps=steps,
        n=n,
        grads_stride=grads_stride,
        adjoints_stride=adjoints_stride,
        layers=layers,
        hidden=hidden,
        constants=(alpha, beta1, beta2, eps),
        threads=torch.get_num_threads(),
    )
    return in_weights


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
) -> tuple[Tensor, ...]:
    k, n = grads.shape
    inputs = checked_pool(("grads", "m", "v"), (grads, m, v))
    outputs = tuple(tensor.new_empty(tensor.shape) for tensor in inputs)
    getattr(core.core().cpu, f"teacher_step_{dtype_name(grads)}")(
        *(tensor.data_ptr() for tensor in (*inputs, *outputs)),
        n=n,
        k=k,
        **checked_teachers(k, kinds, lr, beta1, beta2, eps),
        threads=torch.get_num_threads(),
    )
    return outputs


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
) -> tuple[Tensor, ...]:
    k, n = grads.shape
    names = ("grads", "m", "v", "grads_out[0]", "grads_out[1]", "grads_out[2]")
    grads, m, v, *grads_out = checked_pool(names, (grads, m, v, *grads_out))
    outputs = tuple(tensor.new_empty(tensor.shape) for tensor in (grads, m, v))
    getattr(core.core().cpu, f"teacher_step_backward_{dtype_name(grads)}")(
        *(tensor.data_ptr() for tensor in (*grads_out, grads, m, v, *outputs)),
        n=n,
        k=k,
        **checked_teachers(k, kinds, lr, beta1, beta2, eps),
        threads=torch.get_num_threads(),
    )
    return outputs


@backend.kernel("choice_step")
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
) -> tuple[Tensor, ...]:
    pool = checked_teachers(len(kinds), kinds, lr, beta1, beta2, eps)
    inputs, weights = checked_choice(len(kinds), (grad, m, v, h, c, ranks), weights)
    shaped = *inputs[:5], m
    outputs = tuple(grad.new_empty(tensor.shape) for tensor in shaped)
    getattr(core.core().cpu, f"choice_step_{dtype_name(grad)}")(
        _addresses(*inputs),
        _addresses(*outputs),
        _addresses(*weights),
        n=grad.numel(),
        layers=h.shape[0],
        hidden=h.shape[1],
        **pool,
        time=time,
        learning_rate=learning_rate,
        threads=torch.get_num_threads(),
    )
    return outputs


@backend.kernel("choice_step_backward")
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
) -> tuple[Tensor | list[Tensor], ...]:
    pool = checked_teachers(len(kinds), kinds, lr, beta1, beta2, eps)
    inputs, weights = checked_choice(len(kinds), (grad, m, v, h, c, ranks), weights)
    grads_out = [
        checked(f"grads_out[{index}]", tensor, shaped.shape, grad)
        for index, (tensor, shaped) in enumerate(zip(grads_out, (*inputs[:5], m), strict=True))
    ]
    in_grads = tuple(grad.new_empty(tensor.shape) for tensor in inputs[:5])
    in_weights = [weight.new_empty(weight.shape) for weight in weights]
    getattr(core.core().cpu, f"choice_step_backward_{dtype_name(grad)}")(
        _addresses(*grads_out),
        _addresses(*inputs),
        _addresses(*in_grads, 0),
        _addresses(*weights),
        _addresses(*in_weights),
        n=grad.numel(),
        layers=h.shape[0],
        hidden=h.shape[1],
        **pool,
        time=time,
        learning_rate=learning_rate,
        threads=torch.get_num_threads(),
    )
    return *in_grads, in_weights
