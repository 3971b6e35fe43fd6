"""What a schedule has left of a group's learning rate: the share of its peak, the largest so far.

A pace below 1 shortens steps that are too long for a constant rate. A rate that falls shortens
them, too, and both together would end training early: so a tensor's step is the shorter one of the
two (:meth:`amalgam.policies.FusedStudent.context_of`). While a rate warms up, its peak is the rate.
The peak is that of the steps that a group took, and not of those that were skipped. A group that is
added late, or state of an earlier version, begins without one, so that its pace is multiplied by
what a schedule still takes.
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


def keep_peak_on(device: torch.device, group: dict[str, Any]) -> None:
    """Have a group keep its peak as a tensor: where its rate is, or else on this device."""
    lr, peak = group["lr"], group[PEAK]
    where, dtype = device, torch.float64
    if isinstance(lr, Tensor):
        where, dtype = lr.device, lr.dtype
    if not isinstance(peak, Tensor) or (peak.device, peak.dtype) != (where, dtype):
        check_before_capture()
        settle_peak(group)
        if not isinstance(lr, Tensor):
            group[PEAK] = torch.full((), group[PEAK], dtype=dtype, device=where)


def note_rate(group: dict[str, Any], skip: Tensor | None = None) -> None:
    """Keep the largest learning rate of a group so far, before a step.

    Args:
        group: A group of parameters; its rate is a number, or a tensor of shape ().
        skip: Whether the step is one that is not taken, of shape () on any device, which is not
            read back; ``None`` for one that is.
    """
    lr = group["lr"]
    if skip is None and not isinstance(lr, Tensor):
        group[PEAK] = max(float(group[PEAK]), lr)
        return
    keep_peak_on(lr.device if skip is None else skip.device, group)
    peak = group[PEAK]
    largest = torch.maximum(peak, lr) if isinstance(lr, Tensor) else peak.clamp(min=lr)
    if skip is not None:
        largest = torch.where(skip.to(peak.device, torch.bool), peak, largest)
    # torch.compile of PyTorch 2.13 loses what copy_ writes to a float64 tensor of shape ().
    torch._foreach_copy_([peak], [largest])


def left_of_rate(group: dict[str, Any]) -> float | Tensor:
    """The share of its peak that a group's rate is now; nothing is read back.

    Args:
        group: A group whose rate was noted.

    Returns:
        The share, in [0, 1], of no meaning in a step that is skipped; a tensor where the peak is.
    """
    lr, peak = group["lr"], group[PEAK]
    if isinstance(peak, Tensor):
        return torch.where(peak > 0, lr / peak, 1)
    return lr / peak if peak else 1.0
