"""Arguments for ``student_step``, and the checks that several files of tests share."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import doubled, flat
from torch import Tensor

from amalgam.operations.rounding import key_of, random_bits, rounded_stochastically
from amalgam.ops import (
    StepSettings,
    StudentState,
    student_step,
    student_step_,
    update_moments,
)

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


def as_students(*nested: Any) -> list[Any]:
    """Tensors of one student, wherever they are in what is given, as those of several students."""

    def several(each: Any) -> Any:
        if isinstance(each, tuple):
            return type(each)(*map(several, each))
        if isinstance(each, list):
            return [several(part) for part in each]
        return each[None] if isinstance(each, Tensor) else each

    return [several(each) for each in nested]


def wanting(*tensors: Tensor) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


def through_op(grad: Tensor, state: StudentState, weights: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.ops.amalgam.student_step(grad, *state, weights, *SETTINGS, "reference")


def direct(grad: Tensor, state: StudentState, weights: list[Tensor]) -> tuple[Tensor, ...]:
    update, new = student_step(grad, state, weights, SETTINGS, backend="reference")
    return update, *new


# --- The operators' contracts ---


def op_arguments(size: int, requires_grad: bool) -> tuple[Any, ...]:
    tensors = [draw(size), *make_state(size, layers=1, hidden=2)]
    weights = make_weights(1, 2)
    if requires_grad:
        tensors, weights = wanting(*tensors), wanting(*weights)
    return (*tensors, weights, *SETTINGS, "reference")


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


def copied(state: StudentState) -> StudentState:
    return StudentState(*(t.clone() for t in state))


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


# --- Stochastic rounding and control by the device ---


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
    """Check that two steps of many tensors, empty and strided ones too, are the reference's."""
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
    """Equal up to the last bits of float32, which seldom change how bfloat16 is rounded."""
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
    """Check that bfloat16 storage holds the float32 numbers, rounded by the bits of the seed."""
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
    """Tensors on the device control a step as numbers do: rate, decay, skipping and warm-up."""

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


def moved(value: Any, device: str) -> Any:
    """A nest of values with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, StudentState):
        return StudentState(*(moved(each, device) for each in value))
    return [moved(each, device) for each in value] if isinstance(value, (list, tuple)) else value


DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
]
of_dtypes = pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES)


def errors_of_ten_steps(backend: str, device: str, size: int) -> tuple[Tensor, Tensor]:
    """The largest errors of the last update, scaled to [-1, 1], and of h."""
    grad, state, weights = moved(skewed_inputs(size, 2, 20, torch.float32), device)
    exact = doubled([grad, *state])
    for _ in range(10):
        update, state = student_step(grad, state, weights, backend=backend)
        theirs, truth = student_step(
            exact[0], StudentState(*exact[1:]), doubled(weights), backend="reference"
        )
        exact[1:] = truth
    return (10 * (update - theirs)).abs().max(), (state.h - truth.h).abs().max()


def step_in_place(
    grad: Tensor, m: Tensor, v: Tensor, h: Tensor, c: Tensor, weights: list[Tensor], backend: str
) -> tuple[Tensor, ...]:
    """A step of parameters that are zero: they become the update, negated."""
    param, state = torch.zeros_like(grad), StudentState(m.clone(), v.clone(), h.clone(), c.clone())
    student_step_([param], [grad], [state], weights, SETTINGS, backend=backend)
    return param, *state
