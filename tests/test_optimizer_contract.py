"""AmalgamatedOptimizer where AdamW was: what loops do with an optimizer, row by row.

docs/optimizer.md lists what torch.optim's optimizers do, and the tests of this file that show it.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import math
import pickle
import re
import threading
import typing
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from students import nominal
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import lr_scheduler as schedulers
from torch.optim import swa_utils
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from amalgam import (
    AmalgamatedOptimizer,
    NominalConfig,
    NominalStudent,
    PolicyOptimizer,
    Student,
    StudentConfig,
    TeacherOptimizer,
    estimate_memory,
)
from amalgam.optimizers.base import StepOptimizer
from amalgam.policies import FusedStudent

SHAPES = [(3, 4), (), (5,), (2, 3, 2)]

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")

on_cpu = pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
everywhere = pytest.mark.parametrize(
    "backend", ["reference", "cpu", "triton interpreted"], indirect=True
)


def paper(**config: Any) -> Student:
    config = {"layers": 1, "hidden": 4, "warmup_steps": 0, **config}
    student = Student(StudentConfig(**config), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        student.head.bias.fill_(0.1)  # a drift, where all gradients are zero
    return student


both = pytest.mark.parametrize(
    "make", [pytest.param(nominal, id="nominal"), pytest.param(paper, id="paper")]
)
shipped = pytest.mark.parametrize("student", ["standard", "digits"])
Make = Callable[..., FusedStudent]


def tensors(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype))
        for shape in SHAPES
    ]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        grad = torch.randn(param.shape, generator=generator, dtype=torch.float32)
        param.grad = grad.to(param.dtype)


def run(optimizer: torch.optim.Optimizer, steps: range) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1))


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((64, 8), generator=generator)
    return x, x @ torch.randn((8, 1), generator=generator)


# --- What a step makes of gradients ---


@everywhere
@both
def test_parameters_without_any_gradient_but_zero_stay(make: Make, backend: str) -> None:
    """Padding rows, unused vocabulary, pruned weights; the others step as if they were alone."""
    some = torch.tensor([True, False, True, False, False])
    whole, alone = nn.Parameter(torch.arange(5.0)), nn.Parameter(torch.tensor([0.0, 2.0]))
    whole.data[3] = -0.0
    before = whole.detach().clone()
    one = AmalgamatedOptimizer([whole], student=make(), backend=backend)
    other = AmalgamatedOptimizer([alone], student=make(), backend=backend)
    for step in range(2 if backend == "triton" else 5):
        grad = torch.randn(5, generator=torch.Generator().manual_seed(step))
        whole.grad, alone.grad = torch.where(some, grad, 0), grad[some]
        one.step()
        other.step()
    kept = whole.detach().view(torch.int32) == before.view(torch.int32)
    assert torch.equal(kept, ~some)
    torch.testing.assert_close(whole.detach()[some], alone.detach())
    whole.grad = torch.full((5,), -1.0)
    one.step()
    assert (whole > before)[~some].all()


@both
def test_weight_decay_reaches_what_has_no_gradient(make: Make) -> None:
    """As AdamW's does."""
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.zeros(3)
    AmalgamatedOptimizer([param], 0.5, make(), weight_decay=0.001).step()
    torch.testing.assert_close(param.detach(), torch.full((3,), 1 - 0.0005))


@on_cpu
@both
def test_features_in_the_hundreds_train(make: Make, backend: str) -> None:
    """Scales of losses and features: the first steps of some kinds explode at such."""
    x, y = inputs()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        linear = nn.Linear(8, 1)
    student = NominalStudent(NominalConfig(hidden=4)) if make is nominal else "digits"
    optimizer = AmalgamatedOptimizer(
        linear.parameters(), student=student, backend=backend, warmup_steps=0
    )
    losses = []
    for _ in range(120):
        optimizer.zero_grad()
        loss = (linear(100 * x) - 100 * y).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    assert optimizer.skipped_steps == 0
    assert losses[-1] < 0.7 * losses[0]


def test_the_default_trains_whatever_the_scale_of_the_loss() -> None:
    """To the same bits. The paper's student begins with SGD at a rate of its own, and does not."""
    x, y = inputs()
    found = {}
    for scale in (1.0, 64.0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            linear = nn.Linear(8, 1, bias=False)
        optimizer = AmalgamatedOptimizer(linear.parameters())
        for _ in range(60):
            optimizer.zero_grad()
            (scale * (linear(x) - y)).square().mean().backward()
            optimizer.step()
        found[scale] = linear.weight.detach()
    assert torch.equal(*found.values())


@on_cpu
@both
def test_a_parameter_thawed_late_moves_as_any(make: Make, backend: str) -> None:
    early, late = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = AmalgamatedOptimizer([early, late], student=make(), backend=backend)
    early.grad = torch.tensor([1e4, -1e4])
    optimizer.step()
    first = early.detach().clone()
    for _ in range(3):
        optimizer.step()
    late.grad = early.grad.clone()
    optimizer.step()
    assert torch.equal(late, first)
    assert late.abs().max() < 0.2


# --- Gradients that are not finite ---


def poison(params: list[nn.Parameter], index: int, value: float = math.nan) -> None:
    grad = params[index].grad
    assert grad is not None
    grad.view(-1)[0] = value


def states(optimizer: AmalgamatedOptimizer, params: list[nn.Parameter]) -> list[Any]:
    return [copy.deepcopy(dict(optimizer.state[param])) for param in params]


def assert_equal_states(ours: list[Any], theirs: list[Any]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name]), name


