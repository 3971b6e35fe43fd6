"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside ``path`` to write to, which takes its place when the block ends well.

    Whoever reads ``path`` sees the old file or the new one, never a part; after an exception the
    old one stays. Missing folders are made.

    Args:
        path: The file to write.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def clear_leftovers(path: str | os.PathLike[str]) -> None:
    """Remove what a process that was killed inside :func:`whole` left beside ``path``."""
    path = Path(path)
    for left in path.parent.glob(f".{path.name}.*"):
        left.unlink()
