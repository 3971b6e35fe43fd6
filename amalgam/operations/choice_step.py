"""``choice_step``: one step of the optimal-choice policy, a mixture of a pool's updates.

All K teachers (:mod:`amalgam.operations.teacher_step`) see the coordinate's one gradient, and an
LSTM (:mod:`amalgam.operations.lstm`) says how much each counts::

    u_k, m_k, v_k <- teacher_step(g, m_k, v_k)
    x = [ u_1 .. u_K,  steps / time_scale,  rank == 1,  rank == 2,  rank == 3 ]
    z = head . LSTM(x) + head_bias
    w_k = exp(z_k) / (sum_j exp(z_j) + 1e-10)
    update = learning_rate sum_k w_k u_k

``steps`` counts the steps before this one, and ``rank`` is that of the parameter the coordinate
belongs to: 1 for biases, 2 for matrices, 4 (which has no feature) for the kernels of 2-D
convolutions. Source: Optimizer Amalgamation (ICLR 2022, section 2.3), as the authors' code has it.

The mixture is a softmax with one more option of logit log(1e-10) that moves nothing: the same
number, and no exponential overflows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amalgam.operations import lstm, registry
from amalgam.operations.checks import check_floating, check_like
from amalgam.operations.student_step import (
    GRADIENT_NAMES,
    STATE_NAMES,
    STATE_SCHEMA,
    StudentState,
)
from amalgam.operations.teacher_step import POOL_SCHEMA, PoolSettings

_NAME = "choice_step"
RANKS = (1, 2, 3)
IDLE_LOGIT = math.log(1e-10)


class ChoiceState(NamedTuple):
    """What the choice carries from step to step, for K teachers and N coordinates.

    Attributes:
        m: The teachers' first moments, shape (K, N); rows of teachers without one stay.
        v: Their second moments, likewise.
        h: Outputs of the LSTM layers, shape (layers, hidden, N).
        c: Their cells, shape (layers, hidden, N).
        steps: How many steps were taken.
    """

    m: Tensor
    v: Tensor
    h: Tensor
    c: Tensor
    steps: int = 0


class ChoiceSettings(NamedTuple):
    """The choice's constants; the first five hold one entry a teacher.

    Attributes:
        kinds: The teachers' kinds, from :data:`amalgam.ops.KINDS`.
        lr: Their learning rates.
        beta1: Their decays of m, in [0, 1).
        beta2: Their decays of v, in [0, 1).
        eps: What they add to v inside the root.
        time_scale: Steps that make the time feature one.
        learning_rate: Factor on the mixture.
    """

    kinds: Sequence[str]
    lr: Sequence[float]
    beta1: Sequence[float]
    beta2: Sequence[float]
    eps: Sequence[float]
    time_scale: float = 2000.0
    learning_rate: float = 1.0

    def pool(self) -> PoolSettings:
        """The teachers.

        Raises:
            ValueError: There is no such kind.
        """
        return PoolSettings.of(self.kinds, self.lr, self.beta1, self.beta2, self.eps)


class ChoiceArguments(NamedTuple):
    """What a choice's step depends on beside gradient, state and weights, as backends take it.

    Attributes:
        ranks: The rank of the parameter that each coordinate belongs to, shape (N,), int64.
        pool: The teachers.
        time: The LSTM's feature: steps over the time scale.
        learning_rate: Factor on the mixture.
    """

    ranks: Tensor
    pool: PoolSettings
    time: float
    learning_rate: float


_ARGUMENTS_SCHEMA = (
    f"Tensor grad, {STATE_SCHEMA}, Tensor[] weights, Tensor ranks, {POOL_SCHEMA}, SymInt steps, "
    "float time_scale, float learning_rate, str backend"
)


def features(teachers: int) -> int:
    """How many inputs the LSTM has over a pool of this size."""
    return teachers + 1 + len(RANKS)


def choice_step(
    grad: Tensor,
    state: ChoiceState,
    weights: Sequence[Tensor],
    ranks: Tensor,
    settings: ChoiceSettings,
    *,
    backend: str = "auto",
) -> tuple[Tensor, ChoiceState, Tensor]:
    """One step, differentiable in the gradient, the state and the weights (for meta-training).

    Args:
        grad: The optimizee's gradient, shape (N,), float32 or float64.
        state: The carried state, same dtype and device.
        weights: For each layer W_ih (4 hidden, inputs), W_hh (4 hidden, hidden), b (4 hidden,)
            with gates in the order input, forget, candidate, output; then the head (K, hidden)
            and its bias (K,). The first layer's inputs are K + 4. Same dtype and device.
        ranks: The rank of the parameter that each coordinate belongs to, shape (N,), integers.
        settings: The pool and the choice's constants.
        backend: ``"auto"``, or a backend's name. All but ``"reference"`` are once differentiable.

    Returns:
        The update (N,), to be subtracted from the parameters, the new state, and the mixture
        (K, N): what each teacher counted for, summing to one but for the 1e-10.

    Raises:
        TypeError: ``grad`` is not a floating-point tensor, or ``ranks`` not one of integers.
        ValueError: Shapes, lengths, kinds, dtypes or devices do not fit together.
        RuntimeError: The backend asked for can't compute this here.
    """
    check_floating("grad", grad)
    if not isinstance(ranks, Tensor):
        raise TypeError(f"ranks must be a tensor of integers, not {type(ranks).__name__}")
    if not settings.kinds:
        raise ValueError("kinds must name one teacher or more, not none")
    pool, carried = settings.pool(), StudentState(*state[:4])
    constants = state.steps, settings.time_scale, settings.learning_rate
    arguments = _arguments(ranks, pool, *constants)
    chosen = registry.resolve(_NAME, backend, grad, grad, carried, weights, arguments)
    if chosen == registry.REFERENCE:
        _check(grad, carried, weights, ranks, pool)
        update, new, mixture = _reference(grad, carried, weights, arguments)
    else:
        update, *moved, mixture = torch.ops.amalgam.choice_step(
            grad, *carried, list(weights), ranks, *pool, *constants, chosen
        )
        new = StudentState(*moved)
    return update, ChoiceState(new.m, new.v, new.h, new.c, state.steps + 1), mixture


def _arguments(
    ranks: Tensor, pool: PoolSettings, steps: int, time_scale: float, learning_rate: float
) -> ChoiceArguments:
    if not 0 < time_scale < math.inf:
        raise ValueError(f"time_scale must be positive and finite, not {time_scale}")
    return ChoiceArguments(ranks, pool, steps / time_scale, learning_rate)


def _check(
    grad: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    ranks: Tensor,
    pool: PoolSettings,
) -> None:
    check_floating("grad", grad)
    if grad.dim() != 1:
        raise ValueError(f"grad must have shape (N,), not {tuple(grad.shape)}")
    if ranks.is_floating_point() or ranks.is_complex():
        raise TypeError(f"ranks must be a tensor of integers, not {ranks.dtype}")
    if ranks.shape != grad.shape or ranks.device != grad.device:
        raise ValueError(
            f"ranks must have shape {tuple(grad.shape)} on {grad.device} as grad has, "
            f"not {tuple(ranks.shape)} on {ranks.device}"
        )
    pool.check()
    k = len(pool.kinds)
    lstm.check_weights(weights, state.h, grad, features(k), k)
    _check_state(state, k, state.h.shape[:2], grad)


def _check_state(
    state: StudentState,
    k: int,
    architecture: Sequence[int],
    grad: Tensor,
    names: Sequence[str] = STATE_NAMES,
) -> None:
    per_teacher, cells = (k, *grad.shape), (*architecture, *grad.shape)
    shapes = per_teacher, per_teacher, cells, cells
    for name, tensor, shape in zip(names, state, shapes, strict=True):
        check_like(name, tensor, shape, grad)


def pool_inputs(
    grad: Tensor, m: Tensor, v: Tensor, ranks: Tensor, time: float, pool: PoolSettings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The teachers' updates, m and v, (K, N) each, and the LSTM's inputs, (K + 4, N)."""
    teachers = registry.reference.kernels["teacher_step"].function
    u, m, v = teachers(grad.expand(m.shape), m, v, pool)
    is_rank = torch.stack([ranks == rank for rank in RANKS]).to(u.dtype)
    return u, m, v, torch.cat((u, torch.full_like(u[:1], time), is_rank))