@on_cpu
@both
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, 3e19])
def test_a_tensor_alone_may_be_skipped(
    make: Make, backend: str, capturable: bool, value: float
) -> None:
    """The others step as they would have, the one and its count of steps stay."""
    params, twins = tensors(), tensors()
    how: dict[str, Any] = {"student": make(), "backend": backend, "capturable": capturable}
    optimizer = AmalgamatedOptimizer(params, nonfinite="skip-tensor", **how)
    clean = AmalgamatedOptimizer(twins, **how)
    for one in (optimizer, clean):
        run(one, range(2))
    kept, before = params[0].detach().clone(), states(optimizer, params[:1])
    set_gradients(params, 2)
    set_gradients(twins, 2)
    poison(params, 0, value)
    twins[0].grad = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        optimizer.step()
    clean.step()
    assert torch.equal(params[0], kept)
    assert_equal_states(states(optimizer, params[:1]), before)
    run(optimizer, range(3, 5))
    run(clean, range(3, 5))
    # Sums over several tensors' columns at once may be blocked differently.
    torch.testing.assert_close(params, twins)
    torch.testing.assert_close(states(optimizer, params), states(clean, twins))
    assert optimizer.skipped_steps == 1


def test_a_step_may_raise_instead_and_changes_nothing() -> None:
    names = ["a", "b", "c", "d"]
    params = tensors()
    optimizer = AmalgamatedOptimizer(
        zip(names, params, strict=True), student=nominal(), nonfinite="raise"
    )
    run(optimizer, range(2))
    before, values = states(optimizer, params), [p.detach().clone() for p in params]
    set_gradients(params, 2)
    poison(params, 0)
    poison(params, 2)
    with pytest.raises(RuntimeError, match="gradients of 'a', 'c' are not finite; parameters and"):
        optimizer.step()
    assert all(map(torch.equal, params, values))
    assert_equal_states(states(optimizer, params), before)
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("nonfinite", ["skip-step", "skip-tensor"])
def test_reminders_name_the_gradients_after_every_hundred_in_a_row(nonfinite: str) -> None:
    params = tensors()
    optimizer = AmalgamatedOptimizer(params, student=nominal(), nonfinite=nonfinite)
    told: dict[int, str] = {}

    def steps(numbers: range, bad: bool) -> None:
        for number in numbers:
            set_gradients(params, 0)
            if bad:
                poison(params, 1)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer.step()
            if caught:
                told[number] = str(caught[-1].message)

    steps(range(50), True)
    steps(range(50, 51), False)
    steps(range(51, 300), True)
    assert list(told) == [0, 150, 250]
    assert all("params[1] of group 0 of shape ()" in message for message in told.values())
    assert "in 100 steps in a row" in told[150]
    assert ("nonfinite='skip-tensor'" in told[150]) == (nonfinite == "skip-step")
    assert optimizer.skipped_steps == 299


def test_warnings_of_skips_point_to_the_line_that_stepped() -> None:
    params = tensors()
    optimizer = AmalgamatedOptimizer(params, student=nominal())
    set_gradients(params, 0)
    poison(params, 1)
    with pytest.warns(RuntimeWarning, match="not finite") as caught:
        optimizer.step()
    assert caught[0].filename == __file__


@pytest.mark.parametrize("capturable", [False, True])
def test_skips_are_counted_through_checkpoints(capturable: bool) -> None:
    params = tensors()
    optimizer = AmalgamatedOptimizer(params, student=nominal(), capturable=capturable)
    run(optimizer, range(1))
    poison(params, 1)
    with contextlib.suppress(RuntimeWarning), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
        optimizer.step()
    for twin in (
        AmalgamatedOptimizer(tensors(), student=nominal(), capturable=capturable),
        copy.deepcopy(optimizer),
    ):
        twin.load_state_dict(optimizer.state_dict())
        assert twin.skipped_steps == 2
        run(twin, range(1))
        assert twin.skipped_steps == 2
    assert optimizer.state_dict()["amalgam"]["skipped_steps"] == 2


def test_a_scaler_takes_the_scale_back_and_one_tensor_alone_is_skipped() -> None:
    params, twins = tensors(), tensors()
    how: dict[str, Any] = {"student": nominal(), "capturable": True}
    scaled = AmalgamatedOptimizer(params, nonfinite="skip-tensor", **how)
    plain = AmalgamatedOptimizer(twins, **how)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    for step in range(3):
        set_gradients(params, step)
        set_gradients(twins, step)
        for param in params:
            param.grad *= scaler.get_scale()
        if step == 1:
            poison(params, 2)
            twins[2].grad = None
        scaler.step(scaled)
        scaler.update()
        plain.step()
    assert scaled.skipped_steps == 1
    assert scaler.get_scale() == 2.0
    torch.testing.assert_close(params, twins)


