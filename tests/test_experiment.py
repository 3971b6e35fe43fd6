"""A run folder holds one run, and says so."""

import json
from pathlib import Path
from typing import Any

import pytest

from amalgam import recipes
from amalgam.experiment import Experiment
from amalgam.recipes import RecipeError


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """The folder of a run that has kept something."""
    Experiment(recipes.load("digits"), tmp_path / "run", name="digits", seed=3)
    (tmp_path / "run" / "checkpoint.safetensors").touch()
    return tmp_path / "run"


def test_the_same_run_goes_on_and_no_other(begun: Path) -> None:
    recipe = recipes.load("digits")
    Experiment(recipe, begun, seed=3, resume=True)
    with pytest.raises(FileExistsError, match="holds a run already: go on with it"):
        Experiment(recipe, begun, seed=3)
    with pytest.raises(RecipeError, match="holds another run: seed is 3 there and 4 here"):
        Experiment(recipe, begun, seed=4, resume=True)
    other = recipes.load("digits", ["strategy.stages.1.windows=6"])
    with pytest.raises(RecipeError, match=r"recipe.strategy.stages is .* there and .*: 6, .* here"):
        Experiment(other, begun, seed=3, resume=True)


def test_a_run_of_an_earlier_version_is_refused(begun: Path) -> None:
    path = begun / "recipe.json"
    stored: dict[str, Any] = json.loads(path.read_text())
    resolved = stored["resolved"]
    strategy = resolved.pop("strategy")
    resolved |= {"stages": strategy["stages"]}
    resolved["training"]["unroll"] = strategy["unroll"]
    path.write_text(json.dumps(stored))
    before = path.read_bytes()
    with pytest.raises(RecipeError, match="an earlier version of amalgam, .* finish it with"):
        Experiment(recipes.load("digits"), begun, seed=3, resume=True)
    assert path.read_bytes() == before


def test_what_changes_nothing_may_change(begun: Path) -> None:
    free = [
        *("description=other", "evaluation.seeds=9", "evaluation.steps=7", "device=cpu"),
        *("evaluation.tasks=['digits-cnn']", "memory.budget=1GB"),
    ]
    Experiment(recipes.load("digits", free), begun, seed=3, resume=True)
    stored = json.loads((begun / "recipe.json").read_text())
    assert stored["resolved"]["evaluation"]["seeds"] == 9
    rounded = recipes.load("digits", ["memory.cells=bfloat16", "memory.segment=2"])
    with pytest.raises(RecipeError, match="recipe.memory.budget is .1GB. there"):
        Experiment(rounded, begun, seed=3, resume=True)


def test_a_run_that_kept_nothing_may_be_begun_anew(tmp_path: Path) -> None:
    """As one that ended before its first checkpoint, by a fault of the recipe's."""
    Experiment(recipes.load("digits"), tmp_path / "run")
    other = recipes.load("digits", ["strategy.unroll=7"])
    Experiment(other, tmp_path / "run", seed=1)
    stored = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert (stored["seed"], stored["resolved"]["strategy"]["unroll"]) == (1, 7)


@pytest.mark.parametrize("name", ["student.safetensors", "checkpoint.safetensors", "replicate-0"])
def test_what_is_no_run_is_not_written_over(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    for resume in (False, True):
        with pytest.raises(FileExistsError, match=r"holds .*, and no recipe.json"):
            Experiment(recipes.load("digits"), tmp_path, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"seed": 3}', '{"seed": 3, "resolved": []}'])
def test_a_damaged_recipe_of_a_run_is_named(text: str, begun: Path) -> None:
    (begun / "recipe.json").write_text(text)
    with pytest.raises(RecipeError, match=r"recipe.json' is damaged .*; restore it"):
        Experiment(recipes.load("digits"), begun, seed=3, resume=True)


def test_what_can_not_be_computed_makes_no_folder(tmp_path: Path) -> None:
    for override, named in (
        ("amalgamation.backend=cuda", "amalgamation.backend=.cuda. can.t compute"),
        ("memory.budget=1MB", "budget must be [0-9]+ bytes or more"),
        ("memory.budget=500KB", "budget must be [0-9]+ bytes or more"),
        ("memory.budget=1B", "budget must be [0-9]+ bytes or more"),
    ):
        with pytest.raises(ValueError, match=named):
            Experiment(recipes.load("digits", [override, "device=cpu"]), tmp_path / "run")
        assert not (tmp_path / "run").exists()
