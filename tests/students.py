"""Students that the tests of optimizers step by."""

from typing import Any

import torch

from amalgam import NominalConfig, NominalStudent


def nominal(**config: Any) -> NominalStudent:
    """A nominal student of 4 units whose head does not begin at zero."""
    generator = torch.Generator().manual_seed(1)
    student = NominalStudent(NominalConfig(hidden=4, **config), generator=generator)
    with torch.no_grad():
        student.head.weight.copy_(torch.linspace(-1, 1, 8).view(2, 4))
    return student
