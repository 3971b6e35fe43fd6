"""What the tests of optimizers step: students, parameters and gradients."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from amalgam import AmalgamatedOptimizer, NominalConfig, NominalStudent


def nominal(**config: Any) -> NominalStudent:
    """A nominal student of 4 units whose head does not begin at zero."""
    generator = torch.Generator().manual_seed(1)
    student = NominalStudent(NominalConfig(hidden=4, **config), generator=generator)
    with torch.no_grad():
        student.head.weight.copy_(torch.linspace(-1, 1, 8).view(2, 4))
    return student


def parameters(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> list[nn.Parameter]:
    """The same ones in every call, up to the dtype's rounding."""
    generator = torch.Generator().manual_seed(2)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in shapes
    ]


def give_gradients(params: Sequence[nn.Parameter], step: int, sign: float = 1.0) -> None:
    """Gradients that depend on the step, and agree more often than not."""
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        drawn = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        param.grad = (sign * (drawn + 0.5)).to(param.dtype)


def check_stats_tell_the_step(
    optimizer: AmalgamatedOptimizer, params: Sequence[nn.Parameter], numbers: Sequence[int]
) -> None:
    """Step, and hold how far these parameters went to what stats said of them before."""
    told, before = optimizer.stats(), [p.detach().clone() for p in params]
    optimizer.step()
    for number in numbers:
        moved = (params[number].detach() - before[number]).norm() / before[number].norm()
        assert told[f"0.{number}"].update_over_parameter == pytest.approx(moved.item(), rel=1e-4)
