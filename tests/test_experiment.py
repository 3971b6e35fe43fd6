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
    """The folder of a run that was begun."""
    Experiment(recipes.load("digits"), tmp_path / "run", name="digits", seed=3)
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
