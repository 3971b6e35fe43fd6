"""What is random in a run's episodes: the task, the horizon, the optimizees, their batches.

Each draw has a generator of its own, which derives from the run's seed and from a *purpose*: words
and numbers that name the draw. So what an episode sees depends neither on what ran before it nor on
how the run was cut and resumed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from amalgam import distributed
from amalgam.meta.episode import Episodes, Trajectories
from amalgam.seeding import generator_for
from amalgam.tasks import Batch, Task, TaskFamily
from amalgam.tasks.task import Batches


class Split(NamedTuple):
    """The training samples of an episode, in two parts; each row has parts of its own.

    Attributes:
        trained: The numbers of the samples that a row trains on; ``None`` where that is all.
        held_out: The numbers of those that it leaves out; ``None`` where it leaves out none.
    """

    trained: list[Tensor] | None
    held_out: list[Tensor] | None


def split(task: Task, share: float, generators: Sequence[torch.Generator]) -> Split:
    """Draw which training samples the rows of an episode leave out.

    Args:
        task: The episode's task.
        share: The share of the samples that a row leaves out; 0 means none.
        generators: One per row.
    """
    if not share:
        return Split(None, None)
    parts = [task.split(generator, share) for generator in generators]
    return Split([trained for trained, _ in parts], [held_out for _, held_out in parts])


def stacked_batches(
    task: Task,
    generators: Sequence[torch.Generator],
    steps: int,
    among: Sequence[Tensor] | None = None,
) -> Batches:
    """Batches of a task for all rows, each tensor (R, samples, ...).

    Args:
        task: The task.
        generators: One per row.
        steps: How many steps: the sequence has one batch per step.
        among: The numbers of the training samples that each row draws from; all where ``None``.
    """
    parts: Sequence[Tensor | None] = among or [None] * len(generators)
    return Batches.stack(
        [
            task.batches(generator, steps, part)
            for generator, part in zip(generators, parts, strict=True)
        ]
    )


def begin_episode(
    episodes: Episodes,
    generators: Sequence[torch.Generator],
    warmup: Sequence[Batch],
    warmup_lr: float,
    loss_scale: Tensor | None = None,
) -> Trajectories:
    """Begin an episode and warm it up.

    Args:
        episodes: The engine.
        generators: One per row; they decide the optimizees and their scaling.
        warmup: The warm-up's batches, one per step; an empty sequence means no warm-up.
        warmup_lr: The warm-up's learning rate.
        loss_scale: A factor on the gradients of the warm-up that students see, shape (R,).
    """
    begin = episodes.begin(*generators)
    return episodes.warm_up(begin, warmup, warmup_lr, loss_scale) if len(warmup) else begin


class Sampler:
    """Draws what a run's episodes need: each one's task, a generator per row, and batches.

    It begins no episode itself; :func:`begin_episode` does.

    Args:
        seed: The run's seed; replicate i draws by ``seed + i``.
        tasks: The tasks and task families.
        task_weights: Each task's share of the episodes, relative to the sum of all shares.
        replicates: How many students there are.
        particles: How many copies of each student there are; they see the same optimizees and
            batches.
        optimizees: How many optimizees each student has in each process.
    """

    def __init__(
        self,
        seed: int,
        tasks: Sequence[Task | TaskFamily],
        task_weights: Sequence[float],
        *,
        replicates: int,
        particles: int,
        optimizees: int,
    ) -> None:
        self._seed = seed
        self._tasks = tasks
        self._task_weights = task_weights
        self._replicates = replicates
        self._particles = particles
        self._optimizees = optimizees

    def task_of(self, episode: int, taken: Collection[int] = ()) -> int:
        """The index of the task, or the family, that an episode takes.

        Args:
            episode: The episode's number.
            taken: Tasks that it may not take, unless they are all.
        """
        if len(self._tasks) == 1:
            return 0
        weights = torch.tensor(self._task_weights, dtype=torch.float32)
        if len(set(taken)) < len(self._tasks):
            weights[list(taken)] = 0
        generator = generator_for(self._seed, "task", episode)
        return int(torch.multinomial(weights, 1, generator=generator))

    def windows_of(self, episode: int, unroll: int, shortest: int, longest: int) -> int:
        """How many windows an episode has whose horizon is drawn, log-uniform.

        Args:
            episode: The episode's number.
            unroll: Steps per window.
            shortest: The shortest horizon, in steps.
            longest: The longest horizon, in steps.
        """
        generator = generator_for(self._seed, "horizon", episode)
        drawn = torch.rand((), generator=generator, dtype=torch.float64).item()
        windows = round(shortest * (longest / shortest) ** drawn / unroll)
        return min(max(windows, -(-shortest // unroll)), longest // unroll)

    def generators(self, *purpose: str | int) -> list[torch.Generator]:
        """One generator per row, in its initial state.

        Rows of other replicates, other optimizees and other processes have other generators. A
        student's particles have the same ones.

        Args:
            *purpose: Names the draw within the run, as ``("episode", 3)`` does. The same purpose
                gives the same generators again, so each draw needs a purpose of its own.
        """
        found = []
        for copy in range(self._replicates * self._particles):
            replicate = copy // self._particles
            for row in range(self._optimizees):
                index = distributed.rank() * self._optimizees + row
                # The first optimizee draws what it would draw alone.
                own = (index,) if index else ()
                found.append(generator_for(self._seed + replicate, *purpose, *own))
        return found

    def batches(
        self,
        task: Task,
        steps: int,
        *purpose: str | int,
        among: Sequence[Tensor] | None = None,
    ) -> Batches:
        """Batches of a task for all rows.

        Args:
            task: The task.
            steps: How many steps: the sequence has one batch per step.
            *purpose: Names the draw, as in :meth:`generators`.
            among: The numbers of the training samples that each row draws from; all where ``None``.
        """
        return stacked_batches(task, self.generators(*purpose), steps, among)
