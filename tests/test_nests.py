"""Nests of tuples, tensors and numbers survive being taken apart."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from amalgam import nests


class State(NamedTuple):
    m: Tensor
    step: int
    inner: tuple[Any, ...]


def state(offset: float = 0.0) -> State:
    a, b, c = (torch.arange(3.0) + offset + k for k in range(3))
    return State(a, 7, ((b, 0.1), (), c))


def test_leaves_stand_from_left_to_right() -> None:
    nest = state()
    first, step, second, number, third = nests.leaves(nest)
    assert (step, number) == (7, 0.1)
    for found, wanted in zip(
        nests.tensors(nest), (nest.m, nest.inner[0][0], nest.inner[2]), strict=True
    ):
        assert found is wanted
    assert [id(t) for t in (first, second, third)] == [id(t) for t in nests.tensors(nest)]
    assert nests.bytes_of(nest) == 3 * 3 * 4
    assert nests.bytes_of((nest, torch.zeros(2, dtype=torch.bfloat16))) == 3 * 3 * 4 + 4


def test_other_tensors_take_the_places_of_a_nests_own() -> None:
    nest = state()
    changed = nests.with_tensors(nest, [t * 2 for t in nests.tensors(nest)])
    assert isinstance(changed, State)
    assert (changed.step, changed.inner[0][1], changed.inner[1]) == (7, 0.1, ())
    assert all(map(torch.equal, nests.tensors(changed), [2 * t for t in nests.tensors(nest)]))


def test_a_nest_survives_its_names() -> None:
    nest = state()
    named = nests.to_named(nest, named_tuples=True)
    assert list(named) == ["0", "1", "2", "structure"]
    assert all(isinstance(tensor, Tensor) for tensor in named.values())
    like = state(5.0)._replace(step=0)
    again = nests.from_named(named, like)
    assert isinstance(again, State)
    assert type(again.step) is int
    assert again.step == 7
    assert again.inner[0][1] == 0.1
    assert type(again.inner[0][1]) is float
    assert all(map(torch.equal, nests.tensors(again), nests.tensors(nest)))
    assert nests.from_named(named)[1:] == (7, ((again.inner[0][0], 0.1), (), again.inner[2]))
    with pytest.raises(ValueError, match="named must hold a nest of 6 leaves, not of 5"):
        nests.from_named(named, (like, 0))
    with pytest.raises(KeyError):
        nests.from_named({name: named[name] for name in ("0", "structure")}, like)


def test_what_is_no_nest_is_refused() -> None:
    kinds = {"a": [True, None, "x", math.inf], "b": (1, 2.5)}
    assert nests.from_named(nests.to_named(kinds)) == kinds
    for strange in ({1: 2}, {"a": object()}, [{3}], state()):
        with pytest.raises(TypeError, match="a state must be a nest of dictionaries"):
            nests.to_named(strange)


def test_names_are_grouped_and_found_by_their_beginnings() -> None:
    one, two = torch.zeros(1), torch.ones(1)
    named = {**nests.prefixed("a.0", {"x": one, "y.z": two}), **nests.prefixed("a.11", {"x": two})}
    assert list(named) == ["a.0.x", "a.0.y.z", "a.11.x"]
    groups = nests.by_number(nests.under("a", named))
    assert {number: list(group) for number, group in groups.items()} == {0: ["x", "y.z"], 11: ["x"]}
    assert groups[0]["y.z"] is two
    assert nests.under("a.1", named) == {}
