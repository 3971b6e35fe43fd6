"""Kernels that tests look at are compiled by processes beside the one that runs the tests.

Triton decides when it is imported whether it interprets kernels, and the tests' process does. A
kernel takes seconds to compile: what the tests will ask for is begun at once, on all cores, and
asked for last. Where pytest-xdist has the cores busy, a kernel is compiled when it is asked for.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import pytest

WORKERS = 2
WAIT = pytest.StashKey[Future[Any]]()

_pool: ProcessPoolExecutor | None = None


def asks(item: pytest.Item) -> bool:
    """Whether a test is marked ``compiles``."""
    return item.get_closest_marker("compiles") is not None


def begin(items: list[pytest.Item]) -> None:
    """Have the functions of all marks ``compiles(by=...)`` called with the tests' parameters."""
    global _pool
    marked = [item for item in items if asks(item)]
    if not marked or importlib.util.find_spec("triton") is None:
        return
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    spawn = multiprocessing.get_context("spawn")
    _pool = ProcessPoolExecutor(WORKERS if alone else 1, spawn, _compile_kernels)
    for item in marked if alone else ():
        item.stash[WAIT] = _compilation_of(item)


def result_of(item: pytest.Item) -> Any:
    """What the function of a test's mark returned; raises what it raised."""
    pytest.importorskip("triton")
    if WAIT not in item.stash:
        item.stash[WAIT] = _compilation_of(item)
    return item.stash[WAIT].result()


def _compilation_of(item: pytest.Item) -> Future[Any]:
    mark = item.get_closest_marker("compiles")
    assert mark
    assert _pool
    function: Callable[..., Any] = mark.kwargs["by"]
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return _pool.submit(function, **parameters)


def end() -> None:
    """Stop what was begun and is not needed any more."""
    if _pool is not None:
        _pool.shutdown(cancel_futures=True)


def _compile_kernels() -> None:
    os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stderr.fileno())  # nvdisasm warns of every kernel; errors are raised
