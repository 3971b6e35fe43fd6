"""Small tasks that optimization limits, for ``bench/ablations.py``.

Twelve to meta-train on, and two whose architectures are none of theirs. The images are
scikit-learn's digits, shifted, scaled and noised until there are 21,000; regressions have 10,000
samples, of random networks; the text is the sources of a few modules of Python's standard library,
which depend on Python's version. All else is the same on every machine.
"""

from __future__ import annotations

import argparse
import collections
import functools
import inspect
import textwrap
import tokenize
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from amalgam.tasks import Batch, Task
from amalgam.tasks.digits import glorot

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "elu": nn.ELU,
}
_SHIFTS = [(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1), (1, -1), (-1, 1)]
_TRAINED, _COPIES = 1400, 15
_SYMBOLS, _CONTEXT, _CHARACTERS = 32, 12, 300_000

Data = tuple[Batch, Batch]


@functools.cache
def images() -> Data:
    """Training and validation: images (samples, 64) and labels (samples,)."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    pixels, labels = torch.from_numpy(x).float() / 16, torch.from_numpy(y).long()
    generator = torch.Generator().manual_seed(11)
    order = torch.randperm(len(labels), generator=generator)
    train, validation = order[:_TRAINED], order[_TRAINED:]
    return (
        (_augmented(pixels[train], _COPIES, generator), labels[train].repeat(_COPIES)),
        (_augmented(pixels[validation], 1, generator), labels[validation]),
    )


def _augmented(pixels: Tensor, copies: int, generator: torch.Generator) -> Tensor:
    """So many copies of images (samples, 64), one after another's, each its own way changed."""
    image = pixels.repeat(copies, 1).view(-1, 8, 8)
    shifted = torch.stack([image.roll(shift, (1, 2)) for shift in _SHIFTS])
    chosen = torch.randint(len(_SHIFTS), (len(image),), generator=generator)
    image = shifted[chosen, torch.arange(len(image))]
    brightness = 1 + 0.2 * torch.randn((len(image), 1, 1), generator=generator)
    noise = 0.1 * torch.randn(image.shape, generator=generator)
    return (image * brightness + noise).view(-1, 64)


def small_images() -> Data:
    """The images (samples, 16), each pixel the mean of four; and labels."""
    (x, y), (held_out, labels) = images()

    def halved(pixels: Tensor) -> Tensor:
        return functional.avg_pool2d(pixels.view(-1, 1, 8, 8), 2).view(-1, 16)

    return (halved(x), y), (halved(held_out), labels)


def pictures(data: Data) -> Data:
    """Images, for autoencoders: each is its own target."""
    (x, _), (held_out, _) = data
    return (x, x), (held_out, held_out)


def regression(seed: int, features: int = 12) -> Data:
    """Noisy outputs (samples, 1) of a random network with tanh units."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((10_400, features), generator=generator)
    first = torch.randn((features, 16), generator=generator) / features**0.5
    second = torch.randn((16, 1), generator=generator) / 4
    noise = 0.1 * torch.randn((len(x), 1), generator=generator)
    y = (x @ first).tanh() @ second + noise
    return (x[:10_000], y[:10_000]), (x[10_000:], y[10_000:])


@functools.cache
def text() -> Data:
    """Pieces of text and what follows each character, (samples, 12) each, of 32 symbols.

    The last symbol stands for every character that is none of the 31 most frequent ones.
    """
    modules = (argparse, tokenize, inspect, textwrap, functools, collections)
    characters = "".join(inspect.getsource(module) for module in modules).lower()[:_CHARACTERS]
    frequent = [c for c, _ in collections.Counter(characters).most_common(_SYMBOLS - 1)]
    number = {c: index for index, c in enumerate(frequent)}
    symbols = torch.tensor([number.get(c, _SYMBOLS - 1) for c in characters])
    pieces = symbols.unfold(0, _CONTEXT + 1, _CONTEXT + 1)
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(5))
    x, y = pieces[order, :-1], pieces[order, 1:]
    return (x[300:], y[300:]), (x[:300], y[:300])


def mlp(
    widths: Sequence[int], activation: str, *, initialised: bool = False, normed: bool = False
) -> Callable[[], nn.Module]:
    """What builds a network of these widths.

    Args:
        widths: Of the input, the hidden layers and the output.
        activation: Between layers.
        initialised: Whether weights are Glorot's and biases zero; torch's otherwise.
        normed: Whether a layer norm comes before each activation.
    """

    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths[:-1]):
            layers.append(nn.Linear(inputs, outputs))
            if normed:
                layers.append(nn.LayerNorm(outputs))
            layers.append(_ACTIVATIONS[activation]())
        module = nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))
        return glorot(module) if initialised else module

    return build


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


class Attention(nn.Module):
    """Characters' embeddings, a block of causal attention and a head.

    Args:
        width: Of its residual stream.
        normed: Whether a layer norm comes before the attention.
    """

    def __init__(self, width: int, normed: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_SYMBOLS, width)
        self.places = nn.Parameter(0.02 * torch.randn(_CONTEXT, width))
        self.norm = nn.LayerNorm(width) if normed else nn.Identity()
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, _SYMBOLS)
        self._later = torch.full((_CONTEXT, _CONTEXT), -1e9).triu(1)

    def forward(self, symbols: Tensor) -> Tensor:
        """Symbols (samples, places) -> logits (samples, symbols, places)."""
        x = self.embedding(symbols) + self.places
        q, k, v = self.queries_keys_values(self.norm(x)).chunk(3, -1)
        scores = torch.baddbmm(self._later, q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
        x = x + self.mix(scores.softmax(-1) @ v)
        logits: Tensor = self.head(x).transpose(1, 2)
        return logits


def trained_on() -> list[Task]:
    """The twelve tasks to meta-train on."""
    large, small, mse = images(), small_images(), functional.mse_loss

    def glorots(*widths: int, activation: str) -> Callable[[], nn.Module]:
        return mlp(widths, activation, initialised=True)

    return [
        Task("mlp-sigmoid", glorots(16, 20, 10, activation="sigmoid"), *small, batch_size=64),
        Task("mlp-relu-2", mlp([16, 16, 16, 10], "relu"), *small, batch_size=64),
        Task("mlp-tanh", mlp([64, 10, 10], "tanh"), *large, batch_size=16),
        Task("mlp-relu-3", glorots(16, 12, 12, 12, 10, activation="relu"), *small, batch_size=64),
        Task("mlp-normed", mlp([64, 10, 10], "gelu", normed=True), *large, batch_size=32),
        Task("cnn", cnn, *large, batch_size=16, fast_convolutions=False),
        Task("autoencoder", mlp([64, 8, 64], "tanh"), *pictures(large), loss=mse, batch_size=32),
        Task(
            "autoencoder-3",
            mlp([16, 12, 4, 12, 16], "elu"),
            *pictures(small),
            loss=mse,
            batch_size=64,
        ),
        Task("regression", mlp([12, 24, 1], "relu"), *regression(1), loss=mse, batch_size=64),
        Task("regression-2", mlp([12, 16, 16, 1], "tanh"), *regression(2), loss=mse, batch_size=32),
        Task("attention", functools.partial(Attention, 8, False), *text(), batch_size=16),
        Task("attention-normed", functools.partial(Attention, 10, True), *text(), batch_size=8),
    ]


def held_out() -> list[Task]:
    """A deeper network than any meta-trained on, and a wider one."""
    return [
        Task("deep", mlp([16, *[12] * 6, 10], "relu"), *small_images(), batch_size=64),
        Task("wide", mlp([64, 96, 10], "relu"), *images(), batch_size=64),
    ]
