"""Meta-training: a student, its task and its pool in; a better student out, in a run folder.

A run is a folder with ``checkpoint.safetensors``, ``metrics.jsonl`` and, when it is done,
``student.safetensors`` (of several replicates, one each in ``replicate-0``, ``replicate-1``, ...).
Killed at any moment and resumed, it goes on to the same numbers: all that is random derives from
the seed and from where the run stands, and a checkpoint holds the rest.

Under ``torchrun`` every process trains optimizees of its own with the same students; meta-gradients
are averaged, and the first process keeps the folder.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor

from amalgam import files, weight_files
from amalgam.device import resolve
from amalgam.evaluation.protocol import train as train_optimizee
from amalgam.meta import distributed, estimators
from amalgam.meta.clipping import clip_adaptively
from amalgam.meta.curriculum import (
    INITIAL,
    MODES,
    Finish,
    Period,
    Record,
    Strategy,
    Unrolls,
    loss_weights,
)
from amalgam.meta.estimators import Estimate, Estimator
from amalgam.meta.memory import Memory
from amalgam.meta.perturbation import Perturbation
from amalgam.meta.steps import tensors_of, with_tensors
from amalgam.meta.unroll import Amalgamation, Trajectories, Unroll, Window
from amalgam.optimizers import optimizer_of
from amalgam.policies import Policy, Pool, state_from_tensors, state_tensors
from amalgam.seeding import generator_for
from amalgam.tasks import Batch, Task

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.jsonl"
STUDENT = "student.safetensors"
PERIODS = "periods"

# Torch's eps stands beside the bias-corrected root, as Keras's nearly does; this is Keras's value.
_META_EPS = 1e-7


@dataclass(frozen=True)
class Stage:
    """A stretch of meta-training.

    Attributes:
        episodes: Episodes, each with a new optimizee.
        windows: Windows of each; a meta-step follows every one.
        imitation_weight: Weight of the imitation loss beside the meta-loss.
    """

    episodes: int = 10
    windows: int = 1
    imitation_weight: float = 0.2

    def __post_init__(self) -> None:
        """Refuse what can't be run."""
        for name in ("episodes", "windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
        if not self.imitation_weight >= 0:
            raise ValueError(f"imitation_weight must be 0 or more, not {self.imitation_weight}")


@dataclass(frozen=True)
class Training:
    """How meta-training proceeds.

    Attributes:
        unroll: Steps of a window, where stages and not a strategy say what to train.
        optimizees: How many a student trains at once, in each process.
        il_mode: What a window trains for, ``"sum"``, ``"switch"``, ``"imitation"`` or ``"meta"``;
            see :func:`amalgam.meta.curriculum.loss_weights`.
        input_noise: Standard deviation of noise on the gradients that students see in training.
        meta_lr: Learning rate of Adam on the student's weights.
        clip_ratio: Largest norm of a weight's meta-gradient over the weight's own
            (adaptive gradient clipping).
        clip_floor: Weights of smaller norm count as having this one.
        checkpoint_every: Meta-steps between checkpoints.
        validate_every: Meta-steps between meta-validations, the best of which decides the student
            that is kept; 0 for none, and the last student. A strategy validates by itself.
        validation_steps: Steps of a meta-validation's runs, without the warm-up's.
        validation_seeds: Runs of a meta-validation.
        validation_data: What a strategy's meta-validation trains its optimizees on: the tasks'
            ``"validation"`` data, or ``"train"``, as the authors do.
    """

    unroll: int = 100
    optimizees: int = 1
    il_mode: Literal["sum", "switch", "imitation", "meta"] = "sum"
    input_noise: float = 0.0
    meta_lr: float = 1e-3
    clip_ratio: float = 0.1
    clip_floor: float = 1e-3
    checkpoint_every: int = 10
    validate_every: int = 20
    validation_steps: int = 400
    validation_seeds: int = 2
    validation_data: Literal["validation", "train"] = "validation"

    def __post_init__(self) -> None:
        """Refuse what can't be run."""
        counts = ("unroll", "optimizees", "checkpoint_every", "validation_steps")
        for name in (*counts, "validation_seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
        for name in ("validate_every", "input_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        for name in ("meta_lr", "clip_ratio", "clip_floor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name, known in (("il_mode", MODES), ("validation_data", ("validation", "train"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, not {getattr(self, name)!r}")


@dataclass(frozen=True)
class _Stages:
    """Stages, as a strategy of one period each that validates nothing."""

    stages: tuple[Stage, ...]
    unroll: int
    warmup_steps: int
    warmup_lr: float

    def next(self, records: Sequence[Record]) -> Period | Finish:
        begin_from = records[-1].name if records else INITIAL
        if len(records) == len(self.stages):
            return Finish(begin_from)
        stage = self.stages[len(records)]
        unrolls = Unrolls(self.unroll, stage.windows, stage.episodes, 0, self.warmup_lr)
        return Period(
            len(records), 0, 0, begin_from, unrolls, stage.imitation_weight, validation=unrolls
        )


@dataclass
class _Replicate:
    """One student of a run: what of it changes.

    Attributes:
        student: Its weights, trained in place.
        optimizer: Their meta-optimizer.
        best: The weights of its best meta-validation.
        skipped_meta_steps: Meta-steps whose gradient was not finite.
        best_score: That validation's score.
        best_meta_step: When it was.
    """

    student: Policy
    optimizer: torch.optim.Adam
    best: dict[str, Tensor]
    skipped_meta_steps: int = 0
    best_score: float = math.inf
    best_meta_step: int = 0


@dataclass
class _Progress:
    """Where a run stands.

    Attributes:
        meta_step: Meta-steps done.
        done: Meta-steps done of this period.
        episodes: Episodes begun before this period.
        at: The checkpoint whose weights the run goes on from.
        meta_losses: The period's, for its record.
        records: The periods that are over.
    """

    meta_step: int = 0
    done: int = 0
    episodes: int = 0
    at: str = INITIAL
    meta_losses: list[float] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)


class _Rows(Sequence[Batch]):
    """Rows' batches as one, gathered when they are asked for."""

    def __init__(self, rows: Sequence[Sequence[Batch]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows[0])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Rows([row[index] for row in self._rows])
        batches = [row[index] for row in self._rows]
        if len(batches) == 1:
            return tuple(tensor[None] for tensor in batches[0])
        return tuple(torch.stack(tensors) for tensors in zip(*batches, strict=True))


class Trainer:
    """Meta-trains a student, or several replicates of one side by side.

    Args:
        student: The student, or the replicates; weights are moved to ``device`` and trained there,
            in place.
        task: The optimizee and data to train it on, or several, of which every episode takes one.
        pool: The teachers.
        amalgamation: How the student is held to task and teachers.
        training: How meta-training proceeds.
        stages: Its stages, one after the other.
        strategy: What says what to train, in the stages' place; of one replicate.
        estimator: How meta-gradients are come by.
        memory: What a window may keep for its way back.
        perturbation: What moves the weights that the meta-gradient is taken at.
        task_weights: How often each task is taken; all alike where absent.
        seed: Decides everything random; of replicates, the first one's, which the others count on
            from. Which task an episode takes, and ``il_mode="switch"``, the first decides for all.
        device: Where it all is computed, as in :func:`amalgam.device.resolve`; ``"auto"`` is a GPU
            where there is one. All that is random is drawn on the CPU, and so the same anywhere;
            files hold tensors of the CPU, and a run begun on one device goes on on another.
        folder: Where the run is kept; made where missing.
        provenance: Facts that the saved student is to carry beside those that are known here.
    """

    def __init__(
        self,
        student: Policy | Sequence[Policy],
        task: Task | Sequence[Task],
        pool: Pool,
        *,
        folder: str | os.PathLike[str],
        amalgamation: Amalgamation | None = None,
        training: Training | None = None,
        stages: Sequence[Stage] = (Stage(),),
        strategy: Strategy | None = None,
        estimator: Estimator | None = None,
        memory: Memory | None = None,
        perturbation: Perturbation | None = None,
        task_weights: Sequence[float] | None = None,
        seed: int = 0,
        device: str | torch.device = "auto",
        provenance: dict[str, Any] | None = None,
    ) -> None:
        self.device = resolve(device)
        students = [student] if isinstance(student, Policy) else list(student)
        students = [one.to(self.device) for one in students]
        tasks = [task] if isinstance(task, Task) else task
        self.tasks = tuple(one.to(self.device) for one in tasks)
        self.task_weights = tuple(task_weights or [1.0] * len(self.tasks))
        self.pool = pool
        self.amalgamation = amalgamation or Amalgamation()
        self.training = training or Training()
        self.stages = tuple(stages)
        self.strategy = strategy
        self.estimator = estimator or Estimator()
        self.memory = memory or Memory()
        self.perturbation = perturbation
        self.seed = seed
        self.folder = Path(folder)
        self.provenance = dict(provenance or {})
        self._check(students)
        config = students[0].config
        self._schedule = strategy or _Stages(
            self.stages, self.training.unroll, config.warmup_steps, config.warmup_lr
        )
        self._replicates = [
            _Replicate(
                one,
                torch.optim.Adam(one.parameters(), lr=self.training.meta_lr, eps=_META_EPS),
                _snapshot(one),
            )
            for one in students
        ]
        self._unrolls = [self._unroll(one) for one in self.tasks]
        self._progress = _Progress()
        self._trajectories: Trajectories | None = None
        self._carried: list[Tensor] = []

    def _check(self, students: Sequence[Policy]) -> None:
        several = len(students) > 1
        if not students:
            raise ValueError("student must be one or more, not none")
        if several and self.strategy is not None:
            raise ValueError(
                f"strategy goes back to earlier weights, which {len(students)} replicates would "
                f"have to do together; train them one by one, or by stages"
            )
        if self.estimator.kind == "pes":
            if several or self.training.optimizees > 1:
                raise ValueError("estimator 'pes' takes one student with one optimizee")
            if self.perturbation is not None or self.training.input_noise:
                raise ValueError("estimator 'pes' perturbs weights itself; give no other noise")
        if len(self.task_weights) != len(self.tasks) or not all(
            0 < weight < math.inf for weight in self.task_weights
        ):
            raise ValueError(
                f"task_weights must be {len(self.tasks)} positive numbers, a task each, "
                f"not {list(self.task_weights)}"
            )

    def _unroll(self, task: Task) -> Unroll:
        students = [r.student for r in self._replicates] * self.estimator.particles
        return Unroll(
            task,
            students,
            self.pool,
            self.amalgamation,
            memory=self.memory,
            optimizees=self.training.optimizees,
            shared=self.estimator.particles > 1,
        )

    @property
    def student(self) -> Policy:
        """The student; of replicates, the first."""
        return self._replicates[0].student

    @property
    def students(self) -> list[Policy]:
        """The student, or all replicates."""
        return [replicate.student for replicate in self._replicates]

    @property
    def meta_steps(self) -> int | None:
        """Meta-steps of the whole run; ``None`` where a strategy finds out on the way."""
        if self.strategy is not None:
            return None
        return sum(stage.episodes * stage.windows for stage in self.stages)

    @property
    def meta_step(self) -> int:
        """Meta-steps done."""
        return self._progress.meta_step

    def run(
        self, *, resume: bool = False, report: Callable[[dict[str, Any]], None] | None = None
    ) -> Policy:
        """Meta-train to the end and keep the best student by meta-validation.

        Args:
            resume: Go on from the folder's checkpoint, where there is one.
            report: Called with each meta-step's metrics, as they stand in ``metrics.jsonl``; of
                replicates, with the first one's.

        Returns:
            The student (of replicates, the first), with the weights that were kept, as saved.

        Raises:
            FileExistsError: The folder holds a run and ``resume`` was not asked for.
            ValueError: The checkpoint belongs to another run, or is damaged.
        """
        checkpoint = self.folder / CHECKPOINT
        if checkpoint.exists() and not resume:
            raise FileExistsError(
                f"{str(self.folder)!r} holds a run already; resume it, or choose another folder"
            )
        first = distributed.rank() == 0
        if first:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in (checkpoint, *(self.folder / PERIODS).glob("*.safetensors")):
                files.clear_leftovers(path)
        if distributed.from_first(checkpoint.exists()):
            self._load_checkpoint(checkpoint)
        if first:
            self._trim_metrics()
            if self.strategy is not None and not self.meta_step:
                self._save_period(INITIAL)
        # Others' lines go nowhere: all processes take the same steps.
        path = self.folder / METRICS if first else Path(os.devnull)
        with path.open("a", encoding="utf-8") as log:
            while isinstance(period := self._schedule.next(self._progress.records), Period):
                self._train(period, log, report)
        self._finish(period)
        return self.student

    # ---- a period

    def _train(
        self, period: Period, log: IO[str], report: Callable[[dict[str, Any]], None] | None
    ) -> None:
        progress, every = self._progress, self.training.checkpoint_every
        if not progress.done and progress.at != period.begin_from:
            self._load_period(period.begin_from)
        over = False
        while not over:
            rows = self._meta_step(period)
            over = progress.done == period.training.meta_steps
            if over:
                self._close(period, rows)
            for row in rows:
                log.write(json.dumps(row, allow_nan=False) + "\n")
            log.flush()
            if over or progress.meta_step % every == 0:
                self._save_checkpoint(self.folder / CHECKPOINT)
            if report is not None:
                report(rows[0])

    def _close(self, period: Period, rows: list[dict[str, Any]]) -> None:
        """The period's record and, where a strategy may come back to it, its checkpoint."""
        progress = self._progress
        validation = math.nan
        if self.strategy is not None:
            validation = self._meta_validation(period)
            rows[0] |= _json({"meta_validation": validation, "period": period.name})
        losses = progress.meta_losses
        mean = math.fsum(losses) / len(losses)
        progress.records.append(Record.of(period, meta_loss=mean, validation=validation))
        progress.episodes += period.training.episodes
        progress.done, progress.at, progress.meta_losses = 0, period.name, []
        if self.strategy is not None and distributed.rank() == 0:
            self._save_period(period.name)

    def _save_period(self, name: str) -> None:
        path = self.folder / PERIODS / f"{name}.safetensors"
        weight_files.write(path, "period", self._learned(), {"period": name})

    def _load_period(self, name: str) -> None:
        tensors, _ = weight_files.read(self.folder / PERIODS / f"{name}.safetensors", "period")
        self._restore(tensors)
        self._progress.at = name

    # ---- a meta-step

    def _meta_step(self, period: Period) -> list[dict[str, Any]]:
        started = time.perf_counter()
        progress, how = self._progress, self.training
        windows = period.training.windows
        episode, window = progress.episodes + progress.done // windows, progress.done % windows
        unroll = self._unrolls[self._task_of(episode)]
        if window == 0:
            self._trajectories = self._begin(unroll, period, episode)
            self._carried = []
        assert self._trajectories is not None
        coefficients = loss_weights(
            how.il_mode,
            period.imitation_weight,
            generator_for(self.seed, "switch", progress.meta_step),
        )
        batches = self._batches(unroll.task, period.training.unroll, "window", episode, window)
        estimate = self._estimate(unroll, batches, coefficients)
        norms = self._update_weights(estimate)
        self._trajectories, self._carried = estimate.window.end, estimate.carried

        progress.meta_step += 1
        progress.done += 1
        result = estimate.window
        (losses,) = distributed.average([torch.stack((result.meta_loss, result.imitation_loss))])
        progress.meta_losses.append(losses[0].mean().item())
        rows = []
        for index, replicate in enumerate(self._replicates):
            row = {
                "meta_step": progress.meta_step,
                "stage": period.stage,
                "episode": episode,
                "window": window,
                "meta_loss": losses[0, index].item(),
                "imitation_loss": losses[1, index].item(),
                "grad_norm": norms[index],
                "skipped_meta_steps": replicate.skipped_meta_steps,
                **_window_metrics(result, self.pool, self._rows_of(index)),
            }
            if len(self._replicates) > 1:
                row["replicate"] = index
            if len(self.tasks) > 1:
                row["task"] = unroll.task.name
            if self._is_time_to_validate():
                row["validation"] = self._validate(index)
            row["seconds"] = time.perf_counter() - started
            rows.append(_json(row))
        return rows

    def _task_of(self, episode: int) -> int:
        if len(self.tasks) == 1:
            return 0
        generator = generator_for(self.seed, "task", episode)
        return int(torch.multinomial(torch.tensor(self.task_weights), 1, generator=generator))

    def _estimate(
        self, unroll: Unroll, batches: Sequence[Batch], coefficients: tuple[float, float]
    ) -> Estimate:
        assert self._trajectories is not None
        step = self._progress.meta_step

        def generators(student: int, *purpose: str | int) -> torch.Generator:
            return generator_for(self.seed + student, *purpose, step)

        if self.estimator.kind == "pes":
            return estimators.by_evolution(
                unroll, self._trajectories, batches, coefficients, generators, self.estimator,
                self._carried,
            )  # fmt: skip
        return estimators.through_window(
            unroll, self._trajectories, batches, coefficients, generators, self.perturbation,
            self.training.input_noise,
        )  # fmt: skip

    def _generators(self, *purpose: str | int) -> list[torch.Generator]:
        """Each row's own: of replicates by their seeds, of particles the same for all."""
        each = self.training.optimizees
        found = []
        for copy in range(len(self._replicates) * self.estimator.particles):
            replicate = copy if self.estimator.particles == 1 else 0
            for row in range(each):
                index = distributed.rank() * each + row
                # The first draws as it does alone.
                own = (index,) if index else ()
                found.append(generator_for(self.seed + replicate, *purpose, *own))
        return found

    def _rows_of(self, replicate: int) -> slice:
        each = self._unrolls[0].rows // len(self._replicates)
        return slice(replicate * each, (replicate + 1) * each)

    def _batches(self, task: Task, steps: int, *purpose: str | int) -> Sequence[Batch]:
        return _Rows([task.batches(generator, steps) for generator in self._generators(*purpose)])

    def _begin(self, unroll: Unroll, period: Period, episode: int) -> Trajectories:
        begin = unroll.begin(*self._generators("episode", episode))
        steps, lr = self._warm_up_of(period.training)
        batches = self._batches(unroll.task, steps, "warm-up", episode)
        return unroll.warm_up(begin, batches, lr) if steps else begin

    def _warm_up_of(self, unrolls: Unrolls) -> tuple[int, float]:
        """Steps and learning rate of a warm-up: a strategy's, or the student's own."""
        if isinstance(self._schedule, _Stages):
            return self._schedule.warmup_steps, self._schedule.warmup_lr
        return unrolls.warmup_windows * unrolls.unroll, unrolls.warmup_lr

    def _update_weights(self, estimate: Estimate) -> list[float]:
        """One step of the meta-optimizers, unless a meta-gradient is not finite; their norms."""
        how, norms = self.training, []
        for index, replicate in enumerate(self._replicates):
            weights = replicate.student.weights()
            skipped = estimate.window.skipped[self._rows_of(index), 0]
            # A window in which the student took no step does not reach its weights.
            moved = bool((skipped < len(estimate.window.losses)).any())
            found = estimate.grads[index] if estimate.grads is not None else None
            loss = estimate.loss[index]
            told = torch.stack((loss, torch.full_like(loss, float(moved))))
            *grads, told = distributed.average(
                [*(found or [torch.zeros_like(w) for w in weights]), told]
            )
            mean_loss, share_moved = told.tolist()
            norm = torch.nn.utils.get_total_norm(grads).item() if share_moved else math.nan
            norms.append(norm)
            if not math.isfinite(norm) or not math.isfinite(mean_loss):
                replicate.skipped_meta_steps += 1
                continue
            clipped = clip_adaptively(weights, grads, ratio=how.clip_ratio, floor=how.clip_floor)
            for weight, grad in zip(weights, clipped, strict=True):
                weight.grad = grad.detach()
            replicate.optimizer.step()
            replicate.optimizer.zero_grad()
        return norms

    # ---- validation

    def _is_time_to_validate(self) -> bool:
        every = self.training.validate_every
        if not every or self.strategy is not None:
            return False
        return self.meta_step % every == 0 or self.meta_step == self.meta_steps

    def _validate(self, index: int) -> float:
        """Mean log of the final validation loss, a student training optimizees of its own."""
        how, replicate = self.training, self._replicates[index]
        student, seed = replicate.student, self.seed + index
        steps = student.config.warmup_steps + how.validation_steps
        logs = []
        for task in self.tasks if distributed.rank() == 0 else ():
            for number in range(how.validation_seeds):
                curve = train_optimizee(
                    task,
                    lambda params: optimizer_of(params, student, self.amalgamation.backend),
                    steps=steps,
                    seed=int(generator_for(seed, "validation", number).initial_seed()),
                    every=steps,
                )
                logs.append(math.log(curve.final + 1e-10))
        score: float = distributed.from_first(math.fsum(logs) / max(len(logs), 1))
        if score < replicate.best_score:
            replicate.best_score = score
            replicate.best_meta_step = self.meta_step
            replicate.best = _snapshot(student)
        return score

    def _meta_validation(self, period: Period) -> float:
        """Mean meta-loss on a strategy's validation unrolls, always of the same episodes."""
        unrolls, losses = period.validation, []
        for task in self.tasks if distributed.rank() == 0 else ():
            unroll = Unroll(self._held_out(task), self.student, Pool([]), self.amalgamation)
            for episode in range(unrolls.episodes):
                where = self._begin_validation(unroll, unrolls, episode)
                for window in range(unrolls.windows):
                    generator = generator_for(self.seed, "validation", episode, window)
                    batches = _Rows([unroll.task.batches(generator, unrolls.unroll)])
                    with torch.no_grad():
                        result = unroll.window(where, batches)
                    where = result.end
                    losses.append(result.meta_loss.mean().item())
        mean: float = distributed.from_first(math.fsum(losses) / max(len(losses), 1))
        return mean

    def _begin_validation(self, unroll: Unroll, unrolls: Unrolls, episode: int) -> Trajectories:
        begin = unroll.begin(generator_for(self.seed, "validation", episode))
        steps, lr = self._warm_up_of(unrolls)
        generator = generator_for(self.seed, "validation", episode, "warm-up")
        batches = _Rows([unroll.task.batches(generator, steps)])
        return unroll.warm_up(begin, batches, lr) if steps else begin

    def _held_out(self, task: Task) -> Task:
        """The task to meta-validate on."""
        if self.training.validation_data == "train":
            return task
        size = min(task.batch_size, len(task.validation[0]))
        return replace(task, train=task.validation, batch_size=size)

    # ---- the folder

    def _finish(self, end: Finish) -> None:
        """Keep the best students, and save them."""
        if self.strategy is not None and end.checkpoint != self._progress.at:
            self._load_period(end.checkpoint)
        several = len(self._replicates) > 1
        for index, replicate in enumerate(self._replicates):
            kept: int | str = self.meta_step
            if self.strategy is not None:
                kept = end.checkpoint
            elif math.isfinite(replicate.best_score):
                replicate.student.load_state_dict(replicate.best)
                kept = replicate.best_meta_step
            replicate.student.provenance = {
                "seed": self.seed + index,
                "data": "; ".join(task.describe() for task in self.tasks),
                "teachers": list(self.pool.names),
                "mechanism": self.amalgamation.mechanism,
                "meta_steps": self.meta_step,
                "kept_meta_step": kept,
                "device": str(self.device),
                **self.provenance,
            }
            if distributed.rank() == 0:
                folder = self.folder / f"replicate-{index}" if several else self.folder
                replicate.student.save(folder / STUDENT)

    def _learned(self) -> dict[str, Tensor]:
        """Weights and meta-optimizers of all replicates."""
        tensors: dict[str, Tensor] = {}
        for index, replicate in enumerate(self._replicates):
            under = f"replicate.{index}" if index else ""
            named = {f"student.{name}": t for name, t in _snapshot(replicate.student).items()}
            named |= {f"best.{name}": t for name, t in replicate.best.items()}
            for number, state in replicate.optimizer.state_dict()["state"].items():
                named |= {f"optimizer.{number}.{name}": t for name, t in state.items()}
            tensors |= {f"{under}.{name}" if under else name: t for name, t in named.items()}
        return tensors

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what :meth:`_learned` gave."""
        for index, replicate in enumerate(self._replicates):
            own = _under(tensors, f"replicate.{index}") if index else tensors
            replicate.student.load_state_dict(_under(own, "student"))
            replicate.best = _under(own, "best")
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in _under(own, "optimizer").items():
                number, _, leaf = name.partition(".")
                state.setdefault(int(number), {})[leaf] = tensor
            groups = replicate.optimizer.state_dict()["param_groups"]
            replicate.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _standing(self) -> dict[str, Tensor]:
        """Where this process's trajectories stand, on the CPU: another process is to read it."""
        assert self._trajectories is not None
        where = self._trajectories
        tensors = {
            "scale": where.scale,
            "params": where.params,
            "teacher_params": where.teacher_params,
        }
        for index, tensor in enumerate(tensors_of(_tensors_for_numbers(where.states))):
            tensors[f"states.{index}"] = tensor.contiguous()
        for index, state in enumerate(where.teacher_state):
            tensors |= {f"teacher_state.{index}.{n}": t for n, t in state_tensors(state).items()}
        tensors |= {f"carried.{index}": t for index, t in enumerate(self._carried)}
        return {name: tensor.cpu() for name, tensor in tensors.items()}

    def _stand(self, tensors: dict[str, Tensor]) -> None:
        """Take over what :meth:`_standing` gave."""
        # Of the tasks one of that size will do: only the states' shape as nests is looked at.
        scale, params, teacher_params = (
            tensors[name].to(self.device) for name in ("scale", "params", "teacher_params")
        )
        size = params.shape[1]
        unroll = next(one for one in self._unrolls if one.task.layout.numel == size)
        blank = tuple(unroll.steps.initial(rows) for rows in unroll.by_student(params))
        stored = [tensor.to(self.device) for tensor in _in_order(_under(tensors, "states"))]
        filled = with_tensors(_tensors_for_numbers(blank), stored)
        pools: dict[str, dict[str, Tensor]] = {}
        for name, tensor in _under(tensors, "teacher_state").items():
            index, _, leaf = name.partition(".")
            pools.setdefault(index, {})[leaf] = tensor
        self._trajectories = Trajectories(
            scale,
            params,
            _numbers_back(filled, blank),
            teacher_params,
            tuple(state_from_tensors(pools[str(i)], self.device) for i in range(len(pools))),
        )
        self._carried = [t.to(self.device) for t in _in_order(_under(tensors, "carried"))]

    def _save_checkpoint(self, path: Path) -> None:
        everywhere = distributed.gather(self._standing())
        if distributed.rank():
            return
        tensors = self._learned()
        for rank, standing in enumerate(everywhere):
            under = f"trajectories.{rank}"
            tensors |= {f"{under}.{name}": tensor for name, tensor in standing.items()}
        progress = asdict(self._progress)
        progress["records"] = [record.to_json() for record in self._progress.records]
        progress["meta_losses"] = [repr(loss) for loss in self._progress.meta_losses]
        scores = [
            {
                "skipped_meta_steps": replicate.skipped_meta_steps,
                "best_score": repr(replicate.best_score),
                "best_meta_step": replicate.best_meta_step,
            }
            for replicate in self._replicates
        ]
        about = {"progress": progress, "replicates": scores, "run": self._identity()}
        weight_files.write(path, "checkpoint", tensors, about)

    def _load_checkpoint(self, path: Path) -> None:
        tensors, about = weight_files.read(path, "checkpoint")
        for key, value in self._identity().items():
            if about["run"].get(key) != value:
                raise ValueError(
                    f"{str(path)!r} belongs to a run with {key} = {about['run'].get(key)}, "
                    f"not {value}"
                )
        self._restore(tensors)
        for replicate, stored in zip(self._replicates, about["replicates"], strict=True):
            replicate.skipped_meta_steps = stored["skipped_meta_steps"]
            replicate.best_score = float(stored["best_score"])
            replicate.best_meta_step = stored["best_meta_step"]
        progress = about["progress"]
        progress["records"] = [Record.from_json(record) for record in progress["records"]]
        progress["meta_losses"] = [float(loss) for loss in progress["meta_losses"]]
        self._progress = _Progress(**progress)
        self._stand(_under(tensors, f"trajectories.{distributed.rank()}"))

    def _identity(self) -> dict[str, str]:
        """What makes two runs the same; a checkpoint of another one is refused."""
        memory = str(self.memory) if self.memory.cells != "float32" else ""
        return {
            "seed": str(self.seed),
            "processes": str(distributed.world()),
            "tasks": "; ".join(
                f"{task.name}, batches of {task.batch_size}, weight {weight:g}"
                for task, weight in zip(self.tasks, self.task_weights, strict=True)
            ),
            "student": f"{self.student.kind} {self.student.config}, {len(self._replicates)}",
            "teachers": str(self.pool.teachers),
            "amalgamation": str(self.amalgamation),
            "training": str(self.training),
            "estimator": str(self.estimator),
            "perturbation": str(self.perturbation),
            "memory": memory,
            "schedule": str(self._schedule),
        }

    def _trim_metrics(self) -> None:
        """Drop what was logged after the checkpoint; it is about to be computed again."""
        path = self.folder / METRICS
        if not path.exists():
            return
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        done = self.meta_step * len(self._replicates)
        with files.whole(path) as beside:
            beside.write_text("".join(lines[:done]), encoding="utf-8")


def _snapshot(policy: Policy) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in policy.state_dict().items()}


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin with a prefix and a dot, by the rest of their names."""
    start = prefix + "."
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}


def _in_order(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [tensors[str(index)] for index in range(len(tensors))]


def _tensors_for_numbers(state: Any) -> Any:
    """The nest of tuples with a tensor in each number's place."""
    if isinstance(state, tuple):
        parts = [_tensors_for_numbers(part) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return state if isinstance(state, Tensor) else torch.tensor(state)


def _numbers_back(filled: Any, like: Any) -> Any:
    """The nest with numbers again where ``like`` has some."""
    if isinstance(like, tuple):
        parts = [_numbers_back(part, other) for part, other in zip(filled, like, strict=True)]
        return type(like)(*parts) if hasattr(like, "_fields") else tuple(parts)
    return filled if isinstance(like, Tensor) else type(like)(filled.item())


def _json(value: Any) -> Any:
    """The value as JSON can hold it: what is not finite becomes null."""
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _window_metrics(window: Window, pool: Pool, rows: slice) -> dict[str, Any]:
    """Losses, distances and skips of a window's rows, by trajectory."""
    names = ("student", *pool.names)
    losses, distances = window.losses[:, rows].mean(1), window.distances[:, rows]

    def by_name(of: Sequence[str], values: Tensor) -> dict[str, Any]:
        return dict(zip(of, values.tolist(), strict=True))

    metrics: dict[str, Any] = {
        "loss": by_name(names, losses.mean(0)),
        "last_loss": by_name(names, losses[-1]),
        "skipped_steps": by_name(names, window.skipped[rows].sum(0)),
    }
    if len(pool):
        nearest = torch.nn.functional.one_hot(distances.argmin(2), len(pool))
        metrics["distance"] = by_name(pool.names, distances.mean((0, 1)))
        metrics["followed"] = by_name(pool.names, nearest.double().mean((0, 1)))
    return metrics
