"""Stochastic rounding to bfloat16 and to 8-bit codes, the same bits in every backend.

A float32 is rounded up with the probability of what lies below bfloat16's last bit, so that sums
of updates far smaller than a parameter are right on average. The randomness is counted and not
drawn: a hash of a seed, a step, a row and a place, in 32-bit arithmetic that PyTorch, C++ and
Triton agree on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amalgam.operations.cell_codes import encoded

_MASK = 0xFFFFFFFF
ROW = 0x9E3779B1
PLACE = 0x85EBCA77
PLACE_HIGH = 0xC2B2AE3D


def mix(x: Tensor) -> Tensor:
    """MurmurHash3's finalizer, a bijection of 32 bits; int64 tensors in [0, 2^32)."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & _MASK
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def key_of(seed: int, step: Tensor) -> Tensor:
    """What a tensor's bits of a step grow from.

    Args:
        seed: In [0, 2^32).
        step: The step, a whole number of any dtype, 0-dimensional.

    Returns:
        An int64 in [0, 2^32), 0-dimensional, on the step's device.
    """
    mixed = mix(torch.full_like(step, seed, dtype=torch.int64))
    return mix((mixed + step.to(torch.int64)) & _MASK)


def random_bits(key: Tensor, rows: range, places: range) -> Tensor:
    """32 random bits for each place of each row.

    Args:
        key: Of :func:`key_of`.
        rows: Which rows of the tensor.
        places: Which places of them.

    Returns:
        Shape (rows, places), int64 in [0, 2^32), on the key's device.
    """

    def numbers(of: range) -> Tensor:
        return torch.arange(of.start, of.stop, device=key.device)

    row_keys = mix((key + numbers(rows) * ROW) & _MASK)
    place = numbers(places)
    counted = ((place & _MASK) * PLACE + (place >> 32) * PLACE_HIGH) & _MASK
    return mix(counted ^ row_keys[:, None])


def rounded_stochastically(values: Tensor, bits: Tensor) -> Tensor:
    """Float32 values as bfloat16, up or down as 16 random bits say; NaN and infinity stay.

    Args:
        values: Float32.
        bits: Int64 in [0, 2^16), of the values' shape.
    """
    raw = values.view(torch.int32).to(torch.int64) & _MASK
    high = ((raw + bits) & 0xFFFF0000) >> 16
    rounded = torch.where(high >= 0x8000, high - 0x10000, high).to(torch.int16)
    return torch.where(values.isfinite(), rounded.view(torch.bfloat16), values.to(torch.bfloat16))


def as_stored(
    values: Tensor,
    dtype: torch.dtype,
    key: Tensor | None,
    row: int,
    places: range,
    shift: int = 16,
) -> Tensor:
    """Values as they are stored: with random bits rounded to bfloat16, and int8 codes in any case.

    Args:
        values: Float32 or float64, shape (rows, places) or one that views as that.
        dtype: What they are stored in.
        key: Of :func:`key_of`, to round at random; ``None`` to round to nearest.
        row: The first row's number.
        places: The places that they have in their rows.
        shift: Which 16 of the 32 random bits to take: 0 or 16.
    """
    bits = None
    if key is not None and dtype in (torch.bfloat16, torch.int8):
        rows = values.numel() // max(1, len(places))
        bits = (random_bits(key, range(row, row + rows), places) >> shift) & 0xFFFF
        bits = bits.view(values.shape)
    if dtype == torch.int8:
        return encoded(values.float(), bits)
    return values if bits is None else rounded_stochastically(values.float(), bits)
