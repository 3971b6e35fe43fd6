"""What compiled code presumes of memory: contiguity, no sharing, addresses and names of dtypes.

Operations have checked shapes, dtypes and devices before a backend is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from amalgam.operations.checks import check_distinct
from amalgam.operations.student_step_in_place import InPlaceStep


def contiguous(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors, contiguous; hold the list while their addresses are in use.

    A list in which all are contiguous is returned itself.
    """
    found = tensors if isinstance(tensors, list) else list(tensors)
    if all(map(Tensor.is_contiguous, found)):
        return found
    return [tensor.contiguous() for tensor in found]


def unwritten(like: Iterable[Tensor]) -> list[Tensor]:
    """Contiguous memory for a result of each tensor's shape, dtype and device."""
    return [tensor.new_empty(tensor.shape) for tensor in like]


def check_written(names: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """Raise ValueError unless compiled code can write to these tensors.

    Args:
        names: What to call them in errors.
        tensors: As many; they must be contiguous (a copy would be written in their place) and
            share no memory.
    """
    check_distinct("outputs", tensors, names.__getitem__)
    for name, tensor in zip(names, tensors, strict=True):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, not of strides {tensor.stride()}")


def with_contiguous_rows(matrix: Tensor) -> tuple[Tensor, int]:
    """A matrix whose rows are contiguous, and how many elements lie from row to row.

    It is the matrix itself where its rows are, wherever they lie; else a copy.
    """
    if matrix.stride(1) != 1:
        matrix = matrix.contiguous()
    return matrix, matrix.stride(0)


def dense_in_place(step: InPlaceStep) -> tuple[list[Tensor], list[Tensor], Callable[[], None]]:
    """Parameters and gradients of a step in place, contiguous.

    Returns:
        The parameters and the gradients, copies of those that are strided; and what to call after
        the step, which writes copied parameters back.
    """
    params, grads = contiguous(step.tensors.params), contiguous(step.grads)

    def put_back() -> None:
        if params is step.tensors.params:
            return
        for param, dense in zip(step.tensors.params, params, strict=True):
            if dense is not param:
                param.copy_(dense)

    return params, grads, put_back


def dtype_name(dtype: Tensor | torch.dtype) -> str:
    """``"float32"`` for ``torch.float32`` or a tensor of it: how compiled functions' names end."""
    if isinstance(dtype, Tensor):
        dtype = dtype.dtype
    return str(dtype).removeprefix("torch.")
