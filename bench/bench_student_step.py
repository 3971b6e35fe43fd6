"""``student_step`` beside plain PyTorch and AdamW, as a share of a matrix product.

python -m pytest bench/bench_student_step.py [--benchmark-json=rows.json]

``AMALGAM_BENCH_QUICK=1`` takes the small sizes only. The rivals on N coordinates:

- ``eager``: the functional reference under no_grad, one call over all coordinates, and the update
  subtracted: what a user of eager PyTorch would write.
- ``compiled``: the same function through ``torch.compile``.
- ``reference``: the in-place reference, which takes chunks that stay in cache.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from amalgam.ops import StepSettings, StudentState, backends, initial_state, registry
from amalgam.ops import student_step as functional
from amalgam.ops import student_step_ as in_place

LAYERS, HIDDEN = 2, 20
SETTINGS = StepSettings()
QUICK = os.environ.get("AMALGAM_BENCH_QUICK") == "1"
SIZES = [10**3, 10**4] if QUICK else [10**3, 10**4, 10**5, 10**6, 10**7]
LARGEST_GRAPH = 1 << 20  # whole intermediates of more coordinates take tens of gigabytes
MATRIX = 1024 if QUICK else 2048
ROUND_SECONDS = 0.5  # rivals slower than this get few rounds

threads_of_each = pytest.mark.parametrize("threads", [1, 2], indirect=True)
Run = Callable[[], Any]


def flop(layers: int = LAYERS, hidden: int = HIDDEN) -> int:
    """Per coordinate and step, a multiply-add as two: 9,960 of two layers of 20 units."""
    inputs = [2, *[hidden] * (layers - 1)]
    return sum(2 * 4 * hidden * (n + hidden) for n in inputs) + 2 * hidden


def make_weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    weights = []
    for layer in range(LAYERS):
        inputs = HIDDEN if layer else 2
        weights += [draw(4 * HIDDEN, inputs), draw(4 * HIDDEN, HIDDEN), draw(4 * HIDDEN)]
    return [*weights, draw(1, HIDDEN), draw(1)]


def make_vectors(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, generator=generator), torch.randn(n, generator=generator)


def copied(state: StudentState) -> StudentState:
    return StudentState(*(tensor.clone() for tensor in state))


def need_kernels(backend: str, *names: str) -> None:
    status = backends()[backend]
    if not status.works:
        pytest.skip(f"{backend}: {status.reason}")
    missing = sorted(set(names) - set(status.operations))
    if missing:
        pytest.skip(f"the {backend} backend has no {missing} yet")


@functools.cache
def sgemm_rate(threads: int) -> float:
    """FLOP per second of a float32 matrix product on this many threads."""
    a, b = torch.randn(MATRIX, MATRIX), torch.randn(MATRIX, MATRIX)
    torch.mm(a, b)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return 2 * MATRIX**3 / statistics.median(times)


def measure(benchmark: Any, call: Run, n: int, work: int, **facts: Any) -> None:
    """Time a call on n coordinates of ``work`` FLOP each, and write down what that makes."""
    start = time.perf_counter()
    call()
    slow = time.perf_counter() - start > ROUND_SECONDS
    rounds = 1 if QUICK and slow else 3 if slow else max(5, min(200, 10**6 // n))
    benchmark.pedantic(call, rounds=rounds, warmup_rounds=0 if slow else 2, iterations=1)
    if benchmark.stats is None:  # --benchmark-disable
        return
    median = benchmark.stats.stats.median
    benchmark.extra_info.update(facts, n=n, ns_per_coordinate=round(1e9 * median / n, 3))
    if work:
        rate = n * work / median
        benchmark.extra_info.update(
            gflop_per_second=round(rate / 1e9, 3),
            share_of_sgemm=round(rate / sgemm_rate(facts["threads"]), 3),
        )


def held_at_once(call: Run) -> int:
    """Bytes of the temporaries that PyTorch allocates in a call and holds at its peak."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@functools.cache
def compiled() -> Callable[..., Any]:
    return torch.compile(registry.reference.kernels["student_step"].function, dynamic=True)


def whole_step(
    function: Callable[..., Any],
    param: Tensor,
    grad: Tensor,
    state: StudentState,
    weights: list[Tensor],
) -> None:
    with torch.no_grad():
        update, *new = function(grad, *state, weights, *SETTINGS)
        param -= update
        for old, value in zip(state, new, strict=True):
            old.copy_(value)


def stepper(
    rival: str, param: Tensor, grad: Tensor, state: StudentState, weights: list[Tensor]
) -> Run:
    if rival in ("eager", "compiled"):
        reference = registry.reference.kernels["student_step"].function
        function = reference if rival == "eager" else compiled()
        return lambda: whole_step(function, param, grad, state, weights)
    return lambda: in_place([param], [grad], [state], weights, SETTINGS, backend=rival)


