"""Where operations are tested: backends, the CPU's instruction sets and devices, as parameters.

A place is a backend's name, and after a space the instruction set of ``cpu``, "interpreted" for
Triton's kernels on the CPU, or "on host" for CUDA's there (cuda_on_host). The fixtures ``backend``
and ``device`` of conftest.py enter it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.machinery
import importlib.util
import shutil
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from amalgam.backends import (
    choice_step,
    core,
    cuda,
    nominal_on_cuda,
    student_step_in_place,
    triton,
)
from amalgam.operations import registry
from amalgam.ops import backends

INSTRUCTION_SETS = ("portable", "avx2", "avx512")
CPU = [pytest.param(f"cpu {name}", id=f"cpu_{name}") for name in INSTRUCTION_SETS]

needs_gpu = pytest.mark.gpu
compiled = pytest.mark.parametrize("backend", CPU, indirect=True)
of_each = pytest.mark.parametrize("backend", ["reference", *CPU], indirect=True)
# Operators' contracts and numerical gradients are the same for every instruction set.
compiled_once = pytest.mark.parametrize("backend", ["cpu"], indirect=True)
of_each_once = pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
by_triton = pytest.mark.parametrize(
    "device",
    [pytest.param("cuda", id="on_cuda", marks=needs_gpu), pytest.param("cpu", id="interpreted")],
    indirect=True,
)


def by_cuda(test: Any) -> Any:
    """Decorator: the test runs where the CUDA backend computes."""
    return needs_gpu(pytest.mark.usefixtures("cuda_works")(test))


def on_gpus(*names: str) -> list[Any]:
    """Parameters ("backend", "device") of backends on a GPU."""
    return [pytest.param(each, "cuda", id=f"{each}_on_cuda", marks=needs_gpu) for each in names]


ON_CPU = [pytest.param(*each.values, "cpu", id=f"{each.id}_on_cpu") for each in CPU]
ON_CPU_ONCE = [pytest.param("cpu", "cpu", id="cpu_on_cpu")]
ON_HOST = [pytest.param("cuda on host", "cpu", id="cuda_on_host")]
INTERPRETED = [pytest.param("triton interpreted", "cpu", id="triton_interpreted")]


def at(*places: Any) -> pytest.MarkDecorator:
    """A decorator that gives a test the arguments ``backend`` and ``device``."""
    return pytest.mark.parametrize(("backend", "device"), places, indirect=["backend"])


def enter(place: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have a backend compute as the place says, or skip the test with the reason why it can't.

    Returns:
        The backend's name.
    """
    name, _, how = place.partition(" ")
    if how == "on host":
        put_cuda_on_host(monkeypatch)
    status = backends()[name]
    if not status.works:
        pytest.skip(f"{name}: {status.reason}")
    if how == "interpreted" and not triton.INTERPRETING:
        pytest.skip("Triton compiles its kernels in this process; TRITON_INTERPRET=1 interprets")
    if how in INSTRUCTION_SETS:
        available = core.core().cpu.available_isas()
        if how not in available:
            pytest.skip(f"this machine or build has no {how}, only {available}")
        module = core_with(how)
        monkeypatch.setattr(core, "load", lambda: (module, None))
    return name


def put_cuda_on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the CUDA backend compute on the CPU's tensors, or skip the test."""
    import cuda_on_host

    try:
        cuda_on_host.library()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    on_host = SimpleNamespace(cpu=core.core().cpu, cuda=cuda_on_host.CudaOnHost())
    here = dataclasses.replace(
        cuda.backend, rank=-20, devices=frozenset({"cpu"}), probe=lambda: None
    )
    monkeypatch.setitem(registry._backends, "cuda", here)
    monkeypatch.setattr(core, "load", lambda: (on_host, None))
    monkeypatch.setattr(cuda, "place_of", lambda _tensor: {"device": 0, "stream": 0})
    monkeypatch.setattr(torch.cuda, "device", lambda _device: contextlib.nullcontext())
    for module, names in (
        (student_step_in_place, ("_blocks", "_words")),
        (nominal_on_cuda, ("_units",)),
        (choice_step, ("_units",)),
    ):
        for name in names:  # what the core that is built knows, they may have kept
            function = getattr(module, name).__wrapped__
            monkeypatch.setattr(module, name, functools.cache(function))


@functools.cache
def core_with(instruction_set: str) -> ModuleType:
    """A compiled core that computes by this instruction set.

    A core decides once, by AMALGAM_CPU_ISA. A copy of its file, imported by another name, is a
    core of its own and decides again.
    """
    path = Path(core.core().__file__ or "")
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as environment:
        environment.setenv("AMALGAM_CPU_ISA", instruction_set)
        copy = shutil.copy(path, folder)
        name = f"{instruction_set}._core"
        loader = importlib.machinery.ExtensionFileLoader(name, str(copy))
        spec = importlib.util.spec_from_file_location(name, copy, loader=loader)
        assert spec
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        assert module.cpu.isa() == instruction_set
    return module
