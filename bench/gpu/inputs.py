"""Arguments of operations, drawn on the device: to check them by, and to time them by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from gpu.place import Place
from harness import lstm_weights
from torch import Tensor

from amalgam.ops import StepSettings


def nominal_weights(
    place: Place, layers: int, hidden: int, steps: Sequence[int]
) -> tuple[list[Tensor], StepSettings]:
    """Weights with a first bias for each tensor, and settings, by how many steps each has taken."""
    weights = [w.to(place.device) for w in lstm_weights(3, hidden, layers, 2)]
    weights[2] = weights[2] + place.draw(len(steps), 4 * hidden, seed=3)
    taken = torch.tensor(steps, dtype=torch.float64)
    beta1, beta2 = 0.9, 0.99
    pace = torch.ones_like(taken)
    corrections = torch.stack((1 / (1 - beta1**taken), 1 / (1 - beta2**taken), pace), 1)
    corrections = corrections.to(place.device, torch.float32)
    return weights, StepSettings(0.005, beta1, beta2, 1e-15, corrections)


def choice_inputs(
    place: Place, direction: str, student: tuple[int, int], k: int, n: int, seed: int
) -> tuple[Any, ...]:
    """Arguments of a choice of (layers, units) among k teachers, or of its backward."""
    layers, hidden = student
    weights = [w.to(place.device) for w in lstm_weights(k + 4, hidden, layers, k)]
    of_each = [[value] * k for value in (0.01, 0.9, 0.999, 1e-8)]
    grad = place.draw(n, seed=seed)
    state = [
        place.draw(k, n, seed=seed + 1),
        place.draw(k, n, seed=seed + 2).square(),
        place.draw(layers, hidden, n, seed=seed + 3).tanh(),
        place.draw(layers, hidden, n, seed=seed + 4),
    ]
    ranks = torch.arange(n, device=place.device) % 5
    kinds = [2, 3] if k == 2 else list(range(k))
    arguments: tuple[Any, ...] = (grad, *state, weights, ranks, kinds, *of_each, 5, 10.0, 1.0)
    if direction == "forward":
        return arguments
    like = (grad, *state, state[0])
    upstream = [place.draw(*t.shape, seed=seed + 20 + i) for i, t in enumerate(like)]
    return upstream, *arguments


def teachers_inputs(place: Place, name: str, direction: str, n: int, seed: int) -> tuple[Any, ...]:
    """Arguments of an operation on six teachers, or of its backward."""
    k = 6
    rows = [place.draw(k, n, seed=seed + i) for i in range(6)]
    if name == "teacher_step":
        of_each = [[value] * k for value in (0.1, 0.9, 0.999, 1e-10)]
        arguments: tuple[Any, ...] = (rows[0], rows[1], rows[2].square(), list(range(k)), *of_each)
        return arguments if direction == "forward" else (rows[3:], *arguments)
    arguments = (place.draw(n, seed=seed + 8), rows[0], 1e-10, None)
    if direction == "forward":
        return arguments
    total = torch.ops.amalgam.teacher_distance(*arguments, "reference")[1]
    ones = torch.ones(k, device=place.device)
    return ones, *arguments[:2], total, *arguments[2:], True
