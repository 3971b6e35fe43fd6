"""``student_step_``, which steps parameters and states in place."""

import math
import re
from typing import Any

import pytest
import torch
from accuracy import flat
from places import INTERPRETED, ON_CPU, at, compiled, of_each, on_gpus
from student_cases import (
    SETTINGS,
    SIZES,
    as_students,
    check_control,
    check_rounding_by_seeds,
    copied,
    draw,
    in_place_arguments,
    make_state,
    make_weights,
    wanting,
)
from torch import Tensor

from amalgam.operations import student_step_in_place as module
from amalgam.operations.student_step import backward_into, step_into
from amalgam.ops import (
    StepSettings,
    StudentState,
    initial_state,
    student_step,
    student_step_,
)
from amalgam.policies import Student, StudentConfig


def test_opcheck_in_place() -> None:
    torch.library.opcheck(torch.ops.amalgam.student_step_, in_place_arguments((3,), (2, 2), (0,)))


# --- The in-place form ---


def expected_in_place(
    param: Tensor, grad: Tensor, state: StudentState, weights: list[Tensor], lr: float, decay: float
) -> tuple[Tensor, StudentState]:
    """What the functional form makes of the flattened tensor, in the weights' dtype."""
    dtype = weights[0].dtype
    flat = StudentState(
        state.m.reshape(-1),
        state.v.reshape(-1),
        state.h.reshape(*state.h.shape[:2], -1),
        state.c.reshape(*state.c.shape[:2], -1),
    )
    flat_grad = grad.reshape(-1).to(dtype)
    update, new = student_step(flat_grad, flat, weights, SETTINGS, backend="reference")
    moved = param.reshape(-1).to(dtype) * (1 - lr * decay) - lr * update
    shaped = (t.reshape(like.shape) for t, like in zip(new, state, strict=True))
    return moved.to(param.dtype).reshape(param.shape), StudentState(*shaped)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_in_place_is_the_functional_form(size: int, layers: int) -> None:
    param, grad, weights = draw(size, seed=5), draw(size), make_weights(layers)
    state = make_state(size, layers=layers)
    moved, new = expected_in_place(param, grad, state, weights, 0.7, 0.2)
    now, grad_before = copied(state), grad.clone()
    student_step_(
        [param], [grad], [now], weights, SETTINGS, lr=0.7, weight_decay=0.2, backend="reference"
    )
    for ours, theirs in zip((param, *now), (moved, *new), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(grad, grad_before)


@pytest.mark.parametrize("chunk", [1, 2, 5, 7, 64])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_many_tensors_step_as_one(
    monkeypatch: pytest.MonkeyPatch, chunk: int, backend: str
) -> None:
    """Cut at every kind of place: inside a tensor, between two, around empty ones.

    Sums over a chunk's columns may be blocked differently, so rounding is allowed for.
    """
    monkeypatch.setattr(module, "CHUNK", chunk)
    shapes = [(), (5,), (0,), (2, 3), (1,), (7,), (3, 0, 2), (2, 1, 2, 2, 1)]
    weights = make_weights()
    params = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
    grads = [draw(*shape, seed=30 + i) for i, shape in enumerate(shapes)]
    states = [make_state(*shape, seed=60 + i) for i, shape in enumerate(shapes)]
    expected = [
        expected_in_place(p, g, s, weights, 0.5, 0.1)
        for p, g, s in zip(params, grads, states, strict=True)
    ]
    student_step_(
        params, grads, states, weights, SETTINGS, lr=0.5, weight_decay=0.1, backend=backend
    )
    for param, state, (moved, new) in zip(params, states, expected, strict=True):
        for ours, theirs in zip((param, *state), (moved, *new), strict=True):
            assert ours.shape == theirs.shape
            assert torch.allclose(ours, theirs, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("limit", [1, 2, 5, 7, 64])
def test_runs_fill_their_chunks_and_cover_everything(limit: int) -> None:
    sizes = [3, 0, 1, 12, 5, 0, 7]
    runs = list(module._runs(sizes, limit))
    lengths = [sum(part.stop - part.start for _, part in run) for run in runs]
    assert lengths[:-1] == [limit] * (len(runs) - 1)
    assert 0 < lengths[-1] <= limit
    covered = [(i, n) for run in runs for i, part in run for n in range(part.start, part.stop)]
    assert covered == [(i, n) for i, size in enumerate(sizes) for n in range(size)]


def strided(shape: tuple[int, ...], kind: str, dtype: torch.dtype = torch.float64) -> Tensor:
    tensor = draw(*shape, seed=9, dtype=dtype)
    if kind == "transposed":
        return (
            tensor.permute(*reversed(range(len(shape))))
            .contiguous()
            .permute(*reversed(range(len(shape))))
        )
    if kind == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    spread = torch.full((*shape[:-1], 2 * shape[-1]), 77.0, dtype=dtype)
    view = spread[..., ::2]
    view.copy_(tensor)
    return view


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((4, 3), "transposed"),
        ((2, 3, 4), "transposed"),
        ((2, 3, 4, 5), "channels_last"),
        ((6,), "every other"),
        ((3, 4), "every other"),
        ((2, 3, 2, 1, 2), "every other"),
    ],
)
@pytest.mark.parametrize("which", ["params", "grads", "both"])
def test_strided_params_and_grads(shape: tuple[int, ...], kind: str, which: str) -> None:
    param = strided(shape, kind) if which != "grads" else draw(*shape, seed=9)
    grad = strided(shape, kind) if which != "params" else draw(*shape, seed=9)
    assert not (param.is_contiguous() and grad.is_contiguous())
    strides, weights, state = param.stride(), make_weights(), make_state(*shape)
    whole = param._base if kind == "every other" and which != "grads" else None
    moved, new = expected_in_place(param, grad, state, weights, 1.0, 0.0)
    other = draw(3, seed=2)
    student_step_(
        [other, param], [draw(3), grad], [make_state(3), state], weights, SETTINGS,
        backend="reference",
    )  # fmt: skip
    assert param.stride() == strides
    for ours, theirs in zip((param, *state), (moved, *new), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-13, atol=1e-14)
    if whole is not None:
        assert (whole[..., 1::2] == 77).all()


