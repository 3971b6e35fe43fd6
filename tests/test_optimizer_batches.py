"""What AmalgamatedOptimizer keeps from step to step, and when it makes it anew.

A step checks its tensors and makes a table of their addresses once, and again when one of them has
moved. Each case here steps one optimizer that is disturbed between steps, and one that is made anew
before every step by way of its state_dict, which keeps nothing.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from amalgam import AmalgamatedOptimizer, Student, StudentConfig, ops

STEPS = 6

# Decay that shows within a few steps is what users are warned of.
pytestmark = pytest.mark.filterwarnings("ignore:weight_decay=")


def student() -> Student:
    config = StudentConfig(hidden=5, warmup_steps=2, warmup_lr=0.1)
    return Student(config, generator=torch.Generator().manual_seed(3))


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, 4), (), (5,), (2, 3, 2, 2), (0, 3)]
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def gradients(step: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(50 + step)
    return [torch.randn(p.shape, generator=generator).to(dtype) for p in parameters()]


def optimizer_of(params: list[nn.Parameter], **how: object) -> AmalgamatedOptimizer:
    return AmalgamatedOptimizer(params, 0.5, student(), weight_decay=0.01, **how)


Disturb = Callable[[AmalgamatedOptimizer, list[nn.Parameter], int], AmalgamatedOptimizer | None]


def nothing(optimizer: AmalgamatedOptimizer, params: list[nn.Parameter], step: int) -> None:
    pass


def replaces_state(optimizer: AmalgamatedOptimizer, params: list[nn.Parameter], step: int) -> None:
    """As those do who move an optimizer's state to another device and back."""
    for entry in optimizer.state.values():
        for name, value in entry.items():
            entry[name] = value.clone()


def replaces_entries(
    optimizer: AmalgamatedOptimizer, params: list[nn.Parameter], step: int
) -> None:
    for param in params:
        optimizer.state[param] = {n: t.clone() for n, t in optimizer.state[param].items()}


def moves_memory(optimizer: AmalgamatedOptimizer, params: list[nn.Parameter], step: int) -> None:
    """As module.to(), or whoever offloads, does: the same tensors with other memory."""
    for param in params:
        param.data = param.data.clone()
    for entry in optimizer.state.values():
        for name in ("m", "h"):
            entry[name].data = entry[name].data.clone()


def changes_strides(optimizer: AmalgamatedOptimizer, params: list[nn.Parameter], step: int) -> None:
    data = params[0].data
    params[0].data = data.T.contiguous().T if data.is_contiguous() else data.contiguous()


def loads(optimizer: AmalgamatedOptimizer, params: list[nn.Parameter], step: int) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def is_pickled(
    optimizer: AmalgamatedOptimizer, params: list[nn.Parameter], step: int
) -> AmalgamatedOptimizer:
    again = pickle.loads(pickle.dumps(optimizer))
    for param, other in zip(params, again.param_groups[0]["params"], strict=True):
        param.data = other.data
    return again


@pytest.mark.parametrize("how", [{}, {"capturable": True}, {"rounding": "stochastic"}])
@pytest.mark.parametrize(
    "disturb",
    [nothing, replaces_state, replaces_entries, moves_memory, changes_strides, loads, is_pickled],
)
def test_what_is_kept_changes_no_step(disturb: Disturb, how: dict[str, object]) -> None:
    params, expected = parameters(), parameters()
    optimizer, state = optimizer_of(params, **how), None
    for step in range(STEPS):
        stepped = optimizer.param_groups[0]["params"]
        for param, other, grad in zip(stepped, expected, gradients(step), strict=True):
            param.grad, other.grad = grad.clone(), grad
        optimizer.step()
        fresh = optimizer_of(expected, **how)
        if state is not None:
            fresh.load_state_dict(state)
        fresh.step()
        state = fresh.state_dict()
        for param, other in zip(stepped, expected, strict=True):
            assert torch.equal(param, other)
        optimizer = disturb(optimizer, stepped, step) or optimizer


def test_other_parameters_from_step_to_step() -> None:
    """Some have no gradient, of another set each step; others' gradients are of other dtypes."""
    params, expected = parameters(), parameters()
    optimizer, state = optimizer_of(params), None
    for step in range(3 * STEPS):
        dtype = torch.bfloat16 if step % 4 == 3 else torch.float32
        for index, grad in enumerate(gradients(step)):
            grad = None if (index + step) % 3 == 0 else grad.to(dtype if index else torch.float32)
            for param in (params[index], expected[index]):
                # Assignment insists on the parameter's dtype; mixed precision goes around it.
                param.grad = None
                if grad is not None:
                    param.grad = torch.zeros_like(param)
                    param.grad.data = grad.clone()
        optimizer.step()
        fresh = optimizer_of(expected)
        if state is not None:
            fresh.load_state_dict(state)
        fresh.step()
        state = fresh.state_dict()
        for param, other in zip(params, expected, strict=True):
            assert torch.equal(param, other)
    counts = [int(optimizer.state[param]["step"]) for param in params]
    assert counts == [2 * STEPS] * len(params)


def test_a_table_is_made_once_while_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[int] = []
    check = ops.StudentTensors.check_shapes
    monkeypatch.setattr(
        ops.StudentTensors, "check_shapes", lambda *given: (checks.append(1), check(*given))[1]
    )
    params = parameters()
    optimizer = optimizer_of(params, warmup_steps=0)
    for step in range(STEPS):
        for param, grad in zip(params, gradients(step), strict=True):
            param.grad = grad
        optimizer.step()
    assert len(checks) == 1
    params[2].data = params[2].data.clone()
    optimizer.step()
    assert len(checks) == 2


