"""``largest_magnitudes``: the largest magnitude in many tensors, in one pass over all of them.

Optimizers ask for it before every step: whether all gradients are finite, and small enough to be
squared. On the CPU PyTorch's norms of lists make one call for each tensor, which takes most of a
step's time where tensors are small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from amalgam.operations import registry
from amalgam.operations.checks import check_floating, hollow

_NAME = "largest_magnitude"
_dtype, _is_cpu = attrgetter("dtype"), attrgetter("is_cpu")


def largest_magnitudes(tensors: Sequence[Tensor], *, backend: str = "auto") -> list[Tensor]:
    """The largest magnitude of the elements of each dtype and device, outside any graph.

    Args:
        tensors: Floating-point tensors, of any dtypes and devices.
        backend: ``"auto"``, or a backend's name.

    Returns:
        For each dtype and device that has elements, a tensor of them of shape (), which is NaN
        where one of the elements is NaN. Tensors without numbers, meta or fake, have no elements.

    Raises:
        TypeError: A tensor is not floating point.
        RuntimeError: The backend asked for can't compute this here.
    """
    of_kinds = [list(tensors)] if tensors else []
    traced = torch.compiler.is_dynamo_compiling()  # which does not know an attrgetter
    if traced or len(set(map(_dtype, tensors))) > 1 or not all(map(_is_cpu, tensors)):
        by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            by_kind.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        of_kinds = list(by_kind.values())
    found = []
    for alike in of_kinds:
        check_floating("tensors", alike[0])
        if any(map(Tensor.numel, alike)) and not hollow(alike[0]):
            found.append(registry.compute(_NAME, backend, alike[0], alike))
    return found


@registry.reference.kernel(_NAME, dtypes=None)
def _reference(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors are of one dtype and device, and at least one of them has elements."""
    filled = [tensor for tensor in tensors if tensor.numel()]
    return torch.stack(torch._foreach_norm(filled, math.inf)).max()
