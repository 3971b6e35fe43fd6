"""csrc/cuda compiled for the host: where no GPU is, its kernels compute on the CPU's tensors.

A compiler of C++ takes the headers beside this file for CUDA's: see cuda_runtime.h. Kernels that
take tensor cores are left out. It shows what kernels compute; not what a race, a fault of ptxas or
the special functions' last bits make of it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
# Unoptimised: a kernel runs for milliseconds. Products are fused with sums where code says so.
FLAGS = ["-std=c++17", "-O0", "-w", "-ffp-contract=off", "-shared", "-fPIC"]


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels of kernels.cpp, compiled once a process.

    Raises:
        FileNotFoundError: There is no C++ compiler: ``CXX``, or ``g++`` on ``PATH``.
        RuntimeError: It does not compile them.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise FileNotFoundError("no C++ compiler: CXX, or g++ on PATH")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "kernels.so"
        command = [compiler, *FLAGS, '-DAMALGAM_CUDA_ARCHS=""', f"-I{FOLDER}"]
        command += ["-include", "cuda_runtime.h", str(FOLDER / "kernels.cpp"), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}:\n{done.stderr}")
        found = ctypes.CDLL(str(built))
    for name in ("teacher_step_of", "student_step_in_place"):
        getattr(found, name).restype = ctypes.c_char_p
    found.student_block.restype = ctypes.c_int64
    return found


def _argument(value: Any) -> Any:
    if isinstance(value, str):
        return ctypes.c_char_p(value.encode())
    if isinstance(value, float):
        return ctypes.c_double(value)
    if isinstance(value, int):
        return ctypes.c_int64(value)
    return value


def _array(kind: Any, values: Sequence[Any]) -> Any:
    return (kind * len(values))(*values)


def _call(name: str, *arguments: Any) -> None:
    problem = getattr(library(), name)(*map(_argument, arguments))
    if problem:
        raise ValueError(problem.decode())


class CudaOnHost:
    """Stands for ``amalgam._core.cuda``: functions of csrc/cuda/bindings.cpp, as it names them."""

    archs = ""

    def __getattr__(self, name: str) -> Any:
        operation, _, dtype = name.rpartition("_")
        if operation in ("teacher_step", "teacher_step_backward"):
            return functools.partial(self._teacher_step, dtype, operation.endswith("backward"))
        raise AttributeError(name)

    def _teacher_step(
        self,
        dtype: str,
        backward: bool,
        *addresses: int,
        n: int,
        k: int,
        kinds: Sequence[int],
        device: int,
        stream: int,
        **numbers: Sequence[float],
    ) -> None:
        columns = [_array(ctypes.c_double, numbers[c]) for c in ("lr", "beta1", "beta2", "eps")]
        where = _array(ctypes.c_int64, addresses)
        _call(
            "teacher_step_of", dtype, backward, where, n, k, _array(ctypes.c_int, kinds), *columns
        )

    def student_step_blocks(self, *, nominal: bool) -> dict[tuple[int, int], int]:
        sizes = [(layers, hidden) for layers in (1, 2) for hidden in (4, 8, 16)]
        blocks = {
            (i, j): library().student_block(*map(_argument, (nominal, i, j))) for i, j in sizes
        }
        return {size: block for size, block in blocks.items() if block}

    def packed_student_words(self, layers: int, hidden: int, products: str) -> int:
        return 0

    def student_step_in_place(
        self,
        *,
        constants: Sequence[float],
        products: str,
        aligned: bool,
        device: int,
        stream: int,
        **rest: Any,
    ) -> None:
        order = (
            *("weights", "biases", "corrections", "places", "table", "first_block", "control"),
            *("count", "blocks", "nominal", "layers", "hidden", "constants", "param", "grad"),
            *("moments", "cells", "keep", "lr", "warmup_steps", "stochastic", "approximate"),
        )
        given = rest | {"constants": _array(ctypes.c_double, constants)}
        given |= {"keep": float(given["keep"]), "lr": float(given["lr"])}
        assert set(given) == set(order)
        _call("student_step_in_place", *(given[name] for name in order))
