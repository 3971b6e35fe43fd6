"""Hypothesis writes recipes: each is read, or refused by one line that is a RecipeError."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amalgam import recipes
from amalgam.experiment import Experiment
from amalgam.policies import Teacher
from amalgam.recipes import Recipe, RecipeError
from amalgam.recipes.kinds import (
    CHOICE_STRATEGY,
    ESTIMATOR,
    PERTURBATION,
    POLICY,
    STRATEGY,
    TEACHER,
    Kinds,
)
from amalgam.recipes.schema import TaskChoice

fuzz = settings(
    deadline=None,
    max_examples=100,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

WORDS = st.sampled_from(
    (
        *("", "adam", "digits", "digits-mlp", "small", "student", "mean", "il_more", "cpu", "1GB"),
        *("..", "a..b", ".a", "torch.optim.SGD", "torch.optim.none", "os.system", "no.such.thing"),
        *("bfloat16", "reference", "cuda", "\u2028", "[/x]", "x" * 300),
    )
)
NUMBERS = st.one_of(
    st.sampled_from((0, 1, -1, 2, 3, 10**9, 2**63, -(10**30), 0.0, -0.0, 0.5, 1e-300, 1e308)),
    st.sampled_from((math.inf, -math.inf, math.nan, True, False)),
    st.integers(-3, 5),
    st.floats(0, 1),
)
KEYS = st.sampled_from(("kind", "unroll", "lr", "name", "", "a.b", "hiddn", "no\tkey", "é"))
VALUES = st.recursive(
    st.one_of(WORDS, NUMBERS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=6,
)


def table(kind: Any, depth: int = 0) -> st.SearchStrategy[Any]:
    """A table with some of a dataclass's keys, whose values mostly have the wrong type or range."""
    hints = get_type_hints(kind)
    fields = {
        field.name: st.one_of(VALUES, of_type(hints[field.name], depth + 1))
        for field in dataclasses.fields(kind)
    }
    return st.fixed_dictionaries({}, optional=fields)


def of_kinds(kinds: Kinds, depth: int = 0) -> st.SearchStrategy[Any]:
    """A table of one of the kinds, whose keys may be another's."""
    return st.sampled_from([*kinds._known]).flatmap(
        lambda name: table(kinds._known[name].type, depth).map(
            lambda content: {**content, "kind": name}
        )
    )


def of_type(hint: Any, depth: int) -> st.SearchStrategy[Any]:
    """Values of a field's type, as far as it is one that a recipe may hold."""
    if dataclasses.is_dataclass(hint) and depth < 4:
        return table(hint, depth)
    inner = [one for one in getattr(hint, "__args__", ()) if dataclasses.is_dataclass(one)]
    if inner and depth < 4:
        return st.lists(table(inner[0], depth), max_size=2)
    return NUMBERS if hint in (int, float) else VALUES


CHOSEN = {
    "policy": POLICY,
    "strategy": STRATEGY,
    "estimator": ESTIMATOR,
    "perturbation": PERTURBATION,
}
# Most of a recipe is right, or no fault but the first would ever be looked at.
BASE: dict[str, Any] = {"tasks": [{"name": "digits-mlp"}], "teachers": [{"kind": "adam"}]}


@st.composite
def contents(draw: st.DrawFn) -> dict[str, Any]:
    """A recipe with some of its tables drawn, and perhaps something that belongs nowhere."""
    hints = get_type_hints(Recipe)
    tables: dict[str, st.SearchStrategy[Any]] = {
        **{f.name: of_type(hints[f.name], 0) for f in dataclasses.fields(Recipe)},
        **{name: of_kinds(kinds) for name, kinds in CHOSEN.items()},
        "tasks": st.lists(table(TaskChoice), max_size=2),
        "teachers": st.lists(st.one_of(of_kinds(TEACHER), table(Teacher)), max_size=2),
        "task": table(TaskChoice),
        "student": of_kinds(POLICY),
        "choice": st.fixed_dictionaries({}, optional={"strategy": of_kinds(CHOICE_STRATEGY)}),
        "stages": VALUES,
        "strategi": VALUES,
    }
    content = dict(BASE)
    for key in draw(st.lists(st.sampled_from([*tables]), max_size=3)):
        content[key] = draw(st.one_of(tables[key], VALUES))
    if draw(st.booleans()) and content:
        content.pop(draw(st.sampled_from([*content])))
    return content


def spelled(value: Any) -> str:
    """A value as TOML."""
    if isinstance(value, dict):
        pairs = ", ".join(f"{json.dumps(key)} = {spelled(item)}" for key, item in value.items())
        return f"{{ {pairs} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(spelled, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return json.dumps(value)


