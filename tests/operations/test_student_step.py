"""``student_step`` in plain PyTorch: the truth that the other backends are held to."""

import math
import re
from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate, flat
from places import compiled, compiled_once
from student_cases import (
    SETTINGS,
    SIZES,
    direct,
    draw,
    in_place_arguments,
    make_state,
    make_weights,
    op_arguments,
    skewed_inputs,
    through_op,
)
from torch import Tensor

from amalgam.ops import (
    StepSettings,
    StudentState,
    initial_state,
    student_step,
    update_moments,
)


def by_coordinate(
    grad: Tensor, state: StudentState, weights: list[Tensor], settings: StepSettings
) -> tuple[list[float], list[float], list[float]]:
    """Updates, m and v in scalar Python, straight from the docstring's formulas."""
    layers, hidden = state.h.shape[:2]
    numbers = [w.tolist() for w in weights]
    sigmoid = lambda z: 1 / (1 + math.exp(-z))  # noqa: E731
    updates, ms, vs = [], [], []
    for n in range(len(grad)):
        g = grad[n].item()
        m = settings.beta1 * state.m[n].item() + (1 - settings.beta1) * g
        v = settings.beta2 * state.v[n].item() + (1 - settings.beta2) * g * g
        scale = 1 / math.sqrt(v / (1 - settings.beta2) + settings.eps)
        x = [m / (1 - settings.beta1) * scale, g * scale]
        for layer in range(layers):
            w_ih, w_hh, b = numbers[3 * layer : 3 * layer + 3]
            h, out = state.h[layer, :, n].tolist(), []
            z = [
                sum(a * y for a, y in zip(w_ih[row], x, strict=True))
                + sum(a * y for a, y in zip(w_hh[row], h, strict=True))
                + b[row]
                for row in range(4 * hidden)
            ]
            for unit in range(hidden):
                i, f, a, o = (z[gate * hidden + unit] for gate in range(4))
                c = sigmoid(f) * state.c[layer, unit, n].item() + sigmoid(i) * math.tanh(a)
                out.append(sigmoid(o) * math.tanh(c))
            x = out
        head = sum(a * y for a, y in zip(numbers[-2][0], x, strict=True)) + numbers[-1][0]
        updates.append(settings.alpha * math.tanh(head))
        ms.append(m)
        vs.append(v)
    return updates, ms, vs


@pytest.mark.parametrize(("layers", "hidden"), [(1, 1), (1, 4), (2, 4), (3, 5)])
def test_step_is_its_formula(layers: int, hidden: int) -> None:
    weights = make_weights(layers, hidden)
    state = make_state(7, layers=layers, hidden=hidden)
    grad = draw(7)
    update, new = student_step(grad, state, weights, SETTINGS)
    updates, m, v = by_coordinate(grad, state, weights, SETTINGS)
    for ours, theirs in ((update, updates), (new.m, m), (new.v, v)):
        assert torch.allclose(
            ours, torch.tensor(theirs, dtype=torch.float64), rtol=1e-12, atol=1e-14
        )
    assert new.h.shape == new.c.shape == (layers, hidden, 7)