@pytest.mark.parametrize("rank", range(6))
def test_every_rank(rank: int) -> None:
    shape = (2, 3, 1, 2, 2)[:rank]
    param, grad, state = draw(*shape, seed=1), draw(*shape, seed=2), make_state(*shape)
    moved, new = expected_in_place(param, grad, state, make_weights(), 1.0, 0.0)
    student_step_([param], [grad], [state], make_weights(), SETTINGS, backend="reference")
    assert param.shape == shape
    assert torch.equal(param, moved)
    assert all(torch.equal(a, b) for a, b in zip(state, new, strict=True))


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_params_round_once(dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    """A step computes in the state's float32 and rounds the new parameter alone."""
    single = torch.float32
    weights = make_weights(dtype=single)
    param, grad = draw(33, seed=1, dtype=dtype), draw(33, seed=2, dtype=grad_dtype)
    state = make_state(33, dtype=single)
    moved, new = expected_in_place(param, grad, state, weights, 0.9, 0.1)
    student_step_(
        [param], [grad], [state], weights, SETTINGS, lr=0.9, weight_decay=0.1, backend="reference"
    )
    assert param.dtype == dtype
    assert torch.equal(param, moved)
    assert all(torch.equal(a, b) for a, b in zip(state, new, strict=True))


def test_in_place_makes_no_graph() -> None:
    param = torch.nn.Parameter(draw(5))
    version = param._version
    weights = wanting(*make_weights())
    state = make_state(5)
    with torch.no_grad():
        student_step_([param], [draw(5)], [state], weights, SETTINGS, backend="reference")
    assert param.is_leaf
    assert param._version > version
    assert not any(t.requires_grad for t in state)


def test_nothing_to_step_is_nothing() -> None:
    student_step_([], [], [], make_weights())


def test_steps_repeat_bit_for_bit() -> None:
    runs = []
    for _ in range(2):
        param, state = draw(1000, seed=1), make_state(1000)
        for step in range(3):
            grads = [draw(1000, seed=step)]
            student_step_([param], grads, [state], make_weights(), backend="reference")
        runs.append((param, *state))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


IN_PLACE_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"grads": []}, ValueError, "equally many, not 1, 0 and 1"),
    ({"states": [make_state(2, 3)] * 2}, ValueError, "equally many, not 1, 1 and 2"),
    ({"grads": [draw(3, 2)]}, ValueError, "grads must have their parameters' shapes: (3, 2)"),
    (
        {"params": [torch.zeros(2, 3, dtype=torch.int32)]},
        TypeError,
        "params must be a floating-point tensor, not torch.int32",
    ),
    (
        {"grads": [torch.zeros(2, 3, dtype=torch.bool)]},
        TypeError,
        "grads must be a floating-point tensor, not torch.bool",
    ),
    ({"grads": [draw(2, 3).to("meta")]}, ValueError, "grads must be on cpu, not on meta"),
    (
        {"params": [draw(2, 3).to("meta")], "grads": [draw(2, 3).to("meta")]},
        ValueError,
        "params must be on cpu, not on meta",
    ),
    ({"states": [make_state(6)]}, ValueError, "state.m must have shape (2, 3), not (6,)"),
    (
        {"states": [make_state(2, 3, layers=1)]},
        ValueError,
        "state.h must begin with (layers, hidden) = (2, 4)",
    ),
    (
        {"states": [make_state(2, 3)._replace(v=draw(3, 2).T)]},
        ValueError,
        "state.v must be contiguous",
    ),
    (
        {"states": [make_state(2, 3)._replace(h=draw(2, 4, 3, 2).mT)]},
        ValueError,
        "state.h must be contiguous",
    ),
    (
        {"weights": make_weights(dtype=torch.float32)},
        ValueError,
        "weights[0] must be torch.float64",
    ),
    ({"backend": "none"}, ValueError, "backend must be one of"),
    ({"warmup_steps": 2}, ValueError, "warmup_steps=2 needs steps"),
    ({"steps": []}, ValueError, "steps must be one a parameter, 1, not 0"),
    ({"steps": [torch.zeros(1)]}, ValueError, "steps must be float32 tensors of shape () on cpu"),
    ({"seeds": [2**32]}, ValueError, "seeds must lie in [0, 2^32), not 4294967296"),
    ({"lr": torch.ones(2)}, ValueError, "lr must hold one number, not (2,)"),
    ({"skip": torch.ones(2, 1)}, ValueError, "skip must hold one number, not (2, 1)"),
]


