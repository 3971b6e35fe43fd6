"""A student's weights as CUDA's kernels of few units read them: csrc/cuda/student_step.h."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def pack(weights: Sequence[Tensor], approximate: bool) -> Tensor:
    """Pack a student's weights, each scaled as the activation of its gate takes sums.

    Args:
        weights: Of every layer W_ih, W_hh and b, then the head and its bias; of several students
            with a first dimension more.
        approximate: Whether activations are approximate.

    Returns:
        A float32 vector, of a length that is a multiple of four; of several students one a row.
    """
    parts = [
        _scaled((b[..., None], w_ih, w_hh), approximate).flatten(-3)
        for w_ih, w_hh, b in zip(weights[0:-2:3], weights[1:-2:3], weights[2:-2:3], strict=True)
    ]
    head, bias = weights[-2:]
    flat = torch.cat([*parts, head.double().flatten(-2), bias.double()], -1)
    return torch.nn.functional.pad(flat, (0, -flat.shape[-1] % 4)).float()


def _scaled(columns: Sequence[Tensor], approximate: bool) -> Tensor:
    """A layer's columns as activations take their sums, shape (..., hidden, inputs, 4)."""
    # What activations would multiply their sums by: see csrc/cuda/activations.cuh.
    of_sigmoid, of_tanh = -math.log2(math.e), 2 * math.log2(math.e)
    if approximate:
        of_sigmoid, of_tanh = 0.5, 1.0
    gates = torch.cat(tuple(columns), -1).double().chunk(4, -2)
    scales = (of_sigmoid, of_sigmoid, of_tanh, of_sigmoid)
    return torch.stack([scale * gate for scale, gate in zip(scales, gates, strict=True)], -1)


def pack_choice(weights: Sequence[Tensor], teachers: int) -> Tensor:
    """Pack the weights of a choice by one layer: see csrc/cuda/choice_step.h.

    Args:
        weights: W_ih, W_hh and b, then the head and its bias.
        teachers: How many the pool has: the first of W_ih's inputs are theirs.

    Returns:
        A float32 vector.
    """
    w_ih, w_hh, b, head, head_bias = weights
    of_teachers, others = w_ih[:, :teachers], w_ih[:, teachers:]
    scaled = _scaled((b[:, None], others, of_teachers, w_hh), approximate=False)
    parts = scaled.transpose(0, 1), head.double(), head_bias.double()
    return torch.cat([part.flatten() for part in parts]).float()


def pack_nominal(shared: Sequence[Tensor], approximate: bool) -> Tensor:
    """Pack all weights of the nominal form but the first bias, in whose place are zeros."""
    w_ih, w_hh, *rest = shared
    return pack([w_ih, w_hh, w_ih.new_zeros(w_ih.shape[:-1]), *rest], approximate)