@pytest.mark.parametrize("n", SIZES)
@threads_of_each
@pytest.mark.parametrize("rival", ["eager", "compiled", "reference", "cpu"])
def test_in_place(benchmark: Any, rival: str, threads: int, n: int) -> None:
    if rival == "cpu":
        need_kernels("cpu", "student_step_")
    if rival == "eager" and n > LARGEST_GRAPH:
        pytest.skip(f"eager holds whole intermediates: not beyond {LARGEST_GRAPH} coordinates")
    benchmark.group = f"in place threads={threads} n={n}"
    weights, (param, grad) = make_weights(), make_vectors(n)
    state = initial_state(param, weights)

    few = min(n, 4099)
    ours = [param[:few].clone(), grad[:few], initial_state(param[:few], weights)]
    theirs = [param[:few].clone(), grad[:few], copied(ours[2])]
    for _ in range(2):
        stepper(rival, *ours, weights)()
        stepper("reference", *theirs, weights)()
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(tuple(ours[2]), tuple(theirs[2]))

    call = stepper(rival, param, grad, state, weights)
    call()
    facts = {"operation": "student_step_", "backend": rival, "device": "cpu", "threads": threads}
    if n <= 10**5:
        facts["temporary_bytes_per_coordinate"] = round(held_at_once(call) / n, 1)
    measure(benchmark, call, n, flop(), **facts)


def forward(backend: str, inputs: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    grad, *state = inputs
    update, new = functional(grad, StudentState(*state), weights, SETTINGS, backend=backend)
    return [update, *new]


def forward_backward(
    backend: str, inputs: list[Tensor], weights: list[Tensor]
) -> tuple[Tensor, ...]:
    wanted = [tensor.detach().requires_grad_() for tensor in (*inputs, *weights)]
    outputs = forward(backend, wanted[:5], wanted[5:])
    return torch.autograd.grad(outputs, wanted, [torch.ones_like(t) for t in outputs])


@pytest.mark.parametrize("n", [n for n in SIZES if n <= 10**6])
@threads_of_each
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
def test_functional(benchmark: Any, direction: str, backend: str, threads: int, n: int) -> None:
    if backend == "cpu":
        need_kernels("cpu", "student_step", "student_step_backward")
    if direction == "forward_backward" and n > 10**5 and backend == "reference":
        pytest.skip("autograd keeps every intermediate: not beyond 100,000 coordinates")
    benchmark.group = f"{direction} threads={threads} n={n}"
    weights, (param, grad) = make_weights(), make_vectors(n)
    state = initial_state(param, weights)
    state = state._replace(v=grad.square())
    run = forward if direction == "forward" else forward_backward

    few = min(n, 4099)
    short = [tensor[..., :few].contiguous() for tensor in (grad, *state)]
    for ours, theirs in zip(
        run(backend, short, weights), run("reference", short, weights), strict=True
    ):
        # Of the sums over coordinates, float32 keeps the digits that their scale leaves.
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * scale)

    # The backward's products are twice the forward's, and the forward's come again.
    work = flop() * (1 if direction == "forward" else 4)
    inputs = [grad, *state]

    def call() -> None:
        run(backend, inputs, weights)

    facts = {"operation": f"student_step {direction}", "backend": backend, "device": "cpu"}
    measure(benchmark, call, n, work, threads=threads, **facts)


@threads_of_each
@pytest.mark.parametrize("rival", ["adamw_foreach", "reference", "cpu"])
def test_a_thousand_parameters(benchmark: Any, rival: str, threads: int) -> None:
    if rival == "cpu":
        need_kernels("cpu", "student_step_")
    count, each = 1000, 100
    benchmark.group = f"{count} parameters of {each} threads={threads}"
    weights, (values, slopes) = make_weights(), make_vectors(count * each)
    params = [part.clone().requires_grad_() for part in values.split(each)]
    grads = [part.clone() for part in slopes.split(each)]
    operation, work = "student_step_ of 1,000 tensors", flop()
    if rival == "adamw_foreach":
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        call: Run = torch.optim.AdamW(params, foreach=True).step
        work = 0
    else:
        states = [initial_state(param, weights) for param in params]

        def call() -> None:
            with torch.no_grad():
                in_place(params, grads, states, weights, SETTINGS, backend=rival)

        expected = values.clone()
        state = initial_state(values, weights)
        in_place([expected], [slopes], [state], weights, SETTINGS, backend="reference")
        call()
        torch.testing.assert_close(torch.cat(params).detach(), expected)
    facts = {"operation": operation, "backend": rival, "device": "cpu", "threads": threads}
    measure(benchmark, call, count * each, work, **facts)
