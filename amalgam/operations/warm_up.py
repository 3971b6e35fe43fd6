"""A step of SGD, during which a student's moments follow: what precedes the student's own steps."""

from __future__ import annotations

from torch import Tensor

from amalgam.operations.rounding import as_stored
from amalgam.operations.student_step import StepSettings, update_moments


def warm_up_(
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    settings: StepSettings,
    keep: float,
    rate: float,
    key: Tensor | None = None,
    row: int = 0,
) -> None:
    """A step of SGD in place, during which the moments follow.

    Args:
        param: Becomes ``keep param - rate grad``; of any floating-point dtype.
        grad: Of its shape.
        m: Of its shape, in the dtype to compute in.
        v: Like ``m``.
        settings: The student's constants.
        keep: 1 without weight decay.
        rate: The learning rate.
        key: Of the bits that a bfloat16 parameter is rounded with; ``None`` rounds to nearest.
        row: Which row of bits are its own.
    """
    grad = grad.to(m.dtype)
    new_m, new_v = update_moments(grad, m, v, settings)
    m.copy_(new_m)
    v.copy_(new_v)
    moved = param.to(m.dtype) * keep - rate * grad
    if key is not None:
        moved = as_stored(moved, param.dtype, key, row, range(param.numel()))
    param.copy_(moved)
