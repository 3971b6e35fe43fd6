"""``teacher_step``: the moments and updates of a whole pool of analytical teachers in one pass.

Every teacher k has its own gradient, moments and hyper-parameters. What a kind computes of them
stands in :mod:`amalgam.operations.teacher_kinds`.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amalgam.operations import registry
from amalgam.operations.checks import check_floating, check_like
from amalgam.operations.teacher_kinds import KINDS, TEACHER_KINDS, Coefficients

_NAME = "teacher_step"


class PoolSettings(NamedTuple):
    """A pool of K teachers, an entry each.

    Attributes:
        kinds: Their kinds, as indices into :data:`KINDS`.
        lr: Their learning rates.
        beta1: Their decays of m, in [0, 1).
        beta2: Their decays of v, in [0, 1).
        eps: What they add to v inside the root.
    """

    kinds: Sequence[int]
    lr: Sequence[float]
    beta1: Sequence[float]
    beta2: Sequence[float]
    eps: Sequence[float]

    @classmethod
    def of(
        cls,
        kinds: Sequence[str],
        lr: Sequence[float],
        beta1: Sequence[float],
        beta2: Sequence[float],
        eps: Sequence[float],
    ) -> PoolSettings:
        """The settings with kinds by name.

        Raises:
            TypeError: One is no list of entries.
            ValueError: There is no such kind.
        """
        columns = zip(cls._fields, (kinds, lr, beta1, beta2, eps), strict=True)
        for name, column in columns:
            if isinstance(column, str | Real):
                raise TypeError(
                    f"{name} must hold an entry a teacher, [{column!r}], not {column!r}"
                )
        for unknown in set(kinds) - set(KINDS):
            raise ValueError(f"kinds must be among {list(KINDS)}, not {unknown!r}")
        numbers = [KINDS.index(kind) for kind in kinds]
        return cls(numbers, list(lr), list(beta1), list(beta2), list(eps))

    def check(self) -> None:
        """Raise ValueError unless there is an entry of each a teacher, and each in its range."""
        k = len(self.kinds)
        if any(not 0 <= kind < len(KINDS) for kind in self.kinds):
            raise ValueError(f"kinds must be numbers below {len(KINDS)}, not {list(self.kinds)}")
        for name, values in self._asdict().items():
            if len(values) != k:
                raise ValueError(f"{name} must hold {k} numbers, one a kind, not {len(values)}")
        for name in ("beta1", "beta2"):
            for value in getattr(self, name):
                if not 0 <= value < 1:
                    raise ValueError(f"{name} must hold numbers in [0, 1), not {value}")


# How the torch operators spell them.
POOL_SCHEMA = "SymInt[] kinds, float[] lr, float[] beta1, float[] beta2, float[] eps"
_ARGUMENTS_SCHEMA = f"Tensor grads, Tensor m, Tensor v, {POOL_SCHEMA}, str backend"


def teacher_step(
    grads: Tensor,
    m: Tensor,
    v: Tensor,
    kinds: Sequence[str],
    lr: Sequence[float],
    beta1: Sequence[float],
    beta2: Sequence[float],
    eps: Sequence[float],
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of K teachers over N coordinates.

    Args:
        grads: Each teacher's gradient, shape (K, N), floating point.
        m: First moments, shape (K, N), same dtype and device; rows of teachers without one stay.
        v: Second moments, likewise.
        kinds: The K teachers' kinds, from :data:`amalgam.ops.KINDS`.
        lr: Their learning rates.
        beta1: Their decays of m, in [0, 1).
        beta2: Their decays of v, in [0, 1); RMSProp's rho.
        eps: What they add to v inside the root.
        backend: ``"auto"``, or a backend's name. All but ``"reference"`` are once differentiable.

    Returns:
        The updates (to be subtracted), and the new m and v, each (K, N).

    Raises:
        TypeError: ``grads`` is not a floating-point tensor; a number in the place of several.
        ValueError: An unknown kind, or shapes, lengths, dtypes or devices that do not fit.
        RuntimeError: The backend asked for can't compute this here.
    """
    pool = PoolSettings.of(kinds, lr, beta1, beta2, eps)
    check_floating("grads", grads)
    chosen = registry.resolve(_NAME, backend, grads)
    if chosen == registry.REFERENCE:
        _check(grads, m, v, pool)
        return _reference(grads, m, v, pool)
    updates, m, v = torch.ops.amalgam.teacher_step(grads, m, v, *pool, chosen)
    return updates, m, v