def test_a_choice_about_gradients_is_checked() -> None:
    with pytest.raises(ValueError, match="not 'skip_tensor'; did you mean 'skip-tensor'"):
        AmalgamatedOptimizer(tensors(), student=nominal(), nonfinite="skip_tensor")
    with pytest.raises(ValueError, match="reads nothing; take 'skip-step' or"):
        AmalgamatedOptimizer(tensors(), student=nominal(), nonfinite="raise", capturable=True)


# --- Copies, schedulers, hooks ---


def each_optimizer(params: list[nn.Parameter]) -> Iterator[StepOptimizer]:
    yield AmalgamatedOptimizer(params, student=nominal())
    yield PolicyOptimizer(params, nominal())
    yield TeacherOptimizer(params, "adam")


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_moves_itself_after_a_scheduler_patched_step(number: int, copied: Any) -> None:
    params = tensors()
    optimizer = list(each_optimizer(params))[number]
    scheduler = schedulers.StepLR(optimizer, 10)
    run(optimizer, range(2))
    scheduler.step()
    twin = copied(optimizer)
    theirs = [p for group in twin.param_groups for p in group["params"]]
    values = [p.detach().clone() for p in params]
    run(twin, range(2, 4))
    assert all(map(torch.equal, params, values))
    run(optimizer, range(2, 4))
    assert all(map(torch.equal, params, theirs))
    assert "amalgam" in twin.state_dict() or number


def scheduler_makers() -> dict[str, Callable[[torch.optim.Optimizer], Any]]:
    one = schedulers.ConstantLR
    return {
        "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 0.9**step),
        "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
        "StepLR": lambda o: schedulers.StepLR(o, 2),
        "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 3]),
        "ConstantLR": lambda o: one(o, 0.5, 2),
        "LinearLR": lambda o: schedulers.LinearLR(o, 0.1, total_iters=4),
        "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.8),
        "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 4),
        "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 4),
        "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2),
        "SequentialLR": lambda o: schedulers.SequentialLR(
            o, [one(o, 0.5, 2), schedulers.ExponentialLR(o, 0.5)], [2]
        ),
        "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
            [one(o, 0.5, 2), schedulers.ExponentialLR(o, 0.5)]
        ),
        "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0),
        "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.1, 1.0, 2),
        "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=1.0, total_steps=10),
        "SWALR": lambda o: swa_utils.SWALR(o, 0.3, anneal_epochs=3),
    }


def test_every_scheduler_is_tried() -> None:
    known = {
        name
        for name, kind in vars(schedulers).items()
        if inspect.isclass(kind) and issubclass(kind, schedulers.LRScheduler)
    }
    assert known - {"LRScheduler", "_LRScheduler"} <= scheduler_makers().keys()


@pytest.mark.parametrize("name", scheduler_makers())
@pytest.mark.filterwarnings("ignore:betas were set")
@pytest.mark.parametrize("as_tensor", [False, True])
def test_schedulers_drive_it_as_they_drive_adamw(name: str, as_tensor: bool) -> None:
    rates: list[list[float]] = []
    moves: list[list[float]] = []
    for make in (
        lambda params, lr: AmalgamatedOptimizer(params, lr, NominalStudent()),
        lambda params, lr: torch.optim.AdamW(params, lr, foreach=False),
    ):
        param = nn.Parameter(torch.zeros(3))
        optimizer = make([param], torch.tensor(1.0) if as_tensor else 1.0)
        scheduler = scheduler_makers()[name](optimizer)
        rates.append([])
        moves.append([])
        for _ in range(6):
            rates[-1].append(float(optimizer.param_groups[0]["lr"]))
            before = param.detach().clone()
            param.grad = torch.ones(3)
            optimizer.step()
            moves[-1].append((before - param.detach())[0].item())
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1
    # An untrained student's step is Adam's at 0.005, which is 0.005 for a constant gradient.
    assert moves[0] == pytest.approx([0.005 * rate for rate in rates[0]], rel=1e-3)


@pytest.mark.parametrize("name", ["CyclicLR", "OneCycleLR"])
def test_cycled_betas_are_said_to_have_no_effect(name: str) -> None:
    params, twins = tensors(), tensors()
    optimizer = AmalgamatedOptimizer(params, student=nominal())
    plain = AmalgamatedOptimizer(twins, student=nominal())
    kind = getattr(schedulers, name)
    settings = (0.1, 1.0) if name == "CyclicLR" else (1.0, 10)
    cycling, steady = kind(optimizer, *settings), kind(plain, *settings, cycle_momentum=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4):
            run(optimizer, range(step, step + 1))
            cycling.step()
            run(plain, range(step, step + 1))
            steady.step()
    (message,) = [str(each.message) for each in caught if "betas" in str(each.message)]
    assert "has no effect: the student keeps those it was trained with, (0.9, 0.999)" in message
    assert all(map(torch.equal, params, twins))
    plain.load_state_dict(optimizer.state_dict())
    assert plain.param_groups[0]["betas"] == (0.9, 0.999)


