"""The optimizers that an evaluation compares: learned ones, teachers, and PyTorch's own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from amalgam.digest import digest_of
from amalgam.evaluation.runs import MakeOptimizer
from amalgam.optimizers import optimizer_of, optimizer_of_teacher
from amalgam.policies import FusedStudent, Policy, Pool
from amalgam.ranges import several_of

DECAYS = ("constant", "linear")
"""How a rate goes on: it stays, or falls to zero over a run's steps."""


@dataclass(frozen=True)
class Contender:
    """An optimizer to evaluate.

    Attributes:
        name: For tables and plots; no two contenders of an evaluation share it.
        make: Makes it for given parameters. It can be pickled where runs are to be spread over
            processes.
        kind: ``"student"``, ``"teacher"`` or ``"baseline"``.
        decay: One of :data:`DECAYS`.
        settings: For tables, what was tuned, such as ``"lr=0.01"``.
        identity: All that decides its steps, JSON-serialisable, for the cache; a contender without
            it is run anew each time.
        draws: Whether its steps may draw random numbers. Runs of those that do not can go side by
            side.
    """

    name: str
    make: MakeOptimizer
    kind: str = "baseline"
    decay: str = "constant"
    settings: str = ""
    identity: Mapping[str, Any] | None = None
    draws: bool = True

    def decaying(self, decay: str) -> Contender:
        """The same with another decay, which its name tells unless it is ``"constant"``."""
        name = self.name if decay == "constant" else f"{self.name}, {decay}"
        return replace(self, name=name, decay=decay)


def contenders_of(given: Contender | Sequence[Contender]) -> list[Contender]:
    """One contender, or several, as a list; raises a TypeError for what is none."""
    words = "a Contender, such as amalgam.evaluation.contenders.student_contender(name, student)"
    return several_of("contenders", given, Contender, words)


def student_contender(name: str, student: Policy) -> Contender:
    """A learned policy as a contender, with the warm-up that it was trained with.

    Args:
        name: The contender's name.
        student: The policy.
    """
    identity = {
        "policy": student.kind,
        "config": _plain(asdict(student.config)),
        "weights": digest_of(student.state_dict().values()),
    }
    if student.kind in _OF_POLICIES:
        identity["version"] = _OF_POLICIES[student.kind]
    make = partial(optimizer_of, policy=student)
    draws = not isinstance(student, FusedStudent)
    return Contender(name, make, "student", identity=identity, draws=draws)


def teacher_contenders(pool: Pool, taken: Collection[str] = ()) -> list[Contender]:
    """A pool's teachers as contenders, each on its own.

    One that has a baseline's name, as PyTorch's optimizers do, or one that is taken, has
    "(teacher)" behind it.

    Args:
        pool: The pool.
        taken: Names of other contenders.
    """
    return [
        Contender(
            f"{name} (teacher)" if name in {*BASELINES, *taken} else name,
            partial(optimizer_of_teacher, teacher=teacher),
            "teacher",
            identity=None if teacher.policy is not None else {"teacher": repr(teacher)},
        )
        for name, teacher in zip(pool.names, pool.teachers, strict=True)
    ]


