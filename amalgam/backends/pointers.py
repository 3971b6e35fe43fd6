"""The one place where tensors are checked before compiled code gets their addresses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def checked(name: str, tensor: Tensor, shape: Sequence[int], like: Tensor) -> Tensor:
    """``tensor``, contiguous, if it is what compiled code will take it for.

    Keep the result alive while its address is in use: of a non-contiguous tensor it is a copy.

    Args:
        name: What to call it in errors.
        tensor: Any tensor.
        shape: The shape it must have.
        like: The tensor whose dtype and device it must have.

    Raises:
        ValueError: Its shape, dtype, device or layout is another.
    """
    _check(name, tensor, shape, like)
    return tensor.contiguous()


def checked_rows(
    name: str, tensor: Tensor, shape: Sequence[int], like: Tensor
) -> tuple[Tensor, int]:
    """A matrix as :func:`checked` has it, but for rows that may lie anywhere.

    Returns:
        The matrix, a copy only where its rows are not contiguous, and how many elements lie from
        one row's begin to the next one's.

    Raises:
        ValueError: Its shape, dtype, device or layout is another.
    """
    _check(name, tensor, shape, like)
    if tensor.stride(1) != 1:
        tensor = tensor.contiguous()
    return tensor, tensor.stride(0)


def in_place(name: str, tensor: Tensor, shape: Sequence[int], like: Tensor) -> Tensor:
    """``tensor``, as :func:`checked` has it, for compiled code to write to.

    Raises:
        ValueError: It is not what compiled code will take it for, or not contiguous: a copy would
            be written in its place.
    """
    if checked(name, tensor, shape, like) is not tensor and not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, not of strides {tensor.stride()}")
    return tensor


def distinct(name: str, tensors: Sequence[Tensor]) -> None:
    """Refuse tensors to be written to of which two begin at one address.

    Raises:
        ValueError: Two of them do; threads would write to both at once.
    """
    addresses = [tensor.data_ptr() for tensor in tensors if tensor.numel()]
    if len(set(addresses)) < len(addresses):
        raise ValueError(f"{name} must not share memory: each tensor may be passed once")


def dtype_name(dtype: Tensor | torch.dtype) -> str:
    """``"float32"`` for ``torch.float32`` or a tensor of it: how compiled functions' names end."""
    if isinstance(dtype, Tensor):
        dtype = dtype.dtype
    return str(dtype).removeprefix("torch.")


def _check(name: str, tensor: Tensor, shape: Sequence[int], like: Tensor) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, not {tuple(tensor.shape)}")
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise ValueError(
            f"{name} must be {like.dtype} on {like.device}, not {tensor.dtype} on {tensor.device}"
        )
    if tensor.is_sparse or tensor.is_quantized:
        raise ValueError(f"{name} must be a dense tensor, not {tensor.layout}")
