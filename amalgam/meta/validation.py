"""The two meta-validations, in both of which lower is better.

:func:`by_final_loss` trains optimizees with the student as an optimizer and looks at the loss that
they end with. It runs every :attr:`amalgam.meta.Training.validate_every` meta-steps and after the
last one, if the strategy does not go back to earlier weights. Its score decides which weights the
run keeps.

:func:`by_meta_loss` runs unrolls as in meta-training and takes their mean meta-loss. It runs at the
end of each period for which the strategy gives validation unrolls. Its score is for the strategy.

Of a task family both take as many tasks as they train optimizees of a task. These are the same ones
in every validation of every run, and apart from those that episodes draw.

The first process alone computes them; the others get its result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import torch

from amalgam import distributed
from amalgam.evaluation.runs import MakeOptimizer, Readings
from amalgam.evaluation.runs import train as train_optimizee
from amalgam.meta.objective import Amalgamation, check_logs
from amalgam.meta.periods import UnrollSettings
from amalgam.meta.sampling import begin_episode, split, stacked_batches
from amalgam.meta.training import Training
from amalgam.meta.unroll import Unroll
from amalgam.meta.window import WindowInputs
from amalgam.optimizers import optimizer_of
from amalgam.policies import Policy, Pool
from amalgam.seeding import generator_for
from amalgam.tasks import Task, TaskFamily
from amalgam.tasks.family import draw

_EPS = 1e-10  # added to losses inside logs, and to divisors


def by_final_loss(
    make_optimizer: MakeOptimizer,
    tasks: Sequence[Task | TaskFamily],
    training: Training,
    *,
    log_objective: bool,
    warmup_steps: int,
    seed: int,
    device: torch.device,
) -> float:
    """How low the last validation loss is of optimizees that a student trains: a mean over them.

    Args:
        make_optimizer: Makes the optimizer that acts by the student.
        tasks: The tasks and families; optimizees of each are trained, on its training data.
        training: Of it ``validation_steps``, ``validation_seeds`` and ``validation_decays`` are
            read.
        log_objective: Whether the mean is of the loss's log, as in
            :class:`amalgam.meta.Amalgamation`; if not, of loss / abs(loss before the first step).
        warmup_steps: Steps of the student's warm-up, which come before ``validation_steps``.
        seed: The replicate's seed.
        device: Where tasks are to be that a family draws.

    Raises:
        ValueError: A log is wanted of a negative loss.
    """
    steps = warmup_steps + training.validation_steps
    scores = []
    for task in tasks if distributed.rank() == 0 else ():
        runs = product(range(training.validation_seeds), training.validation_decays)
        for number, decay in runs:
            curve = train_optimizee(
                _drawn(task, number, device),
                make_optimizer,
                steps=steps,
                seed=int(generator_for(seed, "validation", number).initial_seed()),
                readings=Readings(),
                decay=decay,
            )
            if log_objective:
                check_logs([curve.final], _EPS, task.name)
                finite = curve.final != -math.inf
                scores.append(math.log(curve.final + _EPS) if finite else math.inf)
            else:
                scores.append(curve.final / (abs(curve.losses[0]) + _EPS))
    return _mean_of_first(scores)


def of_student(
    student: Policy,
    tasks: Sequence[Task | TaskFamily],
    training: Training,
    amalgamation: Amalgamation,
    *,
    seed: int,
    device: torch.device,
) -> float:
    """A student's score by :func:`by_final_loss`.

    Args:
        student: The student, or any other policy.
        tasks: The tasks and families.
        training: As in :func:`by_final_loss`.
        amalgamation: Of it ``log_objective`` and ``backend`` are read.
        seed: The replicate's seed. Students are compared by scores of one seed.
        device: Where the student's weights are, and tasks are to be that a family draws.
    """
    return by_final_loss(
        lambda params: optimizer_of(params, student, amalgamation.backend),
        tasks,
        training,
        log_objective=amalgamation.log_objective,
        warmup_steps=student.config.warmup_steps,
        seed=seed,
        device=device,
    )


def by_meta_loss(
    student: Policy,
    tasks: Sequence[Task | TaskFamily],
    unrolls: UnrollSettings,
    amalgamation: Amalgamation,
    training: Training,
    *,
    seed: int,
) -> float:
    """The mean meta-loss of a student in unrolls without teachers; infinite if an episode fails.

    An episode fails if the student takes no step of a window, or has no finite loss in one.

    The optimizees, their batches and what they hold out depend on the seed alone, so any two calls
    compare students on the same ones.

    Args:
        student: The student.
        tasks: The tasks and families; optimizees of each are unrolled.
        unrolls: How many optimizees per task, and how long.
        amalgamation: Settings of the meta-loss; the samples to hold out are of the data that is
            validated on.
        training: Of it ``validation_data`` is read.
        seed: The run's seed.
    """
    losses = []
    device = student.weights()[0].device
    for task in tasks if distributed.rank() == 0 else ():
        every = range(unrolls.episodes)
        # A task's episodes are rows of one; a family draws a task for each.
        for numbers in [every] if isinstance(task, Task) else [[number] for number in every]:
            losses += _episodes_losses(
                student,
                _on_data(_drawn(task, numbers[0], device), training),
                numbers,
                unrolls,
                amalgamation,
                seed=seed,
            )
    return _mean_of_first(losses)


def _episodes_losses(
    student: Policy,
    task: Task,
    numbers: Sequence[int],
    unrolls: UnrollSettings,
    amalgamation: Amalgamation,
    *,
    seed: int,
) -> list[float]:
    """The meta-losses of a task's episodes of these numbers, all of as many windows.

    Returns:
        Of each window the mean over the episodes, once for each of them; a last one that is
        infinite where an episode failed, with which they all end.
    """
    unroll = Unroll(task, student, Pool([]), amalgamation, optimizees=len(numbers))
    losses: list[float] = []

    def generators(*purpose: str | int) -> list[torch.Generator]:
        return [generator_for(seed, "validation", number, *purpose) for number in numbers]

    parts = split(task, amalgamation.held_out, generators("split"))
    warmup = unrolls.warmup_windows * unrolls.unroll
    where = begin_episode(
        unroll,
        generators(),
        stacked_batches(task, generators("warm-up"), warmup, parts.trained),
        unrolls.warmup_lr,
    )
    weights = [list(student.weights())]
    for window_number in range(unrolls.windows):
        drawn = generators(window_number), unrolls.unroll
        batches = stacked_batches(task, *drawn, parts.trained)
        held_out = None
        if parts.held_out is not None:
            drawn = generators("held-out", window_number), unrolls.unroll
            held_out = stacked_batches(task, *drawn, parts.held_out)
        given = WindowInputs(where, batches, weights, held_out=held_out)
        with torch.no_grad():
            # As one graph, where there can be one; without gradients.
            window, *_ = unroll.meta_gradient(given, (1.0, 0.0))
        where = window.end
        if window.failed.any():
            return [*losses, math.inf]
        losses += len(numbers) * [window.meta_loss.item()]
    return losses


def _drawn(task: Task | TaskFamily, number: int, device: torch.device) -> Task:
    """The task itself; or one that a family draws, by its name and the number alone."""
    return draw(task, generator_for(0, "validation", task.name, number)).to(device)


def _on_data(task: Task, training: Training) -> Task:
    """The task, with the data to validate on in the place of its training data."""
    if training.validation_data == "train":
        return task
    size = min(task.batch_size, len(task.validation[0]))
    return replace(task, train=task.validation, batch_size=size)


def _mean_of_first(values: Sequence[float]) -> float:
    """The mean of the first process's values, returned in all processes."""
    mean: float = distributed.from_first(math.fsum(values) / max(len(values), 1))
    return mean
