"""The nominal student's functional step and its gradients by CUDA; csrc/cuda/student_unroll.h."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amalgam.backends import core, cuda
from amalgam.backends.cuda_weights import pack_nominal
from amalgam.backends.memory import contiguous, with_contiguous_rows
from amalgam.device import read_by_graphs
from amalgam.operations.kept import kept
from amalgam.operations.student_forms import NOMINAL, StepSettings
from amalgam.operations.student_step import StudentState
from amalgam.operations.table import addresses

TILE = 32  # coordinates that a warp computes at a time
FEATURES = NOMINAL.features
# Bytes that the states of an unroll may take; where they would take more, fewer warps share it.
HELD = 3 << 30


@functools.cache
def _units() -> list[int]:
    """The sizes of one layer that are compiled in."""
    units: list[int] = core.core().cuda.unroll_sizes()
    return units


def accepts(*arguments: Any) -> str | None:
    """Why these kernels can't compute an operation, or ``None``; its last arguments tell."""
    state, _weights, settings = arguments[-3:]
    layers, hidden = state.h.shape[-3:-1]
    if settings.form is not NOMINAL:
        return "it computes the nominal form alone functionally; backend='triton' computes either"
    if layers != 1 or hidden not in _units():
        sizes = ", ".join(f"1x{units}" for units in _units())
        return (
            f"it has functional kernels for students of {sizes} (layers x units), this one is "
            f"{layers}x{hidden}; backend='triton' computes any"
        )
    return None


class _Call(NamedTuple):
    """A call as the core takes it, what must be held while it runs, and its sizes."""

    call: Any
    held: Any
    steps: int
    tiles: int
    tensors: int
    hidden: int


@functools.lru_cache(maxsize=256)
def _bounds(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, int]:
    """Each tensor's first tile and coordinate, int64 (2 (tensors + 1),); and how many tiles.

    They are kept: a step's are those of the next, and a copy to the device would wait for it.
    """
    tiles = list(itertools.accumulate((-(-size // TILE) for size in sizes), initial=0))
    begins = itertools.accumulate(sizes, initial=0)
    with torch.inference_mode(False):  # steps outside it read them, too
        return torch.tensor([*tiles, *begins], device=device), tiles[-1]


def _call_of(
    grads: Tensor,
    adjoints: Tensor | None,
    state: StudentState,
    weights: Sequence[Tensor],
    settings: StepSettings,
) -> _Call:
    """Of steps (T, N), whose biases and corrections are each step's, or of one they all share."""
    assert settings.corrections is not None
    n, hidden = grads.shape[1], state.h.shape[1]
    bounds, tiles = read_by_graphs(_bounds(tuple(settings.sizes), grads.device))
    grads, grads_stride = with_contiguous_rows(grads)
    adjoints, adjoints_stride = (None, 0) if adjoints is None else with_contiguous_rows(adjoints)
    weights, dense = contiguous(weights), contiguous(state)
    corrections = settings.corrections.contiguous()
    shared = [*weights[:2], *weights[3:]]
    # Of several students each is another place in the same memory.
    key = "student_step", grads.device, shared[0].storage_offset()
    (packed,) = kept(key, shared, lambda: (pack_nominal(shared, False),))
    call = core.core().cuda.UnrollCall(
        weights=packed.data_ptr(),
        biases=weights[2].data_ptr(),
        corrections=corrections.data_ptr(),
        bounds=bounds.data_ptr(),
        grads=grads.data_ptr(),
        adjoints=0 if adjoints is None else adjoints.data_ptr(),
        grads_stride=grads_stride,
        adjoints_stride=adjoints_stride,
        state=addresses(dense),
        n=n,
        tiles=tiles,
        tensors=len(settings.sizes),
        steps=len(grads),
        constants=settings.constants,
    )
    held = packed, weights, corrections, bounds, grads, adjoints, dense
    return _Call(call, held, len(grads), tiles, len(settings.sizes), hidden)


def step_into(
    update: Tensor,
    new: StudentState,
    grad: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    settings: StepSettings,
) -> None:
    """A step into contiguous memory that is there; the new state may lie where the old one does."""
    made = _call_of(grad[None], None, state, weights, settings)
    with torch.cuda.device(grad.device):
        core.core().cuda.nominal_step(
            made.call,
            made.hidden,
            update=update.data_ptr(),
            new=addresses(new),
            **cuda.place_of(grad),
        )


def backward_into(
    d_state: StudentState,
    d_update: Tensor,
    d_new: StudentState,
    grad: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    settings: StepSettings,
) -> tuple[Tensor, list[Tensor]]:
    """A step's gradients in the state, into memory that is there; those in grad and weights."""
    made = _call_of(grad[None], d_update[None], state, weights, settings)
    d_grad, d_dense = grad.new_empty(grad.shape), contiguous(d_new)
    with torch.cuda.device(grad.device):
        sums, found = _sums(made, grad)
        core.core().cuda.nominal_step_backward(
            made.call,
            made.hidden,
            d_new=addresses(d_dense),
            d_grad=d_grad.data_ptr(),
            d_state=addresses(d_state),
            sums=addresses(sums),
            warps=len(sums[0]),
            found=addresses(found),
            **cuda.place_of(grad),
        )
    d_weights = _unpacked(found, made.hidden)
    return d_grad, [*d_weights[:2], d_weights[2][0], *d_weights[3:]]


def unroll_backward(
    grads: Tensor,
    adjoints: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    settings: StepSettings,
) -> list[Tensor]:
    """The gradients in the weights of many steps' updates, in one pass over coordinates."""
    if not len(grads):
        return [torch.zeros_like(weight) for weight in weights]
    made = _call_of(grads, adjoints, state, weights, settings)
    with torch.cuda.device(grads.device):
        sums, found = _sums(made, grads, with_states=True)
        core.core().cuda.nominal_unroll_backward(
            made.call,
            made.hidden,
            sums=addresses(sums),
            warps=len(sums[0]),
            found=addresses(found),
            **cuda.place_of(grads),
        )
    return _unpacked(found, made.hidden)


def _sums(
    made: _Call, like: Tensor, with_states: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Memory for what warps sum, and for the gradients in weights and biases that come of it."""
    module, gates = core.core().cuda, 4 * made.hidden
    count = module.unroll_sums(made.hidden)
    warps = module.unroll_warps(made.hidden, made.tiles, like.get_device())
    of_warp = made.steps * (2 * made.hidden + 2) * TILE if with_states else 0
    if of_warp:
        warps = min(warps, max(1, HELD // (of_warp * like.element_size())))
    sums = [
        like.new_empty((warps, count), dtype=torch.float64),
        like.new_empty((warps + made.tensors, made.steps, gates), dtype=torch.float64),
        like.new_empty((warps, of_warp)),
    ]
    return sums, [like.new_empty(count), like.new_empty((made.steps, made.tensors, gates))]


def _unpacked(found: Sequence[Tensor], hidden: int) -> list[Tensor]:
    """Gradients as the weights lie; the first bias's of every step."""
    (weights, biases), inputs = found, FEATURES + hidden
    first, head = weights.split((4 * hidden * inputs, len(weights) - 4 * hidden * inputs))
    first, head = first.view(4 * hidden, inputs), head.view(-1, hidden + 1)
    parts = contiguous(
        (first[:, :FEATURES], first[:, FEATURES:], head[:, :hidden], head[:, hidden])
    )
    return [*parts[:2], biases, *parts[2:]]
