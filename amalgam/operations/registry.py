"""Which implementation computes an operation, decided at the call.

A *backend* is one way to compute: plain PyTorch, C++, Triton, CUDA. It registers itself here with
a probe that says whether it works on this machine, and registers a kernel for every operation it
computes. Nothing else in the package knows the backends' names.

What a call asks for may end with what it lets a kernel do for speed: ``"triton:tf32"``,
``"auto:bf16,approximate"``. Kernels that can't, or need not, compute precisely instead.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from amalgam.hints import did_you_mean

REFERENCE = "reference"
FLOATS = frozenset({torch.float32, torch.float64})

PRECISIONS = ("ieee", "3xtf32", "tf32", "bf16")
APPROXIMATE = "approximate"
# Those with gradients. An operator without a rule for tangents would drop them in silence.
_DIFFERENTIABLE = frozenset({"student_step", "teacher_step", "teacher_distance", "choice_step"})

Kernel = Callable[..., Any]
Probe = Callable[[], str | None]
Accepts = Callable[..., str | None]


class BackendError(RuntimeError):
    """The backend asked for can't compute this; the message says why, and what can."""


class Numerics(NamedTuple):
    """What a call lets a kernel do for speed.

    Attributes:
        precision: Of matrix products at least: ``"ieee"`` (float32), ``"3xtf32"`` (nearly that),
            ``"tf32"`` or ``"bf16"``; ``None`` for the fastest that errs no more than float32 may.
        approximate: Whether tanh and sigmoid may have 11 bits.
    """

    precision: str | None = None
    approximate: bool = False


@dataclass(frozen=True)
class _KernelEntry:
    function: Kernel
    dtypes: Collection[torch.dtype] | None
    takes_numerics: bool
    accepts: Accepts | None


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
        self,
        operation: str,
        *,
        dtypes: Collection[torch.dtype] | None = FLOATS,
        takes_numerics: bool = False,
        accepts: Accepts | None = None,
    ) -> Callable[[Kernel], Kernel]:
        """Decorator: register a function as this backend's kernel for ``operation``.

        Args:
            operation: The operation's name, as in ``amalgam.ops``.
            dtypes: Dtypes of the deciding tensor that the kernel computes; ``None`` for any.
            takes_numerics: Whether the function takes the keyword ``numerics``, :class:`Numerics`.
            accepts: Called with the kernel's arguments, in its order, and ``numerics`` if it takes
                them; returns ``None`` where it computes this, else a sentence that says why not.
        """

        def register(function: Kernel) -> Kernel:
            if operation in self.kernels:
                raise ValueError(f"backend {self.name!r} has a kernel for {operation!r} already")
            self.kernels[operation] = _KernelEntry(function, dtypes, takes_numerics, accepts)
            return function

        return register

    def obstacle(
        self,
        operation: str,
        deciding: torch.Tensor,
        *args: Any,
        numerics: Numerics = Numerics(),  # noqa: B008
    ) -> str | None:
        """Why this backend can't compute an operation, or ``None``.

        Args:
            operation: The operation's name.
            deciding: The tensor whose device and dtype decide.
            *args: The kernel's arguments, its tensors at least, for what else may; or none, where
                nothing else is asked.
            numerics: What the call permits.
        """
        if _wants_tangents(operation) and self.name != REFERENCE:
            return "it has no forward-mode derivatives, as the reference has"
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
        if entry.accepts is not None and args:
            return entry.accepts(*args, **({"numerics": numerics} if entry.takes_numerics else {}))
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


def resolve(operation: str, requested: str, deciding: torch.Tensor, *args: Any) -> str:
    """The name of the backend that computes ``operation`` for a tensor like ``deciding``.

    Args:
        operation: The operation's name.
        requested: A backend's name, or ``"auto"`` for the fastest that works, and perhaps what a
            kernel may do for speed.
        deciding: The tensor whose device and dtype decide.
        *args: As :meth:`Backend.obstacle` takes them.

    Returns:
        The name; with what was permitted, where the backend's kernel makes use of it. Where
        ``torch.compile`` traces the call, what was requested, for the operator to choose by.

    Raises:
        ValueError: ``requested`` names no backend, or permits what nothing does.
        BackendError: The backend asked for can't compute this; the message says why.
    """
    # The compiler can't trace probes. For tangents it need not: all but the reference lack them.
    if torch.compiler.is_dynamo_compiling() and not _wants_tangents(operation):
        return requested
    backend, permitted = _chosen(operation, requested, deciding, *args)
    if permitted == Numerics() or not backend.kernels[operation].takes_numerics:
        return backend.name
    return f"{backend.name}:{requested.partition(':')[2]}"