def test_hooks_around_steps() -> None:
    params = tensors()
    optimizer = AmalgamatedOptimizer(params, student=nominal())
    seen: list[str] = []

    def with_a_closure(o: Any, args: Any, kwargs: Any) -> Any:
        seen.append("pre")
        return args, {"closure": lambda: 7.0}

    handles = [
        optimizer.register_step_pre_hook(with_a_closure),
        optimizer.register_step_post_hook(lambda *_: seen.append("post")),
        register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
    ]
    set_gradients(params, 0)
    assert optimizer.step() == 7.0
    assert seen == ["global pre", "pre", "post", "global post"]
    for handle in handles:
        handle.remove()
    assert optimizer.step() is None
    assert len(seen) == 4


def test_steps_appear_in_profiles() -> None:
    params = tensors()
    optimizer = AmalgamatedOptimizer(params, student=nominal())
    set_gradients(params, 0)
    with torch.profiler.profile() as profile:
        optimizer.step()
    names = {event.name for event in profile.events()}
    assert "Optimizer.step#AmalgamatedOptimizer.step" in names
    assert "amalgam::student_step_" in names


def test_a_closure_is_typed_as_torchs_and_may_return_a_tensor() -> None:
    none, some = typing.get_overloads(inspect.unwrap(StepOptimizer.step))
    hints = typing.get_type_hints(some, vars(inspect.getmodule(StepOptimizer)))
    loss_type = hints["return"]
    assert isinstance(loss_type, typing.TypeVar)
    assert typing.get_args(hints["closure"]) == ([], loss_type)
    assert typing.get_type_hints(none)["return"] is type(None)
    param = nn.Parameter(torch.ones(2))
    optimizer = AmalgamatedOptimizer([param], student=nominal())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert isinstance(loss, Tensor)
    assert loss.requires_grad


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("foreach", [None, True, False])
def test_gradients_are_reset_as_torchs_are(set_to_none: bool, foreach: bool | None) -> None:
    params = tensors()
    optimizer = AmalgamatedOptimizer(params, student=nominal(), foreach=foreach)
    set_gradients(params, 0)
    optimizer.zero_grad(set_to_none)
    for param in params:
        assert (param.grad is None) == set_to_none
        assert set_to_none or not param.grad.any()


# --- The constructor and groups ---


@everywhere
@both
def test_maximize_is_descent_on_mirrored_gradients(make: Make, backend: str) -> None:
    params, twins = tensors(), tensors()
    how: dict[str, Any] = {"backend": backend, "warmup_steps": 1}
    up = AmalgamatedOptimizer(params, student=make(), maximize=True, **how)
    down = AmalgamatedOptimizer(twins, student=make(), **how)
    for step in range(2):
        set_gradients(params, step)
        set_gradients(twins, step)
        for twin in twins:
            assert twin.grad is not None
            twin.grad = -twin.grad
        kept = [param.grad.clone() for param in params]
        up.step()
        down.step()
        assert all(torch.equal(p.grad, k) for p, k in zip(params, kept, strict=True))
    assert all(map(torch.equal, params, twins))


