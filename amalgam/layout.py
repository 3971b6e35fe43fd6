"""Where the parameters of a module lie in one flat vector."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Layout:
    """Where each parameter of a module lies in one flat vector.

    Args:
        shapes: Shapes by name, in order.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self.shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
        self.sizes = [math.prod(shape) for shape in self.shapes.values()]
        self.numel = sum(self.sizes)
        self._ranks: dict[torch.device, Tensor] = {}
        self._tensor_of: dict[torch.device, Tensor] = {}

    def flatten(self, params: Mapping[str, Tensor]) -> Tensor:
        """Parameters by name -> one vector, shape (numel,)."""
        return torch.cat([params[name].reshape(-1) for name in self.shapes])

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """One vector, shape (numel,) -> views of it by name."""
        parts = flat.split(self.sizes)
        named = zip(self.shapes.items(), parts, strict=True)
        return {name: part.view(shape) for (name, shape), part in named}

    def ranks(self, device: torch.device) -> Tensor:
        """The rank of the parameter that each coordinate belongs to, shape (numel,), int64."""
        if device not in self._ranks:
            ranks = torch.tensor([len(shape) for shape in self.shapes.values()], dtype=torch.int64)
            sizes = torch.tensor(self.sizes, dtype=torch.int64)
            self._ranks[device] = ranks.repeat_interleave(sizes).to(device)
        return self._ranks[device]

    def tensor_of(self, device: torch.device) -> Tensor:
        """The index of the parameter that each coordinate belongs to, shape (numel,), int64."""
        if device not in self._tensor_of:
            sizes = torch.tensor(self.sizes, dtype=torch.int64)
            self._tensor_of[device] = torch.repeat_interleave(sizes).to(device)
        return self._tensor_of[device]
