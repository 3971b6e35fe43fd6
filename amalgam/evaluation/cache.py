"""Training runs kept as files, each under a digest of all that decides its numbers.

So an evaluation that was stopped goes on where it was, and several evaluations share the runs of
their baselines, tuning included. What decides a run: the task's data, network and batch size, the
optimizer with its settings or weights, its decay, the seed, the steps, what is read and when, the
device's type, PyTorch's version, and :data:`VERSION`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from amalgam import files
from amalgam.digest import digest_of, digest_of_text
from amalgam.evaluation.runs import Curve
from amalgam.seeding import generator_for
from amalgam.tasks import Task
from amalgam.tasks import cache as data_cache
from amalgam.version import describe

VERSION = 1
"""Of what a run is; changes where its numbers would."""


def default_folder() -> Path:
    """``evaluation`` in the folder of :mod:`amalgam.tasks.cache`."""
    return data_cache.folder() / "evaluation"


def fingerprint(task: Task) -> str:
    """What of a task decides a run's numbers, in one line.

    It takes in the data, the network as its ``repr`` tells and as it is initialised, the batch
    size, the loss's name, the task's own gradient, if it has one, and how it convolves; of code
    whose names tell less, as all do that is neither PyTorch's nor this package's, also a batch's
    loss and gradient as they are at first.
    """
    module = task.init_module(generator_for(0, "fingerprint"))
    network = f"{module!r} {digest_of([*module.parameters(), *module.buffers()])}"
    return (
        f"{task.describe()}, network {digest_of_text(network)}, batches of {task.batch_size}, "
        f"{named(task.loss)}, {named(task.gradient)}, {task.fast_convolutions}"
    ) + ("" if _known(task, module) else f", {begins(task)}")


def named(code: object) -> str:
    """The name of a function, or what an object's ``repr`` tells but for addresses in memory."""
    return getattr(code, "__qualname__", None) or re.sub(r" at 0x[0-9a-fA-F]+", "", repr(code))


def _known(task: Task, module: nn.Module) -> bool:
    """Whether loss and modules are PyTorch's or this package's own, and tell their settings."""
    # Neither a loss's smoothing nor the heads of attention are in their repr.
    if isinstance(task.loss, nn.Module):
        return False
    where = [type(part).__module__ for part in module.modules()]
    where.append(getattr(task.loss, "__module__", None) or "")
    return not any(isinstance(part, nn.MultiheadAttention) for part in module.modules()) and all(
        name.partition(".")[0] in ("torch", "amalgam") for name in where
    )


def begins(task: Task, digits: int = 4) -> str:
    """A batch's loss and gradient at initial parameters, to as many digits as machines share.

    Args:
        task: The task.
        digits: How many.
    """
    generator = generator_for(0, "fingerprint")
    module = task.init_module(generator)
    with torch.enable_grad():
        loss = task.backward(module, task.batches(generator, 1)[0], generator)
    grads = [p.grad.double() for p in module.parameters() if p.grad is not None]
    norm = torch.stack([grad.norm() for grad in grads]).norm()
    # Relative to the norm, as what is left of a sum that cancels is rounding; 0.0 has no sign.
    total = round((sum(grad.sum() for grad in grads) / norm).item(), digits - 1) + 0.0
    return f"loss {loss.item():.{digits}g}, gradient {norm.item():.{digits}g} {total:g}"


class RunCache:
    """A folder of runs.

    Args:
        folder: The folder; made where missing, once there is a run to keep.

    Raises:
        ValueError: It, or what it would be made in, is a file.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        there = next(
            path for path in (self.folder, *self.folder.absolute().parents) if path.exists()
        )
        if not there.is_dir():
            raise ValueError(
                f"cache must be a folder, not {str(folder)!r}: {str(there)!r} is a file; choose "
                "another by --cache or AMALGAM_CACHE"
            )

    def get(self, key: Mapping[str, Any]) -> Curve | None:
        """The run of a key; ``None`` where there is none, or its file is damaged.

        Args:
            key: All that decides the run, JSON-serialisable.
        """
        path = self._path(key)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            checksum = content.pop("checksum")
            if checksum != _digest(content) or content["key"] != _canonical(key):
                return None
            return Curve.from_dict(content["curve"])
        except (OSError, RecursionError, ValueError, KeyError, TypeError, AttributeError):
            # Whatever is damaged is run again, and then replaced.
            return None

    def put(self, key: Mapping[str, Any], curve: Curve) -> None:
        """Keep a run.

        Args:
            key: All that decides it.
            curve: The run.
        """
        content = {"key": _canonical(key), "curve": curve.as_dict(), **describe()}
        text = json.dumps({**content, "checksum": _digest(content)})
        with files.whole(self._path(key)) as beside:
            beside.write_text(text + "\n", encoding="utf-8")

    def _path(self, key: Mapping[str, Any]) -> Path:
        name = _digest(key)
        return self.folder / name[:2] / f"{name}.json"


def _canonical(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _digest(value: Any) -> str:
    return digest_of_text(json.dumps(value, sort_keys=True), 16)
