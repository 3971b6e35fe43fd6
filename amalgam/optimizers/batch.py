"""Parameters that one call steps, with their state as the operation takes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from amalgam.operations.cell_codes import units_of
from amalgam.ops import StudentState, StudentTensors
from amalgam.optimizers.orthogonal import PendingUpdates
from amalgam.optimizers.sharding import agreements_of, any_sharded, local_part, norms_of
from amalgam.optimizers.state import names_of, planar
from amalgam.policies import FusedStudent
from amalgam.policies.fused_student import ContextConstants, TensorContext

ConstantsOf = Callable[[list[Tensor]], ContextConstants | None]
_grad = attrgetter("grad")


class Batch:
    """Parameters that one call steps, and how many steps they have taken.

    Args:
        params: The parameters. Of those that are DTensors it steps this process's parts.
        entries: The optimizer's state of each.
        constants: What the student is told of them that stays.
        paced: Whether the student has a pace.
        orthogonal: Whether updates of whole matrices are orthogonalised. The operation then writes
            to ``updates``, and not to the parameters.
        kept: Whether it serves later steps, too. If so, counts of steps that are all views of one
            tensor are counted in that; likewise paces.
    """

    def __init__(
        self,
        params: list[Tensor],
        entries: list[dict[str, Any]],
        constants: ContextConstants | None,
        paced: bool = False,
        orthogonal: bool = False,
        kept: bool = True,
    ) -> None:
        self.params = params
        self._entries = entries
        self.constants = constants
        self.sharded = any_sharded(params)
        names = names_of(paced)
        self._stored = itemgetter(*names)
        self._held = list(map(self._parts, ([entry[name] for entry in entries] for name in names)))
        m, v, h, c, self.steps, *paces = self._held
        self._paces = paces[0] if paces else []
        columns = (m, v, list(map(planar, h)), list(map(planar, c)))
        self.parts = self._parts(params)
        self.updates = PendingUpdates(params, units_in(h[0])) if orthogonal and params else None
        written = self.parts if self.updates is None else self.updates.tensors
        self.tensors = StudentTensors(written, list(map(StudentState, *columns)))
        self._together = _one_tensor(self.steps) if kept else None
        self._paces_together = _one_tensor(self._paces) if kept else None
        self._addresses = self._now() if kept else []

    def _parts(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(map(local_part, tensors)) if self.sharded else list(tensors)

    def _now(self) -> list[list[int]]:
        # m and v are in StudentTensors as they are, which looks for itself where they lie.
        return [list(map(Tensor.data_ptr, column)) for column in self._held[2:]]

    def has_its_state(self) -> bool:
        """Whether the tensors of the batch are still those of the optimizer's state, and lie there.

        Their ``data`` may have been assigned, which views of them do not see; a DTensor, even a
        parameter, may have got another part.
        """
        if not all(self._entries):
            return False
        if self.sharded and not same(self.parts, self._parts(self.params)):
            return False
        if self.updates is not None and not self.updates.fit():
            return False
        columns = map(self._parts, zip(*map(self._stored, self._entries), strict=True))
        return all(map(same, self._held, columns)) and self._addresses == self._now()

    def below(self, steps: int) -> list[int]:
        """Which parameters, by index, have taken fewer steps."""
        if not steps:
            return []
        return [index for index, count in enumerate(self._taken().tolist()) if count < steps]

    def count(self, steps: int | Tensor) -> None:
        """Count so many steps more of each."""
        if self._together is not None:
            self._together += steps
        elif isinstance(steps, Tensor):
            # A list, as PyTorch would read one tensor back as a number, and wait for it.
            torch._foreach_add_(self.steps, [steps] * len(self.steps))
        else:
            torch._foreach_add_(self.steps, steps)

    def without(self, indices: list[int], made: ConstantsOf) -> Batch:
        """The other parameters, with constants that are made by this."""
        others = sorted(set(range(len(self.steps))) - set(indices))
        params = [self.params[i] for i in others]
        entries, orthogonal = [self._entries[i] for i in others], self.updates is not None
        return Batch(params, entries, made(params), bool(self._paces), orthogonal)

    def gradients(self, maximize: bool) -> list[Tensor]:
        """A gradient a parameter, of what is to become smaller."""
        grads = self._parts([grad for grad in map(_grad, self.params) if grad is not None])
        return list(torch._foreach_neg(grads)) if maximize and grads else grads

    def context(
        self, student: FusedStudent, like: Tensor, grads: list[Tensor], left: float | Tensor
    ) -> TensorContext | None:
        """What a student is told of the parameters in their next step.

        Args:
            student: The student.
            like: A tensor of the dtype and device to say it in.
            grads: What :meth:`gradients` gave.
            left: What is left of the learning rate, as :mod:`amalgam.optimizers.schedule` says.
        """
        if self.constants is None:
            return None
        pace, agreements = None, None
        if self._paces:
            pace = _stacked(self._paces, self._paces_together).to(like)
            agreements = partial(agreements_of, self.params, grads, self.tensors.m)
        return student.context_of(
            *(self.constants, self._taken().to(like), self.params, norms_of),
            pace=pace,
            agreements=agreements,
            left=left,
        )

    def keep_pace(
        self, context: TensorContext | None, skip: Tensor | None = None, warmup_steps: int = 0
    ) -> None:
        """Keep the paces of a step that was taken, before it is counted.

        Args:
            context: What :meth:`context` said of it.
            skip: Not 0 where the device decided to skip it, shape ().
            warmup_steps: Of those parameters that have taken fewer steps it was a warm-up.
        """
        if context is None or context.pace is None or not self._paces:
            return
        new = context.pace.to(self._paces[0])
        if skip is not None or warmup_steps:
            old = _stacked(self._paces, self._paces_together)
            new = paces_after(new, old, self._taken(), warmup_steps, skip)
        if self._paces_together is None:
            torch._foreach_copy_(self._paces, list(new.unbind()))
        else:
            self._paces_together.copy_(new)

    def _taken(self) -> Tensor:
        return _stacked(self.steps, self._together)


def units_in(h: Tensor) -> int:
    """How many units a student has, by the h that an optimizer keeps: all layers' together."""
    return math.prod(units_of(planar(h)).shape[:2])


def paces_after(
    new: Tensor, old: Tensor, taken: Tensor, warmup_steps: int, skip: Tensor | None
) -> Tensor:
    """The logarithms of paces after a step: the old ones where it was skipped or a warm-up.

    Args:
        new: Those that the step had, shape (tensors,).
        old: Those before it, likewise.
        taken: How many steps each tensor had taken before, likewise, on any device.
        warmup_steps: How many of them are a warm-up.
        skip: Not 0 where the step was skipped, shape (); ``None`` where it was not.
    """
    stays = taken.to(new.device) < warmup_steps
    return torch.where(stays if skip is None else stays | (skip != 0), old, new)


def _stacked(numbers: Sequence[Tensor], together: Tensor | None) -> Tensor:
    return torch.stack(list(numbers)) if together is None else together


def _one_tensor(steps: Sequence[Tensor]) -> Tensor | None:
    """The tensor (len(steps),) that these are all the elements of, in order, if there is one."""
    base = steps[0]._base if steps else None
    if base is None or base.shape != (len(steps),):
        return None
    begin, each = base.data_ptr(), base.element_size()
    expected = [begin + index * each for index in range(len(steps))]
    return base if list(map(Tensor.data_ptr, steps)) == expected else None


def same(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    """Whether two lists hold the same objects."""
    return len(ours) == len(theirs) and all(map(is_, ours, theirs))
