"""Small optimizees that optimization limits and not data: they serve to meta-train on.

Twelve to meta-train on, and two whose architectures are none of theirs. The images are
scikit-learn's digits, shifted, scaled and noised until there are 21,000; regressions have 10,000
samples, of random networks; the text is the sources of a few modules of Python's standard library,
which depend on Python's version. All else is drawn alike on every machine.
"""

from __future__ import annotations

import argparse
import collections
import functools
import inspect
import textwrap
import tokenize
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from amalgam.hints import did_you_mean
from amalgam.tasks import digits
from amalgam.tasks.networks import convolutions, glorot, mlp
from amalgam.tasks.task import Batch, Task

_SHIFTS = [(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1), (1, -1), (-1, 1)]
_TRAINED, _COPIES = 1400, 15
_SYMBOLS, _CONTEXT, _CHARACTERS = 32, 12, 300_000

Data = tuple[Batch, Batch]


@functools.cache
def _images() -> Data:
    """Training and validation: images (samples, 64) and labels (samples,)."""
    generator = torch.Generator().manual_seed(11)
    pixels, labels = digits.shuffled(generator)
    return (
        (_augmented(pixels[:_TRAINED], _COPIES, generator), labels[:_TRAINED].repeat(_COPIES)),
        (_augmented(pixels[_TRAINED:], 1, generator), labels[_TRAINED:]),
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


def _small_images() -> Data:
    """The images (samples, 16), each pixel the mean of four; and labels."""
    (x, y), (held_out, labels) = _images()
    return (digits.halved(x), y), (digits.halved(held_out), labels)


def _pictures(data: Data) -> Data:
    """Images, for autoencoders: each is its own target."""
    (x, _), (held_out, _) = data
    return (x, x), (held_out, held_out)


def _regression(seed: int, features: int = 12) -> Data:
    """Noisy outputs (samples, 1) of a random network with tanh units."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((10_400, features), generator=generator)
    first = torch.randn((features, 16), generator=generator) / features**0.5
    second = torch.randn((16, 1), generator=generator) / 4
    noise = 0.1 * torch.randn((len(x), 1), generator=generator)
    y = (x @ first).tanh() @ second + noise
    return (x[:10_000], y[:10_000]), (x[10_000:], y[10_000:])


@functools.cache
def _text() -> Data:
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


class _Attention(nn.Module):
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

    def forward(self, symbols: Tensor) -> Tensor:
        """Symbols (samples, places) -> logits (samples, symbols, places)."""
        x = self.embedding(symbols) + self.places
        q, k, v = self.queries_keys_values(self.norm(x)).chunk(3, -1)
        later = q.new_full((_CONTEXT, _CONTEXT), -1e9).triu(1)
        scores = torch.baddbmm(later, q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
        x = x + self.mix(scores.softmax(-1) @ v)
        logits: Tensor = self.head(x).transpose(1, 2)
        return logits


class _Optimizee(NamedTuple):
    """An optimizee, its data and loss, and the batch size that suits it."""

    build: Callable[[], nn.Module]
    data: Callable[[], Data]
    batch_size: int
    loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy


def _squares(
    build: Callable[[], nn.Module], data: Callable[[], Data], batch_size: int
) -> _Optimizee:
    return _Optimizee(build, data, batch_size, functional.mse_loss)


def _mlp(*widths: int, activation: str, normed: bool = False) -> Callable[[], nn.Module]:
    return functools.partial(mlp, widths, activation, normed=normed)


def _initialised(*widths: int, activation: str) -> Callable[[], nn.Module]:
    return lambda: glorot(mlp(widths, activation))


def _pictures_of(data: Callable[[], Data]) -> Callable[[], Data]:
    return lambda: _pictures(data())


_OPTIMIZEES = {
    "mlp-sigmoid": _Optimizee(_initialised(16, 20, 10, activation="sigmoid"), _small_images, 64),
    "mlp-relu-2": _Optimizee(_mlp(16, 16, 16, 10, activation="relu"), _small_images, 64),
    "mlp-tanh": _Optimizee(_mlp(64, 10, 10, activation="tanh"), _images, 16),
    "mlp-relu-3": _Optimizee(
        _initialised(16, 12, 12, 12, 10, activation="relu"), _small_images, 64
    ),
    "mlp-normed": _Optimizee(_mlp(64, 10, 10, activation="gelu", normed=True), _images, 32),
    "cnn": _Optimizee(
        functools.partial(convolutions, 4, 2, "relu", pooling="max", normed=False), _images, 16
    ),
    "autoencoder": _squares(_mlp(64, 8, 64, activation="tanh"), _pictures_of(_images), 32),
    "autoencoder-3": _squares(
        _mlp(16, 12, 4, 12, 16, activation="elu"), _pictures_of(_small_images), 64
    ),
    "regression": _squares(_mlp(12, 24, 1, activation="relu"), lambda: _regression(1), 64),
    "regression-2": _squares(_mlp(12, 16, 16, 1, activation="tanh"), lambda: _regression(2), 32),
    "attention": _Optimizee(functools.partial(_Attention, 8, False), _text, 16),
    "attention-normed": _Optimizee(functools.partial(_Attention, 10, True), _text, 8),
    "deep": _Optimizee(_mlp(16, *[12] * 6, 10, activation="relu"), _small_images, 64),
    "wide": _Optimizee(_mlp(64, 96, 10, activation="relu"), _images, 64),
}

HELD_OUT = ("deep", "wide")
"""A deeper network than any other of :data:`SMALL`, and a wider one."""

SMALL = tuple(name for name in _OPTIMIZEES if name not in HELD_OUT)
"""The optimizees to meta-train on."""


def small(batch_size: int | None = None, optimizee: str = SMALL[0]) -> Task:
    """A small task that optimization limits and not data.

    Args:
        batch_size: Samples per step; where ``None``, what suits the optimizee.
        optimizee: One of :data:`SMALL` or :data:`HELD_OUT`.

    Raises:
        ValueError: There is no such optimizee.
    """
    if optimizee not in _OPTIMIZEES:
        raise ValueError(
            f"optimizee must be one of {list(_OPTIMIZEES)}, "
            f"not {optimizee!r}{did_you_mean(optimizee, _OPTIMIZEES)}"
        )
    build, data, own_size, loss = _OPTIMIZEES[optimizee]
    train, validation = data()
    return Task(
        f"small-{optimizee}",
        build,
        train,
        validation,
        loss=loss,
        batch_size=own_size if batch_size is None else batch_size,
        fast_convolutions=False,
    )
