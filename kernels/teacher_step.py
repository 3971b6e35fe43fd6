"""One step of a pool of analytical teachers; the kinds' formulas: teacher_kinds.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from amalgam.kernels.launch import on_device_of
from amalgam.kernels.teacher_kinds import has_m, has_v, moments, of_kind
from amalgam.operations.teacher_step import PoolSettings

BYTES = 2048  # that a program reads of a row: four floats a thread, by one load
# Fusion is named because Triton 3.10 turns it off by default.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}

# A teacher's row of the table that the kernels read, in their dtype.
COLUMNS = (
    "kind",
    "lr",
    "beta1",
    "beta2",
    "eps",
    "1 - beta1",
    "1 - beta2",
    "1 / (1 - beta1)",
    "1 / (1 - beta2)",
)
WIDTH = tl.constexpr(len(COLUMNS))


@triton.jit
def settings_of(teacher):
    """The numbers of COLUMNS, from where the teacher's row of the table begins."""
    return (
        tl.load(teacher).to(tl.int32),
        tl.load(teacher + 1),
        tl.load(teacher + 2),
        tl.load(teacher + 3),
        tl.load(teacher + 4),
        tl.load(teacher + 5),
        tl.load(teacher + 6),
        tl.load(teacher + 7),
        tl.load(teacher + 8),
    )


@triton.jit
def forward(
    table,  # (K, WIDTH)
    grads,  # (K, N)
    m,  # (K, N)
    v,  # (K, N)
    updates,  # (K, N) out
    new_m,  # (K, N) out
    new_v,  # (K, N) out
    n,
    BLOCK: tl.constexpr,
):
    """Program (p, k) takes the p-th block of teacher k's coordinates."""
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    at += row * n
    kind, lr, beta1, beta2, eps, rest1, rest2, inverse1, inverse2 = settings_of(table + row * WIDTH)
    g = tl.load(grads + at, mask=inside, other=0.0)
    old_m = tl.load(m + at, mask=inside, other=0.0)
    old_v = tl.load(v + at, mask=inside, other=0.0)
    now_m, now_v = moments(kind, g, old_m, old_v, beta1, beta2, rest1, rest2)
    tl.store(new_m + at, now_m, mask=inside)
    tl.store(new_v + at, now_v, mask=inside)
    update = of_kind(kind, 0.0, g, now_m, now_v, lr, eps, inverse1, inverse2, False)
    tl.store(updates + at, update, mask=inside)


@triton.jit
def gradients(
    table,  # (K, WIDTH)
    d_updates,  # (K, N)
    d_m,  # (K, N) gradient in the new m
    d_v,  # (K, N) gradient in the new v
    grads,  # (K, N)
    m,  # (K, N)
    v,  # (K, N)
    in_grads,  # (K, N) out
    in_m,  # (K, N) out
    in_v,  # (K, N) out
    n,
    BLOCK: tl.constexpr,
):
    """Program (p, k) takes the p-th block of teacher k's coordinates."""
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    at += row * n
    kind, lr, beta1, beta2, eps, rest1, rest2, inverse1, inverse2 = settings_of(table + row * WIDTH)
    g = tl.load(grads + at, mask=inside, other=0.0)
    old_m = tl.load(m + at, mask=inside, other=0.0)
    old_v = tl.load(v + at, mask=inside, other=0.0)
    d = tl.load(d_updates + at, mask=inside, other=0.0)
    now_m, now_v = moments(kind, g, old_m, old_v, beta1, beta2, rest1, rest2)
    of_g, of_m, of_v = of_kind(kind, d, g, now_m, now_v, lr, eps, inverse1, inverse2, True)
    of_m += tl.load(d_m + at, mask=inside, other=0.0)
    of_v += tl.load(d_v + at, mask=inside, other=0.0)
    if has_m(kind):
        of_g = tl.fma(rest1, of_m, of_g)
        of_m = beta1 * of_m
    if has_v(kind):
        of_g = tl.fma(2.0 * rest2 * g, of_v, of_g)
        of_v = beta2 * of_v
    tl.store(in_grads + at, of_g, mask=inside)
    tl.store(in_m + at, of_m, mask=inside)
    tl.store(in_v + at, of_v, mask=inside)


def teacher_table(like: Tensor, pool: PoolSettings) -> Tensor:
    """The teachers' settings where kernels can read them.

    A tensor, because a program can't index scalar arguments by its row, and those of a tuple are
    float32. One for all, so that it takes one copy; from pinned memory, which waits for nothing and
    which PyTorch keeps for a CUDA graph that captured it. It is made anew in each call: one kept
    from before could be freed while another stream, or a graph, still reads it.

    Args:
        like: A tensor of the dtype and device wanted.
        pool: The K teachers.

    Returns:
        Shape (K, WIDTH), the columns those of ``COLUMNS``, each rounded once.
    """
    rows = [
        (kind, rate, b1, b2, e, 1 - b1, 1 - b2, 1 / (1 - b1), 1 / (1 - b2))
        for kind, rate, b1, b2, e in zip(*pool, strict=True)
    ]
    table = torch.tensor(rows, dtype=like.dtype, pin_memory=like.is_cuda)
    return table.to(like.device, non_blocking=True)


def teacher_step(
    grads: Tensor, m: Tensor, v: Tensor, pool: PoolSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward.

    Args:
        grads: Each teacher's gradient, shape (K, N), contiguous, float32 or float64.
        m: First moments, likewise, same dtype and device.
        v: Second moments, likewise.
        pool: The K teachers, at most 65535.

    Returns:
        The updates and the new m and v, each (K, N).
    """
    k, n = grads.shape
    updates, new_m, new_v = (tensor.new_empty((k, n)) for tensor in (grads, m, v))
    if k == 0 or n == 0:
        return updates, new_m, new_v
    block = BYTES // grads.element_size()
    with on_device_of(grads):
        forward[(triton.cdiv(n, block), k)](
            teacher_table(grads, pool),
            grads,
            m,
            v,
            updates,
            new_m,
            new_v,
            n,
            BLOCK=block,
            **OPTIONS,
        )
    return updates, new_m, new_v


def teacher_step_backward(
    grads_out: Sequence[Tensor], grads: Tensor, m: Tensor, v: Tensor, pool: PoolSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward.

    Args:
        grads_out: Gradients in the updates and the new m and v, each as ``grads``.
        grads: As in the forward, and so the others.
        m: The moments before the step.
        v: Likewise.
        pool: As in the forward.

    Returns:
        Gradients in ``grads``, m and v, each (K, N).
    """
    k, n = grads.shape
    in_grads, in_m, in_v = (tensor.new_empty((k, n)) for tensor in (grads, m, v))
    if k == 0 or n == 0:
        return in_grads, in_m, in_v
    block = BYTES // grads.element_size()
    with on_device_of(grads):
        gradients[(triton.cdiv(n, block), k)](
            teacher_table(grads, pool),
            *grads_out,
            grads,
            m,
            v,
            in_grads,
            in_m,
            in_v,
            n,
            BLOCK=block,
            **OPTIONS,
        )
    return in_grads, in_m, in_v
