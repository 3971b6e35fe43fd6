"""scikit-learn's digits: 1,797 grey images of 8 x 8, real data that needs no download."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from amalgam.tasks.networks import glorot
from amalgam.tasks.task import Task

_VALIDATION = 360


def shuffled(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (1797, 64) in [0, 1] and labels (1797,), in an order that a generator draws."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=generator)
    return (torch.from_numpy(images).float() / 16)[order], torch.from_numpy(labels).long()[order]


def halved(images: Tensor) -> Tensor:
    """Images (samples, 64) -> images (samples, 16), each pixel the mean of four."""
    return functional.avg_pool2d(images.view(-1, 1, 8, 8), 2).flatten(1)


@functools.cache
def _data() -> tuple[Tensor, Tensor]:
    """All images and labels, in one fixed order."""
    return shuffled(torch.Generator().manual_seed(0))


def _mlp() -> nn.Module:
    return glorot(nn.Sequential(nn.Linear(64, 20), nn.Sigmoid(), nn.Linear(20, 10)))


def _cnn() -> nn.Module:
    return glorot(
        nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 16, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32, 10),
        )
    )


def _task(name: str, build: Callable[[], nn.Module], batch_size: int) -> Task:
    images, labels = _data()
    return Task(
        name,
        build,
        (images[:-_VALIDATION], labels[:-_VALIDATION]),
        (images[-_VALIDATION:], labels[-_VALIDATION:]),
        batch_size=batch_size,
    )


def digits_mlp(batch_size: int = 128) -> Task:
    """Digits, an MLP 64-20-10 with sigmoids: 1,510 parameters."""
    return _task("digits-mlp", _mlp, batch_size)


def digits_cnn(batch_size: int = 128) -> Task:
    """Digits, two 3 x 3 convolutions (16, 32 channels) and a linear layer: 5,130 parameters."""
    return _task("digits-cnn", _cnn, batch_size)
