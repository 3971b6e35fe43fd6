"""The nominal form of ``student_step`` by Triton's kernels: what is their own."""

import math

import pytest
import torch
from accuracy import assert_as_accurate, flat, seeds_of_draws
from machine_code import assert_within
from nominal_cases import (
    BF16,
    F32,
    check_rounding,
    check_still,
    check_symmetries,
    corrections_of,
    cut,
    drawn,
    many_tensors,
    nominal_settings,
    nominal_weights,
    skewed_nominal,
)
from places import by_triton
from student_cases import copied, draw, moved
from test_student_kernels import costs_of_student
from test_tensor_cores import arithmetic  # noqa: F401

from amalgam.backends import student_unroll_backward as unrolls
from amalgam.operations.kept import Kept
from amalgam.ops import student_step_

FORWARD, BACKWARD = torch.ops.amalgam.student_step, torch.ops.amalgam.student_step_backward


@by_triton
@pytest.mark.parametrize(
    ("layers", "hidden", "size"), [(1, 4, 63), (2, 4, 33), (1, 16, 20), (1, 20, 40), (1, 33, 31)]
)
def test_triton_nominal_step(device: str, size: int, layers: int, hidden: int) -> None:
    """Of few units and many; of weights that are folded into the padding, and apart."""
    seeds = seeds_of_draws(device, 3)
    steps, backward = zip(*(drawn(device, layers, hidden, size, s) for s in seeds), strict=True)
    assert_as_accurate(FORWARD, steps, "triton")
    assert_as_accurate(BACKWARD, backward, "triton")


@by_triton
@pytest.mark.parametrize(("layers", "hidden", "size"), [(1, 4, 63), (1, 16, 20), (1, 20, 40)])
def test_triton_nominal_step_errs_as_float32_does(
    arithmetic: str,  # noqa: F811
    size: int,
    layers: int,
    hidden: int,
) -> None:
    # One coordinate's update may outweigh all others', and plain PyTorch be exact by chance.
    draws = [drawn(arithmetic, layers, hidden, size, seed) for seed in range(8)]
    steps, backward = zip(*draws, strict=True)
    assert_as_accurate(FORWARD, steps, "triton:3xtf32")
    assert_as_accurate(BACKWARD, backward, "triton:3xtf32")


@by_triton
@pytest.mark.parametrize(
    ("permitted", "hidden", "bound"), [("tf32", 20, 5e-3), ("approximate", 4, 1e-2)]
)
def test_triton_nominal_errs_no_more_than_permitted(
    arithmetic: str,  # noqa: F811
    permitted: str,
    hidden: int,
    bound: float,
) -> None:
    """Updates are of the size of the largest, states lie in [-1, 1]."""
    step, _ = drawn(arithmetic, 1, hidden, 63, 0)
    ours, theirs = (FORWARD(*step, name) for name in (f"triton:{permitted}", "reference"))
    largest = theirs[0].abs().max().item()
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=bound * largest)
    torch.testing.assert_close(ours[3], theirs[3], rtol=0, atol=bound)
    assert not torch.equal(ours[3], theirs[3])


# --- Several tensors: their order, their biases, their bounds ---


@by_triton
def test_triton_sums_the_biases_gradients_of_tensors_over_programs(device: str) -> None:
    """More blocks than programs, and tensors of none, of part of one, and of many."""
    sizes = [0, 130, 5, 0, 520, 0]
    n = sum(sizes)
    draws = []
    for seed in seeds_of_draws(device, 2):
        grad, state, _, _ = skewed_nominal(n, 1, 4, F32, seed)
        upstream = [draw(*t.shape, seed=seed + 9, dtype=F32) for t in (grad, *state)]
        settings = nominal_settings(sizes, F32)
        settings = settings._replace(corrections=moved(settings.corrections, device))
        weights = nominal_weights(len(sizes), dtype=F32)
        draws.append((*moved((upstream, grad, *state, weights), device), *settings))
    assert_as_accurate(BACKWARD, draws, "triton")
    twice = [flat(BACKWARD(*draws[0], "triton")) for _ in range(2)]
    assert all(map(torch.equal, *twice))


@by_triton
@pytest.mark.parametrize(
    ("form", "moments", "cells"),
    [("nominal", F32, F32), ("nominal", BF16, BF16), ("RNNProp", BF16, F32)],
)
def test_triton_in_place_of_either_form_is_the_references(
    device: str, form: str, moments: torch.dtype, cells: torch.dtype
) -> None:
    """Parameters of two dtypes go by two launches, each of which finds its own tensors' biases."""
    both = []
    for backend in ("triton", "reference"):
        *tensors, weights, settings = many_tensors(device, form, moments, cells, [F32, BF16])
        for _ in range(2):
            student_step_(*tensors, weights, settings, lr=0.5, weight_decay=0.01, backend=backend)
        both.append(flat((tensors[0], tensors[2])))
    # Triton's interpreter truncates to bfloat16, in each of the two steps, where GPUs round.
    units = 4 if device == "cpu" else 1
    for one, other in zip(*both, strict=True):
        narrow = BF16 in (one.dtype, moments, cells)
        eps = units * torch.finfo(BF16).eps if narrow else 2e-6
        assert one.dtype == other.dtype
        torch.testing.assert_close(one.float(), other.float(), rtol=2 * eps, atol=eps)


@by_triton
@pytest.mark.parametrize("form", ["nominal", "RNNProp"])
@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_triton_rounds_moments_by_the_row_behind_the_parameters(
    device: str, warmup_steps: int, form: str
) -> None:
    check_rounding("triton", device, form, warmup_steps)


