"""Reading recipes: from TOML files, with overrides, and with errors that name the key."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import os
import textwrap
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError

from amalgam import dotted, policies
from amalgam.hints import did_you_mean
from amalgam.recipes.kinds import Kinds, explain
from amalgam.recipes.schema import Recipe, TaskChoice

SHIPPED = Path(__file__).parent

# Short forms that only files have: key -> what stands for it in a Recipe.
_SHORT: dict[str, Any] = {"task": TaskChoice, "student": policies.StudentConfig}

# Keys that earlier versions had -> what to write now.
_MOVED = {
    "stages": 'write [strategy] with kind = "stages", and [[strategy.stages]] for each stage',
    "training.unroll": "it is strategy.unroll now",
    "choice.training.unroll": "it is choice.strategy.unroll now",
}

_MOST_LETTERS = 2000

_ADAPTER: TypeAdapter[Recipe] = TypeAdapter(Recipe)


class RecipeError(ValueError):
    """A recipe can't be run; the message names the key, what it was, and what would work.

    Args:
        message: The message, which becomes one line, and is cut where it is very long.
    """

    def __init__(self, message: str) -> None:
        super().__init__(textwrap.shorten(message, _MOST_LETTERS, placeholder=" ..."))


def shipped() -> tuple[str, ...]:
    """Names of the recipes that come with the package."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.toml")))


def load(
    name_or_path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    own_code: bool | None = None,
) -> Recipe:
    """Read and check a recipe.

    A recipe that names things by dotted path runs the code of their modules. A recipe may come from
    somebody else, so one that does not lie in the working directory, or below it, may name only
    what is in ``torch.optim`` and ``amalgam``.

    Args:
        name_or_path: A name from :func:`shipped`, or a path to a TOML file.
        overrides: ``"key=value"`` with dotted keys (``strategy.unroll=20``,
            ``strategy.stages.0.episodes=3``) and TOML values; what is no TOML value counts as a
            string.
        own_code: Whether dotted paths may name modules of one's own; where ``None``, as said above.

    Raises:
        FileNotFoundError: It is neither name nor file.
        RecipeError: The file is no TOML, or a key is unknown, of the wrong type or out of range.
    """
    path = _find(name_or_path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{str(path)!r} is not a TOML file: {error}") from error
    for override in overrides:
        _override(content, override)
    source = str(path)
    if overrides:
        source += f" with {textwrap.shorten(', '.join(overrides), _MOST_LETTERS // 10)}"
    if own_code is None:
        own_code = path.resolve().is_relative_to(Path.cwd())
    if own_code:
        return from_dict(content, source)
    elsewhere = (
        "that is refused, as the recipe does not lie in the working directory or below it; pass "
        "--own-code (in Python, own_code=True) if you trust it"
    )
    with dotted.without_own_code(elsewhere):
        return from_dict(content, source)


def _find(name_or_path: str | os.PathLike[str]) -> Path:
    """The file of a shipped recipe's name, or of a path.

    Raises:
        FileNotFoundError: It is neither.
    """
    path = Path(name_or_path)
    if str(name_or_path) in shipped():
        return SHIPPED / f"{name_or_path}.toml"
    if not path.is_file():
        hint = did_you_mean(name_or_path, shipped())
        raise FileNotFoundError(
            f"{str(name_or_path)!r} is neither a file nor a shipped recipe; "
            f"those are {list(shipped())}{hint}"
        )
    return path


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
        content = _without_short_forms(content)
        # Through JSON, so that strictness takes a list for a tuple and yet no "3" for 3.
        text = json.dumps(content, default=str)
        # Tasks may compute their data, and are made here.
        with _threads(content.get("threads")):
            return _ADAPTER.validate_json(text, strict=True)
    except ValidationError as error:
        raise RecipeError(f"{source}: " + "; ".join(map(explain, error.errors()))) from None
    except RecursionError:
        raise RecipeError(f"{source}: tables and lists are nested too deeply") from None
    except ValueError as error:
        raise RecipeError(f"{source}: {error}") from None


@contextmanager
def _threads(threads: object) -> Iterator[None]:
    """So many intra-op threads within the block; as many as there are where it is no number."""
    before = torch.get_num_threads()
    if type(threads) is int and threads > 0:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _without_short_forms(content: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with ``tasks`` for ``task``, and ``policy`` for ``student``.

    Raises:
        ValueError: A key that must be there is missing, or two forms of one thing are there.
    """
    full = dict(content)
    for short, long in (("task", "tasks"), ("student", "policy")):
        if short in full and long in full:
            raise ValueError(f"{short} and {long} can't both be given; {short} is short for {long}")
    missing = [
        f"{' or '.join(names)} is missing"
        for names in (("task", "tasks"), ("teachers", "choice"))
        if not any(name in full for name in names)
    ]
    if missing:
        raise ValueError("; ".join(missing))
    if "task" in full:
        full["tasks"] = [full.pop("task")]
    if "student" in full:
        table = full.pop("student")
        if not isinstance(table, Mapping):
            raise ValueError(
                f"student must be a table, [student], of the student's settings, not {table!r}"
            )
        full["policy"] = {"kind": "student", **table}
    return full


def _refuse_unknown(content: Any, kind: Any, path: tuple[str, ...]) -> None:
    """Refuse keys that ``kind`` does not have, and name the nearest that it has.

    Raises:
        ValueError: There is such a key, or a table's kind does not exist.
    """
    if isinstance(content, list):
        lists = [one for one in (kind, *get_args(kind)) if get_origin(one) is tuple]
        for (index, item), one in itertools.product(enumerate(content), lists[:1]):
            _refuse_unknown(item, get_args(one)[0], (*path, str(index)))
    if not isinstance(content, Mapping):
        return
    kinds = _kinds_of(kind)
    if kinds is not None:
        try:
            kind, known = kinds.keys(content)
        except ValueError as error:
            raise ValueError(f"{'.'.join(path)}: {error}") from None
    else:
        # An optional table is a union with None, one with a short form a union with str.
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
            if dotted in _MOVED:
                raise ValueError(f"there is no key {dotted!r} any more; {_MOVED[dotted]}")
            nearest = ".".join((*path, near[0]))
            raise ValueError(
                f"there is no key {dotted!r}; the nearest is {nearest!r}, all are {known}"
            )
        _refuse_unknown(value, hints.get(key), (*path, key))


def _kinds_of(hint: Any) -> Kinds | None:
    """What reads a field's table, where its kind decides; also within a union with None."""
    for part in (hint, *get_args(hint)):
        for mark in getattr(part, "__metadata__", ()):
            if isinstance(mark, Kinds):
                return mark
    return None


def _override(content: dict[str, Any], override: str) -> None:
    """Set one key of a recipe.

    Raises:
        RecipeError: It does not read ``key=value``, or there is no place for the key.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"an override must read key=value, not {override!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{key}: {text[:40]!r} is no value: {error}") from error
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
        # Longer numbers are no index, and too long for int().
        if not name.isdecimal() or len(name) > 9 or int(name) >= len(place):
            raise RecipeError(f"{key}: {name!r} must be an index below {len(place)}")
        return place[int(name)]
    child = place.setdefault(name, {})
    if not isinstance(child, (dict, list)):
        raise RecipeError(f"{key}: {name!r} holds {child!r}, which has no keys")
    return child