def test_two_layers_of_torchs_lstm_agree() -> None:
    """torch.nn.LSTM has the same gates in the order input, forget, candidate, output."""
    weights, state, grad = make_weights(), make_state(9), draw(9)
    lstm = torch.nn.LSTM(2, 4, 2).double()
    with torch.no_grad():
        for layer in range(2):
            w_ih, w_hh, bias = weights[3 * layer : 3 * layer + 3]
            getattr(lstm, f"weight_ih_l{layer}").copy_(w_ih)
            getattr(lstm, f"weight_hh_l{layer}").copy_(w_hh)
            getattr(lstm, f"bias_ih_l{layer}").copy_(bias)
            getattr(lstm, f"bias_hh_l{layer}").zero_()
    m, v = update_moments(grad, state.m, state.v, SETTINGS)
    scale = (v / (1 - SETTINGS.beta2) + SETTINGS.eps).rsqrt()
    x = torch.stack((m / (1 - SETTINGS.beta1) * scale, grad * scale), 1)
    with torch.no_grad():
        _, (h, c) = lstm(x[None], (state.h.mT.contiguous(), state.c.mT.contiguous()))
    new = student_step(grad, state, weights, SETTINGS)[1]
    assert torch.allclose(new.h, h.mT, rtol=1e-12, atol=1e-14)
    assert torch.allclose(new.c, c.mT, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", SIZES)
def test_op_and_direct_path_agree(size: int) -> None:
    arguments = draw(size), make_state(size), make_weights()
    before = [t.clone() for t in (arguments[0], *arguments[1], *arguments[2])]
    for ours, theirs in zip(through_op(*arguments), direct(*arguments), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.isfinite().all()
    for now, was in zip((arguments[0], *arguments[1], *arguments[2]), before, strict=True):
        assert torch.equal(now, was)


def test_zero_gradient_from_zero_state_is_the_same_everywhere() -> None:
    grad = torch.zeros(33, dtype=torch.float64)
    update, new = student_step(grad, initial_state(grad, make_weights()), make_weights(), SETTINGS)
    assert torch.equal(update, update[:1].expand(33))
    assert not new.m.any()
    assert not new.v.any()


def test_float32_errs_as_rounding_does() -> None:
    """The longest sum has 2 hidden + 2 terms; errors stay within a few times its rounding."""
    exact = draw(1000), make_state(1000, hidden=20), make_weights(hidden=20)
    weights = [w / 5 for w in exact[2]]
    truth = direct(exact[0], exact[1], weights)
    single = direct(
        exact[0].float(), StudentState(*(t.float() for t in exact[1])), [w.float() for w in weights]
    )
    for ours, theirs in zip(single, truth, strict=True):
        assert ours.dtype == torch.float32
        error = (ours.double() - theirs).abs().max()
        assert 0 < error <= 42 * torch.finfo(torch.float32).eps * theirs.abs().max()


@pytest.mark.parametrize("size", [0, 3])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_step(size: int, requires_grad: bool) -> None:
    torch.library.opcheck(torch.ops.amalgam.student_step, op_arguments(size, requires_grad))


# --- Errors ---


def bad(index: int, tensor: Tensor) -> list[Tensor]:
    weights = make_weights()
    weights[index] = tensor
    return weights


GOOD = make_state(5)


FUNCTIONAL_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"grad": torch.zeros(5, dtype=torch.int64)}, TypeError, "grad must be a floating-point"),
    ({"grad": [0.0] * 5}, TypeError, "grad must be a floating-point tensor, not list"),
    ({"grad": draw(5, 1)}, ValueError, "grad must have shape (N,), not (5, 1)"),
    ({"grad": draw(5).float()}, ValueError, "weights[0] must be torch.float32 on cpu"),
    ({"grad": draw(4)}, ValueError, "state.m must have shape (4,), not (5,)"),
    ({"grad": draw(5).to("meta")}, ValueError, "weights[0] must be torch.float64 on meta"),
    ({"weights": []}, ValueError, "weights must hold three tensors a layer"),
    ({"weights": make_weights()[1:]}, ValueError, "weights must hold three tensors a layer"),
    ({"weights": make_weights(1)}, ValueError, "state.h must begin with (layers, hidden) = (1, 4)"),
    (
        {"weights": make_weights(2, 5)},
        ValueError,
        "state.h must begin with (layers, hidden) = (2, 5)",
    ),
    (
        {"weights": bad(3, draw(16, 2))},
        ValueError,
        "weights[3] must have shape (16, 4), not (16, 2)",
    ),
    ({"weights": bad(2, draw(15))}, ValueError, "weights[2] must have shape (16,), not (15,)"),
    ({"weights": bad(-2, draw(4))}, ValueError, "weights[-2], the head, must have shape"),
    ({"weights": bad(-1, draw())}, ValueError, "weights[7] must have shape (1,), not ()"),
    ({"weights": bad(4, draw(16, 4).float())}, ValueError, "weights[4] must be torch.float64"),
    ({"state": GOOD._replace(m=draw(4))}, ValueError, "state.m must have shape (5,), not (4,)"),
    ({"state": GOOD._replace(v=draw(5, 1))}, ValueError, "state.v must have shape (5,)"),
    ({"state": GOOD._replace(h=draw(2, 4, 6))}, ValueError, "state.h must have shape (2, 4, 5)"),
    ({"state": GOOD._replace(h=draw())}, ValueError, "state.h must begin with (layers, hidden)"),
    ({"state": GOOD._replace(c=draw(2, 4))}, ValueError, "state.c must have shape (2, 4, 5)"),
    ({"state": GOOD._replace(v=draw(5).float())}, ValueError, "state.v must be torch.float64"),
    ({"backend": "referense"}, ValueError, "did you mean 'reference'?"),
]


