"""What every learned policy can do, and what all of them share: kinds, files, configurations."""

from __future__ import annotations

import inspect
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from amalgam import dotted, ops, weight_files
from amalgam.hints import did_you_mean
from amalgam.layout import Layout
from amalgam.operations.registry import BackendError
from amalgam.ranges import check_fields

POLICIES: dict[str, type[Policy]] = {}
"""The policies by ``kind``: those of this package, and others whose class has a short ``kind``.

A class enters itself when it is defined; see :class:`Policy`.
"""


def policy_type(name: str) -> type[Policy]:
    """The class of a policy.

    Args:
        name: A kind from :data:`POLICIES`, or the dotted path of a class of one's own, such as
            ``"my.package.MyPolicy"``, whose module is then imported.

    Raises:
        ValueError: There is no such kind or class, or the class is no policy or an abstract one.
    """
    if name in POLICIES:
        return POLICIES[name]
    if "." not in name:
        raise ValueError(
            f"policy must be one of {list(POLICIES)}, or the dotted path of your own, such as "
            f"'my.package.MyPolicy', not {name!r}{did_you_mean(name, POLICIES)}"
        )
    found = dotted.find(name, "policy", "a class", "my.package.MyPolicy")
    if not isinstance(found, type) or not issubclass(found, Policy):
        raise ValueError(f"policy must be an amalgam.policies.Policy, which {name!r} is not")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise ValueError(f"policy must be a complete class; {name!r} does not define {missing}")
    return found


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Base of the configurations: architecture and constants of a policy, which JSON can hold.

    Attributes:
        warmup_steps: Steps of SGD before the policy acts, in meta-training and after.
        warmup_lr: The learning rate of those steps.
    """

    warmup_steps: int = 100
    warmup_lr: float = 0.05

    def __post_init__(self) -> None:
        """Refuse what can't be computed."""
        check_fields(self, whole=("warmup_steps",), not_negative=("warmup_lr",))


