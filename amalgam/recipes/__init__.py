"""Recipes: experiments as TOML files, checked before anything runs."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import PlainValidator, TypeAdapter, ValidationError

from amalgam import ops, policies, tasks
from amalgam.device import resolve
from amalgam.hints import did_you_mean
from amalgam.meta import (
    Amalgamation,
    Curriculum,
    Estimator,
    Memory,
    Repeat,
    Stage,
    Training,
    perturbation,
)
from amalgam.meta.curriculum import choice_strategy, simple
from amalgam.policies import (
    AnyTeacher,
    ChoiceConfig,
    Policy,
    PolicyTeacher,
    Pool,
    Teacher,
    TorchTeacher,
    load_policy,
)

SHIPPED = Path(__file__).parent


class RecipeError(ValueError):
    """A recipe can't be run; the message names the key, what it was, and what would work."""


class _Nested(ValueError):
    """What is wrong within a table that one of several kinds reads."""

    def __init__(self, errors: Sequence[Any]) -> None:
        super().__init__("; ".join(_explain(error) for error in errors))
        self.errors = errors


@dataclass(frozen=True)
class Chosen:
    """One of several kinds, with that kind's settings.

    Attributes:
        kind: Its name.
        settings: What the kind is made with.
    """

    kind: str
    settings: Any


