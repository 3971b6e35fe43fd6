"""The nominal form by the compiled CPU kernels: what is their own, bit for bit where it can be.

Networks of one layer of 4, 8 or 16 units have kernels that hold a coordinate in registers; others
go through tiles.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from accuracy import flat
from nominal_cases import corrections_of, nominal_settings, nominal_weights, skewed_nominal
from places import compiled, of_each, of_each_once
from student_cases import as_students, copied, draw, make_state, make_weights, wanting
from torch import Tensor

from amalgam.operations.rounding import key_of, random_bits, rounded_stochastically
from amalgam.operations.student_step import backward_into, step_into
from amalgam.ops import (
    StepSettings,
    StudentState,
    initial_state,
    student_step,
    student_step_,
    student_unroll_backward,
)

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
FORWARD, BACKWARD = torch.ops.amalgam.student_step, torch.ops.amalgam.student_step_backward
UNROLL = torch.ops.amalgam.student_unroll_backward

of_networks = pytest.mark.parametrize(("layers", "hidden"), [(1, 8), (2, 5)])


def upstream_of(grad: Tensor, state: StudentState) -> list[Tensor]:
    return [draw(*t.shape, seed=9, dtype=grad.dtype) for t in (grad, *state)]


# --- One step ---


@of_each
@of_networks
def test_coordinates_that_never_had_a_gradient_have_no_slopes(
    backend: str, layers: int, hidden: int
) -> None:
    """The root has none at zero: every gradient would be NaN."""
    grad, state, weights, settings = skewed_nominal(70, layers, hidden, F32)
    upstream = upstream_of(grad, state)
    results = BACKWARD(upstream, grad, *state, weights, *settings, backend)
    assert all(t.isfinite().all() for t in flat(results))
    d_grad, d_m, d_v, *_ = results
    torch.testing.assert_close(d_grad[::7], (1 - settings.beta1) * upstream[1][::7])
    torch.testing.assert_close(d_m[::7], settings.beta1 * upstream[1][::7])
    torch.testing.assert_close(d_v[::7], settings.beta2 * upstream[2][::7])


@compiled
@of_networks
def test_a_bias_and_corrections_are_a_tensors_own(backend: str, layers: int, hidden: int) -> None:
    """Each tensor by itself has the same results, and sums for its bias."""
    grad, state, weights, settings = skewed_nominal(150, layers, hidden, F32)
    sizes, corrections = [1, 0, 64, 15, 70], corrections_of([1, 2, 30, 400, 5000], F32)
    weights[2] = draw(5, 4 * hidden, seed=3, dtype=F32)
    settings = settings._replace(sizes=sizes, corrections=corrections)
    upstream = upstream_of(grad, state)
    whole = FORWARD(grad, *state, weights, *settings, backend)
    *gradients, d_weights = BACKWARD(upstream, grad, *state, weights, *settings, backend)
    columns = [t.split(sizes, -1) for t in (*whole, *gradients, grad, *state, *upstream)]
    for tensor, parts in enumerate(zip(*columns, strict=True)):
        only = slice(tensor, tensor + 1)
        own = settings._replace(sizes=sizes[only], corrections=corrections[only])
        ours = [*weights[:2], weights[2][only], *weights[3:]]
        arguments = (*(t.contiguous() for t in parts[10:15]), ours, *own, backend)
        *theirs, their_weights = BACKWARD([t.contiguous() for t in parts[15:]], *arguments)
        assert all(map(torch.equal, parts[:10], (*FORWARD(*arguments), *theirs)))
        torch.testing.assert_close(d_weights[2][tensor], their_weights[2][0])


@of_each
def test_steps_into_memory_that_is_there(backend: str) -> None:
    for dtype in (F32, F64):
        grad, state, weights, settings = skewed_nominal(130, 1, 8, dtype)
        update, new = student_step(grad, state, weights, settings, backend=backend)
        moved, same = torch.empty_like(grad), copied(state)
        step_into(*as_students(moved, same, grad, same, weights, settings), backend)
        assert all(map(torch.equal, (moved, *same), (update, *new)))

        upstream = upstream_of(grad, state)
        expected = flat(BACKWARD(upstream, grad, *state, weights, *settings, backend))
        d_state = StudentState(*(t.clone() for t in upstream[1:]))
        given = as_students(upstream[0], d_state, grad, state, weights, settings)
        d_grad, d_weights = backward_into(*given, backend)
        found = [d_grad[0], *d_state, *(weight[0] for weight in d_weights)]
        assert all(map(torch.equal, expected, found))


@compiled
@of_networks
def test_nan_and_infinity_go_through_the_backward(backend: str, layers: int, hidden: int) -> None:
    grad, state, weights, settings = skewed_nominal(200, layers, hidden, F32)
    grad[3], grad[5], grad[8] = math.nan, math.inf, -math.inf
    state.c[0, 0, 66], state.v[70], state.m[90] = math.nan, math.nan, math.nan
    arguments = (upstream_of(grad, state), grad, *state, weights, *settings)
    ours, plain = (BACKWARD(*arguments, name)[:5] for name in (backend, "reference"))
    for one, other in zip(ours, plain, strict=True):
        assert torch.equal(one.isnan(), other.isnan())

    weights[2][2] = math.nan  # of the last tensor
    update, *_ = FORWARD(grad, *state, weights, *settings, backend)
    assert update[200 // 3 :].isnan().all()
    assert not update[9 : 200 // 3].isnan()[[i for i in range(57) if i != 66 - 9]].any()


@of_each
def test_cells_may_be_infinite(backend: str) -> None:
    """A step's own powers of two must not be of infinity less infinity."""
    for sign in (1, -1):
        grad, state, weights, settings = skewed_nominal(40, 1, 8, F32)
        state.c[0, 3] = sign * math.inf
        update, new = student_step(grad, state, weights, settings, backend=backend)
        assert update.isfinite().all()
        assert (new.c[0, 3] == sign * math.inf).all()
        assert (sign * new.h[0, 3] > 0).all()


