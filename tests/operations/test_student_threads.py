"""The student's step in place by CUDA's threads, on a GPU and compiled for the host."""

import math
import re
from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate, flat
from nominal_cases import (
    BF16,
    F32,
    check_rounding,
    check_still,
    check_symmetries,
    many_tensors,
    skewed_nominal,
)
from places import ON_HOST, at, on_gpus
from student_cases import (
    check_control,
    check_in_place,
    check_rounding_by_seeds,
    moved,
    skewed_inputs,
    step_in_place,
)
from torch import Tensor

from amalgam.backends import student_step_in_place
from amalgam.operations.registry import Numerics
from amalgam.operations.student_step_in_place import InPlaceStep, StudentTensors
from amalgam.ops import StepSettings, StudentState, student_step_

somewhere = at(*on_gpus("cuda"), *ON_HOST)


def nominal_in_place(grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """One nominal step of parameters that are zero: they become the update, negated."""
    m, v, h, c, weights, *settings, backend = rest
    param, state = torch.zeros_like(grad), StudentState(*(t.clone() for t in (m, v, h, c)))
    student_step_([param], [grad], [state], weights, StepSettings(*settings), backend=backend)
    return param, *state


def nominal_draw(device: str, hidden: int, size: int, seed: int) -> tuple[Any, ...]:
    """Arguments of ``nominal_in_place`` but the backend."""
    grad, state, weights, settings = skewed_nominal(size, 1, hidden, F32, seed)
    assert settings.corrections is not None
    weights[2] = weights[2][:1]
    drawn = moved((grad, *state, weights, settings.corrections[:1]), device)
    return (*drawn[:-1], *settings.constants, drawn[-1], [])


@somewhere
@pytest.mark.parametrize("hidden", [4, 8, 16])
@pytest.mark.parametrize("cells", [F32, BF16])
def test_the_nominal_form_is_the_references(
    backend: str, device: str, cells: torch.dtype, hidden: int
) -> None:
    """Parameters of two dtypes go by two launches, each of which finds its own tensors' biases."""
    both = []
    for name in (backend, "reference"):
        *tensors, weights, settings = many_tensors(
            device, "nominal", cells, cells, [F32, BF16], hidden
        )
        for _ in range(2):
            student_step_(*tensors, weights, settings, lr=0.5, weight_decay=0.01, backend=name)
        both.append(flat((tensors[0], tensors[2])))
    for one, other in zip(*both, strict=True):
        eps = torch.finfo(BF16).eps if BF16 in (one.dtype, cells) else 2e-6
        assert one.dtype == other.dtype
        torch.testing.assert_close(one.float(), other.float(), rtol=2 * eps, atol=eps)


@somewhere
@pytest.mark.parametrize(("hidden", "size"), [(4, 63), (8, 64), (16, 33)])
def test_the_nominal_form_errs_as_float32_does(
    backend: str, device: str, size: int, hidden: int
) -> None:
    draws = [nominal_draw(device, hidden, size, seed) for seed in range(8)]
    assert_as_accurate(nominal_in_place, draws, backend)


@somewhere
def test_the_nominal_form_approximates(backend: str, device: str) -> None:
    draw = nominal_draw(device, 8, 64, 0)
    ours, plain = (nominal_in_place(*draw, n) for n in (f"{backend}:approximate", "reference"))
    torch.testing.assert_close(ours[3], plain[3], rtol=0, atol=1e-2)


@somewhere
@pytest.mark.parametrize(("warmup_steps", "hidden"), [(0, 4), (3, 4), (0, 8), (0, 16)])
def test_the_nominal_form_rounds_by_seeds_to_the_same_bits(
    backend: str, device: str, hidden: int, warmup_steps: int
) -> None:
    check_rounding(backend, device, "nominal", warmup_steps, BF16, hidden)


@somewhere
@pytest.mark.parametrize("hidden", [4, 16])
def test_the_nominal_form_keeps_its_symmetries_to_the_bit(
    backend: str, device: str, hidden: int
) -> None:
    check_symmetries(backend, device, hidden, in_place=True)


@somewhere
def test_the_nominal_form_leaves_what_never_had_a_gradient(backend: str, device: str) -> None:
    check_still(backend, device)


@somewhere
def test_the_nominal_form_passes_nan_and_infinity_on(backend: str, device: str) -> None:
    grad, m, v, h, c, *rest = nominal_draw(device, 4, 72, 0)
    grad[3], grad[5], c[0, 0, 66], m[8] = math.nan, math.inf, math.nan, math.nan
    ours, plain = (
        nominal_in_place(grad, m, v, h, c, *rest, name) for name in (backend, "reference")
    )
    for one, other in zip(ours, plain, strict=True):
        assert torch.equal(one.isnan(), other.isnan())


@at(*ON_HOST)
@pytest.mark.parametrize(("layers", "hidden"), [(1, 8), (1, 16), (2, 4), (2, 8)])
@pytest.mark.parametrize("narrow", [False, True])
def test_rnnprop_is_the_references(
    backend: str, device: str, narrow: bool, layers: int, hidden: int
) -> None:
    dtype = BF16 if narrow else F32
    check_in_place(backend, device, dtype, torch.float16, dtype, layers, hidden)


@at(*ON_HOST)
def test_rnnprop_errs_as_float32_does(backend: str, device: str) -> None:
    draws = []
    for seed in range(4):
        grad, state, weights = skewed_inputs(64, 1, 8, F32, seed)
        draws.append((grad, *state, weights))
    assert_as_accurate(step_in_place, draws, backend)


@at(*ON_HOST)
def test_rnnprop_is_controlled_and_rounds_by_seeds(backend: str, device: str) -> None:
    check_control(backend, device, BF16, 4)
    check_rounding_by_seeds(backend, device, 4)


@at(*ON_HOST)
@pytest.mark.parametrize(
    ("form", "moments", "cells", "hidden", "reason"),
    [
        ("nominal", F32, BF16, 4, "keeps moments as the cells, these are torch.float32"),
        ("RNNProp", BF16, F32, 4, "keeps moments in float32, these are torch.bfloat16"),
        ("nominal", F32, F32, 5, "students of 1x4, 1x8, 1x16 .* nominal, this one is 1x5"),
    ],
)
def test_what_has_no_kernel_is_left_to_triton(
    backend: str,
    device: str,
    form: str,
    moments: torch.dtype,
    cells: torch.dtype,
    hidden: int,
    reason: str,
) -> None:
    params, grads, states, weights, settings = many_tensors(
        device, form, moments, cells, [F32], hidden
    )
    step = InPlaceStep(
        *(StudentTensors(params, states), grads, weights, settings),
        *(1.0, 0.0, None, [], 0, []),
    )
    problem = student_step_in_place._accepts(step, numerics=Numerics())
    assert problem
    assert re.search(f"{reason}.*backend='triton' computes", problem)
