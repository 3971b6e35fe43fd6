"""The nominal form of ``student_step``, in plain PyTorch and by the compiled CPU kernels."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate, flat
from nominal_cases import (
    ALPHA,
    BETA1,
    BETA2,
    EPS,
    corrections_of,
    cut,
    nominal_settings,
    nominal_weights,
    skewed_nominal,
)
from places import compiled, compiled_once, of_each, of_each_once
from student_cases import copied, draw, make_state, wanting
from torch import Tensor

from amalgam.operations.rounding import key_of, random_bits, rounded_stochastically
from amalgam.operations.student_unroll_backward import of_step
from amalgam.ops import (
    StepSettings,
    StudentState,
    initial_state,
    student_step,
    student_step_,
    student_unroll_backward,
)

FORWARD, BACKWARD = torch.ops.amalgam.student_step, torch.ops.amalgam.student_step_backward
F32, F64, BF16, INT8 = torch.float32, torch.float64, torch.bfloat16, torch.int8
# How the exact runs keep their states.
STORED: dict[str, dict[str, torch.dtype]] = {
    "float32": {},
    "bfloat16": {"cells_dtype": BF16, "moments_dtype": BF16},
    "codes": {"cells_dtype": INT8, "moments_dtype": BF16},
}
# Those with kernels of their own, and others.
NETWORKS = [(1, 4), (1, 8), (1, 16), (1, 20), (2, 5), (1, 1)]


def upstream_of(grad: Tensor, state: StudentState, seed: int = 9) -> list[Tensor]:
    return [draw(*t.shape, seed=seed, dtype=grad.dtype) for t in (grad, *state)]


# --- The reference ---


def by_coordinate(
    grad: Tensor, state: StudentState, weights: list[Tensor], settings: StepSettings
) -> list[float]:
    """Updates in scalar Python, straight from the docstring's formulas; one layer."""
    assert settings.corrections is not None
    tensors = [t for t, size in enumerate(settings.sizes) for _ in range(size)]
    w_ih, w_hh, bias, head, head_bias = (w.tolist() for w in weights)
    hidden = len(head[0])
    sigmoid = lambda z: 1 / (1 + math.exp(-z))  # noqa: E731
    updates = []
    for n, tensor in enumerate(tensors):
        c1, c2, pace = settings.corrections[tensor].tolist()
        g = grad[n].item()
        m = settings.beta1 * state.m[n].item() + (1 - settings.beta1) * g
        v = settings.beta2 * state.v[n].item() + (1 - settings.beta2) * g * g
        r = 1 / (math.sqrt(c2 * v) + settings.eps) if v else 0.0
        a, b = c1 * m * r, g * r
        x, h = [abs(a), math.tanh(a * b), math.tanh(abs(b))], state.h[0, :, n].tolist()
        z = [
            sum(p * q for p, q in zip(w_ih[row], x, strict=True))
            + sum(p * q for p, q in zip(w_hh[row], h, strict=True))
            + bias[tensor][row]
            for row in range(4 * hidden)
        ]
        out = []
        for unit in range(hidden):
            i, f, candidate, o = (z[gate * hidden + unit] for gate in range(4))
            c = sigmoid(f) * state.c[0, unit, n].item() + sigmoid(i) * math.tanh(candidate)
            out.append(sigmoid(o) * math.tanh(c))
        o1, o2 = (
            sum(p * q for p, q in zip(head[k], out, strict=True)) + head_bias[k] for k in range(2)
        )
        factor = settings.alpha * pace * math.exp(min(4.0, max(-7.0, o1)))
        updates.append(factor * (a + o2 * b / (1 + abs(b) / 3)))
    return updates


def test_step_is_its_formula() -> None:
    grad, state, weights, settings = skewed_nominal(23, 1, 4, F64)
    update, new = student_step(grad, state, weights, settings, backend="reference")
    expected = torch.tensor(by_coordinate(grad, state, weights, settings), dtype=F64)
    assert torch.allclose(update, expected, rtol=1e-12, atol=1e-15)
    assert torch.allclose(new.m, BETA1 * state.m + (1 - BETA1) * grad)
    assert torch.allclose(new.v, BETA2 * state.v + (1 - BETA2) * grad.square())