@fuzz
@given(
    content=contents(),
    twice=st.booleans(),
    overrides=st.lists(st.tuples(KEYS, VALUES), max_size=1),
)
def test_every_recipe_is_read_or_refused_by_one_line(content, twice, overrides, tmp_path) -> None:
    lines = [f"{key} = {spelled(value)}" for key, value in content.items()]
    # A key that stands there twice, now and then.
    text = "\n".join([*lines, *lines[: twice and len(lines) % 3 == 0]])
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    given = [f"{key}={spelled(value)}" for key, value in overrides]
    try:
        recipe = recipes.load(path, given)
    except RecipeError as error:
        message = str(error)
        assert len(message.splitlines()) == 1
        assert len(message) > 10
        return
    assert recipes.from_dict(recipe.as_dict()) == recipe


@pytest.mark.parametrize("depth", [200, 5000])
def test_deep_nesting_is_refused(depth, tmp_path) -> None:
    path = tmp_path / "deep.toml"
    opened, closed = "[" * depth, "]" * depth
    start = "\n".join(f"{key} = {spelled(value)}" for key, value in BASE.items())
    for text in (f"x = {opened}{closed}", f"evaluation.tasks = {opened}{closed}"):
        path.write_text(f"{start}\n{text}\n")
        with pytest.raises(RecipeError):
            recipes.load(path)
    path.write_text(start)
    with pytest.raises(RecipeError, match="is no value|no key|list|table|nested"):
        recipes.load(path, [f"evaluation={opened}{closed}"])
    with pytest.raises(RecipeError):
        recipes.load(path, ["teachers." + "9" * 5000 + "=3"])
    nested: Any = 1
    for _ in range(depth):
        nested = [nested]
    with pytest.raises(RecipeError):
        recipes.from_dict({**BASE, "description": nested})


class Begun(Exception):
    """The first meta-step was taken."""


def first_only(row: dict[str, Any]) -> None:
    raise Begun


RATES = st.sampled_from((1e-3, 0.1, 1.0))
ONE_WINDOW = {"unroll": 2, "windows": 1, "episodes": 1}
SHORT: dict[str, dict[str, Any]] = {
    "stages": {"unroll": 2, "stages": [{"episodes": 1}]},
    "meta-batch": {"meta_steps": 1, "slots": 1, "unroll": 2, "shortest": 2, "longest": 4},
    "curriculum": ONE_WINDOW,
    "repeat": {**ONE_WINDOW, "validation": {**ONE_WINDOW, "warmup_windows": 0, "warmup_lr": 0.0}},
}
SMALL = {"layers": 1, "hidden": 3}


@st.composite
def runnable(draw: st.DrawFn) -> dict[str, Any]:
    """A short recipe of any kinds, with numbers within their ranges."""
    policy = draw(st.sampled_from([*POLICY._known]))
    strategy = draw(st.sampled_from([*SHORT]))
    content: dict[str, Any] = {
        "task": {"name": "digits-mlp", "batch_size": draw(st.integers(1, 16))},
        "teachers": draw(
            st.lists(
                st.fixed_dictionaries({"kind": st.sampled_from(("adam", "sgd")), "lr": RATES})
            ).map(lambda drawn: [*{(one["kind"], one["lr"]): one for one in drawn}.values()])
        )[:2],
        "policy": {
            "kind": policy,
            **({} if policy == "scale-hierarchical" else SMALL),
            "warmup_steps": draw(st.integers(0, 2)),
            "warmup_lr": draw(RATES),
        },
        "strategy": {"kind": strategy, **SHORT[strategy]},
        "estimator": {"kind": draw(st.sampled_from([*ESTIMATOR._known]))},
        "amalgamation": {
            "mechanism": draw(st.sampled_from(("mean", "min-max"))),
            "second_order": draw(st.booleans()),
            "scale_spread": draw(st.sampled_from((0.0, 3.0))),
            "huber_delta": draw(RATES),
            "normaliser": draw(st.sampled_from(("first-batch", "every-batch"))),
            "backend": draw(st.sampled_from(("auto", "reference"))),
        },
        "training": {"meta_lr": draw(RATES), "input_noise": draw(st.sampled_from((0.0, 0.1)))},
        "memory": draw(st.sampled_from(({}, {"budget": "1GB"}, {"segment": 1}))),
        "conditions": draw(st.sampled_from(({}, {"lr": [0.5, 2.0], "weight_decay": [1e-4, 0.1]}))),
        **{"threads": 1, "device": "cpu"},
    }
    if draw(st.booleans()):
        content["perturbation"] = {"kind": draw(st.sampled_from([*PERTURBATION._known]))}
    return content


@settings(fuzz, max_examples=8)
@given(content=runnable())
def test_a_recipe_that_is_read_begins_or_says_in_one_line_why_not(
    content, tmp_path_factory
) -> None:
    folder: Path = tmp_path_factory.mktemp("run")
    why = ""
    try:
        run = Experiment(recipes.from_dict(content), folder / "run")
        run.train(first_only)
    except Begun:
        assert (folder / "run" / "metrics.jsonl").read_text().count("\n") == 1
        return
    except ValueError as error:
        why = str(error)
    # What estimator, perturbation and noise decide together.
    assert "'pes'" in why
    assert len(why.splitlines()) == 1
