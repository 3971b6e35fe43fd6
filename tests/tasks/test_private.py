"""Private gradients: the authors' rule, example by example."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from amalgam import tasks
from amalgam.evaluation.runs import Readings, train
from amalgam.seeding import generator_for
from amalgam.tasks import PrivateGradient, Task

SAMPLES = 6


@pytest.fixture
def task() -> Task:
    digits = tasks.load("digits-cnn", batch_size=SAMPLES)
    return replace(digits, train=tuple(t[:60] for t in digits.train), gradient=PrivateGradient())


def by_hand(task: Task, module: nn.Module, clip: float) -> dict[str, torch.Tensor]:
    """The sum of clipped gradients, one example after another."""
    total = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    for x, y in zip(*(tensor[:SAMPLES] for tensor in task.train), strict=True):
        loss = functional.cross_entropy(module(x[None]), y[None])
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        norm = torch.cat([g.flatten() for g in gradients]).norm().item()
        for name, gradient in zip(total, gradients, strict=True):
            total[name] += gradient / max(1.0, norm / clip)
    return total


@pytest.mark.parametrize("clip", [0.5, 100.0])
def test_examples_are_clipped_and_summed(task: Task, clip: float) -> None:
    module = task.init_module(generator_for(0))
    rule = PrivateGradient(clip=clip, noise_multiplier=0.0)
    batch = tuple(tensor[:SAMPLES] for tensor in task.train)
    loss = rule(module, task.loss, batch, generator_for(1))
    assert torch.allclose(loss, functional.cross_entropy(module(batch[0]), batch[1]))
    expected = by_hand(task, module, clip)
    for name, parameter in module.named_parameters():
        assert torch.allclose(parameter.grad, expected[name] / SAMPLES, atol=1e-6)
    plain = torch.autograd.grad(
        functional.cross_entropy(module(batch[0]), batch[1]), list(module.parameters())
    )
    same = torch.allclose(torch.cat([g.flatten() for g in plain]), flat(module), atol=1e-6)
    assert same == (clip == 100.0)


def flat(module: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in module.parameters()])


def test_the_noise_is_the_generators_and_of_its_size(task: Task) -> None:
    module = task.init_module(generator_for(0))
    batch = tuple(tensor[:SAMPLES] for tensor in task.train)
    gradients = []
    for multiplier, seed in ((0.0, 1), (1.1, 1), (1.1, 1), (1.1, 2)):
        rule = PrivateGradient(clip=2.0, noise_multiplier=multiplier)
        rule(module, task.loss, batch, generator_for(seed))
        gradients.append(flat(module).clone())
    plain, one, again, other = gradients
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert (one - plain).std().item() == pytest.approx(2.0 * 1.1 / SAMPLES, rel=0.05)
    assert torch.corrcoef(torch.stack([one - plain, other - plain]))[0, 1].abs() < 0.1


def test_a_gradient_of_zero_stays() -> None:
    x, y = torch.zeros(4, 3), torch.zeros(4, 1)
    module = nn.Linear(3, 1, bias=False)
    PrivateGradient(noise_multiplier=0.0)(module, functional.mse_loss, (x, y), generator_for(0))
    assert (module.weight.grad == 0).all()


def test_what_is_frozen_has_no_gradient() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    module[0].weight.requires_grad_(False)
    batch = torch.randn(4, 3), torch.randn(4, 1)
    PrivateGradient()(module, functional.mse_loss, batch, generator_for(0))
    assert [p.grad is None for p in module.parameters()] == [True, False, False, False]


def test_evaluation_takes_the_tasks_gradients(task: Task) -> None:
    plain = replace(task, gradient=None)

    def curve(of: Task, seed: int = 0) -> tuple[float, ...]:
        run = train(
            of, lambda p: torch.optim.SGD(p, lr=0.1), steps=5, seed=seed, readings=Readings()
        )
        return run.losses

    assert curve(task) == curve(task)
    assert curve(task)[0] == curve(plain)[0]
    assert curve(task)[1] != curve(plain)[1]


def test_unrolls_refuse_it(task: Task) -> None:
    params = task.init_params(generator_for(0))
    with pytest.raises(ValueError, match="digits-cnn can be evaluated, not meta-trained on"):
        task.objective(params, tuple(tensor[:4] for tensor in task.train))


def test_examples_that_mix_are_refused() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    with pytest.raises((RuntimeError, ValueError)):
        PrivateGradient()(
            module, functional.mse_loss, (torch.randn(4, 3), torch.randn(4, 1)), generator_for(0)
        )
