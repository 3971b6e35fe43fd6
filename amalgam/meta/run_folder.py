"""A run's folder: its checkpoint, the weights after its periods, its metrics, its students.

``checkpoint.safetensors`` holds all that a killed run needs to go on to the same bits,
``periods/`` the weights that a strategy may go back to, ``metrics.jsonl`` a line a meta-step (and
replicate), and ``student.safetensors`` the student when the run is done (of several replicates,
one each in ``replicate-0``, ``replicate-1``, ...). The first process alone writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from amalgam import files, nests, weight_files
from amalgam.meta import distributed
from amalgam.meta.episode import Episodes
from amalgam.meta.run_state import Progress, RunState

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.jsonl"
STUDENT = "student.safetensors"
PERIODS = "periods"

FORMAT = 2
"""Of checkpoints; it counts up when what a checkpoint holds gets another meaning."""


class RunFolder:
    """The folder of one run.

    Args:
        path: Where it is; made where missing.
        identity: What makes two runs the same, by name; a checkpoint of another run is refused.
    """

    def __init__(self, path: Path, identity: Mapping[str, str]) -> None:
        self.path = path
        self._identity = dict(identity)
        self._checkpoint = path / CHECKPOINT

    def open(self, *, resume: bool) -> bool:
        """Make the folder ready, and say whether it holds a checkpoint.

        Args:
            resume: Whether a run that is there may go on.

        Raises:
            FileExistsError: It holds a run that may not go on.
        """
        if self._checkpoint.exists() and not resume:
            raise FileExistsError(
                f"{str(self.path)!r} holds a run already; resume it, or choose another folder"
            )
        if distributed.rank() == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            for path in (self._checkpoint, *(self.path / PERIODS).glob("*.safetensors")):
                files.clear_leftovers(path)
        found: bool = distributed.from_first(self._checkpoint.exists())
        return found

    def save_checkpoint(self, state: RunState) -> None:
        """Write the state of all processes, whole or not at all."""
        everywhere = distributed.gather(state.standing())
        if distributed.rank():
            return
        tensors = state.learned()
        for rank, standing in enumerate(everywhere):
            tensors |= nests.prefixed(f"trajectories.{rank}", standing)
        about = {
            "format": FORMAT,
            "run": self._identity,
            "progress": state.progress.to_json(),
            "replicates": [replicate.to_json() for replicate in state.replicates],
        }
        weight_files.write(self._checkpoint, "checkpoint", tensors, about)

    def load_checkpoint(
        self, state: RunState, unrolls: Sequence[Episodes], device: torch.device
    ) -> None:
        """Take over the state that the checkpoint holds.

        Args:
            state: Gets it.
            unrolls: The run's, one a task.
            device: Where the trajectories are to be.

        Raises:
            ValueError: The checkpoint belongs to another run, has another format, or is damaged.
        """
        tensors, about = weight_files.read(self._checkpoint, "checkpoint")
        self._refuse_others(about)
        state.load_learned(tensors)
        for replicate, stored in zip(state.replicates, about["replicates"], strict=True):
            replicate.load_json(stored)
        state.progress = Progress.from_json(about["progress"])
        own = nests.under(f"trajectories.{distributed.rank()}", tensors)
        state.load_standing(own, unrolls, device)

    def _refuse_others(self, about: Mapping[str, Any]) -> None:
        """Raise where a checkpoint has another format or belongs to another run."""
        path, found = str(self._checkpoint), about.get("format", 1)
        if found != FORMAT:
            raise ValueError(
                f"{path!r} has the checkpoint format {found}, and this version of amalgam goes on "
                f"from format {FORMAT} alone; finish that run with the version that began it, or "
                f"begin it anew in another folder"
            )
        for key, value in self._identity.items():
            stored = about["run"].get(key)
            if stored != value:
                raise ValueError(f"{path!r} belongs to a run with {key} = {stored}, not {value}")

    def save_period(self, name: str, state: RunState) -> None:
        """Write what is learned at a period's end, for a strategy to go back to."""
        if distributed.rank() == 0:
            weight_files.write(self._period(name), "period", state.learned(), {"period": name})

    def load_period(self, name: str, state: RunState) -> None:
        """Take over what was learned at a period's end."""
        tensors, _ = weight_files.read(self._period(name), "period")
        state.load_learned(tensors)
        state.progress.checkpoint = name

    def _period(self, name: str) -> Path:
        return self.path / PERIODS / f"{name}.safetensors"

    @contextmanager
    def log(self, done: int) -> Iterator[IO[str]]:
        """The log of metrics, after its first lines.

        Args:
            done: How many lines are of meta-steps before the checkpoint; those after them are
                dropped, for their meta-steps are about to be computed again.
        """
        # The other processes take the same steps and write nothing.
        path = Path(os.devnull)
        if distributed.rank() == 0:
            path = self.path / METRICS
            if path.exists():
                lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
                with files.whole(path) as beside:
                    beside.write_text("".join(lines[:done]), encoding="utf-8")
        with path.open("a", encoding="utf-8") as stream:
            yield stream

    def student(self, replicate: int | None) -> Path:
        """Where a student is kept; ``None`` for the only one."""
        folder = self.path if replicate is None else self.path / f"replicate-{replicate}"
        return folder / STUDENT
