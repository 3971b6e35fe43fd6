"""What every learned policy can do, and what all of them share: files, configurations, cells."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from amalgam import ops, weight_files
from amalgam.layout import Layout


class PolicyConfig(Protocol):
    """What is asked of a policy's configuration, a frozen dataclass that JSON can hold."""

    @property
    def warmup_steps(self) -> int:
        """SGD steps that the policy is to follow on from."""
        ...

    @property
    def warmup_lr(self) -> float:
        """Their learning rate."""
        ...


@runtime_checkable
class LearnedPolicy(Protocol):
    """A learned optimizer: what turns gradients into updates by weights that can be trained.

    Its state is a ``NamedTuple`` of tensors and numbers, made by :meth:`initial_state` and never
    changed in place.
    """

    @property
    def kind(self) -> str:
        """The kind's name, as files carry it."""
        ...

    @property
    def config(self) -> PolicyConfig:
        """Its architecture and constants."""
        ...

    @property
    def coordinatewise(self) -> bool:
        """Whether a coordinate's update depends on its own gradients alone.

        Where not, all of an optimizee's tensors are to be stepped together, as one flat vector.
        """
        ...

    def weights(self) -> list[Tensor]:
        """The weights, in the order in which :meth:`step` takes others."""
        ...

    def initial_state(self, like: Tensor, layout: Layout | None = None) -> Any:
        """The state before the first step.

        Args:
            like: The coordinates, shape (N,); their device is the state's.
            layout: Which tensors they are; where absent, one vector.

        Returns:
            The state, in the weights' dtype.
        """
        ...

    def step(
        self,
        grad: Tensor,
        state: Any,
        weights: Sequence[Tensor] | None = None,
        *,
        layout: Layout | None = None,
        generator: torch.Generator | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, Any]:
        """One step, differentiable in gradient, state and weights.

        To any order by ``backend="reference"``; fused kernels are differentiable once.

        Args:
            grad: The optimizee's gradient, shape (N,), of the weights' dtype.
            state: The carried state; not changed.
            weights: Weights to use in place of its own.
            layout: Which tensors the coordinates are, as :meth:`initial_state` was told.
            generator: Source of the noise that some policies train with; ``None`` for none, as
                when an optimizee is trained in earnest.
            backend: What computes it.

        Returns:
            The update (N,), to be subtracted, and the new state.

        Raises:
            ValueError: Shapes, dtypes or devices do not fit, or the backend's name is unknown.
            RuntimeError: The backend asked for can't compute this policy here.
        """
        ...

    def warm_up(self, grad: Tensor, state: Any, *, layout: Layout | None = None) -> Any:
        """The state after a warm-up step's gradient (N,), on which the policy does not act."""
        ...

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file that :func:`amalgam.policies.load_policy` reads."""
        ...


class Policy(nn.Module, ABC):
    """Base of the learned policies here, all :class:`LearnedPolicy`.

    Of the state's fields those named in ``per_tensor`` end in a dimension of tensors, those in
    ``shared`` belong to an optimizee as a whole, and all other tensors end in one of coordinates.

    Attributes:
        provenance: Where the weights come from, JSON-serialisable; kept by :meth:`save`.
    """

    kind: ClassVar[str]
    config_type: ClassVar[type[Any]]
    coordinatewise: ClassVar[bool] = True
    per_tensor: ClassVar[tuple[str, ...]] = ()
    shared: ClassVar[tuple[str, ...]] = ()
    config: Any

    def __init__(self, config: Any = None, *, provenance: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.config = self.config_type() if config is None else config
        self.provenance = dict(provenance or {})

    @abstractmethod
    def initial_state(self, like: Tensor, layout: Layout | None = None) -> Any:
        """See :meth:`LearnedPolicy.initial_state`."""

    @abstractmethod
    def step(
        self,
        grad: Tensor,
        state: Any,
        weights: Sequence[Tensor] | None = None,
        *,
        layout: Layout | None = None,
        generator: torch.Generator | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, Any]:
        """See :meth:`LearnedPolicy.step`."""

    @abstractmethod
    def warm_up(self, grad: Tensor, state: Any, *, layout: Layout | None = None) -> Any:
        """See :meth:`LearnedPolicy.warm_up`."""

    def weights(self) -> list[Tensor]:
        """The weights, in the order in which ``step`` takes others."""
        return list(self.parameters())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights, configuration and provenance to one safetensors file.

        Args:
            path: Where to; missing folders are made, the file appears whole or not at all.
        """
        about = {"config": asdict(self.config), "provenance": self.provenance}
        weight_files.write(path, self.kind, self.state_dict(), about)

    @classmethod
    def load(cls, name_or_path: str | os.PathLike[str]) -> Self:
        """Read a policy of this kind that :meth:`save` wrote.

        Args:
            name_or_path: A shipped policy's name, or a path.

        Raises:
            FileNotFoundError: It is neither.
            ValueError: The file is cut short, foreign, or its weights do not fit its
                configuration.
        """
        path = weight_files.locate(name_or_path)
        tensors, about = weight_files.read(path, cls.kind)
        try:
            config = cls.config_type(**about["config"])
            policy = cls(config, provenance=about["provenance"])
            for name, tensor in tensors.items():
                if not tensor.isfinite().all():
                    raise ValueError(f"{name} holds non-finite values")
            policy.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{str(path)!r} does not hold a usable {cls.kind}: {error}") from error
        return policy

    def extra_repr(self) -> str:
        """The configuration, for ``repr``."""
        return str(self.config)


