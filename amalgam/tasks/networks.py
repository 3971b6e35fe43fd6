"""Small networks, of which task families draw the sizes and small tasks are made.

And the rule by which the paper's optimizees are initialised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "elu": nn.ELU,
}


def glorot(module: nn.Module) -> nn.Module:
    """Initialise linear and convolutional layers by Glorot's rule, their biases to zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


def mlp(widths: Sequence[int], activation: str, *, normed: bool = False) -> nn.Module:
    """A perceptron.

    Args:
        widths: Of the input, the hidden layers and the output.
        activation: Between layers.
        normed: Whether a layer norm comes before each activation.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths[:-1]):
        layers.append(nn.Linear(inputs, outputs))
        if normed:
            layers.append(nn.LayerNorm(outputs))
        layers.append(ACTIVATIONS[activation]())
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


POOLINGS: dict[str, Callable[[], nn.Module]] = {
    "max": lambda: nn.MaxPool2d(2),
    "average": lambda: nn.AvgPool2d(2),
}


def convolutions(
    channels: int, depth: int, activation: str, *, pooling: str, normed: bool
) -> nn.Module:
    """A convolutional network for images (samples, 64) of ten classes.

    Its first layer has ``channels`` kernels of 3 x 3, all others twice as many. A pooling follows
    each of the first two.

    Args:
        channels: Of the first layer.
        depth: Convolutions, 1 or more.
        activation: After each.
        pooling: One of :data:`POOLINGS`.
        normed: Whether a group norm, of one group, comes before each activation.
    """
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    inputs, size = 1, 8
    for index in range(depth):
        outputs = channels if index == 0 else 2 * channels
        layers.append(nn.Conv2d(inputs, outputs, 3, padding=1))
        if normed:
            layers.append(nn.GroupNorm(1, outputs))
        layers.append(ACTIVATIONS[activation]())
        if index < 2:
            layers.append(POOLINGS[pooling]())
            size //= 2
        inputs = outputs
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * size**2, 10))


class Residual(nn.Module):
    """A residual network for images (samples, 64) of ten classes.

    A convolution of stride 2 comes first, then blocks ``x + conv(activation(conv(x)))``, then the
    mean over the places and a linear layer.

    Args:
        channels: Of every convolution.
        blocks: How many blocks.
        activation: In the blocks, and before the mean.
        normed: Whether a group norm, of one group, comes first in each block.
    """

    def __init__(self, channels: int, blocks: int, activation: str, *, normed: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, channels, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *([nn.GroupNorm(1, channels)] if normed else []),
                nn.Conv2d(channels, channels, 3, padding=1),
                ACTIVATIONS[activation](),
                nn.Conv2d(channels, channels, 3, padding=1),
            )
            for _ in range(blocks)
        )
        self.activation = ACTIVATIONS[activation]()
        self.head = nn.Linear(channels, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images (samples, 64) -> logits (samples, 10)."""
        x = self.first(images.unflatten(1, (1, 8, 8)))
        for block in self.blocks:
            x = x + block(x)
        logits: Tensor = self.head(self.activation(x).mean((2, 3)))
        return logits


class Attention(nn.Module):
    """A character model: embeddings, blocks of causal attention and of an MLP, and a head.

    Args:
        width: Of its residual stream.
        blocks: How many blocks.
        heads: Attention heads, a divisor of ``width``.
        symbols: How many symbols there are.
        context: The largest number of places.
        activation: In the blocks' MLPs, which are twice as wide as the stream.
        normed: Whether a layer norm comes before each attention and each MLP.
    """

    def __init__(
        self,
        width: int,
        blocks: int,
        heads: int,
        *,
        symbols: int,
        context: int,
        activation: str,
        normed: bool,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, width)
        self.places = nn.Parameter(0.1 * torch.randn(context, width))
        self.attentions = nn.ModuleList(_CausalAttention(width, heads) for _ in range(blocks))
        self.mlps = nn.ModuleList(mlp([width, 2 * width, width], activation) for _ in range(blocks))
        self.norms = nn.ModuleList(
            nn.LayerNorm(width) if normed else nn.Identity() for _ in range(2 * blocks)
        )
        self.head = nn.Linear(width, symbols)

    def forward(self, symbols: Tensor) -> Tensor:
        """Symbols (samples, places) -> logits (samples, symbols, places)."""
        x = self.embedding(symbols) + self.places[: symbols.shape[1]]
        for index, (attention, layers) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            x = x + attention(self.norms[2 * index](x))
            x = x + layers(self.norms[2 * index + 1](x))
        logits: Tensor = self.head(x).transpose(1, 2)
        return logits


class _CausalAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The stream (samples, places, width) -> what to add to it."""
        parts = self.queries_keys_values(x).unflatten(-1, (3 * self.heads, -1)).transpose(-3, -2)
        q, k, v = parts.chunk(3, -3)
        places = x.shape[-2]
        later = q.new_full((places, places), -1e9).triu(1)
        # Not scaled_dot_product_attention, whose fast forms have no second derivative.
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + later
        mixed: Tensor = self.mix((scores.softmax(-1) @ v).transpose(-3, -2).flatten(-2))
        return mixed


class GRU(nn.Module):
    """A character model: embeddings, layers of gated recurrent units, and a head.

    Args:
        width: Units of each layer, and numbers in an embedding.
        layers: How many layers.
        symbols: How many symbols there are.
    """

    def __init__(self, width: int, layers: int, *, symbols: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, width)
        self.of_input = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.of_state = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.head = nn.Linear(width, symbols)

    def forward(self, symbols: Tensor) -> Tensor:
        """Symbols (samples, places) -> logits (samples, symbols, places)."""
        x = self.embedding(symbols)
        # Not nn.GRU, whose form on GPUs has no second derivative.
        for of_input, of_state in zip(self.of_input, self.of_state, strict=True):
            state, states = torch.zeros_like(x[:, 0]), []
            for given in of_input(x).unbind(1):
                reset, update, new = given.chunk(3, -1)
                reset_of, update_of, new_of = of_state(state).chunk(3, -1)
                candidate = (new + (reset + reset_of).sigmoid() * new_of).tanh()
                kept = (update + update_of).sigmoid()
                state = candidate + kept * (state - candidate)
                states.append(state)
            x = torch.stack(states, 1)
        logits: Tensor = self.head(x).transpose(1, 2)
        return logits


class Factors(nn.Module):
    """A bilinear form ``x' U C ... V' z``, its matrix given by two or more factors.

    Args:
        rank: Columns of the outer factors; the inner ones are square.
        rows: Features of ``x``.
        columns: Features of ``z``.
        factors: How many factors, 2 or more.
    """

    def __init__(self, rank: int, rows: int, columns: int, factors: int) -> None:
        super().__init__()
        self.left = nn.Linear(rows, rank, bias=False)
        self.inner = nn.ModuleList(nn.Linear(rank, rank, bias=False) for _ in range(factors - 2))
        self.right = nn.Linear(columns, rank, bias=False)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Features (samples, rows) and (samples, columns) -> values (samples,)."""
        x = self.left(x)
        for factor in self.inner:
            x = factor(x)
        value: Tensor = (x * self.right(z)).sum(-1)
        return value
