"""An LSTM's cells as 8-bit codes; amalgam/operations/cell_codes.py has the arithmetic."""

from __future__ import annotations

import triton
import triton.language as tl

from amalgam.operations import cell_codes

MOST = tl.constexpr(float(cell_codes.MOST))
NOT_FINITE = tl.constexpr(cell_codes.NOT_FINITE)
LEAST_EXPONENT = tl.constexpr(cell_codes.LEAST_EXPONENT)
WHOLE = tl.constexpr(2.0**23)  # whole numbers alone lie there


@triton.jit
def _power_of_two(exponent):
    """2^exponent as float32, of an int32 in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scales_of(exponents):
    """The scales that stored exponents, int8, stand for; NaN of what was not finite."""
    wide = exponents.to(tl.int32)
    return tl.where(wide == NOT_FINITE, float("nan"), _power_of_two(wide))


@triton.jit
def magnitude_of(value):
    """A float32's size as an int32 that orders likewise, NaN last."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _exponents(largest):
    """Exponents, int32, by the largest of a block's magnitudes; and whether codes are used."""
    exponent = (largest >> 23) - 133
    return exponent, (largest < 0x7F800000) & (exponent >= LEAST_EXPONENT)


@triton.jit
def exponents_of(largest):
    """The exponents as they are stored, int8."""
    exponent, used = _exponents(largest)
    stored = tl.where(largest < 0x7F800000, tl.where(used, exponent, 0), NOT_FINITE)
    return stored.to(tl.int8)


@triton.jit
def inverses_of(largest):
    """What numbers are multiplied by to count steps; 0 where all codes are 0."""
    exponent, used = _exponents(largest)
    return tl.where(used, _power_of_two(tl.where(used, -exponent, 0)), 0.0)


@triton.jit
def coded(value, inverse, bits, STOCHASTIC: tl.constexpr):
    """Float32 as codes, int8, rounded to nearest, or by 16 bits if STOCHASTIC."""
    steps = tl.where(inverse == 0.0, 0.0, tl.abs(value) * inverse)
    if STOCHASTIC:
        steps += bits.to(tl.float32) * 0.0000152587890625  # 2^-16
    else:
        steps = (steps + WHOLE) - WHOLE
    code = tl.minimum(steps, MOST).to(tl.int32)
    return tl.where(value < 0.0, -code, code).to(tl.int8)
