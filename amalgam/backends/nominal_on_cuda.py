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
    if state.h.dim() == 4 and len(state.h) > core.core().cuda.most_students:
        most = core.core().cuda.most_students
        return f"it steps at most {most} students at once, not {len(state.h)}"
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
    students: int
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
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    settings: StepSettings,
) -> _Call:
    """Of steps (S, T, N) of S students, whose biases and corrections are each step's.

    All else has a first dimension of S, too, and follows it as ``student_step`` has it.
    """
    assert settings.corrections is not None
    students, steps, n = grads.shape
    assert students == 1 or steps == 1
    hidden = state[2].shape[2]
    bounds, tiles = read_by_graphs(_bounds(tuple(settings.sizes), grads.device))
    grads, grads_stride = _with_rows(grads)
    adjoints, adjoints_stride = (None, 0) if adjoints is None else _with_rows(adjoints)
    weights, dense = contiguous(weights), contiguous(state)
    corrections = settings.corrections.contiguous()
    shared = [*weights[:2], *weights[3:]]
    key = "student_step", grads.device, students
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
        steps=steps,
        students=students,
        constants=settings.constants,
    )
    held = packed, weights, corrections, bounds, grads, adjoints, dense
    return _Call(call, held, students, steps, tiles, len(settings.sizes), hidden)


def _with_rows(steps: Tensor) -> tuple[Tensor, int]:
    """Steps (S, T, N) as kernels read them, and the stride from step to step.

    Those of one student lie where they lie, if each is contiguous.
    """
    if len(steps) > 1:
        return steps.contiguous(), steps.shape[2]
    rows, stride = with_contiguous_rows(steps[0])
    return rows[None], stride


def step(
    results: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    settings: StepSettings,
) -> None:
    """A step of S students in one launch.

    Args:
        results: Get the updates (S, N) and the new states; contiguous. The new states may lie
            where the old ones do.
        inputs: The gradients (S, N) and the states.
        weights: The weights, likewise.
        settings: The students' constants.
    """
    grad, *state = inputs
    made = _call_of(grad[:, None], None, state, weights, settings)
    with torch.cuda.device(grad.device):
        core.core().cuda.nominal_step(
            made.call,
            made.hidden,
            update=results[0].data_ptr(),
            new=addresses(results[1:]),
            **cuda.place_of(grad),
        )


def step_backward(
    results: Sequence[Tensor],
    grads_out: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    settings: StepSettings,
) -> list[Tensor]:
    """The gradients of S students' step in two launches.

    Args:
        results: Get those in the gradients (S, N) and in the states; contiguous.
        grads_out: Those in the updates (S, N) and in the new states; the latter may be results.
        inputs: The gradients and the states, as in :func:`step`, like all that follows.
        weights: The weights.
        settings: The students' constants.

    Returns:
        Those in the weights.
    """
    (grad, *state), (d_update, *d_new) = inputs, grads_out
    made = _call_of(grad[:, None], d_update[:, None], state, weights, settings)
    d_dense = contiguous(d_new)
    with torch.cuda.device(grad.device):
        sums, found = _sums(made, grad)
        core.core().cuda.nominal_step_backward(
            made.call,
            made.hidden,
            d_new=addresses(d_dense),
            d_grad=results[0].data_ptr(),
            d_state=addresses(results[1:]),
            sums=addresses(sums),
            warps=sums[0].shape[1],
            found=addresses(found),
            **cuda.place_of(grad),
        )
    d_weights = _unpacked(found, made.hidden)
    return [*d_weights[:2], d_weights[2][:, 0], *d_weights[3:]]


def unroll_backward(
    grads: Tensor,
    adjoints: Tensor,
    state: StudentState,
    weights: Sequence[Tensor],
    settings: StepSettings,
) -> list[Tensor]:
    """The gradients in a student's weights of many steps' updates, in one pass over coordinates."""
    if not len(grads):
        return [torch.zeros_like(weight) for weight in weights]
    assert settings.corrections is not None
    one = (
        [weight[None] for weight in weights],
        settings._replace(corrections=settings.corrections[None]),
    )
    made = _call_of(grads[None], adjoints[None], [tensor[None] for tensor in state], *one)
    with torch.cuda.device(grads.device):
        sums, found = _sums(made, grads, with_states=True)
        core.core().cuda.nominal_unroll_backward(
            made.call,
            made.hidden,
            sums=addresses(sums),
            warps=sums[0].shape[1],
            found=addresses(found),
            **cuda.place_of(grads),
        )
    return [weight[0] for weight in _unpacked(found, made.hidden)]


def _sums(
    made: _Call, like: Tensor, with_states: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Memory for what warps sum, and for the gradients in weights and biases that come of it."""
    module, gates, students = core.core().cuda, 4 * made.hidden, made.students
    count = module.unroll_sums(made.hidden)
    # As many as alone, though many students then need as many times the memory: so a student's
    # sums are the same however many there are.
    warps = module.unroll_warps(made.hidden, made.tiles, like.get_device())
    of_warp = made.steps * (2 * made.hidden + 2) * TILE if with_states else 0
    if of_warp:
        warps = min(warps, max(1, HELD // (of_warp * like.element_size())))
    sums = [
        like.new_empty((students, warps, count), dtype=torch.float64),
        like.new_empty((students, warps + made.tensors, made.steps, gates), dtype=torch.float64),
        like.new_empty((warps, of_warp)),
    ]
    found = [
        like.new_empty((students, count)),
        like.new_empty((students, made.steps, made.tensors, gates)),
    ]
    return sums, found


def _unpacked(found: Sequence[Tensor], hidden: int) -> list[Tensor]:
    """Gradients as students' weights lie; the first bias's of every step."""
    (weights, biases), inputs = found, FEATURES + hidden
    students, gates = len(weights), 4 * hidden * inputs
    first, head = weights.split((gates, weights.shape[1] - gates), 1)
    first = first.reshape(students, 4 * hidden, inputs)
    head = head.reshape(students, -1, hidden + 1)
    parts = contiguous(
        (first[..., :FEATURES], first[..., FEATURES:], head[..., :hidden], head[..., hidden])
    )
    return [*parts[:2], biases, *parts[2:]]
