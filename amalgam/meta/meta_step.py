"""One meta-step: a window, its meta-gradient, and the update of the students."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from amalgam.meta import distributed
from amalgam.meta.estimators import Estimate, Estimator
from amalgam.meta.memory import Memory
from amalgam.meta.objective import Amalgamation, loss_weights
from amalgam.meta.periods import Period
from amalgam.meta.perturbation import Perturbation
from amalgam.meta.run_state import RunState
from amalgam.meta.sampling import Sampler, begin_episode
from amalgam.meta.training import Training
from amalgam.meta.unroll import Unroll
from amalgam.meta.window import Window
from amalgam.policies import Pool
from amalgam.seeding import generator_for
from amalgam.tasks import Task


class MetaStep(NamedTuple):
    """What one meta-step gave.

    Attributes:
        episode: The episode's number in the run, from 0.
        window_index: The window's number in the episode, from 0.
        task: The episode's task.
        window: What the window gave in this process.
        losses: The students' meta-losses, then their imitation losses, averaged over the processes,
            shape (2, S).
        norms: The norm of each student's meta-gradient, as
            :meth:`amalgam.meta.replicate.Replicate.update` returns it.
    """

    episode: int
    window_index: int
    task: Task
    window: Window
    losses: Tensor
    norms: list[float]


class MetaSteps:
    """Takes the meta-steps of a run.

    Args:
        state: The run's state, which every meta-step changes.
        tasks: The tasks, of which every episode takes one.
        pool: The teachers.
        amalgamation: Settings of the meta-loss and the imitation loss, and how they are computed.
        training: Settings of meta-training that hold for any strategy.
        estimator: Computes the meta-gradients.
        memory: How much a window may keep for its backward pass.
        perturbation: Perturbs the weights at which the meta-gradient is computed.
        task_weights: Each task's share of the episodes, relative to the sum of all shares.
        seed: Decides everything random.

    Attributes:
        unrolls: The engines that run episodes, one per task.
    """

    def __init__(
        self,
        state: RunState,
        tasks: Sequence[Task],
        pool: Pool,
        amalgamation: Amalgamation,
        training: Training,
        estimator: Estimator,
        *,
        memory: Memory,
        perturbation: Perturbation | None,
        task_weights: Sequence[float],
        seed: int,
    ) -> None:
        self._state = state
        self._training = training
        self._estimator = estimator
        self._perturbation = perturbation
        self._seed = seed
        self._students = [replicate.student for replicate in state.replicates]
        self.unrolls = [
            Unroll(
                task,
                self._students * estimator.particles,
                pool,
                amalgamation,
                memory=memory,
                optimizees=training.optimizees,
                shared=estimator.particles > 1,
            )
            for task in tasks
        ]
        self._sampler = Sampler(
            seed,
            tasks,
            task_weights,
            replicates=len(self._students),
            particles=estimator.particles,
            optimizees=training.optimizees,
        )

    def take(self, period: Period) -> MetaStep:
        """Take the next meta-step of a period; at an episode's first window, begin the episode."""
        state, progress, windows = self._state, self._state.progress, period.training.windows
        episode, index = progress.episodes + progress.done // windows, progress.done % windows
        unroll = self.unrolls[self._sampler.task_of(episode)]
        if index == 0:
            self._begin_episode(unroll, period, episode)
        estimate = self._estimate(unroll, period, episode, index)
        window = estimate.window
        norms = [self._update(student, estimate) for student in range(len(self._students))]
        state.trajectories, state.carried = window.end, estimate.carried
        progress.meta_step += 1
        progress.done += 1
        (losses,) = distributed.average([torch.stack((window.meta_loss, window.imitation_loss))])
        progress.meta_losses.append(losses[0].mean().item())
        return MetaStep(episode, index, unroll.task, window, losses, norms)

    def rows_of(self, index: int) -> slice:
        """The rows of a window that belong to a replicate (and its particles)."""
        each = self.unrolls[0].rows // len(self._students)
        return slice(index * each, (index + 1) * each)

    def _begin_episode(self, unroll: Unroll, period: Period, episode: int) -> None:
        """Begin an episode and warm it up, as the student's configuration or the period says."""
        if period.own_warmup:
            config = self._students[0].config
            steps, lr = config.warmup_steps, config.warmup_lr
        else:
            training = period.training
            steps, lr = training.warmup_windows * training.unroll, training.warmup_lr
        self._state.trajectories = begin_episode(
            unroll,
            self._sampler.generators("episode", episode),
            self._sampler.batches(unroll.task, steps, "warm-up", episode),
            lr,
        )
        self._state.carried = []

    def _estimate(self, unroll: Unroll, period: Period, episode: int, index: int) -> Estimate:
        """Run an episode's window and estimate its meta-gradient."""
        state, meta_step = self._state, self._state.progress.meta_step
        assert state.trajectories is not None

        def generators(student: int, *purpose: str | int) -> torch.Generator:
            return generator_for(self._seed + student, *purpose, meta_step)

        return self._estimator.estimate(
            unroll,
            state.trajectories,
            self._sampler.batches(unroll.task, period.training.unroll, "window", episode, index),
            loss_weights(
                self._training.il_mode,
                period.imitation_weight,
                generator_for(self._seed, "switch", meta_step),
            ),
            generators,
            carried=state.carried,
            perturbation=self._perturbation,
            input_noise=self._training.input_noise,
        )

    def _update(self, index: int, estimate: Estimate) -> float:
        """Update a replicate, and return the norm of its meta-gradient."""
        skipped = estimate.window.skipped[self.rows_of(index), 0]
        # The losses of a window in which the student took no step do not depend on its weights.
        moved = bool((skipped < len(estimate.window.losses)).any())
        grads = estimate.grads[index] if estimate.grads is not None else None
        return self._state.replicates[index].update(estimate.loss[index], grads, moved)