def bounded(size: int, at: float) -> tuple[Tensor, StudentState, list[Tensor], StepSettings]:
    """Inputs whose first output is this, beyond or between the clamp's bounds."""
    grad, state, weights, settings = skewed_nominal(size, 1, 4, F64)
    weights[-2] = torch.stack((0 * weights[-2][0], weights[-2][1]))
    weights[-1] = torch.tensor([at, weights[-1][1].item()], dtype=F64)
    return grad, state, weights, settings


@of_each
@pytest.mark.parametrize("at", [-50.0, -7.5, 0.0, 4.5, 50.0, math.inf])
def test_the_factor_is_clamped(backend: str, at: float) -> None:
    grad, state, weights, settings = bounded(9, at)
    update, _ = student_step(grad, state, weights, settings, backend=backend)
    clamped = [*weights[:-1], torch.stack((weights[-1][0].clamp(-7, 4), weights[-1][1]))]
    expected, _ = student_step(grad, state, clamped, settings, backend=backend)
    assert torch.equal(update, expected)
    arguments = ([torch.ones_like(grad), *map(torch.zeros_like, state)], grad, *state)
    *_, d_weights = BACKWARD(*arguments, weights, *settings, backend)
    inside = -7 <= at <= 4
    assert bool(d_weights[-1][0] != 0) == inside