def _check(grads: Tensor, m: Tensor, v: Tensor, pool: PoolSettings) -> None:
    check_floating("grads", grads)
    if grads.dim() != 2 or len(grads) != len(pool.kinds):
        raise ValueError(
            f"grads must have shape ({len(pool.kinds)}, N), a row a kind, not {tuple(grads.shape)}"
        )
    pool.check()
    check_like("m", m, grads.shape, grads)
    check_like("v", v, grads.shape, grads)


@registry.reference.kernel(_NAME, dtypes=None)
def _reference(
    grads: Tensor, m: Tensor, v: Tensor, pool: PoolSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """grads, m, v (K, N) -> updates, m, v (K, N)."""
    kinds, lr, beta1, beta2, eps = pool
    if not kinds:
        return grads.clone(), m.clone(), v.clone()
    updates, new_m, new_v = [], [], []
    for k, number in enumerate(kinds):
        kind, g = TEACHER_KINDS[KINDS[number]], grads[k]
        coefficients = Coefficients(beta1[k], beta2[k], eps[k])
        m_k, v_k = kind.moments(g, m[k], v[k], coefficients)
        updates.append(lr[k] * kind.direction(g, m_k, v_k, coefficients))
        new_m.append(m_k)
        new_v.append(v_k)
    return torch.stack(updates), torch.stack(new_m), torch.stack(new_v)


@registry.reference.kernel(f"{_NAME}_backward", dtypes=None)
def _reference_backward(
    grads_out: Sequence[Tensor], grads: Tensor, m: Tensor, v: Tensor, pool: PoolSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """The step's vector-Jacobian product in grads, m and v."""
    kinds, lr, beta1, beta2, eps = pool
    if not kinds:
        return grads.clone(), m.clone(), v.clone()
    in_grads, in_m, in_v = [], [], []
    for k, number in enumerate(kinds):
        kind, g, b1, b2 = TEACHER_KINDS[KINDS[number]], grads[k], beta1[k], beta2[k]
        coefficients = Coefficients(b1, b2, eps[k])
        m_k, v_k = kind.moments(g, m[k], v[k], coefficients)
        d_g, d_m, d_v = kind.gradients(lr[k] * grads_out[0][k], g, m_k, v_k, coefficients)
        d_m, d_v = d_m + grads_out[1][k], d_v + grads_out[2][k]
        if kind.has_m:
            d_g, d_m = d_g + (1 - b1) * d_m, b1 * d_m
        if kind.has_v:
            d_g, d_v = d_g + 2 * (1 - b2) * g * d_v, b2 * d_v
        in_grads.append(d_g)
        in_m.append(d_m)
        in_v.append(d_v)
    return torch.stack(in_grads), torch.stack(in_m), torch.stack(in_v)


@torch.library.custom_op(
    "amalgam::teacher_step",
    mutates_args=(),
    schema=f"({_ARGUMENTS_SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
def _op(grads: Tensor, m: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *columns, backend = rest
    pool = PoolSettings(*columns)
    _check(grads, m, v, pool)
    updates, m, v = registry.compute(_NAME, backend, grads, grads, m, v, pool)
    return updates, m, v


@torch.library.custom_op(
    "amalgam::teacher_step_backward",
    mutates_args=(),
    schema=f"(Tensor[] grads_out, {_ARGUMENTS_SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
def _backward_op(
    grads_out: Sequence[Tensor], grads: Tensor, m: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *columns, backend = rest
    pool = PoolSettings(*columns)
    _check(grads, m, v, pool)
    for index, tensor in enumerate(grads_out):
        check_like(f"grads_out[{index}]", tensor, grads.shape, grads)
    d_grads, d_m, d_v = registry.compute(
        f"{_NAME}_backward", backend, grads, grads_out, grads, m, v, pool
    )
    return d_grads, d_m, d_v


@_op.register_fake
def _(grads: Tensor, m: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _check(grads, m, v, PoolSettings(*rest[:-1]))
    return tuple(tensor.new_empty(tensor.shape) for tensor in (grads, m, v))


@_backward_op.register_fake
def _(
    grads_out: Sequence[Tensor], grads: Tensor, m: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (grads, m, v))


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    grads, m, v, *ctx.constants = inputs
    ctx.save_for_backward(grads, m, v)


def _autograd(ctx: Any, *grads_out: Tensor) -> tuple[Any, ...]:
    found = torch.ops.amalgam.teacher_step_backward(
        list(grads_out), *ctx.saved_tensors, *ctx.constants
    )
    return *found, *(None for _ in ctx.constants)


_op.register_autograd(_autograd, setup_context=_setup_context)
registry.once_differentiable(_backward_op, _NAME)
