"""What Python passes to the core's CUDA functions: they take it, and fail where no GPU is."""

import contextlib
import dataclasses
from collections.abc import Callable

import pytest
import torch

from amalgam.backends import core, cuda
from amalgam.operations import registry
from amalgam.ops import (
    KINDS,
    ChoiceSettings,
    ChoiceState,
    StepSettings,
    StudentState,
    choice_step,
    sign_agreements,
    student_step,
    student_step_,
    student_unroll_backward,
    teacher_distance,
    teacher_step,
)


def _nominal(steps: int | None = None) -> tuple[torch.Tensor, StudentState, list, StepSettings]:
    several = () if steps is None else (steps,)
    state = StudentState(torch.ones(5), torch.ones(5), *(torch.zeros(1, 4, 5) for _ in "hc"))
    weights = [torch.ones(16, 3), torch.ones(16, 4), torch.ones(*several, 1, 16)]
    weights += [torch.ones(2, 4), torch.ones(2)]
    settings = StepSettings(corrections=torch.ones(*several, 1, 3), sizes=[5])
    return torch.ones(*several, 5), state, weights, settings


def _teachers() -> None:
    inputs = [torch.ones(8, 3) for _ in range(3)]
    teacher_step(*inputs, KINDS, *([0.5] * 8 for _ in range(4)), backend="cuda")


def _teacher_gradients() -> None:
    inputs = [torch.ones(8, 3) for _ in range(3)]
    numbers = list(range(8)), *([0.5] * 8 for _ in range(4))
    torch.ops.amalgam.teacher_step_backward(inputs, *inputs, *numbers, "cuda")


def _functional() -> None:
    grad, state, weights, settings = _nominal()
    student_step(grad, state, weights, settings, backend="cuda")


def _gradients() -> None:
    grad, state, weights, settings = _nominal()
    upstream = [torch.ones_like(tensor) for tensor in (grad, *state)]
    torch.ops.amalgam.student_step_backward(upstream, grad, *state, weights, *settings, "cuda")


def _unroll() -> None:
    grads, state, weights, settings = _nominal(2)
    student_unroll_backward(grads, grads, state, weights, settings, backend="cuda")


def _in_place() -> None:
    grad, state, weights, settings = _nominal()
    settings = settings._replace(sizes=[])
    student_step_([grad.clone()], [grad], [state], weights, settings, backend="cuda")


def _in_place_rnnprop() -> None:
    grad, state, _, _ = _nominal()
    weights = [
        torch.ones(16, 2),
        torch.ones(16, 4),
        torch.ones(16),
        torch.ones(1, 4),
        torch.ones(1),
    ]
    student_step_([grad.clone()], [grad], [state], weights, backend="cuda")


def _choice() -> tuple[ChoiceState, list[torch.Tensor], ChoiceSettings]:
    state = ChoiceState(torch.ones(2, 5), torch.ones(2, 5), *(torch.zeros(1, 4, 5) for _ in "hc"))
    weights = [torch.ones(*shape) for shape in ((16, 6), (16, 4), (16,), (2, 4), (2,))]
    return state, weights, ChoiceSettings(KINDS[:2], *([0.5] * 2 for _ in range(4)))


def _choices() -> None:
    state, weights, settings = _choice()
    ranks = torch.ones(5, dtype=torch.int64)
    choice_step(torch.ones(5), state, weights, ranks, settings, backend="cuda")


def _choice_gradients() -> None:
    (*state, _), weights, settings = _choice()
    inputs = torch.ones(5), *state, weights, torch.ones(5, dtype=torch.int64)
    upstream = [torch.ones(5), *state, state[0]]
    constants = *settings.pool(), 0, 1.0, 1.0
    torch.ops.amalgam.choice_step_backward(upstream, *inputs, *constants, "cuda")


def _distance() -> None:
    teacher_distance(torch.ones(3), torch.ones(2, 3), backend="cuda")


def _signs() -> None:
    sign_agreements([torch.ones(3)], [torch.ones(3)], backend="cuda")


@pytest.mark.parametrize(
    "operation",
    [
        *(_teachers, _teacher_gradients, _functional, _gradients, _unroll),
        *(_in_place, _in_place_rnnprop, _choices, _choice_gradients, _distance, _signs),
    ],
)
def test_functions_take_what_they_are_passed(
    operation: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = core.core()
    if module.cuda is None or torch.cuda.is_available():
        pytest.skip("needs a core with CUDA on a machine without a GPU")
    here = dataclasses.replace(
        cuda.backend, rank=-20, devices=frozenset({"cpu"}), probe=lambda: None
    )
    monkeypatch.setitem(registry._backends, "cuda", here)
    monkeypatch.setattr(cuda, "place_of", lambda _tensor: {"device": 0, "stream": 0})
    monkeypatch.setattr(torch.cuda, "device", lambda _device: contextlib.nullcontext())
    with pytest.raises(RuntimeError, match=r"CUDA error \d+ \(cuda\w+\): "):
        operation()
