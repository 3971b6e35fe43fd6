"""Arguments for ``student_step`` in its nominal form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from student_cases import SETTINGS, draw, make_state, make_weights, moved, skewed_inputs
from torch import Tensor

from amalgam.operations.rounding import key_of, random_bits, rounded_stochastically
from amalgam.ops import StepSettings, StudentState, student_step, student_step_

ALPHA, BETA1, BETA2, EPS = 0.005, 0.9, 0.99, 1e-15
F32, BF16 = torch.float32, torch.bfloat16


def corrections_of(steps: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
    """1 / (1 - beta^t) of each tensor, which has taken that many steps, and a pace of its own.

    Shape (tensors, 3).
    """
    t = torch.tensor(steps, dtype=torch.float64)
    pace = 0.4 + t.sqrt().remainder(1.7)
    return torch.stack((1 / (1 - BETA1**t), 1 / (1 - BETA2**t), pace), 1).to(dtype)


def nominal_settings(
    sizes: Sequence[int], dtype: torch.dtype = torch.float64, in_place: bool = False
) -> StepSettings:
    """Settings for tensors of these sizes, the i-th in its (1 + 3 i)-th step."""
    corrections = corrections_of([1 + 3 * i for i in range(len(sizes))], dtype)
    of_vector = [] if in_place else list(sizes)
    return StepSettings(ALPHA, BETA1, BETA2, EPS, corrections, of_vector)


def nominal_weights(
    tensors: int,
    layers: int = 1,
    hidden: int = 4,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Weights with a first bias for each of the tensors."""
    weights = []
    for layer in range(layers):
        inputs = hidden if layer else 3
        several = () if layer else (tensors,)
        weights += [
            draw(4 * hidden, inputs, seed=layer, dtype=dtype) / 2,
            draw(4 * hidden, hidden, seed=layer, dtype=dtype) / 2,
            draw(*several, 4 * hidden, seed=layer, dtype=dtype),
        ]
    return [*weights, draw(2, hidden, dtype=dtype), draw(2, dtype=dtype)]


