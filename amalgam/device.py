"""Which device a run is on."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from amalgam.ranges import check_kind

T = TypeVar("T")


def resolve(device: str | torch.device = "auto") -> torch.device:
    """The device that a name stands for, a GPU with its number.

    Args:
        device: ``"auto"`` for a CUDA GPU where PyTorch sees one, else the CPU; ``"cpu"``;
            ``"cuda"`` for this process's GPU, which under ``torchrun`` is the one that its
            ``LOCAL_RANK`` counts, else PyTorch's current one; ``"cuda:1"`` for one by number; or a
            ``torch.device``.

    Raises:
        TypeError: It is neither a name nor a ``torch.device``.
        ValueError: There is no such device, or none is left for this process.
    """
    check_kind("device", device, str | torch.device, "'auto', 'cpu', 'cuda' or a torch.device")
    if isinstance(device, str) and not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:NUMBER', not {device!r}")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = torch.device(("cuda" if gpus else "cpu") if device == "auto" else device)
    if found.type != "cuda":
        return found
    own = str(found) == "cuda"
    index = _own_gpu() if own else found.index
    if index < gpus:
        return torch.device("cuda", index)
    works = ["'auto'", "'cpu'", *(f"'cuda:{number}'" for number in range(gpus))]
    seen = f"PyTorch sees {gpus} CUDA GPU{'s' * (gpus != 1)} here"
    if gpus and own:
        seen += f", and this process has LOCAL_RANK {index}"
        works.remove("'auto'")
    raise ValueError(f"device must be one of {', '.join(works)}, not {str(device)!r}: {seen}")


def put(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, for which the host does not wait.

    The CPU's may be written to right after: what is not in pinned memory is copied first.

    Raises:
        RuntimeError: A CUDA graph is being captured, whose replays would read the CPU's again.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"a tensor of shape {tuple(tensor.shape)} is copied from the CPU")
    return tensor.to(device, non_blocking=True)


_reads: list[list[Any]] = []


@contextmanager
def graph_reads(into: list[Any]) -> Iterator[None]:
    """Within the block, what :func:`read_by_graphs` is called with is added to a list."""
    _reads.append(into)
    try:
        yield
    finally:
        _reads.pop()


def read_by_graphs(value: T) -> T:
    """Tell a graph that is being captured of a value out of a cache: the graph has to keep it."""
    for into in _reads:
        into.append(value)
    return value


def read(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What tensors of one device hold, on the CPU, by one copy for which the host waits once.

    Args:
        tensors: Tensors of any shapes, and of dtypes whose values float64 holds; themselves where
            they are on the CPU.
    """
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return list(tensors)
    flat = torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]


def _own_gpu() -> int:
    """The number of the GPU that is this process's, whether it is there or not."""
    local = os.environ.get("LOCAL_RANK")
    if local is not None:
        return int(local)
    return torch.cuda.current_device() if torch.cuda.is_available() else 0
