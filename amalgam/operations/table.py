"""The table of tensors by which one launch steps all of them, kept on the device between steps.

A row a tensor: the addresses of its parameter, gradient, m, v, h and c, how many coordinates it
has, the address of how many steps it has taken, and a seed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amalgam.operations import kept
from amalgam.operations.student_step_in_place import InPlaceStep

COLUMNS = 9

# Gradients that are made anew in every step tend to alternate between a few places.
LAUNCHES_KEPT = 4

Row = tuple[int, ...]


def addresses(tensors: Iterable[Tensor]) -> list[int]:
    """Where the tensors' memory begins."""
    return list(map(Tensor.data_ptr, tensors))


class Launch(NamedTuple):
    """One launch of a step in place.

    Attributes:
        kind: What it is compiled for.
        table: Int64 (tensors * COLUMNS,), on the device.
        first_block: The first block of each tensor, int64 (tensors,), on the device.
        places: The place of each among the step's, likewise.
        tensors: How many it steps.
        blocks: How many blocks they take together.
    """

    kind: Any
    table: Tensor
    first_block: Tensor
    places: Tensor
    tensors: int
    blocks: int


def launches(
    step: InPlaceStep,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    block: int,
    kind: Callable[[Sequence[Tensor]], Any],
    key: str,
) -> list[Launch]:
    """The launches that a step in place takes, one for all tensors of a kind that are not empty.

    They are kept with the step's tensors until one of these lies elsewhere, and taken again where
    gradients, counts of steps and seeds are those of one of the last steps. A CUDA graph that
    captures the step has tables of its own, which every replay copies from the host.

    Args:
        step: The step.
        params: Its parameters, contiguous.
        grads: Its gradients, contiguous.
        block: How many coordinates a block takes; a tensor begins a new one.
        kind: Of a tuple (param, grad, m, v, h, c), what its launch is compiled for.
        key: Tells apart what backends keep.
    """
    tensors, device = step.tensors, step.tensors.m[0].device
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    # A stream has its own: another one's copy might not have arrived, and would be freed while
    # this one reads it.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    place = key, block, stream
    stamp = (
        *(addresses(params), addresses(grads), addresses(step.steps), step.seeds),
        [grad.dtype for grad in grads],
    )
    kept_before: list[tuple[Any, list[Launch]]] = tensors.made.setdefault(place, [])
    for made_of, made in kept_before if not capturing else ():
        if made_of == stamp:
            return made
    rows: dict[Any, list[tuple[int, Row]]] = {}
    columns = zip(params, grads, tensors.m, tensors.v, tensors.h, tensors.c, strict=True)
    for index, group in enumerate(columns):
        if numel := group[0].numel():
            counter = step.steps[index].data_ptr() if step.steps else 0
            seed = step.seeds[index] if step.seeds else 0
            row = (*addresses(group), numel, counter, seed)
            rows.setdefault(kind(group), []).append((index, row))
    made = [_launch(kind, of_kind, block, device, capturing) for kind, of_kind in rows.items()]
    if not capturing:
        del kept_before[LAUNCHES_KEPT - 1 :]
        kept_before.insert(0, (stamp, made))
    return made


def _launch(
    kind: Any, rows: Sequence[tuple[int, Row]], block: int, device: torch.device, capturing: bool
) -> Launch:
    numel = COLUMNS - 3
    first_block, blocks = [], 0
    for _, row in rows:
        first_block.append(blocks)
        blocks += -(-row[numel] // block)
    places = [place for place, _ in rows]
    numbers = [*(value for _, row in rows for value in row), *first_block, *places]
    values = torch.tensor(numbers, device="cpu")
    if capturing:
        values = _held_for_graph(values).to(device, non_blocking=True)
    elif device.type == "cuda":
        spares = _spares.setdefault(len(values), [])
        if len(spares) < SPARES:
            spares.append(torch.empty_like(values, pin_memory=True))
        values = values.pin_memory().to(device, non_blocking=True)
    count = len(rows)
    of_table, of_blocks, of_places = values.split((count * COLUMNS, count, count))
    return Launch(kind, of_table, of_blocks, of_places, count, blocks)


# Pinned memory by size, for captures, which can't pin any.
SPARES = 4
_spares: dict[int, list[Tensor]] = {}
# What graphs copy from that captured a step without an owner. It is kept until the process ends, as
# nothing tells when such a graph is deleted.
_captured: list[Tensor] = []


def _held_for_graph(values: Tensor) -> Tensor:
    """A copy in pinned memory, for the graph that is being captured to copy from at every replay.

    It becomes a spare again when the step's owner, an optimizer, is deleted. A graph must not be
    replayed after that: it would write to state that the optimizer held, by a table that another
    graph may have. Spares are not freed, since the last replay may still run; before the next
    capture writes to one, ``torch.cuda.graph`` waits for the device, and so must whoever begins a
    capture by hand.
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
