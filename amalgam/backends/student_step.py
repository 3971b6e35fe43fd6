"""How each backend computes ``student_step``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from amalgam.backends import core, cpu, cuda, nominal_on_cuda, triton
from amalgam.backends.memory import (
    check_written,
    contiguous,
    dtype_name,
    unwritten,
)
from amalgam.operations import registry
from amalgam.operations.registry import Numerics
from amalgam.operations.student_forms import StepSettings
from amalgam.operations.student_step import OfStudents, StudentState, one_of, stacked
from amalgam.operations.table import addresses

_WRITTEN = ("update", *(f"new {name}" for name in StudentState._fields))


def _register_one_by_one(
    backend: registry.Backend,
    step: Callable[..., None],
    backward: Callable[..., tuple[Tensor, list[Tensor]]],
) -> None:
    """Register a step of one student and its backward pass, each also into memory that is there.

    Args:
        backend: The backend.
        step: Takes memory for the update and the new state, and what ``student_step`` takes; of
            one student, as several take their steps one after another.
        backward: Takes memory for the gradients in the state, and what ``student_step_backward``
            takes; returns those in the gradient and in the weights.
    """

    def functional(
        grad: Tensor, state: StudentState, weights: Sequence[Tensor], settings: StepSettings
    ) -> tuple[Tensor, StudentState]:
        update, new = grad.new_empty(grad.shape), StudentState(*unwritten(state))
        step(update, new, grad, state, weights, settings)
        return update, new

    def into(update: Tensor, new: StudentState, *arguments: Any) -> None:
        check_written(_WRITTEN, (update, *new))
        given = OfStudents(*arguments)
        for student in range(len(update)):
            step(update[student], one_of(new, student), *given.one(student))

    def functional_backward(
        d_update: Tensor,
        d_new: StudentState,
        grad: Tensor,
        state: StudentState,
        weights: Sequence[Tensor],
        settings: StepSettings,
    ) -> tuple[Tensor, StudentState, list[Tensor]]:
        d_state = StudentState(*unwritten(state))
        d_grad, d_weights = backward(d_state, d_update, d_new, grad, state, weights, settings)
        return d_grad, d_state, d_weights

    def backward_into(
        d_update: Tensor, d_state: StudentState, *arguments: Any
    ) -> tuple[Tensor, list[Tensor]]:
        check_written([f"d_state.{name}" for name in StudentState._fields], d_state)
        given, found = OfStudents(*arguments), []
        for student in range(len(d_update)):
            d_one = one_of(d_state, student)
            one = backward(d_one, d_update[student], d_one, *given.one(student))
            found.append((one[0], *one[1]))
        d_grad, *d_weights = map(stacked, zip(*found, strict=True))
        return d_grad, d_weights

    backend.kernel("student_step")(functional)
    backend.kernel("student_step_into")(into)
    backend.kernel("student_step_backward")(functional_backward)
    backend.kernel("student_step_backward_into")(backward_into)


def _step_on_cpu(
    update: Tensor,
    new: StudentState,
    grad: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    settings: StepSettings,
) -> None:
    inputs = contiguous((grad, *state))
    n, each = grad.numel(), grad.element_size()
    columns = dict(zip(("grad", *StudentState._fields), addresses(inputs), strict=True))
    columns |= {f"new_{name}": tensor.data_ptr() for name, tensor in new._asdict().items()}
    columns["out"] = update.data_ptr()
    rows, begin = [], 0
    for index, size in enumerate(sizes_of(settings, n)):
        row = {name: address + begin * each for name, address in columns.items()}
        row |= {"numel": size, "stride": n, "index": index, "key": 0}
        rows.append([row[name] for name in table_fields()])
        begin += size
    run_on_cpu(
        torch.tensor(rows, dtype=torch.int64, device="cpu"),
        weights,
        settings,
        grad=grad.dtype,
        moments=grad.dtype,
        cells=grad.dtype,
        out=grad.dtype,
        in_place=False,
        keep=0.0,
        lr=0.0,
        stochastic=False,
    )


def sizes_of(settings: StepSettings, n: int) -> list[int]:
    """The sizes of the tensors that n coordinates belong to; in the form RNNProp, of one."""
    return [n] if settings.corrections is None else list(settings.sizes)


def student_on_cpu(
    weights: Sequence[Tensor], settings: StepSettings
) -> tuple[tuple[object, ...], list[Tensor]]:
    """A student as the core takes it, and the tensors to hold while it does.

    Args:
        weights: Its weights.
        settings: Its constants, and what the nominal form is given of tensors.
    """
    held = contiguous(weights)
    network = (len(held) - 2) // 3, held[-2].shape[1], settings.constants, addresses(held)
    if settings.corrections is None:
        return (*network, False, 0, 1), held
    corrections = settings.corrections.contiguous()
    student = (*network, True, corrections.data_ptr(), corrections.shape[-2])
    return student, [*held, corrections]


def _backward_on_cpu(
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
    dense, d_dense = contiguous(state), contiguous(d_new)
    student, _held = student_on_cpu(weights, settings)
    d_grad = grad.new_empty(grad.shape)
    d_weights = unwritten(weights)
    getattr(core.core().cpu, f"student_step_backward_{dtype_name(grad)}")(
        d_update.data_ptr(),
        addresses(d_dense),
        grad.data_ptr(),
        addresses(dense),
        d_grad.data_ptr(),
        addresses(d_state),
        student,
        addresses(d_weights),
        sizes=sizes_of(settings, grad.numel()),
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
    moments: torch.dtype,
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
        moments: The dtype of m and v.
        cells: The dtype of h and c.
        out: The dtype of updates or parameters.
        **how: What the core takes beside: ``in_place``, ``keep``, ``lr``, ``stochastic``; and what
            it may do for speed, ``bfloat16`` products and with them ``approximate`` activations.
    """
    student, _held = student_on_cpu(weights, settings)
    getattr(core.core().cpu, f"student_step_{dtype_name(weights[0])}")(
        table.data_ptr(),
        len(table),
        student,
        grad=dtype_name(grad),
        moments=dtype_name(moments),
        cells=dtype_name(cells),
        out=dtype_name(out),
        threads=torch.get_num_threads(),
        **how,
    )


