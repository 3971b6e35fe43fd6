"""The rule that compiled code is held to can fail, and is as wide as rounding makes it."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from accuracy import (
    assert_as_accurate,
    assert_at_most_twice,
    errors_of,
    largest,
    of_a_coordinate,
    of_a_row,
    what_rounding_costs,
)
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
TRUTH = torch.tensor([[1.0, -2.0, 4.0], [0.5, 0.25, 0.125]], dtype=torch.float64)


def off_by(*errors: float) -> Tensor:
    """The truth with errors in its first row, in powers of two, which float32 holds."""
    return (TRUTH + torch.tensor([[*errors], [0.0] * 3], dtype=torch.float64)).float()


PLAIN = off_by(2.0**-10, 0, 0)


@pytest.mark.parametrize("times", [0, 1, 2])
def test_twice_the_error_is_permitted(times: int) -> None:
    for place in range(3):
        ours = off_by(*(times * 2.0**-10 * (place == each) for each in range(3)))
        assert_at_most_twice("sum", [errors_of(ours, PLAIN, TRUTH, 0.0)])


@pytest.mark.parametrize("wrong", [2.25 * 2.0**-10, 1.0, math.inf, math.nan])
@pytest.mark.parametrize("place", range(3))
def test_more_is_not(place: int, wrong: float) -> None:
    errors = errors_of(off_by(*(wrong * (place == each) for each in range(3))), PLAIN, TRUTH, 0.0)
    if math.isnan(wrong):  # of the others it makes 0 * NaN
        assert errors.ours.isnan()
    with pytest.raises(AssertionError, match=r"sum, group 0 of 1: .* times plain PyTorch's error"):
        assert_at_most_twice("sum", [errors])


def test_groups_are_judged_each_by_its_own_error() -> None:
    """Row 1 may not err as row 0 does."""
    ours = TRUTH.float()
    ours[1, 1] += 2.0**-10
    assert_at_most_twice("whole", [errors_of(ours, PLAIN, TRUTH, 0.0)])
    with pytest.raises(AssertionError, match="rows, group 1 of 2: inf times"):
        assert_at_most_twice("rows", [errors_of(ours, PLAIN, TRUTH, 0.0, of_a_row)])
    cells = torch.zeros(2, 3, 4)
    assert of_a_coordinate(cells).shape == (4,)
    assert of_a_coordinate(cells[0]).shape == (3, 4)


def test_the_unit_counts_with_either_error() -> None:
    ours = off_by(0, 0, 2.0**-10)
    exact = TRUTH.float()
    assert_at_most_twice("sum", [errors_of(ours, exact, TRUTH, 2.0**-10)])
    with pytest.raises(AssertionError, match="inf times plain"):
        assert_at_most_twice("sum", [errors_of(ours, exact, TRUTH, 0.0)])
    with pytest.raises(AssertionError, match="3.00 times plain.*the unit 0.000488"):
        assert_at_most_twice("sum", [errors_of(ours, exact, TRUTH, 2.0**-11)])
    assert errors_of(ours, exact, TRUTH).unit.item() == 4 * EPS


def test_over_draws_the_ratio_is_the_geometric_mean() -> None:
    def draw(times: float) -> object:
        return errors_of(off_by(times * 2.0**-10, 0, 0), PLAIN, TRUTH, 0.0)

    assert_at_most_twice("sum", [draw(1), draw(4)])
    with pytest.raises(AssertionError, match="sum.*2.83 times.*of 2 draws"):
        assert_at_most_twice("sum", [draw(2), draw(4)])
    with pytest.raises(AssertionError, match="4.00 times"):
        assert_at_most_twice("sum", [largest([draw(1), draw(4)])])


def test_where_the_truth_is_zero_nothing_else_is_right() -> None:
    zeros = torch.zeros(3)
    assert_at_most_twice("zeros", [errors_of(zeros, zeros, zeros.double())])
    with pytest.raises(AssertionError, match="inf times"):
        assert_at_most_twice("zeros", [errors_of(zeros + 1e-30, zeros, zeros.double())])


def test_shapes_and_dtypes_must_agree() -> None:
    zeros = torch.zeros(3)
    for ours in (zeros[:2], zeros.double()):
        with pytest.raises(AssertionError):
            errors_of(ours, zeros, zeros.double())


def test_long_doubles_are_truths() -> None:
    truth = TRUTH.numpy().astype(np.longdouble)
    assert_at_most_twice("sum", [errors_of(off_by(0, 2.0**-9, 0), PLAIN, truth, 0.0)])
    with pytest.raises(AssertionError, match="4.00 times"):
        assert_at_most_twice("sum", [errors_of(off_by(0, 2.0**-8, 0), PLAIN, truth, 0.0)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("result", [0, 1])
def test_every_result_of_an_operation_is_judged(dtype: torch.dtype, result: int) -> None:
    """A NaN beside a good result was once not seen: max() of numbers passes it over."""

    def operation(x: Tensor, wrong: float, backend: str) -> list[Tensor]:
        found = [x.exp(), x.sin()]
        if backend == "cpu":
            found[result] = found[result] + wrong
        return found

    x = torch.linspace(0, 1, 100).to(dtype)
    assert_as_accurate(operation, [(x, 0.0)], "cpu")
    for wrong in (math.nan, 1e-5):
        with pytest.raises(AssertionError):
            assert_as_accurate(operation, [(x, wrong)], "cpu")


# --- What rounding costs ---


def costs(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    truth = [function(*(t.double() for t in arguments))]
    return what_rounding_costs(function, arguments, truth, torch.float32)[0]


def test_where_terms_cancel_rounding_costs_units_of_the_terms() -> None:
    large, small = torch.tensor([1024.0]), torch.tensor([1.0])
    alone = costs(lambda a, b: a * b, small, small)
    cancelling = costs(lambda a, b: (a + b) - a, large, small)
    assert EPS / 4 < alone.item() < 3 * EPS
    assert 1024 * EPS / 4 < cancelling.item() < 3 * 1024 * EPS


def test_sums_cost_units_of_their_terms() -> None:
    """A product of matrices is one operation, and its terms are many: they are what is rounded."""
    row = torch.tensor([[3e4, -3e4, 1.0]])
    for product in (lambda a, b: a @ b, lambda a, b: (a * b.T).sum(1, keepdim=True)):
        found = costs(product, row, torch.ones(3, 1)).item()
        assert 3e4 * EPS / 4 < found < 5 * 3e4 * EPS


def test_what_is_exact_costs_nothing() -> None:
    values = torch.linspace(-3, 3, 10)
    for exact in (
        torch.neg,
        torch.abs,
        lambda x: x.clamp(-1, 1),
        lambda x: torch.where(x > 0, x, 0),
    ):
        assert not costs(exact, values).any()
    assert not costs(lambda x: x * x, torch.zeros(4)).any()


def test_in_place_arithmetic_rounds_too() -> None:
    def add(a: Tensor, b: Tensor) -> Tensor:
        total = a.clone()
        total.add_(b)
        return total

    found = costs(add, torch.tensor([1.0]), torch.tensor([1e4])).item()
    assert 1e4 * EPS / 4 < found < 3e4 * EPS
