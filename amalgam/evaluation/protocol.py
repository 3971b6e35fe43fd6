"""How optimizers are compared: same task, same seeds, same steps, losses on unseen data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from amalgam.seeding import generator_for
from amalgam.tasks import SeededBatch, Task

MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]

_TOGETHER = 5_000  # samples that are measured in one pass: of images, all may take gigabytes
# As many samples of the training data are read at the end: more would be no more exact.
_TRAINING_READ = 2**15

RATES = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Curve:
    """One training run.

    Attributes:
        steps: Steps taken when the losses were read, ascending, from 0.
        losses: Validation losses at those steps.
        accuracies: Validation accuracies in [0, 1] at those steps; NaN where targets are not
            classes.
        training: Loss over the training data after the last step, of large sets over the first
            32,768 samples.
    """

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    training: float

    @property
    def final(self) -> float:
        """The last validation loss."""
        return self.losses[-1]

    @property
    def best(self) -> float:
        """The smallest validation loss."""
        return min((x for x in self.losses if not math.isnan(x)), default=math.nan)


@dataclass(frozen=True)
class Contender:
    """An optimizer to evaluate.

    Attributes:
        name: For tables and plots.
        make: Makes it for given parameters.
    """

    name: str
    make: MakeOptimizer


@dataclass(frozen=True)
class Result:
    """A contender's training runs on one task.

    Attributes:
        name: The contender's name.
        task: The task's name.
        curves: The runs, one for each seed.
    """

    name: str
    task: str
    curves: tuple[Curve, ...]

    def summary(self, which: str) -> tuple[float, float]:
        """Mean and standard deviation over seeds of ``"final"``, ``"best"`` or ``"training"``."""
        values = [getattr(curve, which) for curve in self.curves]
        return fmean(values), stdev(values) if len(values) > 1 else math.nan

    @property
    def accuracy(self) -> float:
        """Mean over seeds of the last validation accuracy."""
        return fmean(curve.accuracies[-1] for curve in self.curves)

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable, curves and all."""
        return {
            "name": self.name,
            "task": self.task,
            "curves": [
                {
                    "steps": c.steps,
                    "validation_losses": c.losses,
                    "accuracies": c.accuracies,
                    "training_loss": c.training,
                }
                for c in self.curves
            ],
        }


def spread(replicates: Sequence[Result]) -> float:
    """Standard deviation over replicates of the mean log final validation loss (meta-stability).

    Args:
        replicates: Results of two or more replicates on one task.

    Raises:
        statistics.StatisticsError: There are fewer than two.
    """
    return stdev(fmean(math.log(c.final + 1e-10) for c in r.curves) for r in replicates)


def train(task: Task, make: MakeOptimizer, *, steps: int, seed: int, every: int) -> Curve:
    """Train a fresh optimizee and record its validation loss.

    Args:
        task: Optimizee and data, on the device to train on.
        make: Makes the optimizer for its parameters.
        steps: Steps to take.
        seed: Seed of the initial parameters, of the batches and of what the optimizee draws on
            them (dropout), which depend on nothing else.
        every: Steps between two readings; the first and the last step are always read.
    """
    module = task.init_module(generator_for(seed, "optimizee"))
    optimizer = make(module.parameters())
    read_at, losses, accuracies = [], [], []
    batches = iter(task.batches(generator_for(seed, "batches"), steps))
    noise = generator_for(seed, "gradients")
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            loss, accuracy = _measure(task, module, task.validation)
            read_at.append(step)
            losses.append(loss)
            accuracies.append(accuracy)
        if step < steps:
            optimizer.zero_grad()
            task.backward(module, next(batches), noise)
            optimizer.step()
    training, _ = _measure(task, module, [tensor[:_TRAINING_READ] for tensor in task.train])
    return Curve(tuple(read_at), tuple(losses), tuple(accuracies), training)


@torch.no_grad()
def _measure(task: Task, module: nn.Module, data: Sequence[Tensor]) -> tuple[float, float]:
    """Loss and accuracy of a module on data; accuracy is NaN where targets are not classes.

    What draws without regard to the module's mode draws alike in every call.
    """
    training = module.training
    module.eval()
    right = 0.0
    losses: list[float] = []
    for *inputs, target in zip(*(tensor.split(_TOGETHER) for tensor in data), strict=True):
        with task.drawing(SeededBatch((*inputs, target), [len(losses)])):
            output = module(*inputs)
            losses.append(task.loss(output, target).item() * len(target))
        if target.is_floating_point() or output.dim() != target.dim() + 1:
            right = math.nan
        else:
            right += (output.argmax(1) == target).double().mean().item() * len(target)
    module.train(training)
    samples = len(data[-1])
    return math.fsum(losses) / samples, right / samples


def evaluate(
    task: Task,
    contenders: Sequence[Contender],
    *,
    steps: int,
    seeds: int,
    every: int = 20,
    first_seed: int = 0,
    report: Callable[[str], None] = lambda name: None,
) -> list[Result]:
    """Train a task with every contender, over the same seeds.

    Args:
        task: Optimizee and data, on the device to train on.
        contenders: The optimizers.
        steps: Steps of each run.
        seeds: Runs of each.
        every: Steps between two readings of the validation loss.
        first_seed: The runs' seeds are this and those that follow.
        report: Called before each run with the contender's name.

    Returns:
        Each contender's result, in their order.
    """
    results = []
    for contender in contenders:
        curves = []
        for seed in range(first_seed, first_seed + seeds):
            report(contender.name)
            curves.append(train(task, contender.make, steps=steps, seed=seed, every=every))
        results.append(Result(contender.name, task.name, tuple(curves)))
    return results


def tune(
    task: Task,
    optimizer: type[Optimizer],
    *,
    steps: int,
    seeds: int = 1,
    first_seed: int = 10_000,
    rates: Sequence[float] = RATES,
) -> float:
    """The learning rate with the smallest mean final validation loss.

    Args:
        task: Optimizee and data.
        optimizer: Its class; called with parameters and ``lr``.
        steps: Steps of each run.
        seeds: Runs of each rate.
        first_seed: The runs' seeds are this and those that follow; evaluation uses others.
        rates: The learning rates to try; the paper's grid by default.
    """

    def score(rate: float) -> float:
        result = evaluate(
            task,
            [Contender("", lambda params: optimizer(params, lr=rate))],  # type: ignore[call-arg]
            steps=steps,
            seeds=seeds,
            every=steps,
            first_seed=first_seed,
        )
        mean, _ = result[0].summary("final")
        return math.inf if math.isnan(mean) else mean

    return min(rates, key=score)
