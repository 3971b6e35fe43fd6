"""Tasks: any module, any tensors, the same numbers for the same generator."""

import itertools
import random
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from amalgam import tasks
from amalgam.seeding import generator_for
from amalgam.tasks import Task


@pytest.mark.parametrize(("name", "numel"), [("digits-mlp", 1510), ("digits-cnn", 5130)])
def test_digits(name, numel) -> None:
    task = tasks.load(name, batch_size=32)
    assert task.layout.numel == numel
    images, labels = task.train
    assert (len(images), len(task.validation[0])) == (1437, 360)
    assert images.min() == 0
    assert images.max() == 1
    assert set(labels.tolist()) == set(range(10))
    params = task.init_params(generator_for(0))
    biases = [v for n, v in task.layout.unflatten(params).items() if n.endswith("bias")]
    assert all((b == 0).all() for b in biases)
    batch = task.batches(generator_for(0), 1)[0]
    assert 1 < task.objective(params, batch).item() < 6


def test_the_papers_task() -> None:
    task = tasks.load("train")
    assert task.name == "train-glyphs"
    assert (task.layout.numel, task.batch_size) == (18_122, 128)
    (images, labels) = batch = task.batches(generator_for(0), 1)[0]
    assert images.dtype == torch.uint8
    module = task.init_module(generator_for(0))
    assert 0 <= module[0](images).min() < module[0](images).max() <= 1
    assert 2 < functional.cross_entropy(module(images), labels) < 3
    flat = task.layout.flatten(dict(module.named_parameters())).detach()
    rows = tuple(tensor[None] for tensor in batch)
    both = [task.objectives(flat[None, None], rows, stack) for stack in (False, True)]
    assert torch.allclose(*both)
    double = functional.cross_entropy(module.double()(images.double()), labels)
    assert torch.allclose(double.float(), both[0])


