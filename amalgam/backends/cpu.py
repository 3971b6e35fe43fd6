"""Backend ``cpu``: C++ on all cores, with the best instruction set of the machine."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from amalgam.backends import core
from amalgam.backends.memory import (
    check_written,
    contiguous,
    dense_in_place,
    dtype_name,
    unwritten,
    with_contiguous_rows,
)
from amalgam.operations.choice_step import ChoiceArguments
from amalgam.operations.registry import register_backend
from amalgam.operations.rounding import key_of
from amalgam.operations.student_step import StepSettings, StudentState
from amalgam.operations.student_step_in_place import InPlaceStep
from amalgam.operations.table import addresses
from amalgam.operations.teacher_step import PoolSettings
from amalgam.operations.warm_up import warm_up_

# Dtypes of parameters and gradients, and integers as wide.
_STORED = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


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
    student, teachers = contiguous((student, teachers))
    distances, totals = student.new_empty(k), student.new_empty(k)
    function = getattr(core.core().cpu, f"teacher_distance_{dtype_name(student)}")
    function(
        *addresses((student, teachers, distances, totals)),
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
    grad, student, teachers, total = contiguous((grad, student, teachers, total))
    in_student = student.new_empty(n)
    in_teachers = student.new_empty((k, n) if need_teachers else (0,))
    function = getattr(core.core().cpu, f"teacher_distance_backward_{dtype_name(student)}")
    function(
        *addresses((grad, student, teachers, total, in_student)),
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
    grad: Tensor, state: StudentState, weights: Sequence[Tensor], settings: StepSettings
) -> tuple[Tensor, StudentState]:
    update = grad.new_empty(grad.shape)
    new = StudentState(*unwritten(state))
    _student_step_into(update, new, grad, state, weights, settings)
    return update, new


@backend.kernel("student_step_into")
def _student_step_into(
    update: Tensor,
    new: StudentState,
    grad: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    settings: StepSettings,
) -> None:
    check_written(_WRITTEN, (update, *new))
    inputs = contiguous((grad, *state))
    row = dict(zip(("grad", *StudentState._fields), addresses(inputs), strict=True))
    row |= {f"new_{name}": tensor.data_ptr() for name, tensor in new._asdict().items()}
    row |= {"numel": grad.numel(), "out": update.data_ptr(), "key": 0}
    _run_student_step(
        torch.tensor([[row[name] for name in _fields()]]),
        weights,
        settings,
        grad=grad.dtype,
        cells=grad.dtype,
        out=grad.dtype,
        in_place=False,
        keep=0.0,
        lr=0.0,
        stochastic=False,
    )


_WRITTEN = ("update", *(f"new {name}" for name in StudentState._fields))


@backend.kernel("student_step_backward")
def _student_step_backward(
    d_update: Tensor,
    d_new: StudentState,
    grad: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    settings: StepSettings,
) -> tuple[Tensor, StudentState, list[Tensor]]:
    d_state = StudentState(*unwritten(state))
    d_grad, d_weights = _run_student_step_backward(
        d_state, d_update, d_new, grad, state, weights, settings
    )
    return d_grad, d_state, d_weights


@backend.kernel("student_step_backward_into")
def _student_step_backward_into(
    d_update: Tensor,
    d_state: StudentState,
    grad: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    settings: StepSettings,
) -> tuple[Tensor, list[Tensor]]:
    check_written([f"d_state.{name}" for name in StudentState._fields], d_state)
    return _run_student_step_backward(d_state, d_update, d_state, grad, state, weights, settings)


def _run_student_step_backward(
    d_state: StudentState,
    d_update: Tensor,
    d_new: StudentState,
    grad: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    settings: StepSettings,
) -> tuple[Tensor, list[Tensor]]:
    """Write the gradients in the state; return those in ``grad`` and in the weights."""
    grad, d_update = contiguous((grad, d_update))
    dense, d_dense, weights = contiguous(state), contiguous(d_new), contiguous(weights)
    d_grad = grad.new_empty(grad.shape)
    d_weights = unwritten(weights)
    layers, hidden = state.h.shape[:2]
    getattr(core.core().cpu, f"student_step_backward_{dtype_name(grad)}")(
        d_update.data_ptr(),
        addresses(d_dense),
        grad.data_ptr(),
        addresses(dense),
        d_grad.data_ptr(),
        addresses(d_state),
        addresses(weights),
        addresses(d_weights),
        n=grad.numel(),
        layers=layers,
        hidden=hidden,
        constants=settings,
        threads=torch.get_num_threads(),
    )
    return d_grad, d_weights


@backend.kernel("student_step_")
def _student_step_in_place(step: InPlaceStep) -> None:
    keep, lr, warm_rate = 1 - step.lr * step.weight_decay, step.lr, 0.0
    if step.control is not None:
        keep, lr, warm_rate, skip = step.control.tolist()
        if skip:
            return
    params, grads, put_back = dense_in_place(step)
    table = _in_place_table(step, params, grads)
    no_step = torch.zeros(())
    keys = [
        key_of(seed, step.steps[i] if step.steps else no_step) for i, seed in enumerate(step.seeds)
    ]
    if keys:
        table[:, _column("key")] = torch.tensor([int(key) for key in keys])
    tensors = step.tensors
    layers, hidden = tensors.h[0].shape[:2]
    counts = torch.stack(step.steps).tolist() if step.warmup_steps else []
    warming = {index for index, count in enumerate(counts) if count < step.warmup_steps}
    for index in warming:
        param, grad, m, v = params[index], grads[index], tensors.m[index], tensors.v[index]
        key = keys[index] if keys else None
        warm_up_(param, grad, m, v, step.settings, keep, warm_rate, key, layers * hidden)
    kinds = list(zip(map(_dtype, grads), map(_dtype, params), strict=True))
    rows_of: dict[tuple[torch.dtype, torch.dtype], Sequence[int]] = {kinds[0]: range(len(kinds))}
    if warming or len(set(kinds)) > 1:
        rows_of = {
            kind: [i for i, one in enumerate(kinds) if one == kind and i not in warming]
            for kind in set(kinds)
        }
    for (grad_dtype, param_dtype), rows in rows_of.items():
        _run_student_step(
            table if len(rows) == len(table) else table[list(rows)],
            step.weights,
            step.settings,
            grad=grad_dtype,
            cells=tensors.h[0].dtype,
            out=param_dtype,
            in_place=True,
            keep=keep,
            lr=lr,
            stochastic=bool(keys),
        )
    put_back()


def _in_place_table(step: InPlaceStep, params: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """A row a parameter of :func:`_fields`, kept with the step's tensors until one moves."""
    tensors, moving = step.tensors, {"grad": addresses(grads)}
    if params is not tensors.params:
        moving["out"] = addresses(params)  # copies
    if "cpu" not in tensors.made:
        columns = {name: addresses(getattr(tensors, name)) for name in StudentState._fields}
        columns |= {f"new_{name}": column for name, column in columns.items()}
        columns |= {"numel": [param.numel() for param in params], "out": addresses(params)}
        empty = [0] * len(params)
        rows = torch.tensor([columns.get(name, empty) for name in _fields()]).T.contiguous()
        tensors.made["cpu"] = rows, {}
    table: Tensor
    table, written = tensors.made["cpu"]
    if written != moving:
        for name, column in moving.items():
            table[:, _column(name)] = torch.tensor(column)
        tensors.made["cpu"] = table, moving
    return table


