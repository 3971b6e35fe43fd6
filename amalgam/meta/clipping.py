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
        weights: The tensors of weights.
        grads: The gradient with respect to each of them.
        ratio: Largest norm of a gradient, as a multiple of its weight's norm.
        floor: A weight whose norm is smaller counts as having this norm.

    Returns:
        The gradients, those that were too long scaled down.
    """
    clipped = []
    for weight, grad in zip(weights, grads, strict=True):
        limit = ratio * weight.norm().clamp_min(floor)
        norm = grad.norm()
        clipped.append(torch.where(norm > limit, grad * (limit / norm), grad))
    return clipped