def _chosen(
    operation: str, requested: str, deciding: torch.Tensor, *args: Any
) -> tuple[Backend, Numerics]:
    """The backend that :func:`resolve` names, and what was permitted."""
    name, permitted = _parse(requested)
    if name == "auto":
        for backend in sorted(_backends.values(), key=lambda b: -b.rank):
            if backend.obstacle(operation, deciding, *args, numerics=permitted) is None:
                return backend, permitted
        raise BackendError(f"no backend computes {operation!r} for {deciding.dtype} tensors")
    problem = _backends[name].obstacle(operation, deciding, *args, numerics=permitted)
    if problem is not None:
        raise BackendError(
            f"backend={requested!r} can't compute {operation!r} here: {problem}. "
            f"backend='auto' takes the fastest that works."
        )
    return _backends[name], permitted


def _wants_tangents(operation: str) -> bool:
    return forward_ad._current_level >= 0 and operation in _DIFFERENTIABLE


def check_backend(requested: str) -> None:
    """Raise unless ``requested`` is what ``backend=`` may be; see :func:`resolve`.

    Raises:
        TypeError: It is no string.
        ValueError: There is no such backend.
    """
    _parse(requested)


def _parse(requested: str) -> tuple[str, Numerics]:
    if not isinstance(requested, str):
        raise TypeError(
            f"backend must be a string, one of {['auto', *_backends]}, not {requested!r}"
        )
    name, _, words = requested.partition(":")
    if name != "auto" and name not in _backends:
        names = ["auto", *_backends]
        hint = did_you_mean(name, names)
        raise ValueError(f"backend must be one of {names}, not {name!r}{hint}")
    permitted = words.split(",") if words else []
    precisions = [word for word in permitted if word in PRECISIONS]
    if len(precisions) > 1:
        raise ValueError(f"backend={requested!r} must name one of {list(PRECISIONS)}, not several")
    for word in permitted:
        if word not in (*PRECISIONS, APPROXIMATE):
            known = [*PRECISIONS, APPROXIMATE]
            raise ValueError(
                f"backend={requested!r} may permit {known}, not {word!r}{did_you_mean(word, known)}"
            )
    return name, Numerics(precisions[0] if precisions else None, APPROXIMATE in permitted)


def compute(operation: str, requested: str, deciding: torch.Tensor, *args: Any) -> Any:
    """Run ``operation`` on the backend that :func:`resolve` chooses.

    Where ``torch.compile`` traces the call itself, and no operator's, that is the reference.
    """
    if torch.compiler.is_dynamo_compiling():
        if requested.partition(":")[0] not in ("auto", REFERENCE):
            raise BackendError(
                f"backend={requested!r} can't compute {operation!r} in torch.compile, which can "
                f"trace plain PyTorch alone; backend='auto' is 'reference' there."
            )
        return reference.kernels[operation].function(*args)
    backend, permitted = _chosen(operation, requested, deciding, *args)
    entry = backend.kernels[operation]
    if entry.takes_numerics:
        return entry.function(*args, numerics=permitted)
    return entry.function(*args)


def unobserved(*lists: Sequence[torch.Tensor]) -> bool:
    """Whether a kernel may be called without its torch operator, which only calls the kernel.

    Where there is a graph to record, a compiler, a tracer, a profiler, a mode, a transform or a
    subclass of tensors, somebody waits for the operator. Calling it costs microseconds a tensor.

    Args:
        *lists: The tensors of the call.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled():
        return False
    if torch._C._len_torch_dispatch_stack() or torch.autograd._profiler_enabled():
        return False
    if torch._C._len_torch_function_stack() and not all(
        isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack()
    ):
        return False  # torch.device(...) and set_default_device concern new tensors alone
    return all(map(plain, lists))


def plain(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether tensors have memory of their own that a kernel can be given the addresses of."""
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    return not transformed and _PLAIN.issuperset(map(type, tensors))


_PLAIN = {torch.Tensor, torch.nn.Parameter}


def once_differentiable(backward: torch.library.CustomOpDef, operation: str) -> None:
    """Have an operation's backward say that it can't be differentiated, when it is tried."""
    refuse_differentiation(
        backward, f"{operation} is differentiable once; backend='reference' is to any order"
    )


def refuse_differentiation(operator: torch.library.CustomOpDef, why: str) -> None:
    """Have an operator raise RuntimeError when its gradient is asked for, with these words."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(why)

    operator.register_autograd(refuse)


reference = register_backend(
    REFERENCE,
    rank=0,
    devices=None,
    probe=lambda: None,
    about="plain PyTorch: any device, differentiable to any order, the truth for the others",
)
