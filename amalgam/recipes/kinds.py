"""Tables of a recipe whose ``kind`` decides which other keys they may have."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

from pydantic import PlainValidator, TypeAdapter, ValidationError
from torch.optim import Optimizer

from amalgam import dotted, ops
from amalgam.hints import did_you_mean
from amalgam.lr_decays import LRDecay
from amalgam.meta import Repeat, perturbation
from amalgam.meta.curriculum import STRATEGIES, choice_strategy, simple
from amalgam.meta.estimators import ESTIMATORS
from amalgam.policies import (
    POLICIES,
    AnyTeacher,
    PolicyTeacher,
    Pool,
    Teacher,
    TorchTeacher,
    load_policy,
    policy_type,
)


class NestedError(ValueError):
    """What is wrong within a table that one of several kinds reads.

    Args:
        errors: Pydantic's errors, their places relative to the table.
    """

    def __init__(self, errors: Sequence[Any]) -> None:
        super().__init__("; ".join(explain(error) for error in errors))
        self.errors = errors


def explain(error: Any) -> str:
    """One of pydantic's errors as: key, what is wrong, what it was."""
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, NestedError):
        return "; ".join(
            explain({**inner, "loc": (*error["loc"], *inner["loc"])}) for inner in cause.errors
        )
    key = ".".join(str(part) for part in error["loc"] if not _is_type(part)) or "recipe"
    message = re.sub(r"^(Value error|Input), ?", "", error["msg"])
    message = message.replace("be an object", "be a table").replace("a valid array", "a list")
    if error["type"] == "missing":
        return f"{key} is missing"
    if error["type"] in ("value_error", "json_invalid"):
        return f"{key}: {message}"
    given = error["input"]
    return f"{key}: {message}" + ("" if isinstance(given, dict | list) else f", not {given!r}")


def _is_type(part: str | int) -> bool:
    """Whether a part of an error's place is one of several types of a key, and no key itself."""
    of_types = ("str", "int", "float")
    return isinstance(part, str) and (part in of_types or "[" in part or not part.islower())


@dataclass(frozen=True)
class Chosen:
    """One of several kinds, with that kind's settings.

    Attributes:
        kind: Its name.
        settings: Its settings, an instance of the kind's dataclass.
    """

    kind: str
    settings: Any


@dataclass(frozen=True)
class Kind:
    """How a kind's table is read.

    Attributes:
        type: The dataclass whose fields are the table's keys.
        defaults: Defaults that replace the dataclass's own.
        settled: Fields that the kind decides, and that are therefore no keys.
    """

    type: type[Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    settled: Mapping[str, Any] = field(default_factory=dict)


class Kinds:
    """Reads a table whose ``kind`` decides which other keys it may have.

    Args:
        what: What the table is for, in errors.
        known: The kinds by name.
        default: The kind of a table that gives none; where ``None``, a table must give one.
        by_path: Finds the kind that a dotted path names; where ``None``, no path is a kind.
        bare: Whether reading a table gives the settings alone, not a :class:`Chosen`. The settings
            then have a field ``kind``.
        renamed: Names that kinds had in earlier versions, and the names they have now.
    """

    def __init__(
        self,
        what: str,
        known: Mapping[str, Kind],
        default: str | None = None,
        by_path: Callable[[str], Kind] | None = None,
        bare: bool = False,
        renamed: Mapping[str, str] | None = None,
    ) -> None:
        self._what = what
        self._known = known
        self._default = default
        self._by_path = by_path
        self._bare = bare
        self._renamed = renamed or {}

    def kind_of(self, content: Mapping[str, Any]) -> tuple[str, Kind]:
        """The name of a table's kind, and the kind.

        Raises:
            ValueError: There is no such kind, or the table gives none and must.
        """
        name = content.get("kind", self._default)
        own = ", or the dotted path of a class of your own" if self._by_path is not None else ""
        known = f"one of {list(self._known)}{own}"
        if name is None:
            raise ValueError(f"kind is missing; it must be {known}")
        if isinstance(name, str):
            if name in self._known:
                return name, self._known[name]
            if name in self._renamed:
                raise ValueError(f"kind {name!r} is now called {self._renamed[name]!r}")
            if self._by_path is not None and "." in name:
                return name, self._by_path(name)
        raise ValueError(f"kind must be {known}, not {name!r}{did_you_mean(name, self._known)}")

    def keys(self, content: Mapping[str, Any]) -> tuple[type[Any], list[str]]:
        """The dataclass of a table's kind, and the keys that the table may have.

        Raises:
            ValueError: There is no such kind.
        """
        _, kind = self.kind_of(content)
        own = [f.name for f in dataclasses.fields(kind.type)]
        return kind.type, ["kind", *(n for n in own if n not in (*kind.settled, "kind"))]

    def __call__(self, content: Any) -> Any:
        """Read a table.

        Raises:
            ValueError: It is no table, there is no such kind, or one of its keys is wrong.
        """
        if not isinstance(content, Mapping):
            raise ValueError(f"{self._what} must be a table, not {content!r}")
        name, kind = self.kind_of(content)
        fields = {**kind.defaults, **content, **kind.settled}
        if not self._bare:
            fields.pop("kind", None)
        try:
            found = TypeAdapter(kind.type).validate_json(json.dumps(fields), strict=True)
        except ValidationError as error:
            raise NestedError(error.errors()) from None
        return found if self._bare else Chosen(name, found)

    def as_table(self, chosen: Chosen) -> dict[str, Any]:
        """The table that would be read as ``chosen``, with every key spelled out."""
        _, kind = self.kind_of({"kind": chosen.kind})
        fields = dataclasses.asdict(chosen.settings)
        return {"kind": chosen.kind} | {n: v for n, v in fields.items() if n not in kind.settled}


def _check_optimizer(where: str, kind: Any, arguments: Any) -> None:
    """Refuse what can't be an optimizer's path and arguments.

    Args:
        where: What comes before ``kind`` and ``arguments`` in errors.
        kind: The path.
        arguments: The arguments.
    """
    if not isinstance(kind, str):
        raise ValueError(
            f"{where}kind must be a dotted path such as 'torch.optim.Muon', not {kind!r}"
        )
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where}arguments must be a table, not {arguments!r}")
    for name, value in arguments.items():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict | list):
                raise ValueError(
                    f"{where}arguments.{name} must be a number, a word or a list of "
                    f"these, not {value!r}"
                )
            if isinstance(part, float) and not math.isfinite(part):
                raise ValueError(f"{where}arguments.{name} must be finite, not {part}")