def soft_mixture(logits: Tensor) -> Tensor:
    """Of logits (K, N), how much each counts, (K, N)."""
    idle = torch.full_like(logits[:1], IDLE_LOGIT)
    return torch.cat((logits, idle)).softmax(0)[:-1]


@registry.reference.kernel(_NAME, dtypes=None)
def _reference(
    grad: Tensor, state: StudentState, weights: Sequence[Tensor], arguments: ChoiceArguments
) -> tuple[Tensor, StudentState, Tensor]:
    """Gives the update (N,), the new state, and the mixture (K, N)."""
    ranks, pool, time, learning_rate = arguments
    u, m, v, x = pool_inputs(grad, state.m, state.v, ranks, time, pool)
    out, h, c = lstm.step(x, state.h, state.c, weights)
    head, head_bias = weights[-2:]
    mixture = soft_mixture(torch.addmm(head_bias[:, None], head, out))
    update = learning_rate * (mixture * u).sum(0)
    return update, StudentState(m, v, h, c), mixture


@registry.reference.kernel(f"{_NAME}_backward", dtypes=None)
def _reference_backward(
    d_update: Tensor,
    d_state: StudentState,
    d_mixture: Tensor,
    grad: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    arguments: ChoiceArguments,
) -> tuple[Tensor, StudentState, list[Tensor]]:
    """The step's vector-Jacobian product; only its inputs were kept, the gates come again."""
    ranks, pool, time, learning_rate = arguments
    u, _, _, x = pool_inputs(grad, state.m, state.v, ranks, time, pool)
    traced = lstm.trace(x, state.h, state.c, weights)
    out = traced.inputs[-1]
    head, head_bias = weights[-2:]
    mixture = soft_mixture(torch.addmm(head_bias[:, None], head, out))

    d_update = learning_rate * d_update
    d_mixture = d_mixture + d_update * u
    d_logits = mixture * (d_mixture - (mixture * d_mixture).sum(0))
    d_x, in_h, in_c, d_weights = lstm.backward(
        traced, head.T @ d_logits, d_state.h, d_state.c, state.h, state.c, weights
    )
    d_weights += [d_logits @ out.T, d_logits.sum(1)]
    d_u = d_update * mixture + d_x[: len(u)]
    teachers_backward = registry.reference.kernels["teacher_step_backward"].function
    in_grads, in_m, in_v = teachers_backward(
        [d_u, d_state.m, d_state.v], grad.expand(u.shape), state.m, state.v, pool
    )
    return in_grads.sum(0), StudentState(in_m, in_v, in_h, in_c), d_weights


