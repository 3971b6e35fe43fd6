from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# Triton looks at it when it is imported. Where a GPU is, or a stand-in, kernels are compiled.
if not torch.cuda.is_available() and "compile_only" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.register_assert_rewrite("accuracy", "machine_code", "student_cases")

import compiling  # noqa: E402
import places  # noqa: E402

import amalgam  # noqa: E402
from amalgam.ops import backends  # noqa: E402

# Where pytest-xdist gives each core a process, more threads are in each other's way.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
    torch.set_num_threads(1)

# The first process of a session makes the folder, and all others find it there.
OWN_CACHE = None if "AMALGAM_CACHE" in os.environ else tempfile.mkdtemp(prefix="amalgam-cache-")
os.environ.setdefault("AMALGAM_CACHE", str(OWN_CACHE))

# PyTorch looks up its constructors at a device's first block, and here before they are poisoned.
torch.utils._device._device_constructors()

PACKAGE_FOLDERS = tuple(
    str(folder)
    for path in (Path(amalgam.__file__).parent, Path(__file__).parents[1] / "kernels")
    for folder in {path, path.resolve()}
)


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each process a stretch of tests: neighbours share fixtures, and the truth of draws."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest tests, which start whole processes, come first: at the end a core would wait.
    items.sort(key=lambda item: (compiling.asks(item), item.path.name != "test_cli.py"))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU, and PyTorch sees none here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_collection_finish(session: pytest.Session) -> None:
    if not session.config.option.collectonly:
        compiling.begin(session.items)


def pytest_sessionfinish() -> None:
    compiling.end()
    if OWN_CACHE is not None:
        shutil.rmtree(OWN_CACHE, ignore_errors=True)


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling():
            return tensor
        caller = sys._getframe(1).f_code.co_filename
        if caller.startswith(PACKAGE_FOLDERS) and tensor.is_floating_point():
            tensor.fill_(float("nan"))
        return tensor

    return wrapper


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that the package allocates unfilled holds NaN, so that a forgotten write shows."""
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend of a place, which computes there; see places.py."""
    return places.enter(request.param, monkeypatch)


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device of Triton's kernels: "cuda", or "cpu", where they are interpreted."""
    interpreted = request.param == "cpu"
    places.enter("triton interpreted" if interpreted else "triton", monkeypatch)
    return request.param


@pytest.fixture
def compilation(request: pytest.FixtureRequest) -> Any:
    """The result of the mark ``compiles``: of its function, given the test's parameters."""
    return compiling.result_of(request.node)


@pytest.fixture
def triton_works() -> None:
    """Skips where the Triton backend does not compute, with its reason."""
    status = backends()["triton"]
    if not status.works:
        pytest.skip(f"triton: {status.reason}")


@pytest.fixture
def cuda_works() -> None:
    """Skips where the CUDA backend does not compute, with its reason."""
    status = backends()["cuda"]
    if not status.works:
        pytest.skip(f"cuda: {status.reason}")
