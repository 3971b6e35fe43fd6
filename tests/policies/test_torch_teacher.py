"""Torch's optimizers as teachers reach the parameters that they reach on a module."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from amalgam.layout import Layout
from amalgam.policies import (
    Pool,
    PoolState,
    Teacher,
    TorchTeacher,
    state_from_tensors,
    state_tensors,
)

SHAPES = {"weight": (3, 4), "bias": (3,), "scalar": (), "kernel": (2, 1, 2, 2)}
LAYOUT = Layout(SHAPES)
MUON = TorchTeacher(
    torch.optim.Muon, lr=0.05, others=(torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.3})
)
TEACHERS = {
    "adam": TorchTeacher(torch.optim.Adam, lr=0.01),
    "adamw": TorchTeacher("torch.optim.AdamW", {"lr": 0.02, "betas": [0.8, 0.9]}),
    "sgd": TorchTeacher(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "nadam": TorchTeacher(torch.optim.NAdam, lr=0.01),
    "adafactor": TorchTeacher(torch.optim.Adafactor, lr=0.01),
    "rprop": TorchTeacher(torch.optim.Rprop, lr=0.01),
    "asgd": TorchTeacher(torch.optim.ASGD, lr=0.01),
    "muon": MUON,
}


class Counting(torch.optim.Optimizer):
    """Keeps numbers of every type, in its state and in its group, as some optimizers do."""

    def __init__(self, params: Any, lr: float = 1.0) -> None:
        super().__init__(params, {"lr": lr, "k": 0, "mean": 0.0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["k"] += 1
            group["mean"] = group["mean"] * 0.5 + 1 / 3
            for p in group["params"]:
                state = self.state[p]
                state["count"] = state.get("count", 0) + 2
                state["rate"] = state.get("rate", 0.1) * 1.1
                state["seen"], state["none"] = True, None
                with torch.no_grad():
                    p -= group["lr"] * state["rate"] * group["mean"] * p.grad / state["count"]


class Listing(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float = 1.0) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            self.state[p]["history"] = [p.clone()]


class Simple(torch.optim.Optimizer):
    """Gradient descent, of which subclasses spoil something."""

    def __init__(self, params: Any, lr: Any = 1.0) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p -= 0.1 * p.grad


class NoRate(Simple):
    def __init__(self, params: Any) -> None:
        torch.optim.Optimizer.__init__(self, params, {"rate": 1.0})


class Raising(Simple):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise KeyError("momentum")


class OneGroupEach(Simple):
    def __init__(self, params: Any, lr: float = 1.0) -> None:
        super().__init__([{"params": [p]} for p in params], lr)
        self.add_param_group({"params": [torch.zeros(1)]})


class Elsewhere(Simple):
    """Keeps its momentum in an attribute, which no teacher knows of."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps = getattr(self, "steps", 0) + 1
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p -= 0.1 * p.grad * self.steps


