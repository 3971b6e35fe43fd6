"""Checks of the operations' arguments, made once: by the operation itself, before any backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless this is a tensor of a floating-point dtype."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = getattr(tensor, "dtype", type(tensor).__name__)
        raise TypeError(f"{name} must be a floating-point tensor, not {kind}")


def check_like(name: str, tensor: Tensor, shape: Sequence[int], like: Tensor) -> None:
    """Raise ValueError unless a tensor is dense, of this shape, and of another's dtype and device.

    Args:
        name: What to call it in errors.
        tensor: The tensor.
        shape: The shape that it must have.
        like: The tensor whose dtype and device it must have.
    """
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, not {tuple(tensor.shape)}")
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise ValueError(
            f"{name} must be {like.dtype} on {like.device}, not {tensor.dtype} on {tensor.device}"
        )
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, not {tensor.layout}")


def check_distinct(name: str, tensors: Sequence[Tensor]) -> None:
    """Refuse tensors to be written to of which two begin at one address.

    Raises:
        ValueError: Two of them do; threads would write to both at once.
    """
    filled = [address for address in map(Tensor.data_ptr, tensors) if address]
    if len(set(filled)) < len(filled):
        raise ValueError(f"{name} must not share memory: each tensor may be passed once")


def hollow(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and no numbers: on the meta device, or a fake one.

    Other subclasses of tensors may say that they are on the meta device, and have numbers.
    """
    if isinstance(tensor, FakeTensor):
        return True
    return tensor.is_meta and type(tensor) in (Tensor, nn.Parameter)
