"""Log distances of rows to K teachers; formulas: amalgam/operations/teacher_distance.py."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from amalgam.kernels.launch import on_device_of

BLOCK = 2048
FINAL_BLOCK = 1024
# Fusion is named because Triton 3.10 turns it off by default.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _penalty(difference, delta, HUBER: tl.constexpr):
    penalty = 0.5 * difference * difference
    if HUBER:
        size = tl.abs(difference)
        penalty = tl.where(size < delta, penalty, delta * (size - 0.5 * delta))
    return penalty


@triton.jit(do_not_specialize=["k", "teacher_rows"])
def sum_blocks(
    students,  # (R, N)
    teachers,  # (K, Q, N)
    partials,  # (R, K, P) out, float64, P = ceil(N / BLOCK)
    n,
    k,
    teacher_rows,  # Q
    delta: tl.float64,
    HUBER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """First stage: program (p, r) leaves, for each teacher, the penalties' sum over its block."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    row = tl.program_id(1).to(tl.int64)
    at_student = tl.load(students + row * n + at, mask=inside, other=0.0)
    typed_delta = tl.full((), delta, at_student.dtype)
    teacher = teachers + row % teacher_rows * n
    stride = teacher_rows.to(tl.int64) * n
    out = partials + row * k * tl.num_programs(0) + tl.program_id(0)
    for _ in range(k):
        difference = at_student - tl.load(teacher + at, mask=inside, other=0.0)
        total = tl.sum(_penalty(difference, typed_delta, HUBER), 0)
        tl.store(out, total.to(tl.float64))
        teacher += stride
        out += tl.num_programs(0)


@triton.jit(do_not_specialize=["count"])
def finish(
    partials,  # (R, K, P) float64
    distances,  # (R, K) out
    totals,  # (R, K) out
    count,  # P
    eps: tl.float64,
    log_n: tl.float64,
    BLOCK: tl.constexpr,
):
    """Second stage: one program per row and teacher adds its partial sums in a fixed order."""
    pair = tl.program_id(0).to(tl.int64)
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sums += tl.load(partials + pair * count + at, mask=at < count, other=0.0)
    total = tl.sum(sums, 0)
    tl.store(totals + pair, total.to(totals.dtype.element_ty))
    distance = tl.log(total + eps) - log_n
    tl.store(distances + pair, distance.to(distances.dtype.element_ty))


@triton.jit(do_not_specialize=["k", "teacher_rows"])
def gradients(
    grad,  # (R, K)
    students,  # (R, N)
    teachers,  # (K, Q, N)
    totals,  # (R, K)
    in_students,  # (R, N) out
    in_teachers,  # (K, 1, N) out, if WITH_TEACHERS, of one row alone
    n,
    k,
    teacher_rows,  # Q
    eps: tl.float64,
    delta: tl.float64,
    HUBER: tl.constexpr,
    WITH_TEACHERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (p, r) computes both gradients on its block of a row's coordinates."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    row = tl.program_id(1).to(tl.int64)
    at_student = tl.load(students + row * n + at, mask=inside, other=0.0)
    typed_delta = tl.full((), delta, at_student.dtype)
    sums = tl.zeros((BLOCK,), at_student.dtype)
    teacher = teachers + row % teacher_rows * n
    stride = teacher_rows.to(tl.int64) * n
    out = in_teachers
    for pair in range(row * k, row * k + k):
        weight = tl.load(grad + pair).to(tl.float64) / (tl.load(totals + pair) + eps)
        slope = at_student - tl.load(teacher + at, mask=inside, other=0.0)
        if HUBER:
            # Comparisons with NaN are false, so NaN passes through as in torch.clamp.
            slope = tl.where(slope > typed_delta, typed_delta, slope)
            slope = tl.where(slope < -typed_delta, -typed_delta, slope)
        weighted = weight.to(at_student.dtype) * slope
        sums += weighted
        if WITH_TEACHERS:
            tl.store(out + at, -weighted, mask=inside)
            out += n
        teacher += stride
    tl.store(in_students + row * n + at, sums, mask=inside)


def teacher_distance(
    students: Tensor, teachers: Tensor, eps: float, huber_delta: float | None
) -> tuple[Tensor, Tensor]:
    """Launch the forward.

    Args:
        students: Shape (R, N), contiguous, float32 or float64.
        teachers: Shape (K, Q, N), contiguous, same dtype and device; Q divides R.
        eps: Added to the sum before the log.
        huber_delta: Where Huber turns linear, or ``None`` for no Huber.

    Returns:
        The distances, shape (R, K), and the sums inside their logs, shape (R, K).
    """
    (rows, n), (k, teacher_rows, _) = students.shape, teachers.shape
    distances, totals = students.new_empty((rows, k)), students.new_empty((rows, k))
    blocks = triton.cdiv(n, BLOCK)
    partials = students.new_empty((rows, k, blocks), dtype=torch.float64)
    if rows == 0 or k == 0:
        return distances, totals
    with on_device_of(students):
        if blocks > 0:
            sum_blocks[(blocks, rows)](
                students,
                teachers,
                partials,
                n,
                k,
                teacher_rows,
                0.0 if huber_delta is None else huber_delta,
                HUBER=huber_delta is not None,
                BLOCK=BLOCK,
                **OPTIONS,
            )
        log_n = math.log(max(n, 1))
        finish[(rows * k,)](
            partials, distances, totals, blocks, eps, log_n, BLOCK=FINAL_BLOCK, **OPTIONS
        )
    return distances, totals


def teacher_distance_backward(
    grad: Tensor,
    students: Tensor,
    teachers: Tensor,
    totals: Tensor,
    eps: float,
    huber_delta: float | None,
    need_teachers: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the backward.

    Args:
        grad: Gradient in the distances, shape (R, K), contiguous.
        students: Shape (R, N), contiguous, float32 or float64.
        teachers: Shape (K, Q, N), contiguous, same dtype and device; Q divides R.
        totals: The sums that the forward returned, shape (R, K), contiguous.
        eps: As in the forward.
        huber_delta: As in the forward.
        need_teachers: Whether to compute the teachers' gradient; then R = 1.

    Returns:
        Gradients in students, shape (R, N), and in teachers, shape (K, 1, N), or (0,) where not
        needed.
    """
    (rows, n), (k, teacher_rows, _) = students.shape, teachers.shape
    in_students = students.new_empty((rows, n))
    in_teachers = students.new_empty(teachers.shape if need_teachers else (0,))
    if rows == 0 or n == 0:
        return in_students, in_teachers
    with on_device_of(students):
        gradients[(triton.cdiv(n, BLOCK), rows)](
            grad,
            students,
            teachers,
            totals,
            in_students,
            in_teachers,
            n,
            k,
            teacher_rows,
            eps,
            0.0 if huber_delta is None else huber_delta,
            HUBER=huber_delta is not None,
            WITH_TEACHERS=need_teachers,
            BLOCK=BLOCK,
            **OPTIONS,
        )
    return in_students, in_teachers
