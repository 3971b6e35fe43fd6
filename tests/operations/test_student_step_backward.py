"""``student_step_backward``, by hand and compiled, against autograd through the reference."""

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
    make_state,
    make_weights,
    op_arguments,
    skewed_inputs,
    through_op,
    wanting,
)
from torch import Tensor

from amalgam.ops import (
    StepSettings,
    StudentState,
    initial_state,
    student_step,
)

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


def test_unused_outputs_and_inputs_without_gradient() -> None:
    weights, state, grad = make_weights(), make_state(5), draw(5)
    (weight,) = wanting(weights[1])
    changed = [weights[0], weight, *weights[2:]]
    (hand,) = torch.autograd.grad(through_op(grad, state, changed)[0].sum(), weight)
    (theirs,) = torch.autograd.grad(direct(grad, state, changed)[0].sum(), weight)
    assert torch.allclose(hand, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("size", [0, 3])
def test_opcheck_backward(size: int) -> None:
    arguments = op_arguments(size, False)
    grads_out = [draw(*t.shape, seed=7) for t in arguments[:5]]
    torch.library.opcheck(torch.ops.amalgam.student_step_backward, (grads_out, *arguments))


@compiled
def test_compiled_weight_gradients_of_many_coordinates(backend: str) -> None:
    draws = []
    for seed in range(3):
        grad, state, weights = skewed_inputs(2**16 + 1, 2, 20, torch.float32, seed)
        upstream = [draw(*t.shape, seed=seed + 9, dtype=torch.float32) for t in (grad, *state)]
        draws.append((upstream, grad, *state, weights, *SETTINGS))
    assert_as_accurate(torch.ops.amalgam.student_step_backward, draws, backend)


@compiled_once
@pytest.mark.parametrize(("layers", "hidden"), [(1, 3), (2, 2)])
def test_compiled_gradcheck(backend: str, layers: int, hidden: int) -> None:
    state = make_state(3, layers=layers, hidden=hidden)
    inputs = wanting(draw(3), *state, *make_weights(layers, hidden))

    def step(*inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.amalgam.student_step(*inputs[:5], list(inputs[5:]), *SETTINGS, backend)

    assert torch.autograd.gradcheck(step, inputs)


@compiled
def test_differentiating_twice_is_refused(backend: str) -> None:
    inputs = wanting(draw(3), *make_state(3))
    update, _ = student_step(inputs[0], StudentState(*inputs[1:]), make_weights(), backend=backend)
    (grad,) = torch.autograd.grad(update.sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once.*backend='reference'"):
        torch.autograd.grad(grad.sum(), inputs[0])


@compiled
@pytest.mark.parametrize("beta2", [0.99, 0.0])
def test_compiled_without_eps(backend: str, beta2: float) -> None:
    """Lanes after the last coordinate once held 0 / 0: no test had eps = 0 and a partial tile."""
    grad, state, weights = draw(5), make_state(5), make_weights()
    upstream = [draw(*t.shape, seed=9) for t in (grad, *state)]
    arguments = (upstream, grad, *state, weights, *StepSettings(0.1, 0.9, beta2, 0.0))
    operation = torch.ops.amalgam.student_step_backward
    for ours, expected in zip(
        flat(operation(*arguments, backend)), flat(operation(*arguments, "reference")), strict=True
    ):
        torch.testing.assert_close(ours, expected)