class Drawing(Simple):
    """Langevin's dynamics."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p -= 0.1 * p.grad + 0.01 * torch.randn_like(p)


def gradients(steps: int, k: int = 1, seed: int = 0) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randn(k, LAYOUT.numel, generator=generator, dtype=torch.float64)


def start(k: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(99)
    return torch.randn(k, LAYOUT.numel, generator=generator, dtype=torch.float64)


def run(pool: Pool, params: Tensor, state: Any, grads: Iterator[Tensor]) -> tuple[Tensor, Any]:
    for grad in grads:
        updates, state = pool.step(grad, state, params=params, layout=LAYOUT)
        params = params - updates
    return params, state


def optimizers(name: str, params: dict[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    everything = list(params.values())
    if name == "muon":
        return [
            torch.optim.Muon([params["weight"]], lr=0.05),
            torch.optim.AdamW(everything[1:], lr=0.01, weight_decay=0.3),
        ]
    made = {
        "adam": lambda: torch.optim.Adam(everything, lr=0.01),
        "adamw": lambda: torch.optim.AdamW(everything, lr=0.02, betas=(0.8, 0.9)),
        "sgd": lambda: torch.optim.SGD(everything, lr=0.1, momentum=0.9, nesterov=True),
        "nadam": lambda: torch.optim.NAdam(everything, lr=0.01),
        "adafactor": lambda: torch.optim.Adafactor(everything, lr=0.01),
        "rprop": lambda: torch.optim.Rprop(everything, lr=0.01),
        "asgd": lambda: torch.optim.ASGD(everything, lr=0.01),
        "counting": lambda: Counting(everything),
    }
    return [made[name]()]


@pytest.mark.parametrize("name", [*TEACHERS, "counting"])
def test_trajectory_is_the_optimizers_own(name: str) -> None:
    pool = Pool([TEACHERS.get(name) or TorchTeacher(Counting)])
    params = start()
    theirs = {n: nn.Parameter(p.clone()) for n, p in LAYOUT.unflatten(params[0]).items()}
    direct = optimizers(name, theirs)
    before, state = params.clone(), pool.initial_state(params[0])
    for grad in gradients(8):
        updates, state = pool.step(grad, state, params=params, layout=LAYOUT)
        assert not updates.requires_grad
        params = params - updates
        for tensor, part in zip(theirs.values(), LAYOUT.unflatten(grad[0]).values(), strict=True):
            tensor.grad = part.clone()
        for optimizer in direct:
            optimizer.step()
    assert torch.allclose(params[0], LAYOUT.flatten(theirs), rtol=1e-12, atol=1e-14)
    assert (params - before).abs().min() > 0


@pytest.mark.parametrize("name", [*TEACHERS, "counting"])
def test_resumed_pools_go_on_to_the_same_bits(name: str) -> None:
    teacher = TEACHERS.get(name) or TorchTeacher(Counting)
    pool = Pool(["adam", teacher, MUON])
    grads = list(gradients(8, k=3))
    params = start(3)
    straight, straight_state = run(pool, params, pool.initial_state(params[0]), iter(grads))
    middle, state = run(pool, params, pool.initial_state(params[0]), iter(grads[:5]))
    stored = load(save(state_tensors(state)))
    resumed, resumed_state = run(pool, middle, state_from_tensors(stored), iter(grads[5:]))
    assert torch.equal(straight, resumed)
    ours, theirs = state_tensors(straight_state), state_tensors(resumed_state)
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert ours[key].dtype == theirs[key].dtype
        assert torch.equal(ours[key], theirs[key])


def test_a_state_comes_back_as_it_was() -> None:
    pool = Pool([TorchTeacher(Counting)])
    _, state = run(pool, start(), pool.initial_state(start()[0]), gradients(2))
    (carried,) = state_from_tensors(state_tensors(state)).others
    assert carried == state.others[0]
    types = {key: type(value) for key, value in carried.items() if key[0] in "0g"}
    assert types == {
        "0/count": int,
        "0/rate": float,
        "0/seen": bool,
        "0/none": type(None),
        "group0/k": int,
        "group0/mean": float,
    }


def test_analytical_states_keep_their_form() -> None:
    pool = Pool(["adam"])
    state = pool.initial_state(torch.zeros(3))
    assert isinstance(state, PoolState)
    again = state_from_tensors(state_tensors(state))
    assert isinstance(again, PoolState)
    assert state_tensors(state).keys() == {"m", "v"}
    with pytest.raises(KeyError, match="v"):
        state_from_tensors({"m": state.m})


def test_states_of_earlier_versions_are_refused() -> None:
    state = Pool(["adam"]).initial_state(torch.zeros(3))
    old = {**state_tensors(state), "torch": torch.tensor(1), "torch.0.0/step:int": torch.tensor(2)}
    with pytest.raises(ValueError, match="earlier version of amalgam.*begin the run anew"):
        state_from_tensors(old)


def test_a_mixed_pool_is_its_teachers_side_by_side() -> None:
    teachers = [TEACHERS["adamw"], "momentum", MUON, Teacher("adam", 0.02), "sgd"]
    pool, grads, params = Pool(teachers), list(gradients(4, k=5)), start(5)
    together, state = run(pool, params, pool.initial_state(params[0]), iter(grads))
    assert isinstance(state, PoolState)
    assert len(state.m) == 3
    assert len(state.others) == 2
    for k, teacher in enumerate(teachers):
        alone = Pool([teacher])
        row = slice(k, k + 1)
        own, _ = run(alone, params[row], alone.initial_state(params[0]), (g[row] for g in grads))
        assert torch.equal(together[row], own)


def test_steps_leave_their_arguments_alone() -> None:
    pool = Pool([MUON, TEACHERS["sgd"]])
    params, state = run(pool, start(2), pool.initial_state(start()[0]), gradients(2, k=2))
    (grads,) = gradients(1, k=2, seed=5)
    before = {key: t.clone() for key, t in state_tensors(state).items()}
    kept = params.clone(), grads.clone()
    first, _ = pool.step(grads, state, params=params, layout=LAYOUT)
    second, _ = pool.step(grads, state, params=params, layout=LAYOUT)
    assert torch.equal(first, second)
    assert all(torch.equal(before[key], t) for key, t in state_tensors(state).items())
    assert torch.equal(kept[0], params)
    assert torch.equal(kept[1], grads)


def test_steps_work_without_gradient_mode() -> None:
    pool, (grads,) = Pool([MUON]), gradients(1)
    params = start()
    with torch.no_grad():
        quiet, _ = pool.step(grads, pool.initial_state(grads[0]), params=params, layout=LAYOUT)
        assert not torch.is_grad_enabled()
    loud, _ = pool.step(
        grads.requires_grad_(), pool.initial_state(grads[0]), params=params, layout=LAYOUT
    )
    assert torch.equal(quiet, loud)


def test_warm_up_moves_the_state_and_not_the_parameters() -> None:
    """Warm-up leaves Adam's moments as two steps with the same gradients do."""
    pool, params = Pool([TEACHERS["adam"], "sgd"]), start(2)
    state = pool.initial_state(params[0])
    kept = params.clone()
    for grads in gradients(2, k=2):
        state = pool.warm_up(grads, state, params=params, layout=LAYOUT)
    assert torch.equal(params, kept)
    m = torch.zeros(LAYOUT.numel, dtype=torch.float64)
    for grads in gradients(2, k=2):
        m = 0.9 * m + 0.1 * grads[0]
    found = torch.cat([state.others[0][f"{i}/exp_avg"].flatten() for i in range(len(SHAPES))])
    assert torch.allclose(found, m, rtol=1e-12)
    assert state.others[0]["0/step"] == 2


