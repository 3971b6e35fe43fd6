from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import pytest
import torch

COPY_BYTES = 1 << 28


def seconds(call: Callable[[], object], device: str, repeats: int = 7) -> float:
    """Median time of a call; on a GPU until its work is done."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class Roof:
    """What a memory copy reaches on this machine now, in bytes read and written per second."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], float] = {}

    def __call__(self, device: str) -> float:
        key = (device, torch.get_num_threads())
        if key not in self._known:
            source = torch.ones(COPY_BYTES // 4, device=device)
            target = torch.zeros_like(source)
            target.copy_(source)
            self._known[key] = 2 * COPY_BYTES / seconds(lambda: target.copy_(source), device)
        return self._known[key]


@pytest.fixture(scope="session")
def roof() -> Roof:
    return Roof()


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        machine_info["gpu"] = torch.cuda.get_device_name()
