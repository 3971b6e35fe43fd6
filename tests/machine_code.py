"""What compilers make of a kernel for a GPU that is not there: counts from its machine code."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class MachineCode:
    """A compiled kernel.

    Attributes:
        ptx: Its PTX; of CUDA's kernels none.
        registers: Registers a thread.
        stack: Bytes of stack a thread: what did not fit into registers.
        instructions: How often each instruction stands in it.
    """

    ptx: str
    registers: int
    stack: int
    instructions: Counter[str]

    def count(self, *prefixes: str) -> int:
        return sum(n for name, n in self.instructions.items() if name.startswith(prefixes))

    def bytes_of_a_load(self) -> float:
        """What a load from global memory brings a thread, in the mean over those in the code."""
        loads = {name: n for name, n in self.instructions.items() if name.startswith("LDG")}
        brought = sum(n * _bytes_moved(name) for name, n in loads.items())
        return round(brought / max(1, sum(loads.values())), 1)

    def costs(self, coordinates: float) -> dict[str, float]:
        """What budgets count of a kernel whose thread computes so many coordinates.

        Registers and bytes of stack a thread; instructions, and special functions among them, a
        coordinate; tensor core instructions and accesses of 16 bytes in the code; bytes of a load.
        Loops and all branches count once.
        """
        return {
            "registers": self.registers,
            "stack": self.stack,
            "instructions": round(sum(self.instructions.values()) / coordinates),
            "special": round(self.count("MUFU") / coordinates),
            "tensor": self.count("HMMA", "HGMMA", "UTCHMMA"),
            "wide": sum(
                n for name, n in self.instructions.items() if re.match(r"(LDG|STG).*\.128", name)
            ),
            "load": self.bytes_of_a_load(),
        }

    def stores_behind_loads(self) -> int:
        """Stores to global memory with no barrier between them and the loads before them."""
        waited, found = True, 0
        for line in self.ptx.splitlines():
            if "bar.sync" in line:
                waited = True
            elif "ld.global" in line:
                waited = False
            elif "st.global" in line:
                found += not waited
        return found


def _bytes_moved(load: str) -> int:
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    return next((sizes[part] for part in load.split(".") if part in sizes), 4)


def costs_of(
    function: Any,
    arch: int,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    options: Mapping[str, Any],
    divisible: bool,
) -> dict[str, float]:
    """The costs of a kernel whose programs compute ``BLOCK`` coordinates.

    Args: see :func:`compile_kernel`.
    """
    code = compile_kernel(function, arch, types, constants, divisible, options)
    return code.costs(constants["BLOCK"] / (32 * options["num_warps"]))


def assert_within(costs: Mapping[str, float], budget: Mapping[str, float]) -> None:
    """Nothing above its budget; and tensor cores and wide accesses where they were."""
    for what in ("registers", "stack", "instructions", "special"):
        assert costs[what] <= budget[what], (what, costs, budget)
    for what in ("tensor", "wide", "load"):
        assert costs[what] >= budget[what], (what, costs, budget)


def budgets(operation: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The table of an operation's kernels: Triton's rows, and CUDA's, whose names begin so."""
    file = Path(__file__).parent / f"operations/budgets_{operation}.json"
    rows = json.loads(file.read_text())
    of_cuda = {case: row for case, row in rows.items() if case.startswith("cuda ")}
    return {case: row for case, row in rows.items() if case not in of_cuda}, of_cuda


def cuda_core() -> tuple[list[str], Path]:
    """The architectures in the compiled core and its file, or skip the test."""
    from amalgam.backends import core

    pytest.importorskip("triton")
    module, _ = core.load()
    if module is None or module.cuda is None:
        pytest.skip("the core here has no CUDA kernels")
    return module.cuda.archs.split(";"), Path(module.__file__)


def assert_cuda_within(rows: Mapping[str, Any], fragments: Mapping[str, str]) -> None:
    """Hold the compiled core's kernels to their rows of the table, or skip the test.

    Of a thread, as kernels hold paths for one coordinate and for several.

    Args:
        rows: CUDA's rows.
        fragments: What of a kernel's mangled name tells it from all others, by the rows' names.
    """
    archs, file = cuda_core()
    if "90" not in archs:
        pytest.skip("the core here has no kernels for sm_90")
    codes = cuda_codes(file, "sm_90", fragments.values())
    assert rows.keys() == fragments.keys()
    for case, row in rows.items():
        assert_within(codes[fragments[case]].costs(1), row)


