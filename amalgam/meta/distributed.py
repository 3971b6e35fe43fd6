"""Several processes meta-train as one: what they have to agree on, by ``torch.distributed``.

Every process runs the whole program; where ``torchrun`` started it, they meet in :func:`join`.
Without one, all of this is the one process's own.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def join() -> None:
    """Meet the other processes that ``torchrun`` started, if it did and they have not met.

    Tensors on the CPU travel by gloo, those on GPUs by NCCL; a process's own GPU becomes the one
    that its ``LOCAL_RANK`` counts, where there are that many.
    """
    if "RANK" not in os.environ or dist.is_initialized():
        return
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return
    local = int(os.environ["LOCAL_RANK"])
    if local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl")


def leave() -> None:
    """Part from them, when all are there: who goes while others still talk may abort."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def average(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Means over the processes."""
    if world() == 1:
        return list(tensors)
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def gather(value: Any) -> list[Any]:
    """Every process's value, at the first one; elsewhere nothing."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    dist.gather_object(value, found if rank() == 0 else None)
    return found if rank() == 0 else []


def from_first(value: Any) -> Any:
    """The first process's value."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def by_first(do: Callable[[], T]) -> T:
    """What ``do`` gives the first process, which alone does it.

    Raises:
        SystemExit: In the others, where it failed; the first one raises the error itself.
    """
    if world() == 1:
        return do()
    value: T | None = None
    error: Exception | None = None
    if rank() == 0:
        try:
            value = do()
        except Exception as raised:
            error = raised
    failed, value = from_first((error is not None, value))
    if error is not None:
        raise error
    if failed:
        # torchrun ends everybody when one ends: the first is to say why before that.
        with contextlib.suppress(RuntimeError):
            dist.barrier()
        raise SystemExit(2)
    result: T = value
    return result
