"""Comparisons with what the authors' code computes, which tests/golden holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"


def close(ours: Tensor, theirs: np.ndarray, scale: float | None = None) -> None:
    """Check that they agree within 1e-5 of the array's largest magnitude, or of a scale."""
    expected = torch.from_numpy(theirs).double()
    assert ours.shape == expected.shape
    bound = 1e-5 * (expected.abs().max().item() if scale is None else scale)
    assert (ours - expected).abs().max().item() <= bound


def close_by_coordinate(ours: Tensor, theirs: np.ndarray) -> None:
    """Check that they agree within 1e-5 of each coordinate's largest magnitude.

    Gradients of different coordinates lie decades apart.
    """
    expected = torch.from_numpy(theirs).double()
    assert ours.shape == expected.shape
    assert ((ours - expected).abs() <= 1e-5 * expected.abs().amax(0)).all()


def keras_layout(weight: Tensor) -> Tensor:
    """A weight of an LSTM or a head as Keras has it, and back."""
    return weight.T if weight.dim() == 2 else weight
