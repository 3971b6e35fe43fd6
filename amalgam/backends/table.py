"""The table of tensors by which one launch steps all of them, kept on the device between steps.

A row a tensor: the addresses of its parameter, gradient, m, v, h and c, how many coordinates it
has, the address of how many steps it has taken, and a seed.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from amalgam.operations import kept

COLUMNS = 9
_NUMEL = 6

Row = tuple[int, ...]
Kind = TypeVar("Kind")


def alike(
    tensors: Sequence[Sequence[Tensor]],
    steps: Sequence[Tensor],
    seeds: Sequence[int],
    kind: Callable[[Sequence[Tensor]], Kind],
) -> dict[Kind, list[Row]]:
    """The rows of tensors that are not empty, by kind; each kind takes a launch.

    Args:
        tensors: (param, grad, m, v, h, c) of each, contiguous.
        steps: How many steps each has taken, float32 of shape (), or none; then the address is 0.
        seeds: In [0, 2^32), one each, or none.
        kind: Of such a tuple, what its launch is compiled for.
    """
    rows: dict[Kind, list[Row]] = {}
    for index, group in enumerate(tensors):
        if numel := group[0].numel():
            counter = steps[index].data_ptr() if steps else 0
            row = (*map(Tensor.data_ptr, group), numel, counter, seeds[index] if seeds else 0)
            rows.setdefault(kind(group), []).append(row)
    return rows


def table(rows: tuple[Row, ...], block: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """The rows on the device, the first block of each tensor, and how many blocks there are.

    Kept while tensors stay where they are. A CUDA graph that captures the step has its own, which
    every replay copies from the host again.

    Args:
        rows: As :func:`alike` has them.
        block: How many coordinates a block takes; a tensor begins a new one.
        device: Where.

    Returns:
        Int64 tensors of (rows, COLUMNS) flattened and of (rows,), and the number of blocks.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        values, blocks = _values(rows, block)
        on_device = _held_for_graph(values).to(device, non_blocking=True)
        return *_split(on_device, len(rows)), blocks
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _kept_table(rows, block, device, stream)


# A stream has its own: another one's copy might not have arrived, and would be freed while this
# one reads it.
@functools.lru_cache(maxsize=32)
def _kept_table(
    rows: tuple[Row, ...], block: int, device: torch.device, stream: int
) -> tuple[Tensor, Tensor, int]:
    values, blocks = _values(rows, block)
    if device.type == "cuda":
        spares = _spares.setdefault(len(values), [])
        if len(spares) < SPARES:
            spares.append(torch.empty_like(values, pin_memory=True))
        values = values.pin_memory().to(device, non_blocking=True)
    return *_split(values, len(rows)), blocks


# Pinned memory by size, for captures, which can't pin any.
SPARES = 4
_spares: dict[int, list[Tensor]] = {}
# What graphs copy from that captured a step without an owner. It is kept until the process ends, as
# nothing tells when such a graph is deleted.
_captured: list[Tensor] = []


def _held_for_graph(values: Tensor) -> Tensor:
    """A copy in pinned memory, for the graph that is being captured to copy from at every replay.

    It becomes a spare again when the step's owner, an optimizer, is deleted. A graph must not be
    replayed after that anyway: it would write to state that the optimizer held. Spares are not
    freed, since the last replay may still run; before the next capture writes to one,
    ``torch.cuda.graph`` waits for the device.
    """
    spares = _spares.setdefault(len(values), [])
    held = spares.pop() if spares else torch.empty_like(values, pin_memory=True)
    held.copy_(values)
    owner = kept.owner()
    if owner is None:
        _captured.append(held)
    else:
        weakref.finalize(owner, spares.append, held).atexit = False
    return held


def _values(rows: tuple[Row, ...], block: int) -> tuple[Tensor, int]:
    first_block, blocks = [], 0
    for row in rows:
        first_block.append(blocks)
        blocks += -(-row[_NUMEL] // block)
    return torch.tensor([*(value for row in rows for value in row), *first_block]), blocks


def _split(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    return values[: count * COLUMNS], values[count * COLUMNS :]
