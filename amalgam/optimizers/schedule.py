"""What a schedule has left of a group's learning rate: the share of its peak, the largest so far.

A pace below 1 shortens steps that are too long for a constant rate. A rate that falls shortens
them, too, and both together would end training early: so a tensor's step is the shorter one of the
two (:meth:`amalgam.policies.FusedStudent.context_of`). While a rate warms up, its peak is the rate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amalgam.optimizers.base import check_before_capture

PEAK = "peak_lr"


def left_of_rate(group: dict[str, Any]) -> float | Tensor:
    """The share of its peak that a group's rate is now; the peak is kept in the group.

    Args:
        group: A group of parameters; its rate is a number, or a tensor of shape ().

    Returns:
        The share, in [0, 1]: a tensor where the rate or the peak is one. Nothing is read back.
    """
    lr, peak = group["lr"], group[PEAK]
    if isinstance(lr, Tensor):
        if not isinstance(peak, Tensor) or (peak.device, peak.dtype) != (lr.device, lr.dtype):
            check_before_capture()
            group[PEAK] = peak = torch.full_like(lr, float(peak), requires_grad=False)
    elif not isinstance(peak, Tensor):
        group[PEAK] = peak = max(peak, lr)
        return lr / peak if peak else 1.0
    return left_of_peak(lr, peak)


def left_of_peak(lr: float | Tensor, peak: Tensor) -> Tensor:
    """The share of its peak that a rate is, and the peak from now on, in place."""
    raised = torch.maximum(peak, lr) if isinstance(lr, Tensor) else peak.clamp(min=lr)
    peak.copy_(raised)
    return torch.where(peak > 0, lr / peak, 1)


def peak_as_tensor(group: dict[str, Any], device: torch.device) -> Tensor:
    """A group's peak as a tensor that the group holds, on its rate's device, else on this one."""
    lr, peak = group["lr"], group[PEAK]
    if not isinstance(peak, Tensor):
        place = (lr.device, lr.dtype) if isinstance(lr, Tensor) else (device, torch.float64)
        group[PEAK] = peak = torch.full((), float(peak), device=place[0], dtype=place[1])
    return peak
