"""How each backend computes ``sign_agreement``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from amalgam.backends import core, cpu, cuda
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
    counts = torch.empty((len(first), 2), dtype=torch.float64, device="cpu")
    where = {"threads": torch.get_num_threads()}
    _run(core.core().cpu, contiguous(first), contiguous(second), counts, where)
    return counts


@cuda.backend.kernel("sign_agreement", dtypes=_FORMATS, accepts=_accepts)
def _cuda_sign_agreement(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    counts = torch.zeros((len(first), 2), dtype=torch.int64, device=first[0].device)
    with torch.cuda.device(counts.device):
        _run(core.core().cuda, contiguous(first), contiguous(second), counts, cuda.place_of(counts))
    return counts.double()


def _run(
    module: Any,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    counts: Tensor,
    where: Mapping[str, int],
) -> None:
    module.sign_agreements(
        addresses(first),
        [_FORMATS[one.dtype] for one in first],
        addresses(second),
        [_FORMATS[other.dtype] for other in second],
        list(map(Tensor.numel, first)),
        counts.data_ptr(),
        **where,
    )
