"""Several processes that work as one, by ``torch.distributed``.

Every process runs the whole program. The processes that ``torchrun`` started meet in :func:`join`.
A program without ``torchrun`` has a single process, the first; every function here works for it,
too.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from amalgam import files

T = TypeVar("T")

_apart = False
_waits: list[Callable[[], float]] = []  # of each sum, its seconds


def join() -> None:
    """Meet the other processes; does nothing without ``torchrun`` or after an earlier call.

    The processes exchange CPU tensors by gloo and GPU tensors by NCCL. The process's current GPU
    becomes the one with the number ``LOCAL_RANK``, if there is one.
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
    """Wait until all processes call this, then leave them.

    A process that leaves while others still exchange tensors may abort them.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Let this process be the only one for the functions here, for as long as the block lasts.

    What runs within gives the same numbers in whichever process it runs, and waits for no other.
    """
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() and not _apart else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() and not _apart else 1


def locked(folder: str | os.PathLike[str]) -> contextlib.AbstractContextManager[None]:
    """Keep other runs from a folder within the block; all processes of one run are one.

    Raises:
        BlockingIOError: Another run has the folder.
    """
    return contextlib.nullcontext() if rank() else files.locked(folder)


def total(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor's sum over the processes."""
    if world() == 1:
        return list(tensors)
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    with _waiting(flat.device):
        dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def average(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor's mean over the processes."""
    if world() == 1:
        return list(tensors)
    return [tensor / world() for tensor in total(tensors)]


@contextlib.contextmanager
def _waiting(device: torch.device) -> Iterator[None]:
    """Note how long what is in the block takes: on a GPU by its own clock, as the host goes on."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()

        def seconds() -> float:
            end.synchronize()
            return begin.elapsed_time(end) / 1e3
    else:
        started = time.perf_counter()
        yield
        spent = time.perf_counter() - started

        def seconds() -> float:
            return spent

    _waits.append(seconds)


def waited() -> list[float]:
    """How long each process has waited for sums since the last call, the transfer counted.

    Returns:
        Seconds, in the order of the ranks; an empty list in all processes but the first.
    """
    own = sum(seconds() for seconds in _waits)
    _waits.clear()
    return gather(own)


def gather(value: Any) -> list[Any]:
    """All processes' values, in the order of their ranks; an empty list in all but the first."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    dist.gather_object(value, found if rank() == 0 else None)
    return found if rank() == 0 else []


def from_all(value: Any) -> list[Any]:
    """All processes' values, in the order of their ranks, in each of them.

    Some may have days more to run than others.
    """
    if world() == 1:
        return [value]
    group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value, group=group)
    dist.destroy_process_group(group)
    return found


def from_first(value: Any) -> Any:
    """The first process's value, in all processes."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def by_first(do: Callable[[], T]) -> T:
    """Call a function in the first process alone, and return its result in all of them.

    Raises:
        SystemExit: In the other processes, if the call failed. The first process raises the call's
            own error.
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
        # torchrun ends all processes when one ends; the first has to print its error before that.
        with contextlib.suppress(RuntimeError):
            dist.barrier()
        raise SystemExit(2)
    result: T = value
    return result