def test_teachers_that_did_not_move_keep_their_state() -> None:
    pool, params = Pool(["adam", MUON, TEACHERS["sgd"], "rmsprop"]), start(4)
    old = pool.initial_state(params[0])
    (grads,) = gradients(1, k=4)
    _, new = pool.step(grads, old, params=params, layout=LAYOUT)
    kept = pool.keep(torch.tensor([True, False, True, False]), new, old)
    assert torch.equal(kept.m, torch.stack((new.m[0], old.m[1])))
    assert torch.equal(kept.v, torch.stack((new.v[0], old.v[1])))
    assert kept.others == (old.others[0], new.others[1])
    plain = Pool(["adam", "sgd"])
    old, new = PoolState(start(2), start(2)), PoolState(start(2) + 1, start(2) + 2)
    kept = plain.keep(torch.tensor([False, True]), new, old)
    assert isinstance(kept, PoolState)
    assert torch.equal(kept.m, torch.stack((old.m[0], new.m[1])))


def test_identity() -> None:
    by_class = TorchTeacher(torch.optim.Muon, lr=0.05, ns_coefficients=(3.0, -4.0, 2.0))
    by_name = TorchTeacher("torch.optim.Muon", {"lr": 0.05, "ns_coefficients": [3.0, -4.0, 2.0]})
    assert by_class == by_name
    assert len({by_class, by_name}) == 1
    assert by_class != TorchTeacher("torch.optim.Muon", lr=0.06)
    assert by_class != Teacher("adam")
    assert repr(MUON) == (
        "TorchTeacher(torch.optim.Muon(lr=0.05), others=torch.optim.AdamW(lr=0.01, "
        "weight_decay=0.3))"
    )
    assert (MUON.kind, MUON.lr) == ("Muon", 0.05)
    assert TorchTeacher("torch.optim.Adam").lr == 1e-3
    pool = Pool([TEACHERS["adam"], TorchTeacher("torch.optim.Adam", lr=1e-4), "adam"])
    assert pool.names == ("Adam(0.01)", "Adam(0.0001)", "adam")


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("torch.optim.Moon", "class that can be imported"),
        ("Adam", "class that can be imported"),
        ("no.such.module.Adam", "class that can be imported"),
        ("torch.nn.Linear", "must be a torch.optim.Optimizer, which 'torch.nn.Linear' is not"),
        ("torch.optim.lr_scheduler", "must be a torch.optim.Optimizer"),
    ],
)
def test_what_is_no_optimizer_is_refused(path: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        TorchTeacher(path)


def test_arguments_that_do_not_fit_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"torch.optim.Adam\(rate=0.1\) can't be made"):
        TorchTeacher("torch.optim.Adam", rate=0.1)
    with pytest.raises(ValueError, match=r"AdamW\(lr=-1.0\) can't be made"):
        TorchTeacher("torch.optim.Muon", others=("torch.optim.AdamW", {"lr": -1.0}))


