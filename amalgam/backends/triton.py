"""Backend ``triton``: the kernels of ``amalgam.kernels``, compiled at their first use."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from amalgam.backends.pointers import checked
from amalgam.ops.registry import register_backend

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
