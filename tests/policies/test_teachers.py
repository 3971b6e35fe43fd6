"""The teachers compute what the authors' code computes, one alone and all side by side."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from authors import GOLDEN, close, close_by_coordinate
from torch import Tensor

from amalgam import ops
from amalgam.policies import LEARNING_RATES, Pool, Teacher

FILES = {kind: f"teacher_{kind.replace('_', '')}.npz" for kind in ops.KINDS}
# The adaptive variants ran at the plain ones' rate, 0.1; the paper rates neither.
GOLDEN_TEACHERS = {kind: Teacher(kind, 0.1 if "adaptive" in kind else None) for kind in ops.KINDS}


def golden(kind: str) -> Any:
    return np.load(GOLDEN / FILES[kind])


def unroll(pool: Pool, grads: Tensor, backend: str = "reference") -> tuple[Tensor, Any]:
    """Updates (T, K, N) and the final state from gradients (T, K, N)."""
    state, updates = pool.initial_state(grads[0, 0]), []
    for grad in grads:
        update, state = pool.step(grad, state, backend=backend)
        updates.append(update)
    return torch.stack(updates), state


def test_golden_data_covers_every_kind() -> None:
    assert {path.name for path in GOLDEN.glob("teacher_*.npz")} == set(FILES.values())


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("kind", ops.KINDS)
def test_teacher_matches_the_authors(kind: str, backend: str) -> None:
    data = golden(kind)
    grads = torch.from_numpy(data["grads"]).double().requires_grad_()
    updates, state = unroll(Pool([GOLDEN_TEACHERS[kind]]), grads[:, None], backend)
    updates = updates[:, 0]
    close(updates.detach(), data["updates"])
    finals = {
        "sgd": {},
        "momentum": {"final_state": state.m},
        "rmsprop": {"final_state": state.v},
    }.get(kind, {"final_state.m": state.m, "final_state.v": state.v})
    for key, ours in finals.items():
        close(ours[0].detach(), data[key])
    terms = torch.from_numpy(data["loss_coefficients"]).double() * updates
    loss = terms.sum()
    # As in test_student.py: a sum that may cancel is as exact as its terms are.
    close(loss.detach(), data["loss"], terms.abs().max().item())
    (in_grads,) = torch.autograd.grad(loss, grads)
    close_by_coordinate(in_grads, data["grad_of_loss.grads"])


def test_a_pool_is_its_teachers_side_by_side() -> None:
    pool = Pool(list(GOLDEN_TEACHERS.values()))
    grads = torch.stack([torch.from_numpy(golden(kind)["grads"]).double() for kind in ops.KINDS], 1)
    updates, state = unroll(pool, grads)
    for k, teacher in enumerate(pool.teachers):
        alone, alone_state = unroll(Pool([teacher]), grads[:, k : k + 1])
        assert torch.equal(updates[:, k], alone[:, 0])
        assert torch.equal(state.m[k], alone_state.m[0])
        assert torch.equal(state.v[k], alone_state.v[0])


def test_moments_that_a_teacher_lacks_stay_zero() -> None:
    pool = Pool(["sgd", "momentum", "rmsprop", "adam"])
    _, state = unroll(pool, torch.ones(3, 4, 5))
    assert [bool(row.any()) for row in state.m] == [False, True, False, True]
    assert [bool(row.any()) for row in state.v] == [False, False, True, True]


def test_warm_up_is_a_step_without_its_update() -> None:
    pool = Pool(["adam", "momentum"])
    grads = torch.linspace(-1, 1, 6).view(2, 3)
    begin = pool.initial_state(grads[0])
    warm, (_, stepped) = pool.warm_up(grads, begin), pool.step(grads, begin)
    assert torch.equal(warm.m, stepped.m)
    assert torch.equal(warm.v, stepped.v)
    assert not begin.m.any()


def test_adam_is_torchs_without_its_correction_for_time() -> None:
    """The ratios, to two digits, are those of SPEC 2.2 for a constant gradient."""
    ours = unroll(Pool([Teacher("adam", 1.0)]), torch.ones(1000, 1, 1, dtype=torch.float64))[0]
    param = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    theirs, optimizer = [], torch.optim.Adam([param], lr=1.0)
    for _ in range(1000):
        before = param.item()
        param.grad = torch.ones_like(param)
        optimizer.step()
        theirs.append(before - param.item())
    for step, ratio in {1: 1.00, 10: 2.06, 50: 1.42, 200: 0.74, 1000: 0.40}.items():
        assert round(ours[step - 1].item() / theirs[step - 1], 2) == ratio


def test_defaults_are_the_papers() -> None:
    assert LEARNING_RATES == {
        **{"sgd": 0.2, "momentum": 0.5, "rmsprop": 0.005, "adam": 0.005},
        **{"powersign": 0.1, "addsign": 0.1},
        **{"adaptive_powersign": 0.005, "adaptive_addsign": 0.005},  # RMSProp's: it rates neither
    }
    for kind, lr in LEARNING_RATES.items():
        teacher = Teacher(kind)
        assert (teacher.lr, teacher.beta1, teacher.eps) == (lr, 0.9, 1e-10)
        assert teacher.beta2 == (0.9 if kind == "rmsprop" else 0.999)
    assert set(LEARNING_RATES) == set(ops.KINDS)
    assert Teacher("rmsprop", beta2=0.5).beta2 == 0.5


def test_pool_names() -> None:
    assert Pool(["adam", "sgd"]).names == ("adam", "sgd")
    pool = Pool([Teacher("adam", 0.01), Teacher("adam", 2e-4), "sgd"])
    assert pool.names == ("adam(0.01)", "adam(0.0002)", "sgd")
    assert len(pool) == 3
    assert pool.teachers[2] == Teacher("sgd")
    pool = Pool(["adam", "adam", "sgd"], ["linear", "constant", "cosine"])
    assert pool.names == ("adam(0.005, linear)", "adam(0.005)", "sgd")


def test_rates_decay_over_the_horizon() -> None:
    pool = Pool(["adam", "rmsprop", "sgd"], ("constant", "linear", "cosine"))
    assert pool.decays
    factors = [pool.lr_factors(step, 4) for step in (0, 1, 2)]
    half = math.sqrt(0.5) / 2
    expected = [[1, 1, 1], [1, 0.75, 0.5 + half], [1, 0.5, 0.5]]
    for ours, theirs in zip(factors, expected, strict=True):
        assert ours == pytest.approx(theirs)
    assert not Pool(["adam"]).decays
    with pytest.raises(ValueError, match=r"lr_decays must be 2, a teacher each, not \('linear',\)"):
        Pool(["adam", "sgd"], ["linear"])
    with pytest.raises(
        ValueError, match="lr_decays must be of .* not 'cosin'; did you mean 'cosine"
    ):
        Pool(["adam"], ["cosin"])


def test_empty_pool_steps_to_nothing() -> None:
    pool = Pool([])
    updates, state = pool.step(torch.zeros(0, 4), pool.initial_state(torch.zeros(4)))
    assert updates.shape == state.m.shape == state.v.shape == (0, 4)


def test_unknown_kinds_are_named() -> None:
    with pytest.raises(ValueError, match="kind must be one of .*'adam'.*, not 'adamw'"):
        Pool(["adam", "adamw"])
    with pytest.raises(ValueError, match="not 'Adam'"):
        Teacher("Adam")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", 0.0),
        ("lr", -1.0),
        ("lr", float("nan")),
        ("beta1", 1.0),
        ("beta1", -0.5),
        ("beta2", 1.0),
        ("beta2", float("nan")),
        ("eps", 0.0),
    ],
)
def test_settings_errors_name_the_field(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be .*not {value}$"):
        Teacher("adam", **{field: value})
