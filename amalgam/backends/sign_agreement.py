"""How each backend computes ``sign_agreement``."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from amalgam.backends import core, cpu
from amalgam.backends.memory import contiguous
from amalgam.operations import registry
from amalgam.operations.table import addresses

# What the kernel calls them.
_FORMATS = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_dtype = attrgetter("dtype")


def _accepts(first: Sequence[Tensor], second: Sequence[Tensor]) -> str | None:
    if not (registry.plain(first) and registry.plain(second)):
        return "it takes plain tensors, outside transforms, alone"
    others = set(map(_dtype, [*first, *second])) - _FORMATS.keys()
    return f"it does not take {', '.join(map(str, others))}" if others else None


@cpu.backend.kernel("sign_agreement", dtypes=_FORMATS, accepts=_accepts)
def _cpu_sign_agreement(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    ones, others = contiguous(first), contiguous(second)
    sums = torch.empty(len(ones), dtype=torch.float64, device="cpu")
    core.core().cpu.sign_agreements(
        addresses(ones),
        [_FORMATS[one.dtype] for one in ones],
        addresses(others),
        [_FORMATS[other.dtype] for other in others],
        list(map(Tensor.numel, ones)),
        sums.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return sums
