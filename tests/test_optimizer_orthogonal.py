"""A student whose updates of matrices are orthogonalised, as an optimizer."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import students
import torch
from students import check_stats_tell_the_step, give_gradients, nominal
from torch import Tensor, nn

from amalgam import AmalgamatedOptimizer, PolicyOptimizer, estimate_memory
from amalgam.layout import Layout

SHAPES = [(5, 3), (7,), (), (0, 2), (4, 2, 3, 3), (1, 6), (6, 1, 2), (5, 3)]
MATRICES = {0, 4, 6, 7}


def student(**config: Any) -> Any:
    return nominal(**{"orthogonal": True, "pacing": 0.1} | config)


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return students.parameters(SHAPES, dtype)


def stepped(steps: int = 5, dtype: torch.dtype = torch.float32, **how: Any) -> list[nn.Parameter]:
    params = parameters(dtype)
    optimizer = AmalgamatedOptimizer(params, **{"student": student()} | how)
    for step in range(steps):
        give_gradients(params, step)
        optimizer.step()
    return params


def assert_close(ours: Any, theirs: Any, tolerance: float = 1e-6) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_it_steps_as_the_policy_does(backend: str, dtype: torch.dtype) -> None:
    of, params = student(), parameters(dtype)
    optimizer = AmalgamatedOptimizer(params, student=of, backend=backend, lr=0.7, weight_decay=1e-4)
    policy = copy.deepcopy(of).to(torch.float64 if dtype == torch.float64 else torch.float32)
    layout = Layout({str(n): tuple(p.shape) for n, p in enumerate(params)})
    values = torch.cat([p.detach().reshape(-1) for p in params])
    state = policy.initial_state(values.to(policy.head.weight.dtype), layout)
    for step in range(6):
        give_gradients(params, step)
        grad = torch.cat([p.grad.reshape(-1) for p in params if p.grad is not None])
        optimizer.step()
        update, state = policy.step(grad.to(state.m.dtype), state, layout=layout)
        kept = values.to(update.dtype) * (1 - 0.7 * 1e-4)
        values = (kept - 0.7 * update.detach()).to(dtype)
    ours = torch.cat([p.detach().reshape(-1) for p in params])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(ours, values, rtol=tolerance, atol=tolerance)


def test_only_matrices_step_otherwise_and_as_far() -> None:
    plain, whole = (stepped(1, student=student(orthogonal=flag)) for flag in (False, True))
    for number, (begin, one, other) in enumerate(zip(parameters(), plain, whole, strict=True)):
        if number not in MATRICES:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
            continue
        steps = [(p - begin).detach() for p in (one, other)]
        torch.testing.assert_close(steps[0].norm(), steps[1].norm(), rtol=1e-4, atol=0)
        # Two columns of signs may be orthogonal as they are.
        assert number == 6 or (steps[0] - steps[1]).norm() > 0.05 * steps[0].norm()


@pytest.mark.parametrize(
    "how",
    [
        {"capturable": True},
        {"nonfinite": "skip-tensor"},
        {"nonfinite": "skip-tensor", "capturable": True},
        {"rounding": "stochastic"},
        {"lr": torch.tensor(1.0)},
        {"lr": torch.tensor(1.0), "capturable": True},
        {"lr": torch.ones(1), "capturable": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("warmup_steps", [0, 2])
def test_every_way_to_step_is_the_same(how: dict[str, Any], warmup_steps: int) -> None:
    common = {"weight_decay": 1e-4, "warmup_steps": warmup_steps, "warmup_lr": 0.1}
    assert_close(stepped(**common, **how), stepped(**common))


def test_the_policys_own_optimizer_is_the_same() -> None:
    params = parameters()
    optimizer = PolicyOptimizer(params, student())
    for step in range(5):
        give_gradients(params, step)
        optimizer.step()
    assert_close(params, stepped(), 1e-5)


def test_groups_may_differ_and_settings_are_taken() -> None:
    of = student()
    whole, plain = stepped(student=of), stepped(student=of, orthogonal=False)
    assert_close(plain, stepped(student=student(orthogonal=False)), 0)
    assert_close(stepped(student=student(orthogonal=False), orthogonal=True), whole, 0)
    params = parameters()
    groups = [{"params": params[:4]}, {"params": params[4:], "orthogonal": False}]
    optimizer = AmalgamatedOptimizer(groups, student=of)
    for step in range(5):
        give_gradients(params, step)
        optimizer.step()
    assert_close(params, [*whole[:4], *plain[4:]], 0)
    with pytest.raises(TypeError, match="orthogonal must be True or False, not 1"):
        AmalgamatedOptimizer(params, student=of, orthogonal=1)  # type: ignore[arg-type]


def test_a_group_may_be_set_between_steps_and_absent_ones_are_the_students() -> None:
    runs = []
    for flags in ((True, False, True), (True, True, True)):
        params = parameters()
        groups = [{"params": params, "orthogonal": None}]
        optimizer = AmalgamatedOptimizer(groups, student=student())
        assert optimizer.param_groups[0]["orthogonal"] is True
        for step, flag in enumerate(flags):
            optimizer.param_groups[0]["orthogonal"] = flag
            give_gradients(params, step)
            check_stats_tell_the_step(optimizer, params, (0,))
        runs.append(params[0].detach())
    assert not torch.equal(*runs)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_changes_nothing(compiled: bool) -> None:
    runs = []
    for surrounded in (False, True):
        params = parameters()[:2]  # tracing takes its time
        optimizer = AmalgamatedOptimizer(params, student=student())
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        told = []
        for number in range(2):
            give_gradients(params, number)
            with torch.autocast("cpu", torch.bfloat16, enabled=surrounded):
                told.append(optimizer.stats()["0.0"].update_over_parameter)
                step()
        runs.append([*params, torch.tensor(told)])
    assert_close(*runs, 0)


def test_a_first_step_in_inference_mode_does_not_bind_later_ones() -> None:
    params = parameters()
    optimizer = AmalgamatedOptimizer(params, student=student())
    give_gradients(params, 0)
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.inference_mode():
        optimizer.step()
    give_gradients(params, 1)
    optimizer.step()
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("nonfinite", ["skip-step", "skip-tensor"])
@pytest.mark.filterwarnings("ignore:a gradient was not finite")
def test_what_is_skipped_keeps_its_bits(capturable: bool, nonfinite: str) -> None:
    params = parameters()
    optimizer = AmalgamatedOptimizer(
        params, student=student(), capturable=capturable, nonfinite=nonfinite, weight_decay=1e-4
    )
    for step in range(2):
        give_gradients(params, step)
        optimizer.step()
    before = [p.detach().clone() for p in params]
    give_gradients(params, 2)
    assert params[0].grad is not None
    params[0].grad[1, 1] = math.inf
    optimizer.step()
    kept = [torch.equal(one, other) for one, other in zip(params, before, strict=True)]
    assert kept == [nonfinite == "skip-step" or n in (0, 3) for n in range(len(SHAPES))]


def test_what_never_had_a_gradient_does_not_move() -> None:
    param = nn.Parameter(torch.ones(4, 5))
    optimizer = AmalgamatedOptimizer([param], student=student())
    mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) < 0.7
    for step in range(4):
        param.grad = mask * torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    assert torch.equal(param != 1, mask)


def test_mirrored_gradients_have_the_mirrored_run() -> None:
    runs = []
    for sign in (1.0, -1.0):
        params = [nn.Parameter(sign * p.detach()) for p in parameters()]
        optimizer = AmalgamatedOptimizer(params, student=student())
        for step in range(4):
            give_gradients(params, step, sign)
            optimizer.step()
        runs.append([sign * p.detach() for p in params])
    assert all(map(torch.equal, *runs))


def test_gradients_and_parameters_may_lie_in_any_order() -> None:
    runs = []
    for order in (torch.contiguous_format, torch.channels_last):
        generator = torch.Generator().manual_seed(1)
        kernel = torch.randn(4, 3, 3, 3, generator=generator)
        param = nn.Parameter(kernel.to(memory_format=order))
        optimizer = AmalgamatedOptimizer([param], student=student())
        for _ in range(3):
            grad = torch.randn(4, 3, 3, 3, generator=generator)
            param.grad = grad.to(memory_format=order)
            optimizer.step()
        runs.append(param.detach().contiguous())
    assert torch.equal(*runs)


def test_bfloat16_is_rounded_at_random_and_right_on_average() -> None:
    runs = []
    for dtype, rounding in ((torch.float32, "nearest"), (torch.bfloat16, "stochastic")):
        param = nn.Parameter(torch.ones(64, 64, dtype=dtype))
        optimizer = AmalgamatedOptimizer([param], student=student(), lr=0.02, rounding=rounding)
        for step in range(8):
            drawn = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
            param.grad = (drawn + 1).to(dtype)
            optimizer.step()
        runs.append(param.detach().float())
    exact, rounded = runs
    assert (1 - exact).abs().mean() < 2**-7  # steps that nearest would lose
    assert rounded.unique().numel() > 1
    assert rounded.mean().item() == pytest.approx(exact.mean().item(), abs=2e-4)


def test_a_run_goes_on_from_its_state_and_from_that_of_an_earlier_version() -> None:
    params = parameters()
    optimizer = AmalgamatedOptimizer(params, student=student())
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
    again = [nn.Parameter(p.detach().clone()) for p in params]
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["orthogonal"]
    other = AmalgamatedOptimizer(again, student=student())
    other.load_state_dict(saved)
    for step in range(3, 6):
        for each, run in ((params, optimizer), (again, other)):
            give_gradients(each, step)
            run.step()
    assert all(map(torch.equal, params, again))


def test_stats_tell_the_step() -> None:
    params = parameters()
    optimizer = AmalgamatedOptimizer(params, student=student())
    give_gradients(params, 0)
    optimizer.step()
    give_gradients(params, 1)
    check_stats_tell_the_step(optimizer, params, (0, 1, 4))


def test_memory_is_told_with_that_of_updates() -> None:
    params = parameters()
    found = [estimate_memory(params, student(orthogonal=flag)) for flag in (False, True)]
    elements = sum(p.numel() for p in params)
    assert found[0].state_bytes == found[1].state_bytes
    assert found[1].update_bytes == 4 * elements
    assert found[0].update_bytes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_step_is_the_same(dtype: torch.dtype) -> None:
    runs = []
    for compiled in (False, True):
        params = parameters(dtype)[:4]
        optimizer = AmalgamatedOptimizer(
            params, student=student(), warmup_steps=1, warmup_lr=0.1, weight_decay=1e-4
        )
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for number in range(4):
            give_gradients(params, number)
            if number == 2:
                assert params[0].grad is not None
                params[0].grad[0, 0] = math.inf
            step()
        runs.append([p.detach() for p in params])
    assert_close(*runs, 1e-6 if dtype == torch.float32 else 0.01)


def test_steps_need_no_numbers_on_the_meta_device() -> None:
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES]
    optimizer = AmalgamatedOptimizer(params, student=student())
    for param in params:
        param.grad = torch.empty_like(param)
    optimizer.step()
    assert all(
        tensor.is_meta
        for p in params
        for tensor in optimizer.state[p].values()
        if isinstance(tensor, Tensor) and tensor.dim()
    )


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
def test_a_gpu_steps_as_a_cpu_does(captured: bool) -> None:
    """Up to bfloat16, in which a GPU takes the products; also in a CUDA graph."""
    host, begin = parameters(), parameters()
    device = [nn.Parameter(p.detach().cuda()) for p in begin]
    for param in device:
        param.grad = torch.zeros_like(param)
    ours = AmalgamatedOptimizer(host, student=student())
    theirs = AmalgamatedOptimizer(device, student=student(), capturable=captured)
    graph = torch.cuda.CUDAGraph() if captured else None
    for step in range(5):
        give_gradients(host, step)
        for param, twin in zip(host, device, strict=True):
            assert param.grad is not None
            assert twin.grad is not None
            twin.grad.copy_(param.grad)
        ours.step()
        if graph is None or step == 0:
            theirs.step()
        elif step == 1:
            with torch.cuda.graph(graph):
                theirs.step()
        if graph is not None and step:
            graph.replay()
    for before, one, other in zip(begin, host, device, strict=True):
        moved = (one - before).norm()
        assert (one - other.cpu()).norm() <= 0.03 * moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weight_decay_is_the_same_with_capturable(dtype: torch.dtype) -> None:
    found = []
    for capturable in (False, True):
        generator = torch.Generator().manual_seed(3)
        param = nn.Parameter(torch.randn(6, 5, generator=generator, dtype=dtype))
        optimizer = AmalgamatedOptimizer(
            [param], lr=0.7, weight_decay=1e-3, capturable=capturable, backend="reference"
        )
        for _ in range(5):
            param.grad = torch.randn(6, 5, generator=generator, dtype=dtype)
            optimizer.step()
        found.append(param.detach())
    torch.testing.assert_close(*found, rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_a_skipped_step_keeps_the_sign_of_zero() -> None:
    begin = torch.tensor([[-0.0, 1.0], [0.0, -3.0]])
    param = nn.Parameter(begin.clone())
    optimizer = AmalgamatedOptimizer([param], weight_decay=0.1, capturable=True)
    param.grad = torch.full((2, 2), torch.inf)
    optimizer.step()
    assert torch.equal(param.detach().view(torch.int32), begin.view(torch.int32))
    assert optimizer.skipped_steps == 1
