"""``choice_step`` beside plain PyTorch, forward and backward, as a share of a matrix product.

python -m pytest bench/bench_choice_step.py [--benchmark-json=rows.json]
"""

from __future__ import annotations

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

from amalgam.operations.choice_step import ChoiceArguments
from amalgam.operations.teacher_step import PoolSettings
from amalgam.ops import StudentState

LAYERS, HIDDEN = 2, 20
KINDS_OF = {2: [2, 3], 6: [0, 1, 2, 3, 4, 5]}  # the paper's small and large pools
LARGEST_GRAPH = 10**5  # the reference's backward keeps whole intermediates


@pytest.mark.parametrize("n", sizes(10**3, 10**4, 10**5, 10**6))
@threads_of_each
@pytest.mark.parametrize("backend", ["reference", "compiled", "cpu"])
@pytest.mark.parametrize("k", KINDS_OF)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_choice_step(
    benchmark: Any, direction: str, k: int, backend: str, threads: int, n: int
) -> None:
    name = "choice_step" if direction == "forward" else "choice_step_backward"
    need(backend, name)
    if backend != "cpu" and n > LARGEST_GRAPH:
        pytest.skip(f"PyTorch holds whole intermediates: not beyond {LARGEST_GRAPH} coordinates")
    weights = lstm_weights(k + 4, HIDDEN, LAYERS, k)
    of_each = [[value] * k for value in (0.01, 0.9, 0.999, 1e-8)]

    def arguments(n: int) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(n)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        cells = draw(LAYERS, HIDDEN, n), draw(LAYERS, HIDDEN, n)
        state = StudentState(draw(k, n), draw(k, n).square(), *cells)
        pool = PoolSettings(KINDS_OF[k], *of_each)
        step = (draw(n), state, weights, ChoiceArguments(torch.arange(n) % 5, pool, 0.5, 1.0))
        if direction == "forward":
            return step
        d_state = StudentState(*map(torch.ones_like, state))
        return (torch.ones_like(step[0]), d_state, torch.ones_like(state.m), *step)

    function, few = kernel(name, backend), arguments(min(n, 4099))
    assert_close(function(*few), kernel(name, "reference")(*few), rtol=1e-3, of_scale=1e-4)

    whole = arguments(n)
    # The backward's products are twice the forward's, and the forward's come again.
    passes = 1 if direction == "forward" else 3
    measure(
        benchmark,
        lambda: function(*whole),
        operation=f"choice_step of {k} teachers, {direction}",
        backend=backend,
        n=n,
        threads=threads,
        flop=n * passes * lstm_flop(k + 4, HIDDEN, LAYERS, k),
    )
