"""A student with a pace as an optimizer: every tensor's steps grow and shrink by its agreements."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import students
import torch
from students import check_stats_tell_the_step, give_gradients
from torch import Tensor, nn

from amalgam import (
    AmalgamatedOptimizer,
    NominalConfig,
    NominalStudent,
    PolicyOptimizer,
    estimate_memory,
)
from amalgam.layout import Layout

SHAPES = [(5, 3), (7,), (), (0, 2), (2, 3, 2)]


def student(pacing: float = 0.3, **config: Any) -> NominalStudent:
    made = NominalStudent(
        NominalConfig(
            **{
                "hidden": 4,
                "rate_warmup": 4,
                "pacing": pacing,
                "pacing_steps": 3,
                "steady_agreement": 0.1,
            }
            | config
        ),
        generator=torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        made.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    return made


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return students.parameters(SHAPES, dtype)


def paces(optimizer: AmalgamatedOptimizer) -> list[float]:
    return [float(entry["pace"]) for entry in optimizer.state.values()]


CONSTANT = [0.7] * 6
SCHEDULE = [0.35, 0.7, 0.7, 0.35, 0.0, 0.07]  # what is left of it is 1 while it warms up


@pytest.mark.parametrize("rates", [CONSTANT, SCHEDULE], ids=["constant", "schedule"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_it_steps_as_the_policy_does(backend: str, dtype: torch.dtype, rates: list[float]) -> None:
    of = student()
    params = parameters(dtype)
    optimizer = AmalgamatedOptimizer(params, student=of, backend=backend)
    policy = copy.deepcopy(of).to(torch.float64 if dtype == torch.float64 else torch.float32)
    layout = Layout({str(n): tuple(p.shape) for n, p in enumerate(params)})
    values = torch.cat([p.detach().reshape(-1) for p in params])
    state = policy.initial_state(values.to(policy.head.weight.dtype), layout)
    for step, rate in enumerate(rates):
        give_gradients(params, step)
        grad = torch.cat([p.grad.reshape(-1) for p in params if p.grad is not None])
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        left = rate / max(rates[: step + 1])
        update, state = policy.step(grad.to(state.m.dtype), state, layout=layout, left=left)
        values = (values.to(update.dtype) - rate * update.detach()).to(dtype)
    filled = [n for n, p in enumerate(params) if p.numel()]
    assert [paces(optimizer)[n] for n in filled] == pytest.approx(state.pace.tolist(), abs=1e-6)
    assert max(map(abs, paces(optimizer))) > 0.2
    ours = torch.cat([p.detach().reshape(-1) for p in params])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(ours, values, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("left", [1.0, 0.5, 0.01, 0.0])
def test_a_step_is_the_shorter_of_the_paces_and_the_schedules(left: float) -> None:
    """And of that, as it is the first, one of rate_warmup parts."""
    of = student(rate_warmup=4)
    shapes = [torch.Size((2,))] * 3
    constants = of.constants_of(shapes, torch.zeros(()))
    steps, pace = torch.zeros(3), torch.tensor([-2.0, -0.1, 0.4])
    none = lambda: torch.zeros(3, 2, dtype=torch.float64)  # noqa: E731
    for given in (left, torch.tensor(left), torch.full((3,), left)):
        context = of.context_of(constants, steps, (), pace=pace, agreements=none, left=given)
        assert torch.equal(context.pace, pace)
        found = 4 * left * context.corrections[:, 2]
        shorter = [min(math.exp(-2.0), left), min(math.exp(-0.1), left), left * math.exp(0.4)]
        assert found.tolist() == pytest.approx(shorter, rel=1e-6)


def test_the_peak_of_a_rate_is_kept_and_loaded() -> None:
    params = parameters()
    optimizer = AmalgamatedOptimizer(params, student=student(), lr=0.5)
    for step, rate in enumerate((0.5, 0.8, 0.1)):
        optimizer.param_groups[0]["lr"] = rate
        give_gradients(params, step)
        optimizer.step()
    assert optimizer.param_groups[0]["peak_lr"] == 0.8
    other = AmalgamatedOptimizer(params, student=student(), lr=0.5)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["peak_lr"] == 0.8
    # A tensor, as who captures steps sets. Statistics are of the step, and keep nothing.
    other.param_groups[0]["lr"] = torch.tensor(0.2)
    other.step()
    assert float(other.param_groups[0]["peak_lr"]) == pytest.approx(0.8)
    other.param_groups[0]["lr"].fill_(1.5)
    other.stats()
    assert float(other.param_groups[0]["peak_lr"]) == pytest.approx(0.8)
    other.step()
    assert float(other.param_groups[0]["peak_lr"]) == 1.5


def test_a_skipped_steps_rate_is_no_peak_however_steps_are_taken() -> None:
    """And a step that raises changes nothing."""
    runs = []
    for how in ("plain", "capturable", "tensor", "skip-tensor", "compiled"):
        params = [param for param in parameters() if param.numel()]
        optimizer = AmalgamatedOptimizer(
            params,
            student=student(),
            lr=torch.tensor(1.0) if how == "tensor" else 1.0,
            capturable=how in ("capturable", "tensor", "skip-tensor"),
            nonfinite="skip-tensor" if how == "skip-tensor" else "skip-step",
        )
        step = optimizer.step
        if how == "compiled":
            torch.compiler.reset()
            step = torch.compile(optimizer.step, backend="eager")
        for number in range(4):
            give_gradients(params, number)
            if number == 0:
                for param in params:
                    assert param.grad is not None
                    param.grad.fill_(math.inf)
            step()
            optimizer.param_groups[0]["lr"] = torch.tensor(0.5) if how == "tensor" else 0.5
        assert optimizer.skipped_steps == 1
        assert optimizer.param_groups[0]["peak_lr"] == 0.5
        runs.append([*(p.detach() for p in params), *map(torch.tensor, paces(optimizer))])
    for other in runs[1:]:
        for found, expected in zip(other, runs[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    params = parameters()
    optimizer = AmalgamatedOptimizer(params, student=student(), nonfinite="raise")
    give_gradients(params, 0)
    assert params[0].grad is not None
    params[0].grad[0, 0] = math.inf
    with pytest.raises(RuntimeError, match="are not finite"):
        optimizer.step()
    assert optimizer.param_groups[0]["peak_lr"] == 0


def test_optimizers_of_before_begin_without_a_peak() -> None:
    params = parameters()
    optimizer = AmalgamatedOptimizer(params, student=student())
    give_gradients(params, 0)
    optimizer.step()
    state = optimizer.state_dict()
    del optimizer.param_groups[0]["peak_lr"], state["param_groups"][0]["peak_lr"]
    again = pickle.loads(pickle.dumps(optimizer))
    assert again.param_groups[0]["peak_lr"] == 0
    other = AmalgamatedOptimizer(params, student=student())
    other.load_state_dict(state)
    assert other.param_groups[0]["peak_lr"] == 0


@pytest.mark.parametrize("peak", [math.inf, math.nan, -1.0, "x", None, torch.ones(2)])
def test_a_peak_that_is_none_is_refused(peak: Any) -> None:
    params = parameters()
    optimizer = AmalgamatedOptimizer(params, student=student())
    state = optimizer.state_dict()
    state["param_groups"][0]["peak_lr"] = peak
    with pytest.raises((TypeError, ValueError), match="peak_lr must"):
        optimizer.load_state_dict(state)


def test_a_rate_on_the_meta_device_has_a_peak_there() -> None:
    params = [nn.Parameter(torch.ones(3, device="meta"))]
    lr = torch.tensor(1.0, device="meta")
    optimizer = AmalgamatedOptimizer(params, lr, student=student(), capturable=True)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["peak_lr"].device.type == "meta"


def test_a_policy_optimizer_steps_by_the_schedule_likewise() -> None:
    params, twins = parameters(), parameters()
    optimizers = (
        AmalgamatedOptimizer(params, student=student(), backend="reference"),
        PolicyOptimizer(twins, student(), backend="reference"),
    )
    for step, rate in enumerate(SCHEDULE):
        for each, optimizer in zip((params, twins), optimizers, strict=True):
            give_gradients(each, step)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param, twin, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("nonfinite", ["skip-step", "skip-tensor"])
def test_a_skipped_step_leaves_paces(capturable: bool, nonfinite: str) -> None:
    params = parameters()
    optimizer = AmalgamatedOptimizer(
        params, student=student(), capturable=capturable, nonfinite=nonfinite
    )
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
    before = paces(optimizer)
    give_gradients(params, 3)
    assert params[1].grad is not None
    params[1].grad[2] = math.nan
    optimizer.step()
    moved = [one != other for one, other in zip(paces(optimizer), before, strict=True)]
    assert moved == [nonfinite == "skip-tensor" and n in (0, 2, 4) for n in range(5)]
    assert all(map(math.isfinite, paces(optimizer)))


@pytest.mark.parametrize("capturable", [False, True])
def test_warm_up_has_no_pace(capturable: bool) -> None:
    params = parameters()
    optimizer = AmalgamatedOptimizer(
        params, student=student(), warmup_steps=2, warmup_lr=0.1, capturable=capturable
    )
    for step in range(2):
        give_gradients(params, step)
        optimizer.step()
        assert not any(paces(optimizer))
    give_gradients(params, 2)
    optimizer.step()
    assert paces(optimizer)[0]


def test_gradients_of_what_is_maximised_count_mirrored() -> None:
    runs = []
    for sign in (1.0, -1.0):
        params = parameters()
        optimizer = AmalgamatedOptimizer(params, student=student(), maximize=sign < 0)
        for step in range(4):
            give_gradients(params, step, sign)
            optimizer.step()
        runs.append([*params, *(torch.tensor(pace) for pace in paces(optimizer))])
    assert all(map(torch.equal, *runs))


def test_a_run_goes_on_from_its_state() -> None:
    params = parameters()
    optimizer = AmalgamatedOptimizer(params, student=student())
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
    again = [nn.Parameter(p.detach().clone()) for p in params]
    other = AmalgamatedOptimizer(again, student=student())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 6):
        for each, run in ((params, optimizer), (again, other)):
            give_gradients(each, step)
            run.step()
    assert all(map(torch.equal, params, again))
    assert paces(optimizer) == paces(other)
    state = optimizer.state_dict()
    del state["state"][1]["pace"]
    with pytest.raises(ValueError, match="must hold .*'pace'.*, but lacks \\['pace'\\]"):
        other.load_state_dict(state)


def test_estimated_memory_is_exact() -> None:
    params = parameters()
    for pacing in (0.0, 0.3):
        optimizer = AmalgamatedOptimizer(params, student=student(pacing))
        give_gradients(params, 0)
        optimizer.step()
        taken = sum(
            tensor.nbytes
            for entry in optimizer.state.values()
            for tensor in entry.values()
            if isinstance(tensor, Tensor)
        )
        assert estimate_memory(params, student(pacing)).state_bytes == taken
        assert ("pace" in optimizer.state[params[0]]) == (pacing > 0)


def test_stats_tell_the_step_with_its_pace() -> None:
    params = parameters()
    optimizer = AmalgamatedOptimizer(params, student=student())
    for step in range(4):
        give_gradients(params, step)
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.3
    give_gradients(params, 4)
    check_stats_tell_the_step(optimizer, params, (0, 1, 4))


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_a_compiled_step_is_the_same(kind: Callable[[float], float | Tensor]) -> None:
    runs = []
    for compiled in (False, True):
        params = parameters()
        optimizer = AmalgamatedOptimizer(
            params, student=student(), warmup_steps=1, lr=kind(0.0), capturable=True
        )
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for number, rate in enumerate(SCHEDULE):
            (group,) = optimizer.param_groups
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
            give_gradients(params, number)
            if number == 2:
                assert params[0].grad is not None
                params[0].grad[0, 0] = math.inf
            step()
        runs.append([*(p.detach() for p in params), *map(torch.tensor, paces(optimizer))])
    for eager, traced in zip(*runs, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-6, atol=1e-7)
