"""An LSTM's weights as kernels read them; kernels/lstm.py has their layout."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from amalgam.kernels.configurations import PLAIN
from amalgam.operations.kept import kept

SMALLEST_UNITS = 16  # what tl.dot takes at least
# What scaled_sigmoid and scaled_tanh take sums times.
OF_SIGMOID, OF_TANH = -math.log2(math.e), 2 * math.log2(math.e)


class Packing(NamedTuple):
    """How an architecture's weights are packed.

    Attributes:
        units: UNITS.
        folded: FOLDED.
        places: For each packed number its place among all weights, or behind them for a zero.
        back: For each weight its place among the packed ones.
        square: Whether a packed number belongs to a matrix (UNITS, UNITS).
        logistic: Whether it belongs to one of the gates i, f, o.
        candidate: Whether it belongs to a.
    """

    units: int
    folded: bool
    places: Tensor
    back: Tensor
    square: Tensor
    logistic: Tensor
    candidate: Tensor


@functools.cache
def packing(
    layers: int,
    hidden: int,
    features: int,
    outputs: int,
    device: torch.device,
    *,
    own_bias: bool = False,
    always_folded: bool = False,
) -> Packing:
    """The packing of an LSTM with a head, built once per architecture and device.

    With ``own_bias``, the first layer's bias is not among the weights, and zeros stand for it. With
    ``always_folded``, UNITS are as many as that takes.
    """
    row = hidden + 1 + features if always_folded else hidden
    units = max(SMALLEST_UNITS, triton.next_power_of_2(row))
    folded = hidden + 1 + features <= units
    shapes: list[tuple[int, ...]] = []
    for layer in range(layers):
        inputs = hidden if layer else features
        shapes += [(4, hidden, inputs), (4, hidden, hidden)]
        if layer or not own_bias:
            shapes.append((4, hidden))
    shapes += [(outputs, hidden), (outputs,)]
    counts = [torch.Size(shape).numel() for shape in shapes]
    zero = sum(counts)
    split = torch.arange(zero).split(counts)
    weights = [place.view(shape) for shape, place in zip(shapes, split, strict=True)]
    if own_bias:
        weights.insert(2, torch.full((4, hidden), zero))

    parts = []
    for layer in range(layers):
        w_ih, w_hh, b = weights[3 * layer : 3 * layer + 3]
        square = _padded(w_hh, {1: units, 2: units}, zero)
        if folded:
            square[:, :hidden, hidden] = b
        if folded and layer == 0:
            square[:, :hidden, hidden + 1 : hidden + 1 + features] = w_ih
        elif layer == 0:
            parts.append(_padded(w_ih.transpose(1, 2), {2: units}, zero))
        else:
            parts.append(_padded(w_ih, {1: units, 2: units}, zero))
        parts.append(square)
        if not folded:
            parts.append(_padded(b, {1: units}, zero))
    of_layers = len(parts)
    parts += [_padded(weights[-2], {1: units}, zero), weights[-1]]
    squares = [torch.full(part.shape, part.shape[1:] == (units, units)) for part in parts]
    logistic, candidate = (
        [torch.zeros(part.shape, dtype=torch.bool) for part in parts] for _ in range(2)
    )
    for flags, others in zip(logistic[:of_layers], candidate, strict=False):
        flags[[0, 1, 3]] = True
        others[2] = True

    # Kernels load four numbers at once, so those of each of several students begin at a multiple.
    rest = -sum(part.numel() for part in parts) % 4
    parts.append(torch.full((rest,), zero))
    for flags_of_parts in (squares, logistic, candidate):
        flags_of_parts.append(torch.zeros(rest, dtype=torch.bool))

    places, square, of_logistic, of_candidate = (
        torch.cat([each.reshape(-1) for each in column])
        for column in (parts, squares, logistic, candidate)
    )
    back = torch.empty(zero, dtype=torch.int64)
    used = places < zero
    back[places[used]] = torch.arange(len(places))[used]
    on_device = (tensor.to(device) for tensor in (places, back, square, of_logistic, of_candidate))
    return Packing(units, folded, *on_device)


def _padded(part: Tensor, sizes: dict[int, int], value: int) -> Tensor:
    shape = [sizes.get(d, size) for d, size in enumerate(part.shape)]
    padded = torch.full(shape, value)
    padded[tuple(slice(size) for size in part.shape)] = part
    return padded


def pack(
    weights: Sequence[Tensor],
    plan: Packing,
    precision: str,
    approximate: bool = False,
    scaled: bool = False,
) -> tuple[Tensor, Tensor]:
    """The packed weights, float32, and the other form that kernels read of them.

    Args:
        weights: As the operation has them, float32; each with a first dimension of S where they are
            those of S students, and so has what is packed.
        plan: Their packing.
        precision: With tf32 and 3xtf32 matrices are rounded to TF32, and NaN stays. The other form
            is what that leaves, with 3xtf32; with bf16, all in bfloat16; else the same.
        approximate: Whether sigmoids will be a tanh of half the sum: halves the weights of theirs.
        scaled: Whether activations will be scaled_sigmoid and scaled_tanh: scales all gates'.
    """
    several = weights[0].shape[:-2]
    parts = [*(w.reshape(*several, -1) for w in weights), weights[0].new_zeros((*several, 1))]
    packed = torch.cat(parts, -1).index_select(-1, plan.places)
    if approximate:
        packed = torch.where(plan.logistic, 0.5 * packed, packed)
    elif scaled:
        packed = torch.where(plan.logistic, OF_SIGMOID * packed, packed)
        packed = torch.where(plan.candidate, OF_TANH * packed, packed)
    if precision == "bf16":
        return packed, packed.bfloat16()
    if precision in ("ieee", PLAIN):
        return packed, packed
    high = ((packed.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    high = torch.where(plan.square & ~packed.isnan(), high, packed)
    return high, packed - high if precision == "3xtf32" else high


def packed(
    weights: Sequence[Tensor],
    plan: Packing,
    precision: str,
    approximate: bool = False,
    scaled: bool = False,
) -> tuple[Tensor, ...]:
    """As :func:`pack`, from before where the weights' owner keeps it."""
    key = "lstm", weights[0].device, weights[0].dim(), precision, approximate, scaled
    return kept(key, weights, lambda: pack(weights, plan, precision, approximate, scaled))


def unpack(packed: Tensor, like: Sequence[Tensor], plan: Packing) -> list[Tensor]:
    """Gradients in packed weights as those in the weights, in the weights' dtype.

    They share memory, as an operation's outputs must not: :func:`apart` makes copies.
    """
    flat = packed.index_select(-1, plan.back).to(like[0].dtype)
    sizes = [w.numel() // packed.shape[:-1].numel() for w in like]
    return [part.view(w.shape) for part, w in zip(flat.split(sizes, -1), like, strict=True)]


def apart(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Copies that share no memory."""
    return [each.clone(memory_format=torch.contiguous_format) for each in gradients]