def test_the_generator_decides_everything() -> None:
    task = tasks.load("digits-mlp")
    one, two, other = (task.init_params(generator_for(s)) for s in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    state = torch.get_rng_state()
    task.init_params(generator_for(2))
    assert torch.equal(torch.get_rng_state(), state)


def test_no_gpus_generator_is_seeded(monkeypatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    tasks.load("digits-mlp").init_params(generator_for(0))
    assert seeds == []


def test_a_task_moves_with_all_it_has() -> None:
    data = torch.arange(10).float()[:, None]
    loss = nn.HuberLoss()
    loss.register_buffer("weight", torch.ones(()))
    task = Task("count", lambda: nn.BatchNorm1d(1), (data, data), (data, data), loss, 5)
    assert task.to("cpu") is task
    moved = task.to("meta")
    assert moved.device == moved.loss.weight.device == torch.device("meta")
    assert task.loss.weight.device == torch.device("cpu")
    module = moved.init_module(generator_for(0))
    of_module = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
    batch = moved.batches(generator_for(0), 1)[0]
    assert of_module | {t.device for t in batch} == {torch.device("meta")}
    assert moved.init_params(generator_for(0)).device == torch.device("meta")


def test_data_on_two_devices_is_named() -> None:
    data = torch.arange(10).float()[:, None]
    with pytest.raises(ValueError, match=r"must be on one device, not on \['cpu', 'meta'\]"):
        Task("count", lambda: nn.Linear(1, 1), (data, data), (data, data.to("meta")), batch_size=5)


def test_batches_are_epochs() -> None:
    data = torch.arange(10).float()[:, None]
    task = Task("count", lambda: nn.Linear(1, 1), (data, data), (data, data), batch_size=3)
    batches = [batch[0] for batch in task.batches(generator_for(0), 6)]
    for epoch in (batches[:3], batches[3:]):
        assert len(torch.cat(epoch).unique()) == 9
    assert not torch.equal(torch.cat(batches[:3]), torch.cat(batches[3:]))


def test_batches_are_a_sequence_gathered_when_asked_for() -> None:
    data = torch.arange(10).float()[:, None]
    task = Task("count", lambda: nn.Linear(1, 1), (data, data), (data, data), batch_size=3)
    batches = task.batches(generator_for(0), 5)
    assert len(batches) == 5
    part = batches[1:3]
    assert len(part) == 2
    assert torch.equal(part[0][0], batches[1][0])
    assert torch.equal(batches[-1][0], [*batches][4][0])
    task.train[0][:] = -1
    assert (batches[0][0] == -1).all()


def test_flat_objective_is_the_modules() -> None:
    task = tasks.load("digits-cnn", batch_size=16)
    module = task.init_module(generator_for(3))
    flat = task.layout.flatten(dict(module.named_parameters())).detach().requires_grad_()
    batch = task.batches(generator_for(0), 1)[0]
    (grad,) = torch.autograd.grad(task.objective(flat, batch), flat)
    loss = functional.cross_entropy(module(batch[0]), batch[1])
    expected = torch.autograd.grad(loss, list(module.parameters()))
    assert torch.allclose(grad, torch.cat([g.flatten() for g in expected]), atol=1e-7)


def test_any_module_and_loss() -> None:
    """Several inputs, batch norm's buffers, a regression loss."""

    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)
            self.out = nn.Linear(2, 1)

        def forward(self, a, b):
            return self.out(self.norm(a * b))

    a, b, y = torch.randn(20, 2), torch.randn(20, 2), torch.randn(20, 1)
    task = Task("two", TwoInputs, (a, b, y), (a, b, y), loss=functional.mse_loss, batch_size=20)
    params = task.init_params(generator_for(0)).requires_grad_()
    batch = task.batches(generator_for(0), 1)[0]
    first = task.objective(params, batch)
    assert torch.equal(first, task.objective(params, batch))
    (grad,) = torch.autograd.grad(first, params, create_graph=True)
    torch.autograd.grad(grad.square().sum(), params)


def test_two_run_one_after_another_and_three_as_one() -> None:
    """Where nobody says how; bits tell which it was."""
    task = tasks.load("digits-mlp", batch_size=16)
    flats = torch.stack([task.init_params(generator_for(s)) for s in range(3)])
    batch = tuple(tensor[None, :16] for tensor in task.train)
    for count, stack in ((1, False), (2, False), (3, True)):
        some = flats[None, :count].clone().requires_grad_()
        found = [task.objectives(some, batch, how) for how in (None, stack)]
        assert torch.equal(*found)
        assert torch.equal(*(torch.autograd.grad(f.sum(), some)[0] for f in found))
    assert torch.allclose(task.objectives(flats[None], batch, False), found[0])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train": (torch.ones(3), torch.ones(4))}, "train"),
        ({"validation": (torch.ones(0), torch.ones(0))}, "validation"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 5}, "batch_size must be between 1 and the 4"),
    ],
)
def test_bad_tasks_are_named(changes, named) -> None:
    data = (torch.ones(4, 1), torch.ones(4))
    settings = {"train": data, "validation": data, "batch_size": 2} | changes
    with pytest.raises(ValueError, match=named):
        Task("bad", lambda: nn.Linear(1, 1), **settings)


def test_unknown_task() -> None:
    with pytest.raises(ValueError, match="did you mean 'digits-mlp'"):
        tasks.load("digit-mlp")


def test_a_parameter_with_two_names_is_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    x, y = torch.randn(6, 3), torch.randn(6, 3)
    task = Task("tied", Tied, (x, y), (x, y), loss=functional.mse_loss, batch_size=6)
    flat = torch.randn(9)
    weight = flat.view(3, 3)
    expected = functional.mse_loss(x @ weight.T @ weight.T, y)
    assert torch.allclose(task.objective(flat, (x, y)), expected)


