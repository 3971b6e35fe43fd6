"""Meta-training: a student, its task and its pool in; a better student out, in a run folder.

A run is a folder with ``checkpoint.safetensors``, ``metrics.jsonl`` and, when it is done,
``student.safetensors``. Killed at any moment and resumed, it goes on to the same numbers: all that
is random derives from the seed and from where the run stands, and a checkpoint holds the rest.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amalgam import files
from amalgam import weights as weights_io
from amalgam.evaluation.protocol import train as train_optimizee
from amalgam.meta.clipping import clip_adaptively
from amalgam.meta.unroll import Amalgamation, Trajectories, Unroll, Window
from amalgam.ops import StudentState
from amalgam.optimizer import AmalgamatedOptimizer
from amalgam.policies import Pool, PoolState, Student
from amalgam.seeding import generator_for
from amalgam.tasks import Task

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.jsonl"
STUDENT = "student.safetensors"

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
        unroll: Steps of a window.
        meta_lr: Learning rate of Adam on the student's weights.
        clip_ratio: Largest norm of a weight's meta-gradient over the weight's own
            (adaptive gradient clipping).
        clip_floor: Weights of smaller norm count as having this one.
        checkpoint_every: Meta-steps between checkpoints.
        validate_every: Meta-steps between meta-validations, the best of which decides the student
            that is kept; 0 for none, and the last student.
        validation_steps: Steps of a meta-validation's runs, without the warm-up's.
        validation_seeds: Runs of a meta-validation.
    """

    unroll: int = 100
    meta_lr: float = 1e-3
    clip_ratio: float = 0.1
    clip_floor: float = 1e-3
    checkpoint_every: int = 10
    validate_every: int = 20
    validation_steps: int = 400
    validation_seeds: int = 2

    def __post_init__(self) -> None:
        """Refuse what can't be run."""
        for name in ("unroll", "checkpoint_every", "validation_steps", "validation_seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
        if self.validate_every < 0:
            raise ValueError(f"validate_every must be 0 or more, not {self.validate_every}")
        for name in ("meta_lr", "clip_ratio", "clip_floor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")


@dataclass
class _Progress:
    """All of a run that changes, but for the weights and the meta-optimizer's state."""

    meta_step: int = 0
    skipped_meta_steps: int = 0
    best_score: float = math.inf
    best_meta_step: int = 0


class Trainer:
    """Meta-trains a student.

    Args:
        student: The student; its weights are trained in place.
        task: The optimizee and data to train it on.
        pool: The teachers.
        amalgamation: How the student is held to task and teachers.
        training: How meta-training proceeds.
        stages: Its stages, one after the other.
        seed: Decides everything random.
        folder: Where the run is kept; made where missing.
        provenance: Facts that the saved student is to carry beside those that are known here.
    """

    def __init__(
        self,
        student: Student,
        task: Task,
        pool: Pool,
        *,
        folder: str | os.PathLike[str],
        amalgamation: Amalgamation | None = None,
        training: Training | None = None,
        stages: Sequence[Stage] = (Stage(),),
        seed: int = 0,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        self.student = student
        self.task = task
        self.pool = pool
        self.amalgamation = amalgamation or Amalgamation()
        self.training = training or Training()
        self.stages = tuple(stages)
        self.seed = seed
        self.folder = Path(folder)
        self.provenance = dict(provenance or {})
        self._unroll = Unroll(task, student, pool, self.amalgamation)
        self._optimizer = torch.optim.Adam(
            student.parameters(), lr=self.training.meta_lr, eps=_META_EPS
        )
        self._progress = _Progress()
        self._best = self._snapshot()
        self._trajectories: Trajectories | None = None

    @property
    def meta_steps(self) -> int:
        """Meta-steps of the whole run."""
        return sum(stage.episodes * stage.windows for stage in self.stages)

    @property
    def meta_step(self) -> int:
        """Meta-steps done."""
        return self._progress.meta_step

    def run(
        self, *, resume: bool = False, report: Callable[[dict[str, Any]], None] | None = None
    ) -> Student:
        """Meta-train to the end and keep the best student by meta-validation.

        Args:
            resume: Go on from the folder's checkpoint, where there is one.
            report: Called with each meta-step's metrics, as they stand in ``metrics.jsonl``.

        Returns:
            The student, with the weights that were kept; saved as ``student.safetensors``.

        Raises:
            FileExistsError: The folder holds a run and ``resume`` was not asked for.
            ValueError: The checkpoint belongs to another run, or is damaged.
        """
        checkpoint = self.folder / CHECKPOINT
        if checkpoint.exists() and not resume:
            raise FileExistsError(
                f"{str(self.folder)!r} holds a run already; resume it, or choose another folder"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        files.clear_leftovers(checkpoint)
        if checkpoint.exists():
            self._load_checkpoint(checkpoint)
        self._trim_metrics()
        with (self.folder / METRICS).open("a", encoding="utf-8") as log:
            for number, stage, episode, window in self._remaining():
                row = self._meta_step(number, stage, episode, window)
                log.write(json.dumps(row, allow_nan=False) + "\n")
                log.flush()
                done = self._progress.meta_step
                if done % self.training.checkpoint_every == 0 or done == self.meta_steps:
                    self._save_checkpoint(checkpoint)
                if report is not None:
                    report(row)
        self._keep_best()
        self.student.save(self.folder / STUDENT)
        return self.student

    def _remaining(self) -> Iterator[tuple[int, Stage, int, int]]:
        """Stage number, stage, episode of the run, window of the episode, by meta-step to do."""
        meta_step = episode = 0
        for number, stage in enumerate(self.stages):
            for _ in range(stage.episodes):
                for window in range(stage.windows):
                    if meta_step >= self._progress.meta_step:
                        yield number, stage, episode, window
                    meta_step += 1
                episode += 1

    def _meta_step(self, number: int, stage: Stage, episode: int, window: int) -> dict[str, Any]:
        started = time.perf_counter()
        if window == 0:
            self._trajectories = self._begin(episode)
        assert self._trajectories is not None
        generator = generator_for(self.seed, "window", episode, window)
        batches = list(self.task.batches(generator, self.training.unroll))
        result = self._unroll.window(self._trajectories, batches)
        loss = result.meta_loss + stage.imitation_weight * result.imitation_loss
        grad_norm = self._update_weights(loss)
        self._trajectories = result.end

        self._progress.meta_step += 1
        row = {
            "meta_step": self._progress.meta_step,
            "stage": number,
            "episode": episode,
            "window": window,
            "meta_loss": result.meta_loss.item(),
            "imitation_loss": result.imitation_loss.item(),
            "grad_norm": grad_norm,
            "skipped_meta_steps": self._progress.skipped_meta_steps,
            **_window_metrics(result, self.pool),
        }
        every = self.training.validate_every
        if every and (self.meta_step % every == 0 or self.meta_step == self.meta_steps):
            row["validation"] = self._validate()
        row["seconds"] = time.perf_counter() - started
        return _json(row)

    def _begin(self, episode: int) -> Trajectories:
        begin = self._unroll.begin(generator_for(self.seed, "episode", episode))
        generator = generator_for(self.seed, "warm-up", episode)
        steps = self.student.config.warmup_steps
        return self._unroll.warm_up(begin, self.task.batches(generator, steps))

    def _update_weights(self, loss: Tensor) -> float:
        """One step of the meta-optimizer, unless the meta-gradient is not finite; its norm."""
        weights = list(self.student.parameters())
        norm = math.nan
        if loss.requires_grad:
            found = torch.autograd.grad(loss, weights, allow_unused=True)
            # A window in which the student took no step does not reach its weights.
            if any(grad is not None for grad in found):
                grads = [
                    torch.zeros_like(weight) if grad is None else grad
                    for weight, grad in zip(weights, found, strict=True)
                ]
                norm = torch.nn.utils.get_total_norm(grads).item()
        if not math.isfinite(norm):
            self._progress.skipped_meta_steps += 1
            return norm
        how = self.training
        clipped = clip_adaptively(weights, grads, ratio=how.clip_ratio, floor=how.clip_floor)
        for weight, grad in zip(weights, clipped, strict=True):
            weight.grad = grad.detach()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def _validate(self) -> float:
        """Mean log of the final validation loss, the student training optimizees of its own."""
        steps = self.student.config.warmup_steps + self.training.validation_steps
        logs = []
        for index in range(self.training.validation_seeds):
            curve = train_optimizee(
                self.task,
                lambda params: AmalgamatedOptimizer(
                    params, student=self.student, backend=self.amalgamation.backend
                ),
                steps=steps,
                seed=int(generator_for(self.seed, "validation", index).initial_seed()),
                every=steps,
            )
            logs.append(math.log(curve.final + 1e-10))
        score = math.fsum(logs) / len(logs)
        if score < self._progress.best_score:
            self._progress.best_score = score
            self._progress.best_meta_step = self._progress.meta_step
            self._best = self._snapshot()
        return score

    def _keep_best(self) -> None:
        kept = self._progress.meta_step
        if math.isfinite(self._progress.best_score):
            self.student.load_state_dict(self._best)
            kept = self._progress.best_meta_step
        self.student.provenance = {
            "seed": self.seed,
            "data": self.task.describe(),
            "teachers": list(self.pool.names),
            "mechanism": self.amalgamation.mechanism,
            "meta_steps": self._progress.meta_step,
            "kept_meta_step": kept,
            **self.provenance,
        }

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: t.detach().clone() for name, t in self.student.state_dict().items()}

    def _save_checkpoint(self, path: Path) -> None:
        tensors = {f"student.{name}": t for name, t in self._snapshot().items()}
        tensors |= {f"best.{name}": t for name, t in self._best.items()}
        for index, state in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": t for name, t in state.items()}
        assert self._trajectories is not None
        scale, params, state, teacher_params, teacher_state = self._trajectories
        tensors |= {
            "trajectories.scale": scale,
            "trajectories.params": params,
            "trajectories.teacher_params": teacher_params,
        }
        tensors |= {f"trajectories.state.{name}": t for name, t in state._asdict().items()}
        tensors |= {
            f"trajectories.teacher_state.{name}": t for name, t in teacher_state._asdict().items()
        }
        about = {**vars(self._progress), "run": self._identity()}
        if math.isinf(about["best_score"]):
            about["best_score"] = None
        weights_io.write(path, "checkpoint", tensors, about)

    def _load_checkpoint(self, path: Path) -> None:
        tensors, about = weights_io.read(path, "checkpoint")
        identity = about.pop("run")
        for key, value in self._identity().items():
            if identity.get(key) != value:
                raise ValueError(
                    f"{str(path)!r} belongs to a run with {key} = {identity.get(key)}, not {value}"
                )

        def under(prefix: str) -> dict[str, Tensor]:
            head = f"{prefix}."
            return {n.removeprefix(head): t for n, t in tensors.items() if n.startswith(head)}

        self.student.load_state_dict(under("student"))
        self._best = under("best")
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in under("optimizer").items():
            index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensor
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        stored = under("trajectories")
        self._trajectories = Trajectories(
            stored["scale"],
            stored["params"],
            StudentState(*(stored[f"state.{name}"] for name in StudentState._fields)),
            stored["teacher_params"],
            PoolState(*(stored[f"teacher_state.{name}"] for name in PoolState._fields)),
        )
        if about["best_score"] is None:
            about["best_score"] = math.inf
        self._progress = _Progress(**about)

    def _identity(self) -> dict[str, str]:
        """What makes two runs the same; a checkpoint of another one is refused."""
        return {
            "seed": str(self.seed),
            "task": f"{self.task.name}, batches of {self.task.batch_size}",
            "student": str(self.student.config),
            "teachers": str(self.pool.teachers),
            "amalgamation": str(self.amalgamation),
            "training": str(self.training),
            "stages": str(self.stages),
        }

    def _trim_metrics(self) -> None:
        """Drop what was logged after the checkpoint; it is about to be computed again."""
        path = self.folder / METRICS
        if not path.exists():
            return
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        with files.whole(path) as beside:
            beside.write_text("".join(lines[: self._progress.meta_step]), encoding="utf-8")


def _json(value: Any) -> Any:
    """The value as JSON can hold it: what is not finite becomes null."""
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _window_metrics(window: Window, pool: Pool) -> dict[str, Any]:
    """Losses, distances and skips of a window, by trajectory."""
    names = ("student", *pool.names)
    metrics: dict[str, Any] = {
        "loss": dict(zip(names, window.losses.mean(0).tolist(), strict=True)),
        "last_loss": dict(zip(names, window.losses[-1].tolist(), strict=True)),
        "skipped_steps": dict(zip(names, window.skipped.tolist(), strict=True)),
    }
    if len(pool):
        nearest = torch.nn.functional.one_hot(window.distances.argmin(1), len(pool))
        shares = nearest.double().mean(0).tolist()
        metrics["distance"] = dict(zip(pool.names, window.distances.mean(0).tolist(), strict=True))
        metrics["followed"] = dict(zip(pool.names, shares, strict=True))
    return metrics