# ---- the torch operators


def _structured(
    *flat: Any,
) -> tuple[Tensor, StudentState, Sequence[Tensor], ChoiceArguments, str]:
    grad, m, v, h, c, weights, ranks, *columns, steps, time_scale, learning_rate, backend = flat
    pool, state = PoolSettings(*columns), StudentState(m, v, h, c)
    _check(grad, state, weights, ranks, pool)
    arguments = _arguments(ranks.to(torch.int64), pool, steps, time_scale, learning_rate)
    return grad, state, weights, arguments, backend


@torch.library.custom_op(
    "amalgam::choice_step",
    mutates_args=(),
    schema=f"({_ARGUMENTS_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _op(*flat: Any) -> tuple[Tensor, ...]:
    grad, state, weights, arguments, backend = _structured(*flat)
    update, new, mixture = registry.compute(_NAME, backend, grad, grad, state, weights, arguments)
    return update, *new, mixture


@torch.library.custom_op(
    "amalgam::choice_step_backward",
    mutates_args=(),
    schema=f"(Tensor[] grads_out, {_ARGUMENTS_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])",
)
def _backward_op(grads_out: Sequence[Tensor], *flat: Any) -> tuple[Tensor | list[Tensor], ...]:
    grad, state, weights, arguments, backend = _structured(*flat)
    d_update, *d_new, d_mixture = grads_out
    d_state = StudentState(*d_new)
    check_like("grads_out[0]", d_update, grad.shape, grad)
    k, architecture = len(arguments.pool.kinds), state.h.shape[:2]
    _check_state(d_state, k, architecture, grad, GRADIENT_NAMES)
    check_like("grads_out[5]", d_mixture, state.m.shape, grad)
    d_grad, d_old, d_weights = registry.compute(
        f"{_NAME}_backward",
        backend,
        grad,
        *(d_update, d_state, d_mixture, grad, state, weights, arguments),
    )
    return d_grad, *d_old, d_weights


@_op.register_fake
def _(*flat: Any) -> tuple[Tensor, ...]:
    grad, state, *_ = _structured(*flat)
    return tuple(tensor.new_empty(tensor.shape) for tensor in (grad, *state, state.m))


@_backward_op.register_fake
def _(grads_out: Sequence[Tensor], *flat: Any) -> tuple[Tensor | list[Tensor], ...]:
    found = (tensor.new_empty(tensor.shape) for tensor in flat[:5])
    return *found, [weight.new_empty(weight.shape) for weight in flat[5]]


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    grad, m, v, h, c, weights, ranks, *ctx.constants = inputs
    ctx.save_for_backward(grad, m, v, h, c, ranks, *weights)


def _autograd(ctx: Any, *grads_out: Tensor) -> tuple[Any, ...]:
    grad, m, v, h, c, ranks, *weights = ctx.saved_tensors
    *found, in_weights = torch.ops.amalgam.choice_step_backward(
        list(grads_out), grad, m, v, h, c, weights, ranks, *ctx.constants
    )
    return *found, in_weights, None, *(None for _ in ctx.constants)


_op.register_autograd(_autograd, setup_context=_setup_context)
registry.once_differentiable(_backward_op, _NAME)
