"""Functions of a few numbers: quadratic bowls, and Rastrigin's with its many minima.

Source: the code of the authors of Optimizer Amalgamation (ICLR 2022), which begins at zero and
takes 1,000 steps. Their losses are the functions' values, in training and validation alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from amalgam.tasks.task import Task


class _Point(nn.Module):
    """A point where a function is taken; it begins at zero.

    Args:
        n: The number of its coordinates.
        function: Of the point (n,) and of constants (samples, ...), to values (samples,).
    """

    def __init__(self, n: int, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(n))
        self._function = function

    def forward(self, *constants: Tensor) -> Tensor:
        """Constants (samples, ...) -> values (samples,)."""
        return self._function(self.x, *constants)


def _value(output: Tensor, target: Tensor) -> Tensor:
    """The mean of the values; the target, which a task must have, says nothing."""
    return output.mean()


def _task(
    name: str, n: int, function: Callable[..., Tensor], constants: tuple[Tensor, ...]
) -> Task:
    data = (*(tensor[None] for tensor in constants), torch.zeros(1))
    return Task(name, lambda: _Point(n, function), data, data, loss=_value, batch_size=1)


def _normal(seed: int, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def _check(n: int) -> None:
    if n < 1:
        raise ValueError(f"n must be 1 or more, not {n}")


def quadratic(batch_size: int | None = None, n: int = 10, seed: int = 0) -> Task:
    """A quadratic bowl, ``|W x - y|^2 / 2``.

    Args:
        batch_size: Has no effect: there is one sample, the function.
        n: The number of coordinates.
        seed: Draws W and y, all standard normal.
    """
    _check(n)

    def function(x: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
        return (matrix @ x - offset).square().sum(-1) / 2

    return _task(f"quadratic-{n}", n, function, _normal(seed, (n, n), (n,)))


def rastrigin(batch_size: int | None = None, n: int = 10, seed: int = 0) -> Task:
    """Rastrigin's function, a bowl with waves: ``|A x - b|^2 + 10 c cos(2 pi x) + 10 n``.

    Args:
        batch_size: Has no effect: there is one sample, the function.
        n: The number of coordinates.
        seed: Draws A, b and c, all standard normal.
    """
    _check(n)

    def function(x: Tensor, matrix: Tensor, offset: Tensor, waves: Tensor) -> Tensor:
        bowl = (matrix @ x - offset).square().sum(-1)
        return bowl + 10 * (waves * torch.cos(2 * math.pi * x)).sum(-1) + 10 * n

    return _task(f"rastrigin-{n}", n, function, _normal(seed, (n, n), (n,), (n,)))
