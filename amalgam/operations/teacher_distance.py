"""``teacher_distance``: how far the student is from each teacher, in one pass.

d_k = log( sum_n huber(student_n - teacher_kn) + eps ) - log(N)

with huber(a) = a^2 / 2, or delta (|a| - delta / 2) where |a| >= delta. Source: the imitation
distance of Optimizer Amalgamation (ICLR 2022, eq. 1) as the authors' code computes it: one half of
the squared distance over all parameters jointly, its log, less the log of their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from amalgam.operations import registry
from amalgam.operations.checks import check_floating, check_like

_NAME = "teacher_distance"


class DistanceArguments(NamedTuple):
    """What the kernels' distances depend on: those of R rows, each of which has K teachers.

    Attributes:
        students: The rows' parameters, shape (R, N).
        teachers: The teachers' parameters, shape (K, Q, N), where Q divides R: row r is measured
            to ``teachers[:, r % Q]``.
        eps: As in :func:`teacher_distance`.
        huber_delta: Likewise.
    """

    students: Tensor
    teachers: Tensor
    eps: float
    huber_delta: float | None


def teacher_distance(
    student: Tensor,
    teachers: Tensor,
    *,
    eps: float = 1e-10,
    huber_delta: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Log distance between the student's parameters and each teacher's.

    Args:
        student: Parameters of the student's trajectory, shape (N,), float32 or float64.
        teachers: Parameters of the K teachers' trajectories, shape (K, N), same dtype and device.
        eps: Added to the sum before the log.
        huber_delta: Where given, differences beyond it count linearly (Huber); it must be > 0.
        backend: ``"auto"``, or a backend's name. All but ``"reference"`` are once differentiable.

    Returns:
        The distances, shape (K,). An empty student (N = 0) is at log(eps) from every teacher.

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: Shapes, dtypes, devices or ``huber_delta`` do not fit together.
        RuntimeError: The backend asked for can't compute this here.
    """
    for name, tensor in (("student", student), ("teachers", teachers)):
        check_floating(name, tensor)
    chosen = registry.resolve(_NAME, backend, student)
    if chosen == registry.REFERENCE:
        _check(student, teachers, huber_delta)
        return _reference(_one_row(student, teachers, eps, huber_delta))[0].squeeze(0)
    distances, _ = torch.ops.amalgam.teacher_distance(student, teachers, eps, huber_delta, chosen)
    return distances