def _plain(value: Any) -> Any:
    """Nested configurations with what JSON does not know as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def names_of(students: Sequence[str]) -> list[str]:
    """A name for each student's file: its stem, and as many of its folders as tell it apart.

    Args:
        students: Names of shipped students, paths, or addresses on the hub.

    Raises:
        ValueError: One is given twice.
    """
    parts = [Path(student.removesuffix(".safetensors")).parts for student in students]
    for index, path in enumerate(parts):
        if path in parts[:index]:
            raise ValueError(f"student {students[index]!r} is given twice")
    depth = 1
    names = [path[-1:] for path in parts]
    while len(set(names)) < len(names):
        depth += 1
        # A name that is not shared stays short.
        names = [
            path[-depth:] if names.count(name) > 1 else name
            for path, name in zip(parts, names, strict=True)
        ]
    return ["/".join(name) for name in names]


class Together(Optimizer):
    """Several optimizers, of different parameters, as one.

    Args:
        optimizers: The optimizers, at least one.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = tuple(optimizers)
        groups = [group for one in optimizers for group in one.param_groups]
        super().__init__([{"params": group["params"]} for group in groups], {})
        # The same objects, so that whoever sets a rate here sets it there.
        self.param_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The states of all of them."""
        return defaultdict(
            dict, {param: of for one in self._optimizers for param, of in one.state.items()}
        )

    @state.setter
    def state(self, value: Any) -> None:
        """Ignored: the optimizers have states of their own."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of each."""
        for one in self._optimizers:
            one.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step each of them."""
        for one in self._optimizers:
            one.step()


class _KernelMuon(torch.optim.Muon):
    """Muon that takes kernels of convolutions, too, as matrices of a row an output.

    Args:
        params: Contiguous tensors of two dimensions or more.
        settings: As PyTorch's takes them.
    """

    def __init__(self, params: Sequence[Tensor], **settings: Any) -> None:
        self._given = params
        self._matrices = [nn.Parameter(p.detach().view(len(p), p[:1].numel())) for p in params]
        super().__init__(self._matrices, **settings)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of the tensors that were given."""
        for param in self._given:
            if param.grad is not None:
                param.grad = None if set_to_none else torch.zeros_like(param.grad)

    def step(self, closure: Any = None) -> Any:
        """Step, by the gradients of the tensors that were given."""
        for param, matrix in zip(self._given, self._matrices, strict=True):
            matrix.grad = None if param.grad is None else param.grad.reshape(matrix.shape)
        return super().step(closure)


def muon(params: Iterable[Tensor], lr: float) -> Optimizer:
    """Muon for matrices and kernels, AdamW for all else, at one rate and without weight decay.

    Muon's updates are scaled to the root mean square of AdamW's, so that one rate suits both.

    Args:
        params: The parameters.
        lr: The rate.
    """
    everything = list(params)
    matrices = [param for param in everything if param.dim() >= 2]
    others = [param for param in everything if param.dim() < 2]
    optimizers: list[Optimizer] = []
    if matrices:
        optimizers.append(
            _KernelMuon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        )
    if others:
        optimizers.append(torch.optim.AdamW(others, lr=lr, weight_decay=0.0))
    return Together(optimizers)


_MAKERS: dict[str, Any] = {
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "SGD": torch.optim.SGD,
    "RMSprop": torch.optim.RMSprop,
    "Muon": muon,
}
# For the cache: what a baseline's name stood for, and how a kind of policies steps, has changed so
# often.
_VERSIONS = {"Muon": 2}
_OF_POLICIES = {"nominal": 2}
BASELINES = tuple(_MAKERS)
"""The optimizers that can be tuned; Muon is :func:`muon`, the others are PyTorch's."""

Setting = tuple[tuple[str, float], ...]
"""One point of a grid: arguments by name."""


def grid(**values: Sequence[float]) -> tuple[Setting, ...]:
    """All combinations of arguments' values."""
    points: list[Setting] = [()]
    for name, choices in values.items():
        points = [(*point, (name, value)) for point in points for value in choices]
    return tuple(points)


def baseline(optimizer: str, setting: Setting, decay: str) -> Contender:
    """One of :data:`BASELINES` at given arguments.

    Args:
        optimizer: Its name.
        setting: Its arguments.
        decay: One of :data:`DECAYS`.
    """
    arguments = dict(setting)
    identity: dict[str, Any] = {"optimizer": optimizer, "arguments": arguments}
    if optimizer in _VERSIONS:
        identity["version"] = _VERSIONS[optimizer]
    return Contender(
        optimizer,
        partial(_MAKERS[optimizer], **arguments),
        settings=", ".join(f"{name}={value:g}" for name, value in setting),
        identity=identity,
        draws=False,
    ).decaying(decay)
