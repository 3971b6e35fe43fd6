"""Steps of which whole matrices are orthogonalised before parameters take them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from amalgam.operations.orthogonal import is_matrix, orthogonalized
from amalgam.operations.rounding import as_stored, key_of
from amalgam.optimizers.base import computing_dtype
from amalgam.optimizers.sharding import local_part, sharding_of

_MOST = 1 << 25  # elements of matrices that are computed at once, unless one alone has more


def orthogonalize_(
    params: Sequence[Tensor], updates: Sequence[Tensor], stay: Sequence[Tensor] | None = None
) -> None:
    """Orthogonalise the updates of whole matrices in place.

    Args:
        params: The parameters, on one device. Of DTensors all processes have to call this: each
            gathers a matrix's update, one matrix after another.
        updates: Their updates, of this process's parts; of one dtype.
        stay: Which of them are to stay as they are, a flag of shape () for each.
    """
    for some in _together(params):
        whole = [_whole(params[index], updates[index]) for index in some]
        matrices = [update.reshape(1, update.shape[0], -1) for update in whole]
        for index, found in zip(some, orthogonalized(matrices, narrow=True), strict=True):
            sharding, new = sharding_of(params[index]), found.reshape(params[index].shape)
            if sharding is not None:
                new = sharding.part_of(new).to(updates[index].device)
            if stay is not None:
                new = torch.where(stay[index], updates[index], new)
            updates[index].copy_(new)


def _together(params: Sequence[Tensor]) -> Iterator[list[int]]:
    """Which matrices to compute at once, by index: those of one shape, as far as memory goes."""
    indices = [index for index, param in enumerate(params) if is_matrix(param.shape)]
    indices.sort(key=lambda index: (tuple(params[index].shape), index))
    some: list[int] = []
    for index in indices:
        param = params[index]
        alike = bool(some) and param.shape == params[some[0]].shape
        full = (len(some) + 1) * param.numel() > _MOST
        if some and (not alike or full or sharding_of(param) is not None):
            yield some
            some = []
        some.append(index)
    if some:
        yield some


def _whole(param: Tensor, update: Tensor) -> Tensor:
    """A parameter's update, of all processes' parts."""
    sharding = sharding_of(param)
    if sharding is None:
        return update
    stride = torch.empty(param.shape, device="meta").stride()
    return sharding.whole(update, param.shape, stride).full_tensor()


class PendingUpdates:
    """Where the operation writes the updates of parameters that do not take them as they are.

    To the operation these are parameters that are zero before a step, and minus the update after
    one of rate 1.

    Args:
        params: The parameters, on one device.
        row: The number of a parameter's row, by which its bits are drawn where it is rounded at
            random.
    """

    def __init__(self, params: Sequence[Tensor], row: int) -> None:
        self._params = params
        self._row = row
        self._parts = list(map(local_part, params))
        self._of_dtype: dict[torch.dtype, list[int]] = {}
        for index, part in enumerate(self._parts):
            self._of_dtype.setdefault(part.dtype, []).append(index)
        with torch.inference_mode(False):  # steps outside it write to them, too
            self.tensors = [
                torch.zeros(part.shape, dtype=computing_dtype(part.dtype), device=part.device)
                for part in self._parts
            ]

    def fit(self) -> bool:
        """Whether the parameters still have the shapes that they had."""
        return all(map(Tensor.is_same_size, self.tensors, self._parts))

    def clear(self) -> None:
        """Make them zero, before the operation."""
        torch._foreach_zero_(self.tensors)

    def take(
        self,
        lr: float | Tensor,
        weight_decay: float | Tensor,
        *,
        steps: Sequence[Tensor] | None = None,
        warmup_steps: int = 0,
        skip: Tensor | None = None,
        seeds: Sequence[int] | None = None,
    ) -> None:
        """Have the parameters take them, after the operation.

        Args:
            lr: Factor on them.
            weight_decay: Decoupled weight decay, multiplied by ``lr``.
            steps: How many steps each parameter has taken, tensors of shape ().
            warmup_steps: Parameters that have taken fewer take theirs as it is.
            skip: Not 0 where nothing is to change, shape ().
            seeds: One a parameter, to round bfloat16 parameters at random.
        """
        stay = None
        if warmup_steps and steps is not None:
            stay = [step.to(part.device) < warmup_steps for step, part in self._with_parts(steps)]
        orthogonalize_(self._params, self.tensors, stay)
        for alike in self._of_dtype.values():
            parts, updates = ([of[index] for index in alike] for of in (self._parts, self.tensors))
            rate, decay = (_on_device(value, parts[0]) for value in (lr, weight_decay))
            kept = 1 - rate * decay
            if parts[0].dtype == updates[0].dtype:
                if skip is not None:
                    # Updates are zero then, and minus zero changes no number, not even its sign.
                    kept, rate = (
                        torch.where(skip != 0, stays, _as_tensor(value, updates[0]))
                        for stays, value in ((1.0, kept), (-0.0, rate))
                    )
                _scale(parts, kept)
                if isinstance(rate, Tensor):  # which _foreach_add_ would wait to read
                    _scale(updates, rate)
                    rate = 1
                torch._foreach_add_(parts, updates, alpha=rate)
                continue
            for index, part, update in zip(alike, parts, updates, strict=True):
                new = part.to(update.dtype) * kept + rate * update
                if seeds:
                    step = steps[index] if steps else torch.zeros((), device=part.device)
                    key, places = key_of(seeds[index], step), range(part.numel())
                    new = as_stored(new.reshape(-1), part.dtype, key, self._row, places)
                new = new.view(part.shape).to(part.dtype)
                part.copy_(new if skip is None else torch.where(skip != 0, part, new))

    def _with_parts(self, tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(tensors, self._parts, strict=True)


def _scale(tensors: Sequence[Tensor], factor: float | Tensor) -> None:
    """Multiply tensors of one dtype in place, without waiting for the device."""
    if isinstance(factor, Tensor):
        torch._foreach_mul_(list(tensors), factor.to(tensors[0].dtype))
    elif factor != 1:
        torch._foreach_mul_(list(tensors), factor)


def _as_tensor(value: float | Tensor, like: Tensor) -> Tensor:
    """A number as a tensor of shape (), of the dtype and device of another; a graph can hold it."""
    if isinstance(value, Tensor):
        return value.to(like.dtype)
    return torch.full((), value, dtype=like.dtype, device=like.device)


def _on_device(value: float | Tensor, like: Tensor) -> float | Tensor:
    """A number, or a tensor of one, of shape () where ``like`` is."""
    if not isinstance(value, Tensor):
        return value
    return value.reshape(()).to(like.device, non_blocking=True)