@pytest.mark.parametrize(("change", "kind", "why"), FUNCTIONAL_ERRORS)
def test_errors_name_the_argument(change: dict[str, Any], kind: type[Exception], why: str) -> None:
    """A gradient of integers was once reported as a fault of the weights."""
    arguments = {"grad": draw(5), "state": GOOD, "weights": make_weights()} | change
    with pytest.raises(kind, match=re.escape(why)):
        student_step(**arguments)


def test_initial_state_checks_the_weights() -> None:
    with pytest.raises(ValueError, match="weights must hold three tensors a layer"):
        initial_state(draw(3), make_weights()[:-1])


# --- The compiled backends, held to the reference by the rule of accuracy.py ---

SHAPES = [(2, 20), (1, 20), (1, 8), (1, 4), (3, 5), (1, 1), (2, 33), (1, 64)]


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("layers", "hidden"), SHAPES)
@pytest.mark.parametrize("size", [0, 1, 31, 64, 65, 1027])  # of tiles of 64
def test_compiled_step(
    backend: str, size: int, layers: int, hidden: int, dtype: torch.dtype
) -> None:
    forward, backward = [], []
    # One coordinate has one error, which takes more draws to average.
    draws = 1 if dtype == torch.float64 else 16 if size > 1 else 150
    for seed in range(draws):
        grad, state, weights = skewed_inputs(size, layers, hidden, dtype, seed)
        upstream = [draw(*t.shape, seed=seed + 9, dtype=dtype) for t in (grad, *state)]
        forward.append((grad, *state, weights, *SETTINGS))
        backward.append((upstream, *forward[-1]))
    assert_as_accurate(torch.ops.amalgam.student_step, forward, backend)
    assert_as_accurate(torch.ops.amalgam.student_step_backward, backward, backend)


@compiled_once
def test_compiled_opcheck(backend: str) -> None:
    *arguments, _ = op_arguments(5, True)
    torch.library.opcheck(torch.ops.amalgam.student_step.default, (*arguments, backend))
    *arguments, _ = in_place_arguments((3, 2), (), (0,))
    torch.library.opcheck(torch.ops.amalgam.student_step_.default, (*arguments, backend))


@compiled
def test_compiled_inputs_may_be_strided(backend: str) -> None:
    grad, state, weights = skewed_inputs(40, 2, 4, torch.float64)
    strided_state = StudentState(*(torch.stack((t, t), -1)[..., 0] for t in state))
    strided_weights = [torch.stack((w, w), -1)[..., 1] for w in weights]
    assert not strided_state.h.is_contiguous()
    spread = torch.stack((grad, grad), -1)[..., 0]
    ours = student_step(spread, strided_state, strided_weights, backend=backend)
    expected = student_step(grad, state, weights, backend=backend)
    assert all(map(torch.equal, flat(ours), flat(expected)))


@compiled
def test_compiled_steps_pass_nan_on(backend: str) -> None:
    grad, state, weights = skewed_inputs(70, 2, 4, torch.float32)
    grad[3], grad[5], state.c[0, 0, 66] = math.nan, math.inf, math.nan
    ours = flat(student_step(grad, state, weights, backend=backend))
    plain = flat(student_step(grad, state, weights, backend="reference"))
    for one, other in zip(ours, plain, strict=True):
        assert torch.equal(one.isnan(), other.isnan())


@compiled
def test_compiled_same_bits_for_any_number_of_threads(backend: str) -> None:
    grad, state, weights = skewed_inputs(3001, 2, 20, torch.float32)
    upstream = [draw(*t.shape, seed=9, dtype=torch.float32) for t in (grad, *state)]
    arguments = (grad, *state, weights, *SETTINGS, backend)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            forward = torch.ops.amalgam.student_step(*arguments)
            backward = torch.ops.amalgam.student_step_backward(upstream, *arguments)
            results.append(flat((forward, backward)))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))
