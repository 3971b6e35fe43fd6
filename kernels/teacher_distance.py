"""Log distance of a student to K teachers; formulas: amalgam/operations/teacher_distance.py."""

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


@triton.jit(do_not_specialize=["k"])
def sum_blocks(
    student,  # (N,)
    teachers,  # (K, N)
    partials,  # (K, P) out, float64, P = ceil(N / BLOCK)
    n,
    k,
    delta: tl.float64,
    HUBER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """First stage: program p leaves, for each teacher, the penalties' sum over its block."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    at_student = tl.load(student + at, mask=inside, other=0.0)
    typed_delta = tl.full((), delta, at_student.dtype)
    row = teachers  # advances by n: a product k * n would need 64 bits
    out = partials + tl.program_id(0)
    for _ in range(k):
        difference = at_student - tl.load(row + at, mask=inside, other=0.0)
        total = tl.sum(_penalty(difference, typed_delta, HUBER), 0)
        tl.store(out, total.to(tl.float64))
        row += n
        out += tl.num_programs(0)


@triton.jit(do_not_specialize=["count"])
def finish(
    partials,  # (K, P) float64
    distances,  # (K,) out
    totals,  # (K,) out
    count,  # P
    eps: tl.float64,
    log_n: tl.float64,
    BLOCK: tl.constexpr,
):
    """Second stage: one program per teacher adds its partial sums in a fixed order."""
    teacher = tl.program_id(0).to(tl.int64)
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sums += tl.load(partials + teacher * count + at, mask=at < count, other=0.0)
    total = tl.sum(sums, 0)
    tl.store(totals + teacher, total.to(totals.dtype.element_ty))
    distance = tl.log(total + eps) - log_n
    tl.store(distances + teacher, distance.to(distances.dtype.element_ty))


@triton.jit(do_not_specialize=["k"])
def gradients(
    grad,  # (K,)
    student,  # (N,)
    teachers,  # (K, N)
    totals,  # (K,)
    in_student,  # (N,) out
    in_teachers,  # (K, N) out, if WITH_TEACHERS
    n,
    k,
    eps: tl.float64,
    delta: tl.float64,
    HUBER: tl.constexpr,
    WITH_TEACHERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program p computes both gradients on its block of coordinates."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    at_student = tl.load(student + at, mask=inside, other=0.0)
    typed_delta = tl.full((), delta, at_student.dtype)
    sums = tl.zeros((BLOCK,), at_student.dtype)
    row = teachers
    out = in_teachers
    for teacher in range(k):
        weight = tl.load(grad + teacher).to(tl.float64) / (tl.load(totals + teacher) + eps)
        slope = at_student - tl.load(row + at, mask=inside, other=0.0)
        if HUBER:
            # Comparisons with NaN are false, so NaN passes through as in torch.clamp.
            slope = tl.where(slope > typed_delta, typed_delta, slope)
            slope = tl.where(slope < -typed_delta, -typed_delta, slope)
        weighted = weight.to(at_student.dtype) * slope
        sums += weighted
        if WITH_TEACHERS:
            tl.store(out + at, -weighted, mask=inside)
            out += n
        row += n
    tl.store(in_student + at, sums, mask=inside)


def teacher_distance(
    student: Tensor, teachers: Tensor, eps: float, huber_delta: float | None
) -> tuple[Tensor, Tensor]:
    """Launch the forward.

    Args:
        student: Shape (N,), contiguous, float32 or float64.
        teachers: Shape (K, N), contiguous, same dtype and device.
        eps: Added to the sum before the log.
        huber_delta: Where Huber turns linear, or ``None`` for no Huber.

    Returns:
        The distances, shape (K,), and the sums inside their logs, shape (K,).
    """
    k, n = teachers.shape
    distances, totals = student.new_empty(k), student.new_empty(k)
    blocks = triton.cdiv(n, BLOCK)
    partials = student.new_empty((k, blocks), dtype=torch.float64)
    if k == 0:
        return distances, totals
    with on_device_of(student):
        if blocks > 0:
            sum_blocks[(blocks,)](
                student,
                teachers,
                partials,
                n,
                k,
                0.0 if huber_delta is None else huber_delta,
                HUBER=huber_delta is not None,
                BLOCK=BLOCK,
                **OPTIONS,
            )
        log_n = math.log(max(n, 1))
        finish[(k,)](partials, distances, totals, blocks, eps, log_n, BLOCK=FINAL_BLOCK, **OPTIONS)
    return distances, totals


def teacher_distance_backward(
    grad: Tensor,
    student: Tensor,
    teachers: Tensor,
    total: Tensor,
    eps: float,
    huber_delta: float | None,
    need_teachers: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the backward.

    Args:
        grad: Gradient in the distances, shape (K,), contiguous.
        student: Shape (N,), contiguous, float32 or float64.
        teachers: Shape (K, N), contiguous, same dtype and device.
        total: The sums that the forward returned, shape (K,).
        eps: As in the forward.
        huber_delta: As in the forward.
        need_teachers: Whether to compute the teachers' gradient.

    Returns:
        Gradients in student, shape (N,), and in teachers, shape (K, N), or (0,) if not needed.
    """
    k, n = teachers.shape
    in_student = student.new_empty(n)
    in_teachers = student.new_empty((k, n) if need_teachers else (0,))
    if n == 0:
        return in_student, in_teachers
    with on_device_of(student):
        gradients[(triton.cdiv(n, BLOCK),)](
            grad,
            student,
            teachers,
            total,
            in_student,
            in_teachers,
            n,
            k,
            eps,
            0.0 if huber_delta is None else huber_delta,
            HUBER=huber_delta is not None,
            WITH_TEACHERS=need_teachers,
            BLOCK=BLOCK,
            **OPTIONS,
        )
    return in_student, in_teachers
