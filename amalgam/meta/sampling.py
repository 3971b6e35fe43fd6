"""What is random in a run's episodes: the task, the optimizees, their batches.

Each draw has a generator of its own, which derives from the run's seed and from what is drawn. So
what an episode sees depends neither on what ran before it nor on how the run was cut and resumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from amalgam.meta import distributed
from amalgam.meta.episode import Episodes, Trajectories
from amalgam.seeding import generator_for
from amalgam.tasks import Batch, Task


class StackedBatches(Sequence[Batch]):
    """The batches of several rows, stacked when they are asked for.

    Args:
        by_row: A sequence of batches for each row, all of one length.
    """

    def __init__(self, by_row: Sequence[Sequence[Batch]]) -> None:
        self._by_row = by_row

    def __len__(self) -> int:
        return len(self._by_row[0])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return StackedBatches([batches[index] for batches in self._by_row])
        found = [batches[index] for batches in self._by_row]
        if len(found) == 1:
            return tuple(tensor[None] for tensor in found[0])
        return tuple(torch.stack(tensors) for tensors in zip(*found, strict=True))


def begin_episode(
    episodes: Episodes,
    generators: Sequence[torch.Generator],
    warmup: Sequence[Batch],
    warmup_lr: float,
) -> Trajectories:
    """A new episode after its warm-up.

    Args:
        episodes: Begins it.
        generators: One a row, for the optimizees and their scaling.
        warmup: The warm-up's batches; none for no warm-up.
        warmup_lr: Its learning rate.
    """
    begin = episodes.begin(*generators)
    return episodes.warm_up(begin, warmup, warmup_lr) if len(warmup) else begin


class Sampler:
    """Draws a run's episodes.

    Args:
        seed: The run's; the replicates count on from it.
        tasks: The tasks.
        task_weights: How often each is taken, as a share of their sum.
        replicates: How many students there are.
        particles: Copies of each student, which see the same optimizee and batches.
        optimizees: How many each student has in each process.
    """

    def __init__(
        self,
        seed: int,
        tasks: Sequence[Task],
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

    def task_of(self, episode: int) -> int:
        """The number of the task that an episode takes."""
        if len(self._tasks) == 1:
            return 0
        generator = generator_for(self._seed, "task", episode)
        return int(torch.multinomial(torch.tensor(self._task_weights), 1, generator=generator))

    def generators(self, *purpose: str | int) -> list[torch.Generator]:
        """A generator for each row: replicates have seeds of their own, particles share theirs."""
        found = []
        for copy in range(self._replicates * self._particles):
            replicate = copy // self._particles
            for row in range(self._optimizees):
                index = distributed.rank() * self._optimizees + row
                # The first optimizee draws what it would draw alone.
                own = (index,) if index else ()
                found.append(generator_for(self._seed + replicate, *purpose, *own))
        return found

    def batches(self, task: Task, steps: int, *purpose: str | int) -> StackedBatches:
        """Batches of a task for all rows, one a step."""
        return StackedBatches(
            [task.batches(generator, steps) for generator in self.generators(*purpose)]
        )
