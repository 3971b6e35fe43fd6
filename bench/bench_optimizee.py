"""An optimizee's own passes in one inner step: its gradient, and a Hessian-vector product after it.

python -m pytest bench/bench_optimizee.py [--benchmark-json=rows.json]

``plain`` is PyTorch's convolutions, ``ours`` what :class:`amalgam.tasks.Task` does by itself; a
module without large convolutions has nothing to gain, and should lose nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import assert_close, measure, threads_of_each
from torch import Tensor, nn

from amalgam.seeding import generator_for
from amalgam.tasks import Task

BATCH = 128


def _paper_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def _digits_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def _mlp(inputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 20), nn.Sigmoid(), nn.Linear(20, 10))


OPTIMIZEES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "paper-cnn": (_paper_cnn, (1, 28, 28)),
    "digits-cnn": (_digits_cnn, (1, 8, 8)),
    "mlp-784": (lambda: _mlp(784), (784,)),
    "mlp-64": (lambda: _mlp(64), (64,)),
}


def _task(name: str, rival: str) -> Task:
    build, shape = OPTIMIZEES[name]
    generator = generator_for(0)
    x = torch.rand(BATCH, *shape, generator=generator)
    y = torch.randint(10, (BATCH,), generator=generator)
    fast = False if rival == "plain" else None
    return Task(name, build, (x, y), (x, y), batch_size=BATCH, fast_convolutions=fast)


def _gradient(task: Task, flat: Tensor, vector: Tensor) -> Tensor:
    leaf = flat.detach().requires_grad_()
    (grad,) = torch.autograd.grad(task.objective(leaf, tuple(task.train)), leaf)
    return grad


def _product(task: Task, flat: Tensor, vector: Tensor) -> Tensor:
    leaf = flat.detach().requires_grad_()
    loss = task.objective(leaf, tuple(task.train))
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    (product,) = torch.autograd.grad(grad, leaf, vector)
    return product


PASSES = {"gradient": _gradient, "gradient and Hessian product": _product}


@pytest.mark.parametrize("rival", ["plain", "ours"])
@threads_of_each
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("name", OPTIMIZEES)
def test_optimizee(benchmark: Any, name: str, passes: str, threads: int, rival: str) -> None:
    task = _task(name, rival)
    flat = task.init_params(generator_for(1))
    vector = torch.randn(flat.shape, generator=generator_for(2))
    function = PASSES[passes]
    expected = function(_task(name, "plain"), flat, vector)
    assert_close(function(task, flat, vector), expected, rtol=1e-4, of_scale=1e-5)
    measure(
        benchmark,
        lambda: function(task, flat, vector),
        operation=f"{name} {passes}",
        backend=rival,
        n=task.layout.numel,
        threads=threads,
    )