class Policy(nn.Module, ABC):
    """A learned optimizer: it turns gradients into updates by weights that can be trained.

    Its state is a ``NamedTuple`` of tensors and numbers, made by :meth:`initial_state` and never
    changed in place. Fields named in ``per_tensor`` end in a dimension of tensors, those named in
    ``shared`` belong to an optimizee as a whole, and all other tensors end in a dimension of
    coordinates.

    A subclass defines ``kind``, ``config_type``, :meth:`build`, :meth:`initial_state`,
    :meth:`step` and :meth:`warm_up`. A ``kind`` without a dot enters the class into
    :data:`POLICIES`. A class without a ``kind`` of its own gets its dotted path, by which
    :func:`amalgam.policies.load_policy` finds it in any process that can import it.

    Args:
        config: Architecture and constants; the defaults of ``config_type`` where absent.
        generator: Source of the initial weights; torch's global one where absent.
        provenance: Where the weights come from, JSON-serialisable; kept by :meth:`save`.

    Attributes:
        kind: The kind's name, as files carry it.
        config_type: The configuration's class, a :class:`PolicyConfig`.
        config: The configuration.
        coordinatewise: Whether a coordinate's update depends on its own gradients alone. Where
            not, all of an optimizee's tensors must be stepped together, as one flat vector.
        sees_params: Whether :meth:`step` takes ``params=``, the parameters (N,), as constants.
        per_tensor: Names of the state's fields that have a column a tensor.
        shared: Names of the state's fields that an optimizee has once.
        provenance: Where the weights come from.
    """

    kind: ClassVar[str]
    config_type: ClassVar[type[Any]]
    coordinatewise: ClassVar[bool] = True
    sees_params: ClassVar[bool] = False
    per_tensor: ClassVar[tuple[str, ...]] = ()
    shared: ClassVar[tuple[str, ...]] = ()
    config: Any

    def __init_subclass__(cls, **options: Any) -> None:
        """Enter a kind into the registry, or give the class its dotted path as its kind.

        Raises:
            ValueError: Another class has that kind.
        """
        super().__init_subclass__(**options)
        path = f"{cls.__module__}.{cls.__qualname__}"
        if "kind" not in vars(cls):
            cls.kind = path
        if "." in cls.kind:
            return
        known = POLICIES.get(cls.kind)
        # A notebook's cell that runs again defines its class again.
        if known is not None and f"{known.__module__}.{known.__qualname__}" != path:
            raise ValueError(
                f"kind must be unlike every other policy's, but that of {path}, {cls.kind!r}, is "
                f"the kind of {known.__module__}.{known.__qualname__}; choose another, or leave it "
                f"out"
            )
        POLICIES[cls.kind] = cls

    def __init__(
        self,
        config: Any = None,
        *,
        generator: torch.Generator | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config = self.config_type() if config is None else config
        if type(self.config) is not self.config_type:
            raise TypeError(
                f"config must be a {self.config_type.__name__} for a {type(self).__name__}, "
                f"not {config!r}"
            )
        self.provenance = dict(provenance or {})
        self.build(generator)

    @abstractmethod
    def build(self, generator: torch.Generator | None) -> None:
        """Make the modules and parameters that ``self.config`` asks for.

        Args:
            generator: Source of the initial weights; torch's global one where ``None``.
        """

    @abstractmethod
    def initial_state(self, like: Tensor, layout: Layout | None = None) -> Any:
        """The state before the first step.

        Args:
            like: The coordinates, shape (N,); their device is the state's.
            layout: Which tensors they are; where absent, one vector.

        Returns:
            The state, in the weights' dtype.
        """

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
        """One step, differentiable in gradient, state and weights.

        With ``backend="reference"`` it is differentiable to any order, by fused kernels once.

        Args:
            grad: The optimizee's gradient, shape (N,), of the weights' dtype.
            state: The carried state; not changed.
            weights: Weights to use in place of its own, in the order of :meth:`weights`.
            layout: Which tensors the coordinates are, the same as in :meth:`initial_state`.
            generator: Source of the noise that some policies train with; ``None`` for none, as
                when an optimizee is trained after meta-training.
            backend: What computes it.

        Returns:
            The update (N,), to be subtracted, and the new state.

        Raises:
            ValueError: Shapes, dtypes or devices do not fit, or the backend's name is unknown.
            RuntimeError: The backend asked for can't compute this policy here.
        """

    @abstractmethod
    def warm_up(self, grad: Tensor, state: Any, *, layout: Layout | None = None) -> Any:
        """The state after a warm-up step's gradient (N,), on which the policy does not act."""

    def weights(self) -> list[Tensor]:
        """The weights, in the order in which :meth:`step` takes others."""
        return list(self.parameters())

    @property
    def description(self) -> str:
        """What its recipe says in a sentence; empty where no recipe is known."""
        resolved = self.provenance.get("resolved")
        return str(resolved.get("description") or "") if isinstance(resolved, dict) else ""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a safetensors file that :func:`amalgam.policies.load_policy` reads.

        It warns where the class's ``kind`` does not lead back to the class, as with a class that a
        function defines: then only the class's own :meth:`load` reads the file.

        Args:
            path: Where to; missing folders are made, the file appears whole or not at all.
        """
        try:
            named: type[Policy] | None = policy_type(self.kind)
        except ValueError:
            named = None
        if named is not type(self):
            warnings.warn(
                f"load_policy can't read {str(path)!r}, as its kind, {self.kind!r}, does not lead "
                f"to the class {type(self).__qualname__}; {type(self).__qualname__}.load can. "
                f"Define the class at the top of a module that can be imported",
                stacklevel=2,
            )
        about = {"config": asdict(self.config), "provenance": self.provenance}
        weight_files.write(path, self.kind, self.state_dict(), about)

    @classmethod
    def load(cls, name_or_path: str | os.PathLike[str]) -> Self:
        """Read a policy of this kind that :meth:`save` wrote, in the dtype that it had.

        Args:
            name_or_path: As :func:`amalgam.weight_files.locate` takes it.

        Raises:
            FileNotFoundError: There is no such file.
            MissingExtra: It is on the hub, and huggingface_hub is not installed.
            ValueError: The file is cut short, foreign, or its weights do not fit its
                configuration.
        """
        path = weight_files.locate(name_or_path)
        tensors, about = weight_files.read(path, cls.kind)
        try:
            config = cls.config_type(**about["config"])
            cls._check_shapes(config, tensors)
            policy = cls(config, provenance=about["provenance"])
            own = policy.state_dict(keep_vars=True)
            for name, tensor in tensors.items():
                if not tensor.isfinite().all():
                    raise ValueError(f"{name} holds non-finite values")
                if name in own:
                    if tensor.is_floating_point() != own[name].is_floating_point():
                        raise ValueError(f"{name} must be {own[name].dtype}, not {tensor.dtype}")
                    # What is loaded is rounded to the dtype that is there.
                    own[name].data = own[name].data.to(tensor.dtype)
            policy.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{str(path)!r} does not hold a usable {cls.kind}: {error}") from error
        return policy

    @classmethod
    def _check_shapes(cls, config: Any, tensors: Mapping[str, Tensor]) -> None:
        """Hold a file's tensors against its configuration before memory is taken for that.

        Raises:
            ValueError: Names or shapes are others.
        """
        try:
            with torch.device("meta"):
                wanted = {name: tensor.shape for name, tensor in cls(config).state_dict().items()}
        except (NotImplementedError, RuntimeError):
            return  # A class of the user's own may compute its initial weights.
        found = {name: tensor.shape for name, tensor in tensors.items()}
        for name in {**wanted, **found}:
            if wanted.get(name) != found.get(name):
                raise ValueError(
                    f"{name} must have {_shape(wanted.get(name))} by its configuration, "
                    f"not {_shape(found.get(name))}"
                )

    def extra_repr(self) -> str:
        """The configuration, for ``repr``."""
        return str(self.config)


class ReferencePolicy(Policy):
    """Base of the policies that have no fused kernels: plain PyTorch computes them.

    A subclass defines :meth:`compute` in the place of :meth:`step`.
    """

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
        """One step; see :meth:`Policy.step`. ``generator`` is not used: nothing is random."""
        reference_only(self.kind, backend)
        return self.compute(grad, state, self.weights() if weights is None else weights, layout)

    @abstractmethod
    def compute(
        self, grad: Tensor, state: Any, weights: Sequence[Tensor], layout: Layout | None
    ) -> tuple[Tensor, Any]:
        """One step in PyTorch's operations, differentiable to any order.

        Args:
            grad: The optimizee's gradient, shape (N,).
            state: The carried state; not changed.
            weights: The weights to use, in the order of :meth:`weights`.
            layout: Which tensors the coordinates are; where ``None``, one vector.

        Returns:
            The update (N,), to be subtracted, and the new state.
        """


def _shape(shape: torch.Size | None) -> str:
    return "no place" if shape is None else f"shape {tuple(shape)}"


def reference_only(kind: str, backend: str) -> None:
    """Raise unless ``backend`` permits plain PyTorch, by which such a policy is computed.

    Args:
        kind: What has no fused kernels, for the error.
        backend: The backend asked for.

    Raises:
        ValueError: The backend's name is unknown.
        BackendError: It is neither ``"auto"`` nor ``"reference"``.
    """
    ops.check_backend(backend)
    if backend.partition(":")[0] not in ("auto", "reference"):
        raise BackendError(
            f"backend={backend!r} has no kernel for a {kind}; 'auto' and 'reference' compute it"
        )


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
