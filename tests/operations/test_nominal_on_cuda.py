"""The nominal form's functional step and its gradients by CUDA, on GPUs and on the host."""

import math

import pytest
import torch
from accuracy import assert_as_accurate, flat
from nominal_cases import (
    F32,
    check_symmetries,
    corrections_of,
    cut,
    drawn,
    nominal_settings,
    nominal_weights,
    skewed_nominal,
)
from places import ON_HOST, at, on_gpus
from student_cases import SETTINGS, as_students, draw, make_state, moved
from torch import Tensor

from amalgam.backends import nominal_on_cuda
from amalgam.operations.student_step import backward_into, step_into
from amalgam.ops import StepSettings, StudentState, student_unroll_backward

FORWARD, BACKWARD = torch.ops.amalgam.student_step, torch.ops.amalgam.student_step_backward
UNROLL = torch.ops.amalgam.student_unroll_backward

somewhere = at(*on_gpus("cuda"), *ON_HOST)


@somewhere
@pytest.mark.parametrize(("hidden", "size"), [(4, 63), (8, 130)])
def test_step_and_gradients_err_as_float32_does(
    backend: str, device: str, size: int, hidden: int
) -> None:
    draws = [drawn(device, 1, hidden, size, seed) for seed in range(24)]
    steps, backward = zip(*draws, strict=True)
    assert_as_accurate(FORWARD, steps, backend)
    assert_as_accurate(BACKWARD, backward, backend)


@somewhere
@pytest.mark.parametrize("hidden", [4, 8])
def test_warps_share_tensors_and_tensors_warps(backend: str, device: str, hidden: int) -> None:
    """Tensors of no coordinates, of part of a tile, and of tiles of several warps."""
    sizes = [0, 930, 5, 0, 33, 1000, 0]
    draws = []
    for seed in range(2):
        grad, state, _, _ = skewed_nominal(sum(sizes), 1, hidden, F32, seed)
        upstream = [draw(*t.shape, seed=seed + 9, dtype=F32) for t in (grad, *state)]
        settings = nominal_settings(sizes, F32)
        settings = settings._replace(corrections=moved(settings.corrections, device))
        weights = nominal_weights(len(sizes), hidden=hidden, dtype=F32)
        draws.append((*moved((upstream, grad, *state, weights), device), *settings))
    assert_as_accurate(BACKWARD, draws, backend)
    twice = [flat(BACKWARD(*draws[0], backend)) for _ in range(2)]
    assert all(map(torch.equal, *twice))


def unrolled(
    device: str, steps: int, sizes: list[int], hidden: int, seed: int
) -> tuple[Tensor, Tensor, StudentState, list[Tensor], StepSettings]:
    """Arguments of an unroll, in which every step has biases and corrections of its own."""
    n = sum(sizes)
    _, state, _, _ = skewed_nominal(n, 1, hidden, F32, seed)
    weights = nominal_weights(len(sizes), hidden=hidden, dtype=F32)
    weights[2] = draw(steps, len(sizes), 4 * hidden, seed=seed, dtype=F32)
    counts = [[t + 1 + 3 * i for i in range(len(sizes))] for t in range(steps)]
    corrections = torch.stack([corrections_of(of_step, F32) for of_step in counts])
    grads, adjoints = (draw(steps, n, seed=seed + i, dtype=F32) for i in (5, 6))
    settings = nominal_settings(sizes, F32)._replace(corrections=moved(corrections, device))
    return *moved((grads, adjoints, state, weights), device), settings


