"""The networks of the paper's tasks, each for images of bytes, of any shape and number of classes.

Kernels are Glorot-uniform and biases zero, as Keras has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from amalgam.tasks.networks import glorot

Shape = tuple[int, int, int]
"""Channels, height and width of an image."""

Network = Callable[[Shape, int], nn.Module]
"""Makes a network for images of a shape and a number of classes."""


class Pixels(nn.Module):
    """From bytes to numbers in [0, 1], so that images are kept as bytes."""

    def forward(self, images: Tensor) -> Tensor:
        """Divide by 255, whatever the dtype and shape; bytes become PyTorch's default dtype."""
        return images / 255


def mlp(*widths: int) -> Network:
    """A perceptron with sigmoids.

    Args:
        widths: Units of each hidden layer.
    """

    def build(shape: Shape, classes: int) -> nn.Module:
        layers: list[nn.Module] = [Pixels(), nn.Flatten()]
        inputs = torch.Size(shape).numel()
        for width in widths:
            layers += [nn.Linear(inputs, width), nn.Sigmoid()]
            inputs = width
        return glorot(nn.Sequential(*layers, nn.Linear(inputs, classes)))

    return build


def convolutions(*layers: tuple[int, int, int] | int, average: bool = False) -> Network:
    """Convolutions without padding, each with a ReLU, and pooling between them.

    Args:
        layers: Each is a convolution's channels, kernel size and stride, or the size of a maximum
            pooling.
        average: Whether the head is a 3 x 3 convolution to the classes, whose probabilities are
            averaged over the image; a linear layer otherwise.
    """

    def build(shape: Shape, classes: int) -> nn.Module:
        parts: list[nn.Module] = [Pixels()]
        channels = shape[0]
        for layer in layers:
            if isinstance(layer, int):
                parts.append(nn.MaxPool2d(layer))
            else:
                parts += [nn.Conv2d(channels, *layer), nn.ReLU()]
                channels = layer[0]
        if average:
            parts += [nn.Conv2d(channels, classes, 3), _MeanProbability()]
        else:
            with torch.no_grad():
                features = nn.Sequential(*parts)(torch.zeros(1, *shape)).numel()
            parts += [nn.Flatten(), nn.Linear(features, classes)]
        return glorot(nn.Sequential(*parts))

    return build


class _MeanProbability(nn.Module):
    """Logs of probabilities that are averaged over an image."""

    def forward(self, logits: Tensor) -> Tensor:
        """Logits (samples, classes, height, width) -> logits (samples, classes)."""
        places = logits.flatten(2).log_softmax(1)
        return places.logsumexp(2) - math.log(places.shape[2])


class _Cell(nn.Module):
    """A cell found by architecture search; :func:`cell`."""

    def __init__(self, shape: Shape, classes: int, channels: int) -> None:
        super().__init__()
        self.pixels = Pixels()
        self.node_0 = _convolved(shape[0], channels)
        self.node_1, self.node_2, self.node_3a, self.node_3b = (
            _convolved(channels, channels) for _ in range(4)
        )
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (samples, channels, height, width) -> logits (samples, classes)."""
        zero = self.node_0(self.pixels(images))
        one = self.node_1(zero)
        # Beyond the edge an average counts nothing, as with the nearest pixel once more.
        average = functional.avg_pool2d(functional.pad(one, (0, 1, 0, 1), "replicate"), 2, 1)
        two = average + self.node_2(zero)
        three = zero + self.node_3b(self.node_3a(one)) + two
        logits: Tensor = self.head(three.mean((2, 3)))
        return logits


def _convolved(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding="same"), nn.ReLU())


def cell(channels: int) -> Network:
    """The paper's cell of architecture search: five 3 x 3 convolutions in four nodes.

    Args:
        channels: Of each node.
    """
    return lambda shape, classes: glorot(_Cell(shape, classes, channels))


class _Block(nn.Module):
    """Two convolutions, each with batch norm and a ReLU, beside a skip."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.convolved = nn.Sequential(*_normed(inputs, outputs), *_normed(outputs, outputs))
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Images (samples, inputs, height, width) -> (samples, outputs, height, width)."""
        sum_: Tensor = self.convolved(x) + self.skip(x)
        return sum_


def _normed(inputs: int, outputs: int) -> list[nn.Module]:
    norm = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01)  # Keras's constants
    return [nn.Conv2d(inputs, outputs, 3, padding=1), norm, nn.ReLU()]


def _resnet(shape: Shape, classes: int, *, depth: int, width: int) -> nn.Module:
    channels = 16
    layers: list[nn.Module] = [Pixels(), *_normed(shape[0], channels)]
    for stage in range(3):
        outputs = 16 * 2**stage * width
        for _ in range((depth - 4) // 6):
            layers.append(_Block(channels, outputs))
            channels = outputs
        if stage < 2:
            layers.append(nn.MaxPool2d(2))
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
    return glorot(nn.Sequential(*layers))


def resnet(depth: int, width: int = 1) -> Network:
    """A residual network of three stages, with batch norm.

    Args:
        depth: Convolutions on the longest way and the head: 6 n + 4.
        width: Channels of the stages, as a multiple of 16, 32 and 64.
    """
    return partial(_resnet, depth=depth, width=width)
