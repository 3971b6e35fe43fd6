"""How each backend computes ``student_step``."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from amalgam.backends import core, cpu, triton
from amalgam.backends.memory import (
    check_written,
    contiguous,
    dtype_name,
    unwritten,
)
from amalgam.operations.registry import Numerics
from amalgam.operations.student_step import StepSettings, StudentState, register_into
from amalgam.operations.table import addresses


@cpu.backend.kernel("student_step")
def _cpu_student_step(
    grad: Tensor, state: StudentState, weights: Sequence[Tensor], settings: StepSettings
) -> tuple[Tensor, StudentState]:
    update = grad.new_empty(grad.shape)
    new = StudentState(*unwritten(state))
    _cpu_student_step_into(update, new, grad, state, weights, settings)
    return update, new


@cpu.backend.kernel("student_step_into")
def _cpu_student_step_into(
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
    run_on_cpu(
        torch.tensor([[row[name] for name in table_fields()]], device="cpu"),
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


@cpu.backend.kernel("student_step_backward")
def _cpu_student_step_backward(
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


@cpu.backend.kernel("student_step_backward_into")
def _cpu_student_step_backward_into(
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


@functools.cache
def table_fields() -> tuple[str, ...]:
    """What a row of the table of tensors holds, a 64-bit word each."""
    return tuple(core.core().cpu.student_tensor_fields)


def run_on_cpu(
    table: Tensor,
    weights: Sequence[Tensor],
    settings: StepSettings,
    *,
    grad: torch.dtype,
    cells: torch.dtype,
    out: torch.dtype,
    **how: object,
) -> None:
    """Step the tensors of a table, functionally or in place.

    Args:
        table: Int64 (tensors, fields), a row of :func:`table_fields` a tensor.
        weights: The student's weights.
        settings: Its constants.
        grad: The gradients' dtype.
        cells: The dtype of h and c.
        out: The dtype of updates or parameters.
        **how: What the core takes beside: ``in_place``, ``keep``, ``lr``, ``stochastic``; and what
            it may do for speed, ``bfloat16`` products and with them ``approximate`` activations.
    """
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


@triton.backend.kernel("student_step", dtypes=triton.SINGLE, takes_numerics=True)
def _triton_student_step(
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


@triton.backend.kernel("student_step_backward", dtypes=triton.SINGLE, takes_numerics=True)
def _triton_student_step_backward(
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


register_into(triton.backend, dtypes=triton.SINGLE, takes_numerics=True)
