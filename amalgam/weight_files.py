"""Weights in and out: safetensors files that carry their configuration and provenance.

Nothing is ever unpickled, and a file is written beside its place and renamed into it, so that a
reader sees the old file or the new one whole. Its metadata has a checksum of all that it says; only
files of earlier versions have none.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amalgam import files, hub
from amalgam.hints import did_you_mean

SHIPPED = Path(__file__).parent / "weights"
_SUFFIX = ".safetensors"
_KEY = "amalgam"


def shipped() -> tuple[str, ...]:
    """Names of the students that come with the package."""
    return tuple(sorted(path.stem for path in SHIPPED.glob(f"*{_SUFFIX}")))


def locate(name_or_path: str | os.PathLike[str]) -> Path:
    """The file of a shipped student's name, of a path, or of an address on the Hugging Face hub.

    A shipped name is never a path: ``"./digits"`` is the file of that name.

    Args:
        name_or_path: A name from :func:`shipped`, a path to a ``.safetensors`` file, or an address
            that :func:`amalgam.hub.fetch` takes, which begins with ``hf://``.

    Raises:
        FileNotFoundError: There is no such file.
        MissingExtra: It is on the hub, and huggingface_hub is not installed.
        ValueError: It begins as an address, and is none.
    """
    if str(name_or_path).startswith(hub.SCHEME):
        return hub.fetch(str(name_or_path))
    if str(name_or_path) in shipped():
        return SHIPPED / f"{name_or_path}{_SUFFIX}"
    path = Path(name_or_path)
    if path.is_file():
        return path
    raise FileNotFoundError(
        f"{str(name_or_path)!r} is neither a file nor a student that ships with amalgam; "
        f"those are {list(shipped())}{did_you_mean(name_or_path, shipped())}"
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

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    described = {"kind": kind, "about": about}
    checksum = _checksum(contiguous, _spelled(described))
    # One key: safetensors writes several in an order that changes from run to run.
    metadata = {_KEY: _spelled({**described, "checksum": checksum})}
    with files.whole(path) as beside:
        beside.write_bytes(save(contiguous, metadata))


def _spelled(described: Mapping[str, Any]) -> str:
    """Facts as JSON, in the one spelling that files have."""
    return json.dumps(described, sort_keys=True)


def _checksum(tensors: Mapping[str, Tensor], described: str) -> str:
    """The hexadecimal BLAKE2b digest, of 16 bytes, of tensors on the CPU and what they are."""
    digest = hashlib.blake2b(described.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} does not say what it holds ({error!r})") from error
    if not isinstance(about, dict):
        raise ValueError(f"{str(path)!r} must describe itself with an object, not {about!r}")
    _check(path, tensors, metadata[_KEY], described)
    return tensors, kind, about


def _check(
    path: Path, tensors: Mapping[str, Tensor], spelled: str, described: dict[str, Any]
) -> None:
    """Raise ValueError unless a file's checksum is that of what was read of it.

    Args:
        path: The file, for the error.
        tensors: Its tensors.
        spelled: How its metadata describes them.
        described: The same, read. Files of earlier versions have no checksum.
    """
    if described.keys() == {"kind", "about"}:
        return
    rest = {key: value for key, value in described.items() if key != "checksum"}
    wanted = _checksum(tensors, _spelled(rest))
    if described.get("checksum") != wanted or _spelled(described) != spelled:
        raise ValueError(f"{str(path)!r} does not match its checksum; the file is damaged")
