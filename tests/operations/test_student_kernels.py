"""The machine code of the student's kernels: registers, spills and instructions."""

import importlib.util
from typing import Any

import pytest
import torch
from machine_code import (
    MachineCode,
    amd_assembly,
    assert_cuda_within,
    assert_within,
    budgets,
    compile_kernel,
    costs_of,
    cuda_core,
    resource_usage,
)

from amalgam.operations import registry
from amalgam.operations.student_forms import NOMINAL, RNNPROP

# Bytes of stack that a thread may use; it reads and writes some KB in all.
TILES_STACK = {"sm_90": 360}


def cuda_kernels(name: str) -> tuple[int, dict[tuple[str, str], tuple[int, int]]]:
    """The number of architectures in the core, and what its kernels of this name take."""
    archs, file = cuda_core()
    usage = resource_usage(file)
    return len(archs), {kernel: costs for kernel, costs in usage.items() if name in kernel[1]}


def test_cuda_kernels_keep_to_registers() -> None:
    """Their launches ask for so many warps a processor that few registers are left."""
    archs, kernels = cuda_kernels("student_threads")
    nominal = {name: costs for name, costs in kernels.items() if "Nominal" in name[1]}
    assert len(nominal) == 18 * archs
    assert len(kernels) == (30 + 18) * archs
    for name, (registers, stack) in kernels.items():
        assert registers <= 168, (name, registers)
        assert stack <= (0 if name in nominal else 24), (name, stack)


def test_cuda_gradients_keep_to_registers() -> None:
    """Of the nominal form: a thread holds a step's gates and its gradients."""
    archs, kernels = cuda_kernels("nominal_")
    assert len(kernels) == 2 * 4 * archs
    for name, (registers, stack) in kernels.items():
        assert registers <= 255, (name, registers)
        assert stack <= 8, (name, stack)


def test_cuda_teachers_keep_to_registers() -> None:
    archs, kernels = cuda_kernels("teachers_")
    assert len(kernels) == 4 * archs
    for name, (registers, stack) in kernels.items():
        assert registers <= 128, (name, registers)
        assert stack == 0, (name, stack)


def test_cuda_choices_keep_to_registers() -> None:
    archs, kernels = cuda_kernels("choice_")
    assert len(kernels) == 2 * 3 * archs
    for name, (registers, stack) in kernels.items():
        assert registers <= (128 if "forward" in name[1] else 255), (name, registers)
        assert stack == 0, (name, stack)


def test_cuda_kernels_on_tensor_cores_keep_to_registers() -> None:
    """A tile may spill a little, once."""
    archs, kernels = cuda_kernels("student_tiles")
    assert len(kernels) == 2 * (4 + 7) * archs
    for name, (_, stack) in kernels.items():
        assert stack <= TILES_STACK.get(name[0], 600), (name, stack)


# --- Budgets: what a thread and a coordinate of each kernel cost, by its machine code ---

FLOATS = ("alpha", "beta1", "beta2", "one_minus_beta1", "one_minus_beta2", "eps", "keep", "lr")


TYPES = {
    **dict.fromkeys(FLOATS, "fp32"),
    **dict.fromkeys(("n", "blocks", "size", "bias_rows", "count", "depth", "warmup_steps"), "i32"),
    **dict.fromkeys(("table", "first_block", "places", "bounds"), "*i64"),
    **dict.fromkeys(("partials", "d_biases", "control"), "*fp64"),
}


BUDGETS, CUDA_BUDGETS = budgets("student_step")


def types_of(numerics: str) -> dict[str, str]:
    """Arguments' types; with bfloat16 products, the weights' other form is in it."""
    return TYPES | ({"other": "*bf16"} if numerics.startswith("bf16") else {})


OPERATIONS = {
    "forward": "student_step",
    "in_place": "student_step_",
    "backward": "student_step_backward",
}


