"""A run's folder: its checkpoint, the weights after its periods, its metrics, its students.

* ``checkpoint.safetensors`` holds all that a killed run needs to go on to the same bits.
* ``periods/`` holds weights and meta-optimizer after each period, if the strategy goes back.
* ``metrics.jsonl`` has one line per meta-step and replicate.
* ``student.safetensors`` is the student, once the run is done. Several replicates have one each, in
  ``replicate-0``, ``replicate-1``, and so on.

The first process alone writes.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from amalgam import distributed, files, nests, weight_files
from amalgam.meta.episode import Episodes
from amalgam.meta.run_state import Progress, RunState
from amalgam.policies import Policy

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.jsonl"
STUDENT = "student.safetensors"
PERIODS = "periods"

FORMAT = 6
"""The format of checkpoints; it counts up when what a checkpoint holds gets another meaning."""

LATER = ("dtype", "optimizees")
"""Settings that checkpoints of this format may lack, as those of earlier versions do."""


class RunFolder:
    """The folder of one run.

    Args:
        path: Where the folder is; :meth:`open` makes it if it is missing.
        identity: The run's settings, by name. A checkpoint that has others is refused.
    """

    def __init__(self, path: Path, identity: Mapping[str, str]) -> None:
        self.path = path
        self._identity = dict(identity)
        self._checkpoint = path / CHECKPOINT
        self._log: IO[str] | None = None

    def open(self, *, resume: bool) -> bool:
        """Make the folder, remove what interrupted writes left in it, and look for a checkpoint.

        Args:
            resume: Whether a run that the folder holds may go on.

        Returns:
            Whether the folder holds a checkpoint.

        Raises:
            FileExistsError: The folder holds a checkpoint and ``resume`` is false.
        """
        if self._checkpoint.exists() and not resume:
            raise FileExistsError(
                f"{str(self.path)!r} holds a run already; resume it, or choose another folder"
            )
        if distributed.rank() == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            files.clear_leftovers(self.path)
        found: bool = distributed.from_first(self._checkpoint.exists())
        return found

    def save_checkpoint(self, state: RunState) -> None:
        """Write the state of all processes, whole or not at all.

        The log of the meta-steps before it reaches the disk first.
        """
        everywhere = distributed.gather(state.trajectory_tensors())
        if distributed.rank():
            return
        if self._log is not None:
            self._log.flush()
            os.fsync(self._log.fileno())
        tensors = state.learned()
        for trajectories in everywhere:
            tensors |= nests.prefixed("trajectories", trajectories)
        about = {
            "format": FORMAT,
            "run": self._identity,
            "progress": state.progress.to_json(),
            "replicates": [replicate.to_json() for replicate in state.replicates],
        }
        weight_files.write(self._checkpoint, "checkpoint", tensors, about)

    def load_checkpoint(
        self,
        state: RunState,
        engine_of: Callable[[int], Episodes | None],
        device: torch.device,
    ) -> None:
        """Load the state that the checkpoint holds.

        Args:
            state: The state to load it into.
            engine_of: As in :meth:`RunState.load_trajectory_tensors`; called when all else is
                loaded.
            device: The device to load the trajectories to.

        Raises:
            ValueError: The checkpoint belongs to another run, has another format, or is damaged.
        """
        tensors, about = weight_files.read(self._checkpoint, "checkpoint")
        self._refuse_others(about)
        try:
            state.load_learned(tensors)
            for replicate, stored in zip(state.replicates, about["replicates"], strict=True):
                replicate.load_json(stored)
            state.progress = Progress.from_json(about["progress"])
            state.load_trajectory_tensors(nests.under("trajectories", tensors), engine_of, device)
        except (AttributeError, LookupError, RuntimeError, StopIteration, TypeError) as error:
            raise ValueError(
                f"{str(self._checkpoint)!r} does not hold this run's state: {error!r}"
            ) from error

    def _refuse_others(self, about: Mapping[str, Any]) -> None:
        """Raise if a checkpoint has another format or belongs to another run."""
        path, found = str(self._checkpoint), about.get("format", 1)
        if found != FORMAT:
            raise ValueError(
                f"{path!r} has the checkpoint format {found}, and this version of amalgam goes on "
                f"from format {FORMAT} alone; finish that run with the version that began it, or "
                f"begin it anew in another folder"
            )
        run = about.get("run")
        for key, value in self._identity.items():
            stored = run.get(key) if isinstance(run, dict) else None
            if stored != value and not (stored is None and key in LATER):
                raise ValueError(f"{path!r} belongs to a run with {key} = {stored}, not {value}")

    def save_period(self, name: str, state: RunState) -> None:
        """Write weights and meta-optimizers at a period's end, for a strategy to go back to."""
        if distributed.rank() == 0:
            weight_files.write(self._period(name), "period", state.learned(), {"period": name})

    def load_period(self, name: str, state: RunState) -> None:
        """Load what :meth:`save_period` wrote under this name."""
        tensors, _ = weight_files.read(self._period(name), "period")
        state.load_learned(tensors)
        state.progress.checkpoint = name

    def _period(self, name: str) -> Path:
        return self.path / PERIODS / f"{name}.safetensors"

    @contextmanager
    def log(self, meta_step: int, replicates: int) -> Iterator[IO[str]]:
        """Cut the log of metrics to the meta-steps of the checkpoint, and open it to append to it.

        A run that was killed may have logged meta-steps later than its checkpoint. They are about
        to be computed again, so their lines are dropped. Lines that are lost are not needed: a
        warning names the file, and the run goes on. In all processes but the first what is written
        goes nowhere.

        Args:
            meta_step: How many meta-steps came before the checkpoint.
            replicates: How many lines each has.
        """
        if distributed.rank():
            # The other processes take the same steps and write nothing.
            with Path(os.devnull).open("a", encoding="utf-8") as stream:
                yield stream
            return
        path = self.path / METRICS
        logged = path.read_bytes() if path.exists() else b""
        kept = _lines_until(meta_step, logged)
        if len(kept) < meta_step * replicates:
            warnings.warn(
                f"{str(path)!r} lacks {meta_step * replicates - len(kept)} of the "
                f"{meta_step * replicates} lines before the checkpoint; the run goes on without "
                f"them",
                stacklevel=2,
            )
        if b"".join(kept) != logged:
            with files.whole(path) as beside:
                beside.write_bytes(b"".join(kept))
        with path.open("a", encoding="utf-8") as stream:
            files.sync_folder(self.path)
            self._log = stream
            try:
                yield stream
            finally:
                self._log = None

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of the log of metrics, as far as they are there; none where it is absent."""
        path = self.path / METRICS
        lines = path.read_bytes() if path.exists() else b""
        return [json.loads(line) for line in _lines_until(math.inf, lines)]

    def try_student(self, student: Policy) -> None:
        """Write a student to the folder, and remove the file again."""
        path = self.path / ".initial.part"
        student.save(path)
        path.unlink()

    def student(self, replicate: int | None) -> Path:
        """The path of a replicate's student; ``None`` means the run's only student."""
        folder = self.path if replicate is None else self.path / f"replicate-{replicate}"
        return folder / STUDENT


def _lines_until(meta_step: float, logged: bytes) -> list[bytes]:
    """The whole lines of a log up to a meta-step, or up to the first that is damaged."""
    kept = []
    for line in logged.splitlines(keepends=True):
        try:
            late = json.loads(line)["meta_step"] > meta_step
        except (LookupError, RecursionError, TypeError, ValueError):
            break
        if late or not line.endswith(b"\n"):
            break
        kept.append(line)
    return kept
