"""csrc/cuda compiled for the host: where no GPU is, its kernels compute on the CPU's tensors.

A compiler of C++ takes the headers beside this file for CUDA's: see cuda_runtime.h. Kernels that
take tensor cores are left out. It shows what kernels compute; not what a race, a fault of ptxas or
the special functions' last bits make of it.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import itertools
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
# Unoptimised: a kernel runs for milliseconds. Products are fused with sums where code says so.
FLAGS = ["-std=c++17", "-O0", "-w", "-ffp-contract=off", "-shared", "-fPIC"]


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels of kernels.cpp, compiled once a session of tests.

    Raises:
        FileNotFoundError: There is no C++ compiler: ``CXX``, or ``g++`` on ``PATH``.
        RuntimeError: It does not compile them.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise FileNotFoundError("no C++ compiler: CXX, or g++ on PATH")
    built = Path(os.environ["AMALGAM_CACHE"]) / "cuda_on_host.so"  # conftest.py's, of all processes
    with built.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            command = [compiler, *FLAGS, '-DAMALGAM_CUDA_ARCHS=""', f"-I{FOLDER}"]
            command += ["-include", "cuda_runtime.h", str(FOLDER / "kernels.cpp"), "-o", str(built)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}:\n{done.stderr}")
    found = ctypes.CDLL(str(built))
    of_nominal = ("step", "step_backward", "unroll_backward")
    problems = (f"nominal_{name}_of" for name in of_nominal)
    of_choice = "choice_step_of", "choice_step_backward_of"
    of_signs, of_teachers = "sign_agreements_of", ("teacher_step_of", "teacher_distance_of")
    for name in (*of_teachers, "student_step_in_place", of_signs, *of_choice, *problems):
        getattr(found, name).restype = ctypes.c_char_p
    numbers = ("student_block", "unroll_size", "unroll_sums_of", "unroll_warps_of")
    numbers = (*numbers, "teacher_distance_partials_of")
    for name in (*numbers, "choice_size", "choice_pool_of", "choice_sums_of", "choice_warps_of"):
        getattr(found, name).restype = ctypes.c_int64
    found.unroll_call.restype = ctypes.c_void_p
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


def _number(name: str, *arguments: int | str) -> int:
    number: int = getattr(library(), name)(*map(_argument, arguments))
    return number


def _sizes(name: str) -> list[int]:
    sizes = (_number(name, index) for index in itertools.count())
    return list(itertools.takewhile(bool, sizes))


def _columns(lr: Any, beta1: Any, beta2: Any, eps: Any) -> list[Any]:
    return [_array(ctypes.c_double, column) for column in (lr, beta1, beta2, eps)]


def _choice(
    inputs: Sequence[int],
    n: int,
    hidden: int,
    kinds: Sequence[int],
    time: float,
    learning_rate: float,
    **numbers: Sequence[float],
) -> tuple[Any, ...]:
    """What both functions of a choice begin with."""
    of_pool = len(kinds), _array(ctypes.c_int, kinds), *_columns(**numbers)
    return _array(ctypes.c_int64, inputs), n, hidden, *of_pool, float(time), float(learning_rate)


def _call(name: str, *arguments: Any) -> None:
    problem = getattr(library(), name)(*map(_argument, arguments))
    if problem:
        raise ValueError(problem.decode())


class CudaOnHost:
    """Stands for ``amalgam._core.cuda``: functions of csrc/cuda/bindings.cpp, as it names them."""

    archs = ""
    most_students = 65535

    def __getattr__(self, name: str) -> Any:
        operation, _, dtype = name.rpartition("_")
        if operation in ("teacher_step", "teacher_step_backward"):
            return functools.partial(self._teacher_step, dtype, operation.endswith("backward"))
        if operation in ("teacher_distance", "teacher_distance_backward"):
            backward = operation.endswith("backward")
            return functools.partial(self._teacher_distance, dtype, backward)
        if operation == "teacher_distance_partials":
            return functools.partial(_number, "teacher_distance_partials_of", dtype)
        raise AttributeError(name)

    def _teacher_distance(
        self,
        dtype: str,
        backward: bool,
        *addresses: int,
        rows: int,
        teacher_rows: int,
        n: int,
        k: int,
        eps: float,
        huber_delta: float,
        device: int,
        stream: int,
    ) -> None:
        sizes = (rows, teacher_rows, n, k)
        lists = (_array(ctypes.c_int64, each) for each in (addresses, sizes))
        _call("teacher_distance_of", dtype, backward, *lists, float(eps), float(huber_delta))

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
        columns = _columns(**numbers)
        where = _array(ctypes.c_int64, addresses)
        _call(
            "teacher_step_of", dtype, backward, where, n, k, _array(ctypes.c_int, kinds), *columns
        )

    def choice_sizes(self) -> list[int]:
        return _sizes("choice_size")

    def choice_pool(self, teachers: int) -> int:
        return _number("choice_pool_of", teachers)

    def choice_sums(self, hidden: int, teachers: int) -> int:
        return _number("choice_sums_of", hidden, teachers)

    def choice_warps(self, hidden: int, teachers: int, n: int, device: int) -> int:
        return _number("choice_warps_of", hidden, teachers, n)

    def choice_step(
        self,
        inputs: Sequence[int],
        *,
        update: int,
        new: Sequence[int],
        mixture: int,
        device: int,
        stream: int,
        **settings: Any,
    ) -> None:
        to = _array(ctypes.c_int64, new)
        _call("choice_step_of", *_choice(inputs, **settings), update, to, mixture)

    def choice_step_backward(
        self,
        inputs: Sequence[int],
        *,
        d_update: int,
        d_new: Sequence[int],
        d_mixture: int,
        d_grad: int,
        d_state: Sequence[int],
        sums: int,
        warps: int,
        device: int,
        stream: int,
        **settings: Any,
    ) -> None:
        of_new, of_old = (_array(ctypes.c_int64, each) for each in (d_new, d_state))
        of_state = d_update, of_new, d_mixture, d_grad, of_old
        _call("choice_step_backward_of", *_choice(inputs, **settings), *of_state, sums, warps)

    def sign_agreements(
        self,
        first: Sequence[int],
        first_formats: Sequence[int],
        second: Sequence[int],
        second_formats: Sequence[int],
        numels: Sequence[int],
        found: int,
        *,
        device: int,
        stream: int,
    ) -> None:
        ones, others, counts = (_array(ctypes.c_int64, x) for x in (first, second, numels))
        formats = [_array(ctypes.c_int, each) for each in (first_formats, second_formats)]
        pairs = ones, formats[0], others, formats[1], counts
        _call("sign_agreements_of", *pairs, len(first), found)

    def student_step_blocks(self, *, nominal: bool) -> dict[tuple[int, int], int]:
        blocks = {}
        for size in itertools.product((1, 2), (4, 8, 16)):
            if block := _number("student_block", nominal, *size):
                blocks[size] = block
        return blocks

    def unroll_sizes(self) -> list[int]:
        return _sizes("unroll_size")

    def unroll_sums(self, hidden: int) -> int:
        return _number("unroll_sums_of", hidden)

    def unroll_warps(self, hidden: int, tiles: int, device: int) -> int:
        return _number("unroll_warps_of", hidden, tiles)

    def UnrollCall(self, **given: Any) -> ctypes.c_void_p:
        order = (
            *("weights", "biases", "corrections", "bounds", "grads", "adjoints", "grads_stride"),
            *("adjoints_stride", "state", "n", "tiles", "tensors", "steps", "students"),
            "constants",
        )
        assert set(given) == set(order)
        given["state"] = _array(ctypes.c_int64, given["state"])
        given["constants"] = _array(ctypes.c_double, given["constants"])
        made = library().unroll_call(*(_argument(given[name]) for name in order))
        return ctypes.c_void_p(made)

    def nominal_step(
        self, call: Any, hidden: int, *, update: int, new: Sequence[int], **_: int
    ) -> None:
        _call("nominal_step_of", call, hidden, update, _array(ctypes.c_int64, new))

    def nominal_step_backward(
        self,
        call: Any,
        hidden: int,
        *,
        d_new: Sequence[int],
        d_grad: int,
        d_state: Sequence[int],
        sums: Sequence[int],
        warps: int,
        found: Sequence[int],
        **_: int,
    ) -> None:
        lists = (_array(ctypes.c_int64, each) for each in (d_new, d_state, sums, found))
        d_news, d_states, of_sums, of_found = lists
        of_state = d_news, d_grad, d_states
        _call("nominal_step_backward_of", call, hidden, *of_state, of_sums, warps, of_found)

    def nominal_unroll_backward(
        self,
        call: Any,
        hidden: int,
        *,
        sums: Sequence[int],
        warps: int,
        found: Sequence[int],
        **_: int,
    ) -> None:
        of_sums, of_found = _array(ctypes.c_int64, sums), _array(ctypes.c_int64, found)
        _call("nominal_unroll_backward_of", call, hidden, of_sums, warps, of_found)

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
