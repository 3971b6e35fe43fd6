"""Backend ``cpu``: C++ on all cores, with the best instruction set of the machine."""

from __future__ import annotations

import torch
from torch import Tensor

from amalgam.backends import core
from amalgam.backends.pointers import checked, dtype_name
from amalgam.ops.registry import register_backend

NO_HUBER = -1.0


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
        huber_delta=NO_HUBER if huber_delta is None else huber_delta,
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
        huber_delta=NO_HUBER if huber_delta is None else huber_delta,
        threads=torch.get_num_threads(),
    )
    return in_student, in_teachers
