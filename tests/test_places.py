"""One process takes every instruction set and interprets kernels; others compile them for it."""

import pytest
import torch
from places import CPU, INSTRUCTION_SETS, compiled, core_with

from amalgam.backends import build_info, core, triton
from amalgam.ops import backends, teacher_distance


@compiled
def test_a_place_computes_by_its_instruction_set(
    backend: str, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.params["backend"]
    assert name == f"{backend} {build_info()['cpu_isa']}"
    assert core.core() is core_with(name.removeprefix("cpu "))
    student, teachers = torch.ones(3), torch.zeros(2, 3)
    found = teacher_distance(student, teachers, backend=backend)
    torch.testing.assert_close(found, teacher_distance(student, teachers, backend="reference"))


def test_every_instruction_set_is_a_place() -> None:
    available = core.core().cpu.available_isas()
    assert set(available) <= set(INSTRUCTION_SETS)
    assert [f"cpu {name}" for name in INSTRUCTION_SETS] == [place.values[0] for place in CPU]
    cores = [core_with(name) for name in available]
    assert [module.cpu.isa() for module in cores] == available
    assert core.core() not in cores
    assert core.core().cpu.isa() in available


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels here")
def test_kernels_are_interpreted_where_there_is_no_gpu() -> None:
    pytest.importorskip("triton")
    from triton.runtime.interpreter import InterpretedFunction

    from amalgam.kernels import teacher_step as kernels

    assert triton.INTERPRETING
    assert backends()["triton"].works
    assert isinstance(kernels.forward, InterpretedFunction)


def kind_of_kernels(module: str) -> str:
    """The class of a kernel, of which Triton decides when it is imported."""
    import importlib

    return type(importlib.import_module(f"amalgam.kernels.{module}").forward).__name__


@pytest.mark.compiles(by=kind_of_kernels)
@pytest.mark.parametrize("module", ["student_step", "teacher_step"])
def test_processes_beside_this_one_compile(module: str, compilation: str) -> None:
    assert compilation == "JITFunction"


def fails(wrong: str) -> None:
    raise ValueError(f"a kernel is {wrong}")


@pytest.mark.compiles(by=fails)
@pytest.mark.parametrize("wrong", ["too large"])
def test_what_a_compilation_raises_is_raised_in_its_test(
    wrong: str, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(ValueError, match=f"a kernel is {wrong}"):
        request.getfixturevalue("compilation")