def compile_kernel(
    function: Any,
    arch: int,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    divisible: bool,
    options: Mapping[str, Any],
) -> MachineCode:
    """Compile a ``triton.jit`` function.

    Args:
        function: The kernel.
        arch: Compute capability, 90 for sm_90.
        types: Types of arguments by name; those not named are ``*fp32``.
        constants: Its constexpr arguments; others than its own are ignored.
        divisible: Whether pointers and the argument ``n`` are multiples of 16.
        options: ``num_warps`` and so on.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    compiled = triton.compile(
        _source(function, types, constants, divisible),
        target=GPUTarget("cuda", arch, 32),
        options=dict(options),
    )
    instructions = _instructions(compiled.asm["sass"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _dump_resource_usage(Path(file.name))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return MachineCode(compiled.asm["ptx"], int(found[1]), int(found[2]), instructions)


def _instructions(sass: str) -> Counter[str]:
    """How often each instruction stands in what either of NVIDIA's tools prints, or Triton."""
    found = Counter(
        re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.MULTILINE)
        or re.findall(r"\t(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", sass)
    )
    found.pop("NOP", None)
    return found


def cuda_codes(file: Path, arch: str, fragments: Iterable[str]) -> dict[str, MachineCode]:
    """The compiled core's kernels for "sm_90", by a fragment of each one's mangled name.

    Raises:
        ValueError: Not exactly one kernel's name holds a fragment.
    """
    usage = {name: costs for (of, name), costs in resource_usage(file).items() if of == arch}
    names = {}
    for fragment in fragments:
        found = [name for name in usage if fragment in name]
        if len(found) != 1:
            raise ValueError(f"{fragment} is in {len(found)} names of kernels for {arch}: {found}")
        names[fragment] = found[0]
    sass: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        _dump("-xelf", arch, str(file.absolute()), into=folder)
        for cubin in Path(folder).iterdir():  # those that hold one alone, as each takes a second
            held = cubin.read_bytes()
            if any(name.encode() in held for name in names.values()):
                dump = _dump("-sass", str(cubin))
                parts = re.split(r"^\s*Function : (\w+)$", dump, flags=re.MULTILINE)
                sass |= zip(parts[1::2], parts[2::2], strict=True)
    return {
        fragment: MachineCode("", *usage[name], _instructions(sass[name]))
        for fragment, name in names.items()
    }


def resource_usage(file: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """Registers and bytes of stack a thread of each kernel in a file, by ("sm_90", its name)."""
    usage, arch, name = {}, "", ""
    for line in _dump_resource_usage(file).splitlines():
        if found := re.match(r"arch = (\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\w+):", line):
            name = found[1]
        elif found := re.search(r"REG:(\d+) STACK:(\d+)", line):
            usage[arch, name] = int(found[1]), int(found[2])
    return usage


def _dump_resource_usage(file: Path) -> str:
    return _dump("--dump-resource-usage", str(file))


def _dump(*arguments: str, into: str | None = None) -> str:
    """What cuobjdump prints; files that it writes come into a folder."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [tool, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=into)
    return done.stdout


def amd_assembly(
    function: Any,
    arch: str,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    options: Mapping[str, Any],
) -> str:
    """The assembly of a ``triton.jit`` function for one of AMD's GPUs, "gfx942".

    Args: see :func:`compile_kernel`.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    compiled = triton.compile(
        _source(function, types, constants, divisible=True),
        target=GPUTarget("hip", arch, 64),
        options=dict(options),
    )
    return compiled.asm["amdgcn"]


def _source(
    function: Any, types: Mapping[str, str], constants: Mapping[str, Any], divisible: bool
) -> Any:
    from triton.compiler import ASTSource

    names = function.arg_names
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*fp32") for name in names
    }
    sixteens = {
        (param.num,): [["tt.divisibility", 16]]
        for param in function.params
        if not param.do_not_specialize_on_alignment
        and (signature[param.name].startswith("*") or (divisible and param.name == "n"))
    }
    own = {name: value for name, value in constants.items() if name in names}
    return ASTSource(function, signature, own, sixteens)
