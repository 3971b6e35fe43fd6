"""How each backend computes ``teacher_distance``."""

from __future__ import annotations

import torch
from torch import Tensor

from amalgam.backends import core, cpu, cuda, triton
from amalgam.backends.memory import (
    contiguous,
    dtype_name,
)
from amalgam.operations.table import addresses


@cpu.backend.kernel("teacher_distance")
def _cpu_teacher_distance(
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


@cpu.backend.kernel("teacher_distance_backward")
def _cpu_teacher_distance_backward(
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


@cuda.backend.kernel("teacher_distance")
def _cuda_teacher_distance(
    student: Tensor, teachers: Tensor, eps: float, huber_delta: float | None
) -> tuple[Tensor, Tensor]:
    k, n = teachers.shape
    student, teachers = contiguous((student, teachers))
    module, dtype = core.core().cuda, dtype_name(student)
    distances, totals = student.new_empty(k), student.new_empty(k)
    count = getattr(module, f"teacher_distance_partials_{dtype}")(n)
    partials = student.new_empty((k, count), dtype=torch.float64)
    with torch.cuda.device(student.device):
        getattr(module, f"teacher_distance_{dtype}")(
            *addresses((student, teachers, distances, totals, partials)),
            n=n,
            k=k,
            eps=eps,
            huber_delta=core.NO_HUBER if huber_delta is None else huber_delta,
            device=student.get_device(),
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return distances, totals


@cuda.backend.kernel("teacher_distance_backward")
def _cuda_teacher_distance_backward(
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
    function = getattr(core.core().cuda, f"teacher_distance_backward_{dtype_name(student)}")
    with torch.cuda.device(student.device):
        function(
            *addresses((grad, student, teachers, total, in_student)),
            in_teachers.data_ptr() if need_teachers else 0,
            n=n,
            k=k,
            eps=eps,
            huber_delta=core.NO_HUBER if huber_delta is None else huber_delta,
            device=student.get_device(),
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return in_student, in_teachers


@triton.backend.kernel("teacher_distance")
def _triton_teacher_distance(
    student: Tensor, teachers: Tensor, eps: float, huber_delta: float | None
) -> tuple[Tensor, Tensor]:
    from amalgam.kernels import teacher_distance as kernels

    student, teachers = contiguous((student, teachers))
    return kernels.teacher_distance(student, teachers, eps, huber_delta)


@triton.backend.kernel("teacher_distance_backward")
def _triton_teacher_distance_backward(
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
