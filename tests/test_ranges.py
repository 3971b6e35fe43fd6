"""Every number of every dataclass of settings has a range."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from amalgam.meta import (
    Amalgamation,
    Conditions,
    Curriculum,
    Memory,
    MetaBatch,
    PersistentEvolution,
    Repeat,
    Stage,
    Stages,
    Training,
    Truncation,
)
from amalgam.meta.periods import UnrollSettings
from amalgam.meta.perturbation import FGSM, PGD, AdaptivePGD, Gaussian, InputNoise
from amalgam.policies import POLICIES, Teacher
from amalgam.recipes import Evaluation, TaskChoice
from amalgam.recipes.kinds import (
    ESTIMATOR,
    PERTURBATION,
    POLICY,
    STRATEGY,
    TEACHER,
    AnalyticalTeacher,
)
from amalgam.recipes.schema import Recipe

INSTANCES = [
    *(Amalgamation(), Conditions(), Curriculum(), Memory(), MetaBatch(), PersistentEvolution()),
    *(Repeat(), Stage(), Stages(), Training(), Truncation(), UnrollSettings(1, 1, 1, 0, 0.0)),
    *(FGSM(), PGD(), AdaptivePGD(), Gaussian(), InputNoise(0.1), Teacher("adam"), Evaluation()),
    TaskChoice("digits-mlp"),
    AnalyticalTeacher("adam"),
    *(policy.config_type() for policy in POLICIES.values()),
]
# Where infinity says something: no clipping, no repeats.
MAY_BE_INFINITE = {
    *((Training, "clip_ratio"), (MetaBatch, "slot_clip")),
    *((Curriculum, "repeat_threshold"), (Repeat, "repeat_threshold")),
}


def number_fields() -> list[Any]:
    found = []
    for made in INSTANCES:
        for field in dataclasses.fields(made):
            value = getattr(made, field.name)
            words = str(field.type)
            if (
                "int" in words or "float" in words or "Schedule" in words or "Counts" in words
            ) and not isinstance(value, bool):
                label = f"{type(made).__name__}.{field.name}"
                found.append(pytest.param(made, field.name, id=label))
    return found


@pytest.mark.parametrize(("made", "name"), number_fields())
def test_no_number_is_without_a_range(made: Any, name: str) -> None:
    value = getattr(made, name)
    wrong: list[Any] = [math.nan, math.inf, -math.inf, -1.0, 10**400, "1"]
    if (type(made), name) in MAY_BE_INFINITE:
        wrong.remove(math.inf)
        dataclasses.replace(made, **{name: math.inf})
    for number in wrong:
        if name == "budget" and number == "1":
            continue
        # Of a pair, the larger one; where one number or several may stand, one of several.
        of_two = isinstance(value, tuple) or name == "weight_decay"
        given = (0.0, number) if of_two else number
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(made, **{name: given})


def test_all_kinds_of_settings_were_looked_at() -> None:
    looked_at = {type(made) for made in INSTANCES}
    kinds = [*POLICY._known.values(), *STRATEGY._known.values(), *ESTIMATOR._known.values()]
    kinds += [*PERTURBATION._known.values(), *TEACHER._known.values()]
    with_numbers = {
        kind.type
        for kind in kinds
        if any(
            "int" in str(f.type) or "float" in str(f.type) for f in dataclasses.fields(kind.type)
        )
    }
    assert with_numbers <= looked_at
    tables = {type(getattr(Recipe, f.name, None)) for f in dataclasses.fields(Recipe)}
    assert {one for one in tables if dataclasses.is_dataclass(one)} <= looked_at


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"meta_lr": math.inf}, "meta_lr must be positive and finite, not inf"),
        ({"meta_lr": 1e39}, r"meta_lr must be at most 3.402823466e\+38, not 1e\+39"),
        ({"meta_lr": 1e-40}, "meta_lr must be at least 1.2e-38, not 1e-40"),
        ({"optimizees": 2.0}, "optimizees must be a whole number, not 2.0"),
        ({"optimizees": True}, "optimizees must be a number, not True"),
        ({"optimizees": 2**31}, "optimizees must be at most 2147483647, not 2147483648"),
        ({"optimizees": None}, "optimizees must be a number, not None"),
        ({"meta_betas": (0.9, 1.0)}, r"meta_betas must be in \[0, 1\), not 1.0"),
        ({"meta_betas": ()}, "meta_betas must be two numbers"),
    ],
)
def test_a_number_out_of_range_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Training(**changes)


def test_numbers_of_numpy_become_pythons() -> None:
    """So that what resumes a run, which goes by the repr, tells no difference."""
    assert repr(Stage(np.int64(3), 1, np.float64(0.5))) == repr(Stage(3, 1, 0.5))
    drawn = Conditions(weight_decay=(np.float32(0.5), np.float64(0.75)))
    assert repr(drawn) == repr(Conditions(weight_decay=(0.5, 0.75)))
    with pytest.raises(ValueError, match="episodes must be"):
        Stage(np.int64(0), 1)