@backend.kernel("largest_magnitude", dtypes=_STORED)
def _largest_magnitude(tensors: Sequence[Tensor]) -> Tensor:
    like, dense = tensors[0], contiguous(tensors)
    bits = core.core().cpu.largest_magnitude(
        addresses(dense),
        list(map(Tensor.numel, dense)),
        bytes=like.element_size(),
        threads=torch.get_num_threads(),
    )
    return torch.tensor(bits, dtype=_STORED[like.dtype]).view(like.dtype)


_dtype = attrgetter("dtype")


@functools.cache
def _fields() -> tuple[str, ...]:
    """What a row of the table of tensors holds, a 64-bit word each."""
    return tuple(core.core().cpu.student_tensor_fields)


@functools.cache
def _column(name: str) -> int:
    return _fields().index(name)


def _run_student_step(
    table: Tensor,
    weights: Sequence[Tensor],
    settings: StepSettings,
    *,
    grad: torch.dtype,
    cells: torch.dtype,
    out: torch.dtype,
    **how: object,
) -> None:
    weights = contiguous(weights)
    getattr(core.core().cpu, f"student_step_{dtype_name(weights[0])}")(
        table.data_ptr(),
        len(table),
        addresses(weights),
        layers=(len(weights) - 2) // 3,
        hidden=weights[-2].shape[1],
        constants=settings,
        grad=dtype_name(grad),
        cells=dtype_name(cells),
        out=dtype_name(out),
        threads=torch.get_num_threads(),
        **how,
    )


