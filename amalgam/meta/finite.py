"""Values that are not finite: finding them, and keeping the old state where they appear."""

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
    """A state that takes the new values in the rows that are ok, and keeps the old ones in others.

    Args:
        new: A tuple of tensors (..., rows n).
        old: Likewise.
        ok: Which rows, shape (rows,); or (K, rows) of tensors (K, rows n).
        n: Coordinates of a row.
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
