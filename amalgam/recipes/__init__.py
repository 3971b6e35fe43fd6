"""Recipes: experiments as TOML files, checked before anything runs.

:mod:`amalgam.recipes.schema` says what a recipe holds, :mod:`amalgam.recipes.kinds` how tables are
read that have a ``kind``, and :mod:`amalgam.recipes.reading` how files become recipes.
"""

from amalgam.recipes.kinds import Chosen, OwnTeacher, PolicyFile, TorchOptimizer
from amalgam.recipes.reading import RecipeError, from_dict, load, shipped
from amalgam.recipes.schema import (
    ChoiceTraining,
    Evaluation,
    EvaluationTask,
    Recipe,
    TaskChoice,
    ValidationTask,
)

__all__ = [
    "ChoiceTraining",
    "Chosen",
    "Evaluation",
    "EvaluationTask",
    "OwnTeacher",
    "PolicyFile",
    "Recipe",
    "RecipeError",
    "TaskChoice",
    "TorchOptimizer",
    "ValidationTask",
    "from_dict",
    "load",
    "shipped",
]
