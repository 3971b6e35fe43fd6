"""Training runs of one task side by side: rows of one run, with one pass for all of them.

On a GPU the passes of a small optimizee are launches and little else, and take as long for many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from amalgam.evaluation.runs import Curve, Log, MakeOptimizer, Rates, Readings, train
from amalgam.heap import graph_bytes
from amalgam.lr_decays import check_decay
from amalgam.seeding import generator_for
from amalgam.tasks import Task
from amalgam.tasks.task import Batches

_MOST = 64
_SHARE = 4  # of a device's memory, what rows may take
_PASSES = 3  # what a gradient takes at its peak, in graphs' bytes
_TIMED = 20  # steps, of a run that is timed alone


class Row(NamedTuple):
    """One run.

    Attributes:
        make: Makes the optimizer, which must draw nothing.
        seed: Seed of all that is random.
        decay: How rates go on over the steps: one of :data:`amalgam.lr_decays.LR_DECAYS`.
    """

    make: MakeOptimizer
    seed: int
    decay: str = "constant"


def obstacle(task: Task) -> str | None:
    """Why a task's optimizees can't be trained side by side; ``None`` where they can."""
    if task.gradient is not None:
        return f"its gradients are {task.gradient}"
    if task.dtype is None:
        return "its parameters are of several dtypes"
    return task.unstackable


def most_rows(task: Task) -> int:
    """How many runs go side by side, by a GPU's memory; at least one."""
    if task.device.type != "cuda":
        return _MOST
    batch = task.batches(generator_for(0, "cost"), 1)[0]
    params = task.init_params(generator_for(0, "cost")).requires_grad_()
    each = _PASSES * max(graph_bytes(lambda: task.objective(params, batch), batch), 1)
    memory = torch.cuda.get_device_properties(task.device).total_memory
    return max(1, min(_MOST, memory // _SHARE // each))


def train_rows(task: Task, rows: Sequence[Row], *, steps: int, readings: Readings) -> list[Curve]:
    """Train fresh optimizees side by side and read their losses.

    Each run is that of :func:`amalgam.evaluation.runs.train` but for last bits, as sums are taken
    in another order, and for its time, which is nobody's own: ``seconds`` is NaN.

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
    optimizers = [row.make(module.parameters()) for row, module in zip(rows, modules, strict=True)]
    rates = [
        Rates(optimizer, row.decay, steps) for row, optimizer in zip(rows, optimizers, strict=True)
    ]
    logs = [Log(task, module, steps, readings) for module in modules]
    batches = Batches.stack(
        [task.batches(generator_for(row.seed, "batches"), steps) for row in rows]
    )
    taken = 0
    for stop in logs[0].stops:
        while taken < stop:
            batch = batches[taken]
            leaf = params.detach().requires_grad_()
            with task.second_order.kernels():
                losses = task.objectives(leaf[:, None], batch, True)
                (found,) = torch.autograd.grad(losses.sum(), leaf)
            grads.copy_(found)
            for rate, optimizer in zip(rates, optimizers, strict=True):
                rate.set(taken)
                optimizer.step()
            taken += 1
        for log in logs:
            log.read(stop)
        if all(log.ended for log in logs):
            break
    return [log.curve(math.nan, optimizer) for log, optimizer in zip(logs, optimizers, strict=True)]


def seconds_a_step(task: Task, make: MakeOptimizer) -> float:
    """Seconds that a step takes of an optimizee alone, its gradient's included.

    Args:
        task: Optimizee and data, on the device to train on.
        make: Makes the optimizer.
    """
    readings = Readings(curve_samples=1)
    # What is made once is made in the first.
    times = [train(task, make, steps=_TIMED, seed=0, readings=readings).seconds for _ in range(2)]
    return min(times)


def _as_rows(task: Task, modules: Sequence[nn.Module]) -> tuple[Tensor, Tensor]:
    """Make modules' parameters rows of one tensor, and their ``grad`` rows of another.

    Returns:
        Both, shape (modules, coordinates).
    """
    trained = [
        {name: p for name, p in module.named_parameters() if p.requires_grad} for module in modules
    ]
    params = torch.stack([task.layout.flatten(named).detach() for named in trained])
    grads = torch.zeros_like(params)
    for named, values, slopes in zip(trained, params, grads, strict=True):
        parts, of_grads = task.layout.unflatten(values), task.layout.unflatten(slopes)
        for name, param in named.items():
            param.data = parts[name]
            param.grad = of_grads[name]
    return params, grads
