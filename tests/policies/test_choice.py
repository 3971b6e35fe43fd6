"""The choice computes what the authors' code computes, starts as theirs does, refuses nonsense."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from authors import GOLDEN, close, close_by_coordinate, keras_layout
from torch import Tensor

from amalgam.layout import Layout
from amalgam.policies import POOLS, Choice, ChoiceConfig, Pool, Teacher, TorchTeacher, load_policy

SHAPE = (4, 9)
LAYOUT = Layout({"weight": SHAPE})
SMALL, LARGE = POOLS["small-shallow"], POOLS["large-shallow"]
# The op's moments that the authors' files hold, by the end of their names there.
MOMENTS = {"sgd": {}, "momentum": {"": "m"}, "rmsprop": {"": "v"}}
BOTH = {".m": "m", ".v": "v"}


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
    state, updates = choice.initial_state(grads[0]), []
    for grad in grads:
        update, state = choice.step(grad, state, layout=LAYOUT, backend=backend)
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
    layout = Layout({str(index): p.shape for index, p in enumerate(params)})
    grad = torch.full((layout.numel,), 0.3, dtype=torch.float64)
    update, state, mixture = choice.mix(grad, choice.initial_state(grad), layout=layout)
    assert len(mixture.unique(dim=1).T) == len(params)
    begin = 0
    for param in params:
        part = slice(begin, begin + param.numel())
        alone, alone_state = choice.step(
            grad[part], choice.initial_state(grad[part]), layout=Layout({"": param.shape})
        )
        assert torch.allclose(update[part], alone, rtol=1e-13)
        assert torch.allclose(state.h[..., part], alone_state.h, rtol=1e-12)
        begin = part.stop


def test_time_is_seen() -> None:
    choice = Choice(ChoiceConfig(time_scale=5.0)).double()
    grad = torch.ones(2, dtype=torch.float64)
    begin = choice.initial_state(grad)
    _, early, first = choice.mix(grad, begin)
    _, late, second = choice.mix(grad, begin._replace(steps=10))
    assert (early.steps, late.steps) == (1, 11)
    assert not torch.allclose(first, second, rtol=1e-6)


def test_learning_rate_scales_the_update() -> None:
    grad = torch.linspace(-1, 1, 5, dtype=torch.float64)
    updates = []
    for rate in (1.0, 0.25):
        choice = Choice(
            ChoiceConfig(learning_rate=rate), generator=torch.Generator().manual_seed(0)
        ).double()
        updates.append(choice.step(grad, choice.initial_state(grad))[0])
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
        ("hardness", -1.0),
        ("lr_multiplier_scale", float("inf")),
        ("warmup_steps", -1),
        ("warmup_lr", float("nan")),
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
    with pytest.raises(ValueError, match="one of .*, not 'smal'; did you mean 'small'"):
        ChoiceConfig("smal")
    with pytest.raises(TypeError, match="must be analytical.*torch.optim.Muon"):
        ChoiceConfig((TorchTeacher("torch.optim.Muon"),))


def test_pools_by_name() -> None:
    """The learning rates of the paper, and those of its authors' later code."""
    rates = {
        name: {teacher.kind: teacher.lr for teacher in ChoiceConfig(name).teachers}
        for name in POOLS
    }
    paper, shallow = {"rmsprop": 0.005, "adam": 0.005}, {"rmsprop": 0.005, "adam": 0.02}
    assert rates == {
        "small": paper,
        "large": {"sgd": 0.2, "momentum": 0.5, **paper, "powersign": 0.1, "addsign": 0.1},
        "small-shallow": shallow,
        "large-shallow": {
            **{"sgd": 2.0, "momentum": 2.0},
            **shallow,
            **{"powersign": 1.0, "addsign": 1.0},
        },
        "adam-sgd": {"sgd": 0.2, "adam": 0.02},
    }
    assert [t.kind for t in POOLS["large"]] == list(rates["large"])


