"""The learned baselines compute what the authors' code computes, and share one interface."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from authors import GOLDEN, close, close_by_coordinate
from torch import Tensor

from amalgam import weight_files
from amalgam.layout import Layout
from amalgam.policies import (
    DM,
    POLICIES,
    AdamLR,
    Policy,
    RMSPropLR,
    RNNPropExt,
    ScaleHierarchical,
    ScaleHierarchicalConfig,
    Student,
    load_policy,
)

RECURRENT = {
    "deepmind": (DM, "lstm"),
    "rnnprop_ext": (RNNPropExt, "rnn"),
    "adam_lr": (AdamLR, "rnn"),
    "rmsprop_lr": (RMSPropLR, "rnn"),
}
LAYOUT = Layout({"a": (2, 3), "nothing": (0, 4), "b": (), "c": (5,)})


def keras_layout(weight: Tensor, key: str) -> Tensor:
    return weight.T if key.endswith("kernel") else weight


def put_golden_weights(policy: Policy, data: Any) -> list[str]:
    """Give a policy the golden weights; returns their keys."""
    keys = [key for key in data.files if key.startswith("weight.")]
    with torch.no_grad():
        for weight, key in zip(policy.weights(), keys, strict=True):
            weight.copy_(keras_layout(torch.from_numpy(data[key]), key))
    return keys


def check(policy: Policy, data: Any, begin: Any, keys: list[str]) -> Any:
    """Compare updates, loss and gradients with the golden ones; returns the final state."""
    grads = torch.from_numpy(data["grads"]).double().requires_grad_()
    state, updates = begin, []
    for grad in grads:
        update, state = policy.step(grad, state)
        updates.append(update)
    stacked = torch.stack(updates)
    close(stacked.detach(), data["updates"])
    terms = torch.from_numpy(data["loss_coefficients"]).double() * stacked
    loss = terms.sum()
    # As in test_student.py: a sum that may cancel is as exact as its terms are.
    close(loss.detach(), data["loss"], terms.abs().max().item())
    in_grads, *in_weights = torch.autograd.grad(loss, [grads, *policy.weights()])
    close_by_coordinate(in_grads, data["grad_of_loss.grads"])
    for index, (found, key) in enumerate(zip(in_weights, keys, strict=True)):
        close(keras_layout(found, key), data[f"grad_of_loss.weight.{index}"])
    return state


def check_finals(finals: dict[str, Tensor], data: Any) -> None:
    named = {f"final_state.{key}" for key in finals}
    assert named == {key for key in data.files if key.startswith("final_state.")}
    for key, ours in finals.items():
        close(ours.detach(), data[f"final_state.{key}"])


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_policies_match_the_authors(name: str) -> None:
    data = np.load(GOLDEN / f"{name}.npz")
    kind, prefix = RECURRENT[name]
    policy = kind().double()
    keys = put_golden_weights(policy, data)
    state = check(policy, data, policy.initial_state(torch.zeros(data["grads"].shape[1])), keys)
    finals = {key: getattr(state, key) for key in ("m", "v") if name != "deepmind"}
    for layer in range(2):
        finals[f"{prefix}_{layer}.0"] = state.h[layer].T
        finals[f"{prefix}_{layer}.1"] = state.c[layer].T
    check_finals(finals, data)


def test_the_hierarchical_policy_matches_the_authors() -> None:
    data = np.load(GOLDEN / "scale_hierarchical.npz")
    policy = ScaleHierarchical().double()
    keys = put_golden_weights(policy, data)
    eta = torch.from_numpy(data["eta_bar_init"]).double()
    state = check(policy, data, policy.initial_state(eta)._replace(eta=eta), keys)
    finals = {"param": state.h.T, "tensor": state.tensor.T, "eta_bar": state.eta}
    finals["eta_rel"] = state.eta_rel[:, None]
    for scale in range(4):
        finals |= {f"scaling.{scale}.0": state.m[scale], f"scaling.{scale}.1": state.v[scale]}
    check_finals(finals, data)


def made(kind: str) -> Policy:
    """A policy with weights that make every part of it count."""
    generator = torch.Generator().manual_seed(3)
    policy = POLICIES[kind]().double()
    with torch.no_grad():
        for weight in policy.weights():
            weight.copy_(0.5 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return policy


def leaves(state: Any) -> list[Tensor]:
    return [torch.as_tensor(leaf) for leaf in state]


@pytest.mark.parametrize("kind", POLICIES)
def test_policies_share_one_interface(kind: str) -> None:
    """A step leaves its arguments alone, is differentiable twice, and takes others' weights."""
    policy = made(kind)
    assert isinstance(policy, Policy)
    assert policy.kind == kind
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(LAYOUT.numel, generator=generator, dtype=torch.float64).requires_grad_()
    state = policy.initial_state(grad, LAYOUT)
    before = [leaf.clone() for leaf in leaves(state)]
    how: dict[str, Any] = {"layout": LAYOUT, "backend": "reference"}
    if policy.sees_params:
        how["params"] = torch.randn(LAYOUT.numel, generator=generator, dtype=torch.float64)
    update, state_1 = policy.step(grad, state, **how)
    update, _ = policy.step(grad * 2, state_1, **how)
    assert update.shape == grad.shape
    assert all(map(torch.equal, before, leaves(state)))
    assert type(state_1) is type(state)
    (first,) = torch.autograd.grad(update.square().sum(), grad, create_graph=True)
    second = torch.autograd.grad(first.square().sum(), policy.weights(), allow_unused=True)
    assert max(g.abs().max().item() for g in second if g is not None) > 0

    others = [weight.detach() * 1.5 for weight in policy.weights()]
    replaced, _ = policy.step(grad, state_1, others, **how)
    own, _ = policy.step(grad, state_1, **how)
    assert not torch.allclose(replaced, own)
    with torch.no_grad():
        for weight, other in zip(policy.weights(), others, strict=True):
            weight.copy_(other)
    same, _ = policy.step(grad, state_1, **how)
    assert torch.equal(replaced, same)


