"""Task families: what they draw, that it is the same again, and that optimization limits it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from amalgam import tasks
from amalgam.seeding import generator_for
from amalgam.tasks import FAMILIES, Task, TaskFamily
from amalgam.tasks.family import Draws, nearest_width
from amalgam.tasks.networks import mlp

DOCUMENT = Path(__file__).parents[2] / "docs" / "families.md"
LONGEST_HORIZON = 2_000

IMAGE_AND_TEXT = sorted(set(FAMILIES) - {"families.regression", "families.factorisation"})


def drawn(name: str, number: int, **arguments: object) -> Task:
    family = tasks.load_for_training(name, arguments=arguments)
    assert isinstance(family, TaskFamily)
    return family.draw(generator_for(1, number))


@pytest.mark.parametrize("name", FAMILIES)
def test_draws_differ_and_come_again(name: str) -> None:
    draws = [drawn(name, number) for number in range(4)]
    assert len({task.name for task in draws}) == 4
    assert len({task.layout.numel for task in draws}) > 2
    assert all(task.name.startswith(f"{name}[") for task in draws)
    state = torch.get_rng_state()
    for number, task in enumerate(draws):
        again = drawn(name, number)
        assert (again.name, again.batch_size) == (task.name, task.batch_size)
        assert again.layout.shapes == task.layout.shapes
        assert torch.equal(*(one.init_params(generator_for(2)) for one in (task, again)))
        batches = [one.batches(generator_for(3), 2)[1] for one in (task, again)]
        assert all(map(torch.equal, *batches))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", FAMILIES)
def test_draws_have_gradients_of_both_orders(name: str) -> None:
    for number in range(6):
        task = drawn(name, number)
        params = task.init_params(generator_for(2, number)).requires_grad_()
        (batch,) = task.batches(generator_for(3, number), 1)
        loss = task.objective(params, batch)
        (grad,) = torch.autograd.grad(loss, params, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), params)
        for found in (loss, grad, second):
            assert found.isfinite().all(), task.name
        # Units that never fire and symbols that a batch lacks have none.
        assert (grad != 0).double().mean() > 0.3, task.name


@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_are_in_their_ranges(name: str) -> None:
    sizes, parameters = (16, 64), [400, 3_000]
    for number in range(5):
        task = drawn(
            name, number, batch_size=sizes[1], smallest_batch=sizes[0], parameters=parameters
        )
        assert sizes[0] <= task.batch_size <= sizes[1]
        assert 0.6 * parameters[0] <= task.layout.numel <= 1.4 * parameters[1], task.name


@pytest.mark.parametrize("name", FAMILIES)
def test_an_epoch_is_longer_than_any_horizon(name: str) -> None:
    """And what is held out is not among what is trained on."""
    task = drawn(name, 0, smallest_batch=128)
    assert len(task.train[0]) // task.batch_size >= LONGEST_HORIZON
    assert 1_500 <= len(task.validation[0]) <= 2_500
    if task.train[0].is_floating_point():
        seen, held_out = (
            data[0][:, 0].double() + torch.pi * data[0][:, 1].double()
            for data in (task.train, task.validation)
        )
        assert not torch.isin(held_out, seen).any()


@pytest.mark.parametrize("name", FAMILIES)
def test_draws_share_their_inputs(name: str) -> None:
    """Nothing as large as the inputs is copied."""
    places = set()
    for number in range(7):
        train = drawn(name, number).train
        places |= {tensor.untyped_storage().data_ptr() for tensor in train[:1]}
        own = [t.untyped_storage().nbytes() for t in train[1:] if t.dim() == 1 or t.shape[1] <= 4]
        assert sum(own) <= 8 * 2**20
    # Digits and halves and features, or two corpora of three numbers of symbols.
    assert len(places) <= 6


@pytest.mark.parametrize("name", IMAGE_AND_TEXT)
def test_adam_learns_a_draw(name: str) -> None:
    task = drawn(name, 5, smallest_batch=64, initial_scale=[0.0, 0.0])
    params = task.init_params(generator_for(2)).requires_grad_()
    optimizer = torch.optim.Adam([params], lr=0.01)
    losses = []
    for batch in task.batches(generator_for(3), 40):
        optimizer.zero_grad()
        loss = task.objective(params, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])


def test_the_initial_scale_multiplies_weights_alone() -> None:
    arguments = {"norms": ["norm"], "data": ["halves"]}
    plain = drawn("families.mlp", 3, initial_scale=[0.0, 0.0], **arguments)
    scaled = drawn("families.mlp", 3, initial_scale=[0.5, 0.5], **arguments)
    modules = [
        dict(task.init_module(generator_for(2)).named_parameters()) for task in (plain, scaled)
    ]
    for name, parameter in modules[0].items():
        factor = 10**0.5 if parameter.dim() > 1 else 1
        assert torch.allclose(modules[1][name], factor * parameter)


def test_draws_are_in_their_ranges_and_log_uniform() -> None:
    draws = Draws(generator_for(4))
    integers = [draws.integer((1, 4)) for _ in range(500)]
    assert set(integers) == {1, 2, 3, 4}
    # Of 500, log 2 / log 5 are 1: 215 in the mean, with a standard deviation of 11.
    assert abs(integers.count(1) - 215) < 45
    logs = [draws.log_uniform((1e-2, 1e2)) for _ in range(500)]
    assert all(1e-2 <= one <= 1e2 for one in logs)
    assert abs(sum(one < 1 for one in logs) - 250) < 45
    assert {draws.choice("ab") for _ in range(30)} == {"a", "b"}


@pytest.mark.parametrize("wanted", [30, 343, 5_000])
def test_the_width_is_the_nearest(wanted: int) -> None:
    def network(width: int) -> torch.nn.Module:
        return mlp([3, width, width, 2], "relu")

    def error(width: int) -> float:
        return abs(sum(p.numel() for p in network(width).parameters()) - wanted)

    assert error(nearest_width(network, wanted)) == min(map(error, range(2, 100)))


def test_descriptions_tell_families_apart() -> None:
    mlps, fewer = (
        tasks.load_for_training("families.mlp", arguments={"data": data})
        for data in (["halves", "digits"], ["halves"])
    )
    assert isinstance(mlps, TaskFamily)
    assert isinstance(fewer, TaskFamily)
    assert mlps.describe() == FAMILIES["families.mlp"](data=("halves", "digits")).describe()
    assert mlps.describe() != fewer.describe()
    assert "parameters=(300, 5000)" in mlps.describe()


@pytest.mark.parametrize(
    ("name", "wrong", "named"),
    [
        ("mlp", {"depth": [3, 2]}, r"depth must be two integers from 1 to .*, not \[3, 2\]"),
        ("mlp", {"depth": [1.0, 2.0]}, "depth must be two integers"),
        ("mlp", {"depth": 3}, "depth must be a list, not 3"),
        ("mlp", {"activations": []}, r"activations must be one or more of \['relu', .*, not \[\]"),
        ("mlp", {"data": ["digit"]}, r"data must be one or more of .*'digits'.*, not \['digit'\]"),
        ("mlp", {"classes": [1, 3]}, "classes must be two integers from 2 to"),
        ("mlp", {"features": [4, 49]}, r"features must be .* from 1 to 48, .* not \[4, 49\]"),
        ("mlp", {"initial_scale": [0, float("nan")]}, "initial_scale must be two numbers, the"),
        ("gru", {"smallest_batch": 0}, "smallest_batch and batch_size must be between 1 and"),
        ("gru", {"batch_size": 4}, "the smaller one first, not 8 and 4"),
        ("gru", {"symbols": [17]}, r"symbols must be one or more of \[16, 32, 64\], not \[17\]"),
        ("factorisation", {"rank": [1, 9]}, r"rank must be at most 8, .*, not \[1, 9\]"),
        ("residual", {"depth": [1, 2]}, "'families.residual' can't be called with .*'depth'"),
        ("mpl", {}, "No module named 'families'.*; did you mean 'families.mlp'"),
    ],
)
def test_what_can_not_be_drawn_is_named(name: str, wrong: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        tasks.load_for_training(f"families.{name}", arguments=wrong)


def test_a_family_is_no_task() -> None:
    with pytest.raises(ValueError, match="not the family 'families.mlp', from which only meta-tra"):
        tasks.load("families.mlp")
    assert not isinstance(tasks.load("digits-mlp"), TaskFamily)


def test_the_documents_own_family_is_one() -> None:
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(blocks[1], names)
    family = names["Signs"](batch_size=32)
    assert isinstance(family, TaskFamily)
    one, again, other = (family.draw(generator_for(number)) for number in (1, 1, 2))
    assert torch.equal(one.train[1], again.train[1])
    assert one.name == again.name != other.name
