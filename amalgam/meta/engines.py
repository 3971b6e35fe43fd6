"""The engines that run episodes: one for each task, one for each episode of a task family."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from amalgam.meta.run_state import EpisodeAt
from amalgam.meta.unroll import Unroll
from amalgam.seeding import generator_for
from amalgam.tasks import Task, TaskFamily
from amalgam.tasks.family import draw


class Engines:
    """The engines of a run's episodes.

    An episode of a family draws its task by the run's seed and its own number. All processes and
    replicates draw the same task, and a resumed run draws it again. The engine is kept as long as
    the episode stays in its slot.

    Args:
        tasks: The run's tasks and task families.
        make: Makes the engine of a task.
        seed: The run's seed.
        device: Where the tasks are to be.
    """

    def __init__(
        self,
        tasks: Sequence[Task | TaskFamily],
        make: Callable[[Task], Unroll],
        *,
        seed: int,
        device: torch.device,
    ) -> None:
        self._tasks = tuple(tasks)
        self._make = make
        self._seed = seed
        self._device = device
        self._of_tasks = {
            index: make(task) for index, task in enumerate(tasks) if isinstance(task, Task)
        }
        self._of_slots: dict[int, tuple[int, Unroll]] = {}

    def __len__(self) -> int:
        """How many tasks and task families there are."""
        return len(self._tasks)

    def of(self, slot: int, episode: EpisodeAt) -> Unroll:
        """The engine of an episode.

        Args:
            slot: The slot that the episode runs in.
            episode: The episode.
        """
        if episode.task in self._of_tasks:
            return self._of_tasks[episode.task]
        number, engine = self._of_slots.get(slot, (None, None))
        if engine is None or number != episode.number:
            # Not both at once: a task's tensors may be large.
            self._of_slots.pop(slot, None)
            engine = self._drawn(episode)
            self._of_slots[slot] = episode.number, engine
        return engine

    def trials(self) -> Iterator[tuple[EpisodeAt, Unroll]]:
        """An episode of each task and family, of one window, and its engine, to try it out."""
        for index in range(len(self)):
            episode = EpisodeAt(0, index, 1, 0)
            yield episode, self._of_tasks.get(index) or self._drawn(episode)

    def _drawn(self, episode: EpisodeAt) -> Unroll:
        """The engine of the task that an episode draws from its family."""
        generator = generator_for(self._seed, "family", episode.number)
        return self._make(draw(self._tasks[episode.task], generator).to(self._device))
