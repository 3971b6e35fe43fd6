"""The compiled core ``amalgam._core``: whether it is here, and how it was built."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

NO_CUDA = (
    "amalgam's compiled core was built without CUDA (no nvcc then, or AMALGAM_CUDA=0); install the "
    "CUDA toolkit and reinstall with AMALGAM_CUDA=1 (AMALGAM_CUDA=1 pip install --force-reinstall "
    "--no-deps .)"
)

NO_HUBER = -1.0  # what the core's teacher_distance takes for no Huber, as its headers say


@functools.cache
def load() -> tuple[ModuleType | None, str | None]:
    """Import the compiled core once.

    Returns:
        The module and ``None``, or ``None`` and a sentence that says why it does not import.
    """
    try:
        return importlib.import_module("amalgam._core"), None
    except ModuleNotFoundError as error:
        if error.name != "amalgam._core":
            raise
        return None, (
            "amalgam's compiled core is not installed; 'pip install .' (or -e .) in the source "
            "tree builds it, with any C++17 compiler"
        )
    except ImportError as error:
        return (
            None,
            f"amalgam's compiled core does not load ({error}); reinstall it on this machine",
        )


def core() -> ModuleType:
    """The compiled core.

    Raises:
        RuntimeError: It is missing or does not load.
    """
    module, problem = load()
    if module is None:
        raise RuntimeError(problem)
    return module


def build_info() -> dict[str, object]:
    """Facts for reports; works where the core is missing, too.

    Returns:
        ``core`` (its version, or why it is missing), ``compiler``, ``openmp``, ``cpu_isa`` (the
        instruction set in use, or what is wrong with ``AMALGAM_CPU_ISA``), ``cpu_isas`` (all that
        are available), ``cpu_bfloat16`` (whether products on the CPU take bfloat16 where a call
        permits it), ``cuda`` (whether it was built with CUDA), ``cuda_archs`` and
        ``cuda_runtime`` (version of the static runtime). ``None`` stands for what can't be known.
    """
    module, problem = load()
    if module is None:
        unknown = ("compiler", "openmp", "cpu_isa", "cpu_isas", "cpu_bfloat16", "cuda")
        return {"core": problem, **dict.fromkeys([*unknown, "cuda_archs", "cuda_runtime"])}
    try:
        isa, bfloat16 = module.cpu.isa(), module.cpu.multiplies_bfloat16()
    except ValueError as error:
        isa, bfloat16 = str(error), None
    facts = {
        "core": module.version,
        "compiler": module.compiler,
        "openmp": module.openmp,
        "cpu_isa": isa,
        "cpu_isas": list(module.cpu.available_isas()),
        "cpu_bfloat16": bfloat16,
        "cuda": module.cuda is not None,
        "cuda_archs": None,
        "cuda_runtime": None,
    }
    if module.cuda is not None:
        version = module.cuda.runtime_version()
        facts["cuda_archs"] = module.cuda.archs.split(";")
        facts["cuda_runtime"] = f"{version // 1000}.{version % 1000 // 10}"
    return facts