class MadeOnce:
    """Base of the frozen dataclasses whose cached properties hold what they describe.

    Copies and pickles leave those objects out; they are made again where they are asked for.
    """

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone."""
        names = {f.name for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in vars(self).items() if name in names}


@dataclass(frozen=True)
class AnalyticalTeacher(Teacher):
    """An analytical teacher.

    Attributes:
        lr_decay: How its learning rate goes on over an episode, to zero unless constant.
    """

    lr_decay: LRDecay = "constant"

    @property
    def teacher(self) -> Teacher:
        """The teacher."""
        return Teacher(self.kind, self.lr, self.beta1, self.beta2, self.eps)


@dataclass(frozen=True)
class TorchOptimizer(MadeOnce):
    """An optimizer of torch's interface as a teacher.

    Attributes:
        kind: Its class, as in ``"torch.optim.Muon"``.
        arguments: Its arguments.
        others: ``kind`` and ``arguments`` of the optimizer for tensors that the first one refuses.
        lr_decay: How its learning rate goes on over an episode, to zero unless constant.
    """

    kind: str
    arguments: dict[str, Any] = field(default_factory=dict)
    others: dict[str, Any] | None = None
    lr_decay: LRDecay = "constant"

    def __post_init__(self) -> None:
        """Refuse what can't be made."""
        if self.others is not None:
            if not {"kind"} <= set(self.others) <= {"kind", "arguments"}:
                raise ValueError(f"others must hold kind and arguments, not {list(self.others)}")
            _check_optimizer("others.", self.others["kind"], self.others.get("arguments", {}))
        _check_optimizer("", self.kind, self.arguments)
        _ = self.teacher

    @cached_property
    def teacher(self) -> TorchTeacher:
        """The teacher, made once."""
        others = self.others and (self.others["kind"], self.others.get("arguments", {}))
        return TorchTeacher(self.kind, self.arguments, others=others or None)


@dataclass(frozen=True)
class PolicyFile(MadeOnce):
    """A learned policy as a teacher, with the weights that a file holds.

    Attributes:
        kind: ``"policy"``.
        file: A shipped policy's name, or a path.
        lr_decay: How a factor on its updates goes on over an episode, to zero unless constant.
    """

    kind: str
    file: str
    lr_decay: LRDecay = "constant"

    def __post_init__(self) -> None:
        """Refuse what can't be read."""
        try:
            _ = self.teacher
        except FileNotFoundError as error:
            raise ValueError(f"file: {error}") from error

    @cached_property
    def teacher(self) -> PolicyTeacher:
        """The teacher, read once."""
        return PolicyTeacher(load_policy(self.file))