def distances_and_slope(
    students: Tensor,
    teachers: Tensor,
    gradient: Callable[[Tensor], Tensor] | None,
    *,
    eps: float = 1e-10,
    huber_delta: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """:func:`teacher_distance` of many rows, without a graph, and their gradients at once.

    Args:
        students: The rows' parameters, shape (R, N), float32 or float64.
        teachers: The teachers' parameters, shape (K, Q, N), same dtype and device. Q divides R: row
            r is measured to ``teachers[:, r % Q]``.
        gradient: Of the distances (R, K), a loss's gradient in them (R, K); ``None`` where none is
            wanted.
        eps: As in :func:`teacher_distance`.
        huber_delta: Likewise.
        backend: Likewise.

    Returns:
        The distances (R, K), and the loss's gradient in ``students`` (R, N), or ``None``. A row has
        the same bits as alone, but for those of ``"reference"``.

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: Shapes, dtypes, devices or ``huber_delta`` do not fit together, or ``gradient``
            returns what does not fit the distances.
        RuntimeError: The backend asked for can't compute this here.
    """
    arguments = DistanceArguments(students, teachers, eps, huber_delta)
    _check_rows(arguments)
    distances, totals = registry.compute(_NAME, backend, students, arguments)
    if gradient is None:
        return distances, None
    grad = gradient(distances)
    check_like("gradient", grad, distances.shape, students)
    slopes, _ = registry.compute(
        f"{_NAME}_backward", backend, students, grad, totals, arguments, False
    )
    return distances, slopes


def _check(student: Tensor, teachers: Tensor, huber_delta: float | None) -> None:
    check_floating("student", student)
    if student.dim() != 1:
        raise ValueError(f"student must have shape (N,), not {tuple(student.shape)}")
    if teachers.dim() != 2 or teachers.shape[1] != student.shape[0]:
        raise ValueError(
            f"teachers must have shape (K, {student.shape[0]}) to fit student, "
            f"not {tuple(teachers.shape)}"
        )
    _check_alike(student, teachers, huber_delta)


def _check_rows(arguments: DistanceArguments) -> None:
    students, teachers, _, huber_delta = arguments
    check_floating("students", students)
    check_floating("teachers", teachers)
    if students.dim() != 2:
        raise ValueError(f"students must have shape (R, N), not {tuple(students.shape)}")
    rows, n = students.shape
    fits = teachers.dim() == 3 and teachers.shape[2] == n
    if not fits or not _divides(teachers.shape[1], rows):
        raise ValueError(
            f"teachers must have shape (K, Q, {n}) to fit students, where Q divides {rows}, "
            f"not {tuple(teachers.shape)}"
        )
    _check_alike(students, teachers, huber_delta)


def _divides(divisor: int, number: int) -> bool:
    return number % divisor == 0 if divisor else number == 0


def _check_alike(like: Tensor, teachers: Tensor, huber_delta: float | None) -> None:
    if teachers.dtype != like.dtype or teachers.device != like.device:
        check_like("teachers", teachers, teachers.shape, like)
    if huber_delta is not None and not huber_delta > 0:
        raise ValueError(f"huber_delta must be positive or None (no Huber), not {huber_delta}")


def _one_row(
    student: Tensor, teachers: Tensor, eps: float, huber_delta: float | None
) -> DistanceArguments:
    return DistanceArguments(student.unsqueeze(0), teachers.unsqueeze(1), eps, huber_delta)


def _differences(students: Tensor, teachers: Tensor) -> Tensor:
    """Of rows and their teachers, shape (R / Q, Q, K, N)."""
    teacher_rows = max(teachers.shape[1], 1)  # without rows there may be none
    by_row = students.unflatten(0, (len(students) // teacher_rows, teachers.shape[1]))
    return by_row[:, :, None] - teachers.transpose(0, 1)


@registry.reference.kernel(_NAME, dtypes=None)
def _reference(arguments: DistanceArguments) -> tuple[Tensor, Tensor]:
    """(R, K) distances and the (R, K) sums inside their logs, eps not yet added."""
    students, teachers, eps, huber_delta = arguments
    difference = _differences(students, teachers)
    if huber_delta is None:
        penalty = 0.5 * difference.square()
    else:
        # One expression for both branches; a torch.where would turn infinities' slopes into NaN.
        near = difference.clamp(-huber_delta, huber_delta)
        penalty = near * (difference - 0.5 * near)
    total = penalty.sum(-1).flatten(0, 1)
    return (total + eps).log() - math.log(max(students.shape[1], 1)), total


@registry.reference.kernel(f"{_NAME}_backward", dtypes=None)
def _reference_backward(
    grad: Tensor, totals: Tensor, arguments: DistanceArguments, need_teachers: bool
) -> tuple[Tensor, Tensor]:
    """Gradients in students (R, N) and, asked for of one row alone, in teachers (K, 1, N)."""
    students, teachers, eps, huber_delta = arguments
    slope = _differences(students, teachers).flatten(0, 1)
    if huber_delta is not None:
        slope = slope.clamp(-huber_delta, huber_delta)
    weighted = (grad / (totals + eps))[..., None] * slope
    in_teachers = -weighted.transpose(0, 1) if need_teachers else students.new_empty(0)
    return weighted.sum(1), in_teachers


@torch.library.custom_op("amalgam::teacher_distance", mutates_args=())
def _op(
    student: Tensor, teachers: Tensor, eps: float, huber_delta: float | None, backend: str
) -> tuple[Tensor, Tensor]:
    _check(student, teachers, huber_delta)
    arguments = _one_row(student, teachers, eps, huber_delta)
    distances, totals = registry.compute(_NAME, backend, student, arguments)
    return distances.squeeze(0), totals.squeeze(0)


@torch.library.custom_op("amalgam::teacher_distance_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    student: Tensor,
    teachers: Tensor,
    total: Tensor,
    eps: float,
    huber_delta: float | None,
    need_teachers: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _check(student, teachers, huber_delta)
    for name, tensor in (("grad", grad), ("total", total)):
        check_like(name, tensor, teachers.shape[:1], student)
    arguments = _one_row(student, teachers, eps, huber_delta)
    in_student, in_teachers = registry.compute(
        f"{_NAME}_backward", backend, student, grad[None], total[None], arguments, need_teachers
    )
    return in_student.squeeze(0), in_teachers.squeeze(1) if need_teachers else in_teachers


@_op.register_fake
def _(student, teachers, eps, huber_delta, backend):  # type: ignore[no-untyped-def]
    _check(student, teachers, huber_delta)
    return student.new_empty(teachers.shape[0]), student.new_empty(teachers.shape[0])


@_backward_op.register_fake
def _(grad, student, teachers, total, eps, huber_delta, need_teachers, backend):  # type: ignore[no-untyped-def]
    in_teachers = teachers.new_empty(teachers.shape) if need_teachers else teachers.new_empty(0)
    return student.new_empty(student.shape), in_teachers


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    student, teachers, ctx.eps, ctx.huber_delta, ctx.backend = inputs
    ctx.save_for_backward(student, teachers, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad, _grad_of_total):  # type: ignore[no-untyped-def]
    if grad is None:
        return None, None, None, None, None
    need_teachers = ctx.needs_input_grad[1]
    in_student, in_teachers = torch.ops.amalgam.teacher_distance_backward(
        grad, *ctx.saved_tensors, ctx.eps, ctx.huber_delta, need_teachers, ctx.backend
    )
    return in_student, in_teachers if need_teachers else None, None, None, None


_op.register_autograd(_autograd, setup_context=_setup_context)
registry.once_differentiable(_backward_op, _NAME)
