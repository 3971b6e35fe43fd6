"""What every launch needs."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's GPU current: Triton launches on the current device and stream."""
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()
