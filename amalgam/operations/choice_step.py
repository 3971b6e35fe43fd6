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
from typing import NamedTuple

import torch
from torch import Tensor

from amalgam.operations import lstm, registry
from amalgam.operations.teacher_step import KINDS

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
    _check(grad, state, weights, ranks, settings)
    chosen = registry.resolve(_NAME, backend, grad)
    arguments = (
        grad,
        *state[:4],
        list(weights),
        ranks,
        [KINDS.index(kind) for kind in settings.kinds],
        list(settings.lr),
        list(settings.beta1),
        list(settings.beta2),
        list(settings.eps),
        state.steps / settings.time_scale,
        settings.learning_rate,
    )
    if chosen == registry.REFERENCE:
        out = _reference(*arguments)
    else:
        out = torch.ops.amalgam.choice_step(*arguments, chosen)
    update, m, v, h, c, mixture = out
    return update, ChoiceState(m, v, h, c, state.steps + 1), mixture


def _check(
    grad: Tensor,
    state: ChoiceState,
    weights: Sequence[Tensor],
    ranks: Tensor,
    settings: ChoiceSettings,
) -> None:
    if not isinstance(grad, Tensor) or not grad.is_floating_point():
        kind = getattr(grad, "dtype", type(grad).__name__)
        raise TypeError(f"grad must be a floating-point tensor, not {kind}")
    if grad.dim() != 1:
        raise ValueError(f"grad must have shape (N,), not {tuple(grad.shape)}")
    if not isinstance(ranks, Tensor) or ranks.is_floating_point() or ranks.is_complex():
        kind = getattr(ranks, "dtype", type(ranks).__name__)
        raise TypeError(f"ranks must be a tensor of integers, not {kind}")
    if ranks.shape != grad.shape or ranks.device != grad.device:
        raise ValueError(
            f"ranks must have shape {tuple(grad.shape)} on {grad.device} as grad has, "
            f"not {tuple(ranks.shape)} on {ranks.device}"
        )
    _check_settings(settings)
    k = len(settings.kinds)
    lstm.check_weights(weights, state.h, grad, features(k), k)
    pool, cells = (k, *grad.shape), (*state.h.shape[:2], *grad.shape)
    for name, want in (("m", pool), ("v", pool), ("h", cells), ("c", cells)):
        tensor = getattr(state, name)
        if tuple(tensor.shape) != want:
            raise ValueError(f"state.{name} must have shape {want}, not {tuple(tensor.shape)}")
        if tensor.dtype != grad.dtype or tensor.device != grad.device:
            raise ValueError(
                f"state.{name} must be {grad.dtype} on {grad.device}, "
                f"not {tensor.dtype} on {tensor.device}"
            )


def _check_settings(settings: ChoiceSettings) -> None:
    for unknown in set(settings.kinds) - set(KINDS):
        raise ValueError(f"kinds must be among {list(KINDS)}, not {unknown!r}")
    k = len(settings.kinds)
    if not k:
        raise ValueError("kinds must name one teacher or more, not none")
    for name in ("lr", "beta1", "beta2", "eps"):
        values = getattr(settings, name)
        if len(values) != k:
            raise ValueError(f"{name} must hold {k} numbers, one a kind, not {len(values)}")
        for value in values if name in ("beta1", "beta2") else ():
            if not 0 <= value < 1:
                raise ValueError(f"{name} must hold numbers in [0, 1), not {value}")
    if not 0 < settings.time_scale < math.inf:
        raise ValueError(f"time_scale must be positive and finite, not {settings.time_scale}")


