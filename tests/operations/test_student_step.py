"""``student_step`` in plain PyTorch: the truth that the other backends are held to."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from machine_code import amd_assembly, assert_within, compile_kernel, costs_of, resource_usage
from torch import Tensor

from amalgam.backends import triton
from amalgam.operations import registry

# The package's student_step function hides the module of that name.
from amalgam.operations import student_step as module
from amalgam.operations.kept import Kept
from amalgam.operations.rounding import key_of, random_bits, rounded_stochastically
from amalgam.operations.student_step import backward_into, step_into
from amalgam.ops import (
    StepSettings,
    StudentState,
    initial_state,
    student_step,
    student_step_,
    update_moments,
)
from amalgam.policies import Student, StudentConfig

SETTINGS = StepSettings(0.1, 0.9, 0.99, 1e-6)
SIZES = [0, 1, 31, 33, 1000]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def make_weights(
    layers: int = 2, hidden: int = 4, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    weights = []
    for layer in range(layers):
        inputs = hidden if layer else 2
        weights += [
            draw(4 * hidden, inputs, seed=layer, dtype=dtype) / 2,
            draw(4 * hidden, hidden, seed=layer, dtype=dtype) / 2,
            draw(4 * hidden, seed=layer, dtype=dtype),
        ]
    return [*weights, draw(1, hidden, dtype=dtype), draw(1, dtype=dtype)]


def make_state(
    *shape: int, layers: int = 2, hidden: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64
) -> StudentState:
    return StudentState(
        draw(*shape, seed=seed + 1, dtype=dtype),
        draw(*shape, seed=seed + 2, dtype=dtype).square(),
        draw(layers, hidden, *shape, seed=seed + 3, dtype=dtype).tanh(),
        draw(layers, hidden, *shape, seed=seed + 4, dtype=dtype),
    )


def wanting(*tensors: Tensor) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


def through_op(grad: Tensor, state: StudentState, weights: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.ops.amalgam.student_step(grad, *state, weights, *SETTINGS, "reference")


def direct(grad: Tensor, state: StudentState, weights: list[Tensor]) -> tuple[Tensor, ...]:
    update, new = student_step(grad, state, weights, SETTINGS, backend="reference")
    return update, *new


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


# --- Derivatives ---


@pytest.mark.parametrize("path", [through_op, direct])
@pytest.mark.parametrize(("layers", "size"), [(1, 3), (2, 2), (2, 1)])
def test_gradcheck(path: Any, layers: int, size: int) -> None:
    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        return path(tensors[0], StudentState(*tensors[1:5]), list(tensors[5:]))

    state = make_state(size, layers=layers, hidden=3)
    inputs = wanting(draw(size), *state, *make_weights(layers, 3))
    assert torch.autograd.gradcheck(flat, inputs)


def test_reference_is_differentiable_twice() -> None:
    def flat(*tensors: Tensor) -> Tensor:
        update, *new = direct(tensors[0], StudentState(*tensors[1:5]), list(tensors[5:]))
        return update.sum() + sum((t.square().sum() for t in new), torch.zeros(()))

    inputs = wanting(draw(2), *make_state(2, layers=1, hidden=2), *make_weights(1, 2))
    assert torch.autograd.gradgradcheck(flat, inputs)


def reference_gradients(
    grads_out: list[Tensor], grad: Tensor, state: StudentState, weights: list[Tensor]
) -> list[Tensor]:
    inputs = wanting(grad, *state, *weights)
    outputs = direct(inputs[0], StudentState(*inputs[1:5]), inputs[5:])
    return list(torch.autograd.grad(outputs, inputs, grads_out))


def hand_gradients(
    grads_out: list[Tensor], grad: Tensor, state: StudentState, weights: list[Tensor]
) -> list[Tensor]:
    *found, in_weights = torch.ops.amalgam.student_step_backward(
        grads_out, grad, *state, weights, *SETTINGS, "reference"
    )
    return [*found, *in_weights]


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("size", SIZES)
def test_hand_written_backward_is_autograds(size: int, layers: int) -> None:
    weights, grad = make_weights(layers), draw(size)
    state = make_state(size, layers=layers)
    grads_out = [draw(*t.shape, seed=7) for t in (grad, *state)]
    theirs = reference_gradients(grads_out, grad, state, weights)
    hand = hand_gradients(grads_out, grad, state, weights)
    inputs = wanting(grad, *state, *weights)
    outputs = through_op(inputs[0], StudentState(*inputs[1:5]), inputs[5:])
    automatic = torch.autograd.grad(outputs, inputs, grads_out)
    for ours, expected, wired in zip(hand, theirs, automatic, strict=True):
        scale = expected.abs().max().item() if expected.numel() else 0
        assert ours.shape == expected.shape
        assert not ours.numel() or (ours - expected).abs().max() <= 1e-12 * scale
        assert torch.equal(ours, wired)


def test_backward_over_eight_decades_and_zeros() -> None:
    """Where g and v are zero the features' slope is 1 / sqrt(eps): finite, and equal to autograd's.

    Each coordinate is held to its own magnitude, as the gradients differ by as many decades.
    """
    grad = torch.logspace(-4, 4, 41, dtype=torch.float64)
    grad[::4] *= -1
    grad[::5] = 0
    state = initial_state(grad, make_weights())
    state = state._replace(m=0.3 * grad, v=grad.square() / 2, h=make_state(41).h)
    grads_out = [draw(*t.shape, seed=7) for t in (grad, *state)]
    update, new = student_step(grad, state, make_weights(), SETTINGS)
    assert all(t.isfinite().all() for t in (update, *new))
    assert (update.abs() <= SETTINGS.alpha).all()
    theirs = reference_gradients(grads_out, grad, state, make_weights())
    for ours, expected in zip(
        hand_gradients(grads_out, grad, state, make_weights()), theirs, strict=True
    ):
        assert expected.isfinite().all()
        scale = expected.abs() if expected.shape == grad.shape else expected.abs().max()
        assert ((ours - expected).abs() <= 1e-11 * scale).all()


def test_zero_gradient_from_zero_state_is_the_same_everywhere() -> None:
    grad = torch.zeros(33, dtype=torch.float64)
    update, new = student_step(grad, initial_state(grad, make_weights()), make_weights(), SETTINGS)
    assert torch.equal(update, update[:1].expand(33))
    assert not new.m.any()
    assert not new.v.any()


def test_unused_outputs_and_inputs_without_gradient() -> None:
    weights, state, grad = make_weights(), make_state(5), draw(5)
    (weight,) = wanting(weights[1])
    changed = [weights[0], weight, *weights[2:]]
    (hand,) = torch.autograd.grad(through_op(grad, state, changed)[0].sum(), weight)
    (theirs,) = torch.autograd.grad(direct(grad, state, changed)[0].sum(), weight)
    assert torch.allclose(hand, theirs, rtol=1e-12, atol=1e-15)


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


# --- The operators' contracts ---


def op_arguments(size: int, requires_grad: bool) -> tuple[Any, ...]:
    tensors = [draw(size), *make_state(size, layers=1, hidden=2)]
    weights = make_weights(1, 2)
    if requires_grad:
        tensors, weights = wanting(*tensors), wanting(*weights)
    return (*tensors, weights, *SETTINGS, "reference")


@pytest.mark.parametrize("size", [0, 3])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_step(size: int, requires_grad: bool) -> None:
    torch.library.opcheck(torch.ops.amalgam.student_step, op_arguments(size, requires_grad))


@pytest.mark.parametrize("size", [0, 3])
def test_opcheck_backward(size: int) -> None:
    arguments = op_arguments(size, False)
    grads_out = [draw(*t.shape, seed=7) for t in arguments[:5]]
    torch.library.opcheck(torch.ops.amalgam.student_step_backward, (grads_out, *arguments))


def in_place_arguments(*shapes: tuple[int, ...]) -> tuple[Any, ...]:
    states = [make_state(*shape, layers=1, hidden=2, seed=i) for i, shape in enumerate(shapes)]
    columns = [list(column) for column in zip(*states, strict=True)]
    params = [draw(*shape, seed=10 + i) for i, shape in enumerate(shapes)]
    grads = [draw(*shape, seed=20 + i) for i, shape in enumerate(shapes)]
    return (
        params,
        grads,
        *columns,
        make_weights(1, 2),
        *SETTINGS,
        0.5,
        0.1,
        None,
        [],
        0,
        [],
        "reference",
    )


def test_opcheck_in_place() -> None:
    torch.library.opcheck(torch.ops.amalgam.student_step_, in_place_arguments((3,), (2, 2), (0,)))


def test_compile_traces_the_operator_whole() -> None:
    @torch.compile(backend="eager", fullgraph=True)
    def compiled(grad: Tensor, state: StudentState, weights: list[Tensor]) -> Tensor:
        return 2 * torch.ops.amalgam.student_step(grad, *state, weights, *SETTINGS, "reference")[0]

    arguments = draw(5), make_state(5), make_weights()
    assert torch.equal(compiled(*arguments), 2 * direct(*arguments)[0])


# --- The in-place form ---


def expected_in_place(
    param: Tensor, grad: Tensor, state: StudentState, weights: list[Tensor], lr: float, decay: float
) -> tuple[Tensor, StudentState]:
    """The functional form over the flattened tensor, in the weights' dtype."""
    dtype = weights[0].dtype
    flat = StudentState(
        state.m.reshape(-1),
        state.v.reshape(-1),
        state.h.reshape(*state.h.shape[:2], -1),
        state.c.reshape(*state.c.shape[:2], -1),
    )
    flat_grad = grad.reshape(-1).to(dtype)
    update, new = student_step(flat_grad, flat, weights, SETTINGS, backend="reference")
    moved = param.reshape(-1).to(dtype) * (1 - lr * decay) - lr * update
    shaped = (t.reshape(like.shape) for t, like in zip(new, state, strict=True))
    return moved.to(param.dtype).reshape(param.shape), StudentState(*shaped)


