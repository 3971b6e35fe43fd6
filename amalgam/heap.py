"""What a process does with the memory that it frees, and how much autograd keeps."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# From glibc's malloc.h. A larger mmap threshold than 32 MiB it refuses.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT, _LARGEST = 2**31 - 1, 32 * 2**20


def keep_freed_memory() -> bool:
    """Let the C library keep up to 2 GiB of freed memory; only glibc can.

    Every step of an unroll frees and asks for the same tensors. Where they go back to the system in
    between, their pages are made anew, zeroed, a fault each: of a convolutional optimizee's step
    that can be half the time. It counts for the whole process, which therefore decides.

    Returns:
        Whether it does.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc: macOS, musl, Windows
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _KEPT) and mallopt(_MMAP_THRESHOLD, _LARGEST))


def graph_bytes(make: Callable[[], object], given: Iterable[Tensor] = ()) -> int:
    """Bytes of what autograd saves for a backward pass.

    Args:
        make: Returns what holds the graph.
        given: Tensors that are there in any case, and do not count.
    """
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        # The graph holds all that it saves until the end, so no address comes twice.
        _kept = make()
    for tensor in given:
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(sizes.values())