def test_foreach_and_fused_are_taken_and_change_nothing() -> None:
    found = []
    for how in ({}, {"foreach": True}, {"fused": True}, {"foreach": False, "fused": False}):
        params = tensors()
        run(AmalgamatedOptimizer(params, student=nominal(), **how), range(3))
        found.append(params)
    for params in found[1:]:
        assert all(map(torch.equal, params, found[0]))


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"differentiable": True}, "differentiable must be False: .* amalgam.meta"),
        ({"amsgrad": True}, "amsgrad must be False"),
        ({"betas": (0.9, 0.99)}, r"betas must be those .*, \(0.9, 0.999\), not \(0.9, 0.99\)"),
        ({"eps": 1e-8}, "eps must be that the student was trained with, 1e-15, not 1e-08"),
    ],
)
def test_what_is_the_students_own_is_refused_with_the_reason(how: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        AmalgamatedOptimizer(tensors(), student=nominal(), **how)
    own = {"betas": (0.9, 0.999), "eps": 1e-15, "amsgrad": False, "differentiable": False}
    AmalgamatedOptimizer(tensors(), student=nominal(), **own)


def test_adamws_positional_betas_are_not_taken_for_a_student() -> None:
    with pytest.raises(TypeError, match=r"student must be a Student, .*, not \(0.9, 0.999\)"):
        AmalgamatedOptimizer(tensors(), 1.0, (0.9, 0.999))


def non_leaf() -> Any:
    return [nn.Parameter(torch.ones(2)) * 2]


def twice() -> Any:
    (param,) = [nn.Parameter(torch.ones(2))]
    return [{"params": [param]}, {"params": [param]}]


def half_named() -> Any:
    return [("a", nn.Parameter(torch.ones(2))), nn.Parameter(torch.ones(2))]


@pytest.mark.parametrize(
    "params",
    [
        lambda: [],
        lambda: torch.ones(2),
        lambda: [1.0],
        non_leaf,
        twice,
        half_named,
        lambda: [{"params": {nn.Parameter(torch.ones(2))}}],
    ],
)
def test_parameters_are_refused_as_adamw_refuses_them(params: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as theirs:
        torch.optim.AdamW(params())
    with pytest.raises(type(theirs.value)) as ours:
        AmalgamatedOptimizer(params(), student=nominal())
    assert str(ours.value).split(" at 0x")[0] == str(theirs.value).split(" at 0x")[0]


def test_names_of_parameters_are_kept_and_saved() -> None:
    net = model()
    optimizer = AmalgamatedOptimizer(net.named_parameters(), student=nominal())
    names = [name for name, _ in net.named_parameters()]
    assert optimizer.param_groups[0]["param_names"] == names
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names
    other = AmalgamatedOptimizer(net.named_parameters(), student=nominal())
    unnamed = AmalgamatedOptimizer(net.parameters(), student=nominal()).state_dict()
    other.load_state_dict(unnamed)
    assert other.param_groups[0]["param_names"] == names


@pytest.mark.parametrize(
    ("group", "error", "named"),
    [
        ({"rounding": "stochastik"}, ValueError, "did you mean 'stochastic'"),
        ({"student": "/no/such"}, ValueError, "'student' must be left out: .* one student"),
        ({"seed": -1}, ValueError, "seed must lie in"),
        ({"seed": 0.5}, TypeError, "seed must be a whole number, not 0.5"),
        ({"warmup_steps": 1.5}, TypeError, "warmup_steps must be a whole number, not 1.5"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps must be 0 or more"),
        ({"warmup_lr": math.inf}, ValueError, "warmup_lr must be 0 or more and finite, not inf"),
        ({"lr": math.nan}, ValueError, "lr must be 0 or more and finite, not nan"),
        ({"lr": math.inf}, ValueError, "lr must be 0 or more and finite, not inf"),
        ({"lr": "1"}, TypeError, "lr must be a number, not '1'"),
        ({"lr": torch.ones(2)}, ValueError, "lr must hold one number"),
        ({"weight_decay": None}, TypeError, "weight_decay must be a number, not None"),
        ({"capturable": 1}, TypeError, "capturable must be True or False, not 1"),
        ({"maximize": "yes"}, TypeError, "maximize must be True or False, not 'yes'"),
        ({"lr": torch.tensor(1)}, TypeError, "lr must be a floating-point tensor, .* torch.int64"),
        ({"betas": (0.5, 0.9)}, ValueError, "betas must be those"),
        ({"betas": 0.9}, TypeError, "betas must be a pair of numbers, not 0.9"),
        ({"eps": 1e-3}, ValueError, "eps must be that the student was trained with"),
        ({"amsgrad": True}, ValueError, "amsgrad must be False"),
        ({"backend": "cpu"}, ValueError, "'backend' must be left out: .* 'auto', .* 'cpu'"),
        ({"cells_dtype": torch.int8}, ValueError, "'cells_dtype' must be left out"),
        ({"nonfinite": "raise"}, ValueError, "'nonfinite' must be left out"),
    ],
)
def test_settings_of_a_group_are_checked_when_it_is_added(
    group: dict[str, Any], error: type[Exception], named: str
) -> None:
    optimizer = AmalgamatedOptimizer(tensors(), student=nominal())
    before = len(optimizer.param_groups)
    with pytest.raises(error, match=named):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **group})
    assert len(optimizer.param_groups) == before
    run(optimizer, range(1))


@pytest.mark.parametrize("of", [AmalgamatedOptimizer, PolicyOptimizer])
def test_none_for_warm_up_is_what_the_student_was_trained_with(of: Any) -> None:
    student = paper(warmup_steps=3, warmup_lr=0.2)
    given = {"student": student} if of is AmalgamatedOptimizer else {"policy": student}
    group = {"params": tensors(), "warmup_steps": None, "warmup_lr": None}
    optimizer = of([group], warmup_steps=7, warmup_lr=0.5, **given)
    assert optimizer.param_groups[0]["warmup_steps"] == 3
    assert optimizer.param_groups[0]["warmup_lr"] == 0.2


def test_a_group_may_repeat_what_is_of_the_whole_optimizer() -> None:
    """As ZeRO's optimizer has it, which writes the constructor's arguments into groups."""
    own = {"backend": "auto", "cells_dtype": None, "nonfinite": "skip-step", "eps": None}
    optimizer = AmalgamatedOptimizer([{"params": tensors(), **own}], student=nominal())
    run(optimizer, range(1))
    assert optimizer.param_groups[0]["backend"] == "auto"


@pytest.mark.parametrize("of", [AmalgamatedOptimizer, TeacherOptimizer])
def test_a_parameter_that_is_twice_in_a_group_is_refused(of: Any) -> None:
    shared, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    how = {"student": nominal()} if of is AmalgamatedOptimizer else {"teacher": "adam"}
    with (
        pytest.warns(UserWarning, match="duplicate parameters"),
        pytest.raises(ValueError, match=r"once, but params\[1\] of group 0 .* twice; list\(dict"),
    ):
        of([other, shared, shared], **how)


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this PyTorch has gradients of one dtype alone"
)
@pytest.mark.parametrize("how", ["plain", "capturable", "skip-tensor", "compiled"])
@pytest.mark.parametrize("size", [1e30, 1e39])
def test_what_is_too_large_is_measured_in_the_dtype_of_computing(size: float, how: str) -> None:
    """A float64 gradient of a float32 parameter is squared in float32."""
    for dtype, skipped in ((torch.float32, 1), (torch.float64, 0)):
        param = nn.Parameter(torch.ones(3, dtype=dtype))
        settings: dict[str, Any] = {"capturable": how == "capturable"}
        settings |= {"nonfinite": how} if how == "skip-tensor" else {}
        optimizer = AmalgamatedOptimizer([param], student=nominal(), **settings)
        step = optimizer.step
        if how == "compiled":
            if dtype != torch.float64:
                continue  # torch.compile takes no parameter whose gradient is of another dtype
            torch.compiler.reset()
            step = torch.compile(optimizer.step, backend="eager")
        param.grad_dtype = torch.float64  # type: ignore[attr-defined]
        param.grad = torch.full((3,), size, dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step()
        assert optimizer.skipped_steps == skipped
        assert torch.equal(param, torch.ones_like(param)) == bool(skipped)
        param.grad = torch.ones(3, dtype=torch.float64)
        step()
        assert param.isfinite().all()
        assert (param != 1).all()


def test_frozen_integers_are_left_alone_and_complex_numbers_refused() -> None:
    quantized = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    params = tensors()
    optimizer = AmalgamatedOptimizer([*params, quantized], student=nominal())
    run(AmalgamatedOptimizer(params, student=nominal()), range(1))
    set_gradients(params, 0)
    optimizer.step()
    assert torch.equal(quantized, torch.ones(3, dtype=torch.int8))
    resumed = AmalgamatedOptimizer([*params, quantized], student=nominal())
    resumed.load_state_dict(optimizer.state_dict())
    waves = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="floating-point tensors, not torch.complex64"):
        AmalgamatedOptimizer([waves], student=nominal())
    waves.requires_grad_(False)
    thawed = AmalgamatedOptimizer([waves], student=nominal())
    waves.requires_grad_()
    waves.grad = torch.ones(2, dtype=torch.complex64)
    with pytest.raises(TypeError, match="floating-point"):
        thawed.step()


