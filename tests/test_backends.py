from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from amalgam.backends import build_info, choice_step, core, cpu, cuda, nominal_on_cuda, triton
from amalgam.backends.memory import check_written, contiguous
from amalgam.operations import registry
from amalgam.operations.checks import check_like
from amalgam.operations.choice_step import ChoiceArguments
from amalgam.operations.registry import Numerics, resolve
from amalgam.operations.teacher_step import PoolSettings
from amalgam.ops import StepSettings, StudentState, backends, teacher_distance


@pytest.fixture
def fresh_probes() -> Iterator[None]:
    caches = (core.load, cuda._probe, triton._probe)
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


def test_all_backends_report_fastest_first() -> None:
    statuses = backends()
    # Interpreted kernels are for tests alone, and slower than plain PyTorch.
    last = ["reference", "triton"] if triton.INTERPRETING else ["triton", "reference"]
    assert list(statuses) == ["cuda", "cpu", *last]
    assert statuses["cpu"].works, statuses["cpu"].reason
    for status in statuses.values():
        assert status.works == (status.reason is None)
        assert {"teacher_distance", "teacher_distance_backward"} <= set(status.operations)


def test_auto_prefers_compiled_code_where_it_computes_the_dtype() -> None:
    assert resolve("teacher_distance", "auto", torch.zeros(3)) == "cpu"
    assert resolve("teacher_distance", "auto", torch.zeros(3, dtype=torch.float16)) == "reference"


def test_an_unknown_backend_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'triton'"):
        teacher_distance(torch.zeros(3), torch.zeros(1, 3), backend="tritn")


def test_what_is_permitted_reaches_kernels_that_use_it_and_no_others() -> None:
    like, asked = torch.zeros(3), "trial:tf32,approximate"
    trial = registry.register_backend(
        "trial", rank=-99, devices=None, probe=lambda: None, about="of this test"
    )
    try:
        trial.kernel("plain")(lambda x: x)
        trial.kernel("keen", takes_numerics=True)(lambda x, *, numerics: numerics)
        assert resolve("keen", asked, like) == asked
        assert resolve("plain", asked, like) == "trial"
        assert resolve("keen", "trial", like) == "trial"
        assert resolve("keen", "auto:tf32", like) == "trial:tf32"
        assert registry.compute("keen", asked, like, like) == Numerics("tf32", True)
        assert registry.compute("keen", "trial", like, like) == Numerics(None, False)
        assert registry.compute("plain", asked, like, like) is like
    finally:
        del registry._backends["trial"]
    assert resolve("teacher_distance", "auto:bf16", like) == "cpu"


@pytest.mark.parametrize(
    ("operation", "form", "layers", "hidden", "taken"),
    [
        ("student_step", "nominal", 1, 4, "cuda"),
        ("student_step", "nominal", 1, 8, "cuda"),
        ("student_step", "nominal", 1, 16, "triton"),
        ("student_step", "nominal", 2, 4, "triton"),
        ("student_step", "RNNProp", 1, 4, "triton"),
        ("student_step_backward", "nominal", 1, 8, "cuda"),
        ("student_step_backward", "RNNProp", 2, 20, "triton"),
        ("student_unroll_backward", "nominal", 1, 4, "cuda"),
        ("student_unroll_backward", "nominal", 1, 20, "triton"),
        ("teacher_step", "", 1, 4, "cuda"),
        ("teacher_step_backward", "", 1, 4, "cuda"),
        ("teacher_distance", "", 1, 4, "cuda"),
        ("choice_step", "choice", 1, 4, "cuda"),
        ("choice_step_backward", "choice", 1, 8, "cuda"),
        ("choice_step", "choice", 2, 20, "triton"),
    ],
)
def test_auto_on_a_gpu_takes_what_docs_say(
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
    form: str,
    layers: int,
    hidden: int,
    taken: str,
) -> None:
    """As docs/gpu.md has it; here a GPU's backends are made to work on the CPU."""
    for backend, rank in ((cuda.backend, 30), (triton.backend, 10)):
        here = dataclasses.replace(
            backend, rank=rank, devices=frozenset({"cpu"}), probe=lambda: None
        )
        monkeypatch.setitem(registry._backends, backend.name, here)
    without = dataclasses.replace(cpu.backend, probe=lambda: "of no interest here")
    monkeypatch.setitem(registry._backends, "cpu", without)
    for module in (nominal_on_cuda, choice_step):
        monkeypatch.setattr(module, "_units", lambda: [4, 8])
    cells = torch.zeros(layers, hidden, 3)
    state = StudentState(cells[0, 0], cells[0, 0], cells, cells)
    corrections = torch.ones(1, 3) if form == "nominal" else None
    settings: Any = StepSettings(corrections=corrections)
    if form == "choice":
        settings = ChoiceArguments(cells, PoolSettings.of(["sgd"], *([[0.1]] * 4)), 0.0, 1.0)
    arguments = (state, [], settings) if form else ()
    assert resolve(operation, "auto", state.m, *arguments) == taken