@backend.kernel("student_unroll_backward")
def _student_unroll_backward(
    grads: Tensor,
    adjoints: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    settings: StepSettings,
) -> list[Tensor]:
    steps, n = grads.shape
    layers, hidden = state.h.shape[:2]
    grads, grads_stride = with_contiguous_rows(grads)
    adjoints, adjoints_stride = with_contiguous_rows(adjoints)
    dense, weights = contiguous(state), contiguous(weights)
    d_weights = unwritten(weights)
    getattr(core.core().cpu, f"student_unroll_backward_{dtype_name(grads)}")(
        grads.data_ptr(),
        adjoints.data_ptr(),
        addresses(dense),
        addresses(weights),
        addresses(d_weights),
        steps=steps,
        n=n,
        grads_stride=grads_stride,
        adjoints_stride=adjoints_stride,
        layers=layers,
        hidden=hidden,
        constants=settings,
        threads=torch.get_num_threads(),
    )
    return d_weights


@backend.kernel("teacher_step")
def _teacher_step(
    grads: Tensor, m: Tensor, v: Tensor, pool: PoolSettings
) -> tuple[Tensor, Tensor, Tensor]:
    k, n = grads.shape
    inputs = contiguous((grads, m, v))
    updates, new_m, new_v = unwritten(inputs)
    getattr(core.core().cpu, f"teacher_step_{dtype_name(grads)}")(
        *addresses((*inputs, updates, new_m, new_v)),
        n=n,
        k=k,
        **pool._asdict(),
        threads=torch.get_num_threads(),
    )
    return updates, new_m, new_v


@backend.kernel("teacher_step_backward")
def _teacher_step_backward(
    grads_out: Sequence[Tensor], grads: Tensor, m: Tensor, v: Tensor, pool: PoolSettings
) -> tuple[Tensor, Tensor, Tensor]:
    k, n = grads.shape
    inputs, grads_out = contiguous((grads, m, v)), contiguous(grads_out)
    d_grads, d_m, d_v = unwritten(inputs)
    getattr(core.core().cpu, f"teacher_step_backward_{dtype_name(grads)}")(
        *addresses((*grads_out, *inputs, d_grads, d_m, d_v)),
        n=n,
        k=k,
        **pool._asdict(),
        threads=torch.get_num_threads(),
    )
    return d_grads, d_m, d_v


@backend.kernel("choice_step")
def _choice_step(
    grad: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    arguments: ChoiceArguments,
) -> tuple[Tensor, StudentState, Tensor]:
    inputs, weights = contiguous((grad, *state, arguments.ranks)), contiguous(weights)
    update = grad.new_empty(grad.shape)
    new = StudentState(*unwritten(state))
    mixture = state.m.new_empty(state.m.shape)
    getattr(core.core().cpu, f"choice_step_{dtype_name(grad)}")(
        *(inputs[0].data_ptr(), addresses(inputs[1:5]), inputs[5].data_ptr()),
        *(update.data_ptr(), addresses(new), mixture.data_ptr(), addresses(weights)),
        **_choice_settings(grad, state, arguments),
    )
    return update, new, mixture


@backend.kernel("choice_step_backward")
def _choice_step_backward(
    d_update: Tensor,
    d_new: StudentState,
    d_mixture: Tensor,
    grad: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    arguments: ChoiceArguments,
) -> tuple[Tensor, StudentState, list[Tensor]]:
    inputs, weights = contiguous((grad, *state, arguments.ranks)), contiguous(weights)
    d_update, *new, d_mixture = contiguous((d_update, *d_new, d_mixture))
    d_grad = grad.new_empty(grad.shape)
    d_state = StudentState(*unwritten(state))
    d_weights = unwritten(weights)
    getattr(core.core().cpu, f"choice_step_backward_{dtype_name(grad)}")(
        *(d_update.data_ptr(), addresses(new), d_mixture.data_ptr()),
        *(inputs[0].data_ptr(), addresses(inputs[1:5]), inputs[5].data_ptr()),
        d_grad.data_ptr(),
        addresses(d_state),
        addresses(weights),
        addresses(d_weights),
        **_choice_settings(grad, state, arguments),
    )
    return d_grad, d_state, d_weights


def _choice_settings(
    grad: Tensor, state: StudentState, arguments: ChoiceArguments
) -> dict[str, object]:
    layers, hidden = state.h.shape[:2]
    return {
        "n": grad.numel(),
        "layers": layers,
        "hidden": hidden,
        **arguments.pool._asdict(),
        "time": arguments.time,
        "learning_rate": arguments.learning_rate,
        "threads": torch.get_num_threads(),
    }