@pytest.mark.parametrize(("change", "kind", "why"), IN_PLACE_ERRORS)
def test_in_place_errors_name_the_argument(
    change: dict[str, Any], kind: type[Exception], why: str
) -> None:
    """Integer parameters were once truncated without a word: only float ones had been tried."""
    param, grad, state = draw(2, 3), draw(2, 3), make_state(2, 3)
    before = param.clone()
    arguments = {"params": [param], "grads": [grad], "states": [state], "weights": make_weights()}
    with pytest.raises(kind, match=re.escape(why)):
        student_step_(**(arguments | change))
    assert torch.equal(param, before)


@compiled
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compiled_in_place_is_the_references(
    backend: str, dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    """Several tensors step as the reference steps them; some are strided."""
    weights = make_weights(2, 20, dtype=torch.float32)
    shapes = [(7, 9), (), (0, 3), (130,), (2, 3, 4, 2)]
    both = []
    for name in ("reference", backend):
        params = [draw(*s, seed=1).to(dtype) for s in shapes]
        params[4] = params[4].to(memory_format=torch.channels_last)
        grads = [draw(*s, seed=2).to(grad_dtype) for s in shapes]
        states = [make_state(*s, hidden=20, dtype=torch.float32) for s in shapes]
        for _ in range(3):
            student_step_(params, grads, states, weights, lr=0.5, weight_decay=0.01, backend=name)
        both.append((params, flat(states)))
    for ours, expected in zip(both[1][0], both[0][0], strict=True):
        unit = torch.finfo(dtype).eps * expected.float().abs().clamp_min(1e-4)
        assert ((ours.float() - expected.float()).abs() <= unit + 1e-6).all()
    for ours, expected in zip(both[1][1], both[0][1], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@compiled
def test_threads_step_different_optimizers_at_once(backend: str) -> None:
    """The workspaces are each thread's own, and the interpreter's lock is not held."""
    from concurrent.futures import ThreadPoolExecutor

    weights = make_weights(2, 20, dtype=torch.float32)

    def run(seed: int) -> Tensor:
        param, state = draw(2000, seed=seed).float(), make_state(2000, hidden=20)
        state = StudentState(*(t.float() for t in state))
        for step in range(20):
            grads = [draw(2000, seed=seed + step).float()]
            student_step_([param], grads, [state], weights, backend=backend)
        return param

    alone = [run(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, range(4)))
    assert all(map(torch.equal, alone, together))


@pytest.mark.parametrize("hidden", [4, 20])
@of_each
def test_seeds_round_to_the_same_bits(backend: str, hidden: int) -> None:
    check_rounding_by_seeds(backend, "cpu", hidden)


@pytest.mark.parametrize("cells", [torch.float32, torch.bfloat16])
@of_each
def test_the_device_decides(backend: str, cells: torch.dtype) -> None:
    check_control(backend, "cpu", cells, 4)


@of_each
def test_compiled_cells_may_be_bfloat16(backend: str) -> None:
    """One step from bfloat16 cells is the float32 step from them, rounded once."""
    weights = make_weights(2, 20, dtype=torch.float32)
    shape, grad = (9, 11), [draw(9, 11, seed=3).float()]
    state = make_state(*shape, hidden=20, dtype=torch.float32)
    narrow = state._replace(h=state.h.bfloat16(), c=state.c.bfloat16())
    wide = StudentState(*(t.float().clone() for t in narrow))
    params = [draw(9, 11).float()], [draw(9, 11).float()]
    student_step_(params[0], grad, [narrow], weights, backend=backend)
    student_step_(params[1], grad, [wide], weights, backend="reference")
    assert narrow.h.dtype == narrow.c.dtype == torch.bfloat16
    torch.testing.assert_close(params[0], params[1], rtol=1e-5, atol=1e-6)
    for name in ("h", "c"):
        ours, exact = getattr(narrow, name).float(), getattr(wide, name)
        assert ((ours - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()
    mixed = [narrow, wide]
    with pytest.raises(ValueError, match="state.h must be torch.bfloat16"):
        student_step_(params[0] * 2, grad * 2, mixed, weights, backend=backend)


@compiled
def test_compiled_tensors_must_not_share_memory(backend: str) -> None:
    param, states = draw(5).float(), [make_state(5, dtype=torch.float32) for _ in range(2)]
    weights, grads = make_weights(dtype=torch.float32), [draw(5).float()] * 2
    with pytest.raises(ValueError, match="must not share memory"):
        student_step_([param, param], grads, states, weights, backend=backend)


def test_tensors_that_overlap_are_refused_by_name() -> None:
    """In part, in strides, and with themselves; not those that lie between each other."""
    base, wide = draw(24), draw(4, 6)

    def step(*params: Tensor, **state: Tensor) -> None:
        states = [make_state(*param.shape) for param in params]
        states[0] = states[0]._replace(**state)
        student_step_(params, [torch.ones_like(p) for p in params], states, make_weights())

    for params, why in (
        ((draw(3), base[:8], base[4:12]), r"params\[1\] and params\[2\] do"),
        ((base[:8], base[8:9].expand(3)), r"params\[1\] is expanded"),
        ((base.unfold(0, 3, 1),), r"params\[0\] is expanded, or overlaps itself"),
        ((wide[:, :4], wide[:, 3:]), r"params\[0\] and params\[1\] do"),
        ((wide[:, 1], draw(4), wide[2]), r"params\[.\] and params\[.\] do"),
    ):
        with pytest.raises(ValueError, match=f"must not share memory: .* but {why}"):
            step(*params)
    with pytest.raises(ValueError, match=r"but (params\[0\] and states\[0\].v|.*v and params) do"):
        step(base[:8], v=base[7:15])
    step(base[:8], base[8:], wide[:, ::2], wide[:, 1::2].mT, draw(0), draw(2, 3, 4).transpose(0, 2))


@of_each
def test_steps_into_memory_that_is_there(backend: str) -> None:
    """Out of place, in place and backwards, the results are the functional form's."""
    generator = torch.Generator().manual_seed(5)
    n, settings = 130, StepSettings()
    weights = [w.detach() for w in Student(StudentConfig(hidden=6)).double().weights()]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    grad = draw(n)
    state = StudentState(draw(n), draw(n).square(), draw(2, 6, n).tanh(), draw(2, 6, n))
    update, new = student_step(grad, state, weights, settings, backend=backend)
    apart = StudentState(*(t * math.nan for t in state))
    same = StudentState(*(t.clone() for t in state))
    for target, source in ((apart, state), (same, same)):
        moved = torch.empty_like(grad)
        given = as_students(moved, StudentState(*target), grad, source, weights, settings)
        step_into(*given, backend)
        assert torch.equal(moved, update)
        assert all(map(torch.equal, target, new))

    leaves = [t.clone().requires_grad_() for t in (grad, *state, *weights)]
    outs = student_step(
        leaves[0], StudentState(*leaves[1:5]), leaves[5:], settings, backend=backend
    )
    d_update, d_state = draw(n), StudentState(draw(n), draw(n), draw(2, 6, n), draw(2, 6, n))
    expected = torch.autograd.grad([outs[0], *outs[1]], leaves, [d_update, *d_state])
    d_old = StudentState(*(t.clone() for t in d_state))
    given = as_students(d_update, d_old, grad, state, weights, settings)
    d_grad, d_weights = backward_into(*given, backend)
    found = d_grad[0], *d_old, *(weight[0] for weight in d_weights)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_memory_to_write_to_is_checked() -> None:
    weights = [w.detach() for w in Student(StudentConfig(hidden=6)).weights()]
    grad = torch.zeros(8)
    state = initial_state(grad, weights)
    twice, rest = state._replace(v=state.m), (grad, state, weights, StepSettings())
    with pytest.raises(ValueError, match="share memory"):
        step_into(*as_students(torch.empty(8), twice, *rest), "cpu")
    with pytest.raises(ValueError, match="must have shape"):
        step_into(*as_students(torch.empty(9), state, *rest), "cpu")


@at(
    pytest.param("reference", "cpu", id="reference"),
    *(*ON_CPU, *on_gpus("triton", "cuda"), *INTERPRETED),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_had_no_gradient_but_zero_moves_by_weight_decay_alone(
    backend: str, device: str, dtype: torch.dtype
) -> None:
    """By the functional form, which meta-trains, it drifts; the state follows that in both."""
    weights = [
        weight.to(device) for weight in make_weights(layers=2, hidden=4, dtype=torch.float32)
    ]
    still = torch.arange(37, device=device) % 3 == 0
    param = draw(37, dtype=torch.float32).to(device, dtype)
    grad = torch.where(still, 0, draw(37, seed=3, dtype=torch.float32).to(device))
    state = initial_state(param, weights)
    update, new = student_step(grad, state, weights, SETTINGS, backend="reference")
    update, new = student_step(grad, new, weights, SETTINGS, backend="reference")
    assert update[still].ne(0).all()
    before = param.clone()
    for keep in (1.0, 0.5):
        student_step_(
            *([param], [grad], [state], weights, SETTINGS),
            weight_decay=1 - keep,
            backend=backend,
        )
        before = before.float().mul(keep).to(dtype)
        assert torch.equal(param[still], before[still])
        assert not torch.equal(param[~still], before[~still])
    for ours, theirs in zip(state, new, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