@pytest.mark.parametrize("path", ["torch.optim.LBFGS", "torch.optim.SparseAdam"])
def test_steps_that_need_more_than_a_gradient_are_refused_at_once(path: str) -> None:
    with pytest.raises(ValueError, match=f"{path} can't be a teacher: its step.. must take dense"):
        TorchTeacher(path)


def test_tensors_that_nobody_takes_are_named() -> None:
    pool, (grads,) = Pool([TorchTeacher(torch.optim.Muon)]), gradients(1)
    with pytest.raises(ValueError, match=r"Muon refuses a tensor of shape \(3,\).*others="):
        pool.step(grads, pool.initial_state(grads[0]), params=start(), layout=LAYOUT)
    with pytest.raises(ValueError, match=r"Muon refuses a tensor of shape \(3,\).*others="):
        pool.initial_state(grads[0], LAYOUT)
    assert MUON.routes(LAYOUT, grads) == ((0,), (1, 2, 3))


def test_what_a_step_needs_is_named() -> None:
    pool, (grads,) = Pool([MUON]), gradients(1)
    state = pool.initial_state(grads[0])
    with pytest.raises(ValueError, match=r"params must be given: TorchTeacher\(torch.optim.Muon"):
        pool.step(grads, state, layout=LAYOUT)
    with pytest.raises(ValueError, match="layout must be given"):
        pool.step(grads, state, params=start())
    with pytest.raises(ValueError, match=r"params must have the shape of grads, \(1, 24\), not"):
        pool.step(grads, state, params=start(2), layout=LAYOUT)
    with pytest.raises(ValueError, match="as many coordinates as grads, 24, not 2"):
        pool.step(grads, state, params=start(), layout=Layout({"w": (2,)}))


def test_states_that_no_file_could_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="Listing can't be a teacher: its state's 'history' is a"):
        TorchTeacher(Listing)


@pytest.mark.parametrize(
    ("optimizer", "arguments", "need"),
    [
        (NoRate, {}, "its group must have a number 'lr'"),
        (Simple, {"lr": None}, "its group must have a number 'lr'"),
        (Raising, {}, "dense gradients and no closure, but failed with KeyError: 'momentum'"),
        (OneGroupEach, {}, "the tensors that it is given in one group, not in 2"),
        (Elsewhere, {}, "it must keep no numbers elsewhere"),
    ],
)
@pytest.mark.parametrize("as_others", [False, True])
def test_what_an_optimizer_needs_is_said_when_the_teacher_is_made(
    optimizer: type, arguments: dict[str, Any], need: str, as_others: bool
) -> None:
    others = (optimizer, arguments) if as_others else None
    first, own = (torch.optim.Muon, {}) if as_others else (optimizer, arguments)
    with pytest.raises(ValueError, match=f"{optimizer.__name__} can't be a teacher: .*{need}"):
        TorchTeacher(first, own, others=others)


def test_trying_out_leaves_torchs_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    TorchTeacher(Drawing)
    assert torch.equal(torch.get_rng_state(), before)


def test_at_changes_the_rates_alone() -> None:
    other = MUON.at(0.1)
    assert (other.lr, MUON.lr) == (0.1, 0.05)
    assert other == TorchTeacher(
        torch.optim.Muon, lr=0.1, others=(torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.3})
    )
