"""What an optimizer's state takes, before there is any."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from amalgam.optimizers.base import computing_dtype
from amalgam.optimizers.sharding import local_part
from amalgam.optimizers.source import student_of
from amalgam.optimizers.student import (
    CELLS_DTYPES,
    DEFAULT_STUDENT,
    MOMENTS_DTYPES,
    check_stored,
)
from amalgam.policies import FusedStudent


class MemoryEstimate(NamedTuple):
    """What the state of an :class:`amalgam.AmalgamatedOptimizer` takes.

    Attributes:
        parameters: How many parameters there are, elements of tensors.
        state_bytes: Bytes of moments, cells, counts of steps and paces.
        bytes_a_parameter: Of moments and cells alone, what one parameter takes.
        update_bytes: Bytes beside the state of updates that are orthogonalised, from the first step
            on; 0 where none are.
    """

    parameters: int
    state_bytes: int
    bytes_a_parameter: float
    update_bytes: int = 0


def estimate_memory(
    params: nn.Module | Iterable[Tensor],
    student: FusedStudent | str | os.PathLike[str] = DEFAULT_STUDENT,
    *,
    cells_dtype: torch.dtype | None = None,
    moments_dtype: torch.dtype | None = None,
    orthogonal: bool | None = None,
) -> MemoryEstimate:
    """What the state of an :class:`amalgam.AmalgamatedOptimizer` takes, without making it.

    Args:
        params: A module, of which the parameters that require gradients count; or tensors, of which
            all do. They may be on the meta device. Of DTensors this process's parts count.
        student: As :class:`amalgam.AmalgamatedOptimizer` takes it, like the others.
        cells_dtype: Dtype of the LSTM's state.
        moments_dtype: Dtype of the moments.
        orthogonal: Whether updates of whole matrices are orthogonalised; ``None`` for as the
            student was trained.

    Returns:
        The estimate, which is exact.

    Raises:
        TypeError: A parameter is not floating point.
        ValueError: A dtype is none of these.
        FileNotFoundError: ``student`` is neither a name nor a file.
    """
    check_stored("cells_dtype", cells_dtype, CELLS_DTYPES)
    check_stored("moments_dtype", moments_dtype, MOMENTS_DTYPES)
    made = student_of(student)
    config = made.config
    if isinstance(params, nn.Module):
        params = [param for param in params.parameters() if param.requires_grad]
    numel = of_numbers = of_tensors = of_updates = 0
    orthogonal = made.orthogonal if orthogonal is None else orthogonal
    tensors = list(params)
    for param in tensors:
        if not param.is_floating_point():
            raise TypeError(f"params must be floating-point tensors, not {param.dtype}")
        wide = computing_dtype(param.dtype)
        narrow = wide == torch.float32
        moments = (narrow and moments_dtype) or wide
        cells = (narrow and cells_dtype) or wide
        columns = config.hidden + (cells == torch.int8)
        each = 2 * moments.itemsize + 2 * config.layers * columns * cells.itemsize
        here = local_part(param).numel()
        numel += here
        of_numbers += each * here
        of_updates += orthogonal * wide.itemsize * here
        of_tensors += torch.float32.itemsize + made.paced * wide.itemsize
    a_parameter = of_numbers / max(1, numel)
    return MemoryEstimate(numel, of_numbers + of_tensors, a_parameter, of_updates)
