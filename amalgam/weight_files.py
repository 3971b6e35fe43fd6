"""Weights in and out: safetensors files that carry their configuration and provenance.

Nothing is ever unpickled, and a file is written beside its place and renamed into it, so that a
reader sees the old file or the new one whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from amalgam import files

SHIPPED = Path(__file__).parent / "weights"
_SUFFIX = ".safetensors"
_KEY = "amalgam"


def shipped() -> tuple[str, ...]:
    """Names of the students that come with the package."""
    return tuple(sorted(path.stem for path in SHIPPED.glob(f"*{_SUFFIX}")))


def locate(name_or_path: str | os.PathLike[str]) -> Path:
    """The file of a shipped student's name, or of a path.

    A shipped name is never a path: ``"./digits"`` is the file of that name.

    Args:
        name_or_path: A name from :func:`shipped`, or a path to a ``.safetensors`` file.

    Raises:
        FileNotFoundError: It is neither.
    """
    if str(name_or_path) in shipped():
        return SHIPPED / f"{name_or_path}{_SUFFIX}"
    path = Path(name_or_path)
    if path.is_file():
        return path
    raise FileNotFoundError(
        f"{str(name_or_path)!r} is neither a file nor a student that ships with amalgam; "
        f"those are {list(shipped())}"
    )


def write(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]
) -> None:
    """Write tensors and what they are to one safetensors file, whole or not at all.

    Args:
        path: Where to; missing folders are made.
        kind: What the file holds, for :func:`read` to check, such as ``"student"``.
        tensors: Tensors by name, on any device.
        about: JSON-serialisable facts that travel in the file's metadata.
    """
    # Imported here, so that `import amalgam` works on a bare machine with a GPU to test.
    from safetensors.torch import save

    # One key: safetensors writes several in an order that changes from run to run.
    metadata = {_KEY: json.dumps({"kind": kind, "about": about}, sort_keys=True)}
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with files.whole(path) as beside:
        beside.write_bytes(save(contiguous, metadata))


def read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write` wrote.

    Args:
        path: The file.
        kind: What it must hold.

    Returns:
        The tensors by name, on the CPU, and the facts.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a safetensors file, is cut short, or holds something else.
    """
    tensors, found, about = read_any(path, f"an amalgam {kind}")
    if found != kind:
        raise ValueError(f"{str(path)!r} must be an amalgam {kind}, but is an amalgam {found}")
    return tensors, about


def read_any(
    path: str | os.PathLike[str], wanted: str
) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """Read what :func:`write` wrote, of whatever kind.

    Args:
        path: The file.
        wanted: What it should hold, for the message where amalgam did not write it.

    Returns:
        The tensors by name, on the CPU, the kind, and the facts.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a safetensors file, is cut short, or is not amalgam's.
    """
    import safetensors

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{str(path)!r} is not a whole safetensors file ({error}); was it cut short?"
        ) from error
    if _KEY not in metadata:
        raise ValueError(
            f"{str(path)!r} must be {wanted}, but is a safetensors file that amalgam did not write"
        )
    try:
        described = json.loads(metadata[_KEY])
        kind, about = described["kind"], described["about"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} does not say what it holds ({error!r})") from error
    if not isinstance(about, dict):
        raise ValueError(f"{str(path)!r} must describe itself with an object, not {about!r}")
    return tensors, kind, about
