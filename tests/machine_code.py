"""What Triton makes of a kernel for a GPU that is not there: counts from its machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class MachineCode:
    """A compiled kernel.

    Attributes:
        ptx: Its PTX.
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


def costs_of(
    function: Any,
    arch: int,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    options: Mapping[str, Any],
    divisible: bool,
) -> dict[str, int]:
    """What budgets count of a kernel whose programs compute ``BLOCK`` coordinates.

    Registers and bytes of stack a thread; instructions, and special functions among them, a
    coordinate; tensor core instructions and accesses of 16 bytes in the code.

    Args: see :func:`compile_kernel`.
    """
    code = compile_kernel(function, arch, types, constants, divisible, options)
    threads_a_coordinate = 32 * options["num_warps"] / constants["BLOCK"]
    return {
        "registers": code.registers,
        "stack": code.stack,
        "instructions": round(sum(code.instructions.values()) * threads_a_coordinate),
        "special": round(code.count("MUFU") * threads_a_coordinate),
        "tensor": code.count("HMMA", "HGMMA", "UTCHMMA"),
        "wide": sum(n for i, n in code.instructions.items() if re.match(r"(LDG|STG).*\.128", i)),
    }


def assert_within(costs: Mapping[str, int], budget: Mapping[str, int]) -> None:
    """Nothing above its budget; and tensor cores and wide accesses where they were."""
    for what in ("registers", "stack", "instructions", "special"):
        assert costs[what] <= budget[what], (what, costs, budget)
    for what in ("tensor", "wide"):
        assert costs[what] >= budget[what], (what, costs, budget)


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
    instructions = Counter(
        re.findall(
            r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)",
            compiled.asm["sass"],
            re.MULTILINE,
        )
        or re.findall(r"\t(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", compiled.asm["sass"])
    )
    instructions.pop("NOP", None)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _dump_resource_usage(Path(file.name))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return MachineCode(compiled.asm["ptx"], int(found[1]), int(found[2]), instructions)


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
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(tool), "--dump-resource-usage", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


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