# --- In place ---

SHAPES = [(0,), (7, 9), (), (130,), (2, 3, 4, 2), *[(5,)] * 3, (2, 1, 3, 1, 2)]
Made = tuple[list[Tensor], list[Tensor], list[StudentState]]


def tensors_of(
    shapes: Sequence[tuple[int, ...]],
    layers: int,
    hidden: int,
    dtype: torch.dtype = F32,
    grad_dtype: torch.dtype = F32,
    cells: torch.dtype = F32,
    moments: torch.dtype = F32,
) -> Made:
    """Parameters, gradients and states; the same numbers in every dtype, and some are strided."""
    params, grads, states = [], [], []
    for index, shape in enumerate(shapes):
        param, grad = (draw(*shape, seed=index + k).bfloat16() for k in (1, 2))
        param, grad = param.to(dtype), grad.to(grad_dtype)
        if len(shape) == 2:
            param = param.T.contiguous().T
        if len(shape) == 4:
            param, grad = (t.to(memory_format=torch.channels_last) for t in (param, grad))
        state = make_state(*shape, layers=layers, hidden=hidden, seed=index, dtype=BF16)
        kinds = (moments, moments, cells, cells)
        states.append(StudentState(*(t.to(d) for t, d in zip(state, kinds, strict=True))))
        params.append(param)
        grads.append(grad)
    return params, grads, states


def step_in_place(made: Made, layers: int, hidden: int, **how: Any) -> None:
    params, grads, states = made
    weights = nominal_weights(len(params), layers, hidden, F32)
    settings = nominal_settings([p.numel() for p in params], F32, in_place=True)
    student_step_(params, grads, states, weights, settings, **how)