@pytest.mark.parametrize("kind", POLICIES)
def test_files_say_what_they_hold(kind: str, tmp_path: Path) -> None:
    policy = POLICIES[kind](generator=torch.Generator().manual_seed(1), provenance={"n": [1]})
    path = tmp_path / "policy.safetensors"
    policy.save(path)
    loaded = load_policy(path)
    assert type(loaded) is POLICIES[kind]
    assert (loaded.config, loaded.provenance) == (policy.config, {"n": [1]})
    assert all(map(torch.equal, loaded.weights(), policy.weights()))
    other = Student if kind != "student" else DM
    with pytest.raises(ValueError, match=f"must be an amalgam {other.kind}, but is .* {kind}"):
        other.load(path)


def test_files_that_hold_no_policy_are_refused(tmp_path: Path) -> None:
    weight_files.write(tmp_path / "it", "checkpoint", {"a": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="must hold one of .*'dm'.*, but is an amalgam checkpoint"):
        load_policy(tmp_path / "it")
    damaged = DM()
    with torch.no_grad():
        damaged.head.bias.fill_(float("nan"))
    damaged.save(tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match="not hold a usable dm: head.bias holds non-finite"):
        load_policy(tmp_path / "nan.safetensors")


@pytest.mark.parametrize("kind", ["rnnprop-ext", "adam-lr", "rmsprop-lr"])
def test_warm_up_moves_moments_alone(kind: str) -> None:
    policy, grad = made(kind), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    begin = policy.initial_state(grad)
    begin = begin._replace(m=begin.m + 1, v=begin.v + 1, h=begin.h + 3, c=begin.c + 4)
    warm = policy.warm_up(grad, begin)
    _, stepped = policy.step(grad, begin)
    assert torch.equal(warm.m, stepped.m)
    assert torch.equal(warm.v, stepped.v)
    assert torch.equal(warm.h, begin.h)
    assert torch.equal(warm.c, begin.c)


@pytest.mark.parametrize("kind", ["dm", "scale-hierarchical"])
def test_warm_up_moves_what_the_authors_do_not_mask(kind: str) -> None:
    policy = made(kind)
    grad = torch.linspace(-1, 1, LAYOUT.numel, dtype=torch.float64)
    begin = policy.initial_state(grad, LAYOUT)
    warm = policy.warm_up(grad, begin, layout=LAYOUT)
    _, stepped = policy.step(grad, begin, layout=LAYOUT)
    assert all(map(torch.equal, warm, stepped))
    assert not any(map(torch.equal, warm, begin))


def test_tensors_share_only_the_whole() -> None:
    """A step of two tensors equals a step of each alone, except in the GRU of the whole."""
    policy = made("scale-hierarchical")
    grad = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    layout = Layout({"a": (3,), "b": (2, 2)})
    together, state = policy.step(grad, policy.initial_state(grad, layout), layout=layout)
    tensor = []
    for part in (slice(0, 3), slice(3, 7)):
        alone, alone_state = policy.step(grad[part], policy.initial_state(grad[part]))
        assert torch.allclose(together[part], alone, rtol=1e-12)
        assert torch.allclose(state.eta_rel[part], alone_state.eta_rel, rtol=1e-12)
        tensor.append(alone_state.tensor)
        assert not torch.allclose(state.whole, alone_state.whole)
    assert torch.allclose(state.tensor, torch.cat(tensor, 1), rtol=1e-12)
    merged, _ = policy.step(grad, policy.initial_state(grad))
    later, _ = policy.step(grad, state, layout=layout)
    assert not torch.allclose(merged, later)


def test_layouts_must_fit() -> None:
    policy = ScaleHierarchical()
    grad = torch.ones(4)
    state = policy.initial_state(grad, Layout({"a": (2, 2)}))
    with pytest.raises(ValueError, match="as many coordinates as there are, 4, not 3"):
        policy.step(grad, state, layout=Layout({"a": (3,)}))
    with pytest.raises(ValueError, match="the 1 tensors that the state was made for, not 2"):
        policy.step(grad, state, layout=Layout({"a": (2,), "b": (2,)}))


@pytest.mark.parametrize("kind", ["dm", "rnnprop-ext", "adam-lr", "rmsprop-lr"])
def test_coordinates_are_alike(kind: str) -> None:
    policy = made(kind)
    assert policy.coordinatewise
    grad = torch.tensor([0.5, -1.0, 0.5], dtype=torch.float64)
    update, _ = policy.step(grad, policy.initial_state(grad))
    assert torch.allclose(update[0], update[2], rtol=1e-12)
    assert not torch.allclose(update[0], update[1])


@pytest.mark.parametrize("kind", ["rnnprop-ext", "scale-hierarchical"])
def test_fresh_heads_of_zero_do_not_move(kind: str) -> None:
    policy = POLICIES[kind](generator=torch.Generator().manual_seed(0))
    grad = torch.randn(5, generator=torch.Generator().manual_seed(0))
    update, _ = policy.step(grad, policy.initial_state(grad))
    assert torch.equal(update, torch.zeros(5))
    head = policy.head if kind == "rnnprop-ext" else policy.shortcut
    (in_head,) = torch.autograd.grad(update.sum(), head.weight)
    assert in_head.abs().max() > 0


def test_fresh_hierarchical_policies_decay_as_adam_does() -> None:
    policy = ScaleHierarchical(ScaleHierarchicalConfig(timescales=2)).double()
    grad = torch.ones(1, dtype=torch.float64)
    _, state = policy.step(grad, policy.initial_state(grad))
    decays = 1 - state.m[:, 0]
    assert decays.tolist() == pytest.approx([0.9, 0.9**0.5])
    assert (1 - state.v[:, 0]).tolist() == pytest.approx([0.999, 0.999**0.5])
    assert state.eta.exp().item() == pytest.approx(1e-3)


@pytest.mark.parametrize("kind", sorted(set(POLICIES) - {"student", "nominal", "choice"}))
def test_backends_without_a_kernel_are_refused(kind: str) -> None:
    policy, grad = POLICIES[kind](), torch.ones(2)
    state = policy.initial_state(grad)
    with pytest.raises(RuntimeError, match=f"backend='cpu' has no kernel for a {kind}; 'auto'"):
        policy.step(grad, state, backend="cpu")
    with pytest.raises(ValueError, match="backend must be one of"):
        policy.step(grad, state, backend="quantum")
    assert policy.step(grad, state, backend="auto:tf32")[0].shape == (2,)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("dm", "layers", 0),
        ("dm", "learning_rate", 0.0),
        ("rnnprop-ext", "learning_rate", float("inf")),
        ("rnnprop-ext", "beta1", 1.0),
        ("adam-lr", "alpha", -1.0),
        ("rmsprop-lr", "hidden", 0),
        ("scale-hierarchical", "timescales", 0),
        ("scale-hierarchical", "initial_lr", 0.0),
        ("scale-hierarchical", "lr_offset", -1e-3),
        ("scale-hierarchical", "warmup_steps", -1),
    ],
)
def test_config_errors_name_the_field(kind: str, field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be .*not {value}$"):
        POLICIES[kind].config_type(**{field: value})
