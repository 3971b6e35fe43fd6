"""``student_step_`` on the CPU with what "bf16" permits: AVX-512's products of bfloat16."""

import math
from typing import Any

import pytest
import torch
from accuracy import assert_at_most_twice, doubled, errors_of, flat
from places import compiled, core_with
from student_cases import (
    check_control,
    check_rounding_by_seeds,
    copied,
    draw,
    make_state,
    make_weights,
    skewed_inputs,
    step_in_place,
)
from test_tensor_cores import assert_ill_alone, fall_ill
from torch import Tensor

from amalgam.backends import core
from amalgam.operations import registry
from amalgam.ops import StudentState, student_step_


@pytest.fixture
def bf16() -> None:
    """Skips where the CPU computes as if nothing were permitted."""
    module, problem = core.load()
    if module is None:
        pytest.skip(f"cpu: {problem}")
    if not module.cpu.multiplies_bfloat16():
        pytest.skip(
            "the CPU kernels have no products of bfloat16 here: they take a CPU with avx512_bf16, "
            "a compiler that knows -mavx512bf16, and the instruction set avx512, not "
            f"{module.cpu.isa()}"
        )


of_permitted = pytest.mark.parametrize("permitted", ["bf16", "bf16,approximate"])
STUDENTS = [(1, 4), (1, 5), (1, 20), (2, 4), (2, 7), (2, 8), (2, 16), (2, 20), (2, 32), (3, 5)]


def rounded(state: StudentState, weights: list[Tensor]) -> tuple[StudentState, list[Tensor]]:
    """What products take, rounded to bfloat16: h, and all weights but the features' and the head's.

    What a layer takes of the layer below is not here to be rounded.
    """
    narrow = [
        w.bfloat16().to(w.dtype) if 0 < i < len(weights) - 2 and i % 3 < 2 else w
        for i, w in enumerate(weights)
    ]
    return state._replace(h=state.h.bfloat16().to(state.h.dtype)), narrow


@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize(("layers", "hidden"), STUDENTS)
@of_permitted
def test_errs_at_most_twice_what_rounding_to_bfloat16_costs(
    permitted: str, layers: int, hidden: int
) -> None:
    draws = []
    for seed in range(6):
        grad, state, weights = skewed_inputs(150, layers, hidden, torch.float32, seed)
        ours = step_in_place(grad, *state, weights, f"cpu:{permitted}")
        wide = doubled((grad, *state, weights))
        truth = step_in_place(*wide, "reference")
        narrow, narrow_weights = rounded(StudentState(*wide[1:5]), wide[5])
        costs = step_in_place(wide[0], *narrow, narrow_weights, "reference")
        draws.append(
            [
                errors_of(one, cost.float(), exact)
                for one, cost, exact in zip(ours, costs, truth, strict=True)
            ]
        )
    for name, column in zip(("update", "m", "v", "h", "c"), zip(*draws, strict=True), strict=True):
        assert_at_most_twice(name, column)


@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize(
    ("permitted", "unit", "over"),
    [("bf16", 2.0**-19, 2.0**-22), ("bf16,approximate", 2.0**-12, 2.0**-14)],
)
@pytest.mark.parametrize("hidden", [4, 7, 32])
def test_rounds_nothing_that_bfloat16_holds(
    hidden: int, permitted: str, unit: float, over: float
) -> None:
    """Features and biases stay float32, sums too: cells err as float32's, and by tanh and sigmoid.

    The features' weights are large: activations run from one end to the other. Reciprocals may put
    them beyond it, by what they err.
    """
    draws = []
    for seed in range(3):
        grad, state, weights = skewed_inputs(1000, 1, hidden, torch.float32, seed)
        state, weights = rounded(state, weights)
        weights[0] = 8 * weights[0]
        ours = step_in_place(grad, *state, weights, f"cpu:{permitted}")
        plain = step_in_place(grad, *state, weights, "reference")
        truth = step_in_place(*doubled((grad, *state, weights)), "reference")
        assert ours[3].abs().max() <= 1 + over
        draws.append(
            [
                errors_of(ours[i], plain[i], truth[i], unit * truth[i].abs().clamp_min(1))
                for i in (3, 4)
            ]
        )
    for name, column in zip("hc", zip(*draws, strict=True), strict=True):
        assert_at_most_twice(name, column)


@pytest.mark.usefixtures("bf16")
@of_permitted
@pytest.mark.parametrize("cells", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [1, 2])
def test_errs_no_more_than_permitted(layers: int, cells: torch.dtype, permitted: str) -> None:
    """States and updates lie in [-1, 1]; ten steps add their errors up, as on GPUs."""
    bound = 5e-2 + (10 * torch.finfo(cells).eps if cells == torch.bfloat16 else 0)
    grad, start, weights = skewed_inputs(1001, layers, 20, torch.float32)
    start = start._replace(h=start.h.to(cells), c=start.c.to(cells))
    results = []
    for backend, dtype in ((f"cpu:{permitted}", torch.float32), ("reference", torch.float64)):
        state, param = copied(start), torch.zeros(1001, dtype=dtype)
        if backend == "reference":
            state = StudentState(*(t.double() for t in state))
        theirs = [w.to(dtype) for w in weights]
        for _ in range(10):
            student_step_([param], [grad.to(dtype)], [state], theirs, backend=backend)
        results.append((param, state.h.double()))
    (param, h), (true_param, true_h) = results
    assert (10 * (param - true_param)).abs().max() <= 10 * bound
    assert (h - true_h).abs().max() <= bound


