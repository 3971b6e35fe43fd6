"""Stochastic rounding to bfloat16; amalgam/operations/rounding.py has the arithmetic."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mix(x):
    """MurmurHash3's finalizer, of uint32."""
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= x >> 13
    x *= 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def key_of(seed, step):
    """The key of a tensor's random bits in a step, uint32; the step is a float32."""
    return _mix(_mix(seed.to(tl.uint32)) + step.to(tl.int32).to(tl.uint32))


@triton.jit
def random_bits(key, row, place):
    """32 bits of a place in a row, uint32; rows and places broadcast."""
    wide = place.to(tl.int64)
    low = wide.to(tl.uint32) * 0x85EBCA77
    high = (wide >> 32).to(tl.uint32) * 0xC2B2AE3D
    return _mix((low + high) ^ _mix(key + row.to(tl.uint32) * 0x9E3779B1))


@triton.jit
def rounded_stochastically(value, bits):
    """Float32 as bfloat16, up or down as 16 bits say; NaN and infinity stay."""
    raw = value.to(tl.uint32, bitcast=True)
    finite = (raw & 0x7F800000) != 0x7F800000
    # NaN and infinity are rounded to nearest, which keeps them.
    return (
        tl.where(finite, (raw + bits) & 0xFFFF0000, raw)
        .to(tl.float32, bitcast=True)
        .to(tl.bfloat16)
    )