def pool_inputs(
    grad: Tensor, m: Tensor, v: Tensor, ranks: Tensor, time: float, *pool: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The teachers' updates, m and v, (K, N) each, and the LSTM's inputs, (K + 4, N)."""
    u, m, v = registry.compute(
        "teacher_step", registry.REFERENCE, grad, grad.expand(m.shape), m, v, *pool
    )
    is_rank = torch.stack([ranks == rank for rank in RANKS]).to(u.dtype)
    return u, m, v, torch.cat((u, torch.full_like(u[:1], time), is_rank))


def soft_mixture(logits: Tensor) -> Tensor:
    """Of logits (K, N), how much each counts, (K, N)."""
    idle = torch.full_like(logits[:1], IDLE_LOGIT)
    return torch.cat((logits, idle)).softmax(0)[:-1]


@registry.reference.kernel(_NAME, dtypes=None)
def _reference(
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    h: Tensor,
    c: Tensor,
    weights: Sequence[Tensor],
    ranks: Tensor,
    kinds: Sequence[int],
    lr: Sequence[float],
    beta1: Sequence[float],
    beta2: Sequence[float],
    eps: Sequence[float],
    time: float,
    learning_rate: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad, ranks (N,), m, v (K, N), h, c (layers, hidden, N) -> update, m, v, h, c, mixture."""
    u, m, v, x = pool_inputs(grad, m, v, ranks, time, kinds, lr, beta1, beta2, eps)
    out, h, c = lstm.step(x, h, c, weights)
    head, head_bias = weights[-2:]
    mixture = soft_mixture(torch.addmm(head_bias[:, None], head, out))
    return learning_rate * (mixture * u).sum(0), m, v, h, c, mixture


@registry.reference.kernel(f"{_NAME}_backward", dtypes=None)
def _reference_backward(
    grads_out: Sequence[Tensor],
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    h: Tensor,
    c: Tensor,
    weights: Sequence[Tensor],
    ranks: Tensor,
    kinds: Sequence[int],
    lr: Sequence[float],
    beta1: Sequence[float],
    beta2: Sequence[float],
    eps: Sequence[float],
    time: float,
    learning_rate: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """The step's vector-Jacobian product; only its inputs were kept, the gates come again."""
    d_update, d_m, d_v, d_h, d_c, d_mixture = grads_out
    pool = (kinds, lr, beta1, beta2, eps)
    u, _, _, x = pool_inputs(grad, m, v, ranks, time, *pool)
    traced = lstm.trace(x, h, c, weights)
    out = traced.inputs[-1]
    head, head_bias = weights[-2:]
    mixture = soft_mixture(torch.addmm(head_bias[:, None], head, out))

    d_update = learning_rate * d_update
    d_mixture = d_mixture + d_update * u
    d_logits = mixture * (d_mixture - (mixture * d_mixture).sum(0))
    d_x, in_h, in_c, d_weights = lstm.backward(traced, head.T @ d_logits, d_h, d_c, h, c, weights)
    d_weights += [d_logits @ out.T, d_logits.sum(1)]
    d_u = d_update * mixture + d_x[: len(kinds)]
    in_grads, in_m, in_v = registry.compute(
        "teacher_step_backward",
        registry.REFERENCE,
        grad,
        *([d_u, d_m, d_v], grad.expand(m.shape), m, v, *pool),
    )
    return in_grads.sum(0), in_m, in_v, in_h, in_c, d_weights


@torch.library.custom_op("amalgam::choice_step", mutates_args=())
def _op(
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    h: Tensor,
    c: Tensor,
    weights: Sequence[Tensor],
    ranks: Tensor,
    kinds: Sequence[int],
    lr: Sequence[float],
    beta1: Sequence[float],
    beta2: Sequence[float],
    eps: Sequence[float],
    time: float,
    learning_rate: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    update, m, v, h, c, mixture = registry.compute(
        _NAME,
        backend,
        grad,
        *(grad, m, v, h, c, weights, ranks, kinds, lr, beta1, beta2, eps, time, learning_rate),
    )
    return update, m, v, h, c, mixture


@torch.library.custom_op("amalgam::choice_step_backward", mutates_args=())
def _backward_op(
    grads_out: Sequence[Tensor],
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    h: Tensor,
    c: Tensor,
    weights: Sequence[Tensor],
    ranks: Tensor,
    kinds: Sequence[int],
    lr: Sequence[float],
    beta1: Sequence[float],
    beta2: Sequence[float],
    eps: Sequence[float],
    time: float,
    learning_rate: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    constants = (ranks, kinds, lr, beta1, beta2, eps, time, learning_rate)
    in_grad, in_m, in_v, in_h, in_c, in_weights = registry.compute(
        f"{_NAME}_backward", backend, grad, *(grads_out, grad, m, v, h, c, weights, *constants)
    )
    return in_grad, in_m, in_v, in_h, in_c, in_weights


@_op.register_fake
def _(grad, m, v, h, c, weights, *constants):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty(t.shape) for t in (grad, m, v, h, c, m))


@_backward_op.register_fake
def _(grads_out, grad, m, v, h, c, weights, *constants):  # type: ignore[no-untyped-def]
    state = tuple(t.new_empty(t.shape) for t in (grad, m, v, h, c))
    return *state, [w.new_empty(w.shape) for w in weights]


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    grad, m, v, h, c, weights, ranks, *ctx.constants = inputs
    ctx.save_for_backward(grad, m, v, h, c, ranks, *weights)


def _autograd(ctx, *grads_out):  # type: ignore[no-untyped-def]
    grad, m, v, h, c, ranks, *weights = ctx.saved_tensors
    *found, in_weights = torch.ops.amalgam.choice_step_backward(
        list(grads_out), grad, m, v, h, c, weights, ranks, *ctx.constants
    )
    return *found, in_weights, None, *(None for _ in ctx.constants)


_op.register_autograd(_autograd, setup_context=_setup_context)
registry.once_differentiable(_backward_op, _NAME)
