"""``teacher_distance`` beside plain PyTorch, forward and backward, as a share of a memory copy.

python -m pytest bench/bench_teacher_distance.py [--benchmark-json=rows.json]
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from amalgam.ops import backends, registry

K = 6
EPS = 1e-10
SIZES = [10**4, 10**5, 10**6, 10**7]
ON_CPU = ["reference", "compiled_reference", "cpu"]
ON_GPU = ["reference", "compiled_reference", "triton", "cuda"]
CASES = [
    *((backend, "cpu", threads) for backend in ON_CPU for threads in (1, 2)),
    *((backend, "cuda", 1) for backend in ON_GPU),
]


@functools.cache
def _function(name: str, backend: str) -> Callable[..., Any]:
    """The kernel itself: what autograd and the dispatcher add is the same for all."""
    of = registry._backends["reference" if backend == "compiled_reference" else backend]
    function = of.kernels[name].function
    return torch.compile(function, dynamic=True) if backend == "compiled_reference" else function


def _forward(student: Tensor, teachers: Tensor) -> tuple[list[Any], int]:
    return [student, teachers, EPS, None], (K + 1) * student.nbytes


def _backward(student: Tensor, teachers: Tensor) -> tuple[list[Any], int]:
    total = _function("teacher_distance", "reference")(student, teachers, EPS, None)[1]
    grad = torch.ones_like(total)
    return [grad, student, teachers, total, EPS, None, True], 2 * (K + 1) * student.nbytes


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(
    ("backend", "device", "threads"), CASES, ids=lambda v: str(v), indirect=["threads"]
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_teacher_distance(
    benchmark: Any, roof: Any, direction: str, backend: str, device: str, threads: int, n: int
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA GPU here")
    if backend in backends() and not backends()[backend].works:
        pytest.skip(f"{backend}: {backends()[backend].reason}")
    benchmark.group = f"{direction} {device} threads={threads} n={n}"
    generator = torch.Generator().manual_seed(n)
    student = torch.randn(n, generator=generator).to(device)
    teachers = torch.randn(K, n, generator=generator).to(device)
    name = "teacher_distance" if direction == "forward" else "teacher_distance_backward"
    arguments, moved = (_forward if direction == "forward" else _backward)(student, teachers)

    function = _function(name, backend)
    expected = _function(name, "reference")(*arguments)
    for ours, theirs in zip(function(*arguments), expected, strict=True):
        torch.testing.assert_close(ours, theirs)

    def call() -> None:
        function(*arguments)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=_rounds(n), warmup_rounds=2, iterations=1)
    if benchmark.stats is None:  # --benchmark-disable
        return
    rate = moved / benchmark.stats.stats.median
    benchmark.extra_info.update(
        direction=direction,
        backend=backend,
        device=device,
        threads=threads,
        n=n,
        gigabytes_per_second=round(rate / 1e9, 3),
        share_of_a_copy=round(rate / roof(device), 3),
    )


def _rounds(n: int) -> int:
    return max(11, min(200, 10**7 // n))
