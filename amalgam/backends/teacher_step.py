"""How each backend computes ``teacher_step``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor

from amalgam.backends import core, cpu, cuda, triton
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
    where = {"threads": torch.get_num_threads()}
    return _run(core.core().cpu, (grads, m, v), pool, where)


@cpu.backend.kernel("teacher_step_backward")
def _cpu_teacher_step_backward(
    grads_out: Sequence[Tensor], grads: Tensor, m: Tensor, v: Tensor, pool: PoolSettings
) -> tuple[Tensor, Tensor, Tensor]:
    where = {"threads": torch.get_num_threads()}
    return _run_backward(core.core().cpu, grads_out, (grads, m, v), pool, where)


@cuda.backend.kernel("teacher_step")
def _cuda_teacher_step(
    grads: Tensor, m: Tensor, v: Tensor, pool: PoolSettings
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device(grads.device):
        return _run(core.core().cuda, (grads, m, v), pool, cuda.place_of(grads))


@cuda.backend.kernel("teacher_step_backward")
def _cuda_teacher_step_backward(
    grads_out: Sequence[Tensor], grads: Tensor, m: Tensor, v: Tensor, pool: PoolSettings
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device(grads.device):
        where = cuda.place_of(grads)
        return _run_backward(core.core().cuda, grads_out, (grads, m, v), pool, where)


def _run(
    module: ModuleType, inputs: Sequence[Tensor], pool: PoolSettings, where: Mapping[str, int]
) -> tuple[Tensor, Tensor, Tensor]:
    k, n = inputs[0].shape
    inputs = contiguous(inputs)
    updates, m, v = unwritten(inputs)
    getattr(module, f"teacher_step_{dtype_name(updates)}")(
        *addresses((*inputs, updates, m, v)), n=n, k=k, **pool._asdict(), **where
    )
    return updates, m, v


def _run_backward(
    module: ModuleType,
    grads_out: Sequence[Tensor],
    inputs: Sequence[Tensor],
    pool: PoolSettings,
    where: Mapping[str, int],
) -> tuple[Tensor, Tensor, Tensor]:
    k, n = inputs[0].shape
    inputs, grads_out = contiguous(inputs), contiguous(grads_out)
    d_grads, d_m, d_v = unwritten(inputs)
    getattr(module, f"teacher_step_backward_{dtype_name(d_grads)}")(
        *addresses((*grads_out, *inputs, d_grads, d_m, d_v)), n=n, k=k, **pool._asdict(), **where
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