def triton_constants(
    name: str, student: str, cells: str, numerics: str, ptx: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and options of a kernel.

    Args:
        name: The kernel.
        student: "LAYERSxHIDDEN", or of the nominal form "nominal:LAYERSxHIDDEN".
        cells: The dtype of h and c, and after a plus the moments' where they are not float32.
        numerics: What is permitted; "stochastic" among it rounds so.
        ptx: Whether it may hold PTX.
    """
    import triton.language as tl

    from amalgam.kernels.configurations import configuration
    from amalgam.kernels.student_network import plan_of, precision_of

    stochastic = numerics.endswith(",stochastic")
    permitted = registry._parse(f"auto:{numerics.removesuffix(',stochastic')}")[1]
    form = NOMINAL if student.startswith("nominal:") else RNNPROP
    layers, hidden = map(int, student.removeprefix("nominal:").split("x"))
    h, precision = torch.zeros(layers, hidden), permitted.precision
    if name != "backward":
        precision = precision_of(precision, h, form)
    _, of_student = plan_of(h, form, precision)
    chosen = configuration(OPERATIONS[name], layers, hidden, precision, form is NOMINAL)
    types = {"float32": tl.float32, "bfloat16": tl.bfloat16}
    cells, _, moments = cells.partition("+")
    without = [] if form is NOMINAL else ["bounds", "places", "biases", "corrections", "d_biases"]
    if form is RNNPROP and name != "in_place":
        without += ["count", "depth"]
    if not stochastic:
        without.append("control")
    constants = {
        **of_student,
        **{"BLOCK": chosen.block, "WIDE": False, "PTX": ptx},
        **{"PARAM": tl.float32, "GRAD": tl.float32, "ALIGNED": True},
        **{"CELLS": types[cells], "MOMENTS": types[moments or "float32"]},
        **{"PRECISION": precision, "APPROXIMATE": permitted.approximate},
        **{"CONTROL": stochastic, "STOCHASTIC": stochastic},
        **dict.fromkeys(without),
    }
    return constants, chosen.options


def costs_of_student(case: str, several: bool = False) -> dict[str, float]:
    from amalgam.kernels import student_step, student_step_in_place

    name, arch, student, cells, numerics = case.split()
    kernels = student_step_in_place if name == "in_place" else student_step
    constants, options = triton_constants(name, student, cells, numerics)
    constants["SEVERAL"] = several
    number = int(arch.removeprefix("sm_"))
    divisible = name != "in_place"
    return costs_of(
        getattr(kernels, name), number, types_of(numerics), constants, options, divisible
    )


@pytest.mark.compiles(by=costs_of_student)
@pytest.mark.parametrize("case", BUDGETS)
def test_kernels_keep_to_their_budgets(case: str, compilation: dict[str, float]) -> None:
    """Kernels spill no more than the table has, use tensor cores, and do no more work."""
    assert_within(compilation, BUDGETS[case])


def costs_of_several(case: str) -> dict[str, float]:
    return costs_of_student(case, several=True)


@pytest.mark.compiles(by=costs_of_several)
@pytest.mark.parametrize(
    "case",
    [
        "forward sm_90 2x20 float32 tf32",
        "backward sm_90 2x20 float32 tf32",
        "forward sm_90 1x8 float32 3xtf32",
        "backward sm_90 1x4 float32 tf32",
    ],
)
def test_kernels_of_several_students_cost_little_more(
    case: str, compilation: dict[str, float]
) -> None:
    """Where each one's tensors lie takes some instructions, and no tensor core's."""
    one = BUDGETS[case]
    assert compilation["tensor"] == one["tensor"]
    assert compilation["instructions"] <= 1.2 * one["instructions"]
    assert compilation["stack"] <= one["stack"] + 64


_NOMINAL, _BFLOAT16 = "NominalELi1ELi", "ENS0_8Bfloat16ES3_L"
_TILES = "student_tilesILi2ELNS0_8ProductsE"
CUDA_KERNELS = {
    "cuda in_place sm_90 2x20 float32 3xtf32": f"{_TILES}0ELb0EfLi2ELb1E",
    "cuda in_place sm_90 2x20 float32 tf32,approximate": f"{_TILES}1ELb1EfLi4E",
    "cuda in_place sm_90 2x20 bfloat16 bf16,approximate": (
        f"{_TILES}2ELb1ENS0_8Bfloat16ELi4ELb1ELNS1_6RoundsE0E"
    ),
    "cuda in_place sm_90 1x4 float32": "student_threadsINS0_7RnnPropELi1ELi4EffLb0ELb0E",
    "cuda in_place sm_90 1x8 float32": "student_threadsINS0_7RnnPropELi1ELi8EffLb0ELb0E",
    "cuda in_place sm_90 nominal:1x4 bfloat16": f"{_NOMINAL}4{_BFLOAT16}b0ELb0E",
    "cuda in_place sm_90 nominal:1x4 bfloat16,stochastic": f"{_NOMINAL}4{_BFLOAT16}b1ELb0E",
    "cuda in_place sm_90 nominal:1x8 bfloat16": f"{_NOMINAL}8{_BFLOAT16}b0ELb0E",
    "cuda in_place sm_90 nominal:1x8 bfloat16,stochastic": f"{_NOMINAL}8{_BFLOAT16}b1ELb0E",
    "cuda in_place sm_90 nominal:1x16 bfloat16": f"{_NOMINAL}16{_BFLOAT16}b0ELb0E",
    "cuda forward sm_90 nominal:1x4 float32": "nominal_forwardILi4E",
    "cuda forward sm_90 nominal:1x8 float32": "nominal_forwardILi8E",
    "cuda backward sm_90 nominal:1x4 float32": "nominal_backwardILi4ELb1E",
    "cuda backward sm_90 nominal:1x8 float32": "nominal_backwardILi8ELb1E",
    "cuda unroll sm_90 nominal:1x4 float32": "nominal_backwardILi4ELb0E",
    "cuda unroll sm_90 nominal:1x8 float32": "nominal_backwardILi8ELb0E",
}
"""Fragments of the mangled names of CUDA's kernels, by their rows."""


def test_cuda_kernels_keep_to_their_budgets() -> None:
    assert_cuda_within(CUDA_BUDGETS, CUDA_KERNELS)


def step_in_place(numerics: str) -> MachineCode:
    from amalgam.kernels import student_step_in_place as kernels

    constants, options = triton_constants("in_place", "2x20", "float32", numerics)
    return compile_kernel(kernels.in_place, 90, types_of(numerics), constants, False, options)


@pytest.mark.compiles(by=step_in_place)
@pytest.mark.parametrize("numerics", ["3xtf32", "bf16,approximate"])
def test_what_a_step_overwrites_all_threads_have_read(
    numerics: str, compilation: MachineCode
) -> None:
    """Several warps load the same moments; on a GPU a slow one once read the new ones."""
    assert compilation.count("ST") > 0
    assert compilation.stores_behind_loads() == 0


def step_for_amd(student: str) -> str | None:
    """The step's assembly, or None where this Triton has no compiler for AMD."""
    if importlib.util.find_spec("triton.backends.amd") is None:
        return None
    from amalgam.kernels import student_step_in_place as kernels

    numerics = "bf16,approximate,stochastic"
    constants, options = triton_constants("in_place", student, "bfloat16", numerics, ptx=False)
    return amd_assembly(kernels.in_place, "gfx942", types_of(numerics), constants, options)


@pytest.mark.compiles(by=step_for_amd)
@pytest.mark.parametrize("student", ["2x20", "1x4", "nominal:1x4"])
def test_kernels_compile_for_amd(student: str, compilation: str | None) -> None:
    """They hold no PTX, and matrix instructions for the larger student alone."""
    if compilation is None:
        pytest.skip("this Triton has no compiler for AMD's GPUs")
    assert ("v_mfma" in compilation) == (student == "2x20")
