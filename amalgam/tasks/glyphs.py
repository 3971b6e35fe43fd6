"""Stand-ins for published image data sets that need no download: glyphs of matplotlib's fonts.

Every image shows one character in one of the faces, under a random affine map, with noise; coloured
ones lie over patches of scikit-learn's sample photographs. Training and validation images are of
the same characters, faces and photographs, and of independent maps, colours, patches and noise. A
stand-in is drawn once, on the CPU in float64, and kept in the cache folder.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from amalgam.digest import digest_of_text
from amalgam.tasks import cache
from amalgam.tasks.task import Batch

_VERSION = 1  # of the drawing: a change of what is drawn changes it
_SIDE = 40  # of the canvas that a glyph is rendered on, in pixels
_EM = 32  # a face's size there, in pixels
_CHUNK = 1000  # images that are drawn together

# The maps, each part of them drawn uniformly.
_TURN = 0.35  # the largest rotation, in radians
_SHEAR = 0.3  # the largest shear
_SHIFT = 0.2  # the largest shift, as a share of half a canvas
_SIZES = 0.8, 1.3  # the smallest and the largest width and height, of their own

_GREEK = (
    *(f"DejaVu{family}" for family in ("Sans", "SansMono", "Serif")),
    *(f"DejaVu{family}-Bold" for family in ("Sans", "SansMono", "Serif")),
    *(f"DejaVu{family}" for family in ("Sans-Oblique", "SansMono-Oblique", "Serif-Italic")),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
)
_LATIN = (*_GREEK, "cmr10", "cmb10", "cmss10", "cmtt10", "cmti10")


@dataclass(frozen=True)
class _StandIn:
    """What a stand-in's images show.

    Attributes:
        characters: One a class, in the order of the labels.
        faces: Names of font files in matplotlib's data folder, without their ending.
        train: Number of training images.
        validation: Number of validation images.
        side: Height and width of an image, in pixels.
        faintest: The least strength of a glyph's ink; the greatest is 1.
        noise: The largest noise of a pixel, as a share of the range of brightness.
        coloured: Whether glyphs of any colour lie over patches of photographs; otherwise they are
            white on black.
    """

    characters: str
    train: int = 60_000
    validation: int = 10_000
    faces: tuple[str, ...] = _LATIN
    side: int = 28
    faintest: float = 0.5
    noise: float = 0.4
    coloured: bool = False


def _coloured(characters: str, train: int, validation: int, **settings: Any) -> _StandIn:
    return _StandIn(characters, train, validation, side=32, coloured=True, **settings)


_STAND_INS = {
    "mnist": _StandIn("0123456789"),
    "fmnist": _StandIn("BCDEFGOPQR", faintest=0.4, noise=0.7),
    "kmnist": _StandIn("AHKMNUVWXY", faintest=0.4, noise=0.6),
    "svhn": _coloured("0123456789", 73_257, 26_032, faintest=0.4, noise=0.1),
    "cifar10": _coloured("abdefghkqt", 50_000, 10_000, faintest=0.15, noise=0.15),
    "cifar100": _coloured(
        "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghkmnqrty"
        "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπσφχψωбгджзилфцчшщъыэюя&#?@%§",
        50_000,
        10_000,
        faces=_GREEK,
        faintest=0.3,
        noise=0.1,
    ),
}


def load(name: str) -> tuple[Batch, Batch]:
    """The stand-in for a published data set, from the cache or drawn anew.

    Args:
        name: The published data set: one of :data:`amalgam.tasks.published.PUBLISHED`.

    Returns:
        Training and validation data: images of type uint8, shape (samples, channels, height,
        width), and labels of type int64, shape (samples,).
    """
    return _load(_STAND_INS[name], name)


# Tasks of one data set share it; another takes its place, for hundreds of megabytes.
@functools.lru_cache(maxsize=1)
def _load(of: _StandIn, name: str) -> tuple[Batch, Batch]:
    drawing = digest_of_text(repr((_VERSION, of, version("matplotlib"))))
    kept = cache.tensors(f"glyphs-{name}-{drawing}", lambda: _drawn(of))
    train, validation = (
        (kept[f"{part}-images"], kept[f"{part}-labels"].long()) for part in ("train", "validation")
    )
    return train, validation


def _drawn(of: _StandIn) -> dict[str, Tensor]:
    """All images and labels, by the names that they have in the cache."""
    glyphs = torch.stack([_rendered(face, of.characters) for face in of.faces], dim=1)
    made = {}
    for seed, (part, count) in enumerate((("train", of.train), ("validation", of.validation))):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(len(of.characters), (count,), generator=generator)
        draw = _coloured_images if of.coloured else _grey_images
        images = [draw(glyphs, chunk, of, generator) for chunk in labels.split(_CHUNK)]
        made[f"{part}-images"] = torch.cat(images)
        made[f"{part}-labels"] = labels.to(torch.uint8)
    return made


def _rendered(face: str, characters: str) -> Tensor:
    """Characters centred on canvases, each pixel's ink in [0, 1]: (characters, side, side)."""
    import matplotlib
    from matplotlib.ft2font import FT2Font, LoadFlags

    font = FT2Font(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"))
    font.set_size(_EM, 72)
    canvases = np.zeros((len(characters), _SIDE, _SIDE))
    for canvas, character in zip(canvases, characters, strict=True):
        font.set_text(character, flags=LoadFlags.NO_HINTING)
        font.draw_glyphs_to_bitmap(antialiased=True)
        glyph = np.asarray(font.get_image())
        inked = [np.flatnonzero(glyph.any(axis)) for axis in (1, 0)]
        glyph = glyph[tuple(slice(where[0], where[-1] + 1) for where in inked)][:_SIDE, :_SIDE]
        height, width = glyph.shape
        top, left = (_SIDE - height) // 2, (_SIDE - width) // 2
        canvas[top : top + height, left : left + width] = glyph / 255
    return torch.from_numpy(canvases)


def _grey_images(
    glyphs: Tensor, labels: Tensor, of: _StandIn, generator: torch.Generator
) -> Tensor:
    """White glyphs on black: uint8, (samples, 1, side, side)."""
    ink = _mapped(glyphs, labels, of, generator) * _strengths(len(labels), of, generator)
    return _bytes(ink, of, generator)


def _coloured_images(
    glyphs: Tensor, labels: Tensor, of: _StandIn, generator: torch.Generator
) -> Tensor:
    """Glyphs of one colour each over patches of photographs: uint8, (samples, 3, side, side)."""
    count, photographs = len(labels), _photographs()
    ink = _mapped(glyphs, labels, of, generator) * _strengths(count, of, generator)
    colours = _uniform((count, 3, 1, 1), generator)
    which, top, left = (
        torch.randint(size, (count,), generator=generator)
        for size in (len(photographs), *(n - of.side + 1 for n in photographs.shape[1:3]))
    )
    within = torch.arange(of.side)
    rows, columns = top[:, None, None] + within[:, None], left[:, None, None] + within
    patches = photographs[which[:, None, None], rows, columns].permute(0, 3, 1, 2)
    return _bytes(patches + ink * (colours - patches), of, generator)


def _strengths(count: int, of: _StandIn, generator: torch.Generator) -> Tensor:
    return of.faintest + (1 - of.faintest) * _uniform((count, 1, 1, 1), generator)


def _bytes(images: Tensor, of: _StandIn, generator: torch.Generator) -> Tensor:
    """Images in [0, 1] with noise, as bytes."""
    noise = of.noise * (_uniform((2, *images.shape), generator).sum(0) - 1)
    return (255 * (images + noise)).round().clamp(0, 255).to(torch.uint8).contiguous()


@functools.cache
def _photographs() -> Tensor:
    """scikit-learn's two, at half their size and in [0, 1]: (2, 213, 320, 3)."""
    from sklearn.datasets import load_sample_images

    both = torch.from_numpy(np.stack(load_sample_images().images)).double() / 255
    halved = functional.avg_pool2d(both.permute(0, 3, 1, 2), 2)
    return halved.permute(0, 2, 3, 1).contiguous()


def _mapped(glyphs: Tensor, labels: Tensor, of: _StandIn, generator: torch.Generator) -> Tensor:
    """Ink in [0, 1] of the labels' characters, each in a face and under a map of its own."""
    count = len(labels)
    faces = torch.randint(glyphs.shape[1], (count,), generator=generator)
    angle, shear, wide, high, across, down = 2 * _uniform((6, count), generator) - 1
    cos, sin = (_TURN * angle).cos(), (_TURN * angle).sin()
    turned = torch.stack([cos, sin, -sin, cos], 1).view(count, 2, 2)
    sheared = torch.eye(2, dtype=torch.float64).repeat(count, 1, 1)
    sheared[:, 0, 1] = _SHEAR * shear
    sizes = torch.stack([_size(wide), _size(high)], 1)[..., None]
    # From a place in the image to one on the canvas, both in [-1, 1].
    shifts = _SHIFT * torch.stack([across, down], 1)[..., None]
    maps = torch.cat([sheared @ turned / sizes, shifts], 2)
    grid = functional.affine_grid(maps, [count, 1, of.side, of.side], align_corners=False)
    return functional.grid_sample(glyphs[labels, faces][:, None], grid, align_corners=False)


def _size(unit: Tensor) -> Tensor:
    """What a glyph's width or height is multiplied by, for one of [-1, 1): log-uniform."""
    least, greatest = _SIZES
    return math.sqrt(least * greatest) * (unit * math.log(greatest / least) / 2).exp()


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Numbers in [0, 1): the same ones on every machine, in float64, where rounding hides it."""
    return torch.rand(shape, generator=generator, dtype=torch.float64)
