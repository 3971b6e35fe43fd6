"""Functions of a few numbers, by their formulas."""

import math

import torch

from amalgam import tasks
from amalgam.seeding import generator_for


def test_a_quadratic_bowl() -> None:
    task = tasks.load("quadratic-10")
    matrix, offset, _ = (tensor[0] for tensor in task.train)
    assert (task.init_params(generator_for(0)) == 0).all()
    x = torch.randn(10, requires_grad=True)
    (batch,) = task.batches(generator_for(0), 1)
    loss = task.objective(x, batch)
    assert torch.allclose(loss, (matrix @ x - offset).norm() ** 2 / 2)
    (gradient,) = torch.autograd.grad(loss, x)
    assert torch.allclose(gradient, matrix.T @ (matrix @ x - offset), atol=1e-4)


def test_rastrigins_waves() -> None:
    task = tasks.load("rastrigin-2")
    matrix, offset, waves, _ = (tensor[0] for tensor in task.train)
    (batch,) = task.batches(generator_for(0), 1)
    for x in (torch.zeros(2), torch.tensor([0.3, -1.2])):
        expected = (matrix @ x - offset).square().sum() + 20
        expected += 10 * sum(c * math.cos(2 * math.pi * p) for c, p in zip(waves, x, strict=True))
        assert torch.allclose(task.objective(x, batch), expected)


def test_the_seed_draws_the_function() -> None:
    one, same, other = (
        tasks.load("rastrigin-10", arguments={"seed": seed}).describe() for seed in (0, 0, 1)
    )
    assert one == same != other


def test_many_points_are_each_alone() -> None:
    task = tasks.load("rastrigin-10")
    flat = torch.randn(1, 3, 10)
    batch = tuple(tensor[None] for tensor in task.batches(generator_for(0), 1)[0])
    losses = [task.objectives(flat, batch, stack) for stack in (True, False)]
    assert torch.allclose(*losses)
