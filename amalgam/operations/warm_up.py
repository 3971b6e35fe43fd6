"""A step of SGD, during which a student's moments follow: what precedes the student's own steps."""

from __future__ import annotations

import torch
from torch import Tensor

from amalgam.operations.rounding import as_stored
from amalgam.operations.student_forms import StepSettings
from amalgam.operations.student_step import update_moments


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
        m: Of its shape, in the dtype to compute in; or in bfloat16, beside float32.
        v: Like ``m``.
        settings: The student's constants.
        keep: 1 without weight decay.
        rate: The learning rate.
        key: Of the bits that what is bfloat16 is rounded with; ``None`` rounds to nearest.
        row: Which row of bits are the parameter's own; the next one is the moments'.
    """
    dtype = torch.float32 if m.dtype == torch.bfloat16 else m.dtype
    grad = grad.to(dtype)
    new_m, new_v = update_moments(grad, m.to(dtype), v.to(dtype), settings)
    moved = param.to(dtype) * keep - rate * grad
    written = [(param, moved, row, 16), (m, new_m, row + 1, 16), (v, new_v, row + 1, 0)]
    for to, value, of, shift in written:
        to.copy_(as_stored(value, to.dtype, key, of, range(param.numel()), shift))
