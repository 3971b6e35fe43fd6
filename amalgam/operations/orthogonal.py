"""``orthogonalized``: updates of matrices with their singular values made alike.

Where a few directions of a matrix dominate a student's update u, as they do in networks, the others
hardly move. So the update of a whole matrix may be orthogonalised: with its singular value
decomposition ``u = U S V'`` it becomes a multiple of ``U V'``, as long as u itself::

    x_0 = u / |u|
    x_{k+1} = a x_k + (b s + c s s) x_k,   s = x_k x_k'        five times
    update = (|u| / |x_5|) x_5,   but 0 where u is 0

The lengths are Frobenius norms, so that how far a step goes is still the student's to say. The
iteration brings all singular values near to 1, and is Newton and Schulz's with the coefficients of
Jordan et al. (2024, "Muon: An optimizer for hidden layers in neural networks"). It is odd in u and
does not see u's scale. A row or a column of zeros stays so by itself, and single zeros by being
kept: what never had a gradient does not move.

These are matrix products, which PyTorch computes at the speed of the machine; there is one
implementation for all devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_STEPS = 5
_A, _B, _C = 3.4445, -4.7750, 2.0315
_CHUNK = 1 << 20  # elements that the backward pass takes at once, as it keeps each iteration


def is_matrix(shape: Sequence[int]) -> bool:
    """Whether updates of a tensor are orthogonalised, as the matrix of its first dimension's rows.

    A vector's would stay as they are.

    Args:
        shape: The tensor's shape.
    """
    return len(shape) >= 2 and min(shape[0], math.prod(shape[1:])) >= 2


def orthogonalized(updates: Sequence[Tensor], *, narrow: bool = False) -> list[Tensor]:
    """Each batch of matrices orthogonalised, and as long as it was; differentiable.

    On a GPU matrices of one shape, or of a shape and its transpose, are computed together. On a CPU
    each is alone, so that its bits do not depend on which others there are.

    Args:
        updates: Batches of matrices, of shapes (B, rows, columns) that may differ, all of one
            floating-point dtype and device.
        narrow: Whether products are taken in bfloat16 where a GPU computes float32, as is usual in
            training, which needs the directions only roughly.

    Returns:
        As many, of the same shapes and dtype.
    """
    wide = [u.mT if u.shape[1] > u.shape[2] else u for u in updates]
    alike: dict[torch.Size, list[int]] = {}
    for index, u in enumerate(wide):
        alike.setdefault(u.shape[1:], []).append(index)
    found = list(updates)
    for indices in alike.values():
        sizes = [len(wide[index]) for index in indices]
        together = torch.cat([wide[index] for index in indices])
        # On a CPU the last bits of a product depend on how many are computed in one call.
        calls = together.split(1 if together.device.type == "cpu" else max(1, len(together)))
        parts = torch.cat([_orthogonalized(each, narrow) for each in calls]).split(sizes)
        for index, part in zip(indices, parts, strict=True):
            found[index] = part.mT if wide[index] is not updates[index] else part
    return found


def _orthogonalized(u: Tensor, narrow: bool) -> Tensor:
    """A batch of matrices that are not taller than wide, in their own precision under autocast."""
    kind = u.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return _orthogonalized(u, narrow)
    # Squares of what is small would be zero. Which unit lengths are told in makes no difference.
    unit = u.detach().abs().amax((1, 2), keepdim=True)
    unit = torch.where(unit > 0, unit, 1)
    norm = _norms(u / unit)
    x = u / unit / norm
    if narrow and u.is_cuda and u.dtype == torch.float32:
        x = x.bfloat16()
    for _ in range(_STEPS):
        s = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=_B, alpha=_C), x, beta=_A)
    x = x.to(u.dtype)
    return torch.where(u == 0, 0, x * (unit * norm / _norms(x)))


def _norms(x: Tensor) -> Tensor:
    """The norms of matrices, shape (B, 1, 1); 1 of those that are zero, which have a slope then."""
    squares = x.square().sum((1, 2), keepdim=True)
    return torch.where(squares > 0, squares, 1).sqrt()


def orthogonalized_backward(grads_out: Sequence[Tensor], updates: Sequence[Tensor]) -> list[Tensor]:
    """The gradients with respect to what :func:`orthogonalized` was given.

    Args:
        grads_out: Gradients with respect to what it returned, as ``updates``.
        updates: What it was given.
    """
    found = []
    for out, u in zip(grads_out, updates, strict=True):
        tall = u.shape[1] > u.shape[2]
        parts = []
        count = max(1, _CHUNK // max(1, u[:1].numel()))
        for some, d in zip(u.split(count), out.split(count), strict=True):
            leaf = (some.mT if tall else some).detach().requires_grad_()
            with torch.enable_grad():
                new = _orthogonalized(leaf, narrow=False)
                parts += torch.autograd.grad(new, leaf, d.mT if tall else d)
        whole = torch.cat(parts)
        found.append(whole.mT if tall else whole)
    return found
