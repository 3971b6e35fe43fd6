"""The backends beside the reference: what each is, and how it computes each operation.

``cpu``, ``cuda`` and ``triton`` say what a backend is and where it works; a file of an operation's
name holds what all of them compute it by. Importing this package registers all of that.
"""

import importlib
import pkgutil

from amalgam.backends import cpu, cuda, triton
from amalgam.backends.core import build_info

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["build_info", "cpu", "cuda", "triton"]