@compiled
@of_networks
@pytest.mark.parametrize(
    ("dtype", "grad_dtype"), [(F32, F16), (F64, F64), (F16, BF16), (F64, F32), (BF16, F64)]
)
@pytest.mark.parametrize(("cells", "moments"), [(F32, F32), (BF16, BF16)])
def test_numbers_of_every_kind_are_read_and_rounded_alike(
    backend: str,
    layers: int,
    hidden: int,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    cells: torch.dtype,
    moments: torch.dtype,
) -> None:
    """The kernels compute in float32, whatever numbers are stored in."""
    plain = tensors_of(SHAPES, layers, hidden)
    made = tensors_of(SHAPES, layers, hidden, dtype, grad_dtype, cells, moments)
    for each in (plain, made):
        step_in_place(each, layers, hidden, lr=0.5, weight_decay=0.01, backend=backend)
    of_steps = [[*each[0], *flat(each[2])] for each in (made, plain)]
    for ours, wide in zip(*of_steps, strict=True):
        assert torch.equal(ours, wide.to(ours.dtype))


@of_each
@of_networks
def test_seeds_round_everything_by_its_own_bits(backend: str, layers: int, hidden: int) -> None:
    """What is narrow holds the wide numbers, rounded by its row's half of the seed's bits."""
    counts = [torch.tensor(float(n)) for n in (0, 7)]
    shapes, rows = [(136,), (3, 5)], layers * hidden
    for warmup_steps in (0, 3):
        how: dict[str, Any] = {"steps": counts, "warmup_steps": warmup_steps, "warmup_lr": 0.1}
        wide = tensors_of(shapes, layers, hidden)
        step_in_place(wide, layers, hidden, lr=0.5, backend=backend, **how)
        how["seeds"] = [11, 12]
        for dtype, cells, moments in ((F32, BF16, F32), (BF16, F32, BF16)):
            made = tensors_of(shapes, layers, hidden, dtype, F32, cells, moments)
            step_in_place(made, layers, hidden, lr=0.5, backend=backend, **how)
            for index, seed in enumerate((11, 12)):
                state, exact = made[2][index], wide[2][index]
                places = range(exact.m.numel())
                bits = random_bits(key_of(seed, counts[index]), range(rows + 2), places)
                stored = [
                    (state.h, exact.h, bits[:rows] >> 16),
                    (state.c, exact.c, bits[:rows] & 0xFFFF),
                    (state.m, exact.m, bits[rows + 1] >> 16),
                    (state.v, exact.v, bits[rows + 1] & 0xFFFF),
                    (made[0][index], wide[0][index], bits[rows] >> 16),
                ]
                for ours, values, chosen in stored:
                    expected = rounded_stochastically(values, chosen.view(values.shape))
                    assert torch.equal(ours, expected if ours.dtype == BF16 else values)


@of_each
def test_narrow_states_are_skipped_and_warm_up(backend: str) -> None:
    def run(**how: Any) -> Made:
        made = tensors_of([(136,), (3, 5)], 1, 8, cells=BF16, moments=BF16)
        step_in_place(made, 1, 8, lr=0.5, backend=backend, **how)
        return made

    counts = [torch.tensor(4.0)] * 2
    before = tensors_of([(136,), (3, 5)], 1, 8, cells=BF16, moments=BF16)
    for how in ({}, {"steps": counts}, {"seeds": [1, 2]}):
        skipped = run(skip=torch.ones(()), **how)
        assert all(map(torch.equal, flat(skipped), flat(before)))
    params, grads, states = run(steps=counts, warmup_steps=5, warmup_lr=0.25, weight_decay=0.1)
    torch.testing.assert_close(params[0], before[0][0] * 0.95 - 0.125 * grads[0])
    assert torch.equal(states[0].h, before[2][0].h)
    assert torch.equal(states[0].c, before[2][0].c)
    expected = 0.9 * before[2][0].m.float() + 0.1 * grads[0]
    torch.testing.assert_close(states[0].m, expected.bfloat16())


@compiled
def test_in_place_same_bits_for_any_number_of_threads(backend: str) -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made = tensors_of([(5000,), (3,), (50, 70)], 1, 8, cells=BF16, moments=BF16)
            step_in_place(made, 1, 8, backend=backend, seeds=[1, 2, 3])
            results.append(flat(made))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


