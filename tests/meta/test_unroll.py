"""Unrolls: scaling, first and second order, and what non-finite values do to trajectories."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amalgam.meta import Amalgamation, Unroll
from amalgam.policies import Pool, Student, StudentConfig, Teacher
from amalgam.seeding import generator_for
from amalgam.tasks import Task

POOL = Pool(["adam", "rmsprop", "sgd"])
ALL = 1 + len(POOL)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


@pytest.fixture
def task() -> Task:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 3, generator=generator).double()
    y = torch.randint(2, (40,), generator=generator)
    return Task("net", lambda: Net().double(), (x, y), (x, y), batch_size=8)


@pytest.fixture
def student() -> Student:
    config = StudentConfig(hidden=5, warmup_steps=2)
    return Student(config, generator=torch.Generator().manual_seed(2)).double()


def unroll_of(task: Task, student: Student, **how: object) -> Unroll:
    return Unroll(task, student, POOL, Amalgamation(backend="reference", **how))


def episode(unroll: Unroll, steps: int, seed: int = 0) -> tuple:
    begin = unroll.begin(generator_for(seed, "episode"))
    batches = unroll.task.batches(generator_for(seed, "batches"), steps)
    return begin, [tuple(tensor[None] for tensor in batch) for batch in batches]


def same(one: Any, two: Any) -> bool:
    """Whether the tensors of two nests hold the same bits."""
    if isinstance(one, tuple):
        return all(same(a, b) for a, b in zip(one, two, strict=True))
    return not isinstance(one, Tensor) or torch.equal(one, two)


def test_orders_differ(task, student) -> None:
    grads = []
    for second_order in (True, False):
        unroll = unroll_of(task, student, second_order=second_order)
        window = unroll.window(*episode(unroll, 5))
        grads.append(torch.autograd.grad(window.meta_loss.sum(), student.weights()))
    assert not torch.allclose(grads[0][0], grads[1][0], rtol=1e-3)


def test_windows_carry_on(task, student) -> None:
    """Two windows of 3 steps end where one of 6 does."""
    unroll = unroll_of(task, student)
    begin, batches = episode(unroll, 6)
    whole = unroll.window(begin, batches).end
    halves = unroll.window(unroll.window(begin, batches[:3]).end, batches[3:]).end
    assert same(whole, halves)


def test_teachers_are_their_optimizers(task, student) -> None:
    """With scaling they do not feel, the teachers walk as TeacherOptimizer does without any."""
    from amalgam import TeacherOptimizer

    unroll = unroll_of(task, student, scale_spread=2.0)
    begin, batches = episode(unroll, 6)
    end = unroll.window(begin, batches).end
    start = (begin.params * begin.scale)[0]
    for k, teacher in enumerate(POOL.teachers):
        flat = nn.Parameter(start.clone())
        optimizer = TeacherOptimizer([flat], teacher)
        for batch in batches:
            optimizer.zero_grad()
            task.objective(flat, tuple(tensor[0] for tensor in batch)).backward()
            optimizer.step()
        assert torch.allclose(end.teacher_params[k, 0] * end.scale[0], flat.detach(), rtol=1e-9)


def test_scaling_changes_the_student_alone(task, student) -> None:
    ends = []
    for spread in (0.0, 2.0):
        unroll = unroll_of(task, student, scale_spread=spread)
        ends.append(unroll.window(*episode(unroll, 4)).end)
    plain, scaled = ends
    assert torch.allclose(plain.teacher_params, scaled.teacher_params * scaled.scale, rtol=1e-9)
    assert not torch.allclose(plain.params, scaled.params * scaled.scale, rtol=1e-2)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e300])
@pytest.mark.parametrize("at", [0, 2, 4])
def test_unusable_gradients_are_skipped_and_counted(task, student, poison, at) -> None:
    """The authors' guard zeroes all parameters here; ours leaves the trajectories as they were."""
    # One by one, so that the loss can tell the bad batch's target from others.
    unroll = unroll_of(task, student, scale_spread=1.0, stack=False)
    begin, batches = episode(unroll, 5)
    x, y = batches[at]
    bad = x.clone()
    bad[0, 0, 0] = poison
    if poison == 1e300:  # a gradient that is finite, but whose square is not
        task.loss = lambda out, target: (
            nn.functional.cross_entropy(out, target)
            * (1e300 if target.data_ptr() == bad_target.data_ptr() else 1.0)
        )
        bad, bad_target = x, y.clone()
        batches[at] = (x, bad_target)
    else:
        batches[at] = (bad, y)
    window = unroll.window(begin, batches)
    assert window.skipped.tolist() == [[1] * ALL]
    without = unroll.window(begin, batches[:at] + batches[at + 1 :])
    assert same(window.end, without.end)
    assert window.end.params.count_nonzero() == window.end.params.numel()
    loss = window.meta_loss + window.imitation_loss
    assert loss.isfinite().all()
    grads = torch.autograd.grad(loss.sum(), student.weights())
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("second_order", [True, False])
def test_a_loss_never_sees_parameters_that_are_not_finite(second_order, task, student) -> None:
    """It may refuse them, as distributions do, or a GPU may."""
    unroll = unroll_of(task, student, second_order=second_order, scale_spread=1.0, stack=False)
    begin, batches = episode(unroll, 5)

    def loss(out: Tensor, target: Tensor) -> Tensor:
        if not out.isfinite().all():
            raise ValueError(f"out must be finite, not {out}")
        factor = math.inf if target.data_ptr() == batches[2][1].data_ptr() else 1.0
        return nn.functional.cross_entropy(out, target) * factor

    task.loss = loss
    window = unroll.window(begin, batches)
    assert window.skipped.tolist() == [[1] * ALL]
    careful = unroll_of(task, student, second_order=second_order, scale_spread=1.0, stack=False)
    careful.trusting = False
    assert same(window.end, careful.window(begin, batches).end)


