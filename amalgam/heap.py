"""What a process does with the memory that it frees."""

from __future__ import annotations

import ctypes

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
