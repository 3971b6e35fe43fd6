"""What an unroll keeps: the fewest steps computed again, within the budget."""

import functools

import pytest
import torch

from amalgam.meta import Memory
from amalgam.meta.memory import binomial, free_bytes, parse_bytes, plan, segments


@functools.cache
def fewest(steps: int, free: int) -> int:
    """The fewest steps that have to be computed again, by trying all choices of points."""
    if steps <= 1:
        return 0
    if not free:
        return steps * (steps - 1) // 2
    return min(
        there + fewest(steps - there, free - 1) + fewest(there, free) for there in range(1, steps)
    )


@functools.cache
def taken(steps: int, free: int) -> int:
    """Steps that the binomial choice computes again."""
    if steps <= 1:
        return 0
    if not free:
        return steps * (steps - 1) // 2
    there = binomial(steps, free)
    assert 1 <= there < steps
    return there + taken(steps - there, free - 1) + taken(there, free)


@pytest.mark.parametrize("free", [1, 2, 3, 5, 8, 13, 40])
def test_no_choice_computes_fewer_steps_again(free: int) -> None:
    for steps in range(1, 60):
        assert taken(steps, free) == fewest(steps, free)


def test_with_room_for_all_nothing_is_computed_again() -> None:
    assert [binomial(steps, steps - 1) for steps in range(2, 200)] == [1] * 198


def test_segments_keep_their_beginnings_and_then_all() -> None:
    rule = segments(4)
    assert [rule(steps, 9) for steps in (9, 5, 4, 3, 1)] == [4, 4, 1, 1, 1]


def test_points_come_before_graphs() -> None:
    def made(budget: int) -> tuple[int, int]:
        chosen = plan(10, Memory(budget=1), budget, 100, 50)
        return chosen.points, chosen.graphs

    assert made(250) == (2, 0)
    assert made(899) == (8, 0)
    assert made(900) == (9, 0)
    assert made(1049) == (9, 2)
    assert made(10**6) == (9, 10)
    assert plan(1, Memory(), 0, 100, 50).points == 0
    with pytest.raises(ValueError, match="budget must be 100 bytes or more .*, not 99"):
        made(99)


@pytest.mark.parametrize(
    ("amount", "size"),
    [("4GiB", 4 * 2**30), ("500 MB", 500 * 10**6), ("1.5kib", 1536), (17, 17), ("9B", 9)],
)
def test_amounts_of_memory(amount: str | int, size: int) -> None:
    assert parse_bytes(amount) == size


@pytest.mark.parametrize("amount", ["", "GiB", "-1", "4 TiB", 0, "1e9", "0.1B"])
def test_what_is_no_amount(amount: str | int) -> None:
    with pytest.raises(ValueError, match="budget must read as in '4GiB'"):
        Memory(budget=amount)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"segment": 0}, "segment must be 1 or more, not 0"),
        ({"budget": "1GiB", "segment": 3}, "can't both decide"),
        ({"cells": "float16"}, "cells must be 'float32' or 'bfloat16', not 'float16'"),
        ({"cells": "bfloat16"}, "needs a budget or a segment"),
    ],
)
def test_bad_settings_are_named(wrong: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Memory(**wrong)


def test_memory_that_is_free() -> None:
    free = free_bytes(torch.device("cpu"))
    assert 0 < free < 2**50
    assert Memory(budget="2KiB").budget_bytes(torch.device("cpu"), 10**9) == 2048
    half = Memory().budget_bytes(torch.device("cpu"), 0)
    assert half < 0.8 * free
    assert Memory().budget_bytes(torch.device("cpu"), 2**60) > 1.3 * half


@pytest.mark.parametrize("budget", [-(2**62), -1, 0, 1, 299, 300, 399])
def test_a_budget_below_one_point_is_refused_with_the_least_that_works(budget: int) -> None:
    with pytest.raises(ValueError, match=f"budget must be 400 bytes .* of 9 steps, not {budget}$"):
        plan(9, Memory(budget=1), budget, 100, 50, fixed=300)
    assert plan(9, Memory(budget=1), 400, 100, 50, fixed=300).points == 1


@pytest.mark.parametrize("memory", [Memory(), Memory(budget=1), Memory(segment=3)])
@pytest.mark.parametrize("budget", [-1, 0, 2**62])
def test_plans_of_the_shortest_windows(memory: Memory, budget: int) -> None:
    none = plan(0, memory, budget, 100, 50)
    assert (none.points, none.graphs) == (0, 0)
    chosen = plan(1, memory, budget, 100, 0)
    assert chosen.points in (0, 2)
    assert chosen.next_kept(1, chosen.points) == 1


@pytest.mark.parametrize(("steps", "free"), [(0, 3), (-1, 3), (2, -1), (100, -(2**40))])
def test_the_binomial_choice_refuses_what_would_never_end(steps: int, free: int) -> None:
    with pytest.raises(ValueError, match="steps must be 1 or more and free 0 or more, not"):
        binomial(steps, free)
    assert binomial(10**6, 0) == 10**6 - 1
    assert binomial(1, -1) == 1


@pytest.mark.parametrize(
    "amount",
    ["", "GB", "-1GB", "0", "0.4B", "9" * 400 + "GB", "1e400", "8EiB", str(2**63), True, 1.5, None],
)
def test_amounts_that_are_none_are_named(amount: object) -> None:
    with pytest.raises(ValueError, match="budget must read as in '4GiB', '500MB' or 1048576, not"):
        parse_bytes(amount)  # type: ignore[arg-type]
