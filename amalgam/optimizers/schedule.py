"""What a schedule has left of a group's learning rate: the share of its peak, the largest so far.

A pace below 1 shortens steps that are too long for a constant rate. A rate that falls shortens
them, too, and both together would end training early: so a tensor's step is the shorter one of the
two (:meth:`amalgam.policies.FusedStudent.context_of`). While a rate warms up, its peak is the rate.
The peak is that of the steps of a group: one that is added late, or state of an earlier version,
begins without one, so that its pace is multiplied by what a schedule still takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amalgam.operations.checks import hollow
from amalgam.optimizers.capture import check_before_capture

PEAK = "peak_lr"


def settle_peak(group: dict[str, Any]) -> None:
    """Have a group keep its peak as it keeps its rate: a number, or a tensor of its own."""
    lr, peak = group["lr"], group[PEAK]
    known = 0.0 if isinstance(peak, Tensor) and hollow(peak) else float(peak)
    group[PEAK] = known
    if isinstance(lr, Tensor):
        group[PEAK] = torch.full_like(lr, known, requires_grad=False)


def left_of_rate(group: dict[str, Any]) -> float | Tensor:
    """The share of its peak that a group's rate is now; the peak is kept in the group.

    Args:
        group: A group of parameters; its rate is a number, or a tensor of shape ().

    Returns:
        The share, in [0, 1], a tensor where the rate is one. Then nothing is read back.
    """
    lr, peak = group["lr"], group[PEAK]
    if isinstance(lr, Tensor):
        if not isinstance(peak, Tensor) or (peak.device, peak.dtype) != (lr.device, lr.dtype):
            check_before_capture()
            settle_peak(group)
            peak = group[PEAK]
        peak.copy_(torch.maximum(peak, lr))
        return torch.where(peak > 0, lr / peak, 1)
    group[PEAK] = peak = max(float(peak), lr)
    return lr / peak if peak else 1.0
