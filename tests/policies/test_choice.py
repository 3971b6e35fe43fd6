"""The choice computes what the authors' code computes, starts as theirs does, refuses nonsense."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from amalgam.policies import Choice, ChoiceConfig, Teacher

GOLDEN = Path(__file__).parents[1] / "golden"
SHAPE = (4, 9)
# Of all their teachers RMSProp alone kept its class's eps.
SMALL = (Teacher("rmsprop", 0.005, eps=1e-7), Teacher("adam", 0.02))
LARGE = (
    Teacher("sgd", 2.0),
    Teacher("momentum", 2.0),
    *SMALL,
    Teacher("powersign", 1.0),
    Teacher("addsign", 1.0),
)
# Which of the op's moments the authors keep, under which name.
MOMENTS = {"sgd": {}, "momentum": {"": "m"}, "rmsprop": {"": "v"}}
BOTH = {".m": "m", ".v": "v"}


def close(ours: Tensor, theirs: np.ndarray, scale: float | None = None) -> None:
    """Within 1e-5 of the array's largest magnitude, or of a scale."""
    expected = torch.from_numpy(theirs).double()
    assert ours.shape == expected.shape
    bound = 1e-5 * (expected.abs().max().item() if scale is None else scale)
    assert (ours - expected).abs().max().item() <= bound


def close_by_coordinate(ours: Tensor, theirs: np.ndarray) -> None:
    """Within 1e-5 of each coordinate's largest; gradients span as many decades as coordinates."""
    expected = torch.from_numpy(theirs).double()
    assert ours.shape == expected.shape
    assert ((ours - expected).abs() <= 1e-5 * expected.abs().amax(0)).all()


def keras_layout(weight: Tensor) -> Tensor:
    return weight.T if weight.dim() == 2 else weight


def golden_choice(data: Any, pool: tuple[Teacher, ...]) -> Choice:
    choice = Choice(ChoiceConfig(pool)).double()
    keys = [key for key in data.files if key.startswith("weight.")]
    with torch.no_grad():
        for weight, key in zip(choice.weights(), keys, strict=True):
            weight.copy_(keras_layout(torch.from_numpy(data[key])))
    return choice


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("name", "pool"), [("choice_small", SMALL), ("choice_large", LARGE)])
def test_choice_matches_the_authors(name: str, pool: tuple[Teacher, ...], backend: str) -> None:
    data = np.load(GOLDEN / f"{name}.npz")
    choice = golden_choice(data, pool)
    grads = torch.from_numpy(data["grads"]).double().requires_grad_()
    ranks = torch.full((math.prod(SHAPE),), len(SHAPE))
    state, updates = choice.initial_state(grads[0]), []
    for grad in grads:
        update, state, _ = choice.step(grad, state, ranks, backend=backend)
        updates.append(update)
    stacked = torch.stack(updates)
    close(stacked.detach(), data["updates"])

    finals: dict[str, Tensor] = {}
    for k, teacher in enumerate(pool):
        for suffix, moment in MOMENTS.get(teacher.kind, BOTH).items():
            finals[f"choices.{k}{suffix}"] = getattr(state, moment)[k].view(SHAPE)
        if teacher.kind == "sgd":
            finals[f"choices.{k}"] = torch.zeros(())
    for layer in range(2):
        finals |= {f"rnn_{layer}.0": state.h[layer].T, f"rnn_{layer}.1": state.c[layer].T}
    finals["time"] = torch.tensor(state.steps)
    assert {f"final_state.{k}" for k in finals} == {
        key for key in data.files if key.startswith("final_state.")
    }
    for key, ours in finals.items():
        close(ours.detach(), data[f"final_state.{key}"])

    terms = torch.from_numpy(data["loss_coefficients"]).double() * stacked
    loss = terms.sum()
    # As in test_student.py: a sum that may cancel is as exact as its terms are.
    close(loss.detach(), data["loss"], terms.abs().max().item())
    in_grads, *in_weights = torch.autograd.grad(loss, [grads, *choice.weights()])
    close_by_coordinate(in_grads, data["grad_of_loss.grads"])
    for index, found in enumerate(in_weights):
        close(keras_layout(found), data[f"grad_of_loss.weight.{index}"])


