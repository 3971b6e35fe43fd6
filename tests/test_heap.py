"""Freed memory that a process keeps."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from amalgam import heap

# glibc is asked what it holds. Counts of page faults would tell what that saves, and are zero
# where the kernel is one that keeps none.
HELD = """
import ctypes
import torch
from amalgam.heap import keep_freed_memory
class Usage(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost")]
usage = ctypes.CDLL(None).mallinfo2
usage.restype = Usage
assert keep_freed_memory()
before = usage().hblks
# Once, and larger than anything before: where it is told nothing, glibc learns from what is freed.
tensors = [torch.ones(6 * 2**20) for _ in range(4)]
mapped = usage().hblks - before
del tensors
print(mapped, usage().fordblks)
"""


def version() -> tuple[int, ...]:
    name, number = platform.libc_ver()
    return tuple(map(int, number.split("."))) if name == "glibc" else ()


@pytest.mark.skipif(version() < (2, 33), reason="only glibc is told, and 2.33 and newer tell back")
def test_freed_memory_is_kept() -> None:
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=True)
    mapped, free = map(int, done.stdout.split())
    assert mapped == 0
    assert free >= 4 * 24 * 2**20


def test_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    assert heap.keep_freed_memory() is False
