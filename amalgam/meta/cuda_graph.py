"""A window and its meta-gradient as one CUDA graph.

Some hundred small kernels make an inner step, and launching each takes longer than running it. A
graph launches those of a whole window at once. A capture takes about as long as a window, and the
first window of a shape compiles kernels and fills caches; so it waits until :data:`BEFORE` windows
of a shape have come, which in an episode of few windows they never do. All that differs from
window to window (trajectories, batches, weights, conditions) is copied to where the graph reads it,
and what it gives is copied from where it writes.

A window as a graph is a trusting one (:mod:`amalgam.meta.window`). If anything in it should have
been skipped, it is run again without a graph.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Any, ClassVar, NamedTuple, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from amalgam import nests
from amalgam.device import graph_reads
from amalgam.meta.episode import Episodes
from amalgam.meta.window import Gradient, WindowInputs, trusting_gradient
from amalgam.tasks.task import Batches

_log = logging.getLogger(__name__)

BEFORE = 3
"""How many windows of a shape run without a graph before one is captured."""


class Graph(Protocol):
    """Work of a device that is captured once and then replayed."""

    def capture(self) -> AbstractContextManager[None]:
        """Within the block, what is asked of the device is captured and not done."""

    def replay(self) -> None:
        """Do what was captured, with what its tensors hold now."""


class CudaGraph:
    """A CUDA graph; those of a device share memory, as none is replayed beside another.

    Args:
        device: The GPU.
    """

    # Those that can be replayed. Memory that no graph is left to hold takes no further one.
    _captured: ClassVar[WeakSet[CudaGraph]] = WeakSet()

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph = torch.cuda.CUDAGraph()

    @contextmanager
    def capture(self) -> Iterator[None]:
        """See :class:`Graph`."""
        with torch.cuda.device(self._device):
            before = torch.cuda.current_stream(self._device)
            others = (graph for graph in self._captured if graph._device == self._device)
            beside = next(others, None)
            pool = None if beside is None else beside._graph.pool()
            stream = torch.cuda.Stream(self._device)
            try:
                with torch.cuda.graph(self._graph, pool=pool, stream=stream):
                    yield
            finally:
                # A capture that fails leaves its own stream the current one.
                torch.cuda.set_stream(before)
            self._captured.add(self)

    def replay(self) -> None:
        """See :class:`Graph`."""
        with torch.cuda.device(self._device):
            self._graph.replay()


class _Captured(NamedTuple):
    """A graph, where it reads and where it writes.

    Attributes:
        graph: The graph.
        inputs: Copies of what differs from window to window.
        reads: What else it reads: the data that batches are gathered from, and what caches gave.
        gradient: What it gives.
    """

    graph: Graph
    inputs: list[Tensor]
    reads: list[Any]
    gradient: Gradient


class WindowGraphs:
    """The graphs of one engine's windows, one for each shape of a window.

    Args:
        episodes: The engine. It is not kept, as it keeps this.
        make: Makes a graph of a device.

    Attributes:
        obstacle: Why windows run without a graph; ``None`` where they may run as one.
    """

    def __init__(
        self, episodes: Episodes, make: Callable[[torch.device], Graph] = CudaGraph
    ) -> None:
        self._make = make
        self._came: Counter[Any] = Counter()
        self._captured: dict[Any, _Captured] = {}
        self.obstacle = _obstacle(episodes)

    def meta_gradient(
        self, episodes: Episodes, given: WindowInputs, coefficients: Tensor
    ) -> Gradient | None:
        """As :func:`amalgam.meta.window.meta_gradient`, by a graph.

        Returns:
            What it gives, or ``None`` where that has to be computed without a graph: the first
            :data:`BEFORE` times that a window of this shape comes, where something has to be
            skipped, where noise is added to the gradients that students see or teachers have a part
            in the steps, and wherever there is an obstacle.
        """
        if self.obstacle is not None or not episodes.trusting:
            return None
        if given.input_noise or (given.teaching and given.teaching.fade):
            return None
        nest = _nest(given, coefficients)
        shapes: Any = ((t.shape, t.dtype) for t in nests.tensors(nest))
        key = nests.with_tensors(nest, shapes), given.noise is not None
        self._came[key] += 1
        if self._came[key] <= BEFORE:
            return None
        nest = nest, _noise_of_all_steps(given)
        inputs = nests.tensors(nest)
        captured = self._captured.get(key)
        if captured is None:
            try:
                captured = self._captured[key] = self._capture(episodes, given, nest, inputs)
            except Exception as error:
                # What ends a capture that went wrong raises an error of its own.
                cause = error.__context__ or error
                self.obstacle = f"it could not be captured: {str(cause).partition(chr(10))[0]}"
                name = episodes.task.name
                _log.warning("windows of task %r run without a CUDA graph: %s", name, self.obstacle)
                return None
        else:
            with torch.no_grad():
                torch._foreach_copy_(captured.inputs, inputs)
        captured.graph.replay()
        if captured.gradient.wrong.item():
            episodes.trusting = False
            return None
        return _copied(captured.gradient)

    def _capture(
        self, episodes: Episodes, given: WindowInputs, nest: Any, inputs: Sequence[Tensor]
    ) -> _Captured:
        own = [tensor.clone(memory_format=torch.contiguous_format) for tensor in inputs]
        like, coefficients = _given(given, nests.with_tensors(nest, own))
        for weight in chain.from_iterable(like.weights):
            weight.requires_grad_(_wants_gradients(given))
        graph, reads = self._make(episodes.task.device), [like]
        with episodes.steps.apart(), graph_reads(reads), graph.capture():
            gradient = trusting_gradient(episodes, like, coefficients)
        return _Captured(graph, own, reads, gradient)


def _obstacle(episodes: Episodes) -> str | None:
    if not episodes.amalgamation.cuda_graph:
        return "the settings have cuda_graph=False"
    if not episodes.may_trust:
        return "the student or a teacher is none whose steps this package's kernels take"
    if episodes.task.draws_random_numbers:
        return f"optimizees of task {episodes.task.name!r} draw random numbers"
    return None


def _wants_gradients(given: WindowInputs) -> bool:
    weights = chain.from_iterable(given.weights)
    return torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)


def _nest(given: WindowInputs, coefficients: Tensor) -> tuple[Any, ...]:
    """All that a window depends on, as a nest."""
    return (
        given.begin,
        _of_batches(given.batches),
        tuple(tuple(w.detach() for w in weights) for weights in given.weights),
        given.conditions,
        given.teaching,
        None if given.held_out is None else _of_batches(given.held_out),
        _wants_gradients(given),
        coefficients,
    )


def _given(like: WindowInputs, nest: tuple[Any, ...]) -> tuple[WindowInputs, Tensor]:
    """What :func:`_nest` was made of, with what :func:`_noise_of_all_steps` gave beside it."""
    (begin, batches, weights, conditions, teaching, held_out, _, coefficients), noise = nest
    given = like._replace(
        begin=begin,
        batches=_with_tensors(like.batches, batches),
        weights=weights,
        noise=noise and (lambda step: [[of[step] for of in ours] for ours in noise]),
        conditions=conditions,
        teaching=teaching,
        held_out=None if like.held_out is None else _with_tensors(like.held_out, held_out),
    )
    return given, coefficients


@torch.no_grad()
def _noise_of_all_steps(given: WindowInputs) -> tuple[tuple[Tensor, ...], ...] | None:
    """What is added to each student's weights, of all steps, each tensor (T, ...)."""
    if given.noise is None:
        return None
    drawn = [given.noise(step) for step in range(len(given.batches))]
    students = range(len(given.weights))
    return tuple(
        tuple(map(torch.stack, zip(*(of[s] for of in drawn), strict=True))) for s in students
    )


def _of_batches(batches: Sequence[Any]) -> tuple[Any, ...]:
    if not isinstance(batches, Batches):
        return tuple(map(tuple, batches))
    return batches.chosen, tuple(tensor.data_ptr() for tensor in batches.data)


def _with_tensors(batches: Sequence[Any], tensors: tuple[Any, ...]) -> Sequence[Any]:
    return batches.of(tensors[0]) if isinstance(batches, Batches) else tensors


def _copied(gradient: Gradient) -> Gradient:
    """What a graph wrote, in memory that no replay writes to."""

    def copy(nest: Any) -> Any:
        return nests.with_tensors(nest, (tensor.clone() for tensor in nests.tensors(nest)))

    window = gradient.window.map(copy)
    grads = gradient.grads
    if grads is not None:
        grads = [list(copy(tuple(ours))) for ours in grads]
    return Gradient(window, grads, gradient.wrong)
