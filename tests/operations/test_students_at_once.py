"""Steps of several students at once, as meta-training takes those of replicates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nominal_cases import F32, drawn
from places import INTERPRETED, ON_CPU, ON_HOST, at, on_gpus
from student_cases import SETTINGS, draw, make_state, make_weights, moved
from torch import Tensor

from amalgam.operations.registry import BackendError
from amalgam.operations.student_forms import NOMINAL, RNNPROP, Form
from amalgam.operations.student_step import OfStudents, backward_into, step_into
from amalgam.ops import StepSettings, StudentState

FORWARD, BACKWARD = torch.ops.amalgam.student_step, torch.ops.amalgam.student_step_backward

EVERYWHERE = [
    pytest.param("reference", "cpu", id="reference"),
    *ON_CPU,
    *INTERPRETED,
    *on_gpus("reference", "triton"),
]
# CUDA's functional kernels are of the nominal form.
BY_CUDA = [*ON_HOST, *on_gpus("cuda")]


def rnnprop(
    device: str, layers: int, hidden: int, size: int, seed: int
) -> tuple[OfStudents, list[Tensor]]:
    """A student's step, and the gradients in what it gives."""
    weights = [w + 0.01 * seed for w in make_weights(layers, hidden, F32)]
    state = make_state(size, layers=layers, hidden=hidden, seed=seed, dtype=F32)
    upstream = [draw(*t.shape, seed=seed + 5, dtype=F32) for t in (state.m, *state)]
    grad = draw(size, seed=seed, dtype=F32)
    grad, state, weights, upstream = moved((grad, state, weights, upstream), device)
    return OfStudents(grad, state, weights, SETTINGS), upstream


def nominal(
    device: str, layers: int, hidden: int, size: int, seed: int
) -> tuple[OfStudents, list[Tensor]]:
    """Of three tensors, one of them empty."""
    step, (upstream, *_) = drawn(device, layers, hidden, size, seed)
    grad, m, v, h, c, weights, *rest = step
    settings = StepSettings(*rest)
    weights = [w + 0.01 * seed for w in weights]
    settings = settings._replace(corrections=settings.corrections + 0.01 * seed)
    return OfStudents(grad, StudentState(m, v, h, c), weights, settings), upstream


def together(students: list[OfStudents]) -> OfStudents:
    grads, states, weights, settings = zip(*students, strict=True)
    every = settings[0]
    if every.corrections is not None:
        every = every._replace(corrections=torch.stack([each.corrections for each in settings]))
    return OfStudents(
        torch.stack(grads),
        StudentState(*map(torch.stack, zip(*states, strict=True))),
        [torch.stack(each) for each in zip(*weights, strict=True)],
        every,
    )


CASES = [
    (rnnprop, 2, 20, 70, 3),
    (rnnprop, 1, 4, 130, 2),
    (rnnprop, 2, 4, 1, 5),
    (nominal, 1, 16, 70, 3),
    (nominal, 2, 8, 130, 2),
]
SMALL = [(nominal, 1, 4, 70, 3), (nominal, 1, 8, 130, 2)]
SEVERAL_TILES = (nominal, 1, 4, 1000, 2)  # a warp, on the host


