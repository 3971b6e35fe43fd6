"""Scalars for TensorBoard: the metrics of meta-training, and what an optimizer's steps do.

TensorBoard comes with the extra ``tensorboard``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

from amalgam.extras import import_extra
from amalgam.meta.run_folder import METRICS
from amalgam.optimizers.stats import StepStats

FOLDER = "tensorboard"
"""Where a run's folder has its events."""


class ScalarWriter(Protocol):
    """What is needed of a ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> None:
        """Add a number to the curve of that name."""


def summary_writer() -> Any:
    """The class ``torch.utils.tensorboard.SummaryWriter``.

    Raises:
        MissingExtra: TensorBoard is not installed.
    """
    return import_extra("torch.utils.tensorboard", "tensorboard", "writing scalars").SummaryWriter


class MetricsWriter:
    """Writes the rows of a run's ``metrics.jsonl`` as scalars, with the meta-step as the step.

    A number within other entries is named by the way to it: ``loss/adam``, ``slots/0/meta_loss``.
    Text and missing numbers are left out. Several replicates are runs of their own to TensorBoard,
    in folders such as ``replicate-0``.

    All rows are written, also those of earlier parts of a run that was resumed, and TensorBoard
    forgets the events that were in the folder before. So it shows what ``metrics.jsonl`` says:
    each meta-step once, whatever was killed and computed again.

    Args:
        run: The folder of the run; the events are written to ``tensorboard`` in it.

    Raises:
        MissingExtra: TensorBoard is not installed.
    """

    def __init__(self, run: Path) -> None:
        self._metrics = run / METRICS
        self._folder = run / FOLDER
        self._make = summary_writer()
        self._writers: dict[Path, Any] = {}
        self._read = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        for writer in self._writers.values():
            writer.close()

    def follow(self) -> None:
        """Write the rows that are new since the last call.

        Call it once the run has cut ``metrics.jsonl`` to its checkpoint: after a meta-step.
        """
        with self._metrics.open("rb") as file:
            file.seek(self._read)
            for line in file:
                self._read += len(line)
                self._write(json.loads(line))

    def _write(self, row: dict[str, Any]) -> None:
        step, replicate = row.pop("meta_step"), row.pop("replicate", None)
        folder = self._folder if replicate is None else self._folder / f"replicate-{replicate}"
        if folder not in self._writers:
            self._writers[folder] = self._make(str(folder), purge_step=0)
        _write_scalars(self._writers[folder], row, step)


def write_stats(writer: ScalarWriter, stats: Mapping[str, StepStats], step: int) -> None:
    """Write what :meth:`amalgam.AmalgamatedOptimizer.stats` found.

    The curves are ``update_over_parameter/NAME``, ``adam_lr/NAME`` and, for each kind of teacher,
    ``agreement_KIND/NAME``, so that TensorBoard shows parameters side by side. A ratio that does
    not exist is left out.

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter``, or anything with its ``add_scalar``.
        stats: By the parameters' names.
        step: The number of the step.
    """
    for name, found in stats.items():
        for what, value in found._asdict().items():
            by_curve = (
                {f"{what}_{kind}/{name}": cosine for kind, cosine in value.items()}
                if isinstance(value, dict)
                else {f"{what}/{name}": value}
            )
            _write_scalars(writer, by_curve, step)


def _write_scalars(writer: ScalarWriter, nested: Any, step: int) -> None:
    for tag, number in _numbers(nested, ()):
        writer.add_scalar(tag, number, step)


def _numbers(nested: Any, way: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    """The finite numbers in dictionaries and lists, each with the keys that lead to it."""
    if isinstance(nested, dict):
        for key, value in nested.items():
            yield from _numbers(value, (*way, key))
    elif isinstance(nested, list):
        for index, value in enumerate(nested):
            yield from _numbers(value, (*way, str(index)))
    elif isinstance(nested, (int, float)) and math.isfinite(nested):
        yield "/".join(way), nested