@somewhere
@pytest.mark.parametrize("affordable", [1, 1 << 30])
@pytest.mark.parametrize(("hidden", "steps"), [(4, 5), (8, 2)])
def test_unrolls_are_differentiated_in_one_pass(
    backend: str,
    device: str,
    steps: int,
    hidden: int,
    affordable: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By as few warps as there is memory for, and by more."""
    monkeypatch.setattr(nominal_on_cuda, "HELD", affordable)
    draws = []
    for seed in range(8):
        grads, adjoints, state, weights, settings = unrolled(
            device, steps, [100, 0, 35], hidden, seed
        )
        draws.append((grads, adjoints, *state, weights, *settings))
    assert_as_accurate(UNROLL, draws, backend)


@somewhere
def test_unrolls_read_columns_where_they_lie(backend: str, device: str) -> None:
    grads, adjoints, *rest = unrolled(device, 3, [20, 30], 4, 0)
    expected = student_unroll_backward(grads, adjoints, *rest, backend=backend)
    wide = [torch.full((3, 60), math.nan, device=device) for _ in range(2)]
    for tensor, part in zip(wide, (grads, adjoints), strict=True):
        tensor[:, 7:57] = part
    columns = [tensor[:, 7:57] for tensor in wide]
    found = student_unroll_backward(*columns, *rest, backend=backend)
    assert all(map(torch.equal, found, expected))


@somewhere
@pytest.mark.parametrize(("steps", "sizes"), [(0, [20, 30]), (2, [0, 0])])
def test_nothing_unrolled_has_no_gradient(
    backend: str, device: str, steps: int, sizes: list[int]
) -> None:
    *arguments, settings = (
        unrolled(device, 2, sizes, 4, 0) if steps else unrolled(device, 1, sizes, 4, 0)
    )
    grads, adjoints, state, weights = arguments
    if not steps:
        grads, adjoints = grads[:0], adjoints[:0]
        weights[2] = weights[2][:0]
        settings = settings._replace(corrections=settings.corrections[:0])
    found = student_unroll_backward(grads, adjoints, state, weights, settings, backend=backend)
    for gradient, weight in zip(found, weights, strict=True):
        assert gradient.shape == weight.shape
        assert not gradient.any()


@somewhere
def test_steps_and_gradients_go_where_their_inputs_lie(backend: str, device: str) -> None:
    step, (upstream, *_) = drawn(device, 1, 4, 70, 0)
    grad, m, v, h, c, weights, *rest = step
    settings = StepSettings(*rest)
    update, *expected = FORWARD(*step, backend)
    state = StudentState(*(t.clone() for t in (m, v, h, c)))
    found = torch.full_like(update, math.nan)
    step_into(*as_students(found, state, grad, state, weights, settings), backend)
    assert all(map(torch.equal, (found, *state), (update, *expected)))
    d_grad, *d_old = BACKWARD(upstream, *step, backend)
    d_state = StudentState(*(t.clone() for t in upstream[1:]))
    old = StudentState(m, v, h, c)
    given = as_students(upstream[0], d_state, grad, old, weights, settings)
    in_grad, in_weights = backward_into(*given, backend)
    found = in_grad[0], d_state, [weight[0] for weight in in_weights]
    assert all(map(torch.equal, flat(found), flat((d_grad, d_old))))


@somewhere
def test_functional_steps_keep_the_symmetries_to_the_bit(backend: str, device: str) -> None:
    check_symmetries(backend, device, 4, in_place=False)


@somewhere
def test_nan_passes_on_where_the_references_does(backend: str, device: str) -> None:
    (grad, m, v, h, c, *rest), (upstream, *_) = drawn(device, 1, 4, 70, 0)
    grad[3], grad[5], c[0, 0, 66], m[8] = math.nan, math.inf, math.nan, math.nan
    step = grad, m, v, h, c, *rest
    for operation, arguments in ((FORWARD, step), (BACKWARD, (upstream, *step))):
        both = [flat(operation(*arguments, name)) for name in (backend, "reference")]
        for one, other in zip(*both, strict=True):
            assert torch.equal(one.isnan(), other.isnan())


@at(*ON_HOST)
@pytest.mark.parametrize(
    ("layers", "hidden", "nominal", "reason"),
    [
        (1, 16, True, "students of 1x4, 1x8"),
        (2, 4, True, "students of 1x4, 1x8"),
        (1, 4, False, "the nominal form alone functionally"),
    ],
)
def test_what_has_no_functional_kernel_is_left_to_triton(
    backend: str, device: str, layers: int, hidden: int, nominal: bool, reason: str
) -> None:
    state = make_state(5, layers=layers, hidden=hidden, dtype=F32)
    settings = nominal_settings(cut(5), F32) if nominal else SETTINGS
    problem = nominal_on_cuda.accepts(state.m, state, [], settings)
    assert problem
    assert reason in problem
    assert "backend='triton' computes" in problem
