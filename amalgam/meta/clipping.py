"""Adaptive gradient clipping (Brock et al. 2021, eq. 3), per tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def clip_adaptively(
    weights: Sequence[Tensor], grads: Sequence[Tensor], *, ratio: float = 0.1, floor: float = 1e-3
) -> list[Tensor]:
    """Scale down each gradient whose norm exceeds ``ratio`` times its weight's norm.

    Args:
        weights: The weights.
        grads: Their gradients.
        ratio: Largest norm of a gradient over its weight's.
        floor: Weights of smaller norm count as having this one.

    Returns:
        The gradients, shortened where too long.
    """
    clipped = []
    for weight, grad in zip(weights, grads, strict=True):
        limit = ratio * weight.norm().clamp_min(floor)
        norm = grad.norm()
        clipped.append(torch.where(norm > limit, grad * (limit / norm), grad))
    return clipped
