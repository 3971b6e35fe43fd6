"""One meta-step: a window or several, their meta-gradients, and the update of the students."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from amalgam import distributed
from amalgam.device import put
from amalgam.meta.conditions import Conditions, Drawn, StepConditions, loss_scales
from amalgam.meta.engines import Engines
from amalgam.meta.estimators import Estimate, Estimator
from amalgam.meta.memory import Memory
from amalgam.meta.objective import Amalgamation, loss_weights
from amalgam.meta.periods import INITIAL, Period, Slots, UnrollSettings
from amalgam.meta.perturbation import Perturbation
from amalgam.meta.run_state import EpisodeAt, RunState, Slot
from amalgam.meta.sampling import Sampler, Split, begin_episode, split
from amalgam.meta.slot_means import SlotMeans
from amalgam.meta.teaching import Teaching
from amalgam.meta.training import Training
from amalgam.meta.unroll import Unroll
from amalgam.meta.window import Window, WindowInputs, check_budget
from amalgam.operations.registry import BackendError
from amalgam.policies import Pool
from amalgam.seeding import generator_for
from amalgam.tasks import Task, TaskFamily
from amalgam.tasks.task import Batches


class SlotWindow(NamedTuple):
    """The window that a meta-step took of one episode, in this process.

    Attributes:
        slot: The episode's slot.
        episode: The episode, and which of its windows this was.
        task: The episode's task.
        window: What the window gave, all but its end on the CPU.
        norms: The norm of each student's meta-gradient in this window, before any clipping.
    """

    slot: int
    episode: EpisodeAt
    task: Task
    window: Window
    norms: list[float]


class MetaStep(NamedTuple):
    """What one meta-step gave.

    Attributes:
        parts: This process's windows: one, or in a period with slots one for each of its slots.
        losses: The students' meta-losses, then their imitation losses, averaged over the processes
            or over the slots that did not fail, shape (2, S), on the CPU.
        norms: The norm of each student's meta-gradient over all weights, before clipping; NaN if
            the student took no step, or had no finite loss.
    """

    parts: list[SlotWindow]
    losses: Tensor
    norms: list[float]


class MetaSteps:
    """Takes the meta-steps of a run.

    Args:
        state: The run's state, which every meta-step changes.
        tasks: The tasks and task families, of which every episode takes one.
        pool: The teachers.
        amalgamation: Settings of the meta-loss and the imitation loss, and how they are computed.
        training: Settings of meta-training that hold for any strategy.
        estimator: Computes the meta-gradients.
        memory: How much a window may keep for its backward pass.
        perturbation: Perturbs the weights at which the meta-gradient is computed.
        conditions: What each episode draws for the students' steps.
        task_weights: Each task's share of the episodes, relative to the sum of all shares.
        seed: Decides everything random.
        meta_steps: Meta-steps of the whole run; ``None`` where they depend on its results.
        device: Where the tasks that families draw are to be.

    Attributes:
        engines: The engines that run episodes.
    """

    def __init__(
        self,
        state: RunState,
        tasks: Sequence[Task | TaskFamily],
        pool: Pool,
        amalgamation: Amalgamation,
        training: Training,
        estimator: Estimator,
        *,
        memory: Memory,
        perturbation: Perturbation | None,
        conditions: Conditions,
        task_weights: Sequence[float],
        seed: int,
        meta_steps: int | None,
        device: torch.device,
    ) -> None:
        self._state = state
        self._pool = pool
        self._on_policy = amalgamation.on_policy
        self._training = training
        self._estimator = estimator
        self._perturbation = perturbation
        self._conditions = conditions
        self._seed = seed
        self._meta_steps = meta_steps
        self._students = [replicate.student for replicate in state.replicates]

        def engine(task: Task) -> Unroll:
            return Unroll(
                task,
                self._students * estimator.particles,
                pool,
                amalgamation,
                memory=memory,
                optimizees=training.optimizees,
                shared=estimator.particles > 1,
            )

        self.engines = Engines(tasks, engine, seed=seed, device=device)
        self._sampler = Sampler(
            seed,
            tasks,
            task_weights,
            replicates=len(self._students),
            particles=estimator.particles,
            optimizees=training.optimizees,
        )

    def take(self, period: Period) -> MetaStep:
        """Take the next meta-step of a period, and begin the episodes that begin with it."""
        progress = self._state.progress
        if period.slots is None:
            step = self._of_processes(period)
        else:
            step = self._of_slots(period, period.slots)
        progress.meta_step += 1
        progress.done += 1
        progress.meta_losses.append(step.losses[0].mean().item())
        return step

    def check(self, steps: int) -> None:
        """Take a window of one step of each task, forward and backward, and change nothing.

        So what can't be computed here, by this backend on this device and within this budget, shows
        before the first meta-step.

        Args:
            steps: How many steps the run's first windows have.

        Raises:
            ValueError: A backend can't compute it, or the budget of memory is too small.
        """
        once = UnrollSettings(unroll=1, windows=1, episodes=1, warmup_windows=0, warmup_lr=0.0)
        period = Period(0, 0, 0, INITIAL, once, 1.0, None)
        for episode, unroll in self.engines.trials():
            with distributed.apart():
                begun = self._begin_episode(unroll, episode, period)
                try:
                    self._estimate(unroll, begun, episode, period)
                except BackendError as error:
                    raise ValueError(f"amalgamation.{error}") from error
                longer = replace(period, training=replace(once, unroll=steps))
                batches = self._batches(unroll, episode, longer, 0)
                teaching = self._teaching(episode, longer, 0)
                held_out = self._held_out(unroll, episode, longer)
                given = WindowInputs(
                    begun.trajectories,
                    batches,
                    [student.weights() for student in unroll.students],
                    teaching=teaching,
                    held_out=held_out,
                )
                check_budget(unroll, given)

    def rows_of(self, index: int) -> slice:
        """The rows of a window that belong to a replicate (and its particles)."""
        each = self._estimator.particles * self._training.optimizees
        return slice(index * each, (index + 1) * each)

    def engine_of(self, slot: int, period: Period) -> Unroll | None:
        """The engine of the episode that a slot is in the middle of.

        ``None`` where the next meta-step begins an episode there.
        """
        running = self._state.progress.running
        if period.slots is not None:
            return self.engines.of(slot, running[slot])
        return self.engines.of(slot, running[0]) if running and running[0].window else None

    def _episode_of_all(self, period: Period, number: int, done: int) -> EpisodeAt:
        """An episode that all processes run, after so many of a period's meta-steps.

        In the place of one that failed it has the windows that were left of that one.
        """
        windows = period.training.windows
        return EpisodeAt(number, self._sampler.task_of(number), windows - done % windows, 0)

    def _of_processes(self, period: Period) -> MetaStep:
        """A meta-step of the one episode that all processes run, each with its own optimizees."""
        state, progress, rank = self._state, self._state.progress, distributed.rank()
        if not progress.running:
            progress.running = [self._episode_of_all(period, progress.episodes, progress.done)]
        (episode,) = progress.running
        unroll = self.engines.of(rank, episode)
        if episode.window == 0:
            state.slots[rank] = self._begin_episode(unroll, episode, period)
        estimate = self._estimate(unroll, state.slots[rank], episode, period)
        window = estimate.window
        failed = window.failed.view(len(self._students), -1)
        moved_stuck = torch.stack((~failed.all(1), failed.any(1)), 1).to(estimate.loss.dtype)
        averaged = [
            distributed.average([*self._grads(index, estimate), torch.cat((loss[None], shares))])
            for index, (loss, shares) in enumerate(zip(estimate.loss, moved_stuck, strict=True))
        ]
        (losses,) = distributed.average([torch.stack((window.meta_loss, window.imitation_loss))])
        window, (losses, found, means) = window.read(
            losses,
            torch.stack([get_total_norm(grads) for *grads, _ in averaged]),
            torch.stack([each for *_, each in averaged]),
        )
        norms, failed_any = [], False
        for index, (loss, moved, stuck) in enumerate(means.tolist()):
            norm = found[index].item() if moved else math.nan
            self._update(index, averaged[index][:-1], norm, loss)
            failed_any |= stuck > 0 or not (math.isfinite(norm) and math.isfinite(loss))
            norms.append(norm)
        following = replace(episode, window=episode.window + 1)
        if failed_any or following.window == following.windows:
            following = self._episode_of_all(period, episode.number + 1, progress.done + 1)
        progress.running = [following]
        progress.failed_episodes += failed_any
        state.slots[rank] = Slot(window.end, estimate.carried)
        part = SlotWindow(rank, episode, unroll.task, window, norms)
        return MetaStep([part], losses, norms)

    def _of_slots(self, period: Period, slots: Slots) -> MetaStep:
        """A meta-step of the episodes in all slots, of which each process runs its own."""
        state, progress = self._state, self._state.progress
        for number in range(len(progress.running), slots.count):
            begun = self._episode(period, slots, progress.episodes + number)
            # Apart from the first meta-step on: slot k is k / K into its episode.
            place = number * begun.windows // slots.count
            progress.running.append(replace(begun, window=place))
        means = SlotMeans(self._students, slots.count)
        parts = []
        for slot in range(distributed.rank(), slots.count, distributed.world()):
            episode = progress.running[slot]
            unroll = self.engines.of(slot, episode)
            # A slot's numbers must not depend on the process that runs it.
            with distributed.apart():
                if slot not in state.slots:
                    state.slots[slot] = self._begin_episode(unroll, episode, period)
                estimate = self._estimate(unroll, state.slots[slot], episode, period, slot)
            grads = [self._grads(index, estimate) for index in range(len(self._students))]
            window, (found,) = estimate.window.read(torch.stack([*map(get_total_norm, grads)]))
            failed_rows = window.failed.view(len(self._students), -1)
            norms = torch.where(failed_rows.all(1), math.nan, found).tolist()
            for index, norm in enumerate(norms):
                losses = torch.stack((window.meta_loss[index], window.imitation_loss[index]))
                stuck = bool(failed_rows[index].any())
                means.add(slot, index, grads[index], norm, losses, stuck=stuck, clip=slots.clip)
            parts.append(SlotWindow(slot, episode, unroll.task, window, norms))
            state.slots[slot] = Slot(window.end, estimate.carried)
        mean_grads, norms, losses, failed = means.over_all()
        for index, norm in enumerate(norms):
            self._update(index, mean_grads[index], norm, losses[0, index].item())
        for slot, episode in enumerate(progress.running):
            following = replace(episode, window=episode.window + 1)
            if failed[slot] or following.window == following.windows:
                state.slots.pop(slot, None)
                following = self._episode(period, slots, episode.number + slots.count, slot)
            progress.running[slot] = following
        progress.failed_episodes += sum(failed)
        return MetaStep(parts, losses, norms)

    def _episode(
        self, period: Period, slots: Slots, number: int, slot: int | None = None
    ) -> EpisodeAt:
        """A new episode of a slot; ``None`` means a further slot."""
        others = [e.task for index, e in enumerate(self._state.progress.running) if index != slot]
        taken = others if slots.count <= len(self.engines) else []
        windows = self._sampler.windows_of(
            number, period.training.unroll, slots.shortest, slots.longest
        )
        return EpisodeAt(number, self._sampler.task_of(number, taken), windows, 0)

    def _begin_episode(self, unroll: Unroll, episode: EpisodeAt, period: Period) -> Slot:
        """Begin an episode, warm it up, and take the windows that it is to have behind it."""
        if period.own_warmup:
            config = self._students[0].config
            steps, lr = config.warmup_steps, config.warmup_lr
        else:
            training = period.training
            steps, lr = training.warmup_windows * training.unroll, training.warmup_lr
        number, drawn = episode.number, self._drawn(episode)
        where = begin_episode(
            unroll,
            self._sampler.generators("episode", number),
            self._sampler.batches(
                unroll.task, steps, "warm-up", number, among=self._split(unroll, episode).trained
            ),
            lr,
            None if drawn is None else loss_scales(drawn, self._students[0].weights()[0]),
        )
        for window in range(episode.window):
            with torch.no_grad():
                where = unroll.window(
                    where,
                    self._batches(unroll, episode, period, window),
                    conditions=self._of_window(episode, period, window),
                    teaching=self._teaching(episode, period, window),
                ).end
        return Slot(where, [])

    def _split(self, unroll: Unroll, episode: EpisodeAt) -> Split:
        """The training samples of an episode, and those that it leaves out."""
        generators = self._sampler.generators("split", episode.number)
        return split(unroll.task, unroll.amalgamation.held_out, generators)

    def _batches(self, unroll: Unroll, episode: EpisodeAt, period: Period, window: int) -> Batches:
        """The batches of one of an episode's windows."""
        draw = period.training.unroll, "window", episode.number, window
        among = self._split(unroll, episode).trained
        return self._sampler.batches(unroll.task, *draw, among=among)

    def _held_out(self, unroll: Unroll, episode: EpisodeAt, period: Period) -> Batches | None:
        """The batches of held-out samples in an episode's next window; ``None`` without any."""
        draw = period.training.unroll, "held-out", episode.number, episode.window
        among = self._split(unroll, episode).held_out
        return None if among is None else self._sampler.batches(unroll.task, *draw, among=among)

    def _drawn(self, episode: EpisodeAt) -> list[Drawn] | None:
        """What an episode has drawn for each row; ``None`` where there is nothing to draw."""
        if not self._conditions.any:
            return None
        generators = self._sampler.generators("conditions", episode.number)
        return [self._conditions.draw(generator) for generator in generators]

    def _of_window(self, episode: EpisodeAt, period: Period, window: int) -> StepConditions | None:
        """The conditions in one of an episode's windows; ``None`` where there are none."""
        drawn, steps = self._drawn(episode), period.training.unroll
        if drawn is None:
            return None
        horizon, like = episode.windows * steps, self._students[0].weights()[0].detach()
        return StepConditions.of(drawn, window * steps, steps, horizon, like)

    def _teaching(self, episode: EpisodeAt, period: Period, window: int) -> Teaching:
        """What teachers do in one of an episode's windows, if the next meta-step takes it."""
        fade, executed = 0.0, None
        steps, like = period.training.unroll, self._students[0].weights()[0].detach()
        if self._on_policy is not None:
            fade = self._on_policy.fade_at(self._state.progress.meta_step)
            drawn = [
                torch.randint(len(self._pool), (), generator=generator)
                for generator in self._sampler.generators("executed", episode.number)
            ]
            executed = put(torch.stack(drawn), like.device)
        horizon = episode.windows * steps
        return Teaching.of(self._pool, window * steps, steps, horizon, like, fade, executed)

    def _imitation_weight(self, period: Period) -> float:
        """The weight of the imitation loss in the next meta-step."""
        if self._on_policy is None:
            return period.imitation_weight
        left = self._on_policy.imitation_at(self._state.progress.meta_step)
        return left * period.imitation_weight

    def _estimate(
        self, unroll: Unroll, slot: Slot, episode: EpisodeAt, period: Period, *own: int
    ) -> Estimate:
        """Run an episode's next window and estimate its meta-gradient.

        Args:
            unroll: The episode's engine.
            slot: Where the episode stands.
            episode: The episode.
            period: The period.
            *own: What tells the window's draws from those of the meta-step's other windows.
        """
        meta_step = self._state.progress.meta_step

        def generators(student: int, *purpose: str | int) -> torch.Generator:
            return generator_for(self._seed + student, *purpose, meta_step, *own)

        return self._estimator.estimate(
            unroll,
            slot.trajectories,
            self._batches(unroll, episode, period, episode.window),
            loss_weights(
                self._training.il_mode,
                self._imitation_weight(period),
                generator_for(self._seed, "switch", meta_step, *own),
            ),
            generators,
            carried=slot.carried,
            perturbation=self._perturbation,
            input_noise=self._training.input_noise,
            conditions=self._of_window(episode, period, episode.window),
            teaching=self._teaching(episode, period, episode.window),
            held_out=self._held_out(unroll, episode, period),
        )

    def _grads(self, index: int, estimate: Estimate) -> list[Tensor]:
        """A student's meta-gradient; zeros where its loss does not depend on its weights."""
        if estimate.grads is not None:
            return estimate.grads[index]
        return [torch.zeros_like(w) for w in self._students[index].weights()]

    def _update(self, index: int, grads: Sequence[Tensor], norm: float, loss: float) -> None:
        """Update a replicate, by a meta-gradient of this norm."""
        rate = self._training.rate(self._state.progress.meta_step, self._meta_steps)
        self._state.replicates[index].update(grads, norm, loss, rate)