@dataclass(frozen=True)
class _Kind:
    """How a kind's table is read.

    Attributes:
        type: The dataclass that its keys are fields of.
        defaults: Fields that it begins with in place of the dataclass's own.
        settled: Fields that it decides, and that are no keys.
    """

    type: type[Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    settled: Mapping[str, Any] = field(default_factory=dict)


class _Kinds:
    """Reads a table whose ``kind`` decides what else may stand in it.

    Args:
        what: What the table is for, in errors.
        known: The kinds.
        default: The kind where none is given.
        other: Reads a kind of another name, or nothing.
        bare: Whether its settings, which have a ``kind`` themselves, are all that it gives, and
            not a :class:`Chosen`.
    """

    def __init__(
        self,
        what: str,
        known: Mapping[str, _Kind],
        default: str | None = None,
        other: Callable[[str], _Kind | None] = lambda name: None,
        bare: bool = False,
    ) -> None:
        self._what = what
        self._known = known
        self._default = default
        self._other = other
        self._bare = bare

    def of(self, content: Mapping[str, Any]) -> tuple[str, _Kind]:
        """A table's kind."""
        name = content.get("kind", self._default)
        kind = self._known.get(name) or (self._other(name) if isinstance(name, str) else None)
        if kind is None:
            raise ValueError(
                f"kind must be one of {list(self._known)}, not {name!r}"
                f"{did_you_mean(name, self._known)}"
            )
        return str(name), kind

    def keys(self, content: Mapping[str, Any]) -> tuple[type[Any], list[str]]:
        """The dataclass of a table's kind, and the keys that it may have."""
        _, kind = self.of(content)
        own = [f.name for f in dataclasses.fields(kind.type)]
        return kind.type, ["kind", *(n for n in own if n not in (*kind.settled, "kind"))]

    def __call__(self, content: Any) -> Any:
        """A table, checked.

        Raises:
            ValueError: It is no table, or there is no such kind, or one of its keys is wrong.
        """
        if not isinstance(content, Mapping):
            raise ValueError(f"{self._what} must be a table, not {content!r}")
        name, kind = self.of(content)
        fields = {**kind.defaults, **content, **kind.settled}
        if not self._bare:
            fields.pop("kind", None)
        try:
            found = TypeAdapter(kind.type).validate_json(json.dumps(fields), strict=True)
        except ValidationError as error:
            raise _Nested(error.errors()) from None
        return found if self._bare else Chosen(name, found)

    def as_table(self, chosen: Chosen) -> dict[str, Any]:
        """What :meth:`__call__` reads, everything spelled out."""
        kind = self._known[chosen.kind]
        fields = dataclasses.asdict(chosen.settings)
        return {"kind": chosen.kind} | {n: v for n, v in fields.items() if n not in kind.settled}


POLICIES: dict[str, type[Policy]] = {
    "student": policies.Student,
    "choice": policies.Choice,
    "dm": policies.DM,
    "rnnprop_ext": policies.RNNPropExt,
    "adam_lr": policies.AdamLR,
    "rmsprop_lr": policies.RMSPropLR,
    "scale": policies.ScaleHierarchical,
}
"""The learned policies by the names that recipes have for them."""

_POLICY = _Kinds(
    "policy", {name: _Kind(kind.config_type) for name, kind in POLICIES.items()}, "student"
)


def _preset(strategy: Repeat, settled: tuple[str, ...] = ()) -> _Kind:
    fields = dataclasses.asdict(strategy)
    given = {name: value for name, value in fields.items() if name not in settled}
    return _Kind(Repeat, given, {name: fields[name] for name in settled})


_STRATEGIES = {
    "curriculum": _Kind(Curriculum),
    "repeat": _Kind(Repeat),
    "simple": _preset(simple(), ("repeat_threshold",)),
    "choice": _preset(choice_strategy()),
}
_STRATEGY = _Kinds("strategy", _STRATEGIES, "curriculum")
_CHOICE_STRATEGY = _Kinds("strategy", _STRATEGIES, "choice")
_PERTURBATION = _Kinds(
    "perturbation",
    {name: _Kind(kind, settled=settled) for name, (kind, settled) in perturbation.KINDS.items()},
)


@dataclass(frozen=True)
class TorchOptimizer:
    """An optimizer of torch's interface as a teacher.

    Attributes:
        kind: Its class, as in ``"torch.optim.Muon"``.
        arguments: Its arguments.
        others: ``kind`` and ``arguments`` of the optimizer for tensors that the first one refuses.
    """

    kind: str
    arguments: dict[str, Any] = field(default_factory=dict)
    others: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Refuse what can't be made."""
        if self.others is not None and not {"kind"} <= set(self.others) <= {"kind", "arguments"}:
            raise ValueError(f"others must hold kind and arguments, not {list(self.others)}")
        self.make()

    def make(self) -> TorchTeacher:
        """The teacher."""
        others = self.others and (self.others["kind"], self.others.get("arguments", {}))
        return TorchTeacher(self.kind, self.arguments, others=others or None)


@dataclass(frozen=True)
class PolicyFile:
    """A learned policy as a teacher, its weights as a file has them.

    Attributes:
        kind: ``"policy"``.
        file: A shipped policy's name, or a path.
    """

    kind: str
    file: str

    def __post_init__(self) -> None:
        """Refuse what can't be read."""
        try:
            self.make()
        except FileNotFoundError as error:
            raise ValueError(f"file: {error}") from error

    def make(self) -> PolicyTeacher:
        """The teacher."""
        return PolicyTeacher(load_policy(self.file))


_TEACHER = _Kinds(
    "teachers",
    {**{kind: _Kind(Teacher) for kind in ops.KINDS}, "policy": _Kind(PolicyFile)},
    other=lambda name: _Kind(TorchOptimizer) if "." in name else None,
    bare=True,
)

AnyPolicy = Annotated[Chosen, PlainValidator(_POLICY), _POLICY]
AnyStrategy = Annotated[Chosen, PlainValidator(_STRATEGY), _STRATEGY]
ChoiceStrategy = Annotated[Chosen, PlainValidator(_CHOICE_STRATEGY), _CHOICE_STRATEGY]
AnyPerturbation = Annotated[Chosen, PlainValidator(_PERTURBATION), _PERTURBATION]
TeacherChoice = Annotated[Teacher | TorchOptimizer | PolicyFile, PlainValidator(_TEACHER), _TEACHER]


@dataclass(frozen=True)
class TaskChoice:
    """Which task.

    Attributes:
        name: One of :data:`amalgam.tasks.TASKS`.
        batch_size: Samples a step.
        weight: How often it is taken, beside others' weights.
    """

    name: str
    batch_size: int = 128
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what does not exist."""
        tasks.load(self.name, self.batch_size)
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight must be positive and finite, not {self.weight}")


@dataclass(frozen=True)
class ChoiceTraining:
    """The optimal choice that is trained first, and then teaches the student (paper, eq. 4).

    It is trained by the meta-loss alone, without teachers.

    Attributes:
        policy: Its pool, architecture and constants.
        strategy: How it is trained; as the authors do by default.
        training: Likewise; as the student is where absent.
    """

    policy: ChoiceConfig = field(default_factory=ChoiceConfig)
    strategy: ChoiceStrategy = field(default_factory=lambda: Chosen("choice", choice_strategy()))
    training: Training | None = None


@dataclass(frozen=True)
class Evaluation:
    """What the run's closing table compares, and how.

    Attributes:
        tasks: Tasks to train with every contender, each a table of its own.
        steps: Steps of each run, the student's warm-up included.
        seeds: Runs of each contender.
        every: Steps between two readings of the validation loss.
    """

    tasks: tuple[str, ...] = ("digits-mlp",)
    steps: int = 500
    seeds: int = 5
    every: int = 20

    def __post_init__(self) -> None:
        """Refuse what can't be run."""
        for name in self.tasks:
            tasks.load(name)
        for name in ("steps", "seeds", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")


@dataclass(frozen=True)
class Recipe:
    """One experiment, complete.

    Attributes:
        description: What it is for.
        tasks: The optimizees and data to meta-train on; in a file ``[task]`` is a single one.
        teachers: The pool; ``[]`` for the meta-loss alone.
        policy: The student's kind, architecture and constants; in a file ``[student]`` is short for
            a policy of that kind.
        choice: The choice to train first, as the one teacher.
        amalgamation: How the student is held to task and teachers.
        training: How meta-training proceeds.
        stages: Its stages.
        strategy: What says what to train, in the stages' place.
        estimator: How meta-gradients are come by.
        memory: What a window may keep for its way back.
        perturbation: What moves the weights that the meta-gradient is taken at.
        replicates: Students that are trained side by side, each of a seed of its own.
        evaluation: The closing table.
        threads: PyTorch's intra-op threads, which decide the last bits of its sums; those that the
            process has where absent. One is as fast as many for optimizees of a few thousand
            parameters, and gives the same numbers on machines of any size.
        device: Where it all is computed, as in :func:`amalgam.device.resolve`. What is drawn at
            random is the same anywhere, the last bits of sums are not.
    """

    tasks: tuple[TaskChoice, ...]
    teachers: tuple[TeacherChoice, ...] = ()
    description: str = ""
    policy: AnyPolicy = field(default_factory=lambda: Chosen("student", policies.StudentConfig()))
    choice: ChoiceTraining | None = None
    amalgamation: Amalgamation = field(default_factory=Amalgamation)
    training: Training = field(default_factory=Training)
    stages: tuple[Stage, ...] = (Stage(),)
    strategy: AnyStrategy | None = None
    estimator: Estimator = field(default_factory=Estimator)
    memory: Memory = field(default_factory=Memory)
    perturbation: AnyPerturbation | None = None
    replicates: int = 1
    evaluation: Evaluation = field(default_factory=Evaluation)
    threads: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        """Refuse what can't be run."""
        for name in ("threads", "replicates"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, not {value}")
        resolve(self.device)
        for name in ("stages", "tasks"):
            if not getattr(self, name):
                raise ValueError(f"{name} must hold at least one {name.removesuffix('s')}")
        if self.choice is not None and self.teachers:
            raise ValueError(
                "teachers must be none beside a choice, which is the one teacher; "
                "those that it chooses from are choice.policy.teachers"
            )
        if self.replicates > 1 and self.strategy is not None:
            raise ValueError(
                f"replicates must be 1 with a strategy, which goes back to earlier weights, not "
                f"{self.replicates}; train by stages, or one after another (--seed)"
            )
        names = Pool(self.pool()).names
        if len(set(names)) < len(names):
            raise ValueError(f"teachers must differ in kind or learning rate, not {list(names)}")

    def pool(self) -> tuple[AnyTeacher, ...]:
        """The teachers, made; a choice that is to be trained first is not among them."""
        return tuple(t if isinstance(t, Teacher) else t.make() for t in self.teachers)

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable, everything that was left to defaults spelled out."""
        content = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        for kinds, name in ((_POLICY, "policy"), (_STRATEGY, "strategy")):
            chosen = getattr(self, name)
            content[name] = chosen and kinds.as_table(chosen)
        if self.choice is not None:
            content["choice"]["strategy"] = _STRATEGY.as_table(self.choice.strategy)
        if self.perturbation is not None:
            content["perturbation"] = _PERTURBATION.as_table(self.perturbation)
        if self.strategy is not None:
            del content["stages"]
        absent = ("strategy", "perturbation", "choice")
        content = {n: v for n, v in content.items() if v is not None or n not in absent}
        resolved: dict[str, Any] = json.loads(json.dumps(content))
        return resolved


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]


def shipped() -> tuple[str, ...]:
    """Names of the recipes that come with the package."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.toml")))