def copied(state: StudentState) -> StudentState:
    return StudentState(*(t.clone() for t in state))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_in_place_is_the_functional_form(size: int, layers: int) -> None:
    param, grad, weights = draw(size, seed=5), draw(size), make_weights(layers)
    state = make_state(size, layers=layers)
    moved, new = expected_in_place(param, grad, state, weights, 0.7, 0.2)
    now, grad_before = copied(state), grad.clone()
    student_step_(
        [param], [grad], [now], weights, SETTINGS, lr=0.7, weight_decay=0.2, backend="reference"
    )
    for ours, theirs in zip((param, *now), (moved, *new), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(grad, grad_before)


@pytest.mark.parametrize("chunk", [1, 2, 5, 7, 64])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_many_tensors_step_as_one(
    monkeypatch: pytest.MonkeyPatch, chunk: int, backend: str
) -> None:
    """Cut at every kind of place: inside a tensor, between two, around empty ones.

    Sums over a chunk's columns may be blocked differently, so rounding is allowed for.
    """
    monkeypatch.setattr(module, "CHUNK", chunk)
    shapes = [(), (5,), (0,), (2, 3), (1,), (7,), (3, 0, 2), (2, 1, 2, 2, 1)]
    weights = make_weights()
    params = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
    grads = [draw(*shape, seed=30 + i) for i, shape in enumerate(shapes)]
    states = [make_state(*shape, seed=60 + i) for i, shape in enumerate(shapes)]
    expected = [
        expected_in_place(p, g, s, weights, 0.5, 0.1)
        for p, g, s in zip(params, grads, states, strict=True)
    ]
    student_step_(
        params, grads, states, weights, SETTINGS, lr=0.5, weight_decay=0.1, backend=backend
    )
    for param, state, (moved, new) in zip(params, states, expected, strict=True):
        for ours, theirs in zip((param, *state), (moved, *new), strict=True):
            assert ours.shape == theirs.shape
            assert torch.allclose(ours, theirs, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("limit", [1, 2, 5, 7, 64])
def test_runs_fill_their_chunks_and_cover_everything(limit: int) -> None:
    sizes = [3, 0, 1, 12, 5, 0, 7]
    runs = list(module._runs(sizes, limit))
    lengths = [sum(part.stop - part.start for _, part in run) for run in runs]
    assert lengths[:-1] == [limit] * (len(runs) - 1)
    assert 0 < lengths[-1] <= limit
    covered = [(i, n) for run in runs for i, part in run for n in range(part.start, part.stop)]
    assert covered == [(i, n) for i, size in enumerate(sizes) for n in range(size)]


def strided(shape: tuple[int, ...], kind: str, dtype: torch.dtype = torch.float64) -> Tensor:
    tensor = draw(*shape, seed=9, dtype=dtype)
    if kind == "transposed":
        return (
            tensor.permute(*reversed(range(len(shape))))
            .contiguous()
            .permute(*reversed(range(len(shape))))
        )
    if kind == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    spread = torch.full((*shape[:-1], 2 * shape[-1]), 77.0, dtype=dtype)
    view = spread[..., ::2]
    view.copy_(tensor)
    return view


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((4, 3), "transposed"),
        ((2, 3, 4), "transposed"),
        ((2, 3, 4, 5), "channels_last"),
        ((6,), "every other"),
        ((3, 4), "every other"),
        ((2, 3, 2, 1, 2), "every other"),
    ],
)
@pytest.mark.parametrize("which", ["params", "grads", "both"])
def test_strided_params_and_grads(shape: tuple[int, ...], kind: str, which: str) -> None:
    param = strided(shape, kind) if which != "grads" else draw(*shape, seed=9)
    grad = strided(shape, kind) if which != "params" else draw(*shape, seed=9)
    assert not (param.is_contiguous() and grad.is_contiguous())
    strides, weights, state = param.stride(), make_weights(), make_state(*shape)
    whole = param._base if kind == "every other" and which != "grads" else None
    moved, new = expected_in_place(param, grad, state, weights, 1.0, 0.0)
    other = draw(3, seed=2)
    student_step_(
        [other, param], [draw(3), grad], [make_state(3), state], weights, SETTINGS,
        backend="reference",
    )  # fmt: skip
    assert param.stride() == strides
    for ours, theirs in zip((param, *state), (moved, *new), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-13, atol=1e-14)
    if whole is not None:
        assert (whole[..., 1::2] == 77).all()


@pytest.mark.parametrize("rank", range(6))
def test_every_rank(rank: int) -> None:
    shape = (2, 3, 1, 2, 2)[:rank]
    param, grad, state = draw(*shape, seed=1), draw(*shape, seed=2), make_state(*shape)
    moved, new = expected_in_place(param, grad, state, make_weights(), 1.0, 0.0)
    student_step_([param], [grad], [state], make_weights(), SETTINGS, backend="reference")
    assert param.shape == shape
    assert torch.equal(param, moved)
    assert all(torch.equal(a, b) for a, b in zip(state, new, strict=True))


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_params_round_once(dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    """Computed in the state's float32; only the new parameter is rounded to its own dtype."""
    single = torch.float32
    weights = make_weights(dtype=single)
    param, grad = draw(33, seed=1, dtype=dtype), draw(33, seed=2, dtype=grad_dtype)
    state = make_state(33, dtype=single)
    moved, new = expected_in_place(param, grad, state, weights, 0.9, 0.1)
    student_step_(
        [param], [grad], [state], weights, SETTINGS, lr=0.9, weight_decay=0.1, backend="reference"
    )
    assert param.dtype == dtype
    assert torch.equal(param, moved)
    assert all(torch.equal(a, b) for a, b in zip(state, new, strict=True))


def test_in_place_makes_no_graph() -> None:
    param = torch.nn.Parameter(draw(5))
    version = param._version
    weights = wanting(*make_weights())
    state = make_state(5)
    with torch.no_grad():
        student_step_([param], [draw(5)], [state], weights, SETTINGS, backend="reference")
    assert param.is_leaf
    assert param._version > version
    assert not any(t.requires_grad for t in state)


def test_nothing_to_step_is_nothing() -> None:
    student_step_([], [], [], make_weights())


def test_steps_repeat_bit_for_bit() -> None:
    runs = []
    for _ in range(2):
        param, state = draw(1000, seed=1), make_state(1000)
        for step in range(3):
            grads = [draw(1000, seed=step)]
            student_step_([param], grads, [state], make_weights(), backend="reference")
        runs.append((param, *state))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


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


IN_PLACE_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"grads": []}, ValueError, "equally many, not 1, 0 and 1"),
    ({"states": [make_state(2, 3)] * 2}, ValueError, "equally many, not 1, 1 and 2"),
    ({"grads": [draw(3, 2)]}, ValueError, "grads must have their parameters' shapes: (3, 2)"),
    (
        {"params": [torch.zeros(2, 3, dtype=torch.int32)]},
        TypeError,
        "params must be a floating-point tensor, not torch.int32",
    ),
    (
        {"grads": [torch.zeros(2, 3, dtype=torch.bool)]},
        TypeError,
        "grads must be a floating-point tensor, not torch.bool",
    ),
    ({"grads": [draw(2, 3).to("meta")]}, ValueError, "grads must be on cpu, not on meta"),
    (
        {"params": [draw(2, 3).to("meta")], "grads": [draw(2, 3).to("meta")]},
        ValueError,
        "states must be on meta, not on cpu",
    ),
    ({"states": [make_state(6)]}, ValueError, "state.m must have shape (2, 3), not (6,)"),
    (
        {"states": [make_state(2, 3, layers=1)]},
        ValueError,
        "state.h must begin with (layers, hidden) = (2, 4)",
    ),
    (
        {"states": [make_state(2, 3)._replace(v=draw(3, 2).T)]},
        ValueError,
        "state.v must be contiguous",
    ),
    (
        {"states": [make_state(2, 3)._replace(h=draw(2, 4, 3, 2).mT)]},
        ValueError,
        "state.h must be contiguous",
    ),
    (
        {"weights": make_weights(dtype=torch.float32)},
        ValueError,
        "weights[0] must be torch.float64",
    ),
    ({"backend": "none"}, ValueError, "backend must be one of"),
    ({"warmup_steps": 2}, ValueError, "warmup_steps=2 needs steps"),
    ({"steps": []}, ValueError, "steps must be one a parameter, 1, not 0"),
    ({"steps": [torch.zeros(1)]}, ValueError, "steps must be float32 tensors of shape () on cpu"),
    ({"seeds": [2**32]}, ValueError, "seeds must lie in [0, 2^32), not 4294967296"),
    ({"lr": torch.ones(2)}, ValueError, "lr must hold one number, not (2,)"),
    ({"skip": torch.ones(2, 1)}, ValueError, "skip must hold one number, not (2, 1)"),
]


