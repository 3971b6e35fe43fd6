"""Nests of tuples, tensors and numbers: what is in them, and how a file holds them.

A nest is a tensor, a number, or a tuple (also a named one) of nests. Policies carry their states in
such nests. A file holds tensors by name alone, so :func:`to_named` gives each tensor and each
number a name, and :func:`from_named` makes the nest again, to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


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


def to_named(nest: Any) -> dict[str, Tensor]:
    """The leaves of a nest by their places, ``"0"``, ``"1"``, and so on, numbers as tensors."""
    return {str(place): _as_tensor(leaf) for place, leaf in enumerate(leaves(nest))}


def from_named(named: Mapping[str, Tensor], like: Any) -> Any:
    """The nest that :func:`to_named` took apart.

    Args:
        named: What it gave, on any device.
        like: A nest of the same structure, with numbers where that one has numbers.

    Raises:
        ValueError: The two have different numbers of leaves.
    """
    wanted = len(leaves(like))
    if set(named) != {str(index) for index in range(wanted)}:
        raise ValueError(
            f"named must hold the {wanted} leaves of the nest, '0' and so on, not {sorted(named)}"
        )
    stored = iter([named[str(index)] for index in range(wanted)])

    def read(leaf: Any) -> Any:
        value = next(stored)
        return value if isinstance(leaf, Tensor) else type(leaf)(value.item())

    return _map(read, like)


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


def _as_tensor(leaf: Any) -> Tensor:
    if isinstance(leaf, Tensor):
        return leaf
    return torch.tensor(leaf, dtype=torch.float64 if isinstance(leaf, float) else None)


def _map(change: Callable[[Any], Any], nest: Any) -> Any:
    """The nest with every leaf changed, from left to right."""
    if isinstance(nest, tuple):
        parts = [_map(change, part) for part in nest]
        return type(nest)(*parts) if hasattr(nest, "_fields") else tuple(parts)
    return change(nest)
