"""The two meta-validations: by final loss, and by the meta-loss of unrolls.

The first process alone computes them; the others get its result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from amalgam.evaluation.protocol import MakeOptimizer
from amalgam.evaluation.protocol import train as train_optimizee
from amalgam.meta import distributed
from amalgam.meta.objective import Amalgamation
from amalgam.meta.periods import UnrollSettings
from amalgam.meta.sampling import StackedBatches, begin_episode
from amalgam.meta.training import Training
from amalgam.meta.unroll import Unroll
from amalgam.policies import Policy, Pool
from amalgam.seeding import generator_for
from amalgam.tasks import Task


def by_final_loss(
    make_optimizer: MakeOptimizer,
    tasks: Sequence[Task],
    training: Training,
    *,
    warmup_steps: int,
    seed: int,
) -> float:
    """The mean log of the final validation loss of optimizees that a student trains.

    Args:
        make_optimizer: Makes the student's optimizer.
        tasks: The tasks, each of which is trained.
        training: Says for how many steps, and how often.
        warmup_steps: Steps of the student's warm-up, which come first.
        seed: The student's.
    """
    steps = warmup_steps + training.validation_steps
    logs = []
    for task in tasks if distributed.rank() == 0 else ():
        for number in range(training.validation_seeds):
            curve = train_optimizee(
                task,
                make_optimizer,
                steps=steps,
                seed=int(generator_for(seed, "validation", number).initial_seed()),
                every=steps,
            )
            logs.append(math.log(curve.final + 1e-10))
    return _mean_of_first(logs)


def by_meta_loss(
    student: Policy,
    tasks: Sequence[Task],
    unrolls: UnrollSettings,
    amalgamation: Amalgamation,
    training: Training,
    *,
    seed: int,
) -> float:
    """The mean meta-loss of a student's unrolls, which are the same whenever it is asked for.

    Args:
        student: The student.
        tasks: The tasks, each of which is unrolled.
        unrolls: How.
        amalgamation: The meta-loss.
        training: Says on which data.
        seed: The run's.
    """
    losses = []
    for task in tasks if distributed.rank() == 0 else ():
        unroll = Unroll(_on_data(task, training), student, Pool([]), amalgamation)

        def batches(steps: int, *purpose: str | int, task: Task = unroll.task) -> StackedBatches:
            generator = generator_for(seed, "validation", *purpose)
            return StackedBatches([task.batches(generator, steps)])

        for episode in range(unrolls.episodes):
            where = begin_episode(
                unroll,
                [generator_for(seed, "validation", episode)],
                batches(unrolls.warmup_windows * unrolls.unroll, episode, "warm-up"),
                unrolls.warmup_lr,
            )
            for number in range(unrolls.windows):
                with torch.no_grad():
                    window = unroll.window(where, batches(unrolls.unroll, episode, number))
                where = window.end
                losses.append(window.meta_loss.mean().item())
    return _mean_of_first(losses)


def _on_data(task: Task, training: Training) -> Task:
    """The task with the data to validate on in its training data's place."""
    if training.validation_data == "train":
        return task
    size = min(task.batch_size, len(task.validation[0]))
    return replace(task, train=task.validation, batch_size=size)


def _mean_of_first(values: Sequence[float]) -> float:
    """The mean of the first process's values, in all processes."""
    mean: float = distributed.from_first(math.fsum(values) / max(len(values), 1))
    return mean
