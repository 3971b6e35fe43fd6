"""NVIDIA's arithmetic under Triton's interpreter: what differs from NumPy's, and costs digits.

Tensor cores, as measured by Fasi, Higham, Mikaitis and Pranesh, "Numerical behavior of NVIDIA
tensor cores" (PeerJ Computer Science 7:e330, 2021), and by Khattak and Mikaitis, "Accurate models
of NVIDIA tensor cores" (arXiv 2512.07004, 2025): products are exact and are added to the sums a
block at a time, each term cut off a few bits below the last place of the block's largest, and the
block's sum at float32's. Of float32 operands they take TF32's bits and ignore the others.

Instructions that approximate err by a hash of their result, evenly, and are then rounded: together
up to what bench/gpu/arithmetic.py read off an H200, where a larger error was never seen in 2^20
numbers, and a smaller root mean square. Its rows also have the two spare bits, and 0x7fffffff for
the NaN that arithmetic makes; of square roots they have none yet. Where a GPU fuses a
multiplication and an addition, the interpreter rounds twice still.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from amalgam.kernels import choice_step, lstm, student_step, student_step_in_place

Array = NDArray[Any]

NAN = np.uint32(0x7FFFFFFF)
TF32_BITS = np.uint32(0xFFFFE000)
LOG2_E = np.float32(1.4426950408889634)
SMALLEST = 2.0**-126  # .ftz flushes what is below to zero

# With the half that rounding adds, the largest were 1.19, 0.81 and 1.25 times 2^-23 on an H200, and
# their root mean squares 0.44, 0.20 and 0.33. tanh.approx's 2^-11 is the PTX ISA's, and so is, with
# the half, sqrt.approx's 2^-23.
EX2, RCP, DIV, TANH = 0.7 * 2.0**-23, 0.35 * 2.0**-23, 0.75 * 2.0**-23, 2.0**-11
SQRT = 0.5 * 2.0**-23


class TensorCores(NamedTuple):
    """How a generation adds.

    Attributes:
        tf32: Products in a block, of TF32.
        bf16: And of bfloat16.
        spare: Bits that terms keep below the last place of their block's largest.
    """

    tf32: int
    bf16: int
    spare: int


A100 = TensorCores(4, 8, 1)
H100 = TensorCores(8, 16, 2)


def install(monkeypatch: pytest.MonkeyPatch, cores: TensorCores = H100) -> None:
    """Lets the interpreter compute as a GPU does, of kernels that are told to be on one."""
    cast = InterpreterBuilder.cast_impl

    def dot(_builder: Any, a: Any, b: Any, sums: Any, precision: Any, _most: Any) -> Any:
        name = str(precision).lower()
        if a.dtype.scalar == tl.bfloat16:
            result = _multiplied(_widened(a.data), _widened(b.data), sums.data, cores.bf16, cores)
        elif "tf32" in name and "x3" not in name:
            left, right = _cut_to_tf32(a.data), _cut_to_tf32(b.data)
            result = _multiplied(left, right, sums.data, cores.tf32, cores)
        else:
            result = sums.data
            for k in range(a.data.shape[1]):
                term = a.data[:, k, None].astype(np.float64) * b.data[None, k]
                result = (result + term).astype(np.float32)
        return _handle(result)

    def rounding_cast(builder: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(builder, source, target)
        rounded = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.int16)
        return TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)

    def divide(builder: Any, x: Any, y: Any) -> Any:
        exact = builder.binary_op(x, y, np.divide)
        return exact if exact.data.dtype != np.float32 else _handle(_off_by(exact.data, DIV))

    def exponential(builder: Any, x: Any) -> Any:
        if x.data.dtype != np.float32:
            return builder.unary_op(x, np.exp)
        return _handle(_off_by(np.exp2((LOG2_E * x.data).astype(np.float64)), EX2))

    for name, function in (
        ("create_dot", dot),
        ("cast_impl", rounding_cast),
        ("binary_op", _with_one_nan(InterpreterBuilder.binary_op)),
        ("unary_op", _with_one_nan(InterpreterBuilder.unary_op)),
        ("create_fdiv", _with_one_nan(divide)),
        ("create_exp", _with_one_nan(exponential)),
        ("create_inline_asm", _with_one_nan(_inline_assembly)),
    ):
        monkeypatch.setattr(InterpreterBuilder, name, function)

    patch = interpreter._patch_lang_tensor

    def patch_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        # Triton 3.6's own takes int() of arrays of one element, which NumPy 2.5 refuses.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_index)
    for module in (lstm, student_step, student_step_in_place, choice_step):
        monkeypatch.setattr(module, "on_nvidia", lambda: True)


class _Results(NamedTuple):
    """What the interpreter takes from inline assembly."""

    handles: list[Any]

    def get_result(self, index: int) -> Any:
        return self.handles[index]


def _inline_assembly(
    _builder: Any, assembly: str, _constraints: Any, values: Any, *_how: Any
) -> _Results:
    if assembly.startswith("ld.global.nc.v4.f32 "):
        four = (ctypes.c_float * 4).from_address(int(values[0].data.item()))
        return _Results([TensorHandle(np.array([each], np.float32), tl.float32) for each in four])
    compute = {
        "ex2.approx.ftz.f32 $0, $1;": lambda x: _flushed(_off_by(np.exp2(_flushed(x)), EX2)),
        "rcp.approx.ftz.f32 $0, $1;": lambda x: _flushed(_off_by(1 / _flushed(x), RCP)),
        "tanh.approx.f32 $0, $1;": lambda x: _off_by(np.tanh(x), TANH),
        "sqrt.approx.f32 $0, $1;": lambda x: _off_by(np.sqrt(x), SQRT),
    }[assembly]
    return _Results([_handle(compute(values[0].data.astype(np.float64)))])


def _with_one_nan(compute: Callable[..., Any]) -> Callable[..., Any]:
    """A builder's method without NumPy's warnings, and with the GPU's NaN."""

    def wrapper(*arguments: Any) -> Any:
        with np.errstate(all="ignore"):
            result = compute(*arguments)
        if not isinstance(result, _Results) and result.data.dtype == np.float32:
            result.data = _one_nan(result.data)
        return result

    return wrapper


