"""What this machine is, and whether kernels that were compiled elsewhere will be found on it."""

from __future__ import annotations

import importlib.util
import os
import platform

import numpy
import torch
from compile_only import fingerprint
from gpu.place import Row, start

from amalgam.backends import build_info
from amalgam.ops import backends
from amalgam.version import describe


def facts() -> Row:
    """Versions, the GPU, and what of the package works."""
    row: Row = {
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "core": build_info(),
        "backends": {name: status.reason or "works" for name, status in backends().items()},
        **describe(),
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        row |= {"gpu": gpu.name, "processors": gpu.multi_processor_count}
        row |= {"gpu_bytes": gpu.total_memory, "l2_bytes": gpu.L2_cache_size}
    return row


def main() -> None:
    place = start("machine")
    cases = [("machine", facts)]
    if importlib.util.find_spec("triton") is not None:
        cases.append(("what compiled kernels are found by", lambda: {"keys": fingerprint()}))
    place.run_cases(cases)


if __name__ == "__main__":
    main()
