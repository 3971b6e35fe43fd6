"""The mean of the slots' meta-gradients, each of which is clipped on its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from amalgam.meta import distributed
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
        like = self._grads[0][0]
        self._losses = like.new_zeros((2, len(students)))
        self._counted = like.new_zeros(len(students))
        self._failed = like.new_zeros(slots)

    def add(
        self,
        slot: int,
        student: int,
        grads: Sequence[Tensor],
        losses: Tensor,
        *,
        moved: bool,
        stuck: bool,
        clip: float,
    ) -> float:
        """Add one slot's share for one student; nothing where it failed.

        Args:
            slot: The slot.
            student: The student's number.
            grads: The slot's meta-gradient.
            losses: Its meta-loss and its imitation loss, shape (2,).
            moved: Whether a row of the student took any step of the window and had a finite loss.
            stuck: Whether a row of the student took no step, or had no finite loss.
            clip: The largest norm that the meta-gradient may have.

        Returns:
            The norm of the meta-gradient over all weights, before clipping; NaN if the student took
            no step.
        """
        norm = torch.nn.utils.get_total_norm(grads).item() if moved else math.nan
        finite = math.isfinite(norm) and bool(losses.isfinite().all())
        if finite and not stuck:
            share = min(1.0, clip / norm) if norm else 1.0
            torch._foreach_add_(self._grads[student], list(grads), alpha=share / self._slots)
            self._losses[:, student] += losses
            self._counted[student] += 1
        if stuck or not finite:
            self._failed[slot] = 1
        return norm

    def over_all(self) -> tuple[list[list[Tensor]], Tensor, list[int], list[bool]]:
        """The means over the slots of all processes, which wait for each other here.

        Returns:
            Each student's meta-gradient, the mean over all slots, in which those that failed count
            as zero. The mean losses of those that did not, shape (2, S); NaN where there is none.
            How many those are, for each student. Whether each slot failed, for any student.
        """
        flat = [grad for grads in self._grads for grad in grads]
        *flat, losses, counted, failed = distributed.total(
            [*flat, self._losses, self._counted, self._failed]
        )
        each = len(self._grads[0])
        grads = [flat[first : first + each] for first in range(0, len(flat), each)]
        how_many = [round(number) for number in counted.tolist()]
        return grads, losses / counted, how_many, [bool(number) for number in failed.tolist()]