def cut(size: int) -> list[int]:
    """Sizes of three tensors, one of them empty, that a vector of this size is cut into."""
    return [size // 3, 0, size - size // 3]


def skewed_nominal(
    size: int, layers: int, hidden: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, StudentState, list[Tensor], StepSettings]:
    """As :func:`student_cases.skewed_inputs`; a seventh of all coordinates never had a gradient."""
    grad, state, _ = skewed_inputs(size, layers, hidden, torch.float64, seed)
    m, v = state.m.clone(), state.v.clone()
    m[::7], v[::7] = 0, 0
    state = state._replace(m=m, v=v)
    weights = nominal_weights(3, layers, hidden)
    return (
        grad.to(dtype),
        StudentState(*(t.to(dtype) for t in state)),
        [w.to(dtype) for w in weights],
        nominal_settings(cut(size), dtype),
    )


def drawn(
    device: str, layers: int, hidden: int, size: int, seed: int
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Arguments of a step, and of its backward."""
    grad, state, weights, settings = skewed_nominal(size, layers, hidden, F32, seed)
    upstream = [draw(*t.shape, seed=seed + 9, dtype=F32) for t in (grad, *state)]
    settings = settings._replace(corrections=moved(settings.corrections, device))
    step = (*moved((grad, *state, weights), device), *settings)
    return step, (moved(upstream, device), *step)


def many_tensors(
    device: str,
    form: str,
    moments: torch.dtype,
    cells: torch.dtype,
    dtypes: list[torch.dtype],
    hidden: int = 4,
) -> tuple[list[Tensor], list[Tensor], list[StudentState], list[Tensor], StepSettings]:
    """Parameters, gradients and states of several shapes, dtypes in turn; weights and settings."""
    shapes = [(7, 9), (0,), (), (130,), (2, 3, 4, 3), (5,)]
    types = [dtypes[i % len(dtypes)] for i in range(len(shapes))]
    params = [draw(*s, seed=1).to(t) for s, t in zip(shapes, types, strict=True)]
    grads = [draw(*s, seed=2).to(F32) for s in shapes]
    params[3] = params[3].repeat_interleave(2)[::2]
    states = []
    for shape in shapes:
        state = make_state(*shape, layers=1, hidden=hidden, dtype=F32)
        states.append(StudentState(*(t.to(moments) for t in state[:2]), *state[2:]))
    states = [s._replace(h=s.h.to(cells), c=s.c.to(cells)) for s in states]
    weights, settings = make_weights(1, hidden, F32), SETTINGS
    if form == "nominal":
        weights = nominal_weights(len(shapes), hidden=hidden, dtype=F32)
        settings = nominal_settings([1] * len(shapes), F32, in_place=True)
        settings = settings._replace(corrections=moved(settings.corrections, device))
    return *moved((params, grads, states, weights), device), settings


def check_rounding(
    backend: str,
    device: str,
    form: str,
    warmup_steps: int,
    cells: torch.dtype = F32,
    hidden: int = 4,
) -> None:
    """Check that bfloat16 states are the float32 ones, rounded by the bits of the seed.

    Moments' are of the row behind the parameter's, which is behind those of h and c.
    """
    counts = [torch.tensor(float(n), device=device) for n in (0, 7, 1, 2, 3, 4)]
    how = {"steps": counts, "warmup_steps": warmup_steps, "warmup_lr": 0.1, "backend": backend}
    stored = []
    for seeds, *types in ((None, F32, F32), (range(11, 17), BF16, cells)):
        *tensors, weights, settings = many_tensors(device, form, *types, [F32], hidden)
        for state in tensors[2] if seeds is None else ():  # as the others begin
            for tensor, dtype in zip(state, (BF16, BF16, cells, cells), strict=True):
                tensor.copy_(tensor.to(dtype))
        student_step_(*tensors, weights, settings, seeds=seeds, **how)
        stored.append(tensors[2])
    for seed, count, exact, rounded in zip(range(11, 17), counts, *stored, strict=True):
        bits = random_bits(key_of(seed, count), range(hidden + 2), range(exact.m.numel()))
        of_cells, of_moments = bits[:hidden].view(exact.h.shape), bits[-1].view(exact.m.shape)
        if cells == BF16 and float(count) >= warmup_steps:
            assert torch.equal(rounded.h, rounded_stochastically(exact.h, of_cells >> 16))
            assert torch.equal(rounded.c, rounded_stochastically(exact.c, of_cells & 0xFFFF))
        assert torch.equal(rounded.m, rounded_stochastically(exact.m, of_moments >> 16))
        assert torch.equal(rounded.v, rounded_stochastically(exact.v, of_moments & 0xFFFF))


def trajectory(
    backend: str,
    device: str,
    hidden: int,
    grads: Tensor,  # (steps, N)
    sizes: list[int],
    in_place: bool,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The updates' sum and the last cells, of tensors of these sizes with equal biases."""
    n, count = grads.shape[1], len(sizes)
    weights = nominal_weights(1, hidden=hidden, dtype=F32)
    weights[2] = weights[2].expand(count, -1).contiguous()
    weights, grads = moved((weights, grads), device)
    cells = torch.zeros(1, hidden, n, device=device)
    state = StudentState(*(torch.zeros(n, device=device) for _ in "mv"), cells, cells.clone())
    params = list(torch.zeros(n, device=device).split(sizes))
    states = [
        StudentState(*(t.clone() for t in part))
        for part in zip(*(t.split(sizes, -1) for t in state), strict=True)
    ]
    total = torch.zeros(n, device=device)
    for t, grad in enumerate(grads):
        corrections = corrections_of([t + 1] * count, F32).to(device)
        settings = nominal_settings(sizes, F32)._replace(corrections=corrections, eps=eps)
        if in_place:
            settings = settings._replace(sizes=[])
            parts = list(grad.split(sizes))
            student_step_(params, parts, states, weights, settings, backend=backend)
        else:
            update, state = student_step(grad, state, weights, settings, backend=backend)
            total -= update
    if in_place:
        return torch.cat(params), torch.cat([each.c for each in states], -1)
    return total, state.c


def check_symmetries(backend: str, device: str, hidden: int, in_place: bool) -> None:
    """No gradient, none's update; the mirrored one, the mirrored; the loss times 2^k, the same."""
    grads = draw(2, 72, dtype=F32)
    grads[:, ::5] = 0
    grads[0, ::7] = 0
    moving, cells = trajectory(backend, device, hidden, grads, [72], in_place)
    assert moving.isfinite().all()
    assert (moving[::5] == 0).all()
    assert (moving[7::35] != 0).all()
    for factor in (-1.0, 2.0**20, 2.0**-20):
        other, others_cells = trajectory(backend, device, hidden, factor * grads, [72], in_place)
        assert torch.equal(other, math.copysign(1.0, factor) * moving)
        assert torch.equal(others_cells, cells)
    assert all(
        map(
            torch.equal,
            trajectory(backend, device, hidden, grads, [33, 0, 39], in_place),
            (moving, cells),
        )
    )


def check_still(backend: str, device: str) -> None:
    """Check that a parameter that never had a gradient keeps its bits, zeros' signs among them."""
    params, grads, states, weights, settings = many_tensors(device, "nominal", F32, F32, [F32])
    for param, grad, state in zip(params, grads, states, strict=True):
        param.view(-1)[:1] = -0.0
        for tensor in (grad, state.m, state.v):
            tensor.zero_()
    before = [p.clone() for p in params]
    for _ in range(2):
        student_step_(params, grads, states, weights, settings, backend=backend)
    for param, old in zip(params, before, strict=True):
        assert torch.equal(param.view(torch.int32), old.view(torch.int32))


__all__ = [
    "check_rounding",
    "check_still",
    "check_symmetries",
    "corrections_of",
    "cut",
    "drawn",
    "make_state",
    "many_tensors",
    "nominal_settings",
    "nominal_weights",
    "skewed_nominal",
    "trajectory",
]
