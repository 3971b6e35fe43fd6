"""The one place where tensors are checked before compiled code gets their addresses."""

from __future__ import annotations

from collections.abc import Sequence

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
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, not {tuple(tensor.shape)}")
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise ValueError(
            f"{name} must be {like.dtype} on {like.device}, not {tensor.dtype} on {tensor.device}"
        )
    if tensor.is_sparse or tensor.is_quantized:
        raise ValueError(f"{name} must be a dense tensor, not {tensor.layout}")
    return tensor.contiguous()


def dtype_name(tensor: Tensor) -> str:
    """``"float32"`` for ``torch.float32``: how the compiled functions' names end."""
    return str(tensor.dtype).removeprefix("torch.")
