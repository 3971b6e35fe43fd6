"""``teacher_distance`` beside plain PyTorch, forward and backward, as a share of a memory copy.

python -m pytest bench/bench_teacher_distance.py [--benchmark-json=rows.json]
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import kernel, measure, need, sizes, threads_of_each
from torch import Tensor

from amalgam.operations.teacher_distance import DistanceArguments

K = 6
EPS = 1e-10


def _forward(student: Tensor, teachers: Tensor) -> tuple[list[Any], int]:
    arguments = DistanceArguments(student[None], teachers[:, None], EPS, None)
    return [arguments], (K + 1) * student.nbytes


def _backward(student: Tensor, teachers: Tensor) -> tuple[list[Any], int]:
    arguments = DistanceArguments(student[None], teachers[:, None], EPS, None)
    totals = kernel("teacher_distance", "reference")(arguments)[1]
    return [torch.ones_like(totals), totals, arguments, True], 2 * (K + 1) * student.nbytes


@pytest.mark.parametrize("n", sizes(10**3, 10**4, 10**5, 10**6, 10**7))
@threads_of_each
@pytest.mark.parametrize("backend", ["reference", "compiled", "cpu"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_teacher_distance(
    benchmark: Any, direction: str, backend: str, threads: int, n: int
) -> None:
    name = "teacher_distance" if direction == "forward" else "teacher_distance_backward"
    need(backend, name)
    generator = torch.Generator().manual_seed(n)
    student = torch.randn(n, generator=generator)
    teachers = torch.randn(K, n, generator=generator)
    arguments, moved = (_forward if direction == "forward" else _backward)(student, teachers)

    function = kernel(name, backend)
    expected = kernel(name, "reference")(*arguments)
    for ours, theirs in zip(function(*arguments), expected, strict=True):
        torch.testing.assert_close(ours, theirs)

    measure(
        benchmark,
        lambda: function(*arguments),
        operation=f"teacher_distance {direction}",
        backend=backend,
        n=n,
        threads=threads,
        moved=moved,
    )