@pytest.mark.parametrize("number", range(3))
def test_parameters_on_one_storage_are_refused(number: int) -> None:
    tied = nn.Parameter(torch.ones(3))
    again = nn.Parameter(tied.data)
    with pytest.raises(ValueError, match="params must not share memory, but params.0. of group 0"):
        list(each_optimizer([tied, again]))[number]
    optimizer = AmalgamatedOptimizer([("a", tied)], student=nominal())
    for tail in (again, nn.Parameter(tied.data[1:])):
        with pytest.raises(ValueError, match="but 'a' and 'b' do"):
            optimizer.add_param_group({"params": [("b", tail)]})
    assert len(optimizer.param_groups) == 1
    expanded = nn.Parameter(torch.ones(1).expand(3))
    with pytest.raises(ValueError, match="but params.0. of .* is expanded"):
        list(each_optimizer([expanded]))[number]
    halves = torch.ones(6)
    AmalgamatedOptimizer([nn.Parameter(halves[:3]), nn.Parameter(halves[3:])], student=nominal())
    AmalgamatedOptimizer([nn.Parameter(torch.ones(0)) for _ in range(2)], student=nominal())


def test_frozen_parameters_may_share_memory() -> None:
    tied = nn.Parameter(torch.ones(3))
    frozen = [
        nn.Parameter(view, requires_grad=False) for view in (tied[1:], torch.ones(1).expand(3))
    ]
    for optimizer in each_optimizer([tied, *frozen]):
        set_gradients([tied], 0)
        optimizer.step()
    assert torch.equal(frozen[1], torch.ones(3))
    thawed = AmalgamatedOptimizer([tied, *frozen], student=nominal())
    set_gradients([each.requires_grad_() for each in (tied, *frozen)], 0)
    with pytest.raises(ValueError, match="must not share memory"):
        thawed.step()


def warned(**how: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        AmalgamatedOptimizer(how.pop("params", tensors()), student=nominal(), **how)
    assert all(each.filename == __file__ for each in caught)
    return [str(each.message) for each in caught]


def test_numbers_copied_from_adamw_are_warned_of() -> None:
    (rate,) = warned(lr=1e-3, weight_decay=0.01)
    assert "lr=0.001 looks like AdamW's" in rate
    assert "1000 times smaller" in rate
    (decay,) = warned(weight_decay=0.01)
    assert "weight_decay=0.01 at lr=1 takes 1.00% of every weight away in each step" in decay
    assert "is weight_decay=1e-05 here" in decay
    groups = [{"params": [param], "lr": 0.5**n} for n, param in enumerate(tensors())]
    assert not warned(params=groups)
    assert not warned(lr=0.0)
    assert not warned(lr=0.3, weight_decay=0.001)
    assert not warned(lr=torch.tensor(1.0, device="meta"))
    with pytest.warns(UserWarning, match="lr=0.001 looks like AdamW's, but PolicyOptimizer's is"):
        PolicyOptimizer(tensors(), nominal(), 1e-3)


# --- What surrounds it ---


@shipped
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, torch.float16])
def test_default_dtypes_change_nothing(student: str, default: torch.dtype) -> None:
    params, twins = tensors(), tensors()
    usual = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        optimizer = AmalgamatedOptimizer(params, student=student)
        run(optimizer, range(22))
        resumed = AmalgamatedOptimizer(params, student=optimizer.state_dict())
        resumed.load_state_dict(optimizer.state_dict())
        run(resumed, range(22, 23))
    finally:
        torch.set_default_dtype(usual)
    run(AmalgamatedOptimizer(twins, student=student), range(23))
    assert all(map(torch.equal, params, twins))
    assert {value.dtype for value in optimizer.state[params[0]].values()} == {torch.float32}


