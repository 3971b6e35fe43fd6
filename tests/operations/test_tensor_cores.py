"""The Triton kernels by a GPU's arithmetic: on one, or as ``tests/tensor_cores.py`` computes it."""

import math
from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate, flat
from places import by_triton
from student_cases import SETTINGS, draw, errors_of_ten_steps, moved, skewed_inputs
from test_choice_step import skewed_arguments
from torch import Tensor

from amalgam.ops import StudentState, student_step_

PERMITTED = ["3xtf32", "tf32", "bf16", "tf32,approximate"]
student = torch.ops.amalgam.student_step
choice = torch.ops.amalgam.choice_step


@pytest.fixture
def arithmetic(device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device; where kernels are interpreted, they compute as on NVIDIA's GPUs."""
    if device == "cpu":
        import tensor_cores

        tensor_cores.install(monkeypatch)
    return device


def in_place(param: Tensor, grad: Tensor, *rest: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The functional form of ``student_step_``, of one tensor: the new parameter and state."""
    m, v, h, c, weights, backend = rest
    moving, state = param.clone(), StudentState(*(t.clone() for t in (m, v, h, c)))
    student_step_([moving], [grad], [state], weights, SETTINGS, lr=0.5, backend=backend)
    return moving, tuple(state)


@by_triton
@pytest.mark.parametrize(("layers", "hidden", "size"), [(2, 20, 64), (1, 33, 31), (1, 4, 63)])
def test_triton_student_errs_as_float32_does(
    arithmetic: str, size: int, layers: int, hidden: int
) -> None:
    forward, backward, moving = [], [], []
    for seed in range(4):
        grad, state, weights = skewed_inputs(size, layers, hidden, torch.float32, seed)
        upstream = [draw(*t.shape, seed=seed + 9, dtype=torch.float32) for t in (grad, *state)]
        forward.append(moved((grad, *state, weights, *SETTINGS), arithmetic))
        backward.append((moved(upstream, arithmetic), *forward[-1]))
        param = moved(draw(size, seed=seed, dtype=torch.float32), arithmetic)
        moving.append((param, *forward[-1][:6]))
    assert_as_accurate(student, forward, "triton:3xtf32")
    assert_as_accurate(torch.ops.amalgam.student_step_backward, backward, "triton:3xtf32")
    assert_as_accurate(in_place, moving, "triton:3xtf32")


@by_triton
@pytest.mark.parametrize(
    ("layers", "hidden", "k", "size"), [(2, 20, 2, 70), (2, 20, 6, 65), (1, 4, 1, 33)]
)
def test_triton_choice_errs_as_float32_does(
    arithmetic: str, size: int, layers: int, hidden: int, k: int
) -> None:
    forward, backward = [], []
    for seed in range(8 if k == 6 else 4):
        drawn = skewed_arguments(size, layers, hidden, k, torch.float32, seed)
        arguments, upstream = moved(drawn, arithmetic)
        forward.append(arguments)
        backward.append((upstream, *arguments))
    assert_as_accurate(choice, forward, "triton:3xtf32")
    assert_as_accurate(torch.ops.amalgam.choice_step_backward, backward, "triton:3xtf32")


@by_triton
@pytest.mark.parametrize(
    ("permitted", "bound"),
    [("3xtf32", 1e-5), ("tf32", 5e-3), ("bf16", 5e-2), ("tf32,approximate", 1e-2)],
)
def test_triton_errs_no_more_than_permitted(arithmetic: str, permitted: str, bound: float) -> None:
    errors = errors_of_ten_steps(f"triton:{permitted}", arithmetic, 64)
    assert max(errors) <= bound, errors


LARGEST = torch.finfo(torch.float32).max


def assert_ill_alone(
    ours: list[Tensor], plain: list[Tensor], ill: list[int], size: int, bound: float
) -> None:
    """NaN comes out where the reference's does; of ill coordinates numbers are right or NaN.

    Infinity becomes NaN in matrix products: padding multiplies it by zero.
    """
    well = [place for place in range(size) if place not in ill]
    for one, other in zip(ours, plain, strict=True):
        assert not (other.isnan() & ~one.isnan()).any()
        both = one.isfinite() & other.isfinite()
        torch.testing.assert_close(one[both], other[both], rtol=bound, atol=bound)
        if one.shape[-1] == size:
            assert torch.equal(one[..., well].isfinite(), other[..., well].isfinite())


def fall_ill(grad: Tensor, h: Tensor, c: Tensor) -> list[int]:
    """Put NaN, infinities and the largest numbers in, and return their coordinates."""
    grad[3], c[0, 0, 66], h[-1, 2, 50] = [math.nan] * 3
    grad[5], h[0, 1, 17], h[0, 3, 31], c[0, 4, 12] = math.inf, math.inf, -math.inf, -math.inf
    h[0, 2, 40], h[-1, 5, 60] = LARGEST, -LARGEST
    return [3, 66, 50, 5, 17, 31, 12, 40, 60]


@by_triton
@pytest.mark.parametrize("permitted", PERMITTED)
def test_triton_student_lets_nan_out(arithmetic: str, permitted: str) -> None:
    grad, state, weights = skewed_inputs(70, 2, 20, torch.float32)
    ill, bound = fall_ill(grad, state.h, state.c), 1e-4 if permitted == "3xtf32" else 0.1
    upstream = [draw(*t.shape, seed=9, dtype=torch.float32) for t in (grad, *state)]
    arguments = moved((grad, *state, weights, *SETTINGS), arithmetic)
    param = torch.ones_like(arguments[0])
    both = []
    for backend in (f"triton:{permitted}", "reference"):
        moving = in_place(param, *arguments[:6], backend)
        both.append(flat((student(*arguments, backend), moving)))
    assert_ill_alone(*both, ill, 70, bound)
    backward = torch.ops.amalgam.student_step_backward
    both = [
        flat(backward(moved(upstream, arithmetic), *arguments, backend))
        for backend in (f"triton:{permitted}", "reference")
    ]
    for one, other in zip(*both, strict=True):
        assert not (other.isnan() & ~one.isnan()).any()


@by_triton
@pytest.mark.parametrize("permitted", PERMITTED)
def test_triton_choice_lets_nan_out(arithmetic: str, permitted: str) -> None:
    drawn, _ = skewed_arguments(70, 2, 20, 2, torch.float32)
    ill, bound = fall_ill(drawn[0], *drawn[3:5]), 1e-4 if permitted == "3xtf32" else 0.1
    drawn[1][1, 44] = drawn[2][0, 55] = math.nan
    arguments = moved(drawn, arithmetic)
    both = [flat(choice(*arguments, name)) for name in (f"triton:{permitted}", "reference")]
    assert_ill_alone(*both, [*ill, 44, 55], 70, bound)


@by_triton
@pytest.mark.parametrize("permitted", PERMITTED)
def test_triton_lets_nan_of_weights_out(arithmetic: str, permitted: str) -> None:
    grad, state, weights = moved(skewed_inputs(33, 2, 20, torch.float32), arithmetic)
    for index in range(len(weights)):
        changed = [w.clone() for w in weights]
        changed[index].view(-1)[0] = math.nan
        arguments = (grad, *state, changed, *SETTINGS)
        ours, plain = (flat(student(*arguments, b)) for b in (f"triton:{permitted}", "reference"))
        for one, other in zip(ours, plain, strict=True):
            assert torch.equal(one.isnan(), other.isnan())
