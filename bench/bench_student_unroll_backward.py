"""``student_unroll_backward`` beside what a user would compose, as a share of a matrix product.

python -m pytest bench/bench_student_unroll_backward.py [--benchmark-json=rows.json]

The rivals:

- ``reference``: plain PyTorch's steps and their hand-written backward, some coordinates at a time.
- ``composed``: the same walk, of the cpu backend's kernels for one step.
- ``cpu``: the fused operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import (
    assert_close,
    kernel,
    lstm_flop,
    lstm_weights,
    measure,
    need,
    sizes,
    threads_of_each,
)
from torch import Tensor

from amalgam.operations.student_unroll_backward import CHUNK, HELD, by_steps
from amalgam.ops import StepSettings, initial_state

LAYERS, HIDDEN = 2, 20
FLOP = lstm_flop(2, HIDDEN, LAYERS, 1)
SETTINGS = StepSettings()
FEW = 1029  # coordinates on which results are compared first
# Coordinates times steps of a call of some seconds, by the slowest rival and by the others.
LARGEST = {"reference": 10**7, "composed": 10**8, "cpu": 10**8}

Run = Callable[..., list[Tensor]]


def rival_of(name: str) -> Run:
    if name != "composed":
        return kernel("student_unroll_backward", name)
    steps = kernel("student_step", "cpu"), kernel("student_step_backward", "cpu")

    def composed(*arguments: Any) -> list[Tensor]:
        return by_steps(*steps, *arguments, chunk=CHUNK, held=HELD)

    return composed


def arguments_of(steps: int, n: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(n)
    weights = lstm_weights(2, HIDDEN, LAYERS, 1)
    grads, adjoints = (torch.randn(steps, n, generator=generator) for _ in range(2))
    return grads, adjoints, initial_state(grads[0], weights), weights, SETTINGS


@pytest.mark.parametrize("n", sizes(10**3, 16_000, 10**5, 10**6))
@pytest.mark.parametrize("steps", [20, 100])
@threads_of_each
@pytest.mark.parametrize("rival", ["reference", "composed", "cpu"])
def test_unroll(benchmark: Any, rival: str, threads: int, steps: int, n: int) -> None:
    need("reference" if rival == "reference" else "cpu", "student_unroll_backward")
    if steps * n > LARGEST[rival]:
        pytest.skip(f"{rival} takes long: not beyond {LARGEST[rival]} coordinates' steps")
    run = rival_of(rival)
    few = arguments_of(steps, min(n, FEW))
    assert_close(run(*few), kernel("student_unroll_backward", "reference")(*few), 1e-3, 1e-4)
    whole = arguments_of(steps, n)
    # The backward's products are twice the forward's.
    measure(
        benchmark,
        lambda: run(*whole),
        operation=f"student_unroll_backward, {steps} steps",
        backend=rival,
        n=n,
        threads=threads,
        flop=3 * steps * n * FLOP,
        steps=steps,
    )
