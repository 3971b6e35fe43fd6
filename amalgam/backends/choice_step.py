"""How each backend computes ``choice_step``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from amalgam.backends import core, cpu, cuda, triton
from amalgam.backends.cuda_weights import pack_choice
from amalgam.backends.memory import (
    contiguous,
    dtype_name,
    unwritten,
)
from amalgam.operations.choice_step import RANKS, ChoiceArguments
from amalgam.operations.kept import kept
from amalgam.operations.registry import Numerics
from amalgam.operations.student_step import StudentState
from amalgam.operations.table import addresses


@cpu.backend.kernel("choice_step")
def _cpu_choice_step(
    grad: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    arguments: ChoiceArguments,
) -> tuple[Tensor, StudentState, Tensor]:
    inputs, weights = contiguous((grad, *state, arguments.ranks)), contiguous(weights)
    update = grad.new_empty(grad.shape)
    new = StudentState(*unwritten(state))
    mixture = state.m.new_empty(state.m.shape)
    getattr(core.core().cpu, f"choice_step_{dtype_name(grad)}")(
        *(inputs[0].data_ptr(), addresses(inputs[1:5]), inputs[5].data_ptr()),
        *(update.data_ptr(), addresses(new), mixture.data_ptr(), addresses(weights)),
        **_cpu_settings(grad, state, arguments),
    )
    return update, new, mixture


@cpu.backend.kernel("choice_step_backward")
def _cpu_choice_step_backward(
    d_update: Tensor,
    d_new: StudentState,
    d_mixture: Tensor,
    grad: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    arguments: ChoiceArguments,
) -> tuple[Tensor, StudentState, list[Tensor]]:
    inputs, weights = contiguous((grad, *state, arguments.ranks)), contiguous(weights)
    d_update, *new, d_mixture = contiguous((d_update, *d_new, d_mixture))
    d_grad = grad.new_empty(grad.shape)
    d_state = StudentState(*unwritten(state))
    d_weights = unwritten(weights)
    getattr(core.core().cpu, f"choice_step_backward_{dtype_name(grad)}")(
        *(d_update.data_ptr(), addresses(new), d_mixture.data_ptr()),
        *(inputs[0].data_ptr(), addresses(inputs[1:5]), inputs[5].data_ptr()),
        d_grad.data_ptr(),
        addresses(d_state),
        addresses(weights),
        addresses(d_weights),
        **_cpu_settings(grad, state, arguments),
    )
    return d_grad, d_state, d_weights


def _cpu_settings(
    grad: Tensor, state: StudentState, arguments: ChoiceArguments
) -> dict[str, object]:
    settings = _settings(grad, state, arguments)
    return settings | {"layers": len(state.h), "threads": torch.get_num_threads()}


def _settings(grad: Tensor, state: StudentState, arguments: ChoiceArguments) -> dict[str, object]:
    return {
        "n": grad.numel(),
        "hidden": state.h.shape[1],
        **arguments.pool._asdict(),
        "time": arguments.time,
        "learning_rate": arguments.learning_rate,
    }


@functools.cache
def _units() -> list[int]:
    """The sizes of one layer that are compiled in."""
    units: list[int] = core.core().cuda.choice_sizes()
    return units


MOST_TEACHERS = 8  # of csrc/cuda/choice_step.h


def _accepts(*arguments: Any) -> str | None:
    """Why CUDA's kernels can't compute an operation, or ``None``; its last arguments tell."""
    state, _weights, constants = arguments[-3:]
    architecture, teachers = tuple(state.h.shape[:2]), len(constants.pool.kinds)
    if architecture not in [(1, units) for units in _units()]:
        sizes = ", ".join(f"1x{units}" for units in _units())
        return (
            f"it has kernels for choices of {sizes} (layers x units), this one is "
            f"{'x'.join(map(str, architecture))}; backend='triton' computes any"
        )
    if teachers > MOST_TEACHERS:
        return (
            f"it has kernels for pools of {MOST_TEACHERS} teachers or fewer, this one has "
            f"{teachers}; backend='triton' computes any"
        )
    return None


@cuda.backend.kernel("choice_step", dtypes=frozenset({torch.float32}), accepts=_accepts)
def _cuda_choice_step(
    grad: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    arguments: ChoiceArguments,
) -> tuple[Tensor, StudentState, Tensor]:
    inputs = _cuda_inputs(grad, state, weights, arguments)
    update, new = grad.new_empty(grad.shape), StudentState(*unwritten(state))
    mixture = state.m.new_empty(state.m.shape)
    with torch.cuda.device(grad.device):
        core.core().cuda.choice_step(
            addresses(inputs),
            update=update.data_ptr(),
            new=addresses(new),
            mixture=mixture.data_ptr(),
            **_settings(grad, state, arguments),
            **cuda.place_of(grad),
        )
    return update, new, mixture


@cuda.backend.kernel("choice_step_backward", dtypes=frozenset({torch.float32}), accepts=_accepts)
def _cuda_choice_step_backward(
    d_update: Tensor,
    d_new: StudentState,
    d_mixture: Tensor,
    grad: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    arguments: ChoiceArguments,
) -> tuple[Tensor, StudentState, list[Tensor]]:
    module, where = core.core().cuda, cuda.place_of(grad)
    inputs = _cuda_inputs(grad, state, weights, arguments)
    d_update, *d_dense, d_mixture = contiguous((d_update, *d_new, d_mixture))
    d_grad, d_state = grad.new_empty(grad.shape), StudentState(*unwritten(state))
    hidden, teachers = state.h.shape[1], len(arguments.pool.kinds)
    with torch.cuda.device(grad.device):
        warps = module.choice_warps(hidden, teachers, grad.numel(), where["device"])
        shape = warps, module.choice_sums(hidden, teachers)
        sums = grad.new_empty(shape, dtype=torch.float64)
        module.choice_step_backward(
            addresses(inputs),
            d_update=d_update.data_ptr(),
            d_new=addresses(d_dense),
            d_mixture=d_mixture.data_ptr(),
            d_grad=d_grad.data_ptr(),
            d_state=addresses(d_state),
            sums=sums.data_ptr(),
            warps=warps,
            **_settings(grad, state, arguments),
            **where,
        )
    d_weights = _unpacked(sums.sum(0), hidden, teachers, arguments.time)
    return d_grad, d_state, [found.to(grad.dtype) for found in d_weights]


def _cuda_inputs(
    grad: Tensor, state: StudentState, weights: Sequence[Tensor], arguments: ChoiceArguments
) -> list[Tensor]:
    """What csrc/cuda/choice_step.h names in this order; hold it while addresses are in use."""
    key, teachers = ("choice_step", grad.device), len(arguments.pool.kinds)
    (packed,) = kept(key, weights, lambda: (pack_choice(weights, teachers),))
    return contiguous((packed, grad, arguments.ranks, *state))


def _unpacked(sums: Tensor, hidden: int, teachers: int, time: float) -> list[Tensor]:
    """Gradients as the weights lie, of the sums of csrc/cuda/choice_step.h."""
    pool, ranks = core.core().cuda.choice_pool(teachers), 1 + len(RANKS)
    inputs = ranks + pool + hidden
    gates, head = sums.split((4 * hidden * inputs, pool * (hidden + 1)))
    by_rank, of_teachers, of_h = gates.view(4 * hidden, inputs).split((ranks, pool, hidden), 1)
    bias, head = by_rank.sum(1), head.view(pool, hidden + 1)[:teachers]
    w_ih = torch.cat((of_teachers[:, :teachers], time * bias[:, None], by_rank[:, 1:]), 1)
    return [w_ih, of_h.contiguous(), bias, head[:, :hidden].contiguous(), head[:, hidden].clone()]


@triton.backend.kernel("choice_step", dtypes=triton.SINGLE, takes_numerics=True)
def _triton_choice_step(
    grad: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    arguments: ChoiceArguments,
    *,
    numerics: Numerics,
) -> tuple[Tensor, StudentState, Tensor]:
    from amalgam.kernels import choice_step as kernels

    ranks, pool, time, learning_rate = arguments
    inputs = contiguous((grad, *state, ranks))
    update, *new, mixture = kernels.choice_step(
        inputs, contiguous(weights), pool, time, learning_rate, *numerics
    )
    return update, StudentState(*new), mixture


@triton.backend.kernel("choice_step_backward", dtypes=triton.SINGLE, takes_numerics=True)
def _triton_choice_step_backward(
    d_update: Tensor,
    d_state: StudentState,
    d_mixture: Tensor,
    grad: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    arguments: ChoiceArguments,
    *,
    numerics: Numerics,
) -> tuple[Tensor, StudentState, list[Tensor]]:
    from amalgam.kernels import choice_step as kernels

    ranks, pool, time, learning_rate = arguments
    grads_out, inputs = contiguous((d_update, *d_state, d_mixture)), (grad, *state, ranks)
    (d_grad, *d_old), d_weights = kernels.choice_step_backward(
        grads_out,
        contiguous(inputs),
        contiguous(weights),
        pool,
        time,
        learning_rate,
        numerics.precision,
    )
    return d_grad, StudentState(*d_old), d_weights