@pytest.mark.parametrize("size", [1, 9, 40])
@pytest.mark.parametrize(("layers", "hidden"), [(1, 4), (2, 3)])
def test_hand_written_backward_is_autograds(size: int, layers: int, hidden: int) -> None:
    grad, state, weights, settings = skewed_nominal(size, layers, hidden, F64)
    leaves = wanting(grad, *state, *weights)

    def through(step: Any) -> list[Tensor]:
        update, *new = flat(step(leaves[0], StudentState(*leaves[1:5]), leaves[5:]))
        outs = [update, *new]
        return list(torch.autograd.grad(outs, leaves, upstream_of(grad, state)))

    def direct(grad: Tensor, state: StudentState, weights: list[Tensor]) -> Any:
        return student_step(grad, state, weights, settings, backend="reference")

    def by_operator(grad: Tensor, state: StudentState, weights: list[Tensor]) -> Any:
        return FORWARD(grad, *state, weights, *settings, "reference")

    for ours, theirs in zip(through(by_operator), through(direct), strict=True):
        assert theirs.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_one_bias_for_all_tensors_is_any_number_of_equal_ones() -> None:
    grad, state, weights, _ = skewed_nominal(12, 1, 4, F64)
    alike = [*weights[:2], weights[2][:1], *weights[3:]]
    one = StepSettings(ALPHA, BETA1, BETA2, EPS, corrections_of([4]), [12])
    three = one._replace(corrections=corrections_of([4, 4, 4]), sizes=[5, 0, 7])
    repeated = [*alike[:2], alike[2].expand(3, -1), *alike[3:]]
    ours = student_step(grad, state, repeated, three, backend="reference")
    theirs = student_step(grad, state, alike, one, backend="reference")
    for our, their in zip(flat(ours), flat(theirs), strict=True):
        assert torch.allclose(our, their, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(("settings", "why"), [
    ({"corrections": corrections_of([1, 2])}, "weights[2] must have shape (2, 16), not (3, 16)"),
    ({"sizes": [5, 0]}, "sizes must be those of 3 tensors, 0 or more and 9 in all, not [5, 0]"),
    ({"sizes": [5, 0, 5]}, "sizes must be those of 3 tensors"),
    ({"sizes": [-1, 0, 10]}, "sizes must be those of 3 tensors"),
    ({"corrections": corrections_of([1, 2, 3]).float()}, "corrections must be torch.float64"),
    ({"corrections": corrections_of([1, 2, 3])[:, :1]}, "corrections must have shape (3, 3)"),
    ({"corrections": None}, "weights[0] must have shape (16, 2)"),
])  # fmt: skip
def test_errors_name_the_argument(settings: dict[str, Any], why: str) -> None:
    grad, state, weights, given = skewed_nominal(9, 1, 4, F64)
    with pytest.raises(ValueError, match=re.escape(why)):
        student_step(grad, state, weights, given._replace(**settings))


def test_a_step_in_place_takes_no_sizes_of_other_tensors() -> None:
    params = [draw(3), draw(2)]
    states = [make_state(*p.shape, layers=1) for p in params]
    with pytest.raises(ValueError, match=re.escape("corrections must be those of 2 tensors")):
        student_step_(params, params, states, nominal_weights(3), nominal_settings([3, 2, 0], F64))


# --- Every backend, by the rule of accuracy.py ---


@compiled
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(("layers", "hidden"), NETWORKS)
@pytest.mark.parametrize("size", [0, 1, 31, 65, 200])
def test_compiled_step(
    backend: str, size: int, layers: int, hidden: int, dtype: torch.dtype
) -> None:
    forward, backward = [], []
    # One coordinate has one error, and of many a few have all gradients: draws average.
    draws = 1 if dtype == F64 else 20 if size > 1 else 60
    for seed in range(draws):
        grad, state, weights, settings = skewed_nominal(size, layers, hidden, dtype, seed)
        forward.append((grad, *state, weights, *settings))
        backward.append((upstream_of(grad, state, seed + 9), *forward[-1]))
    assert_as_accurate(FORWARD, forward, backend)
    assert_as_accurate(BACKWARD, backward, backend)


@compiled
@pytest.mark.parametrize("hidden", [4, 8, 16])
def test_compiled_step_in_place_errs_as_little(backend: str, hidden: int) -> None:
    """The kernels that train models, held to the rule like the functional ones: p becomes -u."""

    def step(*arguments: Any) -> tuple[Tensor, ...]:
        grad, m, v, h, c, weights, *constants, name = arguments
        param, state = torch.zeros_like(grad), copied(StudentState(m, v, h, c))
        settings = StepSettings(*constants)
        student_step_([param], [grad], [state], weights, settings, backend=name)
        return param, *state

    draws = []
    for seed in range(12):
        grad, state, weights, settings = skewed_nominal(1027, 1, hidden, F32, seed)
        assert settings.corrections is not None
        weights[2] = weights[2][:1]
        settings = settings._replace(corrections=settings.corrections[:1], sizes=[])
        draws.append((grad, *state, weights, *settings))
    assert_as_accurate(step, draws, backend)


@compiled_once
def test_compiled_gradcheck(backend: str) -> None:
    grad, state, weights, settings = skewed_nominal(5, 1, 3, F64)
    # At zero gradients, and where a or b change their signs, there is no derivative.
    grad, state = draw(5) + 3, state._replace(m=draw(5).abs() + 1, v=draw(5).square() + 1)
    inputs = wanting(grad, *state, *weights)

    def step(*inputs: Tensor) -> tuple[Tensor, ...]:
        return FORWARD(*inputs[:5], list(inputs[5:]), *settings, backend)

    assert torch.autograd.gradcheck(step, inputs)


@of_each_once
def test_opcheck(backend: str) -> None:
    grad, state, weights, settings = skewed_nominal(5, 1, 2, F64)
    tensors, leaves = wanting(grad, *state), wanting(*weights)
    torch.library.opcheck(FORWARD, (*tensors, leaves, *settings, backend))
    arguments = (upstream_of(grad, state), grad, *state, weights, *settings, backend)
    torch.library.opcheck(BACKWARD, arguments)
    params, states = [draw(3, 2), draw()], [make_state(3, 2, layers=1), make_state(layers=1)]
    columns = [list(column) for column in zip(*states, strict=True)]
    in_place = nominal_settings([6, 1], in_place=True)
    torch.library.opcheck(
        torch.ops.amalgam.student_step_,
        (
            *(params, [draw(3, 2), draw()], *columns, nominal_weights(2), *in_place),
            *(0.5, 0.1, None, [], 0, [], backend),
        ),
    )
    steps = unroll_arguments(3, 5, 2, F64)
    torch.library.opcheck(torch.ops.amalgam.student_unroll_backward, (*steps, backend))


# --- In place ---


@of_each
@pytest.mark.parametrize(("layers", "hidden"), [(1, 4), (1, 8), (1, 16), (2, 5)])
@pytest.mark.parametrize(
    ("dtype", "grad_dtype", "moments", "cells"),
    [
        (F32, F32, F32, F32),
        (F32, F32, F32, BF16),
        (F32, BF16, BF16, BF16),
        (BF16, BF16, F32, F32),
        (BF16, F32, BF16, F32),
        (torch.float16, torch.float16, F32, BF16),
        (F64, F64, F64, F64),
    ],
)
def test_in_place_is_the_functional_form(
    backend: str,
    layers: int,
    hidden: int,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    moments: torch.dtype,
    cells: torch.dtype,
) -> None:
    """Tensors of every rank, empty and strided ones too, each with its own bias and corrections."""
    computed = F64 if dtype == F64 else F32
    shapes = [(0,), (7, 9), (), (0, 3), (130,), (2, 3, 4, 2), (1, 2, 1, 2, 3), (8, 16)]
    weights = nominal_weights(len(shapes), layers, hidden, computed)
    settings = nominal_settings([0] * len(shapes), computed, in_place=True)
    assert settings.corrections is not None
    params = [draw(*shape, seed=1).to(dtype) for shape in shapes]
    params[5] = params[5].to(memory_format=torch.channels_last)
    grads = [draw(*shape, seed=2).to(grad_dtype) for shape in shapes]
    states = []
    for shape in shapes:
        state = make_state(*shape, layers=layers, hidden=hidden, dtype=computed)
        stored = (moments, moments, cells, cells)
        states.append(StudentState(*(t.to(d) for t, d in zip(state, stored, strict=True))))
    before = [copied(state) for state in states]
    old = [param.clone() for param in params]
    student_step_(
        params, grads, states, weights, settings, lr=0.5, weight_decay=0.1, backend=backend
    )
    for tensor, (param, grad, start, was, state) in enumerate(
        zip(params, grads, old, before, states, strict=True)
    ):
        own = [*weights[:2], weights[2][tensor : tensor + 1], *weights[3:]]
        corrections = settings.corrections[tensor : tensor + 1]
        alone = settings._replace(corrections=corrections, sizes=[param.numel()])
        vector = StudentState(
            *(t.reshape(*t.shape[: t.dim() - param.dim()], -1).to(computed) for t in was)
        )
        update, new = student_step(
            grad.reshape(-1).to(computed), vector, own, alone, backend="reference"
        )
        moved = start.reshape(-1).to(computed) * (1 - 0.5 * 0.1) - 0.5 * update
        rel = 1e-12 if computed == F64 else 1e-5
        expected = (moved, *new)
        for ours, theirs in zip((param, *state), expected, strict=True):
            unit = max(rel, torch.finfo(ours.dtype).eps)
            torch.testing.assert_close(
                ours.reshape(theirs.shape).to(computed), theirs, rtol=unit, atol=unit
            )


@of_each
@pytest.mark.parametrize("hidden", [4, 8, 20])
def test_bfloat16_is_rounded_by_the_bits_of_seeds(backend: str, hidden: int) -> None:
    """What is stored are the float32 numbers, rounded by bits that all backends agree on."""
    sizes, seeds = [133, 40], [11, 12]
    counts = [torch.tensor(0.0), torch.tensor(7.0)]
    weights = nominal_weights(2, 1, hidden, F32)
    settings = nominal_settings(sizes, F32, in_place=True)

    def run(dtype: torch.dtype, stored: torch.dtype) -> tuple[list[Tensor], list[StudentState]]:
        params = [draw(size, seed=1).bfloat16().to(dtype) for size in sizes]
        grads = [draw(size, seed=2).float() for size in sizes]
        states = [
            StudentState(
                *(t.bfloat16().to(stored) for t in make_state(size, layers=1, hidden=hidden))
            )
            for size in sizes
        ]
        how = {"seeds": seeds} if BF16 in (dtype, stored) else {}
        student_step_(
            params, grads, states, weights, settings, steps=counts, backend=backend, **how
        )
        return params, states

    wide, wide_states = run(F32, F32)
    narrow, states = run(F32, BF16)
    assert all(map(torch.equal, narrow, wide))
    halves, _ = run(BF16, F32)
    for index, (seed, count, size) in enumerate(zip(seeds, counts, sizes, strict=True)):
        bits = random_bits(key_of(seed, count), range(hidden + 2), range(size))
        upper, lower = bits >> 16, bits & 0xFFFF
        for name, chosen in (
            ("h", upper[:hidden].view(1, hidden, size)),
            ("c", lower[:hidden].view(1, hidden, size)),
            ("m", upper[hidden + 1]),
            ("v", lower[hidden + 1]),
        ):
            expected = rounded_stochastically(getattr(wide_states[index], name), chosen)
            assert torch.equal(getattr(states[index], name), expected), name
        assert torch.equal(halves[index], rounded_stochastically(wide[index], upper[hidden]))


@of_each
@pytest.mark.parametrize("hidden", [4, 5])
def test_devices_control_a_step(backend: str, hidden: int) -> None:
    weights, settings = nominal_weights(2, 1, hidden, F32), nominal_settings([9, 70], F32, True)

    def run(**how: Any) -> list[Tensor]:
        params = [draw(size, seed=1).float() for size in (9, 70)]
        states = [make_state(size, layers=1, hidden=hidden, dtype=F32) for size in (9, 70)]
        grads = [draw(size, seed=2).float() for size in (9, 70)]
        student_step_(params, grads, states, weights, settings, lr=0.5, backend=backend, **how)
        return flat((params, states))

    plain = run(weight_decay=0.1)
    counts = [torch.tensor(4.0)] * 2
    decay = torch.tensor(0.1, dtype=F64)
    assert all(map(torch.equal, plain, run(weight_decay=decay, steps=counts, warmup_steps=4)))
    skipped = run(weight_decay=0.1, skip=torch.tensor(1.0))
    start = [draw(size, seed=1).float() for size in (9, 70)]
    assert all(map(torch.equal, skipped[:2], start))
    warm = run(steps=counts, warmup_steps=5, warmup_lr=0.25)
    for ours, param, size in zip(warm[:2], start, (9, 70), strict=True):
        expected = param - 0.5 * 0.25 * draw(size, seed=2).float()
        torch.testing.assert_close(ours, expected)


# --- What is exact ---

EXACT = [(1, 4), (1, 8), (1, 16), (1, 20)]


def runs_of(
    backend: str,
    layers: int,
    hidden: int,
    grads: list[list[Tensor]],
    params: list[Tensor],
    steps: list[int] | None = None,
    **how: Any,
) -> tuple[list[Tensor], list[StudentState]]:
    """Parameters and states after steps in place, from zero states, one bias for all tensors."""
    base = nominal_weights(1, layers, hidden, F32)
    weights = [*base[:2], base[2].expand(len(params), -1).contiguous(), *base[3:]]
    params = [param.clone() for param in params]
    states = [initial_state(param, weights, **how) for param in params]
    for index, of_step_ in enumerate(grads):
        settings = StepSettings(
            *(ALPHA, BETA1, BETA2, EPS, corrections_of([index + 1] * len(params), F32), [])
        )
        seeds = list(range(len(params))) if how else None
        student_step_(params, of_step_, states, weights, settings, backend=backend, seeds=seeds)
    return params, states


def gradients(size: int, steps: int = 5) -> list[list[Tensor]]:
    decades = 10 ** (2 * torch.linspace(-1, 0, size))
    return [[(draw(size, seed=20 + step).float() * decades)] for step in range(steps)]


@of_each
@pytest.mark.parametrize(("layers", "hidden"), EXACT)
@pytest.mark.parametrize("how", STORED.values(), ids=STORED)
def test_no_gradient_no_update(backend: str, layers: int, hidden: int, how: dict[str, Any]) -> None:
    param = draw(75, seed=3).float()
    param[:2] = torch.tensor([0.0, -0.0])
    zeros = [[torch.zeros(75)] for _ in range(5)]
    some = torch.arange(75) % 5 == 4
    for index, (grad,) in enumerate(gradients(75)):
        zeros[index][0][some] = grad[some]
    (after,), (state,) = runs_of(backend, layers, hidden, zeros, [param], **how)
    same = after.view(torch.int32) == param.view(torch.int32)
    assert torch.equal(same, ~some)
    assert not state.m[~some].any()
    assert not state.v[~some].any()


@of_each
@pytest.mark.parametrize(("layers", "hidden"), EXACT)
@pytest.mark.parametrize("how", STORED.values(), ids=STORED)
def test_mirrored_gradients_give_the_mirrored_run(
    backend: str, layers: int, hidden: int, how: dict[str, Any]
) -> None:
    param, grads = draw(75, seed=3).float(), gradients(75)
    mirrored = [[-grad] for (grad,) in grads]
    (ours,), (state,) = runs_of(backend, layers, hidden, grads, [param], **how)
    (theirs,), (other,) = runs_of(backend, layers, hidden, mirrored, [-param], **how)
    assert not torch.equal(ours, param)
    assert torch.equal(ours, -theirs)
    assert torch.equal(state.m, -other.m)
    for name in ("v", "h", "c"):
        assert torch.equal(getattr(state, name), getattr(other, name))


@of_each
@pytest.mark.parametrize(("layers", "hidden"), EXACT)
@pytest.mark.parametrize("power", [-10, 10])
def test_the_losss_scale_changes_nothing(
    backend: str, layers: int, hidden: int, power: int
) -> None:
    param = draw(75, seed=3).float()
    # Where eps lies below the last bit of the root.
    grads = [[grad.sign() * grad.abs().clamp_min(1e-3)] for (grad,) in gradients(75)]
    scaled = [[grad * 2.0**power] for (grad,) in grads]
    (ours,), (state,) = runs_of(backend, layers, hidden, grads, [param])
    (theirs,), (other,) = runs_of(backend, layers, hidden, scaled, [param])
    assert torch.equal(ours, theirs)
    assert torch.equal(state.m * 2.0**power, other.m)
    assert torch.equal(state.v * 4.0**power, other.v)
    assert torch.equal(state.h, other.h)


@of_each
@pytest.mark.parametrize(("layers", "hidden"), EXACT)
def test_parts_step_as_the_whole(backend: str, layers: int, hidden: int) -> None:
    """The reference's matrix products may be blocked by their sizes, in the last bit."""
    sizes = [1, 0, 33, 41, 75, 130]
    param, grads = draw(280, seed=3).float(), gradients(280)
    parts = [[part.clone() for part in grad.split(sizes)] for (grad,) in grads]
    (whole,), (state,) = runs_of(backend, layers, hidden, grads, [param])
    pieces, states = runs_of(backend, layers, hidden, parts, list(param.split(sizes)))
    together = torch.cat([s.h for s in states], -1)
    if backend == "reference":
        torch.testing.assert_close(torch.cat(pieces), whole)
        torch.testing.assert_close(together, state.h)
    else:
        assert torch.equal(torch.cat(pieces), whole)
        assert torch.equal(together, state.h)


@of_each
@pytest.mark.parametrize(("layers", "hidden"), EXACT)
def test_with_a_head_of_zeros_it_is_adam(backend: str, layers: int, hidden: int) -> None:
    weights = nominal_weights(1, layers, hidden, F32)
    weights[-2:] = [torch.zeros_like(w) for w in weights[-2:]]
    param = torch.nn.Parameter(draw(75, seed=3).float())
    ours, state = param.detach().clone(), initial_state(param, weights)
    adam = torch.optim.Adam([param], lr=ALPHA, betas=(BETA1, BETA2), eps=EPS)
    for index, (grad,) in enumerate(gradients(75)):
        settings = StepSettings(ALPHA, BETA1, BETA2, EPS, corrections_of([index + 1], F32), [])
        student_step_([ours], [grad], [state], weights, settings, backend=backend)
        param.grad = grad
        assert settings.corrections is not None
        adam.param_groups[0]["lr"] = ALPHA * settings.corrections[0, 2].item()
        adam.step()
    torch.testing.assert_close(ours, param.detach(), rtol=1e-6, atol=1e-7)


# --- NaN, threads, memory layout ---


@of_each
@pytest.mark.parametrize("hidden", [4, 8, 20])
def test_nan_passes_on(backend: str, hidden: int) -> None:
    grad, state, weights, settings = skewed_nominal(70, 1, hidden, F32)
    grad[3], grad[5], state.c[0, 0, 66], state.v[10] = math.nan, math.inf, math.nan, math.nan
    ours = flat(student_step(grad, state, weights, settings, backend=backend))
    plain = flat(student_step(grad, state, weights, settings, backend="reference"))
    for one, other in zip(ours, plain, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
    assert settings.corrections is not None
    settings = settings._replace(corrections=settings.corrections[:1], sizes=[])
    param, now = torch.zeros(70), copied(state)
    weights[2] = weights[2][:1]
    student_step_([param], [grad], [now], weights, settings, backend=backend)
    assert torch.equal(param.isnan(), plain[0].isnan())
    assert torch.equal(now.h.isnan(), plain[3].isnan())


@compiled
def test_same_bits_for_any_number_of_threads(backend: str) -> None:
    grad, state, weights, settings = skewed_nominal(3001, 1, 8, F32)
    arguments = (grad, *state, weights, *settings, backend)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            forward = FORWARD(*arguments)
            backward = BACKWARD(upstream_of(grad, state), *arguments)
            unrolled = torch.ops.amalgam.student_unroll_backward(
                *unroll_arguments(4, 700, 8, F32), backend
            )
            results.append(flat((forward, backward, unrolled)))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


@compiled
def test_inputs_may_be_strided(backend: str) -> None:
    grad, state, weights, settings = skewed_nominal(40, 1, 4, F64)
    assert settings.corrections is not None
    apart = lambda t: torch.stack((t, t), -1)[..., 0]  # noqa: E731
    ours = student_step(
        apart(grad),
        StudentState(*map(apart, state)),
        list(map(apart, weights)),
        settings._replace(corrections=apart(settings.corrections)),
        backend=backend,
    )
    expected = student_step(grad, state, weights, settings, backend=backend)
    assert all(map(torch.equal, flat(ours), flat(expected)))


# --- The unroll ---


def unroll_arguments(
    steps: int, size: int, hidden: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Any, ...]:
    """Each step has biases and corrections of its own."""
    grad, state, weights, settings = skewed_nominal(size, 1, hidden, F64, seed)
    weights = [w / max(1, w.shape[-1]) ** 0.5 if w.dim() == 2 else w for w in weights]
    weights[2] = weights[2] + 0.1 * draw(steps, *weights[2].shape, seed=seed)
    corrections = torch.stack([corrections_of([1 + t, 2 + t, 5 + t]) for t in range(steps)])
    grads = grad * draw(steps, size, seed=seed + 1)
    grads[::2, ::7] = 0
    given = StepSettings(*settings.constants, corrections.to(dtype), cut(size))
    return (
        grads.to(dtype),
        draw(steps, size, seed=seed + 2).to(dtype),
        *(t.to(dtype) for t in state),
        [w.to(dtype) for w in weights],
        *given,
    )


@of_each
@pytest.mark.parametrize("size", [0, 1, 50, 200])
@pytest.mark.parametrize("steps", [0, 1, 6])
def test_unroll_is_autograds(backend: str, steps: int, size: int) -> None:
    grads, adjoints, m, v, h, c, weights, *rest = unroll_arguments(max(steps, 1), size, 4, F64)
    grads, adjoints = grads[:steps], adjoints[:steps]
    settings = StepSettings(*rest)
    assert settings.corrections is not None
    settings = settings._replace(corrections=settings.corrections[:steps])
    leaves = wanting(*weights[:2], weights[2][:steps], *weights[3:])
    state, total = StudentState(m, v, h, c), torch.zeros((), dtype=F64)
    for t in range(steps):
        own = of_step(leaves, settings, t)
        update, state = student_step(grads[t], state, *own, backend="reference")
        total = total + (adjoints[t] * update).sum()
    expected = [torch.zeros_like(leaf) for leaf in leaves]
    if steps:
        expected = list(
            torch.autograd.grad(total, leaves, materialize_grads=True, allow_unused=True)
        )
    given = [leaf.detach() for leaf in leaves]
    first = StudentState(m, v, h, c)
    ours = student_unroll_backward(grads, adjoints, first, given, settings, backend=backend)
    for our, their in zip(ours, expected, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-9, atol=1e-11)


@compiled
@pytest.mark.parametrize("hidden", [4, 8, 20])
def test_compiled_unroll(backend: str, hidden: int) -> None:
    draws = [unroll_arguments(7, 150, hidden, F32, seed) for seed in range(12)]
    assert_as_accurate(torch.ops.amalgam.student_unroll_backward, draws, backend)
