"""What every launch needs."""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's GPU current: Triton launches on the current device and stream."""
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def on_nvidia() -> bool:
    """Whether kernels may hold PTX: compiled for NVIDIA's GPUs, not AMD's, and not interpreted."""
    return not triton.knobs.runtime.interpret and torch.version.cuda is not None


def processors(device: torch.device) -> int:
    """How many multiprocessors a GPU has; 2 where the interpreter stands in for one."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def wide(*tensors: Tensor) -> bool:
    """Whether places in tensors, and the ones after them that are masked, need 64 bits."""
    return max(map(Tensor.numel, tensors)) >= 2**31 - 2**20