@pytest.mark.parametrize(("change", "kind", "why"), IN_PLACE_ERRORS)
def test_in_place_errors_name_the_argument(
    change: dict[str, Any], kind: type[Exception], why: str
) -> None:
    """Integer parameters were once truncated without a word: only float ones had been tried."""
    param, grad, state = draw(2, 3), draw(2, 3), make_state(2, 3)
    before = param.clone()
    arguments = {"params": [param], "grads": [grad], "states": [state], "weights": make_weights()}
    with pytest.raises(kind, match=re.escape(why)):
        student_step_(**(arguments | change))
    assert torch.equal(param, before)


def test_initial_state_checks_the_weights() -> None:
    with pytest.raises(ValueError, match="weights must hold three tensors a layer"):
        initial_state(draw(3), make_weights()[:-1])


# The compiled backends, held to the reference by one rule: the error, against float64, is at most
# twice what plain PyTorch makes in that dtype.

SHAPES = [(2, 20), (1, 20), (1, 8), (1, 4), (3, 5), (1, 1), (2, 33), (1, 64)]
compiled = pytest.mark.parametrize("backend", ["cpu"])


def skewed_inputs(
    size: int, layers: int, hidden: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, StudentState, list[Tensor]]:
    """Gradients over eight decades with zeros among them, states as a run leaves them."""
    generator = torch.Generator().manual_seed(seed)
    decades = 10 ** (8 * torch.rand(size, dtype=torch.float64, generator=generator) - 6)
    grad = draw(size, seed=seed) * decades
    grad[::7] = 0
    state = make_state(size, layers=layers, hidden=hidden, seed=seed)
    state = state._replace(m=state.m * decades, v=state.v * decades.square())
    weights = make_weights(layers, hidden)
    return (
        grad.to(dtype),
        StudentState(*(t.to(dtype) for t in state)),
        [w.to(dtype) for w in weights],
    )


def flat(outputs: Any) -> list[Tensor]:
    """Tensors of a nest of tuples and lists."""
    if isinstance(outputs, Tensor):
        return [outputs]
    return [tensor for output in outputs for tensor in flat(output)]


def doubled(values: Any) -> Any:
    if isinstance(values, Tensor):
        return values.double()
    return [doubled(value) for value in values] if isinstance(values, (list, tuple)) else values


def assert_as_accurate(operation: Any, draws: list[tuple[Any, ...]], backend: str) -> None:
    """The largest error is at most twice PyTorch's: the ratio's geometric mean over the draws.

    One draw is no yardstick: its largest error is that of one number, which PyTorch sometimes
    rounds the right way, so each error counts with one unit in the last place added. In float64,
    where nothing more precise stands by, both agree to 1e-12.
    """
    logs = [0.0] * len(flat(operation(*draws[0], backend)))
    for arguments in draws:
        truth = flat(operation(*doubled(arguments), "reference"))
        plain = flat(operation(*arguments, "reference"))
        ours = flat(operation(*arguments, backend))
        for index, (o, p, t) in enumerate(zip(ours, plain, truth, strict=True)):
            assert o.shape == t.shape
            assert o.dtype == p.dtype
            if o.dtype == torch.float64:
                torch.testing.assert_close(o, t, rtol=1e-9, atol=1e-12)
            elif t.numel() and t.any():
                unit = torch.finfo(o.dtype).eps * t.abs().max()
                ratio = ((o - t).abs().max() + unit) / ((p - t).abs().max() + unit)
                logs[index] += ratio.log().item() / len(draws)
    ratios = [math.exp(log) for log in logs]
    assert max(ratios) <= 2, " ".join(f"{ratio:.2f}" for ratio in ratios)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("layers", "hidden"), SHAPES)
@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 63, 64, 65, 1000, 1027])
def test_compiled_step(
    backend: str, size: int, layers: int, hidden: int, dtype: torch.dtype
) -> None:
    forward, backward = [], []
    # Of one coordinate the largest error is a single number, and takes more draws to average.
    draws = 1 if dtype == torch.float64 else 16 if size > 1 else 150
    for seed in range(draws):
        grad, state, weights = skewed_inputs(size, layers, hidden, dtype, seed)
        upstream = [draw(*t.shape, seed=seed + 9, dtype=dtype) for t in (grad, *state)]
        forward.append((grad, *state, weights, *SETTINGS))
        backward.append((upstream, *forward[-1]))
    assert_as_accurate(torch.ops.amalgam.student_step, forward, backend)
    assert_as_accurate(torch.ops.amalgam.student_step_backward, backward, backend)


@compiled
def test_compiled_weight_gradients_of_many_coordinates(backend: str) -> None:
    draws = []
    for seed in range(3):
        grad, state, weights = skewed_inputs(2**16 + 1, 2, 20, torch.float32, seed)
        upstream = [draw(*t.shape, seed=seed + 9, dtype=torch.float32) for t in (grad, *state)]
        draws.append((upstream, grad, *state, weights, *SETTINGS))
    assert_as_accurate(torch.ops.amalgam.student_step_backward, draws, backend)


