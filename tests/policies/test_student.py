"""The student computes what the authors' code computes, starts as theirs does, refuses nonsense."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from authors import GOLDEN, close, close_by_coordinate, keras_layout
from torch import Tensor

from amalgam.policies import Student, StudentConfig


def golden_student(data: Any, layers: int) -> Student:
    student = Student(StudentConfig(layers=layers)).double()
    keys = [key for key in data.files if key.startswith("weight.")]
    with torch.no_grad():
        for weight, key in zip(student.weights(), keys, strict=True):
            weight.copy_(keras_layout(torch.from_numpy(data[key])))
    return student


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("name", "layers"), [("rnnprop", 2), ("rnnprop_one_layer", 1)])
def test_student_matches_the_authors(name: str, layers: int, backend: str) -> None:
    data = np.load(GOLDEN / f"{name}.npz")
    student = golden_student(data, layers)
    grads = torch.from_numpy(data["grads"]).double().requires_grad_()
    state, updates = student.initial_state(grads[0]), []
    for grad in grads:
        update, state = student.step(grad, state, backend=backend)
        updates.append(update)
    stacked = torch.stack(updates)
    close(stacked.detach(), data["updates"])
    finals = {"m": state.m, "v": state.v}
    for layer in range(layers):
        finals |= {f"rnn_{layer}.0": state.h[layer].T, f"rnn_{layer}.1": state.c[layer].T}
    assert {f"final_state.{k}" for k in finals} == {
        key for key in data.files if key.startswith("final_state.")
    }
    for key, ours in finals.items():
        close(ours.detach(), data[f"final_state.{key}"])

    terms = torch.from_numpy(data["loss_coefficients"]).double() * stacked
    loss = terms.sum()
    # The loss is a sum that cancels (to 1/1254 of its terms in rnnprop_one_layer, where even the
    # authors' own float32 updates give another loss by 1.05e-5), so its terms set the scale.
    assert abs(loss.item() - float(data["loss"])) <= 1e-5 * terms.abs().max().item()
    in_grads, *in_weights = torch.autograd.grad(loss, [grads, *student.weights()])
    close_by_coordinate(in_grads, data["grad_of_loss.grads"])
    for index, found in enumerate(in_weights):
        close(keras_layout(found), data[f"grad_of_loss.weight.{index}"])


def test_float32_student_stays_within_its_rounding() -> None:
    """The bound is twice 12 steps' rounding, each that of the longest dot product (42 terms)."""
    data = np.load(GOLDEN / "rnnprop.npz")
    runs = []
    for dtype in (torch.float32, torch.float64):
        student = golden_student(data, 2).to(dtype)
        grads = torch.from_numpy(data["grads"]).to(dtype)
        state, updates = student.initial_state(grads[0]), []
        with torch.no_grad():
            for grad in grads:
                update, state = student.step(grad, state, backend="reference")
                updates.append(update.double())
        runs.append(torch.stack(updates))
    bound = 2 * len(runs[0]) * 42 * torch.finfo(torch.float32).eps * student.config.alpha
    assert 0 < (runs[0] - runs[1]).abs().max() <= bound


@pytest.mark.parametrize(("layers", "hidden"), [(2, 20), (1, 64)])
def test_initial_weights_are_keras_like(layers: int, hidden: int) -> None:
    student = Student(
        StudentConfig(layers=layers, hidden=hidden), generator=torch.Generator().manual_seed(0)
    )
    for layer, cell in enumerate(student.cells):
        inputs = hidden if layer else 2
        glorot_uniform(cell.weight_ih, inputs + 4 * hidden)
        assert cell.weight_hh.shape == (4 * hidden, hidden)
        product = cell.weight_hh.T @ cell.weight_hh
        assert torch.allclose(product, torch.eye(hidden), atol=1e-5)
        assert cell.weight_hh.std() > 0
        gates = cell.bias.view(4, hidden)
        assert torch.equal(gates.sum(1), torch.tensor([0.0, hidden, 0.0, 0.0]))
        assert torch.equal(gates[1], torch.ones(hidden))
    glorot_uniform(student.head.weight, hidden + 1)
    assert torch.equal(student.head.bias, torch.zeros(1))