def check_fields(
    config: Any,
    *,
    counts: Sequence[str] = (),
    decays: Sequence[str] = (),
    positive: Sequence[str] = (),
    not_negative: Sequence[str] = ("warmup_steps", "warmup_lr"),
) -> None:
    """Raise ValueError, naming the field, unless a configuration's numbers are what they may be.

    Args:
        config: The configuration.
        counts: Fields that must be 1 or more.
        decays: Fields that must be in [0, 1).
        positive: Fields that must be positive and finite.
        not_negative: Fields that must be 0 or more and finite.
    """
    for name in counts:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be 1 or more, not {getattr(config, name)}")
    for name in decays:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} must be in [0, 1), not {getattr(config, name)}")
    for name in positive:
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be positive and finite, not {getattr(config, name)}")
    for name in not_negative:
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be 0 or more and finite, not {getattr(config, name)}")


def reference_only(kind: str, backend: str) -> None:
    """Raise unless ``backend`` permits what a policy without fused kernels computes by: PyTorch."""
    ops.check_backend(backend)
    if backend.partition(":")[0] not in ("auto", "reference"):
        raise RuntimeError(
            f"backend={backend!r} has no kernel for a {kind}; 'auto' and 'reference' compute it"
        )


class Cell(nn.Module):
    """Weights of one LSTM layer, gates in the order input, forget, candidate, output.

    Initialised as Keras does: Glorot-uniform input kernel, orthogonal recurrent kernel, zero
    biases but for the forget gate's ones.
    """

    def __init__(self, inputs: int, hidden: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden, inputs))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden, hidden))
        self.bias = nn.Parameter(torch.zeros(4 * hidden))
        nn.init.xavier_uniform_(self.weight_ih, generator=generator)
        nn.init.orthogonal_(self.weight_hh, generator=generator)
        with torch.no_grad():
            self.bias[hidden : 2 * hidden] = 1.0


def glorot_head(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Linear:
    """A linear head with a Glorot-uniform kernel and zero bias."""
    head = nn.utils.skip_init(nn.Linear, inputs, outputs)
    nn.init.xavier_uniform_(head.weight, generator=generator)
    nn.init.zeros_(head.bias)
    return head


def zero_head(inputs: int, outputs: int, bias: float = 0.0) -> nn.Linear:
    """A linear head with a zero kernel and a constant bias."""
    head = nn.utils.skip_init(nn.Linear, inputs, outputs)
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, bias)
    return head
