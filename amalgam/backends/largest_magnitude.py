"""How each backend computes ``largest_magnitude``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amalgam.backends import core, cpu
from amalgam.backends.memory import (
    contiguous,
)
from amalgam.operations import registry
from amalgam.operations.table import addresses

# Dtypes of parameters and gradients, and integers as wide.
_STORED = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def _accepts(tensors: Sequence[Tensor]) -> str | None:
    return None if registry.plain(tensors) else "it takes plain tensors, outside transforms, alone"


@cpu.backend.kernel("largest_magnitude", dtypes=_STORED, accepts=_accepts)
def _cpu_largest_magnitude(tensors: Sequence[Tensor]) -> Tensor:
    like, dense = tensors[0], contiguous(tensors)
    bits = core.core().cpu.largest_magnitude(
        addresses(dense),
        list(map(Tensor.numel, dense)),
        bytes=like.element_size(),
        threads=torch.get_num_threads(),
    )
    return torch.tensor(bits, dtype=_STORED[like.dtype], device="cpu").view(like.dtype)