def test_a_state_that_no_longer_fits_is_refused_and_nothing_moves() -> None:
    params = parameters()
    optimizer = optimizer_of(params, warmup_steps=0)
    for param, grad in zip(params, gradients(0), strict=True):
        param.grad = grad
    optimizer.step()
    before = [param.detach().clone() for param in params]
    entry = optimizer.state[params[3]]
    whole, entry["h"] = entry["h"], entry["h"][:1].clone()
    with pytest.raises(ValueError, match=r"state\.h of params\[3\] of group 0.* must have shape"):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    entry["h"] = whole
    optimizer.step()
    assert not torch.equal(params[0], before[0])


def test_steps_are_seen_by_autograd() -> None:
    """A graph that holds a parameter's value from before a step refuses to go backward."""
    params = parameters()
    optimizer = optimizer_of(params, warmup_steps=0)
    loss = params[0].square().sum()
    for param, grad in zip(params, gradients(0), strict=True):
        param.grad = grad
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_counts_of_steps_are_one_tensor_and_survive_its_copies() -> None:
    params = parameters()
    optimizer = optimizer_of(params)
    for param, grad in zip(params, gradients(0), strict=True):
        param.grad = grad
    for _ in range(3):
        optimizer.step()
    for one in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        counts = [entry["step"] for entry in one.state.values()]
        assert [float(count) for count in counts] == [3.0] * len(params)
        assert len({count.untyped_storage().data_ptr() for count in counts}) == 1


def test_what_no_longer_belongs_to_the_optimizer_is_freed() -> None:
    params = parameters()
    optimizer = optimizer_of(params)
    seen: list[weakref.ref[Tensor]] = []
    for step in range(4):
        for param, grad in zip(params, gradients(step), strict=True):
            param.grad = grad
        optimizer.step()
        seen.append(weakref.ref(optimizer.state[params[0]]["h"]))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    gc.collect()
    assert [each() is None for each in seen] == [True] * 4


def test_a_state_that_is_cleared_begins_anew() -> None:
    params = parameters()
    optimizer = optimizer_of(params, warmup_steps=0)
    for param, grad in zip(params, gradients(0), strict=True):
        param.grad = grad
    for _ in range(2):
        optimizer.step()
    optimizer.state[params[0]].clear()
    optimizer.step()
    assert float(optimizer.state[params[0]]["step"]) == 1
    assert float(optimizer.state[params[1]]["step"]) == 3


def test_a_batch_made_in_inference_mode_is_stepped_outside_it() -> None:
    params = parameters()
    optimizer = optimizer_of(params, warmup_steps=0)
    for param, grad in zip(params, gradients(0), strict=True):
        param.grad = grad
    optimizer.step()
    params[0].grad = None
    with torch.inference_mode():
        optimizer.step()
    for step in range(2):
        for param, grad in zip(params[1:], gradients(step)[1:], strict=True):
            param.grad = grad
        optimizer.step()
    assert float(optimizer.state[params[1]]["step"]) == 4


@pytest.mark.parametrize("how", [{}, {"capturable": True}, {"rounding": "stochastic"}])
def test_a_default_device_changes_no_step(how: dict[str, object]) -> None:
    params, expected = parameters(), parameters()
    optimizer, plain = optimizer_of(params, **how), optimizer_of(expected, **how)
    for step in range(STEPS):
        for param, other, grad in zip(params, expected, gradients(step), strict=True):
            param.grad, other.grad = grad.clone(), grad
        with torch.device("meta"):
            optimizer.step()
        plain.step()
    assert all(map(torch.equal, params, expected))
    assert optimizer.skipped_steps == 0


class Wrapped(Tensor):
    """A tensor without memory of its own, as DTensor is one."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        unwrap = lambda value: value.inner if isinstance(value, Wrapped) else value  # noqa: E731
        return func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))


def test_tensors_without_memory_take_pytorchs_way() -> None:
    inner = [torch.tensor([1.0, -3.0]), torch.tensor([2.0])]
    (found,) = ops.largest_magnitudes([Wrapped(tensor) for tensor in inner])
    assert found == 3
    with pytest.raises(RuntimeError, match="it takes plain tensors"):
        ops.largest_magnitudes([Wrapped(inner[0])], backend="cpu")


def test_states_are_seen_by_autograd_where_the_operation_is_called() -> None:
    weights = [weight.detach().requires_grad_() for weight in student().weights()]
    param = torch.zeros(4)
    state = ops.initial_state(param, weights)
    update, _ = ops.student_step(torch.ones(4), state, weights)
    with torch.no_grad():
        ops.student_step_([param], [torch.ones(4)], [state], weights)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        update.sum().backward()


def test_lists_of_other_lengths_are_refused() -> None:
    weights = [weight.detach() for weight in student().weights()]
    params = [torch.zeros(2), torch.zeros(3)]
    states = [ops.initial_state(param, weights) for param in params]
    with pytest.raises(ValueError, match="params and states must be equally many, not 2 and 1"):
        ops.StudentTensors(params, states[:1])
    tensors = ops.StudentTensors(params, states)
    with pytest.raises(ValueError, match="grads must be as many as params, 2, not 1"):
        ops.step_tensors_(tensors, params[:1], weights)


def test_copies_of_tensors_step_their_own() -> None:
    weights = [weight.detach() for weight in student().weights()]
    params = [torch.zeros(5)]
    tensors = ops.StudentTensors(params, [ops.initial_state(params[0], weights)])
    with torch.no_grad():
        ops.step_tensors_(tensors, [torch.ones(5)], weights)
        before = params[0].clone()
        other = copy.deepcopy(tensors)
        ops.step_tensors_(other, [torch.ones(5)], weights)
    assert torch.equal(params[0], before)
    assert not torch.equal(other.params[0], before)