@compiled
@of_networks
@pytest.mark.parametrize("power", [-10, 10])
def test_the_losss_scale_changes_no_random_rounding(
    backend: str, layers: int, hidden: int, power: int
) -> None:
    runs = []
    for scale in (1.0, 2.0**power):
        param, weights = draw(135, seed=5).bfloat16(), nominal_weights(1, layers, hidden, F32)
        state = initial_state(param, weights, BF16, BF16)
        for t in range(1, 5):
            grad = scale * draw(135, seed=t, dtype=F32)
            settings = StepSettings(0.005, 0.9, 0.99, 1e-15, corrections_of([t], F32))
            student_step_([param], [grad], [state], weights, settings, seeds=[3], backend=backend)
        runs.append((param, state.m / scale, state.v / scale**2, state.h, state.c))
    assert all(map(torch.equal, *runs))


@of_each_once
def test_opcheck_of_narrow_moments(backend: str) -> None:
    params, grads, states = tensors_of([(3, 2), (), (0,)], 1, 4, moments=BF16)
    columns = [list(column) for column in zip(*states, strict=True)]
    settings = nominal_settings([6, 1, 0], F32, in_place=True)
    torch.library.opcheck(
        torch.ops.amalgam.student_step_.default,
        (
            *(params, grads, *columns, nominal_weights(3, 1, 4, F32), *settings),
            *(0.5, 0.1, None, [], 0, [], backend),
        ),
    )


# --- The unroll ---


@compiled
@pytest.mark.parametrize(
    ("steps", "size", "layers", "hidden"),
    [(150, 10, 1, 20), (301, 33, 1, 20), (40, 130, 2, 5), (5, 33, 1, 1)],
)
def test_unroll_of_more_steps_than_are_kept(
    backend: str, steps: int, size: int, layers: int, hidden: int
) -> None:
    """Of 20 units 61 are: then each segment takes the biases of its own steps."""
    grad, state, weights, settings = skewed_nominal(size, layers, hidden, F64)
    weights = [w / max(1, w.shape[-1]) ** 0.5 if w.dim() == 2 else w for w in weights]
    weights[2] = draw(steps, 3, 4 * hidden)
    corrections = torch.stack([corrections_of([t, 2 * t, 9 * t]) for t in range(1, steps + 1)])
    settings = settings._replace(corrections=corrections)
    grads, adjoints = grad * draw(steps, size), draw(steps, size, seed=1)
    leaves, now, loss = wanting(*weights), state, torch.zeros((), dtype=F64)
    for t in range(steps):
        of_step = [*leaves[:2], leaves[2][t], *leaves[3:]]
        own = settings._replace(corrections=corrections[t])
        update, now = student_step(grads[t], now, of_step, own, backend="reference")
        loss = loss + (adjoints[t] * update).sum()
    ours = student_unroll_backward(grads, adjoints, state, weights, settings, backend=backend)
    for our, their in zip(ours, torch.autograd.grad(loss, leaves), strict=True):
        assert (our - their).abs().max() <= 1e-11 * their.abs().max()


# --- Errors ---


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=re.escape("sizes must be empty without corrections")):
        student_step(draw(5), make_state(5, layers=1), make_weights(1), StepSettings(sizes=[5]))
    params, grads, states = tensors_of([(3,), (2,)], 1, 4)
    half = [state._replace(v=state.v.half()) for state in states]
    settings = nominal_settings([3, 2], F32, in_place=True)
    with pytest.raises(ValueError, match=re.escape("state.v must be torch.float32")):
        student_step_(params, grads, half, nominal_weights(2, 1, 4, F32), settings)

    _, state, weights, settings = skewed_nominal(5, 1, 4, F64)
    weights[2] = draw(3, 3, 16)
    settings = settings._replace(corrections=corrections_of([1, 2, 3]).expand(2, 3, 3))
    with pytest.raises(ValueError, match=re.escape("corrections must have shape (3, 3, 3)")):
        student_unroll_backward(draw(3, 5), draw(3, 5), state, weights, settings)
