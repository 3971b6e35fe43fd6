"""``teacher_step`` beside plain PyTorch, forward and backward, as a share of a memory copy.

python -m pytest bench/bench_teacher_step.py [--benchmark-json=rows.json]
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import assert_close, kernel, measure, need, sizes, threads_of_each

from amalgam.operations.teacher_step import PoolSettings
from amalgam.ops import KINDS

K = len(KINDS)


@pytest.mark.parametrize("n", sizes(10**3, 10**4, 10**5, 10**6))
@threads_of_each
@pytest.mark.parametrize("backend", ["reference", "compiled", "cpu"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_teacher_step(benchmark: Any, direction: str, backend: str, threads: int, n: int) -> None:
    name = "teacher_step" if direction == "forward" else "teacher_step_backward"
    need(backend, name)
    generator = torch.Generator().manual_seed(n)
    grads, m, v, *grads_out = (torch.randn(K, n, generator=generator) for _ in range(6))
    of_each = [[value] * K for value in (0.1, 0.9, 0.999, 1e-10)]
    inputs = grads, m, v.square(), PoolSettings(list(range(K)), *of_each)
    arguments = inputs if direction == "forward" else (grads_out, *inputs)

    function = kernel(name, backend)
    expected = kernel(name, "reference")(*arguments)
    assert_close(function(*arguments), expected, rtol=1e-4, of_scale=1e-6)

    measure(
        benchmark,
        lambda: function(*arguments),
        operation=f"teacher_step of {K} teachers, {direction}",
        backend=backend,
        n=n,
        threads=threads,
        moved=(6 if direction == "forward" else 9) * grads.nbytes,
    )