def glorot_uniform(weight: Tensor, fan: int) -> None:
    """Check that values lie within the bound, come near it, and vary as a uniform's do.

    Their variance may be off by 5 standard errors. The deviation of a uniform's sample variance is
    sqrt(4/5) / sqrt(n) of it (its kurtosis is 1.8).
    """
    bound = math.sqrt(6 / fan)
    assert weight.abs().max() <= bound
    n = weight.numel()
    variance = weight.square().mean().item() / (bound**2 / 3)
    assert abs(variance - 1) <= 5 * math.sqrt(0.8 / n)
    assert weight.abs().max() >= bound * (1 - 10 / n)
    assert abs(weight.mean().item()) <= 5 * bound / math.sqrt(3 * n)


def test_generator_decides_the_weights() -> None:
    def weights(seed: int) -> Tensor:
        student = Student(generator=torch.Generator().manual_seed(seed))
        return torch.cat([w.flatten() for w in student.weights()]).detach()

    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert weights(1).numel() == 5141


def test_state_has_the_shape_of_what_it_is_for() -> None:
    student = Student(StudentConfig(layers=3, hidden=4)).double()
    state = student.initial_state(torch.zeros(2, 5, dtype=torch.float16))
    assert [tuple(t.shape) for t in state] == [(2, 5), (2, 5), (3, 4, 2, 5), (3, 4, 2, 5)]
    assert all(t.dtype == torch.float64 and not t.any() and t.is_contiguous() for t in state)


def test_first_step_sees_the_gradients_sign() -> None:
    """From zero moments both features are sign(g): equal updates for any magnitude."""
    student = Student().double()
    grad = torch.tensor([1e-2, 3.0, 1e4, -1e-2, -1e4], dtype=torch.float64)
    with torch.no_grad():
        update, _ = student.step(grad, student.initial_state(grad))
    assert torch.allclose(update[:3], update[0].expand(3), rtol=1e-4)
    assert torch.allclose(update[3:], update[3].expand(2), rtol=1e-4)
    assert not torch.allclose(update[0], update[3], rtol=1e-2)


def test_given_weights_replace_its_own() -> None:
    student, other = Student().double(), Student().double()
    grad = torch.linspace(-1, 1, 7, dtype=torch.float64)
    state = student.initial_state(grad)
    ours = student.step(grad, state)[0]
    assert torch.equal(student.step(grad, state, other.weights())[0], other.step(grad, state)[0])
    assert not torch.equal(ours, other.step(grad, state)[0])


def test_warm_up_moves_the_moments_alone() -> None:
    student = Student(StudentConfig(beta1=0.5, beta2=0.75)).double()
    grad = torch.tensor([2.0, -4.0], dtype=torch.float64)
    begin = student.initial_state(grad)
    begin = begin._replace(m=begin.m + 1, v=begin.v + 1, h=begin.h + 3, c=begin.c + 4)
    warm = student.warm_up(grad, begin)
    assert warm.m.tolist() == [1.5, -1.5]
    assert warm.v.tolist() == [1.75, 4.75]
    assert torch.equal(warm.h, begin.h)
    assert torch.equal(warm.c, begin.c)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers", 0),
        ("hidden", -1),
        ("beta1", 1.0),
        ("beta1", -0.1),
        ("beta2", 1.5),
        ("beta2", float("nan")),
        ("eps", 0.0),
        ("eps", float("nan")),
        ("alpha", -0.1),
        ("warmup_steps", -1),
        ("warmup_lr", -0.05),
        ("warmup_lr", float("nan")),
    ],
)
def test_config_errors_name_the_field(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be .*not {value}$"):
        StudentConfig(**{field: value})


def test_step_errors_reach_the_caller() -> None:
    student = Student()
    state = student.initial_state(torch.zeros(3))
    with pytest.raises(ValueError, match="backend must be one of"):
        student.step(torch.zeros(3), state, backend="quantum")
    with pytest.raises(ValueError, match=r"weights\[0\] must be torch.float64"):
        student.step(torch.zeros(3).double(), state)


def test_repr_shows_the_configuration() -> None:
    assert "StudentConfig(" in repr(Student())
    assert "layers=2, hidden=20" in repr(Student())
