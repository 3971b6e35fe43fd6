"""PolicyOptimizer keeps torch.optim's contract and computes what the policies compute."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amalgam import AmalgamatedOptimizer, PolicyOptimizer, TeacherOptimizer, TorchTeacher
from amalgam.layout import Layout
from amalgam.policies import POLICIES, FusedStudent, Policy

SHAPES = [(3, 4), (), (5,), (2, 3, 2, 2), (0, 3)]
KINDS = sorted(POLICIES)

# Decay that shows within a few steps is what users are warned of.
pytestmark = pytest.mark.filterwarnings("ignore:weight_decay=")


def made(kind: str, **config: Any) -> Policy:
    """A policy with weights that make every part of it count."""
    generator = torch.Generator().manual_seed(3)
    config_type = POLICIES[kind].config_type
    policy = POLICIES[kind](config_type(**{"warmup_steps": 2, "warmup_lr": 0.1, **config}))
    with torch.no_grad():
        for weight in policy.weights():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return policy


def tensors(seed: int = 0, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def set_grads(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        set_grads(params, step)
        optimizer.step()


def flat(params: list[nn.Parameter]) -> Tensor:
    return torch.cat([p.detach().flatten() for p in params])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warmup_steps", [None, 0])
def test_computes_the_policy(kind: str, warmup_steps: int | None) -> None:
    policy, params = made(kind), tensors()
    lr, decay = 0.5, 0.01
    optimizer = PolicyOptimizer(
        params, policy, lr, warmup_steps=warmup_steps, weight_decay=decay, backend="reference"
    )
    ours = copy.deepcopy(policy).double()
    layout = Layout({str(index): shape for index, shape in enumerate(SHAPES)})
    expected = flat(params)
    state = ours.initial_state(expected, layout)
    for step in range(5):
        set_grads(params, step)
        grad = torch.cat([p.grad.flatten() for p in params])
        with torch.no_grad():
            if step < (2 if warmup_steps is None else 0):
                update, state = 0.1 * grad, ours.warm_up(grad, state, layout=layout)
            else:
                seen = {"params": expected} if ours.sees_params else {}
                how = {"layout": layout, "backend": "reference", **seen}
                update, state = ours.step(grad, state, **how)
        expected = expected * (1 - lr * decay) - lr * update
        optimizer.step()
        assert torch.allclose(flat(params), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["student", "nominal"])
def test_a_student_steps_as_in_its_own_optimizer(kind: str) -> None:
    student, ours, theirs = made(kind), tensors(), tensors()
    assert isinstance(student, FusedStudent)
    run(PolicyOptimizer(ours, student), ours, range(5))
    run(AmalgamatedOptimizer(theirs, student=student), theirs, range(5))
    assert torch.allclose(flat(ours), flat(theirs), rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("middle", [1, 4])
def test_state_dict_round_trip(kind: str, middle: int) -> None:
    """A run that was saved in warm-up or after it resumes to the same bits."""
    policy = made(kind)
    straight = tensors(dtype=torch.float32)
    run(PolicyOptimizer(straight, policy), straight, range(6))
    params = tensors(dtype=torch.float32)
    optimizer = PolicyOptimizer(params, policy)
    run(optimizer, params, range(middle))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = [nn.Parameter(p.detach().clone()) for p in params]
    other = PolicyOptimizer(resumed, policy)
    other.load_state_dict(torch.load(file, weights_only=True))
    run(other, resumed, range(middle, 6))
    assert torch.equal(flat(resumed), flat(straight))
    run(optimizer, params, range(middle, 6))
    assert torch.equal(flat(params), flat(straight))


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_without_gradient_stay(kind: str) -> None:
    """A parameter without a gradient affects no other; it warms up when its first one comes."""
    policy, params = made(kind), tensors()
    alone = [params[0], params[3]]
    twins = [nn.Parameter(p.detach().clone()) for p in alone]
    optimizer, other = PolicyOptimizer(params, policy), PolicyOptimizer(twins, policy)
    before = params[2].detach().clone()
    for step in range(4):
        set_grads(alone, step)
        set_grads(twins, step)
        optimizer.step()
        other.step()
    assert torch.equal(flat(alone), flat(twins))
    assert torch.equal(params[2], before)
    assert params[2] not in optimizer.state
    set_grads(alone, 4)
    params[2].grad = torch.ones_like(params[2])
    optimizer.step()
    assert torch.allclose(params[2], before - 0.1, rtol=1e-12)
    assert [optimizer.state[p]["step"].item() for p in (params[0], params[2])] == [5, 1]


def test_shared_state_stays_when_tensors_come_and_go() -> None:
    """A hierarchical policy steps the tensors that have a gradient, with the state of all."""
    policy = made("scale-hierarchical", warmup_steps=0)
    params = tensors()
    optimizer = PolicyOptimizer(params, policy)
    run(optimizer, params, range(2))
    ours = copy.deepcopy(policy).double()
    layout = Layout({str(index): shape for index, shape in enumerate(SHAPES)})
    state = ours.initial_state(flat(params), layout)
    with torch.no_grad():
        for step in range(2):
            set_grads(params, step)
            grad = torch.cat([p.grad.flatten() for p in params])
            _, state = ours.step(grad, state, layout=layout)
        first = slice(0, 12)
        kept = {
            name: getattr(state, name)[..., first] for name in ("m", "v", "eta", "eta_rel", "h")
        }
        state = state._replace(**kept, tensor=state.tensor[:, :1])
        set_grads(params[:1], 2)
        update, _ = ours.step(params[0].grad.flatten(), state)
    before = flat(params[:1])
    for param in params[1:]:
        param.grad = None
    optimizer.step()
    assert torch.allclose(before - flat(params[:1]), update, rtol=1e-9)


def test_closure_and_skipped_steps() -> None:
    policy, params = made("dm"), tensors(dtype=torch.float32)
    optimizer = PolicyOptimizer(params, policy)
    calls = []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        set_grads(params, len(calls))
        return 1.5

    assert optimizer.step(closure) == 1.5
    assert calls == [True]
    before, state = flat(params), copy.deepcopy(optimizer.state_dict()["state"])
    set_grads(params, 5)
    params[2].grad[1] = float("nan")
    with pytest.warns(RuntimeWarning, match="a gradient was not finite"):
        optimizer.step()
    assert optimizer.skipped_steps == 1
    assert torch.equal(flat(params), before)
    for index, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(entry[name], state[index][name]) for name in entry)


@pytest.mark.parametrize("kind", ["choice", "scale-hierarchical"])
def test_copies_and_pickles(kind: str) -> None:
    policy, params = made(kind), tensors()
    optimizer = PolicyOptimizer(params, policy)
    run(optimizer, params, range(3))
    results = []
    for copied, theirs in (
        copy.deepcopy((optimizer, params)),
        pickle.loads(pickle.dumps((optimizer, params))),
    ):
        run(copied, theirs, range(3, 5))
        results.append(flat(theirs))
    run(optimizer, params, range(3, 5))
    assert torch.equal(results[0], flat(params))
    assert torch.equal(results[1], flat(params))


def test_the_policy_is_taken_once() -> None:
    policy, ours, theirs = made("adam-lr"), tensors(), tensors()
    optimizer, other = PolicyOptimizer(ours, policy), PolicyOptimizer(theirs, policy)
    run(optimizer, ours, range(3))
    with torch.no_grad():
        policy.weights()[0].zero_()
    run(optimizer, ours, range(3, 5))
    run(other, theirs, range(5))
    assert torch.equal(flat(ours), flat(theirs))
    assert policy.weights()[0].requires_grad


def test_files_and_low_precision(tmp_path: Path) -> None:
    policy = made("rmsprop-lr")
    policy.save(tmp_path / "it.safetensors")
    low, ours = tensors(dtype=torch.bfloat16), tensors(dtype=torch.bfloat16)
    optimizer = PolicyOptimizer(low, tmp_path / "it.safetensors")
    run(optimizer, low, range(4))
    run(PolicyOptimizer(ours, policy), ours, range(4))
    assert torch.equal(flat(low), flat(ours))
    assert optimizer.state[low[0]]["m"].dtype == torch.float32
    resumed = PolicyOptimizer(low, policy)
    resumed.load_state_dict(optimizer.state_dict())
    assert torch.equal(resumed.state[low[0]]["v"], optimizer.state[low[0]]["v"])


def test_state_of_another_policy_is_refused() -> None:
    params = tensors()
    state = PolicyOptimizer(params, made("adam-lr")).state_dict()
    with pytest.raises(
        ValueError, match="another policy .* kind is .adam-lr. there and .rmsprop-lr. here"
    ):
        PolicyOptimizer(params, made("rmsprop-lr")).load_state_dict(state)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lr": -1.0}, "lr must be 0 or more and finite, not -1.0"),
        ({"warmup_steps": -1}, "warmup_steps must be 0 or more"),
        ({"warmup_lr": float("nan")}, "warmup_lr must be 0 or more"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more"),
        ({"backend": "quantum"}, "backend must be one of"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        PolicyOptimizer(tensors(), made("dm"), **settings)


def test_tensors_stepped_together_must_be_alike() -> None:
    mixed = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2).double())]
    with pytest.raises(ValueError, match="one dtype and device in each group, for a scale-hier"):
        PolicyOptimizer(mixed, made("scale-hierarchical"))
    optimizer = PolicyOptimizer([{"params": [p]} for p in mixed], made("scale-hierarchical"))
    run(optimizer, mixed, range(4))
    assert all(p.isfinite().all() and not p.eq(1).any() for p in mixed)
    run(PolicyOptimizer(mixed, made("dm")), mixed, range(4))


def test_a_torch_teacher_trains_as_the_optimizer_does() -> None:
    ours, theirs = tensors(), tensors()
    teacher = TorchTeacher(torch.optim.AdamW, lr=0.1, weight_decay=0.2)
    first, second = (
        TeacherOptimizer(ours, teacher),
        torch.optim.AdamW(theirs, 0.1, weight_decay=0.2),
    )
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in (first, second)]
    for step in range(5):
        run(first, ours, range(step, step + 1))
        run(second, theirs, range(step, step + 1))
        for scheduler in schedulers:
            scheduler.step()
    assert torch.allclose(flat(ours), flat(theirs), rtol=1e-10)
    resumed = TeacherOptimizer(ours, teacher)
    resumed.load_state_dict(first.state_dict())
    run(resumed, ours, range(5, 7))
    run(second, theirs, range(5, 7))
    assert torch.allclose(flat(ours), flat(theirs), rtol=1e-10)


def test_others_change_their_rate_in_proportion() -> None:
    muon = TorchTeacher("torch.optim.Muon", lr=0.1, others=("torch.optim.SGD", {"lr": 0.01}))
    half = TorchTeacher("torch.optim.Muon", lr=0.05, others=("torch.optim.SGD", {"lr": 0.005}))
    assert muon.at(0.05) == half
