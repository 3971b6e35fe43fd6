"""How each backend computes ``student_unroll_backward``."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from amalgam.backends import core, cpu, cuda, nominal_on_cuda, triton
from amalgam.backends.memory import (
    contiguous,
    dtype_name,
    unwritten,
    with_contiguous_rows,
)
from amalgam.backends.student_step import sizes_of, student_on_cpu
from amalgam.operations.registry import Numerics
from amalgam.operations.student_forms import StepSettings
from amalgam.operations.student_step import StudentState
from amalgam.operations.student_unroll_backward import by_steps
from amalgam.operations.table import addresses


@cpu.backend.kernel("student_unroll_backward")
def _cpu_student_unroll_backward(
    grads: Tensor,
    adjoints: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    settings: StepSettings,
) -> list[Tensor]:
    steps, n = grads.shape
    grads, grads_stride = with_contiguous_rows(grads)
    adjoints, adjoints_stride = with_contiguous_rows(adjoints)
    dense = contiguous(state)
    student, _held = student_on_cpu(weights, settings)
    d_weights = unwritten(weights)
    getattr(core.core().cpu, f"student_unroll_backward_{dtype_name(grads)}")(
        grads.data_ptr(),
        adjoints.data_ptr(),
        addresses(dense),
        student,
        addresses(d_weights),
        steps=steps,
        sizes=sizes_of(settings, n),
        grads_stride=grads_stride,
        adjoints_stride=adjoints_stride,
        threads=torch.get_num_threads(),
    )
    return d_weights


cuda.backend.kernel(
    "student_unroll_backward", dtypes=triton.SINGLE, accepts=nominal_on_cuda.accepts
)(nominal_on_cuda.unroll_backward)


# Of student_unroll_backward: coordinates that fill a GPU, and bytes of their states to hold.
UNROLL_CHUNK = 1 << 16


UNROLL_HELD = 3 << 30


@triton.backend.kernel("student_unroll_backward", dtypes=triton.SINGLE, takes_numerics=True)
def _triton_student_unroll_backward(
    grads: Tensor,
    adjoints: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    settings: StepSettings,
    *,
    numerics: Numerics,
) -> list[Tensor]:
    kernels = triton.backend.kernels
    return by_steps(
        functools.partial(kernels["student_step"].function, numerics=numerics),
        functools.partial(kernels["student_step_backward"].function, numerics=numerics),
        *(grads, adjoints, state, contiguous(weights), settings),
        chunk=UNROLL_CHUNK,
        held=UNROLL_HELD,
    )
