"""An LSTM's cells as 8-bit codes: what they stand for, and steps that store them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from accuracy import flat
from nominal_cases import nominal_settings, nominal_weights
from places import CPU, INTERPRETED, ON_CPU, at, compiled
from student_cases import copied, draw, make_state, make_weights
from torch import Tensor

from amalgam.backends.student_step_in_place import _accepts
from amalgam.operations.cell_codes import decoded, encoded, numbers_of, units_of
from amalgam.operations.registry import Numerics
from amalgam.operations.rounding import key_of, random_bits
from amalgam.operations.student_step_in_place import InPlaceStep, StudentTensors
from amalgam.ops import StepSettings, StudentState, student_step_

F32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8
LARGEST = torch.tensor(2.0) ** torch.arange(-118, 128)


def blocks(layers: int = 2, hidden: int = 8, n: int = 984) -> Tensor:
    """Numbers of which every block's largest lies in one of float32's octaves."""
    values = draw(layers, hidden, n, seed=4).float()
    values /= values.abs().amax(1, keepdim=True)
    return values * LARGEST.repeat(n // len(LARGEST)) * (1 - 0.49 * torch.rand(n))


def bits_like(values: Tensor, seed: int = 0) -> Tensor:
    return torch.randint(2**16, values.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("random", [False, True])
def test_codes_are_off_by_so_much_of_the_blocks_largest(random: bool) -> None:
    values = blocks()
    codes = encoded(values, bits_like(values) if random else None)
    assert codes.dtype == INT8
    assert codes.shape == (2, 9, 984)
    sizes = units_of(codes).int().abs().amax(1)
    assert sizes.min() >= 64
    assert sizes.max() <= 127
    largest = values.abs().amax(1, keepdim=True)
    error = ((decoded(codes) - values).abs() / largest).amax()
    assert error <= (1 / 64 if random else 1 / 128)


@pytest.mark.parametrize("random", [False, True])
def test_what_codes_stand_for_has_these_codes(random: bool) -> None:
    """Rounded by whatever bits: a step that is skipped changes none."""
    values = blocks()
    codes = encoded(values, bits_like(values) if random else None)
    again = decoded(codes)
    for bits in (None, bits_like(values, 1), torch.full(values.shape, 0xFFFF)):
        assert torch.equal(encoded(again, bits), codes)


@pytest.mark.parametrize("random", [False, True])
def test_mirrored_numbers_have_mirrored_codes_and_zero_has_zero(random: bool) -> None:
    values = blocks()
    values[:, 3] = 0
    bits = bits_like(values) if random else None
    ours, theirs = encoded(values, bits), encoded(-values, bits)
    assert torch.equal(units_of(ours), -units_of(theirs))
    assert torch.equal(ours[:, -1], theirs[:, -1])
    assert not ours[:, 3].any()
    nothing = torch.zeros(1, 4, 6)
    assert not encoded(nothing, bits_like(nothing) if random else None).any()
    assert encoded(torch.zeros(2, 3, 0)).shape == (2, 4, 0)


def test_random_codes_are_right_on_average() -> None:
    count = 40_000
    block = torch.tensor([1.0, 0.7, 1e-3, -0.123456])
    values = block[None, :, None].expand(1, 4, count).contiguous()
    found = decoded(encoded(values, bits_like(values))).double()
    assert ((found.mean(-1)[0] - block).abs() < 5 * 2**-7 / math.sqrt(count)).all()
    steps = (found[0, 2] * 64).unique()
    assert steps.tolist() == [0.0, 1.0]


def test_too_small_a_block_is_zero_and_one_that_is_not_finite_is_nan() -> None:
    values = torch.zeros(1, 3, 4)
    values[0, :, 0] = 2.0**-121
    values[0, 1, 1], values[0, 2, 2] = math.inf, math.nan
    values[0, 0] += torch.tensor([0.0, 1.0, 1.0, 1.0])
    codes = encoded(values)
    assert not codes[..., 0].any()
    assert decoded(codes).isnan().any(1)[0].tolist() == [False, True, True, False]
    assert decoded(codes)[0, :, 3].tolist() == [1.0, 0.0, 0.0]
    assert torch.equal(encoded(decoded(codes)), codes)


# --- Steps ---

STUDENTS = [("paper", 2, 3), ("paper", 2, 20), ("nominal", 1, 4), ("nominal", 1, 20)]
SIZES = [(136,), (3, 5)]
REFERENCE = pytest.param("reference", "cpu", id="reference")
everywhere = at(REFERENCE, *ON_CPU, *INTERPRETED)


def stepped(
    form: str,
    layers: int,
    hidden: int,
    backend: str,
    coded: bool = True,
    sizes: list[tuple[int, ...]] = SIZES,
    **how: Any,
) -> tuple[list[Tensor], list[StudentState], list[StudentState]]:
    """Parameters and states after a step, and states before it; cells as codes, or as numbers."""
    params = [draw(*size, seed=1).float() for size in sizes]
    params[1] = params[1].T.contiguous().T
    grads = [draw(*size, seed=2).float() for size in sizes]
    states = []
    for size in sizes:
        state = make_state(*size, layers=layers, hidden=hidden, dtype=F32)
        h, c = (encoded(cells) for cells in (state.h, state.c))
        states.append(state._replace(h=h, c=c))
    if not coded:
        states = [StudentState(*map(numbers_of, state)) for state in states]
    before = [copied(state) for state in states]
    weights, settings = make_weights(layers, hidden, dtype=F32), StepSettings()
    if form == "nominal":
        weights = nominal_weights(len(sizes), layers, hidden, F32)
        settings = nominal_settings([param.numel() for param in params], F32, in_place=True)
    student_step_(params, grads, states, weights, settings, lr=0.5, backend=backend, **how)
    return params, states, before


def assert_codes_of(codes: Tensor, numbers: Tensor, bits: Tensor | None) -> None:
    """Those of the numbers, but where their last bits decide; then it is the next code."""
    expected = encoded(numbers, bits)
    assert (codes == expected).float().mean() >= 0.98
    step = numbers.abs().amax(1, keepdim=True) / 64
    assert ((decoded(codes) - decoded(expected)).abs() <= step).all()


@at(REFERENCE, *ON_CPU)
@pytest.mark.parametrize(("form", "layers", "hidden"), STUDENTS)
@pytest.mark.parametrize("seeds", [None, [11, 12]])
def test_a_step_from_codes_stores_those_of_its_cells(
    backend: str, device: str, form: str, layers: int, hidden: int, seeds: list[int] | None
) -> None:
    """It is the step from the numbers that codes stand for; seeds round by bits all agree on."""
    check_codes(backend, form, layers, hidden, seeds)


@at(*INTERPRETED)
@pytest.mark.parametrize(("hidden", "seeds"), [(4, [11, 12]), (20, None)])
def test_tritons_step_does_so_too(
    backend: str, device: str, hidden: int, seeds: list[int] | None
) -> None:
    """One student of few units, and one whose sums are products of matrices."""
    check_codes(backend, "nominal", 1, hidden, seeds)


def check_codes(backend: str, form: str, layers: int, hidden: int, seeds: list[int] | None) -> None:
    counts = [torch.tensor(float(n)) for n in (0, 7)]
    wide, exact, _ = stepped(form, layers, hidden, backend, coded=False, steps=counts)
    params, states, _ = stepped(form, layers, hidden, backend, steps=counts, seeds=seeds)
    torch.testing.assert_close(params, wide, rtol=1e-6, atol=1e-6)
    for index, (state, numbers) in enumerate(zip(states, exact, strict=True)):
        torch.testing.assert_close(state[:2], numbers[:2], rtol=1e-6, atol=1e-6)
        for name, shift in (("h", 16), ("c", 0)):
            values, bits = getattr(numbers, name), None
            if seeds is not None:
                rows, places = range(layers * hidden), range(numbers.m.numel())
                drawn = random_bits(key_of(seeds[index], counts[index]), rows, places)
                bits = (drawn >> shift & 0xFFFF).view(values.shape)
            assert_codes_of(getattr(state, name), values, bits)


@everywhere
@pytest.mark.parametrize("seeds", [None, [11, 12]])
def test_codes_of_skipped_and_warming_steps_stay(
    backend: str, device: str, seeds: list[int] | None
) -> None:
    form, layers, hidden = STUDENTS[0]
    how: dict[str, Any] = {"seeds": seeds, "steps": [torch.tensor(2.0)] * 2}
    _, states, before = stepped(form, layers, hidden, backend, skip=torch.ones(()), **how)
    assert all(map(torch.equal, flat(states), flat(before)))
    _, states, before = stepped(form, layers, hidden, backend, warmup_steps=3, warmup_lr=0.1, **how)
    for state, old in zip(states, before, strict=True):
        assert torch.equal(state.h, old.h)
        assert torch.equal(state.c, old.c)
        assert not torch.equal(state.m, old.m)


@compiled
@pytest.mark.parametrize(("form", "layers", "hidden"), [STUDENTS[0], STUDENTS[2]])
def test_same_codes_for_any_number_of_threads(
    backend: str, form: str, layers: int, hidden: int
) -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            sizes = [(1300,), (3, 5)]
            results.append(
                flat(stepped(form, layers, hidden, backend, sizes=sizes, seeds=[1, 2])[:2])
            )
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


@pytest.mark.parametrize("backend", ["reference", CPU[0]], indirect=True)
def test_cells_that_are_not_finite_stay_so(backend: str) -> None:
    state = make_state(9, layers=1, hidden=4, dtype=F32)
    state.c[0, 1, 2], state.c[0, 3, 5] = math.inf, math.nan
    state = state._replace(h=encoded(state.h), c=encoded(state.c))
    weights, settings = nominal_weights(1, 1, 4, F32), nominal_settings([9], F32, in_place=True)
    param, before = draw(9).float(), draw(9).float()
    student_step_([param], [draw(9, seed=2).float()], [state], weights, settings, backend=backend)
    lost = [n in (2, 5) for n in range(9)]
    assert param.isnan().tolist() == lost
    assert decoded(state.c).isnan().all(1)[0].tolist() == lost
    assert not torch.equal(param, before)


def test_what_no_backend_takes_is_refused() -> None:
    weights, grad = make_weights(2, 4, dtype=F32), [draw(6).float()]
    state = make_state(6, hidden=4, dtype=F32)
    codes = state._replace(h=encoded(state.h), c=encoded(state.c))

    def refused(message: str, *states: StudentState, of: list[Tensor] = weights) -> None:
        count = len(states)
        params = [draw(6, seed=k).to(of[0].dtype) for k in range(count)]
        with pytest.raises(ValueError, match=message):
            student_step_(params, grad * count, states, of)

    refused("state.c must have shape", codes._replace(c=state.c))
    refused("state.h must have shape", codes, state)
    refused(r"begin with .* = \(2, 4\)", state._replace(h=state.h.to(INT8), c=state.c.to(INT8)))
    refused("begin with", state._replace(h=torch.zeros(3, dtype=INT8), c=state.c.to(INT8)))
    double = [weight.double() for weight in weights]
    refused(
        "state.h must be torch.float64",
        codes._replace(m=state.m.double(), v=state.v.double()),
        of=double,
    )
    tensors = StudentTensors([draw(6).float()], [codes])
    step = InPlaceStep(tensors, grad, weights, StepSettings(), 1.0, 0.0, None, [], 0, [])
    assert "these are int8; backend='triton'" in str(_accepts(step, numerics=Numerics()))