def _handle(values: Array) -> Any:
    return TensorHandle(_one_nan(values.astype(np.float32)), tl.float32)


def _one_nan(values: Array) -> Array:
    nan = np.isnan(values)
    if not nan.any():
        return values
    return np.where(nan, NAN, np.asarray(values).view(np.uint32)).view(np.float32)


def _flushed(values: Array) -> Array:
    return np.where(np.abs(values) < SMALLEST, 0.0, values)


def _off_by(exact: Array, bound: float) -> Array:
    """With relative errors up to the bound; powers of two come out exact."""
    bits = exact.astype(np.float32).view(np.uint32)
    bits = (bits ^ (bits >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    error = (bits ^ (bits >> np.uint32(16))) / 2.0**31 - 1
    powers_of_two = np.abs(np.frexp(exact)[0]) == 0.5
    return np.where(powers_of_two, exact, exact * (1 + bound * error))


def _widened(bfloat16: Array) -> Array:
    return (bfloat16.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _cut_to_tf32(values: Array) -> Array:
    return (np.ascontiguousarray(values).view(np.uint32) & TF32_BITS).view(np.float32)


def _multiplied(a: Array, b: Array, sums: Array, block: int, cores: TensorCores) -> Array:
    """The sums, float32, plus the product of (M, K) and (K, N)."""
    with np.errstate(all="ignore"):
        for start in range(0, a.shape[1], block):
            left = a[:, start : start + block].astype(np.float64)
            terms = left.T[:, :, None] * b[start : start + block, None, :]
            terms = np.concatenate((sums[None].astype(np.float64), terms))
            largest = np.abs(terms).max(0)
            _, exponent = np.frexp(largest)  # the last place of float32 is 2^(exponent - 24)
            place = np.ldexp(1.0, exponent - 24 - cores.spare)
            total = (np.trunc(terms / place) * place).sum(0)
            # Of infinity and NaN there is nothing to cut off.
            total = np.where(np.isfinite(largest), total, terms.sum(0))
            sums = _cut_to_float32(total)
    return sums


def _cut_to_float32(values: Array) -> Array:
    near = values.astype(np.float32)
    return np.where(np.abs(near) > np.abs(values), np.nextafter(near, np.float32(0)), near)
