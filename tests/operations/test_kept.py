"""What kernels derive from weights is made once, and again when the weights change."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn

import amalgam
from amalgam import ops
from amalgam.operations.kept import Kept, kept
from amalgam.policies import Student, StudentConfig


class Sum:
    """The weights' sums, counting how often they are made."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, weights: list[Tensor], key: str = "sum") -> Tensor:
        def make() -> tuple[Tensor]:
            self.times += 1
            return (torch.stack([weight.sum() for weight in weights]),)

        return kept(key, weights, make)[0]


@pytest.fixture
def total() -> Sum:
    return Sum()


@pytest.fixture
def weights() -> list[Tensor]:
    return [torch.ones(3), torch.ones(4)]


def test_an_owner_has_it_made_once_for_each_key(total: Sum, weights: list[Tensor]) -> None:
    owner = Kept()
    for _ in range(3):
        with owner:
            assert total(weights).tolist() == [3, 4]
            total(weights, "other")
    assert total.times == 2


def test_without_an_owner_it_is_made_anew(total: Sum, weights: list[Tensor]) -> None:
    with Kept():
        total(weights)
    for _ in range(3):
        total(weights)
    assert total.times == 4


def test_a_change_in_place_is_seen_where_the_old_lay(total: Sum, weights: list[Tensor]) -> None:
    with Kept():
        before = total(weights)
        weights[1].add_(1)
        after = total(weights)
    assert after.tolist() == [3, 8]
    assert after is before  # of which a CUDA graph may have the address


def test_other_memory_is_seen(total: Sum, weights: list[Tensor]) -> None:
    with Kept():
        for value in range(5):  # freed memory comes back, at the same addresses
            weights[0].data = torch.full((3,), float(value))
            assert total(weights).tolist() == [3 * value, 4]
            assert total([torch.full((3,), 7.0), weights[1]]).tolist() == [21, 4]


def test_of_inference_tensors_nothing_is_kept(total: Sum) -> None:
    with torch.inference_mode():
        weights = [torch.ones(3)]
        with Kept():
            assert total(weights).tolist() == [3]
            weights[0].add_(1)
            assert total(weights).tolist() == [6]


def test_kept_in_inference_mode_and_changed_outside(total: Sum, weights: list[Tensor]) -> None:
    with Kept():
        with torch.inference_mode():
            assert total(weights).tolist() == [3, 4]
        weights[0].add_(1)
        assert total(weights).tolist() == [6, 4]


def test_it_ends_with_its_owner(total: Sum, weights: list[Tensor]) -> None:
    owner = Kept()
    with owner:
        made = weakref.ref(total(weights))
    gc.collect()
    assert made() is not None
    del owner
    gc.collect()
    assert made() is None


def test_copies_begin_empty(total: Sum, weights: list[Tensor]) -> None:
    owner = Kept()
    with owner:
        total(weights)
    for other in (copy.deepcopy(owner), pickle.loads(pickle.dumps(owner))):
        with other:
            total(weights)
    assert total.times == 3


def test_the_optimizer_owns_what_its_steps_make(
    total: Sum, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of float64 weights for float32 parameters, too; and a copy of it has its own."""
    seen = []
    step = ops.step_tensors_

    def watched(*args: object, **how: object) -> None:
        weights = args[2]
        assert isinstance(weights, list)
        seen.append(total(weights).double())
        step(*args, **how)

    monkeypatch.setattr(ops, "step_tensors_", watched)
    param = nn.Parameter(torch.ones(5))
    student = Student(StudentConfig(hidden=4)).double()
    optimizer = amalgam.AmalgamatedOptimizer([param], student=student, warmup_steps=0)
    for _ in range(3):
        param.grad = torch.ones(5)
        optimizer.step()
    assert total.times == 1
    other = copy.deepcopy(optimizer)
    other.param_groups[0]["params"][0].grad = torch.ones(5)
    other.step()
    assert total.times == 2
    optimizer._weights[param.device, torch.float32].operation[0].add_(1)
    optimizer.step()
    assert total.times == 3
    assert not torch.equal(seen[0], seen[-1])
