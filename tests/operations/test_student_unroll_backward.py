"""``student_unroll_backward`` against autograd through an unroll of the reference's steps."""

import math
import re
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate
from places import by_triton, compiled, of_each, of_each_once
from student_cases import draw, make_state, make_weights, moved, wanting
from torch import Tensor

from amalgam.backends.memory import with_contiguous_rows
from amalgam.operations import registry
from amalgam.operations import student_unroll_backward as module
from amalgam.ops import (
    StepSettings,
    StudentState,
    initial_state,
    student_step,
    student_unroll_backward,
)

SETTINGS = StepSettings(0.1, 0.9, 0.99, 1e-6)
operation = torch.ops.amalgam.student_unroll_backward

Inputs = tuple[Tensor, Tensor, StudentState, list[Tensor]]


def inputs_of(
    steps: int, size: int, layers: int, hidden: int, dtype: torch.dtype, seed: int = 0
) -> Inputs:
    """Gradients over eight decades with zeros among them, a state as a run leaves it.

    The weights keep an unroll from chaos, in which rounding would grow with every step.
    """
    generator = torch.Generator().manual_seed(seed)
    decades = 10 ** (8 * torch.rand(size, dtype=torch.float64, generator=generator) - 6)
    grads = draw(steps, size, seed=seed) * decades
    grads[::3, ::7] = 0
    grads[:, 3::11] = 0
    state = make_state(size, layers=layers, hidden=hidden, seed=seed)
    state = state._replace(m=state.m * decades, v=state.v * decades.square())
    weights = [
        weight / max(1, weight.shape[-1]) ** 0.5 if weight.dim() == 2 else weight
        for weight in make_weights(layers, hidden)
    ]
    return (
        grads.to(dtype),
        draw(steps, size, seed=seed + 1).to(dtype),
        StudentState(*(t.to(dtype) for t in state)),
        [weight.to(dtype) for weight in weights],
    )


def arguments_of(inputs: Inputs) -> tuple[Any, ...]:
    grads, adjoints, state, weights = inputs
    return grads, adjoints, *state, weights, *SETTINGS


def by_autograd(inputs: Inputs, settings: StepSettings = SETTINGS) -> list[Tensor]:
    grads, adjoints, state, weights = inputs
    weights = wanting(*weights)
    loss = sum((weight * 0).sum() for weight in weights)
    for grad, adjoint in zip(grads, adjoints, strict=True):
        update, state = student_step(grad, state, weights, settings, backend="reference")
        loss = loss + (adjoint * update).sum()
    return list(torch.autograd.grad(loss, weights))


def assert_close(ours: Sequence[Tensor], theirs: Sequence[Tensor], bound: float) -> None:
    """Compare to ``bound`` of a weight's largest gradient, as terms cancel in the sums."""
    for our, their in zip(ours, theirs, strict=True):
        assert our.shape == their.shape
        assert our.dtype == their.dtype
        assert (our - their).abs().max() <= bound * their.abs().max()


STEPS = [0, 1, 2, 3, 7, 20, 33, 100]
SIZES = [0, 1, 31, 64, 65, 1000]
CASES = [
    *((steps, size, 2, 20) for steps in STEPS for size in SIZES if steps * size <= 7000),
    *(
        (steps, size, layers, hidden)
        for layers, hidden in [(1, 1), (1, 8), (3, 5), (1, 64), (3, 20)]
        for steps, size in [(0, 31), (1, 65), (2, 0), (3, 1000), (7, 64), (20, 65), (33, 31)]
    ),
    *((100, 33, layers, hidden) for layers, hidden in [(1, 1), (3, 5), (1, 64)]),
]


@pytest.mark.parametrize(("steps", "size", "layers", "hidden"), CASES)
def test_compiled_and_reference_are_autograds(
    steps: int, size: int, layers: int, hidden: int
) -> None:
    inputs = inputs_of(steps, size, layers, hidden, torch.float64)
    before = [t.clone() for t in (*inputs[:2], *inputs[2], *inputs[3])]
    expected = by_autograd(inputs)
    for backend in ("reference", "cpu"):
        ours = student_unroll_backward(*inputs, SETTINGS, backend=backend)
        assert_close(ours, expected, 1e-12)
    for now, was in zip((*inputs[:2], *inputs[2], *inputs[3]), before, strict=True):
        assert torch.equal(now, was)


