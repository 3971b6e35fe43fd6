"""The backends beside the reference. Importing this package registers them with the operations."""

from amalgam.backends import cpu, cuda, triton
from amalgam.backends.core import build_info

__all__ = ["build_info", "cpu", "cuda", "triton"]
