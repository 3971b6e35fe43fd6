"""An LSTM's cells as 8-bit codes, which take a quarter of float32's memory.

h and c of the shape (layers, hidden, *S) become int8 of the shape (layers, hidden + 1, *S). A block
is what a coordinate has of one layer: a code for each unit, and after them an exponent e, by which
a code k stands for ``k 2^e``. The largest number of a block has a code of 64 to 127 in size, so no
number is off by more than 1/128 of that one.

The scale lies beside the units and not beside other coordinates: whatever cuts, prunes or shards a
parameter can then do the same to its codes, blocks never depend on how coordinates are dealt to
processes, and a kernel that computes a coordinate knows its scale. That costs a byte a layer.

As scales are powers of two, ``decoded`` is exact, and ``encoded`` of what it returns are the same
codes: a step that is skipped changes none. Mirrored numbers have mirrored codes, and zero has zero.
Source: the 8-bit integers of OCP's Microscaling Formats (MX) Specification 1.0 (2023), with its
blocks as long as a layer is wide.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOST = 127  # the largest code
NOT_FINITE = 127  # in the exponent's place
LEAST_EXPONENT = -126
_PLACES = 6  # of the largest code's first bit, by which it is 64 or more
_BIAS, _FRACTION = 127, 23  # of float32
_INFINITY = 0x7F800000


def units_of(cells: Tensor) -> Tensor:
    """The rows of units in h or c, (layers, hidden, ...), be they numbers or codes."""
    return cells[:, :-1] if cells.dtype == torch.int8 else cells


def numbers_of(cells: Tensor) -> Tensor:
    """What h or c hold: :func:`decoded` where they are codes, else themselves."""
    return decoded(cells) if cells.dtype == torch.int8 else cells


def encoded(cells: Tensor, bits: Tensor | None = None) -> Tensor:
    """Numbers as codes, rounded to nearest, or by random bits.

    By these a number is rounded up or down, right on average; but for what lies above a block's
    127th step, which is always rounded to that. A block whose largest number is below 2^-120
    becomes zeros. One that holds NaN or infinity becomes NaN.

    Args:
        cells: Float32, shape (layers, hidden, ...).
        bits: Int64 in [0, 2^16), of that shape.

    Returns:
        Int8, shape (layers, hidden + 1, ...).
    """
    magnitude = cells.abs()
    largest = magnitude.view(torch.int32).amax(1, keepdim=True)
    exponent = (largest >> _FRACTION) - (_BIAS + _PLACES)
    finite = largest < _INFINITY
    used = finite & (exponent >= LEAST_EXPONENT)
    exponent = torch.where(used, exponent, 0)
    steps = torch.where(used, magnitude * _power_of_two(-exponent), 0)
    steps = steps.round() if bits is None else (steps + bits.float() * 2.0**-16).floor()
    codes = steps.clamp(max=MOST).copysign(cells)
    return torch.cat((codes, torch.where(finite, exponent, NOT_FINITE)), 1).to(torch.int8)


def decoded(codes: Tensor) -> Tensor:
    """What codes stand for.

    Args:
        codes: Int8, shape (layers, hidden + 1, ...).

    Returns:
        Float32, shape (layers, hidden, ...).
    """
    exponent = codes[:, -1:].to(torch.int32)
    scale = torch.where(exponent == NOT_FINITE, math.nan, _power_of_two(exponent))
    return units_of(codes) * scale


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as float32, of an int32 in [-126, 127]."""
    return ((exponent + _BIAS) << _FRACTION).view(torch.float32)
