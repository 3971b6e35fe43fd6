"""How each backend computes ``teacher_distance``."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor

from amalgam.backends import core, cpu, cuda, triton
from amalgam.backends.memory import contiguous, dtype_name
from amalgam.operations.table import addresses
from amalgam.operations.teacher_distance import DistanceArguments


@cpu.backend.kernel("teacher_distance")
def _cpu_teacher_distance(arguments: DistanceArguments) -> tuple[Tensor, Tensor]:
    arguments = _dense(arguments)
    student, teachers, *_ = arguments
    distances, totals = (student.new_empty(len(teachers)) for _ in range(2))
    pointers = addresses((student, teachers, distances, totals))
    where = {"threads": torch.get_num_threads()}
    _run(core.core().cpu, "teacher_distance", pointers, arguments, where)
    return distances, totals


@cpu.backend.kernel("teacher_distance_backward")
def _cpu_teacher_distance_backward(
    grad: Tensor, totals: Tensor, arguments: DistanceArguments, need_teachers: bool
) -> tuple[Tensor, Tensor]:
    where = {"threads": torch.get_num_threads()}
    return _run_backward(core.core().cpu, grad, totals, arguments, need_teachers, where)


@cuda.backend.kernel("teacher_distance")
def _cuda_teacher_distance(arguments: DistanceArguments) -> tuple[Tensor, Tensor]:
    arguments = _dense(arguments)
    student, teachers, *_ = arguments
    module, (k, n) = core.core().cuda, teachers.shape
    distances, totals = (student.new_empty(k) for _ in range(2))
    count = getattr(module, f"teacher_distance_partials_{dtype_name(student)}")(n)
    partials = student.new_empty((k, count), dtype=torch.float64)
    pointers = addresses((student, teachers, distances, totals, partials))
    with torch.cuda.device(student.device):
        _run(module, "teacher_distance", pointers, arguments, cuda.place_of(student))
    return distances, totals


@cuda.backend.kernel("teacher_distance_backward")
def _cuda_teacher_distance_backward(
    grad: Tensor, totals: Tensor, arguments: DistanceArguments, need_teachers: bool
) -> tuple[Tensor, Tensor]:
    with torch.cuda.device(grad.device):
        where = cuda.place_of(grad)
        return _run_backward(core.core().cuda, grad, totals, arguments, need_teachers, where)


def _dense(arguments: DistanceArguments) -> DistanceArguments:
    student, teachers, eps, huber_delta = arguments
    if student.is_contiguous() and teachers.is_contiguous():
        return arguments
    return DistanceArguments(student.contiguous(), teachers.contiguous(), eps, huber_delta)


def _run_backward(
    module: ModuleType,
    grad: Tensor,
    totals: Tensor,
    arguments: DistanceArguments,
    need_teachers: bool,
    where: Mapping[str, int],
) -> tuple[Tensor, Tensor]:
    arguments = _dense(arguments)
    student, teachers, *_ = arguments
    grad, totals = contiguous((grad, totals))
    in_student = student.new_empty(student.shape)
    in_teachers = student.new_empty(teachers.shape if need_teachers else (0,))
    pointers = addresses((grad, student, teachers, totals, in_student, in_teachers))
    _run(module, "teacher_distance_backward", pointers, arguments, where)
    return in_student, in_teachers


def _run(
    module: ModuleType,
    name: str,
    pointers: list[int],
    arguments: DistanceArguments,
    where: Mapping[str, int],
) -> None:
    k, n = arguments.teachers.shape
    huber_delta = arguments.huber_delta
    getattr(module, f"{name}_{dtype_name(arguments.student)}")(
        *pointers,
        n=n,
        k=k,
        eps=arguments.eps,
        huber_delta=core.NO_HUBER if huber_delta is None else huber_delta,
        **where,
    )


@triton.backend.kernel("teacher_distance")
def _triton_teacher_distance(arguments: DistanceArguments) -> tuple[Tensor, Tensor]:
    from amalgam.kernels import teacher_distance as kernels

    return kernels.teacher_distance(*_dense(arguments))


@triton.backend.kernel("teacher_distance_backward")
def _triton_teacher_distance_backward(
    grad: Tensor, totals: Tensor, arguments: DistanceArguments, need_teachers: bool
) -> tuple[Tensor, Tensor]:
    from amalgam.kernels import teacher_distance as kernels

    grad, totals = contiguous((grad, totals))
    student, teachers, eps, huber_delta = _dense(arguments)
    return kernels.teacher_distance_backward(
        grad, student, teachers, totals, eps, huber_delta, need_teachers
    )