@compiled
@pytest.mark.parametrize("steps", [102, 150, 301])
def test_compiled_of_more_steps_than_are_kept(backend: str, steps: int) -> None:
    """The cpu backend keeps 50 steps of this student: one segment is short, or none is."""
    inputs = inputs_of(steps, 33, 2, 20, torch.float64)
    ours = student_unroll_backward(*inputs, SETTINGS, backend=backend)
    assert_close(ours, by_autograd(inputs), 1e-12)


@pytest.mark.parametrize("held", [1, 1 << 28])
@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("steps", [1, 2, 10, 17])
def test_reference_takes_any_chunks_and_segments(
    monkeypatch: pytest.MonkeyPatch, steps: int, chunk: int, held: int
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    monkeypatch.setattr(module, "HELD", held)
    inputs = inputs_of(steps, 21, 2, 4, torch.float64)
    ours = student_unroll_backward(*inputs, SETTINGS, backend="reference")
    assert_close(ours, by_autograd(inputs), 1e-12)


def test_reference_holds_no_more_states_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    kernels = registry.reference.kernels
    step = kernels["student_step"].function

    def counted(grad: Tensor, *rest: Any) -> Any:
        result = step(grad, *rest)
        state = result[1].m
        held.append(1)
        weakref.finalize(state, held.append, -1)
        peaks.append(sum(held))
        return result

    peaks: list[int] = []
    inputs = inputs_of(100, 5, 1, 4, torch.float64)
    module.by_steps(
        counted,
        kernels["student_step_backward"].function,
        *inputs,
        SETTINGS,
        chunk=64,
        held=1,
    )
    assert len(peaks) == 180
    assert max(peaks) <= 20


@of_each_once
def test_is_the_numerical_gradient(backend: str) -> None:
    grads, adjoints, state, weights = inputs_of(5, 3, 2, 4, torch.float64)

    def loss(weights: list[Tensor]) -> float:
        now, total = state, 0.0
        for grad, adjoint in zip(grads, adjoints, strict=True):
            update, now = student_step(grad, now, weights, SETTINGS, backend="reference")
            total += (adjoint * update).sum().item()
        return total

    found = student_unroll_backward(grads, adjoints, state, weights, SETTINGS, backend=backend)
    for index, weight in enumerate(weights):
        direction = draw(*weight.shape, seed=3)
        values = [
            loss([*weights[:index], weight + by * direction, *weights[index + 1 :]])
            for by in (1e-5, -1e-5)
        ]
        expected = (values[0] - values[1]) / 2e-5
        assert (found[index] * direction).sum().item() == pytest.approx(
            expected, rel=1e-6, abs=1e-9
        )


@of_each
def test_from_nothing_with_zero_gradients(backend: str) -> None:
    """Where g and v are zero the features' scale is 1 / sqrt(eps), and finite."""
    _, adjoints, _, weights = inputs_of(20, 70, 2, 20, torch.float64)
    grads = torch.zeros_like(adjoints)
    grads[:, ::2] = torch.logspace(-6, 2, 35, dtype=torch.float64)
    inputs = grads, adjoints, initial_state(grads[0], weights), weights
    expected = by_autograd(inputs)
    assert all(t.isfinite().all() for t in expected)
    assert_close(student_unroll_backward(*inputs, SETTINGS, backend=backend), expected, 1e-11)


@compiled
def test_compiled_without_eps_and_with_what_forgets_at_once(backend: str) -> None:
    """Lanes after the last coordinate hold moments too, and those must not become 0 / 0."""
    settings = StepSettings(0.1, 0.0, 0.0, 0.0)
    _, adjoints, state, weights = inputs_of(7, 5, 2, 4, torch.float64)
    inputs = draw(7, 5), adjoints, state, weights
    ours = student_unroll_backward(*inputs, settings, backend=backend)
    assert_close(ours, by_autograd(inputs, settings), 1e-12)


@compiled
@pytest.mark.parametrize(
    ("steps", "size", "layers", "hidden"),
    [
        *((1, 65, 2, 20), (2, 1000, 2, 20), (20, 257, 2, 20), (120, 64, 2, 20)),
        *((20, 65, 1, 1), (33, 31, 1, 8), (7, 300, 3, 5), (20, 64, 1, 64), (80, 33, 1, 64)),
    ],
)
def test_compiled_float32_errs_no_more_than_pytorch(
    backend: str, steps: int, size: int, layers: int, hidden: int
) -> None:
    draws = [
        arguments_of(inputs_of(steps, size, layers, hidden, torch.float32, seed))
        for seed in range(8)
    ]
    assert_as_accurate(operation, draws, backend)


@of_each
@pytest.mark.parametrize("layout", ["columns", "offset", "every other", "transposed", "expanded"])
def test_rows_may_lie_anywhere(backend: str, layout: str) -> None:
    grads, adjoints, state, weights = inputs_of(7, 130, 2, 4, torch.float32)
    if layout == "expanded":
        grads, adjoints = (t[:1].expand(7, 130) for t in (grads, adjoints))

    def laid_out(dense: Tensor) -> Tensor:
        wide = dense.new_full((7, 2 * 130 + 9), math.nan)
        if layout in ("columns", "offset"):
            view = wide[:, 70 : 70 + 130]
        elif layout == "every other":
            view = wide[:, 1:261:2]
        elif layout == "transposed":
            view = dense.new_empty(130, 7).T
        else:
            return dense[:1].clone().expand(7, 130)
        view.copy_(dense)
        return view

    spread = laid_out(grads), laid_out(adjoints)
    if layout == "offset":  # each has its own stride
        spread = spread[0], adjoints
    assert not spread[0].is_contiguous()
    loose = StudentState(*(torch.stack((t, t), -1)[..., 0] for t in state))
    strided_weights = [torch.stack((w, w), -1)[..., 1] for w in weights]
    ours = student_unroll_backward(*spread, loose, strided_weights, backend=backend)
    expected = student_unroll_backward(
        grads.contiguous(), adjoints.contiguous(), state, weights, backend=backend
    )
    assert all(map(torch.equal, ours, expected))


def test_columns_of_a_buffer_are_not_copied() -> None:
    buffer = torch.zeros(6, 100)
    view = buffer[:, 20:80]
    rows, stride = with_contiguous_rows(view)
    assert rows.data_ptr() == view.data_ptr()
    assert stride == 100


@compiled
@pytest.mark.parametrize("steps", [1, 3, 40])
def test_compiled_same_bits_for_any_number_of_threads(backend: str, steps: int) -> None:
    inputs = inputs_of(steps, 1501, 2, 20, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(student_unroll_backward(*inputs, SETTINGS, backend=backend))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


@compiled
def test_compiled_passes_nan_on(backend: str) -> None:
    for which in range(3):
        grads, adjoints, state, weights = inputs_of(9, 70, 2, 4, torch.float32)
        (grads[4], adjoints[4], state.c[0, 0])[which][66] = math.nan
        inputs = grads, adjoints, state, weights
        ours = student_unroll_backward(*inputs, backend=backend)
        plain = student_unroll_backward(*inputs, backend="reference")
        assert any(t.isnan().any() for t in plain)
        for one, other in zip(ours, plain, strict=True):
            assert torch.equal(one.isnan(), other.isnan())


@compiled
def test_a_call_leaves_no_trace_in_the_next(backend: str) -> None:
    """A thread's workspace is used again, for other shapes and after NaN."""
    inputs = inputs_of(9, 70, 2, 4, torch.float32)
    expected = student_unroll_backward(*inputs, backend=backend)
    broken = inputs_of(30, 200, 3, 5, torch.float32)
    broken[0].fill_(math.nan)
    student_unroll_backward(*broken, backend=backend)
    assert all(map(torch.equal, student_unroll_backward(*inputs, backend=backend), expected))


# --- The operator's contract ---


@of_each_once
@pytest.mark.parametrize(("steps", "size"), [(0, 3), (2, 0), (3, 5)])
def test_opcheck(backend: str, steps: int, size: int) -> None:
    arguments = arguments_of(inputs_of(steps, size, 2, 4, torch.float64))
    torch.library.opcheck(operation.default, (*arguments, backend))


@of_each
def test_differentiating_it_is_refused(backend: str) -> None:
    grads, adjoints, state, weights = inputs_of(3, 5, 2, 4, torch.float64)
    weights = wanting(*weights)
    found = student_unroll_backward(grads, adjoints, state, weights, backend=backend)
    with pytest.raises(RuntimeError, match="is a gradient.*student_step with backend='reference'"):
        torch.autograd.grad(found[0].sum(), weights[0])


GRADS, ADJOINTS, STATE, WEIGHTS = inputs_of(3, 5, 2, 4, torch.float64)
ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"grads": GRADS.int()}, TypeError, "grads must be a floating-point tensor, not torch.int32"),
    ({"adjoints": [1.0]}, TypeError, "adjoints must be a floating-point tensor, not list"),
    ({"grads": GRADS[0]}, ValueError, "grads must have shape (T, N), not (5,)"),
    (
        {"adjoints": ADJOINTS[:2]},
        ValueError,
        "adjoints must have shape (3, 5), not (2, 5)",
    ),
    (
        {"adjoints": ADJOINTS.float()},
        ValueError,
        "adjoints must be torch.float64 on cpu, not torch.float32 on cpu",
    ),
    (
        {"adjoints": ADJOINTS.to("meta")},
        ValueError,
        "must be torch.float64 on cpu, not torch.float64 on meta",
    ),
    ({"state": STATE._replace(m=draw(4))}, ValueError, "state.m must have shape (5,), not (4,)"),
    ({"state": STATE._replace(c=draw(2, 4, 6))}, ValueError, "state.c must have shape (2, 4, 5)"),
    ({"state": STATE._replace(v=draw(5).float())}, ValueError, "state.v must be torch.float64"),
    ({"weights": WEIGHTS[1:]}, ValueError, "weights must hold three tensors a layer"),
    ({"weights": [w.float() for w in WEIGHTS]}, ValueError, "weights[0] must be torch.float64"),
    ({"weights": make_weights(1)}, ValueError, "state.h must begin with (layers, hidden) = (1, 4)"),
    ({"backend": "cpuu"}, ValueError, "did you mean 'cpu'?"),
]


