"""``teacher_step`` beside plain PyTorch, forward and backward, as a share of a memory copy.

python -m pytest bench/bench_teacher_step.py [--benchmark-json=rows.json]

``AMALGAM_BENCH_QUICK=1`` takes the small sizes only.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from amalgam.ops import KINDS, backends, registry

K = len(KINDS)
QUICK = os.environ.get("AMALGAM_BENCH_QUICK") == "1"
SIZES = [10**3, 10**4] if QUICK else [10**3, 10**4, 10**5, 10**6]


@functools.cache
def _function(name: str, backend: str) -> Callable[..., Any]:
    """The kernel itself: what autograd and the dispatcher add is the same for all."""
    of = registry._backends["cpu" if backend == "cpu" else "reference"]
    function = of.kernels[name].function
    return torch.compile(function, dynamic=True) if backend == "compiled" else function


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("backend", ["reference", "compiled", "cpu"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_teacher_step(
    benchmark: Any, roof: Any, direction: str, backend: str, threads: int, n: int
) -> None:
    name = "teacher_step" if direction == "forward" else "teacher_step_backward"
    if backend == "cpu":
        status = backends()["cpu"]
        if not status.works:
            pytest.skip(f"cpu: {status.reason}")
        if name not in status.operations:
            pytest.skip(f"the cpu backend has no {name} yet")
    benchmark.group = f"{direction} threads={threads} n={n}"
    generator = torch.Generator().manual_seed(n)
    grads, m, v, *grads_out = (torch.randn(K, n, generator=generator) for _ in range(6))
    of_each = [[value] * K for value in (0.1, 0.9, 0.999, 1e-10)]
    inputs = grads, m, v.square(), list(range(K)), *of_each
    arguments = inputs if direction == "forward" else (grads_out, *inputs)
    moved = (6 if direction == "forward" else 9) * grads.nbytes

    function = _function(name, backend)
    expected = _function(name, "reference")(*arguments)
    for ours, theirs in zip(function(*arguments), expected, strict=True):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * scale)

    rounds = max(5, min(200, 10**6 // n))
    benchmark.pedantic(lambda: function(*arguments), rounds=rounds, warmup_rounds=2, iterations=1)
    if benchmark.stats is None:  # --benchmark-disable
        return
    median = benchmark.stats.stats.median
    benchmark.extra_info.update(
        operation=f"teacher_step {direction}",
        backend=backend,
        device="cpu",
        threads=threads,
        n=n,
        ns_per_coordinate=round(1e9 * median / n, 3),
        gigabytes_per_second=round(moved / median / 1e9, 3),
        share_of_a_copy=round(moved / median / roof("cpu"), 3),
    )
