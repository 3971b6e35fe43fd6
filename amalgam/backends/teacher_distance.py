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


def _accepts(arguments: DistanceArguments) -> str | None:
    rows = len(arguments.students)
    if rows <= triton.GRID_ROWS:
        return None
    return f"it measures at most {triton.GRID_ROWS} rows at once, not {rows}"


def _accepts_backward(
    _grad: Tensor, _totals: Tensor, arguments: DistanceArguments, _need_teachers: bool
) -> str | None:
    return _accepts(arguments)


@cpu.backend.kernel("teacher_distance")
def _cpu_teacher_distance(arguments: DistanceArguments) -> tuple[Tensor, Tensor]:
    arguments = _dense(arguments)
    students, teachers, *_ = arguments
    distances, totals = _of_pairs(arguments)
    pointers = addresses((students, teachers, distances, totals))
    where = {"threads": torch.get_num_threads()}
    _run(core.core().cpu, "teacher_distance", pointers, arguments, where)
    return distances, totals


@cpu.backend.kernel("teacher_distance_backward")
def _cpu_teacher_distance_backward(
    grad: Tensor, totals: Tensor, arguments: DistanceArguments, need_teachers: bool
) -> tuple[Tensor, Tensor]:
    where = {"threads": torch.get_num_threads()}
    return _run_backward(core.core().cpu, grad, totals, arguments, need_teachers, where)


@cuda.backend.kernel("teacher_distance", accepts=_accepts)
def _cuda_teacher_distance(arguments: DistanceArguments) -> tuple[Tensor, Tensor]:
    arguments = _dense(arguments)
    students, teachers, *_ = arguments
    module, n = core.core().cuda, students.shape[1]
    distances, totals = _of_pairs(arguments)
    count = getattr(module, f"teacher_distance_partials_{dtype_name(students)}")(n)
    partials = students.new_empty((*distances.shape, count), dtype=torch.float64)
    pointers = addresses((students, teachers, distances, totals, partials))
    with torch.cuda.device(students.device):
        _run(module, "teacher_distance", pointers, arguments, cuda.place_of(students))
    return distances, totals


@cuda.backend.kernel("teacher_distance_backward", accepts=_accepts_backward)
def _cuda_teacher_distance_backward(
    grad: Tensor, totals: Tensor, arguments: DistanceArguments, need_teachers: bool
) -> tuple[Tensor, Tensor]:
    with torch.cuda.device(grad.device):
        where = cuda.place_of(grad)
        return _run_backward(core.core().cuda, grad, totals, arguments, need_teachers, where)


def _dense(arguments: DistanceArguments) -> DistanceArguments:
    students, teachers, eps, huber_delta = arguments
    if students.is_contiguous() and teachers.is_contiguous():
        return arguments
    return DistanceArguments(students.contiguous(), teachers.contiguous(), eps, huber_delta)


def _of_pairs(arguments: DistanceArguments) -> tuple[Tensor, Tensor]:
    """Memory for the distances and the totals, (R, K) each."""
    students, teachers, *_ = arguments
    shape = len(students), len(teachers)
    return students.new_empty(shape), students.new_empty(shape)


def _run_backward(
    module: ModuleType,
    grad: Tensor,
    totals: Tensor,
    arguments: DistanceArguments,
    need_teachers: bool,
    where: Mapping[str, int],
) -> tuple[Tensor, Tensor]:
    arguments = _dense(arguments)
    students, teachers, *_ = arguments
    grad, totals = contiguous((grad, totals))
    in_students = students.new_empty(students.shape)
    in_teachers = students.new_empty(teachers.shape if need_teachers else (0,))
    pointers = addresses((grad, students, teachers, totals, in_students, in_teachers))
    _run(module, "teacher_distance_backward", pointers, arguments, where)
    return in_students, in_teachers


def _run(
    module: ModuleType,
    name: str,
    pointers: list[int],
    arguments: DistanceArguments,
    where: Mapping[str, int],
) -> None:
    k, teacher_rows, n = arguments.teachers.shape
    huber_delta = arguments.huber_delta
    getattr(module, f"{name}_{dtype_name(arguments.students)}")(
        *pointers,
        rows=len(arguments.students),
        teacher_rows=teacher_rows,
        n=n,
        k=k,
        eps=arguments.eps,
        huber_delta=core.NO_HUBER if huber_delta is None else huber_delta,
        **where,
    )


@triton.backend.kernel("teacher_distance", accepts=_accepts)
def _triton_teacher_distance(arguments: DistanceArguments) -> tuple[Tensor, Tensor]:
    from amalgam.kernels import teacher_distance as kernels

    return kernels.teacher_distance(*_dense(arguments))


@triton.backend.kernel("teacher_distance_backward", accepts=_accepts_backward)
def _triton_teacher_distance_backward(
    grad: Tensor, totals: Tensor, arguments: DistanceArguments, need_teachers: bool
) -> tuple[Tensor, Tensor]:
    from amalgam.kernels import teacher_distance as kernels

    grad, totals = contiguous((grad, totals))
    students, teachers, eps, huber_delta = _dense(arguments)
    return kernels.teacher_distance_backward(
        grad, students, teachers, totals, eps, huber_delta, need_teachers
    )