def _register_of_students(
    backend: registry.Backend,
    step: Callable[..., None],
    backward: Callable[..., list[Tensor]],
    accepts: registry.Accepts,
    *,
    takes_numerics: bool = False,
) -> None:
    """Register a step of S students in one launch and its backward pass, of one student, too.

    Args:
        backend: The backend.
        step: Takes memory for the updates (S, N) and the new states; the gradients and the states;
            the weights; the settings.
        backward: Takes memory for the gradients in the gradients and in the states, which may be
            the next one's; the gradients in the updates and in the new states; then what ``step``
            takes after its memory. Returns the gradients in the weights.
        accepts: As :meth:`amalgam.operations.registry.Backend.kernel` takes it.
        takes_numerics: Whether both take ``numerics``.
    """
    kernel = functools.partial(
        backend.kernel, dtypes=triton.SINGLE, takes_numerics=takes_numerics, accepts=accepts
    )

    @kernel("student_step")
    def functional(
        grad: Tensor,
        state: StudentState,
        weights: Sequence[Tensor],
        settings: StepSettings,
        **numerics: Any,
    ) -> tuple[Tensor, StudentState]:
        update, new = grad.new_empty(grad.shape), StudentState(*unwritten(state))
        one = _single(grad, state, weights, settings)
        step(_as_students(update, *new), *one, **numerics)
        return update, new

    @kernel("student_step_into")
    def into(
        update: Tensor,
        new: StudentState,
        grad: Tensor,
        state: StudentState,
        weights: Sequence[Tensor],
        settings: StepSettings,
        **numerics: Any,
    ) -> None:
        check_written(_WRITTEN, (update, *new))
        step((update, *new), (grad, *state), weights, settings, **numerics)

    @kernel("student_step_backward")
    def functional_backward(
        d_update: Tensor,
        d_new: StudentState,
        grad: Tensor,
        state: StudentState,
        weights: Sequence[Tensor],
        settings: StepSettings,
        **numerics: Any,
    ) -> tuple[Tensor, StudentState, list[Tensor]]:
        d_grad, d_state = grad.new_empty(grad.shape), StudentState(*unwritten(state))
        results, grads_out = _as_students(d_grad, *d_state), _as_students(d_update, *d_new)
        one = _single(grad, state, weights, settings)
        d_weights = backward(results, grads_out, *one, **numerics)
        # What an operation returns may share no memory.
        return d_grad, d_state, [weight[0].clone() for weight in d_weights]

    @kernel("student_step_backward_into")
    def backward_into(
        d_update: Tensor,
        d_state: StudentState,
        grad: Tensor,
        state: StudentState,
        weights: Sequence[Tensor],
        settings: StepSettings,
        **numerics: Any,
    ) -> tuple[Tensor, list[Tensor]]:
        check_written([f"d_state.{name}" for name in StudentState._fields], d_state)
        d_grad = grad.new_empty(grad.shape)
        results, grads_out = (d_grad, *d_state), (d_update, *d_state)
        inputs = grad, *state
        return d_grad, backward(results, grads_out, inputs, weights, settings, **numerics)


def _as_students(*tensors: Tensor) -> list[Tensor]:
    """Tensors of one student as those of several students are."""
    return [tensor[None] for tensor in tensors]


def _single(
    grad: Tensor, state: StudentState, weights: Sequence[Tensor], settings: StepSettings
) -> tuple[list[Tensor], list[Tensor], StepSettings]:
    """What a step takes of one student, as of several students."""
    if settings.corrections is not None:
        settings = settings._replace(corrections=settings.corrections[None])
    return _as_students(grad, *state), _as_students(*weights), settings


def _triton_accepts(*arguments: Any, **_: Any) -> str | None:
    state, _weights, _settings = arguments[-3:]
    if state.h.dim() < 4 or len(state.h) <= triton.GRID_ROWS:
        return None
    return f"it steps at most {triton.GRID_ROWS} students at once, not {len(state.h)}"


def _triton_step(
    results: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    settings: StepSettings,
    *,
    numerics: Numerics,
) -> None:
    from amalgam.kernels import student_step as kernels

    kernels.student_step(results, contiguous(inputs), contiguous(weights), settings, *numerics)


def _triton_backward(
    results: Sequence[Tensor],
    grads_out: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    settings: StepSettings,
    *,
    numerics: Numerics,
) -> list[Tensor]:
    from amalgam.kernels import student_step as kernels

    dense = contiguous(grads_out), contiguous(inputs), contiguous(weights)
    d_grad, *d_state = results
    # Not into memory that is read: several warps load the same number, and one may have written
    # what another has yet to load (bench/results/gpu/README.md).
    apart = d_state[0] is not grads_out[1]
    written = d_state if apart else unwritten(d_state)
    d_weights = kernels.student_step_backward(
        (d_grad, *written), *dense, settings, numerics.precision
    )
    if not apart:
        torch._foreach_copy_(d_state, written)
    return d_weights


_register_one_by_one(cpu.backend, _step_on_cpu, _backward_on_cpu)
_register_of_students(
    cuda.backend, nominal_on_cuda.step, nominal_on_cuda.step_backward, nominal_on_cuda.accepts
)
_register_of_students(
    triton.backend, _triton_step, _triton_backward, _triton_accepts, takes_numerics=True
)