def load(name_or_path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        name_or_path: A name from :func:`shipped`, or a path to a TOML file.
        overrides: ``"key=value"`` with dotted keys (``training.unroll=20``,
            ``stages.0.episodes=3``) and TOML values; what is no TOML value counts as a string.

    Raises:
        FileNotFoundError: It is neither name nor file.
        RecipeError: The file is no TOML, or a key is unknown, of the wrong type or out of range.
    """
    path = Path(name_or_path)
    if not path.is_file():
        if str(name_or_path) not in shipped():
            hint = did_you_mean(name_or_path, shipped())
            raise FileNotFoundError(
                f"{str(name_or_path)!r} is neither a file nor a shipped recipe; "
                f"those are {list(shipped())}{hint}"
            )
        path = SHIPPED / f"{name_or_path}.toml"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{str(path)!r} is not a TOML file: {error}") from error
    for override in overrides:
        _override(content, override)
    return from_dict(content, str(path))


def from_dict(content: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Check a recipe given as nested dictionaries and lists.

    Args:
        content: The recipe.
        source: What to call it in errors.

    Raises:
        RecipeError: A key is unknown or missing, of the wrong type or out of range.
    """
    try:
        _refuse_unknown(content, Recipe, ())
        content = _settled(content)
    except ValueError as error:
        raise RecipeError(f"{source}: {error}") from None
    try:
        # Through JSON, so that strictness takes a list for a tuple and yet no "3" for 3.
        return _ADAPTER.validate_json(json.dumps(content, default=str), strict=True)
    except ValidationError as error:
        raise RecipeError(f"{source}: " + "; ".join(map(_explain, error.errors()))) from None


_ADAPTER: TypeAdapter[Recipe] = TypeAdapter(Recipe)


# Short forms that only files have: key -> what stands for it in a Recipe.
_SHORT: dict[str, Any] = {"task": TaskChoice, "student": policies.StudentConfig}


def _settled(content: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without short forms.

    Raises:
        ValueError: What must be there is missing, or two forms of one thing are there.
    """
    full = dict(content)
    for short, long in (("task", "tasks"), ("student", "policy")):
        if short in full and long in full:
            raise ValueError(f"{short} and {long} can't both be given; {short} is short for {long}")
    if "stages" in full and "strategy" in full:
        raise ValueError("stages and strategy can't both be given; either says what to train")
    missing = [
        f"{' or '.join(names)} is missing"
        for names in (("task", "tasks"), ("teachers", "choice"))
        if not any(name in full for name in names)
    ]
    if missing:
        raise ValueError("; ".join(missing))
    if "task" in full:
        full["tasks"] = [full.pop("task")]
    if isinstance(full.get("student"), Mapping):
        full["policy"] = {"kind": "student", **full.pop("student")}
    return full


def _refuse_unknown(content: Any, kind: Any, path: tuple[str, ...]) -> None:
    """Raise for a key that ``kind`` does not have, with the nearest that it has."""
    if get_origin(kind) is tuple and isinstance(content, list):
        for index, item in enumerate(content):
            _refuse_unknown(item, get_args(kind)[0], (*path, str(index)))
    if not isinstance(content, Mapping):
        return
    kinds = _kinds_of(kind)
    if kinds is not None:
        try:
            kind, known = kinds.keys(content)
        except ValueError as error:
            raise ValueError(f"{'.'.join(path)}: {error}") from None
    else:
        # What may also be absent is a union with None.
        of_table = [k for k in (kind, *get_args(kind)) if dataclasses.is_dataclass(k)]
        if not of_table:
            return
        kind = of_table[0]
        known = [f.name for f in dataclasses.fields(kind)]
    hints = get_type_hints(kind, include_extras=True)
    if kind is Recipe:
        hints |= _SHORT
        known += _SHORT
    for key, value in content.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, cutoff=0.0)
            dotted = ".".join((*path, key))
            nearest = ".".join((*path, near[0]))
            raise ValueError(
                f"there is no key {dotted!r}; the nearest is {nearest!r}, all are {known}"
            )
        _refuse_unknown(value, hints.get(key), (*path, key))


def _kinds_of(hint: Any) -> _Kinds | None:
    """What reads a field's table, where its kind decides; also within a union with None."""
    for part in (hint, *get_args(hint)):
        for mark in getattr(part, "__metadata__", ()):
            if isinstance(mark, _Kinds):
                return mark
    return None


def _explain(error: Any) -> str:
    """One validation error as: key, what is wrong, what it was."""
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, _Nested):
        return "; ".join(
            _explain({**inner, "loc": (*error["loc"], *inner["loc"])}) for inner in cause.errors
        )
    key = ".".join(str(part) for part in error["loc"]) or "recipe"
    message = re.sub(r"^(Value error|Input), ?", "", error["msg"])
    given = "" if isinstance(error["input"], (dict, list)) else f", not {error['input']!r}"
    if error["type"] == "missing":
        return f"{key} is missing"
    return f"{key}: {message}{given if error['type'] != 'value_error' else ''}"


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"an override must read key=value, not {override!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.strip().split(".")
    place: Any = content
    for parent in parents:
        place = _child(place, parent, key)
    if isinstance(place, list):
        _child(place, last, key)
        place[int(last)] = value
    else:
        place[last] = value


def _child(place: Any, name: str, key: str) -> Any:
    """The table or list that ``name`` stands for, made where a table misses it."""
    if isinstance(place, list):
        if not name.isdecimal() or int(name) >= len(place):
            raise RecipeError(f"{key}: {name!r} must be an index below {len(place)}")
        return place[int(name)]
    child = place.setdefault(name, {})
    if not isinstance(child, (dict, list)):
        raise RecipeError(f"{key}: {name!r} holds {child!r}, which has no keys")
    return child


__all__ = [
    "POLICIES",
    "ChoiceTraining",
    "Chosen",
    "Evaluation",
    "PolicyFile",
    "Recipe",
    "RecipeError",
    "TaskChoice",
    "TorchOptimizer",
    "from_dict",
    "load",
    "shipped",
]
