"""``largest_magnitude``: the largest magnitude in many tensors, in one pass over all of them.

Optimizers ask for it before every step: whether all gradients are finite, and small enough to be
squared. PyTorch's norms of lists take a call a tensor on the CPU, which for small ones is most of a
step's time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from amalgam.operations import registry

_NAME = "largest_magnitude"


def largest_magnitude(tensors: Sequence[Tensor], *, backend: str = "auto") -> Tensor:
    """The largest magnitude of the tensors' elements; NaN where one of them is NaN.

    Args:
        tensors: One or more, floating point, of one dtype and device, with an element at least.
        backend: ``"auto"``, or a backend's name.

    Returns:
        Shape (), of their dtype and on their device.

    Raises:
        ValueError: They are of several dtypes or devices.
    """
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
    if len(kinds) != 1:
        raise ValueError(
            f"tensors must be of one dtype and device, not of {sorted(map(str, kinds))}"
        )
    largest: Tensor = registry.compute(_NAME, backend, tensors[0], tensors)
    return largest


@registry.reference.kernel(_NAME, dtypes=None)
def _reference(tensors: Sequence[Tensor]) -> Tensor:
    filled = [tensor for tensor in tensors if tensor.numel()]
    return torch.stack(torch._foreach_norm(filled, math.inf)).max()
