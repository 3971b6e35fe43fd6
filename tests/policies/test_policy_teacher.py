"""Frozen policies as teachers: their own trajectories, in a pool with others."""

import pytest
import torch

from amalgam import tasks
from amalgam.layout import Layout
from amalgam.policies import (
    Choice,
    ChoiceConfig,
    PolicyTeacher,
    Pool,
    ScaleHierarchical,
    Student,
    StudentConfig,
    state_from_tensors,
    state_tensors,
)
from amalgam.seeding import generator_for

LAYOUT = Layout({"kernel": (3, 2), "bias": (2,)})


def make(kind: str):
    if kind == "scale":
        return ScaleHierarchical(generator=generator_for(1))
    if kind == "student":
        return Student(StudentConfig(layers=1, hidden=4), generator=generator_for(1))
    return Choice(ChoiceConfig("small", layers=1, hidden=4), generator=generator_for(1))


def gradients(steps: int) -> list[torch.Tensor]:
    return list(torch.randn(steps, LAYOUT.numel, generator=generator_for(2)))


@pytest.mark.parametrize("kind", ["choice", "student", "scale"])
def test_it_goes_where_the_policy_goes(kind) -> None:
    policy = make(kind)
    pool = Pool(["adam", PolicyTeacher(policy)])
    params = torch.ones(2, LAYOUT.numel)
    state, own = pool.initial_state(params[0], LAYOUT), policy.initial_state(params[0], LAYOUT)
    for step, grad in enumerate(gradients(6)):
        settings = {"params": params, "layout": LAYOUT, "backend": "reference"}
        both = grad.expand(2, -1)
        if step < 2:
            state = pool.warm_up(both, state, **settings)
            own = policy.warm_up(grad, own, layout=LAYOUT)
            continue
        updates, state = pool.step(both, state, **settings)
        update, own = policy.step(grad, own, layout=LAYOUT, backend="reference")
        assert torch.equal(updates[1], update)
        assert not updates.requires_grad
        stored = {name: tensor.clone() for name, tensor in state_tensors(state).items()}
        state = state_from_tensors(stored)


def test_a_choices_clock_survives_a_file() -> None:
    teacher = PolicyTeacher(make("choice"))
    pool = Pool([teacher])
    state = pool.initial_state(torch.zeros(8), LAYOUT)
    for grad in gradients(3):
        _, state = pool.step(grad[None], state, params=torch.zeros(1, 8), layout=LAYOUT)
    (carried,) = state_from_tensors(state_tensors(state)).others
    assert carried["steps"] == 3
    assert isinstance(carried["steps"], int)


def test_training_the_policy_further_does_not_move_the_teacher() -> None:
    policy = make("student")
    teacher, twin = PolicyTeacher(policy), PolicyTeacher(policy)
    assert teacher == twin
    assert hash(teacher) == hash(twin)
    grad = gradients(1)[0]
    before, _ = teacher.step(torch.zeros(8), grad, {}, LAYOUT)
    with torch.no_grad():
        for weight in policy.weights():
            weight.add_(1)
    assert torch.equal(teacher.step(torch.zeros(8), grad, {}, LAYOUT)[0], before)
    assert PolicyTeacher(policy) != teacher
    assert not any(w.requires_grad for w in teacher.policy.weights())


def test_two_of_a_kind_are_told_apart() -> None:
    one, other = make("student"), Student(StudentConfig(layers=1, hidden=4))
    pool = Pool([PolicyTeacher(one), PolicyTeacher(other), "adam"])
    assert len(set(pool.names)) == 3
    assert pool.names[0] == f"student({pool.teachers[0].digest})"


def test_an_optimizee_of_real_data_is_trained() -> None:
    """A choice between two working teachers lowers the loss of the optimizee."""
    task = tasks.load("digits-mlp", 64)
    pool = Pool([PolicyTeacher(make("choice"))])
    params = task.init_params(generator_for(0))[None]
    state, losses = pool.initial_state(params[0], task.layout), []
    for batch in task.batches(generator_for(1), 60):
        leaf = params[0].requires_grad_()
        loss = task.objective(leaf, batch)
        (grad,) = torch.autograd.grad(loss, leaf)
        losses.append(loss.item())
        params = params.detach()
        update, state = pool.step(grad[None], state, params=params, layout=task.layout)
        params = params - update
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
