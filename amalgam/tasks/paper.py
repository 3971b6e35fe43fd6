"""The tasks of the paper (Optimizer Amalgamation, ICLR 2022, section 5 and appendix).

Ten that it evaluates on, and those that its authors' code defines besides. Networks, batch sizes
and constants are the authors' code's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from amalgam.hints import did_you_mean
from amalgam.tasks import datasets
from amalgam.tasks.functions import quadratic, rastrigin
from amalgam.tasks.image_networks import Network, cell, convolutions, mlp, resnet
from amalgam.tasks.private import PrivateGradient
from amalgam.tasks.task import Task

_TRAIN = convolutions((16, 3, 1), 2, (32, 5, 1), 2)
_WIDER = convolutions((32, 3, 1), 2, (64, 5, 1), 2)
_DEEPER = convolutions((16, 3, 1), (32, 3, 1), (32, 3, 1), 2, (64, 3, 1), (64, 3, 1), 2)
_STRIDED = convolutions((16, 3, 1), (32, 3, 2), (32, 3, 1), (64, 3, 2), (64, 3, 1))


@dataclass(frozen=True)
class _Classification:
    """A network that learns to classify images.

    Attributes:
        network: Makes it.
        data: The data set's name.
        batch_size: Samples a step.
        gradient: How gradients are taken, if not plainly.
    """

    network: Network
    data: str
    batch_size: int = 128
    gradient: PrivateGradient | None = None


_TEN = {
    "train": _Classification(_TRAIN, "mnist"),
    "mlp": _Classification(mlp(20), "mnist"),
    "deeper": _Classification(_DEEPER, "mnist"),
    "wider": _Classification(_WIDER, "mnist"),
    "fmnist": _Classification(_TRAIN, "fmnist"),
    "svhn": _Classification(_TRAIN, "svhn"),
    "cifar": _Classification(_WIDER, "cifar10"),
    "resnet": _Classification(resnet(28), "cifar10"),
    "small-batch": _Classification(_TRAIN, "mnist", batch_size=32),
    "dp": _Classification(_TRAIN, "mnist", gradient=PrivateGradient()),
}

_CLASSIFICATIONS = {
    **_TEN,
    "strided": _Classification(_STRIDED, "mnist"),
    "average": _Classification(convolutions((16, 3, 1), 2, (32, 5, 1), 2, average=True), "mnist"),
    "kmnist": _Classification(_TRAIN, "kmnist"),
    "kmnist-dp": _Classification(_TRAIN, "kmnist", gradient=PrivateGradient()),
    "nas": _Classification(cell(16), "mnist"),
    "cifar-train": _Classification(_TRAIN, "cifar10"),
    "cifar-deeper": _Classification(_DEEPER, "cifar10"),
    "cifar-strided": _Classification(_STRIDED, "cifar10"),
    "cifar-nas": _Classification(cell(16), "cifar10"),
    "resnet-52": _Classification(resnet(52), "cifar10"),
    "wide-resnet": _Classification(resnet(28, width=4), "cifar10"),
    "cifar100-resnet-52": _Classification(resnet(52), "cifar100"),
    "cifar100-resnet-100": _Classification(resnet(100), "cifar100"),
}

PAPER = tuple(_TEN)
"""The ten tasks that the paper evaluates on, by its names for them."""

SHORT = (*(name for name in PAPER if name not in ("deeper", "cifar", "resnet")), "strided")
"""Those of the ten whose steps take a tenth of a second on a core at most, and a deep one."""

GROUPS = {"paper": PAPER, "short": SHORT}
"""Names that stand for several tasks."""


def image_task(
    name: str, batch_size: int | None = None, data: str | os.PathLike[str] = "auto"
) -> Task:
    """A network of the paper's that learns to classify images.

    The task's name is ``name`` and ``-published``, or ``-glyphs`` for a stand-in; after it comes
    ``-batch-64``, where the batch size is 64 and not the paper's.

    Args:
        name: One of :data:`PAPER`, or of the authors' further ones: ``"strided"``, ``"average"``,
            ``"kmnist"``, ``"kmnist-dp"``, ``"nas"``, ``"cifar-train"``, ``"cifar-deeper"``,
            ``"cifar-strided"``, ``"cifar-nas"``, ``"resnet-52"``, ``"wide-resnet"``,
            ``"cifar100-resnet-52"``, ``"cifar100-resnet-100"``.
        batch_size: Samples per step; where ``None``, the paper's: 128, for ``"small-batch"`` 32.
        data: ``"auto"``, ``"glyphs"`` or a folder; :func:`amalgam.tasks.datasets.load`.

    Raises:
        ValueError: There is no such task, or the data can't be read as they are.
        FileNotFoundError: The folder does not hold the data set.
    """
    if name not in _CLASSIFICATIONS:
        raise ValueError(
            f"name must be one of {list(_CLASSIFICATIONS)}, "
            f"not {name!r}{did_you_mean(name, _CLASSIFICATIONS)}"
        )
    of = _CLASSIFICATIONS[name]
    found = datasets.load(of.data, data)
    size = of.batch_size if batch_size is None else batch_size
    other_size = "" if size == of.batch_size else f"-batch-{size}"
    return Task(
        f"{name}-{found.source}{other_size}",
        partial(of.network, found.shape, found.classes),
        found.train,
        found.validation,
        batch_size=size,
        gradient=of.gradient,
        stand_in=found.source == "glyphs",
    )


TASKS: dict[str, Callable[..., Task]] = {
    **{name: partial(image_task, name) for name in _CLASSIFICATIONS},
    **{f"quadratic-{n}": partial(quadratic, n=n) for n in (10, 20, 100)},
    **{f"rastrigin-{n}": partial(rastrigin, n=n) for n in (2, 10, 20)},
}
"""All of them, by name; each takes ``batch_size=``, those on images ``data=``."""
