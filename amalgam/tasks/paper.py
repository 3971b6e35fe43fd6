"""The tasks of the paper (Optimizer Amalgamation, ICLR 2022, section 5.1 and appendix D).

Every network takes images of bytes and begins by dividing them by 255.
"""

from __future__ import annotations

from torch import Tensor, nn

from amalgam.tasks import glyphs
from amalgam.tasks.digits import glorot
from amalgam.tasks.task import Task


class Pixels(nn.Module):
    """From bytes to numbers in [0, 1], so that images are kept as bytes."""

    def forward(self, images: Tensor) -> Tensor:
        """Divide by 255, whatever the dtype and shape; bytes become PyTorch's default dtype."""
        return images / 255


def _train_cnn() -> nn.Module:
    """3 x 3 and 5 x 5 convolutions (16, 32 channels), each pooled, and a linear layer."""
    return glorot(
        nn.Sequential(
            Pixels(),
            nn.Conv2d(1, 16, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(512, 10),
        )
    )


def train(batch_size: int = 128) -> Task:
    """The task that the paper meta-trains on, "Train": a CNN of 18,122 parameters on digits.

    The digits are MNIST's stand-in, :mod:`amalgam.tasks.glyphs`.

    Args:
        batch_size: Samples per step.
    """
    return Task("train-glyphs", _train_cnn, *glyphs.load("mnist"), batch_size=batch_size)
