"""Arguments for ``student_step`` in its nominal form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from student_cases import draw, make_state, skewed_inputs
from torch import Tensor

from amalgam.ops import StepSettings, StudentState

ALPHA, BETA1, BETA2, EPS = 0.005, 0.9, 0.99, 1e-15


def corrections_of(steps: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
    """1 / (1 - beta^t) of each tensor, which has taken that many steps, and a pace of its own.

    Shape (tensors, 3).
    """
    t = torch.tensor(steps, dtype=torch.float64)
    pace = 0.4 + t.sqrt().remainder(1.7)
    return torch.stack((1 / (1 - BETA1**t), 1 / (1 - BETA2**t), pace), 1).to(dtype)


def nominal_settings(
    sizes: Sequence[int], dtype: torch.dtype = torch.float64, in_place: bool = False
) -> StepSettings:
    """Settings for tensors of these sizes, the i-th in its (1 + 3 i)-th step."""
    corrections = corrections_of([1 + 3 * i for i in range(len(sizes))], dtype)
    of_vector = [] if in_place else list(sizes)
    return StepSettings(ALPHA, BETA1, BETA2, EPS, corrections, of_vector)


def nominal_weights(
    tensors: int,
    layers: int = 1,
    hidden: int = 4,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Weights with a first bias for each of the tensors."""
    weights = []
    for layer in range(layers):
        inputs = hidden if layer else 3
        several = () if layer else (tensors,)
        weights += [
            draw(4 * hidden, inputs, seed=layer, dtype=dtype) / 2,
            draw(4 * hidden, hidden, seed=layer, dtype=dtype) / 2,
            draw(*several, 4 * hidden, seed=layer, dtype=dtype),
        ]
    return [*weights, draw(2, hidden, dtype=dtype), draw(2, dtype=dtype)]


def cut(size: int) -> list[int]:
    """Sizes of three tensors, one of them empty, that a vector of this size is cut into."""
    return [size // 3, 0, size - size // 3]


def skewed_nominal(
    size: int, layers: int, hidden: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, StudentState, list[Tensor], StepSettings]:
    """As :func:`student_cases.skewed_inputs`; a seventh of all coordinates never had a gradient."""
    grad, state, _ = skewed_inputs(size, layers, hidden, torch.float64, seed)
    m, v = state.m.clone(), state.v.clone()
    m[::7], v[::7] = 0, 0
    state = state._replace(m=m, v=v)
    weights = nominal_weights(3, layers, hidden)
    return (
        grad.to(dtype),
        StudentState(*(t.to(dtype) for t in state)),
        [w.to(dtype) for w in weights],
        nominal_settings(cut(size), dtype),
    )


__all__ = [
    "corrections_of",
    "cut",
    "make_state",
    "nominal_settings",
    "nominal_weights",
    "skewed_nominal",
]
