"""Recipes: experiments as TOML files, checked before anything runs."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from amalgam import tasks
from amalgam.hints import did_you_mean
from amalgam.meta import Amalgamation, Stage, Training
from amalgam.policies import Pool, StudentConfig, Teacher

SHIPPED = Path(__file__).parent


class RecipeError(ValueError):
    """A recipe can't be run; the message names the key, what it was, and what would work."""


@dataclass(frozen=True)
class TaskChoice:
    """Which task.

    Attributes:
        name: One of :data:`amalgam.tasks.TASKS`.
        batch_size: Samples a step.
    """

    name: str
    batch_size: int = 128

    def __post_init__(self) -> None:
        """Refuse what does not exist."""
        tasks.load(self.name, self.batch_size)


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
        task: The optimizee and data to meta-train on.
        teachers: The pool.
        student: The student's architecture and constants.
        amalgamation: How the student is held to task and teachers.
        training: How meta-training proceeds.
        stages: Its stages.
        evaluation: The closing table.
        threads: PyTorch's intra-op threads, which decide the last bits of its sums; those that the
            process has where absent. One is as fast as many for optimizees of a few thousand
            parameters, and gives the same numbers on machines of any size.
    """

    task: TaskChoice
    teachers: tuple[Teacher, ...]
    description: str = ""
    student: StudentConfig = field(default_factory=StudentConfig)
    amalgamation: Amalgamation = field(default_factory=Amalgamation)
    training: Training = field(default_factory=Training)
    stages: tuple[Stage, ...] = (Stage(),)
    evaluation: Evaluation = field(default_factory=Evaluation)
    threads: int | None = None

    def __post_init__(self) -> None:
        """Refuse what can't be run."""
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be 1 or more, not {self.threads}")
        if not self.stages:
            raise ValueError("stages must hold at least one stage")
        names = Pool(self.teachers).names
        if len(set(names)) < len(names):
            raise ValueError(f"teachers must differ in kind or learning rate, not {list(names)}")

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable, everything that was left to defaults spelled out."""
        resolved: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return resolved


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
    _refuse_unknown(content, Recipe, source, ())
    try:
        # Through JSON, so that strictness takes a list for a tuple and yet no "3" for 3.
        return _ADAPTER.validate_json(json.dumps(content, default=str), strict=True)
    except ValidationError as error:
        raise RecipeError(f"{source}: " + "; ".join(map(_explain, error.errors()))) from None


_ADAPTER: TypeAdapter[Recipe] = TypeAdapter(Recipe)


def _refuse_unknown(content: Any, kind: Any, source: str, path: tuple[str, ...]) -> None:
    """Raise for a key that ``kind`` does not have, with the nearest that it has."""
    if get_origin(kind) is tuple and isinstance(content, list):
        for index, item in enumerate(content):
            _refuse_unknown(item, get_args(kind)[0], source, (*path, str(index)))
    if not dataclasses.is_dataclass(kind) or not isinstance(content, Mapping):
        return
    hints = get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind)]
    for key, value in content.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, cutoff=0.0)
            dotted = ".".join((*path, key))
            nearest = ".".join((*path, near[0]))
            raise RecipeError(
                f"{source}: there is no key {dotted!r}; the nearest is {nearest!r}, all are {known}"
            )
        _refuse_unknown(value, hints[key], source, (*path, key))


def _explain(error: Any) -> str:
    """One validation error as: key, what is wrong, what it was."""
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
    "Evaluation",
    "Recipe",
    "RecipeError",
    "TaskChoice",
    "from_dict",
    "load",
    "shipped",
]