def extended(pool: str = "small", **config: Any) -> Choice:
    """A choice whose heads are not zero, with weights that depend on the pool alone."""
    generator = torch.Generator().manual_seed(0)
    choice = Choice(ChoiceConfig(pool, hidden=4, **config), generator=generator).double()
    with torch.no_grad():
        for head in [choice.head] + [getattr(choice, "lr_head", choice.head)]:
            for weight in head.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator))
    return choice


GRAD = torch.linspace(-1, 1, math.prod(SHAPE), dtype=torch.float64)


def test_hard_choice_takes_the_likeliest_teacher() -> None:
    soft, hard = extended(), extended(hardness=10.0)
    hard.load_state_dict(soft.state_dict())
    state = soft.initial_state(GRAD)
    generator = torch.Generator().manual_seed(7)
    h = 3 * torch.randn(state.h.shape, generator=generator, dtype=torch.float64)
    state = state._replace(h=h, steps=3)
    _, soft_state, soft_mixture = soft.mix(GRAD, state, layout=LAYOUT, backend="reference")
    update, hard_state, mixture = hard.mix(GRAD, state, layout=LAYOUT)
    assert torch.equal(mixture.argmax(0), soft_mixture.argmax(0))
    assert torch.equal(mixture.sum(0), torch.ones_like(GRAD))
    assert torch.equal(mixture, mixture.round())
    assert len(mixture.argmax(0).unique()) == 2
    for ours, theirs in zip(hard_state, soft_state, strict=True):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))
    pool = Pool(POOLS["small"])
    updates, _ = pool.step(GRAD.expand(2, -1), pool.initial_state(GRAD), backend="reference")
    assert torch.equal(update, torch.where(mixture[0] == 1, updates[0], updates[1]))


def test_gumbel_noise_chooses_as_often_as_the_softmax_says() -> None:
    """The Gumbel-max trick: the largest noisy logit is the j-th with its softmax's chance."""
    choice, n = extended(hardness=5.0), 20_000
    grad = torch.full((n,), 0.3, dtype=torch.float64)
    state = choice.initial_state(grad)
    generator = torch.Generator().manual_seed(1)
    _, _, mixture = choice.mix(grad, state, generator=generator)
    assert torch.allclose(mixture.sum(0), torch.ones_like(grad))
    soft = extended()
    soft.load_state_dict(choice.state_dict())
    _, _, chances = soft.mix(grad, state, backend="reference")
    chance = chances[0, 0].item()
    assert 0.05 < chance < 0.95
    wins = (mixture[0] > mixture[1]).double().mean().item()
    assert abs(wins - chance) <= 5 * math.sqrt(chance * (1 - chance) / n)
    # Log odds are hardness times the difference of the noisy logits; less that without noise.
    odds = (mixture[0] / mixture[1]).log() / 5.0 - math.log(chance / (1 - chance))
    # The difference of two Gumbel variables is logistic: mean 0, variance pi^2 / 3.
    assert abs(odds.mean().item()) <= 5 * math.pi / math.sqrt(3 * n)
    assert odds.var().item() == pytest.approx(math.pi**2 / 3, rel=0.06)


def test_the_noise_is_gumbels_for_any_number_of_teachers() -> None:
    """With more than two teachers, only Gumbel noise gives the softmax's probabilities."""
    choice, soft, n = extended("large", hardness=5.0), extended("large"), 20_000
    grad = torch.full((n,), 0.3, dtype=torch.float64)
    state = choice.initial_state(grad)
    _, _, mixture = choice.mix(grad, state, generator=torch.Generator().manual_seed(1))
    chances = soft.mix(grad, state, backend="reference")[2][:, 0]
    assert chances.max() > 2 * chances.min()
    wins = torch.bincount(mixture.argmax(0), minlength=6) / n
    assert ((wins - chances).abs() <= 5 * (chances * (1 - chances) / n).sqrt()).all()