@shipped
def test_a_default_device_around_the_constructor_changes_nothing(student: str) -> None:
    params, twins = tensors(), tensors()
    with torch.device("meta"):
        optimizer = AmalgamatedOptimizer(params, student=student)
    run(optimizer, range(3))
    run(AmalgamatedOptimizer(twins, student=student), range(3))
    assert all(map(torch.equal, params, twins))


@shipped
@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("capturable", [False, True])
def test_planners_step_tensors_without_numbers(student: str, device: str, capturable: bool) -> None:
    """State has its shapes and dtypes; nothing is computed, and nothing real is kept with it."""
    with torch.device("meta") if device == "meta" else FakeTensorMode():
        net = nn.Linear(6, 5, device=device)
        optimizer = AmalgamatedOptimizer(net.parameters(), student=student, capturable=capturable)
        for _ in range(2):
            optimizer.zero_grad()
            net(torch.ones((3, 6), device=device)).square().sum().backward()
            optimizer.step()
        entries = list(optimizer.state.values())
        taken = sum(t.numel() * t.element_size() for entry in entries for t in entry.values())
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
    assert taken == estimate_memory(net, student).state_bytes
    assert all(entry["h"].shape[: entry["m"].dim()] == entry["m"].shape for entry in entries)
    real = nn.Linear(6, 5)
    later = AmalgamatedOptimizer(real.parameters(), student=student)
    run(later, range(1))


@shipped
def test_constructing_draws_no_random_number(student: str) -> None:
    state = torch.get_rng_state()
    optimizer = AmalgamatedOptimizer(tensors(), student=student)
    AmalgamatedOptimizer(tensors(), student=optimizer.state_dict())
    assert torch.equal(torch.get_rng_state(), state)
    run(optimizer, range(2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "made",
    [
        lambda params: AmalgamatedOptimizer(params, student=nominal(), backend="reference"),
        lambda params: AmalgamatedOptimizer(params, student=nominal(), backend="cpu"),
        lambda params: AmalgamatedOptimizer(params, student=paper(), backend="reference"),
        lambda params: PolicyOptimizer(params, nominal()),
        lambda params: TeacherOptimizer(params, "adam"),
    ],
)
def test_autocast_around_a_step_changes_nothing(made: Any) -> None:
    """The closure runs under it, the step does not."""
    params, twins = tensors(), tensors()
    optimizer, plain = made(params), made(twins)
    seen = []
    for step in range(3):
        set_gradients(params, step)
        set_gradients(twins, step)
        with torch.autocast("cpu", torch.bfloat16):
            optimizer.step(lambda: seen.append(torch.is_autocast_enabled("cpu")))
        plain.step()
    assert seen == [True] * 3
    assert all(map(torch.equal, params, twins))


@both
def test_a_compiled_step_is_one_graph_and_the_same(make: Make) -> None:
    """From the first step, which makes the state; through warm-up, a skip, a schedule, a load."""
    params, twins = tensors(), tensors()
    how: dict[str, Any] = {"student": make(), "warmup_steps": 2, "warmup_lr": 0.1}
    optimizer = AmalgamatedOptimizer(params, torch.tensor(0.5), **how)
    plain = AmalgamatedOptimizer(twins, 0.5, **how)
    torch.compiler.reset()
    compiled = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
    for step in range(6):
        set_gradients(params, step)
        set_gradients(twins, step)
        if step == 3:
            poison(params, 1)
        else:
            plain.step()
        compiled()
        optimizer.param_groups[0]["lr"] /= 2
        plain.param_groups[0]["lr"] /= 2
        if step == 4:
            optimizer.load_state_dict(optimizer.state_dict())
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param, twin, rtol=1e-5, atol=1e-7)
        assert float(optimizer.state[param]["step"]) == 5
    assert optimizer.skipped_steps == 1


def test_a_compiled_step_takes_numbers_that_a_scheduler_sets() -> None:
    """Of a default optimizer, whose peaks begin as numbers, too; and traces few of them anew."""
    params, twins = tensors(), tensors()
    optimizer, plain = AmalgamatedOptimizer(params), AmalgamatedOptimizer(twins)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(optimizer.step, fullgraph=True, backend=counter)
    for step in range(4):
        for given, each, take in ((params, optimizer, compiled), (twins, plain, plain.step)):
            set_gradients(given, step)
            each.param_groups[0]["lr"] = 1.0 - step / 8
            take()
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param, twin, rtol=1e-5, atol=1e-7)
    assert float(optimizer.param_groups[0]["peak_lr"]) == 1
    assert counter.frame_count <= 3


