"""AmalgamatedOptimizer.stats: what the next step will do, before it is taken."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from students import nominal
from torch import nn

from amalgam import AmalgamatedOptimizer, NominalStudent, Student, StudentConfig
from amalgam.policies import FusedStudent

SHAPES = [(3, 4), (), (5,), (0, 2)]


def paper(**config: Any) -> Student:
    config = {"layers": 1, "hidden": 4, "warmup_steps": 2, **config}
    return Student(StudentConfig(**config), generator=torch.Generator().manual_seed(1))


def tensors() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)


def directions(g: torch.Tensor, m: torch.Tensor, v: torch.Tensor) -> dict[str, torch.Tensor]:
    """The paper's formulas, and the authors' two adaptive ones, written out."""
    root = v.sqrt()
    sign = (g / root).tanh() * (m / root).tanh()
    return {
        "sgd": g,
        "momentum": m,
        "rmsprop": g / root,
        "adam": m / root,
        "powersign": sign.exp() * g,
        "addsign": (1 + sign) * g,
        "adaptive_powersign": sign.exp() * g / root,
        "adaptive_addsign": (1 + sign) * g / root,
    }


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("how", [{}, {"maximize": True}, {"cells_dtype": torch.int8}])
@pytest.mark.parametrize(
    "student", [nominal(), nominal(inputs=("time", "rms")), paper()], ids=["plain", "told", "paper"]
)
def test_they_are_those_of_the_step_that_follows(
    student: FusedStudent, how: dict[str, Any], backend: str
) -> None:
    params = tensors()
    optimizer = AmalgamatedOptimizer(params, 0.5, student, backend=backend, **how)
    sign = -1 if "maximize" in how else 1
    m, v = ([torch.zeros(shape, dtype=torch.float64) for shape in SHAPES] for _ in "mv")
    for step in range(4):
        set_gradients(params, step)
        state = copy.deepcopy(optimizer.state_dict()["state"])
        stats = optimizer.stats()
        assert optimizer.state_dict()["state"].keys() == state.keys()
        before = [param.detach().clone() for param in params]
        optimizer.step()
        assert list(stats) == ["0.0", "0.1", "0.2"]
        for index, found in enumerate(stats.values()):
            moved = (before[index] - params[index].detach()).double().flatten()
            grad = sign * params[index].grad.double()
            m[index] = 0.9 * m[index] + 0.1 * grad
            v[index] = 0.999 * v[index] + 0.001 * grad.square()
            root = (v[index] / (1 - 0.999 ** (step + 1))).sqrt()
            adam = (m[index] / (1 - 0.9 ** (step + 1)) / root).flatten()
            size = moved.norm()
            expected = (size / before[index].double().norm(), size / adam.norm())
            assert found[:2] == pytest.approx(list(map(float, expected)), rel=2e-3, abs=1e-4)
            theirs = directions(*(part.flatten() for part in (grad, m[index], v[index])))
            cosines = {
                name: float((moved @ each) / (size * each.norm())) for name, each in theirs.items()
            }
            assert found.agreement == pytest.approx(cosines, rel=2e-3, abs=1e-4)


def test_an_untrained_student_is_adam_at_its_rate() -> None:
    net = nn.Linear(3, 2)
    optimizer = AmalgamatedOptimizer(net.named_parameters(), 0.5, NominalStudent())
    for step in range(3):
        set_gradients(list(net.parameters()), step)
        for name, found in optimizer.stats().items():
            assert name in ("weight", "bias")
            assert found.adam_lr == pytest.approx(0.0025, rel=1e-4)
            assert found.agreement["adam"] == pytest.approx(1.0)
        optimizer.step()


def test_what_has_no_direction_has_no_ratio() -> None:
    still, zero = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))
    optimizer = AmalgamatedOptimizer([still, zero], student=nominal())
    still.grad, zero.grad = torch.zeros(2), torch.ones(2)
    ours, theirs = optimizer.stats().values()
    assert ours.update_over_parameter == 0
    assert math.isnan(ours.adam_lr)
    assert all(map(math.isnan, ours.agreement.values()))
    assert math.isnan(theirs.update_over_parameter)
    assert theirs.adam_lr > 0


def test_gradients_too_small_to_be_squared_leave_the_others_their_ratios() -> None:
    """Their second moment is 0 and their first is not: Adam's step was infinite, and no number."""
    param = nn.Parameter(torch.ones(3))
    optimizer = AmalgamatedOptimizer([param], student=nominal())
    param.grad = torch.tensor([1.0, -2.0, 1e-30])
    (found,) = optimizer.stats().values()
    param.grad = torch.tensor([1.0, -2.0, 0.0])
    (without,) = optimizer.stats().values()
    assert found[:2] == without[:2]
    assert found.agreement == pytest.approx(without.agreement)
    assert found.adam_lr > 0
    assert found.agreement["adam"] > 0
