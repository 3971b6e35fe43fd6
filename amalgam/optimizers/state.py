"""What AmalgamatedOptimizer keeps of a parameter: tensors whose shapes begin with the parameter's.

So whoever shards, prunes or moves a parameter can do the same to its state. h and c have the shape
(*S, layers, hidden), or as 8-bit codes (*S, layers, hidden + 1), and lie in memory with S last, as
backends take them. State that was edited, sliced, cast or moved is brought to that again in the
next step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amalgam.operations.cell_codes import decoded, encoded, numbers_of
from amalgam.ops import StudentState
from amalgam.optimizers.sharding import Sharding, sharding_of

NUMBERS = ("step", "pace")
_CELLS = ("h", "c")


def names_of(paced: bool) -> tuple[str, ...]:
    """What is kept of a parameter, by a student with or without a pace."""
    return (*StudentState._fields, *(NUMBERS if paced else NUMBERS[:1]))


class StateFormat(NamedTuple):
    """What the tensors of a parameter's state are to be.

    Attributes:
        shape: The parameter's; of a DTensor, the whole one's.
        device: Of all but the count of steps.
        architecture: The student's layers and hidden units.
        moments: Dtype of m and v.
        cells: Dtype of h and c; int8 for codes.
        home: The device on which steps are counted.
        sharding: How the parameter lies on processes, and so all that is no number; ``None`` where
            it is here as a whole.
        paced: Whether the student has a pace, whose logarithm is kept.
    """

    shape: torch.Size
    device: torch.device
    architecture: tuple[int, int]
    moments: torch.dtype
    cells: torch.dtype
    home: torch.device
    sharding: Sharding | None = None
    paced: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """What is kept."""
        return names_of(self.paced)

    @property
    def numbers(self) -> dict[str, tuple[torch.device, torch.dtype]]:
        """What of it is one number, where, and of which dtype."""
        found = {"step": (self.home, torch.float32)}
        if self.paced:
            wide = torch.float64 if self.moments == torch.float64 else torch.float32
            found["pace"] = (self.device, wide)
        return found

    def initial(self) -> dict[str, Tensor]:
        """The state before the first step: zeros."""
        here = self.shape if self.sharding is None else self.sharding.part_shape(self.shape)

        def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        def cells() -> Tensor:
            return self._whole("h", shape_first(zeros((*self._columns(), *here), self.cells)))

        return {
            **{
                name: torch.zeros((), dtype=dtype, device=where)
                for name, (where, dtype) in self.numbers.items()
            },
            "m": self._whole("m", zeros(here, self.moments)),
            "v": self._whole("v", zeros(here, self.moments)),
            "h": cells(),
            "c": cells(),
        }

    def _columns(self) -> tuple[int, int]:
        """What h and c have of a coordinate: layers, and columns of each."""
        layers, hidden = self.architecture
        return layers, hidden + (self.cells == torch.int8)

    def _whole(self, name: str, part: Tensor) -> Tensor:
        """A tensor of the state, of which this process has this part."""
        if self.sharding is None:
            return part
        own = self._columns() if name in _CELLS else ()
        like = torch.empty((*own, *self.shape), device="meta")
        like = shape_first(like) if name in _CELLS else like
        return self.sharding.whole(part, like.shape, like.stride())

    def fitted(self, entry: Mapping[str, Any], of: Callable[[], str]) -> dict[str, Any]:
        """A parameter's state as it is to be: its own tensors, where they are so already.

        Args:
            entry: The state, perhaps from elsewhere. What is not the student's stays as it is.
            of: Says what messages call the parameter.

        Raises:
            ValueError: A tensor is missing, is none, has another shape, or lies on processes
                otherwise than a parameter can.
        """
        if missing := [name for name in self.names if name not in entry]:
            raise ValueError(f"state of {of()} must hold {list(self.names)}, but lacks {missing}")
        return {name: self._fitted(name, value, of) for name, value in entry.items()}

    def _fitted(self, name: str, value: Any, of: Callable[[], str]) -> Any:
        if name not in self.names:
            return value
        if name in self.numbers:
            where, dtype = self.numbers[name]
            number = torch.as_tensor(value, dtype=dtype, device=where)
            return number if number.dim() == 0 else number.reshape(())
        shape = (*self.shape, *self.architecture) if name in _CELLS else tuple(self.shape)
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        codes = (*shape[:-1], shape[-1] + 1) if name in _CELLS else None
        if found not in (shape, codes):
            wanted = f"{shape}, or as codes {codes}" if codes else shape
            raise ValueError(f"state.{name} of {of()} must have shape {wanted}, not {found}")
        value = value.detach() if value.requires_grad else value
        part = self._part(name, value, of)
        if name in _CELLS:
            placed = self._cells_of(part, found == codes)
        else:
            placed = part.to(self.device, self.moments).contiguous()
        if placed is part and sharding_of(value) == self.sharding:
            return value
        return self._whole(name, placed)

    def _cells_of(self, part: Tensor, are_codes: bool) -> Tensor:
        """Cells as they are to be, from numbers or from codes, which may have been cast."""
        if are_codes and self.cells != torch.int8:
            part = shape_first(decoded(planar(part.to(self.device, torch.int8))))
        elif self.cells == torch.int8 and not are_codes:
            part = shape_first(encoded(planar(part.to(self.device, torch.float32))))
        placed = part.to(self.device, self.cells)
        seen = planar(placed)
        return placed if seen.is_contiguous() else shape_first(seen.contiguous())

    def _part(self, name: str, value: Tensor, of: Callable[[], str]) -> Tensor:
        """What this process has of a tensor of the state."""
        if self.sharding is None:
            if sharding_of(value) is not None:
                raise ValueError(
                    f"state.{name} of {of()} must be a plain tensor, as the parameter is, and not "
                    "a DTensor; torch.distributed.checkpoint, or its get_optimizer_state_dict with "
                    "full_state_dict=True, saves what loads on any number of processes"
                )
            return value
        try:
            return self.sharding.part_of(value)
        except ValueError as error:
            raise ValueError(f"state.{name} of {of()} {error}") from error


def separate_units(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Give every tensor of a state_dict exactly its parameter's shape, by cutting h and c up.

    A hook for :meth:`torch.optim.Optimizer.register_state_dict_post_hook`, for what takes no other
    tensors, as FSDP1's ``optim_state_dict`` does: "h" becomes "h.0.0" and so on, a tensor for each
    layer and unit, which shares the state's memory. What is narrower than float32 becomes that,
    exactly, for FSDP1 takes no integers, and one dtype for all the state of a parameter.
    :class:`AmalgamatedOptimizer` loads either.

    Args:
        optimizer: The optimizer; not used.
        state_dict: As an :class:`AmalgamatedOptimizer` gives it; not changed.

    Returns:
        Another ``state_dict``.
    """
    state = {}
    for key, entry in state_dict["state"].items():
        state[key] = {name: value for name, value in entry.items() if name not in _CELLS}
        state[key] |= {name: _wide(entry[name]) for name in ("m", "v") if name in entry}
        for name in _CELLS:
            cells = _wide(planar(entry[name])) if name in entry else ()
            for layer, units in enumerate(cells):
                state[key] |= {f"{name}.{layer}.{unit}": part for unit, part in enumerate(units)}
    return state_dict | {"state": state}


def _wide(stored: Tensor) -> Tensor:
    """What is stored, as float32 where it is narrower."""
    return stored.float() if stored.dtype == torch.bfloat16 else numbers_of(stored)


def joined_units(entry: Mapping[str, Any], architecture: tuple[int, int]) -> dict[str, Any]:
    """A parameter's state with h and c whole, where :func:`separate_units` has cut them up.

    Args:
        entry: The state; not changed.
        architecture: The student's layers and hidden units.
    """
    layers, hidden = architecture
    joined = dict(entry)
    for name in _CELLS:
        names = [f"{name}.{layer}.{unit}" for layer in range(layers) for unit in range(hidden)]
        if name not in joined and all(part in joined for part in names):
            rows = torch.stack([joined.pop(part) for part in names])
            joined[name] = shape_first(rows.unflatten(0, architecture))
    return joined


def planar(cells: Tensor) -> Tensor:
    """A view (layers, hidden, *S) of h or c, (*S, layers, hidden)."""
    return cells.movedim((-2, -1), (0, 1))


def shape_first(cells: Tensor) -> Tensor:
    """A view (*S, layers, hidden) of h or c, (layers, hidden, *S)."""
    return cells.movedim((0, 1), (-2, -1))
