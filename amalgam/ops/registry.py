"""Which implementation computes an operation, decided at the call.

A *backend* is one way to compute: plain PyTorch, C++, Triton, CUDA. It registers itself here with
a probe that says whether it works on this machine, and registers a kernel for every operation it
computes. Nothing else in the package knows the backends' names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from amalgam.hints import did_you_mean

REFERENCE = "reference"
FLOATS = frozenset({torch.float32, torch.float64})

Kernel = Callable[..., Any]
Probe = Callable[[], str | None]


@dataclass(frozen=True)
class _KernelEntry:
    function: Kernel
    dtypes: Collection[torch.dtype] | None


@dataclass(frozen=True)
class Backend:
    """One way to compute the operations.

    Attributes:
        name: What users pass as ``backend=``.
        rank: ``"auto"`` prefers the higher rank among the backends that work.
        devices: Device types (``"cpu"``, ``"cuda"``) it computes on; ``None`` for any.
        probe: Returns ``None`` where the backend works on this machine, else a sentence that says
            why it does not and what would help.
        about: One line for reports.
    """

    name: str
    rank: int
    devices: Collection[str] | None
    probe: Probe
    about: str
    kernels: dict[str, _KernelEntry] = field(default_factory=dict)

    def kernel(
        self, operation: str, *, dtypes: Collection[torch.dtype] | None = FLOATS
    ) -> Callable[[Kernel], Kernel]:
        """Decorator: register a function as this backend's kernel for ``operation``.

        Args:
            operation: The operation's name, as in ``amalgam.ops``.
            dtypes: Dtypes of the deciding tensor that the kernel computes; ``None`` for any.
        """

        def register(function: Kernel) -> Kernel:
            if operation in self.kernels:
                raise ValueError(f"backend {self.name!r} has a kernel for {operation!r} already")
            self.kernels[operation] = _KernelEntry(function, dtypes)
            return function

        return register

    def obstacle(self, operation: str, deciding: torch.Tensor) -> str | None:
        """Why this backend can't compute an operation on a tensor like this one, or ``None``."""
        problem = self.probe()
        if problem is not None:
            return problem
        entry = self.kernels.get(operation)
        if entry is None:
            return f"it has no kernel for {operation!r}"
        if self.devices is not None and deciding.device.type not in self.devices:
            return f"it computes on {sorted(self.devices)}, the tensors are on {deciding.device}"
        if entry.dtypes is not None and deciding.dtype not in entry.dtypes:
            names = sorted(str(d).removeprefix("torch.") for d in entry.dtypes)
            return f"its {operation!r} computes {names}, the tensors are {deciding.dtype}"
        return None


@dataclass(frozen=True)
class BackendStatus:
    """What :func:`backends` reports of one backend.

    Attributes:
        name: The backend's name.
        works: Whether it can compute on this machine.
        reason: Why it does not work and what would help; ``None`` where it works.
        operations: The operations it has kernels for.
        about: One line on what it is.
    """

    name: str
    works: bool
    reason: str | None
    operations: tuple[str, ...]
    about: str


_backends: dict[str, Backend] = {}


def register_backend(
    name: str, *, rank: int, devices: Collection[str] | None, probe: Probe, about: str
) -> Backend:
    """Register a backend and return it, so that kernels can be added to it.

    Args: see :class:`Backend`.

    Raises:
        ValueError: A backend of that name is registered already.
    """
    if name in _backends:
        raise ValueError(f"a backend named {name!r} is registered already")
    _backends[name] = Backend(name, rank, devices, probe, about)
    return _backends[name]


def backends() -> Mapping[str, BackendStatus]:
    """Every backend this installation knows: whether it works here, and why not if it does not.

    Returns:
        Statuses by name, fastest first.
    """
    ordered = sorted(_backends.values(), key=lambda b: -b.rank)
    statuses = {}
    for backend in ordered:
        reason = backend.probe()
        statuses[backend.name] = BackendStatus(
            backend.name, reason is None, reason, tuple(sorted(backend.kernels)), backend.about
        )
    return statuses


def resolve(operation: str, requested: str, deciding: torch.Tensor) -> str:
    """The name of the backend that computes ``operation`` for a tensor like ``deciding``.

    Args:
        operation: The operation's name.
        requested: A backend's name, or ``"auto"`` for the fastest that works.
        deciding: The tensor whose device and dtype decide.

    Raises:
        ValueError: ``requested`` names no backend.
        RuntimeError: The backend asked for can't compute this; the message says why.
    """
    if requested == "auto":
        for backend in sorted(_backends.values(), key=lambda b: -b.rank):
            if backend.obstacle(operation, deciding) is None:
                return backend.name
        raise RuntimeError(f"no backend computes {operation!r} for {deciding.dtype} tensors")
    check_backend(requested)
    problem = _backends[requested].obstacle(operation, deciding)
    if problem is not None:
        raise RuntimeError(
            f"backend={requested!r} can't compute {operation!r} here: {problem}. "
            f"backend='auto' takes the fastest that works."
        )
    return requested


def check_backend(requested: str) -> None:
    """Raise ValueError unless ``requested`` is ``"auto"`` or names a backend."""
    if requested != "auto" and requested not in _backends:
        names = ["auto", *_backends]
        hint = did_you_mean(requested, names)
        raise ValueError(f"backend must be one of {names}, not {requested!r}{hint}")


def compute(operation: str, requested: str, deciding: torch.Tensor, *args: Any) -> Any:
    """Run ``operation`` on the backend that :func:`resolve` chooses."""
    name = resolve(operation, requested, deciding)
    return _backends[name].kernels[operation].function(*args)


def once_differentiable(backward: torch.library.CustomOpDef, operation: str) -> None:
    """Have an operation's backward say that it can't be differentiated, when it is tried."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"{operation} is differentiable once; backend='reference' is to any order"
        )

    backward.register_autograd(refuse)


reference = register_backend(
    REFERENCE,
    rank=0,
    devices=None,
    probe=lambda: None,
    about="plain PyTorch: any device, differentiable to any order, the truth for the others",
)