def test_the_generator_decides_the_noise() -> None:
    choice = extended(hardness=2.0)
    state = choice.initial_state(GRAD)

    def mixture(seed: int) -> Tensor:
        return choice.mix(GRAD, state, generator=torch.Generator().manual_seed(seed))[2]

    before = torch.get_rng_state()
    assert torch.equal(mixture(1), mixture(1))
    assert not torch.equal(mixture(1), mixture(2))
    assert torch.equal(torch.get_rng_state(), before)
    (in_head,) = torch.autograd.grad(mixture(1)[0].sum(), choice.head.weight)
    assert in_head.abs().max() > 0


def test_rates_are_multiplied() -> None:
    plain, scaled = extended(), extended(lr_multiplier_scale=2.0)
    scaled.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        scaled.lr_head.weight.zero_()
        scaled.lr_head.bias.copy_(torch.tensor([0.5, -0.25]))
    state = plain.initial_state(GRAD)
    _, _, mixture = plain.mix(GRAD, state, layout=LAYOUT, backend="reference")
    update, new_state, same = scaled.mix(GRAD, state, layout=LAYOUT)
    assert torch.allclose(same, mixture, rtol=1e-12)
    pool = Pool(POOLS["small"])
    updates, _ = pool.step(GRAD.expand(2, -1), pool.initial_state(GRAD), backend="reference")
    factors = (2.0 * torch.tensor([[0.5], [-0.25]], dtype=torch.float64).tanh()).exp()
    assert torch.allclose(update, (mixture * factors * updates).sum(0), rtol=1e-12)
    assert len(scaled.weights()) == len(plain.weights()) + 2
    assert new_state.steps == 1


def test_fresh_multipliers_are_one() -> None:
    generator = torch.Generator().manual_seed(0)
    choice = Choice(ChoiceConfig("small", lr_multiplier_scale=1.0), generator=generator)
    plain = Choice(ChoiceConfig("small"), generator=torch.Generator().manual_seed(0))
    grad = GRAD.float()
    ours = choice.step(grad, choice.initial_state(grad))[0]
    theirs = plain.step(grad, plain.initial_state(grad), backend="reference")[0]
    assert torch.equal(ours, theirs)


def test_what_the_kernels_lack_is_said() -> None:
    choice = extended(hardness=1.0)
    with pytest.raises(RuntimeError, match="backend='cpu' has no kernel for a choice with hard"):
        choice.step(GRAD, choice.initial_state(GRAD), backend="cpu")


def test_warm_up_moves_moments_and_time() -> None:
    choice = extended()
    begin = choice.initial_state(GRAD)
    begin = begin._replace(h=begin.h + 1, c=begin.c - 1, steps=4)
    warm = choice.warm_up(GRAD, begin)
    _, stepped = choice.step(GRAD, begin, backend="reference")
    assert torch.equal(warm.m, stepped.m)
    assert torch.equal(warm.v, stepped.v)
    assert warm.steps == stepped.steps == 5
    assert torch.equal(warm.h, begin.h)
    assert torch.equal(warm.c, begin.c)


@pytest.mark.parametrize("config", [{}, {"hardness": 3.0, "lr_multiplier_scale": 0.5}])
def test_files(tmp_path: Path, config: dict[str, float]) -> None:
    choice = extended(**config).float()
    choice.provenance = {"why": "test"}
    choice.save(tmp_path / "choice.safetensors")
    for loaded in (
        Choice.load(tmp_path / "choice.safetensors"),
        load_policy(tmp_path / "choice.safetensors"),
    ):
        assert isinstance(loaded, Choice)
        assert (loaded.config, loaded.provenance) == (choice.config, {"why": "test"})
        for ours, theirs in zip(loaded.weights(), choice.weights(), strict=True):
            assert torch.equal(ours, theirs)


def test_layouts_that_do_not_fit_are_refused() -> None:
    choice = extended()
    with pytest.raises(ValueError, match="as many coordinates as grad, 36, not 4"):
        choice.step(GRAD, choice.initial_state(GRAD), layout=Layout({"w": (2, 2)}))


def test_repr_shows_the_configuration() -> None:
    assert "ChoiceConfig(" in repr(Choice())
    assert "teachers=(Teacher(kind='rmsprop'" in repr(Choice())
