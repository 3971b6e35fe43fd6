"""Recipes: what can't be run is refused before it runs, by the key's name."""

import json

import pytest

from amalgam import recipes
from amalgam.recipes import RecipeError

MINIMAL = """
[task]
name = "digits-mlp"
[[teachers]]
kind = "adam"
"""


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "minimal.toml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize("name", recipes.shipped())
def test_shipped_recipes_load(name) -> None:
    recipe = recipes.load(name)
    assert recipe.description
    assert recipes.from_dict(recipe.as_dict()) == recipe


def test_defaults_and_overrides(minimal) -> None:
    recipe = recipes.load(
        minimal,
        [
            "training.unroll=7",
            "teachers.0.lr=0.01",
            "amalgamation.mechanism=mean",
            "stages=[{episodes=2, windows=3}]",
            "evaluation.tasks=['digits-cnn']",
        ],
    )
    assert recipe.training.unroll == 7
    assert recipe.teachers[0].lr == 0.01
    assert recipe.amalgamation.mechanism == "mean"
    assert [(s.episodes, s.windows) for s in recipe.stages] == [(2, 3)]
    assert recipe.evaluation.tasks == ("digits-cnn",)
    assert json.loads(json.dumps(recipe.as_dict())) == recipe.as_dict()


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("training.unrol=3", "'training.unrol'; the nearest is 'training.unroll'"),
        ("unroll=3", "there is no key 'unroll'"),
        ("stages.0.windowz=2", "nothing"),
        ("training.unroll=0", "unroll must be 1 or more, not 0"),
        ("training.unroll='3'", "training.unroll: .*valid integer, not '3'"),
        ("training.unroll=3.5", "training.unroll: .*valid integer, not 3.5"),
        ("training.unroll=true", "training.unroll"),
        ("amalgamation.second_order=1", "amalgamation.second_order: .*boolean, not 1"),
        ("amalgamation.mechanism=max", "amalgamation.mechanism: .*'mean' or 'min-max', not 'max'"),
        ("amalgamation.backend=gpu", "backend must be one of"),
        ("teachers.0.kind=adma", "teachers.0: kind must be one of .* not 'adma'"),
        ("teachers.3.kind=adam", "'3' must be an index below 1"),
        ("teachers.0.beta2=1.0", r"beta2 must be in \[0, 1\), not 1.0"),
        ("student.hidden=0", "hidden must be 1 or more"),
        ("task.name=digits", "did you mean"),
        ("task.batch_size=9999", "batch_size must be between 1 and the 1437"),
        ("evaluation.seeds=0", "seeds must be 1 or more"),
        ("stages=[]", "at least one stage"),
        ("task.name.x=1", "which has no keys"),
        ("threads=0", "threads must be 1 or more"),
        ("training", "key=value"),
        ("=3", "key=value"),
    ],
)
def test_bad_keys_are_named(minimal, override, named) -> None:
    if override.startswith("stages.0"):
        minimal.write_text(MINIMAL + "[[stages]]\nepisodes = 1\n")
        named = "'stages.0.windowz'; the nearest is 'stages.0.windows'"
    with pytest.raises(RecipeError, match=named):
        recipes.load(minimal, [override])


def test_missing_keys_are_named(tmp_path) -> None:
    path = tmp_path / "empty.toml"
    path.write_text("")
    with pytest.raises(
        RecipeError, match="task or tasks is missing; teachers or choice is missing"
    ):
        recipes.load(path)


def test_twin_teachers_are_refused(minimal) -> None:
    minimal.write_text(MINIMAL + '[[teachers]]\nkind = "adam"\n')
    with pytest.raises(RecipeError, match="teachers must differ"):
        recipes.load(minimal)
    recipes.load(minimal, ["teachers.1.lr=0.02"])


def test_not_toml(tmp_path) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(b"\xff\xfe not toml")
    with pytest.raises(RecipeError, match="not a TOML file"):
        recipes.load(path)


def test_unknown_recipe() -> None:
    with pytest.raises(FileNotFoundError, match="did you mean 'digits'"):
        recipes.load("digit")
