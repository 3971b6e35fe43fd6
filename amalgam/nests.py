"""Nests of tensors and numbers: what is in them, and how a file holds them.

A nest is a tensor, a number, a string, ``None``, or a tuple (also a named one), list or dictionary
with string keys of nests. Policies and teachers carry their states in such nests. A file holds
tensors by name alone, so :func:`to_named` gives each tensor a name and writes the structure down,
and :func:`from_named` makes the nest again, to the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

_STRUCTURE = "structure"
_CONTAINERS = {"list": list, "tuple": tuple}


def leaves(nest: Any) -> list[Any]:
    """The tensors and numbers of a nest, from left to right."""
    if isinstance(nest, tuple):
        return [leaf for part in nest for leaf in leaves(part)]
    return [nest]


def tensors(nest: Any) -> list[Tensor]:
    """The tensors of a nest, from left to right."""
    return [leaf for leaf in leaves(nest) if isinstance(leaf, Tensor)]


def bytes_of(nest: Any) -> int:
    """How many bytes the tensors of a nest take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(nest))


def with_tensors(nest: Any, values: Iterable[Tensor]) -> Any:
    """The nest with other tensors in the places of its own; numbers stay.

    Args:
        nest: The nest.
        values: The new tensors, from left to right, one for each tensor of the nest.
    """
    left = iter(values)
    return _map(lambda leaf: next(left) if isinstance(leaf, Tensor) else leaf, nest)


def to_named(nest: Any, *, named_tuples: bool = False) -> dict[str, Tensor]:
    """The tensors of a nest by number, and its structure as JSON in a tensor of bytes.

    Args:
        nest: The nest.
        named_tuples: Whether there may be named tuples in it, which become what they were only by
            :func:`from_named`'s ``like``.

    Raises:
        TypeError: There is something in it that is no part of a nest.
    """
    named: dict[str, Tensor] = {}

    def spelled(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = str(len(named))
            named[name] = value
            return {"tensor": name}
        if type(value) is dict and all(isinstance(key, str) for key in value):
            return {"dict": {key: spelled(item) for key, item in value.items()}}
        if type(value) is list:
            return {"list": [spelled(item) for item in value]}
        if type(value) is tuple or (named_tuples and isinstance(value, tuple)):
            return {"tuple": [spelled(item) for item in value]}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(
            f"a state must be a nest of dictionaries with string keys, lists and tuples, of "
            f"tensors, numbers, strings and None, but holds a {type(value).__name__}"
        )

    structure = json.dumps(spelled(nest)).encode()
    return {**named, _STRUCTURE: torch.tensor(list(structure), dtype=torch.uint8)}


def from_named(named: Mapping[str, Tensor], like: Any = None) -> Any:
    """The nest that :func:`to_named` took apart.

    Args:
        named: What it gave, on any device.
        like: A nest of the same structure, for the types of its tuples; where absent, named tuples
            become plain ones.

    Raises:
        KeyError: A tensor is absent.
        ValueError: The nest has another structure than ``like``.
    """

    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "tensor":
            return named[content]
        if kind == "dict":
            return {key: read(item) for key, item in content.items()}
        return _CONTAINERS[kind](map(read, content))

    nest = read(json.loads(bytes(named[_STRUCTURE].tolist())))
    if like is None:
        return nest
    wanted, found = len(leaves(like)), leaves(nest)
    if len(found) != wanted:
        raise ValueError(f"named must hold a nest of {wanted} leaves, not of {len(found)}")
    left = iter(found)
    return _map(lambda leaf: next(left), like)


def prefixed(prefix: str, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with a prefix and a dot before each name."""
    return {f"{prefix}.{name}": tensor for name, tensor in named.items()}


def under(prefix: str, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix and a dot, by the rest of their names."""
    start = prefix + "."
    return {n.removeprefix(start): t for n, t in named.items() if n.startswith(start)}


def by_number(named: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """The tensors named ``"0.x"``, ``"0.y"``, ``"1.x"`` by number, then by the rest of the name."""
    groups: dict[int, dict[str, Tensor]] = {}
    for name, tensor in named.items():
        number, _, rest = name.partition(".")
        groups.setdefault(int(number), {})[rest] = tensor
    return groups


def _map(change: Callable[[Any], Any], nest: Any) -> Any:
    """The nest with every leaf changed, from left to right."""
    if isinstance(nest, tuple):
        parts = [_map(change, part) for part in nest]
        return type(nest)(*parts) if hasattr(nest, "_fields") else tuple(parts)
    return change(nest)