def test_a_kernel_may_refuse_by_more_than_dtype() -> None:
    like = torch.zeros(3)
    trial = registry.register_backend(
        "trial", rank=99, devices=None, probe=lambda: None, about="of this test"
    )
    try:
        few = lambda x: None if len(x) <= 4 else f"it takes four, these are {len(x)}"  # noqa: E731
        trial.kernel("few", accepts=few)(lambda x: x)
        registry.reference.kernel("few", dtypes=None)(lambda x: -x)
        assert resolve("few", "auto", like, like) == "trial"
        assert resolve("few", "auto", like, torch.ones(5)) == "reference"
        assert registry.compute("few", "auto", like, torch.ones(5)).sum() == -5
        with pytest.raises(RuntimeError, match="backend='trial'.*it takes four, these are 5"):
            registry.compute("few", "trial", like, torch.ones(5))
    finally:
        del registry._backends["trial"], registry.reference.kernels["few"]


@pytest.mark.parametrize(
    ("backend", "why"),
    [
        ("auto:tf23", "tf23.*did you mean 'tf32'"),
        ("cpu:tf32,bf16", "one of .*ieee.*not several"),
        ("trtion:tf32", "did you mean 'triton'"),
    ],
)
def test_what_nothing_permits_is_refused_with_what_would_be(backend: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        registry.check_backend(backend)


@pytest.mark.usefixtures("fresh_probes")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_backend_asked_for_on_the_wrong_machine_says_why(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(triton, "INTERPRETING", False)
    with pytest.raises(RuntimeError, match=f"backend='{backend}' can't compute.*: .{{20}}"):
        teacher_distance(torch.zeros(3), torch.zeros(1, 3), backend=backend)


def test_a_dtype_without_kernel_is_named() -> None:
    half = torch.zeros(3, dtype=torch.float16)
    with pytest.raises(RuntimeError, match=r"float32.*float64.*torch\.float16"):
        teacher_distance(half, half[None], backend="cpu")


@pytest.mark.usefixtures("fresh_probes")
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ModuleNotFoundError("gone", name="amalgam._core"), "not installed.*pip install"),
        (ImportError("undefined symbol: x"), "does not load.*undefined symbol: x"),
    ],
)
def test_without_the_compiled_core_auto_works_and_the_rest_explains(
    monkeypatch: pytest.MonkeyPatch, error: ImportError, expected: str
) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    assert resolve("teacher_distance", "auto", torch.zeros(3)) == "reference"
    for backend in ("cpu", "cuda"):
        with pytest.raises(RuntimeError, match=expected):
            teacher_distance(torch.zeros(3), torch.zeros(1, 3), backend=backend)
    facts = build_info()
    assert "core" in str(facts["core"])
    assert facts["cuda"] is None


@pytest.mark.usefixtures("fresh_probes")
def test_a_core_without_cuda_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "load", lambda: (SimpleNamespace(cuda=None), None))
    assert "AMALGAM_CUDA=1" in str(cuda._probe())


@pytest.mark.usefixtures("fresh_probes")
def test_a_gpu_older_than_the_kernels_says_which_arch_to_build(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = SimpleNamespace(cuda=SimpleNamespace(device_count=lambda: 1, archs="80;90"))
    monkeypatch.setattr(core, "load", lambda: (module, None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert "AMALGAM_CUDA_ARCHS=75" in str(cuda._probe())


@pytest.mark.usefixtures("fresh_probes")
def test_without_triton_the_probe_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in str(triton._probe())


def test_build_info_is_complete() -> None:
    facts = build_info()
    assert facts["cpu_isa"] in facts["cpu_isas"]  # type: ignore[operator]
    assert "portable" in facts["cpu_isas"]  # type: ignore[operator]
    assert facts["cpu_isa"] == "avx512" or facts["cpu_bfloat16"] is False
    assert (facts["cuda_runtime"] is not None) == facts["cuda"]


def test_pointers_are_only_taken_of_what_was_promised() -> None:
    like = torch.zeros(3)
    strided = torch.zeros(6)[::2]
    assert contiguous([strided])[0].is_contiguous()
    check_like("x", strided, (3,), like)
    with pytest.raises(ValueError, match=r"x must have shape \(4,\), not \(3,\)"):
        check_like("x", torch.zeros(3), (4,), like)
    with pytest.raises(ValueError, match=r"x must be torch\.float32 on cpu, not torch\.float64"):
        check_like("x", torch.zeros(3, dtype=torch.float64), (3,), like)
    with pytest.raises(ValueError, match="x must be a dense tensor"):
        check_like("x", torch.zeros(3).to_sparse(), (3,), like)
    with pytest.raises(ValueError, match="x must be contiguous, not of strides"):
        check_written(["x"], [strided])
    with pytest.raises(ValueError, match="outputs must not share memory"):
        check_written(["x", "y"], [like, like[:2]])


def test_import_is_light() -> None:
    code = """
import sys
import torch

def heavy(names):
    return [name for name in names.split() if name in set(sys.modules) - before]

before = set(sys.modules)
import amalgam
print(heavy("triton typer matplotlib scipy sklearn pydantic rich torchvision"))
import amalgam.cli
print(heavy("triton matplotlib scipy sklearn torchvision"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["[]", "[]", ""]
