"""Data that all draws of the task families share: made once in a process, and never copied.

Each set has :data:`SAMPLES` samples or more, so an epoch of batches of 128 is longer than 2,000
steps. Images are scikit-learn's digits under random affine maps, features are normal numbers, and
text is Python's: sources of its standard library, and the help that ``pydoc`` shows. Text depends
on Python's version. All else is drawn alike on every machine.
"""

from __future__ import annotations

import functools
import importlib.util
import math

import torch
from torch import Tensor
from torch.nn import functional

from amalgam.digest import digest_of
from amalgam.tasks import digits

SAMPLES = 2**18
VALIDATION = 2_048
FEATURES = 48
SYMBOLS = 64
"""How many symbols text has at most."""

_CHUNK = 2**15
_TRAINED = 1_400
_CHARACTERS, _HELD_OUT = 450_000, 40_000

# Of the standard library: large, and in every version of Python since 3.11.
_MODULES = (
    "_pydecimal", "argparse", "ast", "calendar", "codecs", "collections", "configparser",
    "copy", "csv", "datetime", "difflib", "dis", "doctest", "email.message", "enum", "fractions",
    "ftplib", "functools", "gettext", "heapq", "http.client", "imaplib", "inspect", "ipaddress",
    "locale", "logging", "mailbox", "os", "pathlib", "pdb", "pickle", "pickletools", "platform",
    "plistlib", "pprint", "pydoc", "random", "shutil", "smtplib", "socket", "ssl", "statistics",
    "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "tokenize", "trace",
    "traceback", "turtle", "typing", "unittest.mock", "urllib.request", "uuid", "warnings",
    "zipfile",
)  # fmt: skip


@functools.cache
def images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Digits of 8 x 8 pixels: images (SAMPLES, 64) and labels, then images and labels held out.

    Those held out show other originals than those to train on.
    """
    generator = torch.Generator().manual_seed(17)
    pixels, labels = digits.shuffled(generator)

    def drawn(originals: slice, count: int) -> tuple[Tensor, Tensor]:
        shown, its_labels = pixels[originals], labels[originals]
        chosen = torch.randint(len(shown), (count,), generator=generator)
        parts = [_moved(shown[part], generator) for part in chosen.split(_CHUNK)]
        return torch.cat(parts), its_labels[chosen]

    return *drawn(slice(_TRAINED), SAMPLES), *drawn(slice(_TRAINED, None), VALIDATION)


def _moved(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Images (samples, 64) turned, stretched, shifted, brightened and noised, each its own way."""
    count = len(pixels)
    turn, stretch, brightness = (
        spread * torch.randn(count, generator=generator) for spread in (0.2, 0.1, 0.2)
    )
    shift = 0.2 * torch.randn((count, 2), generator=generator)
    cos, sin = stretch.exp() * turn.cos(), stretch.exp() * turn.sin()
    maps = torch.stack((cos, -sin, shift[:, 0], sin, cos, shift[:, 1]), 1).view(-1, 2, 3)
    grid = functional.affine_grid(maps, [count, 1, 8, 8], align_corners=False)
    moved = functional.grid_sample(pixels.view(-1, 1, 8, 8), grid, align_corners=False).flatten(1)
    noise = 0.1 * torch.randn(moved.shape, generator=generator)
    return moved * brightness.exp()[:, None] + noise


@functools.cache
def halved_images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`images`, each pixel the mean of four: images (samples, 16)."""
    x, labels, held_out, its_labels = images()
    return digits.halved(x), labels, digits.halved(held_out), its_labels


@functools.cache
def features() -> Tensor:
    """Standard normal numbers (SAMPLES + VALIDATION, FEATURES); the last samples are held out."""
    generator = torch.Generator().manual_seed(18)
    return torch.randn((SAMPLES + VALIDATION, FEATURES), generator=generator)


@functools.cache
def text(corpus: str, symbols: int) -> Tensor:
    """A text's characters as numbers below ``symbols``, shape (characters,).

    The most frequent characters have numbers of their own, and all others share the last one.

    Args:
        corpus: ``"sources"``, of the standard library, or ``"help"``, of ``pydoc``.
        symbols: How many symbols there are, at most :data:`SYMBOLS`.
    """
    return _ranks(corpus).clamp(max=symbols - 1)


@functools.cache
def _ranks(corpus: str) -> Tensor:
    """For each of a corpus's characters, how many characters are more frequent, below SYMBOLS."""
    characters = (_sources() if corpus == "sources" else _help()).lower()[:_CHARACTERS]
    codes = torch.frombuffer(bytearray(characters.encode("utf-32-le")), dtype=torch.int32).long()
    counts = codes.bincount()
    ranks = torch.empty_like(counts)
    ranks[counts.argsort(descending=True, stable=True)] = torch.arange(len(counts))
    return ranks[codes].clamp(max=SYMBOLS - 1)


def _sources() -> str:
    found = []
    for name in _MODULES:
        spec = importlib.util.find_spec(name)
        source = getattr(spec and spec.loader, "get_source", lambda name: None)(name)
        found.append(source or "")
    return "\n".join(found)


def _help() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def pieces(characters: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Overlapping pieces (samples, length) of a text to train on, and pieces held out: its end."""
    train, held_out = characters[:-_HELD_OUT], characters[-_HELD_OUT:]
    return train.unfold(0, length, 1), held_out.unfold(0, length, math.ceil(_HELD_OUT / VALIDATION))


@functools.cache
def fingerprint(name: str) -> str:
    """A digest of one shared set: ``"digits"``, ``"halves"``, ``"features"`` or a corpus."""
    if name in ("digits", "halves"):
        return digest_of(images() if name == "digits" else halved_images())
    return digest_of([features() if name == "features" else _ranks(name)])
