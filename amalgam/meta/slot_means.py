"""The mean of the slots' meta-gradients, each of which is clipped on its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from amalgam import distributed
from amalgam.device import put, read
from amalgam.policies import Policy


class SlotMeans:
    """Adds up what this process's slots found, and takes means over the slots of all processes.

    Args:
        students: The students, S of them.
        slots: How many slots there are in all processes together.
    """

    def __init__(self, students: Sequence[Policy], slots: int) -> None:
        self._slots = slots
        self._grads = [[torch.zeros_like(w) for w in one.weights()] for one in students]
        dtype = self._grads[0][0].dtype
        self._losses = torch.zeros((2, len(students)), dtype=dtype, device="cpu")
        self._counted = torch.zeros(len(students), dtype=dtype, device="cpu")
        self._failed = torch.zeros(slots, dtype=dtype, device="cpu")

    def add(
        self,
        slot: int,
        student: int,
        grads: Sequence[Tensor],
        norm: float,
        losses: Tensor,
        *,
        stuck: bool,
        clip: float,
    ) -> None:
        """Add one slot's share for one student; nothing where it failed.

        Args:
            slot: The slot.
            student: The student's number.
            grads: The slot's meta-gradient.
            norm: Its norm over all weights; NaN if no row of the student took any step of the
                window and had a finite loss.
            losses: Its meta-loss and its imitation loss, shape (2,), on the CPU.
            stuck: Whether a row of the student took no step, or had no finite loss.
            clip: The largest norm that the meta-gradient may have.
        """
        finite = math.isfinite(norm) and bool(losses.isfinite().all())
        if finite and not stuck:
            share = min(1.0, clip / norm) if norm else 1.0
            torch._foreach_add_(self._grads[student], list(grads), alpha=share / self._slots)
            self._losses[:, student] += losses
            self._counted[student] += 1
        if stuck or not finite:
            self._failed[slot] = 1

    def over_all(self) -> tuple[list[list[Tensor]], list[float], Tensor, list[bool]]:
        """The means over the slots of all processes, which wait for each other here.

        Returns:
            Each student's meta-gradient, the mean over all slots, in which those that failed count
            as zero. Its norm over all weights; NaN where all failed. The mean losses of those that
            did not, shape (2, S), on the CPU; NaN where there is none. Whether each slot failed,
            for any student.
        """
        flat = [grad for grads in self._grads for grad in grads]
        told = [put(t, flat[0].device) for t in (self._losses, self._counted, self._failed)]
        *flat, losses, counted, failed = distributed.total([*flat, *told])
        each = len(self._grads[0])
        grads = [flat[first : first + each] for first in range(0, len(flat), each)]
        found = torch.stack([*map(get_total_norm, grads)])
        found, losses, counted, failed = read([found, losses, counted, failed])
        norms = torch.where(counted > 0, found, math.nan).tolist()
        return grads, norms, losses / counted, [bool(number) for number in failed.tolist()]
