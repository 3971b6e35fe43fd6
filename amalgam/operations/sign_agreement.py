"""``sign_agreements``: in how many elements' signs two lists of tensors agree.

A student with a pace asks for it before every step, of gradients and first moments: where they
agree, steps were too short, and where they disagree, too long. PyTorch would take some calls for
each tensor, which is most of a step's time where tensors are small, and on a GPU where they are
not, either.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from amalgam.operations import registry
from amalgam.operations.checks import check_all_floating

_NAME = "sign_agreement"


def sign_agreements(
    first: Sequence[Tensor], second: Sequence[Tensor], *, backend: str = "auto"
) -> Tensor:
    """Of each pair of tensors how many elements agree in sign, and how many do not.

    Zero and NaN have no sign: where either element is one, the two do neither. The counts are
    outside any graph.

    Args:
        first: Floating-point tensors of any dtypes, one or more, all on one device.
        second: As many, likewise, each as large as its partner.
        backend: ``"auto"``, or a backend's name.

    Returns:
        The two counts of each pair, float64 of shape (tensors, 2).

    Raises:
        TypeError: A tensor is not floating point.
        ValueError: The two lists do not match, are empty, or lie on several devices.
        RuntimeError: The backend asked for can't compute this here.
    """
    for name, tensors in (("first", first), ("second", second)):
        check_all_floating(name, tensors)
    sizes = [list(map(Tensor.numel, tensors)) for tensors in (first, second)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"second must be tensors of {sizes[0]} elements, as first is, not of {sizes[1]}"
        )
    if not sizes[0]:
        raise ValueError("first and second must hold one or more tensors, not none")
    for tensor in chain(first, second):
        if tensor.device != first[0].device:
            raise ValueError(f"all must be on {first[0].device}, as first is, not {tensor.device}")
    return registry.compute(_NAME, backend, first[0], first, second)


@registry.reference.kernel(_NAME, dtypes=None)
@torch.no_grad()
def _reference(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    counts = []
    for one, other in zip(first, second, strict=True):
        product = one.sign() * other.reshape(one.shape).sign()
        counts += [(product > 0).sum(), (product < 0).sum()]
    return torch.stack(counts).view(-1, 2).double()