def test_batches_are_gathered_when_asked_for() -> None:
    task = tasks.load("digits-mlp")
    batches = task.batches(generator_for(1), 25)
    assert len(batches) == len(list(batches)) == 25
    for ours, theirs in zip(batches[3:7], list(batches)[3:7], strict=True):
        assert all(map(torch.equal, ours, theirs))
    with pytest.raises(IndexError):
        batches[25]
    epoch = len(task.train[0]) // 128
    images = torch.cat([batches[t][0] for t in range(epoch)])
    assert len(images.unique(dim=0)) > 0.95 * len(images)


@pytest.mark.parametrize("name", ["digits-mlp", "digits-cnn"])
@pytest.mark.parametrize("stack", [None, True, False])
def test_many_optimizees_are_each_alone(name: str, stack: bool | None) -> None:
    task = tasks.load(name, batch_size=8)
    rows, each = 2, 3
    generator = generator_for(2)
    flat = torch.stack([task.init_params(generator) for _ in range(rows * each)])
    flat = flat.view(rows, each, -1).double().float()
    batches = [task.batches(generator_for(row), 1)[0] for row in range(rows)]
    batch = tuple(torch.stack(parts) for parts in zip(*batches, strict=True))
    losses = task.objectives(flat, batch, stack)
    alone = [[task.objective(flat[r, m], batches[r]) for m in range(each)] for r in range(rows)]
    assert torch.allclose(losses, torch.tensor(alone), rtol=1e-5)


@pytest.mark.parametrize("optimizee", [*tasks.SMALL, *tasks.HELD_OUT])
def test_small_tasks_have_gradients_everywhere(optimizee: str) -> None:
    """On a second device and in another dtype, too: nothing of theirs stays behind."""
    task = tasks.small(optimizee=optimizee)
    params = task.init_params(torch.Generator().manual_seed(0)).requires_grad_()
    (batch,) = task.batches(torch.Generator().manual_seed(1), 1)
    loss = task.objective(params, batch)
    (grad,) = torch.autograd.grad(loss, params)
    assert grad.isfinite().all()
    assert grad.abs().max() > 0
    module = task.build()
    x = batch[0].double() if batch[0].is_floating_point() else batch[0]
    assert module.double()(x).dtype == torch.float64
    assert task.build().to("meta")(batch[0].to("meta")).device.type == "meta"


def test_no_small_task_of_another_name() -> None:
    with pytest.raises(ValueError, match="optimizee must be one of .*, not 'cnm'; did you mean"):
        tasks.small(optimizee="cnm")
    with pytest.raises(ValueError, match="batch_size must be between 1"):
        tasks.small(0)