@pytest.mark.parametrize(("change", "kind", "why"), ERRORS)
def test_errors_name_the_argument(change: dict[str, Any], kind: type[Exception], why: str) -> None:
    arguments = {"grads": GRADS, "adjoints": ADJOINTS, "state": STATE, "weights": WEIGHTS} | change
    with pytest.raises(kind, match=re.escape(why)):
        student_unroll_backward(**arguments)


@compiled
def test_the_operator_checks_before_it_takes_addresses(backend: str) -> None:
    grads, adjoints, *rest = arguments_of((GRADS, ADJOINTS, STATE, WEIGHTS))
    with pytest.raises(ValueError, match="adjoints must have shape"):
        operation(grads, adjoints[:2], *rest, backend)
    with pytest.raises(ValueError, match="state.m must have shape"):
        operation(grads[:, :4], adjoints[:, :4], *rest, backend)
    rest[4] = [weight[:2] for weight in WEIGHTS]
    with pytest.raises(ValueError, match="weights\\[0\\] must have shape"):
        operation(grads, adjoints, *rest, backend)


# --- Triton: its two kernels, composed ---


@by_triton
@pytest.mark.parametrize(("steps", "size", "layers", "hidden"), [(0, 3, 1, 4), (5, 70, 2, 20)])
def test_triton_composes_its_kernels(
    device: str, steps: int, size: int, layers: int, hidden: int
) -> None:
    draws = [
        moved(arguments_of(inputs_of(steps, size, layers, hidden, torch.float32, seed)), device)
        for seed in range(3)
    ]
    assert_as_accurate(operation, draws, "triton")
    strided = [*draws[0]]
    strided[0] = torch.cat((draws[0][0],) * 2, 1)[:, :size]
    ours, expected = operation(*strided, "triton"), operation(*draws[0], "triton")
    assert all(map(torch.equal, ours, expected))
