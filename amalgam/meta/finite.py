"""Values that are not finite: how they are found, and how rows with them keep their old state."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def usable(values: Tensor) -> Tensor:
    """Whether all values along the last dimension are finite and have finite squares."""
    if not values.shape[-1]:
        return torch.ones(values.shape[:-1], dtype=torch.bool, device=values.device)
    return values.detach().abs().amax(-1) < math.sqrt(torch.finfo(values.dtype).max)


def keep(new: Any, old: Any, ok: Tensor, n: int) -> Any:
    """A state with the new values in the rows that are ok, and the old ones in all others.

    Args:
        new: The new state, a named tuple. Its tensors have the shape (..., rows * n), one row's n
            coordinates after another's.
        old: The old state, of the same form.
        ok: Which rows are ok, shape (rows,); or (K, rows) for tensors of shape (K, rows * n).
        n: Coordinates per row.
    """
    if ok.all():
        return new
    where = ok.repeat_interleave(n, -1)
    return type(new)(
        *(
            torch.where(where, a, b) if isinstance(a, Tensor) else a
            for a, b in zip(new, old, strict=True)
        )
    )