class Through(nn.Linear):
    """A linear layer whose output some function changes."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(3, 2)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(super().forward(x))


MODEL, COUNT = nn.Linear(3, 2), itertools.count(1)
WIDTHS, OTHERS = itertools.count(4), itertools.cycle((True, False))


def of_another_width() -> nn.Module:
    width = next(WIDTHS)
    return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2))


def of_another_constant() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=next(OTHERS)))


@pytest.mark.parametrize(
    ("build", "changes", "named"),
    [
        (lambda: MODEL, {}, "a new module each time.*'weight'.*copy.deepcopy"),
        (
            lambda: nn.Sequential(MODEL, nn.Linear(2, 2)),
            {},
            "a new module each time.*share '0.weight'",
        ),
        (lambda: 3, {}, "must return an nn.Module, not 3"),
        (
            of_another_width,
            {},
            r"same shapes each time, but '0.weight' .* \(4, 3\) in one and has the shape \(5, 3\)",
        ),
        (
            of_another_constant,
            {},
            r"'1.running_mean' .* has the shape \(2,\) in one and is absent",
        ),
        (nn.Flatten, {}, "none to train"),
        (lambda: nn.Linear(3, 2).requires_grad_(False), {}, "none to train"),
        (lambda: nn.LazyLinear(2), {}, "lazy ones .* call it on a sample in build"),
        (
            lambda: nn.Linear(3, 2, dtype=torch.complex64),
            {},
            "floating-point parameters, but 'weight' .* is torch.complex64",
        ),
        (lambda: nn.Linear(4, 2), {}, "'bad' can't be trained.*shapes"),
        (
            lambda: nn.Linear(3, 2),
            {"loss": nn.CrossEntropyLoss(reduction="none")},
            "loss must return a scalar.*not the shape \\(4,\\)",
        ),
        (
            lambda: nn.Linear(3, 2),
            {"loss": lambda out, target: (out.argmax(1) == target).float().mean()},
            "'bad' can't be trained on its first samples.*does not require grad",
        ),
        (
            lambda: Through(lambda out: out * random.random()),
            {},
            "draws by NumPy's or Python's",
        ),
        (
            lambda: Through(
                lambda out: out * np.random.rand()  # noqa: NPY002
            ),
            {},
            "draws by NumPy's or Python's",
        ),
        (
            lambda: nn.Linear(3, 2),
            {"loss": lambda out, target: out.square().mean() * next(COUNT)},
            "another loss when it is computed again",
        ),
    ],
)
def test_what_no_optimizee_can_be(build, changes, named) -> None:
    data = (torch.randn(4, 3), torch.randint(2, (4,)))
    with pytest.raises(ValueError, match=named):
        Task("bad", build, data, data, batch_size=4, **changes)


def test_a_build_that_comes_to_other_shapes_later_is_refused_then() -> None:
    widths = itertools.chain((4, 4), itertools.count(5))
    data = (torch.randn(4, 3), torch.randint(2, (4,)))
    task = Task("bad", lambda: nn.Sequential(nn.Linear(3, next(widths))), data, data, batch_size=4)
    for begin in (task.init_module, task.init_params):
        with pytest.raises(ValueError, match="same shapes each time, but '0.weight'"):
            begin(torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("build", "unstackable"),
    [
        (lambda: nn.Linear(3, 2), None),
        (lambda: nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)), "draw random numbers"),
        (lambda: nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)).eval(), None),
        (lambda: Through(lambda out: out if out.sum().item() > 0 else -out), "item"),
        (lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), "running_mean"),
    ],
    ids=["linear", "dropout", "evaluating", "item", "batch-norm"],
)
def test_what_runs_as_one_is_found_out(build, unstackable) -> None:
    data = (torch.randn(4, 3), torch.randint(2, (4,)))
    task = Task("some", build, data, data, batch_size=4)
    assert [task.stacks(count) for count in (2, 3)] == [False, unstackable is None]
    if unstackable is not None:
        assert re.search(unstackable, task.unstackable)


def test_one_may_say_that_it_draws() -> None:
    """Where it does so in some steps only, of which the first batch is none."""
    data = (torch.zeros(4, 3), torch.randint(2, (4,)))

    def sometimes() -> nn.Module:
        return Through(lambda out: out * torch.rand(2) if out.sum() > 9 else out)

    for draws in (None, True):
        task = Task("some", sometimes, data, data, batch_size=4, draws=draws)
        assert not task.stacks(3)
        flat = 100 + torch.zeros(8)
        torch.manual_seed(0)
        batch = task.batches(generator_for(0), 1)[0]
        losses = [task.objective(flat, batch) for _ in range(2)]
        assert torch.equal(*losses) == bool(draws)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.complex64])
def test_data_of_any_dtype_have_a_digest(dtype: torch.dtype) -> None:
    x = torch.arange(12).view(4, 3).to(dtype)
    build = lambda: Through(lambda out: out)  # noqa: E731
    loss = lambda out, target: out.square().mean()  # noqa: E731
    tasks = [
        Task("some", build, (torch.zeros(4, 3), y), (torch.zeros(4, 3), y), loss, 4)
        for y in (x, x.clone(), 1 - x if dtype != torch.bool else ~x)
    ]
    one, two, other = (task.describe() for task in tasks)
    assert one == two != other
