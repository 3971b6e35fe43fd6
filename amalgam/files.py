"""Files that appear whole or not at all, and folders that one process at a time writes to."""

from __future__ import annotations

import contextlib
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_PART = ".part"

_held: set[Path] = set()


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside ``path`` to write to, which takes its place when the block ends well.

    Whoever reads ``path`` sees the old file or the new one, never a part, also after a power cut;
    after an exception the old one stays. Missing folders are made.

    Args:
        path: The file to write.

    Raises:
        ValueError: ``path`` is there and no regular file, such as a folder or a device.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{str(path)!r} is no regular file, and can't be replaced by one")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}{_PART}")
    try:
        yield beside
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
        sync_folder(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last through a power cut, where the system can."""
    # Windows opens no folder, and some network file systems sync none.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def clear_leftovers(folder: Path) -> None:
    """Remove what processes that were killed inside :func:`whole` left in a folder, and below it.

    Call it with the folder :func:`locked`, so that no other process is writing there.
    """
    for left in folder.rglob(f".*{_PART}"):
        left.unlink(missing_ok=True)


@contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other processes from the folder for as long as the block lasts.

    The lock is ``flock``'s, on the file ``.lock`` in the folder. The system gives up the lock of a
    process that ends in any way, so that of a dead process is taken over. On NFS, Linux passes it
    on to the server, and it holds between machines. Where a file system has no locks a warning says
    so, and the block goes on. A block within another one, of the same process, waits for nobody.

    Args:
        folder: The folder; made where missing.

    Raises:
        BlockingIOError: Another process has the lock; the message says which.
    """
    path = Path(folder).resolve() / LOCK
    if path in _held or fcntl is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _acquire(path):
        _held.add(path)
        try:
            yield
        finally:
            _held.discard(path)
            path.unlink(missing_ok=True)


def _acquire(path: Path) -> IO[str]:
    """The open file, locked.

    Raises:
        BlockingIOError: Another process has locked it.
    """
    while True:
        stream = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            holder = stream.read().strip() or "another process"
            stream.close()
            raise BlockingIOError(
                f"{str(path.parent)!r} is in use by {holder}; wait until that ends, or choose "
                f"another folder"
            ) from None
        except OSError as error:
            warnings.warn(
                f"{str(path.parent)!r} can't be locked ({error}); start no second run in it",
                stacklevel=3,
            )
            return stream
        # Its holder may have removed the file between the two calls.
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(stream.fileno()).st_ino:
                break
        stream.close()
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    stream.flush()
    return stream
