"""Values that are not finite: how they are found, and how rows with them keep their old state."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def usable(values: Tensor) -> Tensor:
    """Whether all values along the last dimension are finite and have finite squares."""
    return small(largest(values.detach()))


def largest(values: Tensor, out: Tensor | None = None) -> Tensor:
    """The largest magnitude along the last dimension, NaN where there is a NaN; 0 of no values."""
    if not values.shape[-1]:
        return values.new_zeros(values.shape[:-1]) if out is None else out.zero_()
    # Not as a norm, for which PyTorch has no vectors on a CPU.
    return torch.amax(values.abs(), -1, out=out)


def small(magnitudes: Tensor) -> Tensor:
    """Whether what has these largest magnitudes is finite and has finite squares."""
    return magnitudes < math.sqrt(torch.finfo(magnitudes.dtype).max)


def keep(new: Any, old: Any, ok: Tensor | None) -> Any:
    """A state with the new values in the rows that are ok, and the old ones in all others.

    Args:
        new: The new state, a named tuple. Its tensors have the shape (..., rows * n), one row's n
            coordinates, or n tensors, after another's.
        old: The old state, of the same form.
        ok: Which rows are ok, shape (rows,); or (K, rows) for tensors of shape (K, ..., rows * n);
            ``None`` means all, without a look at them.
    """
    if ok is None or ok.all():
        return new

    def kept(a: Tensor, b: Tensor) -> Tensor:
        of_each = ok.repeat_interleave(a.shape[-1] // ok.shape[-1], -1)
        between = [1] * (a.dim() - of_each.dim())
        return torch.where(of_each.view(*ok.shape[:-1], *between, a.shape[-1]), a, b)

    return type(new)(
        *(kept(a, b) if isinstance(a, Tensor) else a for a, b in zip(new, old, strict=True))
    )
