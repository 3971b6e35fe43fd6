"""Data that take long to compute, kept in a folder between runs.

The folder is ``$AMALGAM_CACHE``, else ``$XDG_CACHE_HOME/amalgam``, else ``~/.cache/amalgam``.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from amalgam import files
from amalgam.digest import digest_of


def folder() -> Path:
    """Where data are kept; it need not exist yet."""
    own = os.environ.get("AMALGAM_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    return (Path(shared) if Path(shared).is_absolute() else Path.home() / ".cache") / "amalgam"


def tensors(key: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors from the cache, or made and put there.

    A file that is damaged, by its own checksum, is made anew. Where none can be written, a warning
    says so, and the tensors are made in every process.

    Args:
        key: The file's name, without its ending; it changes when what is made does.
        make: Makes the tensors, by name.
    """
    path = folder() / f"{key}.safetensors"
    kept = _read(path)
    if kept is not None:
        return kept
    made = dict(make())
    try:
        with files.whole(path) as beside:
            save_file(made, beside, metadata={"checksum": checksum(made)})
    except OSError as error:
        warnings.warn(
            f"{path} can't be kept ({error}); it is made in every run until AMALGAM_CACHE names a "
            f"folder that can be written to",
            stacklevel=2,
        )
    return made


def checksum(of: Mapping[str, Tensor]) -> str:
    """A fingerprint of the tensors, in the order of their names."""
    return digest_of(of[name] for name in sorted(of))


def _read(path: Path) -> dict[str, Tensor] | None:
    """What a file holds; nothing where it is missing or damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            stored = (file.metadata() or {}).get("checksum")
    except (SafetensorError, OSError):
        return None
    return kept if checksum(kept) == stored else None
