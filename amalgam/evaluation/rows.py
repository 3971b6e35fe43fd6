"""Training runs of one task side by side: rows of one run, with one pass for all of them.

On a GPU the passes of a small optimizee are launches and little else, and take as long for many.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from amalgam.evaluation.runs import Curve, Log, MakeOptimizer, Rates, Readings, train
from amalgam.heap import graph_bytes
from amalgam.lr_decays import check_decay
from amalgam.seeding import generator_for
from amalgam.tasks import Batch, Task
from amalgam.tasks.task import Batches

_MOST = 64
_SHARE = 4  # of a device's memory, what rows may take
_PASSES = 3  # what a gradient takes at its peak, in graphs' bytes
_STATES = 24  # parameters, gradients and an optimizer's state, in parameters' bytes
_TIMED = 20  # steps, of a run that is timed alone


class Row(NamedTuple):
    """One run.

    Attributes:
        make: Makes the optimizer, which must draw nothing.
        seed: Seed of all that is random.
        decay: How rates go on over the steps: one of :data:`amalgam.lr_decays.LR_DECAYS`.
        name: For errors.
    """

    make: MakeOptimizer
    seed: int
    decay: str = "constant"
    name: str = ""


def obstacle(task: Task) -> str | None:
    """Why a task's optimizees can't be trained side by side; ``None`` where they can."""
    if task.gradient is not None:
        return f"its gradients are {task.gradient}"
    if task.dtype is None:
        return "its parameters are of several dtypes"
    return task.unstackable or _moved(task)


def _moved(task: Task) -> str | None:
    """What a step of a run alone does that a pass of many does not."""
    module = task.init_module(generator_for(0, "cost"))
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    task.backward(module, _batch_of(task), generator_for(0, "cost"))
    if any(p.requires_grad and p.grad is None for p in module.parameters()):
        return "some of its parameters have no gradients"
    after = dict(module.named_buffers())
    if not all(torch.equal(after[name], buffer) for name, buffer in before.items()):
        return "its buffers change as it runs"
    return None


def _batch_of(task: Task) -> Batch:
    return task.batches(generator_for(0, "cost"), 1)[0]


def most_rows(task: Task) -> int:
    """How many runs may go side by side, by a GPU's memory; at least one."""
    if task.device.type != "cuda":
        return _MOST
    batch = _batch_of(task)
    module = task.init_module(generator_for(0, "cost"))
    params = task.init_params(generator_for(0, "cost")).requires_grad_()
    with task.second_order.kernels():
        graph = graph_bytes(lambda: task.objective(params, batch), batch)
    constants = (t for t in (*module.parameters(), *module.buffers()) if not t.requires_grad)
    each = _PASSES * graph + _STATES * params.nbytes + sum(t.nbytes for t in constants)
    memory = torch.cuda.get_device_properties(task.device).total_memory
    return max(1, min(_MOST, memory // _SHARE // each))


def train_rows(task: Task, rows: Sequence[Row], *, steps: int, readings: Readings) -> list[Curve]:
    """Train fresh optimizees side by side and read their losses.

    Each run is that of :func:`amalgam.evaluation.runs.train` but for last bits, as sums are taken
    in another order, and for ``seconds``, which is NaN: a step is a step of all.

    Args:
        task: Optimizee and data, on the device to train on.
        rows: The runs, at least one.
        steps: Steps to take.
        readings: What to read.

    Raises:
        ValueError: There is no such decay; or the task's optimizees can't be trained side by side.
    """
    for row in rows:
        check_decay(row.decay)
    if (why := obstacle(task)) is not None:
        raise ValueError(f"task must be one whose optimizees run as one, not {task.name!r}: {why}")
    modules = [task.init_module(generator_for(row.seed, "optimizee")) for row in rows]
    params, grads = _as_rows(task, modules)
    runs: list[_Run] = []
    for row, module in zip(rows, modules, strict=True):
        like = runs[0].log if runs else None
        runs.append(_Run(task, row, module, steps, readings, like))
    batches = Batches.stack(
        [task.batches(generator_for(row.seed, "batches"), steps) for row in rows]
    )
    taken = 0
    for stop in runs[0].log.stops:
        while taken < stop:
            leaf = params.detach().requires_grad_()
            with task.second_order.kernels():
                losses = task.objectives(leaf[:, None], batches[taken], True)
                (found,) = torch.autograd.grad(losses.sum(), leaf)
            grads.copy_(found)
            for run in runs:
                run.step(taken)
            taken += 1
        for run in runs:
            run.log.read(stop)
        if all(run.log.ended for run in runs):
            break
    return [run.log.curve(math.nan, run.optimizer) for run in runs]


class _Run:
    """One run among others, whose parameters and gradients are rows."""

    def __init__(
        self,
        task: Task,
        row: Row,
        module: nn.Module,
        steps: int,
        readings: Readings,
        like: Log | None,
    ) -> None:
        self._row = row
        with _told(row):
            self.optimizer = row.make(module.parameters())
        self._rates = Rates(self.optimizer, row.decay, steps)
        self.log = Log(task, module, steps, readings, like)

    def step(self, taken: int) -> None:
        """Step by the gradients that are there; not where the run has ended."""
        if not self.log.ended:
            self._rates.set(taken)
            with _told(self._row):
                self.optimizer.step()


@contextmanager
def _told(row: Row) -> Iterator[None]:
    """Inside, an error says whose it is."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in the run of {row.name or row.make}, seed {row.seed}")
        raise


def seconds_a_step(task: Task, make: MakeOptimizer) -> float:
    """Seconds that a step takes of an optimizee alone, its gradient's included.

    Args:
        task: Optimizee and data, on the device to train on.
        make: Makes the optimizer.
    """
    readings = Readings(curve_samples=1)
    # The first of two also pays for what is compiled or loaded.
    times = [train(task, make, steps=_TIMED, seed=0, readings=readings).seconds for _ in range(2)]
    return min(times)


def _as_rows(task: Task, modules: Sequence[nn.Module]) -> tuple[Tensor, Tensor]:
    """Make modules' parameters rows of one tensor, and their ``grad`` rows of another.

    Returns:
        Both, shape (modules, coordinates).
    """
    named = [dict(module.named_parameters()) for module in modules]
    # The layout holds those that are trained alone.
    params = torch.stack([task.layout.flatten(each).detach() for each in named])
    grads = torch.zeros_like(params)
    for each, values, slopes in zip(named, params, grads, strict=True):
        of_grads = task.layout.unflatten(slopes)
        for name, part in task.layout.unflatten(values).items():
            each[name].data = part
            each[name].grad = of_grads[name]
    return params, grads
