"""Image data sets: as published, from a folder, or their stand-ins."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from amalgam.hints import did_you_mean
from amalgam.tasks import glyphs, published
from amalgam.tasks.published import PUBLISHED
from amalgam.tasks.task import Batch


class DataSet(NamedTuple):
    """A data set, and whether it is what its name says.

    Attributes:
        train: Images of type uint8, shape (samples, channels, height, width), and labels of type
            int64, shape (samples,).
        validation: Likewise; the published sets' test images.
        shape: Of an image: channels, height and width.
        classes: The number of classes.
        source: ``"published"``, or ``"glyphs"`` for a stand-in; task names end with it.
    """

    train: Batch
    validation: Batch
    shape: tuple[int, int, int]
    classes: int
    source: str


def load(name: str, data: str | os.PathLike[str] = "auto") -> DataSet:
    """Read a published data set, or take its stand-in.

    Args:
        name: One of :data:`amalgam.tasks.published.PUBLISHED`.
        data: The folder of published data sets, or ``"glyphs"`` for the stand-in. ``"auto"`` takes
            the published one if the folder ``$AMALGAM_DATA`` holds it, else the stand-in.

    Raises:
        ValueError: There is no such data set or folder; or a file of the data set is cut, damaged
            or another one's.
        FileNotFoundError: The folder does not hold the data set, or a part of it is missing.
    """
    if name not in PUBLISHED:
        raise ValueError(
            f"data set must be one of {list(PUBLISHED)}, "
            f"not {name!r}{did_you_mean(name, PUBLISHED)}"
        )
    of = PUBLISHED[name]
    folder = _folder(of, data)
    source = "glyphs" if folder is None else "published"
    train, validation = glyphs.load(name) if folder is None else published.load(name, folder)
    return DataSet(train, validation, of.shape, of.classes, source)


def _folder(of: published.Published, data: str | os.PathLike[str]) -> Path | None:
    """Where to read a data set; nowhere if its stand-in is to be taken."""
    if data == "glyphs":
        return None
    if data != "auto":
        folder = Path(data).expanduser()
        if not folder.is_dir():
            raise ValueError(
                f"data must be 'auto', 'glyphs' or a folder of published data sets, "
                f"not {str(data)!r}, which is no folder"
            )
        return folder.resolve()
    named = os.environ.get("AMALGAM_DATA")
    if not named:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise ValueError(f"AMALGAM_DATA must name a folder, not {named!r}")
    # A broken one is found, too: whoever put it there wants to know.
    return folder.resolve() if of.find(folder) is not None else None
