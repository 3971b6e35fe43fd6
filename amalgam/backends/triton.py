"""Backend ``triton``: the kernels of ``amalgam.kernels``, compiled at their first use."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from amalgam.operations.registry import register_backend

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _probe() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return (
            "Triton is not installed; 'pip install triton' (it comes with CUDA builds of PyTorch)"
        )
    if importlib.util.find_spec("amalgam.kernels") is None:
        return "amalgam.kernels is not installed; 'pip install .' (or -e .) in the source tree does"
    if INTERPRETING or torch.cuda.is_available():
        return None
    return (
        "PyTorch sees no CUDA GPU here; TRITON_INTERPRET=1, set before Python starts, runs the "
        "kernels on the CPU, slowly, for tests"
    )


backend = register_backend(
    "triton",
    # Interpreted kernels are for tests: "auto" prefers even the reference.
    rank=-10 if INTERPRETING else 10,
    devices=frozenset({"cuda", "cpu"} if INTERPRETING else {"cuda"}),
    probe=_probe,
    about="Triton kernels, compiled at first use; interpreted on CPU if TRITON_INTERPRET=1",
)


SINGLE = frozenset({torch.float32})
GRID_ROWS = 65535  # what a grid of CUDA's, and so of Triton's, has of a second dimension
