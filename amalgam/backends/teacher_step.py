"""How each backend computes ``teacher_step``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amalgam.backends import core, cpu, triton
from amalgam.backends.memory import (
    contiguous,
    dtype_name,
    unwritten,
)
from amalgam.operations.table import addresses
from amalgam.operations.teacher_step import PoolSettings


@cpu.backend.kernel("teacher_step")
def _cpu_teacher_step(
    grads: Tensor, m: Tensor, v: Tensor, pool: PoolSettings
) -> tuple[Tensor, Tensor, Tensor]:
    k, n = grads.shape
    inputs = contiguous((grads, m, v))
    updates, new_m, new_v = unwritten(inputs)
    getattr(core.core().cpu, f"teacher_step_{dtype_name(grads)}")(
        *addresses((*inputs, updates, new_m, new_v)),
        n=n,
        k=k,
        **pool._asdict(),
        threads=torch.get_num_threads(),
    )
    return updates, new_m, new_v


@cpu.backend.kernel("teacher_step_backward")
def _cpu_teacher_step_backward(
    grads_out: Sequence[Tensor], grads: Tensor, m: Tensor, v: Tensor, pool: PoolSettings
) -> tuple[Tensor, Tensor, Tensor]:
    k, n = grads.shape
    inputs, grads_out = contiguous((grads, m, v)), contiguous(grads_out)
    d_grads, d_m, d_v = unwritten(inputs)
    getattr(core.core().cpu, f"teacher_step_backward_{dtype_name(grads)}")(
        *addresses((*grads_out, *inputs, d_grads, d_m, d_v)),
        n=n,
        k=k,
        **pool._asdict(),
        threads=torch.get_num_threads(),
    )
    return d_grads, d_m, d_v


@triton.backend.kernel("teacher_step")
def _triton_teacher_step(
    grads: Tensor, m: Tensor, v: Tensor, pool: PoolSettings
) -> tuple[Tensor, Tensor, Tensor]:
    from amalgam.kernels import teacher_step as kernels

    grads, m, v = contiguous((grads, m, v))
    return kernels.teacher_step(grads, m, v, pool)


@triton.backend.kernel("teacher_step_backward")
def _triton_teacher_step_backward(
    grads_out: Sequence[Tensor], grads: Tensor, m: Tensor, v: Tensor, pool: PoolSettings
) -> tuple[Tensor, Tensor, Tensor]:
    from amalgam.kernels import teacher_step as kernels

    grads, m, v = contiguous((grads, m, v))
    return kernels.teacher_step_backward(contiguous(grads_out), grads, m, v, pool)