@pytest.mark.usefixtures("bf16")
@of_permitted
@pytest.mark.parametrize("hidden", [7, 20])
def test_lets_nan_out(hidden: int, permitted: str) -> None:
    grad, state, weights = skewed_inputs(70, 2, hidden, torch.float32)
    ill = fall_ill(grad, state.h, state.c)
    both = [
        list(step_in_place(grad, *state, weights, name))
        for name in (f"cpu:{permitted}", "reference")
    ]
    assert_ill_alone(*both, ill, 70, 0.1)
    assert both[0][0][3].isnan()


@pytest.mark.usefixtures("bf16")
@of_permitted
def test_lets_nan_of_weights_out(permitted: str) -> None:
    grad, state, weights = skewed_inputs(33, 2, 5, torch.float32)
    for index in range(len(weights)):
        changed = [w.clone() for w in weights]
        changed[index].view(-1)[0] = math.nan
        both = [
            step_in_place(grad, *state, changed, name) for name in (f"cpu:{permitted}", "reference")
        ]
        for one, other in zip(*both, strict=True):
            assert torch.equal(one.isnan(), other.isnan())


@pytest.mark.usefixtures("bf16")
def test_the_largest_cells_stay_what_they_are() -> None:
    """Quotients hold several denominators; with these c their products must not overflow."""
    grad, state, weights = skewed_inputs(64, 1, 4, torch.float32)
    state.c[:] = torch.finfo(torch.float32).max / 4 * state.c.sign()
    ours = step_in_place(grad, *state, weights, "cpu:bf16")
    theirs = step_in_place(grad, *state, weights, "reference")
    torch.testing.assert_close(ours[4], theirs[4], rtol=2e-2, atol=0)


SHAPES = [(0,), (7, 9), (), (0, 3), (130,), (2, 3, 4, 2), *[(5,)] * 9, (0, 1), (8, 16), (641,)]


@pytest.mark.usefixtures("bf16")
@of_permitted
@pytest.mark.parametrize("cells", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("layers", "hidden"), [(2, 20), (1, 5), (3, 7)])
def test_many_tensors_step_as_each_alone(
    layers: int, hidden: int, cells: torch.dtype, permitted: str
) -> None:
    """Wherever a coordinate lies, in memory or in a tile, and whichever its neighbours are."""
    weights = make_weights(layers, hidden, dtype=torch.float32)
    both = []
    for at_once in (True, False):
        params = [draw(*s, seed=1).float() for s in SHAPES]
        params[5] = params[5].to(memory_format=torch.channels_last)
        grads = [2 * param for param in params]
        states = [make_state(*s, layers=layers, hidden=hidden, dtype=torch.float32) for s in SHAPES]
        states = [s._replace(h=s.h.to(cells), c=s.c.to(cells)) for s in states]
        rows = list(zip(params, grads, states, strict=True))
        for group in [rows] if at_once else [[row] for row in rows]:
            columns = [list(column) for column in zip(*group, strict=True)]
            student_step_(*columns, weights, backend=f"cpu:{permitted}")
        both.append(flat((params, states)))
    assert all(map(torch.equal, *both))


@pytest.mark.usefixtures("bf16")
@of_permitted
@pytest.mark.parametrize("hidden", [4, 20])
def test_seeds_round_to_the_same_bits(hidden: int, permitted: str) -> None:
    check_rounding_by_seeds(f"cpu:{permitted}", "cpu", hidden)


@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize("cells", [torch.float32, torch.bfloat16])
def test_the_device_decides(cells: torch.dtype) -> None:
    check_control("cpu:bf16", "cpu", cells, 20)


def stepped(backend: str, dtype: torch.dtype) -> list[Tensor]:
    grad, state, weights = skewed_inputs(200, 2, 20, dtype)
    return list(step_in_place(grad, *state, weights, backend))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_possible_is_computed_precisely(backend: str, dtype: torch.dtype) -> None:
    """Nothing else changes a bit, and bf16 does of float32 alone, by AVX-512."""
    expected = stepped(backend, dtype)
    for permitted in ("ieee", "3xtf32", "tf32", "approximate", "tf32,approximate"):
        assert all(map(torch.equal, stepped(f"{backend}:{permitted}", dtype), expected))
    module = core.core()
    possible = dtype == torch.float32 and module.cpu.multiplies_bfloat16()
    assert not module.cpu.multiplies_bfloat16() or module.cpu.isa() == "avx512"
    for permitted in ("bf16", "bf16,approximate"):
        found = stepped(f"{backend}:{permitted}", dtype)
        assert all(map(torch.equal, found[1:3], expected[1:3]))
        assert torch.equal(found[3], expected[3]) != possible


def test_permission_reaches_the_kernel() -> None:
    like = torch.zeros(3)
    assert registry.resolve("student_step_", "auto:bf16", like) == "cpu:bf16"
    assert registry.resolve("student_step_", "cpu:bf16,approximate", like) == "cpu:bf16,approximate"
    assert registry.resolve("student_step", "auto:bf16", like) == "cpu"


def test_other_instruction_sets_have_no_such_products() -> None:
    available: list[Any] = core.core().cpu.available_isas()
    for name in set(available) - {"avx512"}:
        assert not core_with(name).cpu.multiplies_bfloat16()