# --- What holds exactly ---


@by_triton
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("hidden", [4, 20])
def test_triton_nominal_keeps_its_symmetries_to_the_bit(
    device: str, hidden: int, in_place: bool
) -> None:
    check_symmetries("triton", device, hidden, in_place)


@by_triton
def test_triton_leaves_a_parameter_that_never_had_a_gradient(device: str) -> None:
    check_still("triton", device)


@by_triton
def test_triton_nominal_passes_nan_on(device: str) -> None:
    grad, state, weights, settings = skewed_nominal(70, 1, 4, F32)
    grad[3], grad[5], state.c[0, 0, 66], state.m[8] = math.nan, math.inf, math.nan, math.nan
    settings = settings._replace(corrections=moved(settings.corrections, device))
    arguments = (*moved((grad, *state, weights), device), *settings)
    ours, plain = (FORWARD(*arguments, name) for name in ("triton", "reference"))
    for one, other in zip(ours, plain, strict=True):
        assert torch.equal(one.isnan(), other.isnan())


# --- What is kept, and what is asked for ---


@by_triton
def test_triton_packs_once_whatever_the_biases_become(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from amalgam.kernels import lstm_weights

    packs, pack = [], lstm_weights.pack
    monkeypatch.setattr(lstm_weights, "pack", lambda *how: packs.append(how) or pack(*how))
    *tensors, weights, settings = many_tensors(device, "nominal", F32, F32, [F32])
    theirs = [t.clone() for t in tensors[0]], tensors[1], [copied(s) for s in tensors[2]]
    owner = Kept()
    for step in range(3):
        weights = [*weights[:2], weights[2] + step, *weights[3:]]
        with owner:
            student_step_(*tensors, weights, settings, backend="triton")
        student_step_(*theirs, weights, settings, backend="reference")
    assert len(packs) == 1
    torch.testing.assert_close(flat(tensors[0]), flat(theirs[0]), rtol=1e-5, atol=1e-5)


@by_triton
def test_triton_nominal_steps_alike_with_places_of_64_bits(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from amalgam.kernels import student_step, student_step_in_place

    step, backward = drawn(device, 1, 4, 70, 0)
    results = []
    for wide in (False, True):
        for kernels in (student_step, student_step_in_place):
            monkeypatch.setattr(kernels, "wide", lambda *_, wide=wide: wide)
        *tensors, weights, settings = many_tensors(device, "nominal", F32, F32, [F32])
        student_step_(*tensors, weights, settings, backend="triton")
        results.append(flat((FORWARD(*step, "triton"), BACKWARD(*backward, "triton"), tensors)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@by_triton
def test_triton_unrolls_the_nominal_form_in_chunks(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk ends inside a tensor, and steps have biases and corrections of their own."""
    monkeypatch.setattr(unrolls, "UNROLL_CHUNK", 36)
    steps, size, draws = 2, 56, []
    for seed in range(2):
        _, state, weights, settings = skewed_nominal(size, 1, 4, F32, seed)
        weights[2] = draw(steps, 3, 16, seed=seed, dtype=F32)
        corrections = torch.stack([corrections_of([t + 1, 2, t + 5], F32) for t in range(steps)])
        grads, adjoints = (draw(steps, size, seed=seed + i, dtype=F32) for i in (5, 6))
        values = moved((grads, adjoints, *state, weights, corrections), device)
        settings = settings._replace(corrections=values[-1])
        draws.append((*values[:-1], *settings))
    assert settings.sizes == cut(size)
    assert_as_accurate(torch.ops.amalgam.student_unroll_backward, draws, "triton")


# --- The machine code, and what bounds a step by it ---

# Of an H100 SXM, by its data sheet: instructions of a thread a second, half of 67 TFLOP/s, and
# bytes a second.
ISSUED, MOVED = 67e12 / 2, 3.35e12
ADAMW = 28  # bytes a coordinate, all in float32: p, g, m, v read, and p, m, v written

BUDGETS = {
    "in_place sm_90 nominal:1x4 bfloat16+bfloat16 3xtf32": {
        **{"registers": 168, "stack": 0, "instructions": 391, "special": 48},
        **{"tensor": 0, "wide": 60, "load": 11.5},
    },
    "in_place sm_90 nominal:1x8 bfloat16+bfloat16 3xtf32": {
        **{"registers": 255, "stack": 0, "instructions": 820, "special": 88},
        **{"tensor": 0, "wide": 142, "load": 12.7},
    },
    "in_place sm_90 nominal:1x8 bfloat16+bfloat16 bf16,approximate,stochastic": {
        **{"registers": 255, "stack": 0, "instructions": 801, "special": 46},
        **{"tensor": 0, "wide": 148, "load": 12.5},
    },
}


@pytest.mark.compiles(by=costs_of_student)
@pytest.mark.parametrize("case", BUDGETS)
def test_memory_decides_how_long_a_nominal_step_takes(
    case: str, compilation: dict[str, float]
) -> None:
    """Not instructions; and then it is at most so many times AdamW's bytes."""
    assert_within(compilation, BUDGETS[case])
    units = int(case.split("x")[1].split()[0])
    # p read and written, g read, in float32; m and v, and h and c of each unit, in bfloat16.
    moved_bytes = 12 + 2 * 4 + units * 2 * 4
    assert compilation["instructions"] / ISSUED < moved_bytes / MOVED
    assert moved_bytes / ADAMW <= {4: 2.0, 8: 3.0}[units]