@dataclass(frozen=True)
class OwnTeacher(MadeOnce):
    """A teacher of the user's own.

    Attributes:
        kind: The dotted path of its class, or of a function that makes it, such as
            ``"my.module.MyTeacher"``; see :class:`amalgam.policies.AnyTeacher`.
        arguments: Its arguments.
        lr_decay: How a factor on its updates goes on over an episode, to zero unless constant.
    """

    kind: str
    arguments: dict[str, Any] = field(default_factory=dict)
    lr_decay: LRDecay = "constant"

    def __post_init__(self) -> None:
        """Refuse what can't be made."""
        _ = self.teacher

    @cached_property
    def teacher(self) -> AnyTeacher:
        """The teacher, made once."""
        make = _class_or_function(self.kind)
        dotted.check_arguments(make, self.kind, "kind", self.arguments)
        made = make(**self.arguments)
        try:
            return Pool([made]).teachers[0]
        except TypeError as error:
            problem = str(error).removeprefix("teachers[0] ")
            raise ValueError(f"what {self.kind!r} makes {problem}") from error


def _class_or_function(path: str) -> Callable[..., Any]:
    """What a teacher's dotted path names.

    Raises:
        ValueError: It can't be imported or called.
    """
    found = dotted.find(path, "kind", "a class", "torch.optim.Muon")
    if not callable(found):
        raise ValueError(
            f"kind must be a torch.optim.Optimizer, or a class or function that makes a teacher "
            f"(see amalgam.policies.AnyTeacher), but {path!r} is {found!r}"
        )
    return found


def _own_teacher(path: str) -> Kind:
    """The kind of a teacher that a dotted path names.

    Raises:
        ValueError: It can't be imported or called.
    """
    found = _class_or_function(path)
    optimizer = isinstance(found, type) and issubclass(found, Optimizer)
    return Kind(TorchOptimizer if optimizer else OwnTeacher)


def _own_policy(path: str) -> Kind:
    """The kind of a policy that a dotted path names.

    Raises:
        ValueError: The path names no policy that a recipe can make.
    """
    found = policy_type(path)
    if not dataclasses.is_dataclass(getattr(found, "config_type", None)):
        raise ValueError(
            f"kind must be a policy whose config_type is a dataclass, which that of {path!r} is not"
        )
    dotted.check_arguments(found, path, "kind", {"config": None, "generator": None})
    return Kind(found.config_type)


def _preset(strategy: Repeat, settled: tuple[str, ...] = ()) -> Kind:
    fields = dataclasses.asdict(strategy)
    given = {name: value for name, value in fields.items() if name not in settled}
    return Kind(Repeat, given, {name: fields[name] for name in settled})


_POLICY_KINDS = {name: Kind(policy.config_type) for name, policy in POLICIES.items()}
_STRATEGY_KINDS = {
    **{name: Kind(strategy) for name, strategy in STRATEGIES.items()},
    "simple": _preset(simple(), ("repeat_threshold",)),
    "choice": _preset(choice_strategy()),
}
_TEACHER_KINDS = {
    **{kind: Kind(AnalyticalTeacher) for kind in ops.KINDS},
    "policy": Kind(PolicyFile),
}
_ESTIMATOR_KINDS = {name: Kind(estimator) for name, estimator in ESTIMATORS.items()}
_PERTURBATION_KINDS = {
    name: Kind(kind, settled=settled) for name, (kind, settled) in perturbation.KINDS.items()
}

POLICY = Kinds(
    "policy",
    _POLICY_KINDS,
    "student",
    by_path=_own_policy,
    renamed={
        "rnnprop_ext": "rnnprop-ext",
        "adam_lr": "adam-lr",
        "rmsprop_lr": "rmsprop-lr",
        "scale": "scale-hierarchical",
    },
)
STRATEGY = Kinds("strategy", _STRATEGY_KINDS)
CHOICE_STRATEGY = Kinds("strategy", _STRATEGY_KINDS, "choice")
ESTIMATOR = Kinds("estimator", _ESTIMATOR_KINDS, "truncation")
PERTURBATION = Kinds("perturbation", _PERTURBATION_KINDS)
TEACHER = Kinds("teachers", _TEACHER_KINDS, by_path=_own_teacher, bare=True)

AnyPolicy = Annotated[Chosen, PlainValidator(POLICY), POLICY]
AnyStrategy = Annotated[Chosen, PlainValidator(STRATEGY), STRATEGY]
ChoiceStrategy = Annotated[Chosen, PlainValidator(CHOICE_STRATEGY), CHOICE_STRATEGY]
AnyEstimator = Annotated[Chosen, PlainValidator(ESTIMATOR), ESTIMATOR]
AnyPerturbation = Annotated[Chosen, PlainValidator(PERTURBATION), PERTURBATION]
TeacherChoice = Annotated[
    AnalyticalTeacher | TorchOptimizer | OwnTeacher | PolicyFile, PlainValidator(TEACHER), TEACHER
]
