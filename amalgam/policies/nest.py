"""Nests of tensors and numbers as tensors by name, and back to the same bits and types."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_STRUCTURE = "structure"
_CONTAINERS = {"list": list, "tuple": tuple}


def to_tensors(nest: Any) -> dict[str, Tensor]:
    """The tensors of a nest by number, and its structure as JSON in a tensor of bytes.

    Args:
        nest: Dictionaries with string keys, lists and tuples, of tensors, numbers, strings and
            ``None``.

    Raises:
        TypeError: There is something else in it.
    """
    tensors: dict[str, Tensor] = {}

    def spelled(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = str(len(tensors))
            tensors[name] = value
            return {"tensor": name}
        if type(value) is dict and all(isinstance(key, str) for key in value):
            return {"dict": {key: spelled(item) for key, item in value.items()}}
        if type(value) in _CONTAINERS.values():
            return {type(value).__name__: [spelled(item) for item in value]}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(
            f"a state must be a nest of dictionaries with string keys, lists and tuples, of "
            f"tensors, numbers, strings and None, but holds a {type(value).__name__}"
        )

    structure = json.dumps(spelled(nest)).encode()
    return {**tensors, _STRUCTURE: torch.tensor(list(structure), dtype=torch.uint8)}


def from_tensors(tensors: Mapping[str, Tensor]) -> Any:
    """The nest whose :func:`to_tensors` these are.

    Raises:
        KeyError: A tensor is absent.
    """

    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "dict":
            return {key: read(item) for key, item in content.items()}
        return _CONTAINERS[kind](map(read, content))

    return read(json.loads(bytes(tensors[_STRUCTURE].tolist())))