def test_each_coordinate_has_its_parameters_rank() -> None:
    """Coordinates of several parameters side by side step as each parameter alone does."""
    params = [torch.zeros(3), torch.zeros(2, 2), torch.zeros(1, 2, 1), torch.zeros(1, 1, 1, 2)]
    choice = Choice(ChoiceConfig(LARGE), generator=torch.Generator().manual_seed(0)).double()
    ranks = torch.cat([torch.full((p.numel(),), p.dim()) for p in params])
    grad = torch.full((len(ranks),), 0.3, dtype=torch.float64)
    update, state, mixture = choice.step(grad, choice.initial_state(grad), ranks)
    assert len(mixture.unique(dim=1).T) == len(params)
    begin = 0
    for param in params:
        part = slice(begin, begin + param.numel())
        alone, alone_state, _ = choice.step(
            grad[part], choice.initial_state(grad[part]), ranks[part]
        )
        assert torch.allclose(update[part], alone, rtol=1e-13)
        assert torch.allclose(state.h[..., part], alone_state.h, rtol=1e-12)
        begin = part.stop


def test_time_is_seen() -> None:
    choice = Choice(ChoiceConfig(time_scale=5.0)).double()
    grad, ranks = torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.int64)
    begin = choice.initial_state(grad)
    _, early, first = choice.step(grad, begin, ranks)
    _, late, second = choice.step(grad, begin._replace(steps=10), ranks)
    assert (early.steps, late.steps) == (1, 11)
    assert not torch.allclose(first, second, rtol=1e-6)


def test_learning_rate_scales_the_update() -> None:
    grad, ranks = torch.linspace(-1, 1, 5, dtype=torch.float64), torch.full((5,), 2)
    updates = []
    for rate in (1.0, 0.25):
        choice = Choice(
            ChoiceConfig(learning_rate=rate), generator=torch.Generator().manual_seed(0)
        ).double()
        updates.append(choice.step(grad, choice.initial_state(grad), ranks)[0])
    assert torch.equal(0.25 * updates[0], updates[1])


@pytest.mark.parametrize(("pool", "total"), [(SMALL, 5482), (LARGE, 5886)])
def test_initial_weights_are_keras_like(pool: tuple[Teacher, ...], total: int) -> None:
    k, hidden = len(pool), 20
    choice = Choice(ChoiceConfig(pool), generator=torch.Generator().manual_seed(0))
    assert sum(w.numel() for w in choice.weights()) == total
    bound = math.sqrt(6 / (k + 4 + 4 * hidden))
    assert 0.9 * bound < choice.cells[0].weight_ih.abs().max() <= bound
    bound = math.sqrt(6 / (k + hidden))
    assert 0.8 * bound < choice.head.weight.abs().max() <= bound
    assert torch.equal(choice.head.bias, torch.zeros(k))
    for cell in choice.cells:
        assert torch.allclose(cell.weight_hh.T @ cell.weight_hh, torch.eye(hidden), atol=1e-5)
        gates = cell.bias.view(4, hidden)
        assert torch.equal(gates.sum(1), torch.tensor([0.0, hidden, 0.0, 0.0]))


def test_generator_decides_the_weights() -> None:
    def weights(seed: int) -> Tensor:
        choice = Choice(generator=torch.Generator().manual_seed(seed))
        return torch.cat([w.flatten() for w in choice.weights()]).detach()

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_state_has_the_shape_of_what_it_is_for() -> None:
    choice = Choice(ChoiceConfig(LARGE, layers=3, hidden=4)).double()
    state = choice.initial_state(torch.zeros(5))
    assert [tuple(t.shape) for t in state[:4]] == [(6, 5), (6, 5), (3, 4, 5), (3, 4, 5)]
    assert all(t.dtype == torch.float64 and not t.any() for t in state[:4])
    assert state.steps == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers", 0),
        ("hidden", -1),
        ("time_scale", 0.0),
        ("time_scale", float("inf")),
        ("learning_rate", -1.0),
        ("learning_rate", float("nan")),
    ],
)
def test_config_errors_name_the_field(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be .*not {value}$"):
        ChoiceConfig(**{field: value})


def test_pool_errors() -> None:
    with pytest.raises(ValueError, match="teachers must be one or more, not none"):
        ChoiceConfig(())
    with pytest.raises(ValueError, match="kind must be one of .*, not 'adamw'"):
        ChoiceConfig(("adamw",))


def test_repr_shows_the_configuration() -> None:
    assert "ChoiceConfig(teachers=(Teacher(kind='rmsprop'" in repr(Choice())