@pytest.mark.parametrize(
    ("backend", "device", "case"),
    [
        pytest.param(
            *place.values, case, id=f"{place.id}-{case[0].__name__}-{number}", marks=place.marks
        )
        for places, cases in ((EVERYWHERE, [*CASES, *SMALL]), (BY_CUDA, [*SMALL, SEVERAL_TILES]))
        for place in places
        for number, case in enumerate(cases)
    ],
    indirect=["backend"],
)
def test_each_student_steps_as_alone(backend: str, device: str, case: tuple[Any, ...]) -> None:
    """To the same bits, but that sums over coordinates may be of other programs' parts."""
    make, layers, hidden, size, count = case
    pairs = [make(device, layers, hidden, size, seed) for seed in range(count)]
    students, upstream = [list(each) for each in zip(*pairs, strict=True)]
    every = together(students)
    new = StudentState(*(torch.full_like(t, torch.nan) for t in every.state))
    over = StudentState(*(t.clone() for t in every.state))
    stepped = []
    for state, source in ((new, every.state), (over, over)):
        update = torch.full_like(every.grad, torch.nan)
        step_into(update, state, every.grad, source, *every[2:], backend)
        stepped.append((update, *state))
    d_update, *d_new = map(torch.stack, zip(*upstream, strict=True))
    d_state = StudentState(*d_new)
    d_grad, d_weights = backward_into(d_update, d_state, *every, backend)

    # All is launched before anything is compared: so preparing a GPU's run compiles it all.
    of_each = [(one.grad, *one.state, one.weights, *one.settings, backend) for one in students]
    forward = [FORWARD(*arguments) for arguments in of_each]
    backward = [BACKWARD(d, *arguments) for d, arguments in zip(upstream, of_each, strict=True)]
    for number, (alone, (*d_alone, in_weights)) in enumerate(zip(forward, backward, strict=True)):
        for found in stepped:
            assert all(torch.equal(t[number], one) for t, one in zip(found, alone, strict=True))
        for ours, theirs in zip((d_grad, *d_state), d_alone, strict=True):
            assert torch.equal(ours[number], theirs)
        for ours, theirs in zip(d_weights, in_weights, strict=True):
            assert ours[number].shape == theirs.shape
            torch.testing.assert_close(ours[number], theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", [RNNPROP, NOMINAL])
@pytest.mark.parametrize(("layers", "hidden"), [(1, 4), (1, 6), (1, 8), (2, 8), (2, 20), (3, 5)])
def test_every_students_packed_weights_begin_where_four_can_be_loaded(
    layers: int, hidden: int, form: Form
) -> None:
    lstm_weights = pytest.importorskip("amalgam.kernels.lstm_weights")
    network = pytest.importorskip("amalgam.kernels.student_network")
    make = nominal if form is NOMINAL else rnnprop
    students = together([make("cpu", layers, hidden, 5, seed)[0] for seed in range(3)])
    for precision in ("plain", "ieee", "bf16"):
        plan, _ = network.plan_of(students.state.h[0], form, precision)
        given = network.to_pack(students.weights, form)
        for packed in lstm_weights.pack(given, plan, precision):
            assert packed.shape == (3, plan.places.numel())
            assert packed.shape[1] % 4 == 0
            assert not packed[:, plan.places == sum(w[0].numel() for w in given)].any()


@pytest.mark.parametrize(
    ("backend", "device", "make"),
    [
        pytest.param(*place.values, make, id=str(place.id), marks=place.marks)
        for places, make in (
            ([*INTERPRETED, *on_gpus("triton")], rnnprop),
            ([*ON_HOST, *on_gpus("cuda")], nominal),
        )
        for place in places
    ],
    indirect=["backend"],
)
def test_more_students_than_a_grid_has_are_refused(backend: str, device: str, make: Any) -> None:
    one, _ = make(device, 1, 4, 0, 0)

    def of_all(tensor: Tensor) -> Tensor:
        return tensor.expand(65536, *tensor.shape)

    state, weights = StudentState(*map(of_all, one.state)), [*map(of_all, one.weights)]
    settings = one.settings
    if settings.corrections is not None:
        settings = settings._replace(corrections=of_all(settings.corrections))
    every = OfStudents(of_all(one.grad), state, weights, settings)
    update, *rest = (torch.zeros(t.shape, device=device) for t in (every.grad, *every.state))
    new = StudentState(*rest)
    with pytest.raises(BackendError, match="at most 65535 students at once, not 65536"):
        step_into(update, new, *every, backend)
    with pytest.raises(BackendError, match="at most 65535 students at once, not 65536"):
        backward_into(update, new, *every, backend)


@at(*ON_HOST)
def test_cuda_launches_for_all_students_what_it_does_for_one(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cuda_on_host

    calls: list[str] = []
    for name in ("nominal_step", "nominal_step_backward"):
        function = getattr(cuda_on_host.CudaOnHost, name)

        def noted(*args: Any, _name: str = name, _function: Any = function, **rest: Any) -> None:
            calls.append(_name)
            _function(*args, **rest)

        monkeypatch.setattr(cuda_on_host.CudaOnHost, name, noted)
    every = together([nominal(device, 1, 4, 10, seed)[0] for seed in range(7)])
    update, new = torch.empty_like(every.grad), StudentState(*map(torch.empty_like, every.state))
    step_into(update, new, *every, backend)
    backward_into(update, new, *every, backend)
    assert calls == ["nominal_step", "nominal_step_backward"]


def test_what_is_not_of_every_student_is_named() -> None:
    every = together([nominal("cpu", 1, 4, 10, seed)[0] for seed in range(2)])
    grad, state, weights, settings = every
    update, new = torch.empty_like(grad), StudentState(*map(torch.empty_like, state))
    wrong = [
        (r"grad must have shape \(S, N\)", every._replace(grad=grad[0])),
        (r"grad must have shape \(S, N\)", every._replace(grad=grad[:0])),
        (
            "state.h must have a first dimension of 2",
            every._replace(state=state._replace(h=state.h[:1])),
        ),
        (
            r"weights\[1\] must have a first",
            every._replace(weights=[w[i == 1 :] for i, w in enumerate(weights)]),
        ),
        (
            "corrections must have a first",
            every._replace(settings=settings._replace(corrections=settings.corrections[:1])),
        ),
    ]
    for message, given in wrong:
        with pytest.raises(ValueError, match=message):
            step_into(update, new, *given, "reference")
        with pytest.raises(ValueError, match=message):
            backward_into(update, new, *given, "reference")
