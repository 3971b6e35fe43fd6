"""What the benchmarks share: what a rival is, how it is checked and timed, what is written down."""

from __future__ import annotations

import functools
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from amalgam.operations import registry
from amalgam.ops import backends

QUICK = os.environ.get("AMALGAM_BENCH_QUICK") == "1"
COPY_BYTES = 1 << 28
MATRIX = 1024 if QUICK else 2048
ROUND_SECONDS = 0.5  # calls slower than this get few rounds
STATUS = Path("/proc/self/status")
PEAKS = Path("/proc/self/clear_refs")

threads_of_each = pytest.mark.parametrize("threads", [1, 2], indirect=True)


def sizes(*of: int) -> list[int]:
    """Numbers of coordinates; with ``AMALGAM_BENCH_QUICK=1`` the small ones only."""
    return [n for n in of if n <= 10**4] if QUICK else list(of)


def need(backend: str, *operations: str) -> None:
    """Skip where a backend does not work or lacks an operation; rivals that are none pass."""
    status = backends().get(backend)
    if status is None:
        return
    if not status.works:
        pytest.skip(f"{backend}: {status.reason}")
    missing = sorted(set(operations) - set(status.operations))
    if missing:
        pytest.skip(f"the {backend} backend has no {missing} yet")


def lstm_weights(features: int, hidden: int, layers: int, outputs: int) -> list[Tensor]:
    """Random weights of an LSTM and its head, in the operations' order."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    weights = []
    for layer in range(layers):
        inputs = hidden if layer else features
        weights += [draw(4 * hidden, inputs), draw(4 * hidden, hidden), draw(4 * hidden)]
    return [*weights, draw(outputs, hidden), draw(outputs)]


def lstm_flop(features: int, hidden: int, layers: int, outputs: int) -> int:
    """Of one coordinate's step, products alone: 9,960 of the student's two layers of 20 units."""
    inputs = [features, *[hidden] * (layers - 1)]
    return sum(2 * 4 * hidden * (n + hidden) for n in inputs) + 2 * outputs * hidden


@functools.cache
def kernel(operation: str, rival: str) -> Callable[..., Any]:
    """A backend's kernel itself: what autograd and the dispatcher add is the same for all.

    ``compiled`` is the reference through ``torch.compile``.
    """
    if rival == "compiled":
        return torch.compile(kernel(operation, "reference"), dynamic=True)
    return registry._backends[rival].kernels[operation].function


def flat(result: Any) -> list[Tensor]:
    """The tensors of a result in which lists may stand."""
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in flat(part)]


def assert_close(ours: Any, theirs: Any, rtol: float, of_scale: float) -> None:
    """Raise unless they agree, to ``of_scale`` of a tensor's largest value where others cancel."""
    for our, their in zip(flat(ours), flat(theirs), strict=True):
        atol = of_scale * their.abs().max().item()
        torch.testing.assert_close(our, their, rtol=rtol, atol=atol)


def seconds(call: Callable[[], object], repeats: int = 7) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


# Cached by threads: what a machine reaches depends on them.
@functools.cache
def copy_rate(threads: int) -> float:
    """Bytes per second that a copy reads and writes here, now."""
    source = torch.ones(COPY_BYTES // 4)
    target = torch.zeros_like(source)
    target.copy_(source)
    return 2 * COPY_BYTES / seconds(lambda: target.copy_(source))


@functools.cache
def sgemm_rate(threads: int) -> float:
    """FLOP per second of a float32 matrix product here, now."""
    a, b = torch.randn(MATRIX, MATRIX), torch.randn(MATRIX, MATRIX)
    torch.mm(a, b)
    return 2 * MATRIX**3 / seconds(lambda: torch.mm(a, b))


def memory(key: str) -> int:
    """Bytes that Linux reports of this process: VmRSS now, VmHWM at most since `forget_peak`."""
    found = re.search(rf"^{key}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    assert found, f"{STATUS} has no {key}"
    return 1024 * int(found[1])


def forget_peak() -> None:
    """Set what the process held at most to what it holds now."""
    PEAKS.write_text("5")


def temporary_bytes(call: Callable[[], object]) -> int | None:
    """What this process holds at the peak of a call beyond what it held before; None elsewhere."""
    if not PEAKS.exists():
        return None
    before = memory("VmRSS")
    forget_peak()
    call()
    return memory("VmHWM") - before


def measure(
    benchmark: Any,
    call: Callable[[], object],
    *,
    operation: str,
    backend: str,
    n: int,
    threads: int,
    flop: float = 0,
    moved: float = 0,
    **facts: Any,
) -> None:
    """Time a call on n coordinates and write down what that makes.

    Args:
        benchmark: pytest-benchmark's fixture.
        call: What is timed.
        operation: What the call computes; operations share a plot's title.
        backend: Which rival computes it; rivals share a plot.
        n: Coordinates.
        threads: How many PyTorch uses.
        flop: Floating-point operations of the call, a multiply-add as two; 0 where they are not
            what it costs.
        moved: Bytes that the call has to read and write; 0 where they are not what it costs.
        facts: What else to write down.
    """
    benchmark.group = f"{operation} cpu threads={threads} n={n}"

    start = time.perf_counter()
    call()
    slow = time.perf_counter() - start > ROUND_SECONDS
    rounds = 1 if QUICK and slow else 3 if slow else max(11, min(200, 10**7 // n))
    benchmark.pedantic(call, rounds=rounds, warmup_rounds=0 if slow else 2, iterations=1)
    if benchmark.stats is None:  # --benchmark-disable
        return
    median = benchmark.stats.stats.median
    facts.update(operation=operation, backend=backend, device="cpu", threads=threads, n=n)
    facts["ns_per_coordinate"] = round(1e9 * median / n, 3)
    if flop:
        facts["gflop_per_second"] = round(flop / median / 1e9, 3)
        facts["share_of_sgemm"] = round(flop / median / sgemm_rate(threads), 3)
    if moved:
        facts["gigabytes_per_second"] = round(moved / median / 1e9, 3)
        facts["share_of_a_copy"] = round(moved / median / copy_rate(threads), 3)
    benchmark.extra_info.update(facts)