def test_warm_up_skips_unusable_gradients(task, student) -> None:
    unroll = unroll_of(task, student)
    begin, batches = episode(unroll, 3)
    bad = (batches[1][0] * math.nan, batches[1][1])
    got = unroll.warm_up(begin, [batches[0], bad, batches[2]])
    want = unroll.warm_up(begin, [batches[0], batches[2]])
    assert same(got, want)


def test_one_teacher_diverges_alone(task, student) -> None:
    """A teacher whose updates overflow stands still; the others and the student go on."""
    pool = Pool([Teacher("sgd", 1e38), Teacher("adam")])
    train, validation = ((x.float(), y) for x, y in (task.train, task.validation))
    task = replace(task, build=lambda: Net().float(), train=train, validation=validation)
    unroll = Unroll(
        task, student.float(), pool, Amalgamation(backend="reference", scale_spread=0.0)
    )
    begin, batches = episode(unroll, 6)
    window = unroll.window(begin, batches)
    assert window.skipped[0, 0] == 0
    assert window.skipped[0, 2] == 0
    assert window.skipped[0, 1] > 0
    assert window.end.teacher_params.isfinite().all()
    assert window.end.params.isfinite().all()


def test_no_teachers(task, student) -> None:
    unroll = Unroll(task, student, Pool([]), Amalgamation(backend="reference"))
    window = unroll.window(*episode(unroll, 3))
    assert window.imitation_loss == 0
    assert window.losses.shape == (3, 1, 1)
    assert window.distances.shape == (3, 1, 0)
    torch.autograd.grad(window.meta_loss.sum(), student.weights())


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"mechanism": "median"}, "mechanism"),
        ({"normaliser": "none"}, "normaliser"),
        ({"scale_spread": -1.0}, "scale_spread"),
        ({"huber_delta": 0.0}, "huber_delta"),
        ({"eps": 0.0}, "eps"),
        ({"backend": "cpuu"}, "did you mean 'cpu'"),
    ],
)
def test_bad_settings_are_named(wrong, named) -> None:
    with pytest.raises(ValueError, match=named):
        Amalgamation(**wrong)
