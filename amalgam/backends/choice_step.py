"""How each backend computes ``choice_step``."""

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
from amalgam.operations.choice_step import ChoiceArguments
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
        **_choice_settings(grad, state, arguments),
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
        **_choice_settings(grad, state, arguments),
    )
    return d_grad, d_state, d_weights


def _choice_settings(
    grad: Tensor, state: StudentState, arguments: ChoiceArguments
) -> dict[str, object]:
    layers, hidden = state.h.shape[:2]
    return {
        "n": grad.numel(),
        "layers": layers,
        "hidden": hidden,
        **arguments.pool._asdict(),
        "time": arguments.time,
        "learning_rate": arguments.learning_rate,
        "threads": torch.get_num_threads(),
    }


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