@compiled
@pytest.mark.parametrize(("layers", "hidden"), [(1, 3), (2, 2)])
def test_compiled_gradcheck(backend: str, layers: int, hidden: int) -> None:
    state = make_state(3, layers=layers, hidden=hidden)
    inputs = wanting(draw(3), *state, *make_weights(layers, hidden))

    def step(*inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.amalgam.student_step(*inputs[:5], list(inputs[5:]), *SETTINGS, backend)

    assert torch.autograd.gradcheck(step, inputs)


@compiled
def test_compiled_opcheck(backend: str) -> None:
    *arguments, _ = op_arguments(5, True)
    torch.library.opcheck(torch.ops.amalgam.student_step.default, (*arguments, backend))
    *arguments, _ = in_place_arguments((3, 2), (), (0,))
    torch.library.opcheck(torch.ops.amalgam.student_step_.default, (*arguments, backend))


@compiled
def test_differentiating_twice_is_refused(backend: str) -> None:
    inputs = wanting(draw(3), *make_state(3))
    update, _ = student_step(inputs[0], StudentState(*inputs[1:]), make_weights(), backend=backend)
    (grad,) = torch.autograd.grad(update.sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once.*backend='reference'"):
        torch.autograd.grad(grad.sum(), inputs[0])


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
@pytest.mark.parametrize("beta2", [0.99, 0.0])
def test_compiled_without_eps(backend: str, beta2: float) -> None:
    """Lanes after the last coordinate once held 0 / 0: no test had eps = 0 and a partial tile."""
    grad, state, weights = draw(5), make_state(5), make_weights()
    upstream = [draw(*t.shape, seed=9) for t in (grad, *state)]
    arguments = (upstream, grad, *state, weights, 0.1, 0.9, beta2, 0.0)
    operation = torch.ops.amalgam.student_step_backward
    for ours, expected in zip(
        flat(operation(*arguments, backend)), flat(operation(*arguments, "reference")), strict=True
    ):
        torch.testing.assert_close(ours, expected)


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


@compiled
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compiled_in_place_is_the_references(
    backend: str, dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    """Parameters of several tensors, strided ones among them, whatever their storage."""
    weights = make_weights(2, 20, dtype=torch.float32)
    shapes = [(7, 9), (), (0, 3), (130,), (2, 3, 4, 2)]
    both = []
    for name in ("reference", backend):
        params = [draw(*s, seed=1).to(dtype) for s in shapes]
        params[4] = params[4].to(memory_format=torch.channels_last)
        grads = [draw(*s, seed=2).to(grad_dtype) for s in shapes]
        states = [make_state(*s, hidden=20, dtype=torch.float32) for s in shapes]
        for _ in range(3):
            student_step_(params, grads, states, weights, lr=0.5, weight_decay=0.01, backend=name)
        both.append((params, flat(states)))
    for ours, expected in zip(both[1][0], both[0][0], strict=True):
        unit = torch.finfo(dtype).eps * expected.float().abs().clamp_min(1e-4)
        assert ((ours.float() - expected.float()).abs() <= unit + 1e-6).all()
    for ours, expected in zip(both[1][1], both[0][1], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@compiled
def test_threads_step_different_optimizers_at_once(backend: str) -> None:
    """The workspaces are each thread's own, and the interpreter's lock is not held."""
    from concurrent.futures import ThreadPoolExecutor

    weights = make_weights(2, 20, dtype=torch.float32)

    def run(seed: int) -> Tensor:
        param, state = draw(2000, seed=seed).float(), make_state(2000, hidden=20)
        state = StudentState(*(t.float() for t in state))
        for step in range(20):
            grads = [draw(2000, seed=seed + step).float()]
            student_step_([param], grads, [state], weights, backend=backend)
        return param

    alone = [run(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, range(4)))
    assert all(map(torch.equal, alone, together))


@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_compiled_on_lesser_instruction_sets(isa: str) -> None:
    from amalgam.backends import build_info

    available = build_info()["cpu_isas"]
    if not isinstance(available, list) or isa not in available:
        pytest.skip(f"this machine or build has no {isa}: {available}")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__),
            *("-k", "compiled and not lesser"),
        ],
        env={**os.environ, "AMALGAM_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


# What rounds at random, and what the device decides, of every backend.


def two_tensors(
    backend: str, device: str, dtype: torch.dtype, cells: torch.dtype, hidden: int, **how: Any
) -> tuple[list[Tensor], list[StudentState]]:
    """Parameters and states after one step, in place, of two tensors; the second is strided.

    Rows of the first begin at multiples of 16 bytes, those of the second do not.
    """
    params = [moved(draw(*s, seed=1).bfloat16().to(dtype), device) for s in ((136,), (3, 5))]
    params[1] = params[1].T.contiguous().T
    grads = [moved(draw(*p.shape, seed=2).bfloat16().to(dtype), device) for p in params]
    states = []
    for param in params:
        state = moved(make_state(*param.shape, hidden=hidden, dtype=torch.float32), device)
        h, c = (t.bfloat16().to(cells) for t in (state.h, state.c))
        states.append(state._replace(h=h, c=c))
    weights = moved(make_weights(2, hidden, dtype=torch.float32), device)
    student_step_(params, grads, states, weights, lr=0.5, backend=backend, **how)
    return params, states


def check_in_place(
    backend: str,
    device: str,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    cells: torch.dtype,
    layers: int,
    hidden: int,
) -> None:
    """Two steps of empty, strided and many tensors are the reference's."""
    # Triton's interpreter truncates to bfloat16, in each of the two steps, where GPUs round.
    units = 4 if device == "cpu" and torch.bfloat16 in (dtype, cells) else 1
    weights = moved(make_weights(layers, hidden, dtype=torch.float32), device)
    shapes = [(0,), (7, 9), (), (0, 3), (130,), (2, 3, 4, 2), *[(5,)] * 9, (0, 1), (8, 16)]
    both = []
    for name in ("reference", backend):
        params = [moved(draw(*s, seed=1).to(dtype), device) for s in shapes]
        params[5] = params[5].to(memory_format=torch.channels_last)
        grads = [moved(draw(*s, seed=2).to(grad_dtype), device) for s in shapes]
        states = []
        for s in shapes:
            state = make_state(*s, layers=layers, hidden=hidden, dtype=torch.float32)
            state = moved(state, device)
            states.append(state._replace(h=state.h.to(cells), c=state.c.to(cells)))
        for _ in range(2):
            student_step_(params, grads, states, weights, lr=0.5, weight_decay=0.01, backend=name)
        both.append((params, flat(states)))
    rounding = torch.finfo(cells).eps if cells != torch.float32 else 1e-5
    for ours, expected in zip(both[1][0], both[0][0], strict=True):
        unit = torch.finfo(dtype).eps * expected.float().abs().clamp_min(1e-4)
        assert ((ours.float() - expected.float()).abs() <= units * unit + rounding / 10).all()
    for ours, expected in zip(both[1][1], both[0][1], strict=True):
        bounds = {"rtol": 2 * units * rounding, "atol": units * rounding}
        torch.testing.assert_close(ours.float(), expected.float(), **bounds)


def nearly(ours: Tensor, expected: Tensor) -> bool:
    """But for last bits of float32, which seldom decide how bfloat16 is rounded."""
    narrow = expected.dtype == torch.bfloat16
    unit = (1 if narrow else 8) * torch.finfo(expected.dtype).eps
    difference = (ours.float() - expected.float()).abs()
    close = difference <= unit * expected.float().abs().clamp_min(1e-2)
    return bool(close.all()) and (not narrow or bool((difference > 0).float().mean() <= 0.02))


def check_rounding_by_seeds(
    backend: str,
    device: str,
    hidden: int,
    alike: Callable[[Tensor, Tensor], bool] = torch.equal,
) -> None:
    """What is stored in bfloat16 are the same float32 numbers, rounded by the bits of the seed."""
    counts = [torch.tensor(float(n), device=device) for n in (0, 7)]
    for warmup_steps in (0, 3):
        how = {"steps": counts, "warmup_steps": warmup_steps, "warmup_lr": 0.1}
        wide, wide_states = two_tensors(
            backend, device, torch.float32, torch.float32, hidden, **how
        )
        how["seeds"] = [11, 12]
        narrow, states = two_tensors(backend, device, torch.float32, torch.bfloat16, hidden, **how)
        assert all(map(alike, narrow, wide))
        for seed, step, state, exact in zip((11, 12), counts, states, wide_states, strict=True):
            rows, places = 2 * hidden, exact.m.numel()
            bits = random_bits(key_of(seed, step), range(rows + 1), range(places))
            for name, shift in (("h", 16), ("c", 0)):
                values = getattr(exact, name)
                chosen = (bits[:-1] >> shift & 0xFFFF).view(values.shape)
                expected = rounded_stochastically(values, chosen)
                assert alike(getattr(state, name), expected)
        narrow, _ = two_tensors(backend, device, torch.bfloat16, torch.float32, hidden, **how)
        for seed, step, param, exact in zip((11, 12), counts, narrow, wide, strict=True):
            bits = random_bits(key_of(seed, step), range(rows, rows + 1), range(param.numel()))
            expected = rounded_stochastically(exact, (bits >> 16).view(exact.shape))
            assert alike(param, expected)


def check_control(backend: str, device: str, cells: torch.dtype, hidden: int) -> None:
    """A step by tensors on the device is the step by numbers, to the bit; or none, or warm-up."""

    def run(**how: Any) -> list[Tensor]:
        return flat(two_tensors(backend, device, torch.float32, cells, hidden, **how))

    counts = [torch.tensor(4.0, device=device)] * 2
    flag = torch.zeros((), device=device)
    plain = run(weight_decay=0.1)
    decay = torch.tensor(0.1, dtype=torch.float64, device=device)
    for how in (
        {"steps": counts, "weight_decay": 0.1, "warmup_steps": 4},
        {"skip": flag, "weight_decay": decay},
    ):
        assert all(map(torch.equal, run(**how), plain))
    params, states = two_tensors(backend, device, torch.float32, cells, hidden, skip=flag + 1)
    before = run(skip=flag + 1, steps=counts)
    assert all(map(torch.equal, flat((params, states)), before))
    assert torch.equal(params[0].cpu(), draw(136, seed=1).bfloat16().float())

    warm, (state, _) = two_tensors(
        *(backend, device, torch.float32, cells, hidden),
        **{"steps": counts, "warmup_steps": 5, "warmup_lr": 0.25, "weight_decay": 0.1},
    )
    start = params[0] * (1 - 0.5 * 0.1) - 0.5 * 0.25 * moved(
        draw(136, seed=2).bfloat16().float(), device
    )
    torch.testing.assert_close(warm[0], start)
    assert torch.equal(state.h, states[0].h)
    assert torch.equal(state.c, states[0].c)
    new_m, _ = update_moments(
        moved(draw(136, seed=2).bfloat16().float(), device),
        states[0].m,
        states[0].v,
        StepSettings(),
    )
    torch.testing.assert_close(state.m, new_m)


@pytest.mark.parametrize("hidden", [4, 20])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_seeds_round_to_the_same_bits(backend: str, hidden: int) -> None:
    check_rounding_by_seeds(backend, "cpu", hidden)


@pytest.mark.parametrize("cells", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_device_decides(backend: str, cells: torch.dtype) -> None:
    check_control(backend, "cpu", cells, 4)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_compiled_cells_may_be_bfloat16(backend: str) -> None:
    """One step from bfloat16 cells is the float32 step from them, rounded once."""
    weights = make_weights(2, 20, dtype=torch.float32)
    shape, grad = (9, 11), [draw(9, 11, seed=3).float()]
    state = make_state(*shape, hidden=20, dtype=torch.float32)
    narrow = state._replace(h=state.h.bfloat16(), c=state.c.bfloat16())
    wide = StudentState(*(t.float().clone() for t in narrow))
    params = [draw(9, 11).float()], [draw(9, 11).float()]
    student_step_(params[0], grad, [narrow], weights, backend=backend)
    student_step_(params[1], grad, [wide], weights, backend="reference")
    assert narrow.h.dtype == narrow.c.dtype == torch.bfloat16
    torch.testing.assert_close(params[0], params[1], rtol=1e-5, atol=1e-6)
    for name in ("h", "c"):
        ours, exact = getattr(narrow, name).float(), getattr(wide, name)
        assert ((ours - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()
    mixed = [narrow, wide]
    with pytest.raises(ValueError, match="state.h must be torch.bfloat16"):
        student_step_(params[0] * 2, grad * 2, mixed, weights, backend=backend)


@compiled
def test_compiled_tensors_must_not_share_memory(backend: str) -> None:
    param, states = draw(5).float(), [make_state(5, dtype=torch.float32) for _ in range(2)]
    weights, grads = make_weights(dtype=torch.float32), [draw(5).float()] * 2
    with pytest.raises(ValueError, match="must not share memory"):
        student_step_([param, param], grads, states, weights, backend=backend)


# The Triton kernels: float32 alone, on a GPU, or interpreted in a process of their own.

needs_gpu = pytest.mark.gpu
TRITON_PLACES = [pytest.param("cuda", id="on_cuda", marks=needs_gpu)]
if triton.INTERPRETING:
    TRITON_PLACES.append(pytest.param("cpu", id="interpreted"))
by_triton = pytest.mark.parametrize("device", TRITON_PLACES)


def moved(value: Any, device: str) -> Any:
    """A nest of values with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, StudentState):
        return StudentState(*(moved(each, device) for each in value))
    return [moved(each, device) for each in value] if isinstance(value, (list, tuple)) else value


def run_interpreted(path: str) -> None:
    """The tests of a file that name Triton and take no GPU, in a process that interprets them."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path),
            *("-k", "test_triton and interpreted"),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


@by_triton
@pytest.mark.usefixtures("triton_works")
@pytest.mark.parametrize(
    ("layers", "hidden", "size"),
    [(2, 20, 0), (2, 20, 1), (2, 20, 64), (2, 20, 200), (1, 4, 63), (3, 5, 65), (1, 33, 31)],
)
def test_triton_step(device: str, size: int, layers: int, hidden: int) -> None:
    forward, backward = [], []
    draws = 30 if size <= 1 else 12 if layers * hidden * size < 1000 else 6
    for seed in range(draws):
        grad, state, weights = skewed_inputs(size, layers, hidden, torch.float32, seed)
        upstream = [draw(*t.shape, seed=seed + 9, dtype=torch.float32) for t in (grad, *state)]
        forward.append(moved((grad, *state, weights, *SETTINGS), device))
        backward.append((moved(upstream, device), *forward[-1]))
    assert_as_accurate(torch.ops.amalgam.student_step, forward, "triton")
    assert_as_accurate(torch.ops.amalgam.student_step_backward, backward, "triton")


of_dtypes = pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
)


@by_triton
@pytest.mark.usefixtures("triton_works")
@pytest.mark.parametrize("cells", [torch.float32, torch.bfloat16])
@of_dtypes
def test_triton_in_place_is_the_references(
    device: str, dtype: torch.dtype, grad_dtype: torch.dtype, cells: torch.dtype
) -> None:
    check_in_place("triton", device, dtype, grad_dtype, cells, 2, 20)


@by_triton
@pytest.mark.usefixtures("triton_works")
@pytest.mark.parametrize(("layers", "hidden"), [(2, 20), (1, 4)])
def test_triton_adds_three_products_up_to_one(device: str, layers: int, hidden: int) -> None:
    """3xtf32, by default on NVIDIA's GPUs, and not where kernels are interpreted."""
    forward, backward = [], []
    for seed in range(4 if hidden == 20 else 12):
        grad, state, weights = skewed_inputs(70, layers, hidden, torch.float32, seed)
        upstream = [draw(*t.shape, seed=seed + 9, dtype=torch.float32) for t in (grad, *state)]
        forward.append(moved((grad, *state, weights, *SETTINGS), device))
        backward.append((moved(upstream, device), *forward[-1]))
    assert_as_accurate(torch.ops.amalgam.student_step, forward, "triton:3xtf32")
    assert_as_accurate(torch.ops.amalgam.student_step_backward, backward, "triton:3xtf32")


@by_triton
@pytest.mark.usefixtures("triton_works")
@pytest.mark.parametrize("hidden", [4, 20])
def test_triton_approximates(device: str, hidden: int) -> None:
    """Where there is no instruction to approximate by, tanh of half the sum is precise."""
    bound = 1e-2 if device == "cuda" else 1e-5
    grad, state, weights = moved(skewed_inputs(70, 2, hidden, torch.float32), device)
    ours = student_step(grad, state, weights, backend="triton:ieee,approximate")
    theirs = student_step(grad, state, weights, backend="reference")
    for one, other in zip(flat(ours), flat(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=bound, atol=bound)


@by_triton
@pytest.mark.usefixtures("triton_works")
def test_triton_passes_nan_and_infinity_on(device: str) -> None:
    grad, state, weights = skewed_inputs(70, 2, 4, torch.float32)
    grad[3], grad[5], state.c[0, 0, 66] = math.nan, math.inf, math.nan
    grad, state, weights = moved((grad, state, weights), device)
    ours = flat(student_step(grad, state, weights, backend="triton"))
    plain = flat(student_step(grad, state, weights, backend="reference"))
    for one, other in zip(ours, plain, strict=True):
        assert torch.equal(one.isnan(), other.isnan())


@by_triton
@pytest.mark.usefixtures("triton_works")
def test_triton_without_eps(device: str) -> None:
    """Places behind the last coordinate once had v = 0: no test had beta2 = eps = 0."""
    grad, state, weights = skewed_inputs(5, 2, 4, torch.float32)
    grad = grad + (grad == 0)
    upstream = [draw(*t.shape, seed=9, dtype=torch.float32) for t in (grad, *state)]
    arguments = moved((upstream, grad, list(state), weights), device)
    upstream, grad, state, weights = arguments
    operation = torch.ops.amalgam.student_step_backward
    found = flat(operation(upstream, grad, *state, weights, 0.1, 0.9, 0.0, 0.0, "triton"))
    assert all(tensor.isfinite().all() for tensor in found)


@by_triton
@pytest.mark.usefixtures("triton_works")
def test_triton_takes_strided_inputs_and_repeats_bits(device: str) -> None:
    grad, state, weights = moved(skewed_inputs(300, 2, 4, torch.float32), device)
    spread = [torch.stack((t, t), -1)[..., 0] for t in (grad, *state)]
    assert not spread[3].is_contiguous()
    inputs = wanting(*spread, *weights)
    results = []
    for start in (inputs, wanting(grad, *state, *weights)):
        update, new = student_step(
            start[0], StudentState(*start[1:5]), start[5:], SETTINGS, backend="triton"
        )
        loss = sum(t.square().sum() for t in (update, *new))
        results.append([update, *new, *torch.autograd.grad(loss, start)])
    assert all(map(torch.equal, *results))


@by_triton
@pytest.mark.usefixtures("triton_works")
def test_triton_packs_kept_weights_once_and_when_they_change(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from amalgam.kernels import lstm_weights

    packs, pack = [], lstm_weights.pack
    monkeypatch.setattr(lstm_weights, "pack", lambda *how: packs.append(how) or pack(*how))
    grad, state, weights = moved(skewed_inputs(70, 2, 4, torch.float32), device)
    owner = Kept()
    for change in (0.0, 0.0, 0.5):
        if change:
            weights[0].add_(change)
        with owner:
            ours = student_step(grad, state, weights, backend="triton")
        theirs = student_step(grad, state, weights, backend="reference")
        torch.testing.assert_close(flat(ours), flat(theirs), rtol=1e-5, atol=1e-5)
    assert len(packs) == 2


@by_triton
@pytest.mark.usefixtures("triton_works")
def test_triton_opcheck(device: str) -> None:
    grad, state, weights = moved(skewed_inputs(5, 2, 4, torch.float32), device)
    inputs = wanting(grad, *state, *weights)
    torch.library.opcheck(
        torch.ops.amalgam.student_step.default, (*inputs[:5], inputs[5:], *SETTINGS, "triton")
    )
    lists, none = [[t] for t in (grad.clone(), grad, *state)], (None, [], 0, [])
    torch.library.opcheck(
        torch.ops.amalgam.student_step_.default,
        (*lists, weights, *SETTINGS, 1.0, 0.0, *none, "triton"),
    )


@by_triton
@pytest.mark.usefixtures("triton_works")
@pytest.mark.parametrize("hidden", [4, 20])
def test_triton_steps_alike_with_places_of_64_bits(
    device: str, hidden: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from amalgam.kernels import student_step, student_step_in_place

    grad, state, weights = moved(skewed_inputs(70, 2, hidden, torch.float32), device)
    upstream = [torch.ones_like(t) for t in (grad, *state)]
    arguments = (grad, *state, weights, *SETTINGS, "triton")
    results = []
    for wide in (False, True):
        for kernels in (student_step, student_step_in_place):
            monkeypatch.setattr(kernels, "wide", lambda *_, wide=wide: wide)
        in_place = two_tensors("triton", device, torch.float32, torch.float32, hidden)
        forward = torch.ops.amalgam.student_step(*arguments)
        backward = torch.ops.amalgam.student_step_backward(upstream, *arguments)
        results.append(flat((in_place, forward, backward)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@needs_gpu
@pytest.mark.usefixtures("triton_works", "cuda_works")
@pytest.mark.parametrize(
    ("backend", "cells", "bound"),
    [
        ("triton:3xtf32", torch.float32, 1e-6),
        ("triton:tf32", torch.float32, 5e-4),
        ("triton:bf16", torch.float32, 5e-3),
        ("cuda:3xtf32", torch.float32, 1e-6),
        ("cuda:tf32", torch.float32, 5e-4),
        ("cuda:tf32,approximate", torch.float32, 1e-3),
        ("cuda:3xtf32", torch.bfloat16, 1e-6),
        ("cuda:tf32", torch.bfloat16, 5e-4),
        ("cuda:bf16,approximate", torch.bfloat16, 5e-3),
    ],
)
def test_steps_many_aligned_coordinates_to_the_same_bits(
    backend: str, cells: torch.dtype, bound: float
) -> None:
    """In place, whatever warp comes first: what one overwrites, another may still have to read."""
    weights = moved(make_weights(2, 20, dtype=torch.float32), "cuda")
    grad, state, _ = moved(skewed_inputs(1 << 14, 2, 20, torch.float32), "cuda")
    narrow = state._replace(h=state.h.to(cells), c=state.c.to(cells))
    results = []
    for _ in range(20):
        param, twin = torch.zeros_like(grad), StudentState(*(t.clone() for t in narrow))
        student_step_([param], [grad], [twin], weights, backend=backend)
        results.append((param, *twin))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
    same = narrow._replace(h=narrow.h.float(), c=narrow.c.float())
    theirs, _ = student_step(grad, same, weights, backend="reference")
    torch.testing.assert_close(-results[0][0], theirs, rtol=0, atol=bound)


@needs_gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.usefixtures("triton_works", "cuda_works")
def test_steps_where_places_need_64_bits(backend: str) -> None:
    """Beyond 2^31 numbers of h: the last coordinates are stepped, and as elsewhere."""
    n, few = 2**29 + 70, 100
    weights = moved(make_weights(1, 4, dtype=torch.float32), "cuda")
    param, grad = (torch.zeros(n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    ends = [draw(few, seed=seed).bfloat16().cuda() for seed in (1, 2)]
    param[-few:], grad[-few:] = ends
    state = initial_state(param, weights, torch.bfloat16)
    parts = initial_state(ends[0], weights, torch.bfloat16)
    student_step_([param], [grad], [state], weights, backend=backend)
    student_step_([ends[0]], [ends[1]], [parts], weights, backend=backend)
    torch.testing.assert_close(param[-few:], ends[0])
    for whole, part in zip(state, parts, strict=True):
        torch.testing.assert_close(whole[..., -few:], part)


@by_triton
@pytest.mark.usefixtures("triton_works")
@pytest.mark.parametrize("hidden", [4, 20])
def test_triton_rounds_by_seeds_to_the_same_bits(device: str, hidden: int) -> None:
    # On tensor cores, kernels of other dtypes add in other orders.
    alike = nearly if device == "cuda" and hidden == 20 else torch.equal
    check_rounding_by_seeds("triton", device, hidden, alike)


@by_triton
@pytest.mark.usefixtures("triton_works")
@pytest.mark.parametrize(("hidden", "cells"), [(4, torch.float32), (20, torch.bfloat16)])
def test_triton_lets_the_device_decide(device: str, hidden: int, cells: torch.dtype) -> None:
    check_control("triton", device, cells, hidden)


def errors_of_ten_steps(backend: str, device: str, size: int) -> tuple[Tensor, Tensor]:
    """The largest of the last update, as of one in [-1, 1], and of h."""
    grad, state, weights = moved(skewed_inputs(size, 2, 20, torch.float32), device)
    exact = doubled([grad, *state])
    for _ in range(10):
        update, state = student_step(grad, state, weights, backend=backend)
        theirs, truth = student_step(
            exact[0], StudentState(*exact[1:]), doubled(weights), backend="reference"
        )
        exact[1:] = truth
    return (10 * (update - theirs)).abs().max(), (state.h - truth.h).abs().max()


@needs_gpu
@pytest.mark.usefixtures("triton_works")
@pytest.mark.parametrize(
    ("permitted", "bound"),
    [("ieee", 1e-5), ("3xtf32", 1e-5), ("tf32", 5e-3), ("bf16", 5e-2), ("tf32,approximate", 1e-2)],
)
def test_triton_errs_no_more_than_permitted(permitted: str, bound: float) -> None:
    assert max(errors_of_ten_steps(f"triton:{permitted}", "cuda", 3000)) <= bound


@pytest.mark.skipif(triton.INTERPRETING, reason="this process runs the interpreter already")
def test_triton_kernels_by_interpreter() -> None:
    run_interpreted(__file__)


# The CUDA kernels: in place, float32, of the students that are compiled in.

TILES_STACK = {"sm_90": 360}  # bytes a thread, of some KB that it reads and writes
CUDA_SIZES = [(1, 4), (1, 8), (1, 16), (2, 4), (2, 8), (1, 20), (2, 20)]


def by_cuda(test: Any) -> Any:
    return needs_gpu(pytest.mark.usefixtures("cuda_works")(test))


@by_cuda
@pytest.mark.parametrize("cells", [torch.float32, torch.bfloat16])
@of_dtypes
@pytest.mark.parametrize(("layers", "hidden"), CUDA_SIZES)
def test_cuda_in_place_is_the_references(
    layers: int,
    hidden: int,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    cells: torch.dtype,
) -> None:
    check_in_place("cuda", "cuda", dtype, grad_dtype, cells, layers, hidden)


@by_cuda
@pytest.mark.parametrize("size", [1, 64, 1000, 4099])
@pytest.mark.parametrize(("layers", "hidden"), CUDA_SIZES)
def test_cuda_errs_as_the_reference(layers: int, hidden: int, size: int) -> None:
    draws = []
    for seed in range(60 if size == 1 else 8):
        inputs = skewed_inputs(size, layers, hidden, torch.float32, seed)
        draws.append(moved((inputs[0], *inputs[1], inputs[2]), "cuda"))
    assert_as_accurate(step_in_place, draws, "cuda")


@by_cuda
@pytest.mark.parametrize(("layers", "hidden"), CUDA_SIZES)
def test_cuda_approximates(layers: int, hidden: int) -> None:
    grad, state, weights = moved(skewed_inputs(1000, layers, hidden, torch.float32), "cuda")
    ours, theirs = (
        step_in_place(grad, *state, weights, name) for name in ("cuda:approximate", "reference")
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
    assert not torch.equal(ours[3], theirs[3])


@by_cuda
@pytest.mark.parametrize(
    ("backend", "hidden"), [("cuda", 4), ("cuda", 8), ("cuda", 20), ("cuda:tf32", 20)]
)
def test_cuda_rounds_by_seeds_to_the_same_bits(backend: str, hidden: int) -> None:
    check_rounding_by_seeds(backend, "cuda", hidden)


@by_cuda
@pytest.mark.parametrize(
    ("backend", "hidden"),
    [("cuda", 4), ("cuda", 8), ("cuda", 20), ("cuda:tf32", 20), ("cuda:bf16,approximate", 20)],
)
@pytest.mark.parametrize("cells", [torch.float32, torch.bfloat16])
def test_cuda_lets_the_device_decide(backend: str, hidden: int, cells: torch.dtype) -> None:
    check_control(backend, "cuda", cells, hidden)


@by_cuda
@pytest.mark.parametrize("hidden", [8, 20])
@pytest.mark.parametrize("narrow", [False, True])
def test_cuda_alike_wherever_tensors_begin(narrow: bool, hidden: int) -> None:
    """A number at a time where accesses of 16 bytes are not aligned, and to the same bits."""
    dtype = torch.bfloat16 if narrow else torch.float32
    weights = moved(make_weights(1, hidden, dtype=torch.float32), "cuda")
    results = []
    for shift in (0, 1):
        size = 4096 - 3 * shift  # which isn't a multiple of what a thread takes either
        tensors = [draw(4099, seed=seed).to(dtype).cuda()[shift:] for seed in (1, 2)]
        param, grad = (tensor[:size] for tensor in tensors)
        state = moved(make_state(4099, layers=1, hidden=hidden, dtype=torch.float32), "cuda")
        state = StudentState(*(t[..., shift : shift + size].contiguous() for t in state))
        state = state._replace(h=state.h.to(dtype), c=state.c.to(dtype))
        student_step_([param], [grad], [state], weights, backend="cuda")
        results.append([t[..., 1 - shift :][..., :4000] for t in (param, *state)])
    assert all(map(torch.equal, *results))


@by_cuda
@pytest.mark.parametrize("hidden", [4, 20])
@pytest.mark.parametrize("permitted", ["3xtf32", "tf32", "tf32,approximate"])
def test_cuda_passes_nan_and_infinity_on(permitted: str, hidden: int) -> None:
    grad, state, weights = skewed_inputs(72, 2, hidden, torch.float32)
    grad[3], grad[5], state.c[0, 0, 66] = math.nan, math.inf, math.nan
    grad, state, weights = moved((grad, state, weights), "cuda")
    ours, plain = (
        step_in_place(grad, *state, weights, name) for name in (f"cuda:{permitted}", "reference")
    )
    for one, other in zip(ours, plain, strict=True):
        assert torch.equal(one.isnan(), other.isnan())


@by_cuda
@pytest.mark.parametrize("hidden", [4, 20])
def test_cuda_opcheck(hidden: int) -> None:
    grad, state, weights = moved(skewed_inputs(5, 2, hidden, torch.float32), "cuda")
    lists, none = [[t] for t in (grad.clone(), grad, *state)], (None, [], 0, [])
    torch.library.opcheck(
        torch.ops.amalgam.student_step_.default,
        (*lists, weights, *SETTINGS, 1.0, 0.0, *none, "cuda"),
    )


@by_cuda
def test_cuda_auto_takes_what_is_compiled_in_and_triton_the_rest() -> None:
    for hidden, expected in ((4, "cuda"), (20, "cuda"), (5, "triton")):
        grad, state, weights = moved(skewed_inputs(5, 2, hidden, torch.float32), "cuda")
        tensors = ([grad], [grad], *([t] for t in state), weights)
        assert registry.resolve("student_step_", "auto", state.m, *tensors) == expected
        student_step_([grad.clone()], [grad], [state], weights)
    with pytest.raises(RuntimeError, match=r"1x4.*, this one is 2x5; backend='triton'"):
        student_step_([grad.clone()], [grad], [state], weights, backend="cuda")


@by_cuda
def test_cuda_leaves_products_in_float32_to_triton() -> None:
    for hidden, expected in ((4, "cuda:ieee"), (20, "triton:ieee")):
        grad, state, weights = moved(skewed_inputs(5, 2, hidden, torch.float32), "cuda")
        tensors = ([grad], [grad], *([t] for t in state), weights)
        assert registry.resolve("student_step_", "auto:ieee", state.m, *tensors) == expected
    with pytest.raises(RuntimeError, match="products on tensor cores, backend='triton:ieee'"):
        student_step_([grad.clone()], [grad], [state], weights, backend="cuda:ieee")


@pytest.mark.parametrize(
    ("permitted", "of_float32", "of_bfloat16"),
    [
        ("", "3xtf32", "3xtf32"),
        ("approximate", "3xtf32", "3xtf32"),
        ("3xtf32,approximate", "3xtf32", "3xtf32"),
        ("tf32", "tf32", "tf32"),
        ("tf32,approximate", "tf32,approximate", "tf32"),
        ("bf16", "tf32", "tf32"),
        ("bf16,approximate", "tf32,approximate", "bf16,approximate"),
    ],
)
def test_cuda_makes_of_permissions_what_is_fastest(
    permitted: str, of_float32: str, of_bfloat16: str
) -> None:
    from amalgam.backends import core, cuda

    module, _ = core.load()
    if module is None or module.cuda is None:
        pytest.skip("the core here has no CUDA kernels")
    numerics = registry._parse(f"cuda:{permitted}")[1]
    for cells, expected in ((torch.float32, of_float32), (torch.bfloat16, of_bfloat16)):
        for aligned, computed in ((True, expected), (False, "3xtf32")):
            found = cuda._numerics_of(2, 20, cells, aligned, numerics)
            assert found == registry._parse(f"cuda:{computed}")[1]


@by_cuda
@pytest.mark.parametrize("cells", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("permitted", "bound"),
    [("3xtf32", 1e-5), ("tf32", 5e-3), ("bf16", 5e-2), ("tf32,approximate", 1e-2)]
    + [("bf16,approximate", 5e-2)],
)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("size", [3001, 3008])
def test_cuda_errs_no_more_than_permitted(
    size: int, layers: int, permitted: str, bound: float, cells: torch.dtype
) -> None:
    """Of states and updates in [-1, 1], after ten steps; and cells as they are stored."""
    grad, start, weights = skewed_inputs(size, layers, 20, torch.float32)
    start = start._replace(h=start.h.to(cells), c=start.c.to(cells))
    if cells == torch.bfloat16:
        bound += 10 * torch.finfo(cells).eps
    results = []
    for backend, dtype in ((f"cuda:{permitted}", torch.float32), ("reference", torch.float64)):
        state = moved(start, "cuda")
        if backend == "reference":
            state = StudentState(*(t.to(dtype) for t in state))
        param = torch.zeros(size, dtype=dtype, device="cuda")
        for _ in range(10):
            student_step_(
                [param],
                [grad.cuda().to(dtype)],
                [state],
                [w.cuda().to(dtype) for w in weights],
                backend=backend,
            )
        results.append((param, state.h.double()))
    (param, h), (true_param, true_h) = results
    assert (10 * (param - true_param)).abs().max() <= 10 * bound
    assert (h - true_h).abs().max() <= bound


@by_cuda
@pytest.mark.parametrize("cells", [torch.float32, torch.bfloat16])
def test_cuda_steps_tensors_of_many_sizes_at_once(cells: torch.dtype) -> None:
    """As each of them by itself: more tiles than warps, and many tensors in one warp's walk."""
    sizes = [1 << 19, 64, *range(1, 200), 8, 1 << 18, 100003, *range(8, 1600, 8)]
    weights = moved(make_weights(2, 20, dtype=torch.float32), "cuda")
    params = [draw(n, seed=1).float().cuda() for n in sizes]
    states = []
    for n in sizes:
        state = moved(make_state(n, hidden=20, dtype=torch.float32), "cuda")
        states.append(state._replace(h=state.h.to(cells), c=state.c.to(cells)))
    alone = [p.clone() for p in params], [copied(state) for state in states]
    student_step_(params, [p * 2 for p in params], states, weights, backend="cuda")
    for param, state in zip(*alone, strict=True):
        student_step_([param], [param * 2], [state], weights, backend="cuda")
    assert all(map(torch.equal, flat((params, states)), flat(alone)))


def step_in_place(
    grad: Tensor, m: Tensor, v: Tensor, h: Tensor, c: Tensor, weights: list[Tensor], backend: str
) -> tuple[Tensor, ...]:
    """A step of parameters that are zero: they become the update, negated."""
    param, state = torch.zeros_like(grad), StudentState(m.clone(), v.clone(), h.clone(), c.clone())
    student_step_([param], [grad], [state], weights, SETTINGS, backend=backend)
    return param, *state


def cuda_kernels(name: str) -> tuple[int, dict[tuple[str, str], tuple[int, int]]]:
    """For how many architectures the core has kernels, and what those of this name take."""
    pytest.importorskip("triton")
    from amalgam.backends import core

    module, _ = core.load()
    if module is None or module.cuda is None:
        pytest.skip("the core here has no CUDA kernels")
    usage = resource_usage(Path(module.__file__))
    found = {kernel: costs for kernel, costs in usage.items() if name in kernel[1]}
    return len(module.cuda.archs.split(";")), found


def test_cuda_kernels_keep_to_registers() -> None:
    """A few bytes of stack at most, and so many warps a processor as their launches want."""
    archs, kernels = cuda_kernels("student_threads")
    assert len(kernels) == 30 * archs
    for name, (registers, stack) in kernels.items():
        assert registers <= 168, (name, registers)
        assert stack <= 24, (name, stack)


def test_cuda_kernels_on_tensor_cores_keep_to_registers() -> None:
    """What little does not fit is spilled once a tile."""
    archs, kernels = cuda_kernels("student_tiles")
    assert len(kernels) == 2 * (4 + 7) * archs
    for name, (_, stack) in kernels.items():
        assert stack <= TILES_STACK.get(name[0], 600), (name, stack)


# Budgets: what a thread and a coordinate of each kernel cost, from the machine code.

FLOATS = ("alpha", "beta1", "beta2", "one_minus_beta1", "one_minus_beta2", "eps", "keep", "lr")
TYPES = {
    **dict.fromkeys(FLOATS, "fp32"),
    **dict.fromkeys(("n", "blocks", "size", "count", "depth", "warmup_steps"), "i32"),
    **{"table": "*i64", "first_block": "*i64", "partials": "*fp64", "control": "*fp64"},
}
BUDGETS = json.loads((Path(__file__).parent / "budgets_student_step.json").read_text())


def types_of(numerics: str) -> dict[str, str]:
    """Arguments' types; with bfloat16 products, the weights' other form is in it."""
    return TYPES | ({"other": "*bf16"} if numerics.startswith("bf16") else {})


OPERATIONS = {
    "forward": "student_step",
    "in_place": "student_step_",
    "backward": "student_step_backward",
}


def triton_constants(
    name: str, student: str, cells: str, numerics: str, ptx: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and options of a student "LAYERSxHIDDEN"; "stochastic" numerics round so."""
    import triton.language as tl

    from amalgam.kernels import lstm_weights
    from amalgam.kernels.configurations import configuration

    stochastic = numerics.endswith(",stochastic")
    permitted = registry._parse(f"auto:{numerics.removesuffix(',stochastic')}")[1]
    layers, hidden = map(int, student.split("x"))
    plan = lstm_weights.packing(layers, hidden, 2, 1, torch.device("cpu"))
    chosen = configuration(OPERATIONS[name], layers, hidden, permitted.precision)
    types = {"float32": tl.float32, "bfloat16": tl.bfloat16}
    constants = {
        **{"LAYERS": layers, "HIDDEN": hidden, "FEATURES": 2, "BLOCK": chosen.block},
        **{"UNITS": plan.units, "FOLDED": plan.folded, "WIDE": False, "PTX": ptx},
        **{"PARAM": tl.float32, "GRAD": tl.float32, "CELLS": types[cells], "ALIGNED": True},
        **{"PRECISION": permitted.precision, "APPROXIMATE": permitted.approximate},
        **{"CONTROL": stochastic, "STOCHASTIC": stochastic},
        **({} if stochastic else {"control": None}),
    }
    return constants, chosen.options


@pytest.mark.skipif(triton.INTERPRETING, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("case", BUDGETS)
def test_kernels_keep_to_their_budgets(case: str) -> None:
    """No register spilled beyond the table, tensor cores and wide accesses used, no more work."""
    pytest.importorskip("triton")
    from amalgam.kernels import student_step, student_step_in_place

    name, arch, student, cells, numerics = case.split()
    kernels = student_step_in_place if name == "in_place" else student_step
    constants, options = triton_constants(name, student, cells, numerics)
    number = int(arch.removeprefix("sm_"))
    divisible = name != "in_place"
    costs = costs_of(
        getattr(kernels, name), number, types_of(numerics), constants, options, divisible
    )
    assert_within(costs, BUDGETS[case])


@pytest.mark.skipif(triton.INTERPRETING, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("numerics", ["3xtf32", "bf16,approximate"])
def test_what_a_step_overwrites_all_threads_have_read(numerics: str) -> None:
    """On a GPU, where several warps load the same moments, a slow one read the new ones."""
    pytest.importorskip("triton")
    from amalgam.kernels import student_step_in_place as kernels

    constants, options = triton_constants("in_place", "2x20", "float32", numerics)
    code = compile_kernel(kernels.in_place, 90, types_of(numerics), constants, False, options)
    assert code.stores_behind_loads() == 0


@pytest.mark.skipif(triton.INTERPRETING, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("student", ["2x20", "1x4"])
def test_kernels_compile_for_amd(student: str) -> None:
    """Without PTX, and with matrix instructions where they are meant."""
    pytest.importorskip("triton.backends.amd")
    from amalgam.kernels import student_step_in_place as kernels

    numerics = "bf16,approximate,stochastic"
    constants, options = triton_constants("in_place", student, "bfloat16", numerics, ptx=False)
    assembly = amd_assembly(kernels.in_place, "gfx942", types_of(numerics), constants, options)
    assert ("v_mfma" in assembly) == (student == "2x20")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_steps_into_memory_that_is_there(backend: str) -> None:
    """As the functional form, out of place, in the old state's place, and backwards in place."""
    generator = torch.Generator().manual_seed(5)
    n, settings = 130, StepSettings()
    weights = [w.detach() for w in Student(StudentConfig(hidden=6)).double().weights()]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    grad = draw(n)
    state = StudentState(draw(n), draw(n).square(), draw(2, 6, n).tanh(), draw(2, 6, n))
    update, new = student_step(grad, state, weights, settings, backend=backend)
    apart = StudentState(*(t * math.nan for t in state))
    same = StudentState(*(t.clone() for t in state))
    for target, source in ((apart, state), (same, same)):
        moved = torch.empty_like(grad)
        step_into((moved, *target), grad, source, weights, settings, backend)
        assert torch.equal(moved, update)
        assert all(map(torch.equal, target, new))

    leaves = [t.clone().requires_grad_() for t in (grad, *state, *weights)]
    outs = student_step(
        leaves[0], StudentState(*leaves[1:5]), leaves[5:], settings, backend=backend
    )
    d_update, d_state = draw(n), StudentState(draw(n), draw(n), draw(2, 6, n), draw(2, 6, n))
    expected = torch.autograd.grad([outs[0], *outs[1]], leaves, [d_update, *d_state])
    d_old = StudentState(*(t.clone() for t in d_state))
    d_grad, d_weights = backward_into(d_update, d_old, grad, state, weights, settings, backend)
    for ours, theirs in zip((d_grad, *d_old, *d_weights), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_memory_to_write_to_is_checked() -> None:
    weights = [w.detach() for w in Student(StudentConfig(hidden=6)).weights()]
    grad = torch.zeros(8)
    state = initial_state(grad, weights)
    twice = state._replace(v=state.m)
    with pytest.raises(ValueError, match="share memory"):
        step_into((torch.empty(8), *twice), grad, state, weights, StepSettings(), "cpu")
    with pytest.raises(ValueError, match="must have shape"):
        step_into((torch.empty(9), *state), grad, state, weights, StepSettings(), "cpu")