def test_what_a_compiled_step_does_not_do_is_said() -> None:
    params = [*tensors(), nn.Parameter(torch.ones(2, dtype=torch.float64))]
    for optimizer in (
        AmalgamatedOptimizer(params, student=nominal()),
        AmalgamatedOptimizer(params[:-1], student=nominal(), nonfinite="raise"),
        AmalgamatedOptimizer(params[:-1], student=nominal(), rounding="stochastic"),
    ):
        set_gradients(params, 0)
        torch.compiler.reset()
        with pytest.raises(Exception, match="a compiled step takes groups of one device"):
            torch.compile(optimizer.step, fullgraph=True, backend="eager")()


# --- Memory ---


@both
def test_state_is_made_when_first_used(make: Make) -> None:
    params = tensors()
    optimizer = AmalgamatedOptimizer(params, student=make())
    assert not optimizer.state
    params[2].grad = torch.ones(5)
    optimizer.step()
    assert list(optimizer.state) == [params[2]]


@both
@pytest.mark.parametrize("how", ["entries", "data"])
@pytest.mark.parametrize("cells", [torch.bfloat16, torch.int8])
def test_state_may_wait_elsewhere_between_steps(make: Make, how: str, cells: torch.dtype) -> None:
    """Another dtype stands for another device: it is fetched to what the optimizer keeps."""
    params, twins = tensors(torch.bfloat16), tensors(torch.bfloat16)
    optimizer = AmalgamatedOptimizer(params, student=make(), cells_dtype=cells)
    plain = AmalgamatedOptimizer(twins, student=make(), cells_dtype=cells)
    for step in range(4):
        run(optimizer, range(step, step + 1))
        run(plain, range(step, step + 1))
        for entry in optimizer.state.values():
            for name, value in entry.items():
                if how == "entries":
                    entry[name] = value.to(torch.float64)
                else:
                    value.data = value.data.contiguous().clone()
    assert all(map(torch.equal, params, twins))


@both
def test_steps_inside_backward(make: Make) -> None:
    """An optimizer a parameter, stepped as soon as its gradient is there, which is freed then."""
    net, twin = model(), model()
    x, y = inputs()
    student = make()
    each = {p: AmalgamatedOptimizer([p], student=student) for p in net.parameters()}

    def step(param: Tensor) -> None:
        each[param].step()
        each[param].zero_grad()

    for param in net.parameters():
        param.register_post_accumulate_grad_hook(step)
    optimizer = AmalgamatedOptimizer(twin.parameters(), student=student)
    for _ in range(3):
        (net(x) - y).square().mean().backward()
        optimizer.zero_grad()
        (twin(x) - y).square().mean().backward()
        optimizer.step()
    assert all(param.grad is None for param in net.parameters())
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_optimizer_that_is_deleted_is_freed() -> None:
    params = tensors()
    optimizer = AmalgamatedOptimizer(params, student=nominal())
    run(optimizer, range(2))
    seen = [weakref.ref(optimizer), weakref.ref(optimizer.state[params[0]]["h"])]
    del optimizer
    gc.collect()
    assert [each() for each in seen] == [None, None]


def test_threads_step_optimizers_of_their_own() -> None:
    found: list[Any] = [None] * 4

    def work(index: int) -> None:
        params = tensors()
        run(AmalgamatedOptimizer(params, student=nominal()), range(3))
        found[index] = params

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for params in found[1:]:
        assert all(map(torch.equal, params, found[0]))


# --- The table ---

DOCUMENT = (Path(__file__).parents[1] / "docs" / "optimizer.md").read_text(encoding="utf-8")


def test_every_test_that_the_table_names_is_there() -> None:
    files = {key: name for name, key in re.findall(r"`tests/(test_\w+\.py)` \((\w)\)", DOCUMENT)}
    named: set[tuple[str, str]] = set()
    for row in re.findall(r"^\|.*`test_.*\|$", DOCUMENT, re.MULTILINE):
        cell = row.rsplit("|", 2)[1]
        for part in re.split(r"\b(?=[A-Z] `test_)", cell):
            named |= {(part[0], name) for name in re.findall(r"`(test_\w+)`", part)}
    assert len(named) > 40
    for letter, name in named:
        text = Path(__file__).with_name(files[letter]).read_text("utf-8")
        assert f"\ndef {name}(" in text, name


def test_the_table_has_all_of_adamws_arguments_and_methods() -> None:
    arguments = list(inspect.signature(torch.optim.AdamW).parameters)
    methods = ["step", "zero_grad", "state_dict", "load_state_dict"]
    for name in [*arguments, *methods]:
        assert f"`{name}" in DOCUMENT, name
    own = inspect.signature(AmalgamatedOptimizer).parameters
    assert set(arguments) <= own.keys()
