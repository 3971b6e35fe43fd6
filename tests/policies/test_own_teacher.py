"""Any object that steps as a teacher is one: in a pool, in a checkpoint, as an optimizer."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from own import Averaging
from safetensors.torch import load, save
from torch import Tensor, nn

from amalgam import PolicyOptimizer, Student, StudentConfig, Teacher, TeacherOptimizer, TorchTeacher
from amalgam.layout import Layout
from amalgam.meta import Amalgamation, Stage, Stages, Trainer, Training
from amalgam.optimizers import AmalgamatedOptimizer, optimizer_of_teacher
from amalgam.policies import DM, PolicyTeacher, Pool, state_from_tensors, state_tensors
from amalgam.seeding import generator_for
from amalgam.tasks import load as load_task

LAYOUT = Layout({"weight": (3, 4), "bias": (3,)})


def gradients(steps: int, k: int) -> Iterator[Tensor]:
    generator = generator_for(4)
    for _ in range(steps):
        yield torch.randn(k, LAYOUT.numel, generator=generator)


def run(pool: Pool, params: Tensor, state: Any, grads: Any) -> tuple[Tensor, Any]:
    for grad in grads:
        updates, state = pool.step(grad, state, params=params, layout=LAYOUT)
        params = params - updates
    return params, state


def test_it_steps_beside_the_others() -> None:
    teachers = [Averaging(), "adam", Averaging(0.02), TorchTeacher("torch.optim.SGD", lr=0.1)]
    pool, params = Pool(teachers), torch.ones(4, LAYOUT.numel)
    assert pool.names == ("averaging(0.1)", "adam", "averaging(0.02)", "SGD")
    assert not pool.coordinatewise
    together, _ = run(pool, params, pool.initial_state(params[0], LAYOUT), gradients(5, 4))
    for k, teacher in enumerate(teachers):
        own = params[k]
        state = Pool([teacher]).initial_state(own, LAYOUT)
        alone, _ = run(Pool([teacher]), own[None], state, (g[k : k + 1] for g in gradients(5, 4)))
        assert torch.equal(together[k], alone[0])
    expected, last = params[0], torch.zeros(LAYOUT.numel)
    for grad in gradients(5, 4):
        expected, last = expected - (0.05 * (last + grad[0]) + 0.01 * expected), grad[0]
    assert torch.allclose(together[0], expected)


def test_its_state_comes_back_from_a_file_as_it_was() -> None:
    pool, params = Pool(["sgd", Averaging()]), torch.ones(2, LAYOUT.numel)
    grads = list(gradients(6, 2))
    begin = pool.initial_state(params[0])
    straight, straight_state = run(pool, params, begin, grads)
    middle, state = run(pool, params, begin, grads[:3])
    stored = state_from_tensors(load(save(state_tensors(state))))
    (ours,), (theirs,) = state.others, stored.others
    assert all(map(torch.equal, ours["last"], theirs["last"]))
    assert (type(theirs["last"]), type(theirs["counts"])) == (list, tuple)
    assert (ours["counts"], ours["name"], ours["none"]) == (theirs["counts"], "it", None)
    resumed, resumed_state = run(pool, middle, stored, grads[3:])
    assert torch.equal(straight, resumed)
    assert straight_state.others[0]["counts"] == resumed_state.others[0]["counts"]


def test_no_gradient_reaches_its_updates() -> None:
    pool, params = Pool([Averaging()]), torch.ones(1, LAYOUT.numel, requires_grad=True)
    (grads,) = gradients(1, 1)
    state = pool.initial_state(params[0])
    updates, _ = pool.step(grads.requires_grad_(), state, params=params, layout=LAYOUT)
    assert not updates.requires_grad


def test_warm_up_and_rest_are_its_own() -> None:
    pool, params = Pool([Averaging(), Averaging(0.2)]), torch.ones(2, LAYOUT.numel)
    begin = pool.initial_state(params[0])
    (grads,) = gradients(1, 2)
    warm = pool.warm_up(grads, begin, params=params, layout=LAYOUT)
    _, stepped = pool.step(grads, begin, params=params, layout=LAYOUT)
    assert warm.others[0]["counts"] == stepped.others[0]["counts"]
    assert warm.others[0]["counts"][0] == 1
    kept = pool.keep(torch.tensor([False, True]), stepped, begin)
    assert kept.others == (begin.others[0], stepped.others[1])


class Killed(Exception):
    pass


def test_a_run_with_it_resumes_to_the_same_bits(tmp_path: Path) -> None:
    student = StudentConfig(layers=1, hidden=3, warmup_steps=1)

    def made(folder: str) -> Trainer:
        return Trainer(
            Student(student, generator=generator_for(5)),
            load_task("digits-mlp", 16),
            Pool(["adam", Averaging()]),
            folder=tmp_path / folder,
            amalgamation=Amalgamation(backend="reference"),
            training=Training(validate_every=9, validation_steps=2, checkpoint_every=1),
            strategy=Stages((Stage(1, 3, 0.1),), unroll=3),
            device="cpu",
        )

    def kill(row: dict[str, Any]) -> None:
        if row["meta_step"] == 2:
            raise Killed

    whole = made("whole").run()
    with pytest.raises(Killed):
        made("cut").run(report=kill)
    resumed = made("cut").run(resume=True)
    assert all(map(torch.equal, whole.weights(), resumed.weights()))


def tensors(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = generator_for(6)
    return [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((2, 3), ())
    ]


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for index, p in enumerate(params):
            generator = generator_for(10 * step + index)
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def flat(params: list[nn.Parameter]) -> Tensor:
    return torch.cat([p.detach().flatten() for p in params])


def test_it_is_an_optimizer() -> None:
    params = tensors()
    optimizer = TeacherOptimizer(params, Averaging())
    expected, last = flat(params), torch.zeros(7, dtype=torch.float64)
    for step, lr in enumerate((0.1, 0.1, 0.0, 0.5)):
        optimizer.param_groups[0]["lr"] = lr
        train(optimizer, params, range(step, step + 1))
        grad = torch.cat([p.grad.flatten() for p in params])
        expected, last = expected - (0.5 * lr * (last + grad) + 0.01 * expected), grad
        assert torch.allclose(flat(params), expected)


def test_without_a_rate_the_groups_lr_multiplies_its_updates() -> None:
    ours, theirs = tensors(), tensors()
    first, second = (
        TeacherOptimizer(ours, Averaging(None)),
        TeacherOptimizer(theirs, Averaging(1.0)),
    )
    assert first.param_groups[0]["lr"] == 1
    train(first, ours, range(2))
    train(second, theirs, range(2))
    assert torch.equal(flat(ours), flat(theirs))
    before = flat(ours)
    for optimizer, params in ((first, ours), (second, theirs)):
        optimizer.param_groups[0]["lr"] = 0.25 if optimizer is first else 1.0
        train(optimizer, params, range(2, 3))
    assert torch.allclose(before - flat(ours), 0.25 * (before - flat(theirs)), rtol=1e-12)


@pytest.mark.parametrize("teacher", ["adam", Averaging(), TorchTeacher("torch.optim.NAdam")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_optimizers_resume_to_the_same_bits(teacher: Any, dtype: torch.dtype) -> None:
    straight, params = tensors(dtype), tensors(dtype)
    train(TeacherOptimizer(straight, teacher), straight, range(5))
    first = TeacherOptimizer(params, teacher)
    train(first, params, range(3))
    stored = first.state_dict()
    resumed = TeacherOptimizer(params, teacher)
    resumed.load_state_dict(stored)
    before = str(stored)
    train(resumed, params, range(3, 5))
    assert torch.equal(flat(params), flat(straight))
    assert str(stored) == before


def test_a_scheduler_may_bring_an_analytical_teacher_to_rest() -> None:
    params = tensors()
    optimizer = TeacherOptimizer(params, "adam")
    before = flat(params)
    optimizer.param_groups[0]["lr"] = 0.0
    train(optimizer, params, range(1))
    assert torch.equal(flat(params), before)
    assert Teacher("adam", 0.005).at(0.3) == Teacher("adam", 0.3)


def test_optimizer_states_of_earlier_versions_are_refused() -> None:
    params = tensors()
    optimizer = TeacherOptimizer(params, "adam")
    train(optimizer, params, range(1))
    state = optimizer.state_dict()
    state["state"] = {index: entry["teacher"] for index, entry in state["state"].items()}
    with pytest.raises(ValueError, match="as 'teacher', but is of an earlier version of amalgam"):
        optimizer.load_state_dict(state)


def test_policies_that_teach_have_the_policys_optimizer() -> None:
    student, params = Student(StudentConfig(layers=1, hidden=3)), tensors()
    assert isinstance(optimizer_of_teacher(params, PolicyTeacher(student)), AmalgamatedOptimizer)
    assert isinstance(optimizer_of_teacher(params, PolicyTeacher(DM())), PolicyOptimizer)
    assert isinstance(optimizer_of_teacher(params, Averaging()), TeacherOptimizer)
    assert isinstance(optimizer_of_teacher(params, Teacher("sgd")), TeacherOptimizer)
    with pytest.raises(ValueError, match=r"no policy, as PolicyTeacher\(dm .* is; PolicyOptimizer"):
        TeacherOptimizer(params, PolicyTeacher(DM()))
    with pytest.raises(ValueError, match=r"lr can't be set to 0.1: PolicyTeacher\(dm"):
        PolicyTeacher(DM()).at(0.1)


class Nameless(Averaging):
    __repr__ = object.__repr__


class Pair(NamedTuple):
    m: Tensor


@dataclass(frozen=True)
class Odd(Averaging):
    state: Any = None

    def initial_state(self, like: Tensor, layout: Any = None) -> Any:
        return self.state


def test_what_is_no_teacher_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"teachers\[1\] must be a kind or a teacher .*5, which lac"
    ):
        Pool(["adam", 5])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"teachers\[0\] must say in its repr\(\) .* give Nameless"):
        Pool([Nameless()])


@pytest.mark.parametrize(
    ("state", "held"),
    [(Pair(torch.zeros(1)), "Pair"), ({1: 2}, "dict"), ([{"a": {3}}], "set")],
)
def test_states_that_no_file_could_hold_are_refused(state: Any, held: str) -> None:
    with pytest.raises(TypeError, match=rf"^Odd\(.*a state must be a nest.* but holds a {held}$"):
        Pool([Odd(state=state)]).initial_state(torch.zeros(2))


class Short(Averaging):
    def step(self, *arguments: Any) -> Any:
        update, state = super().step(*arguments)
        return update[:-1], state


def test_updates_of_another_shape_are_refused() -> None:
    pool, params = Pool([Short()]), torch.ones(1, LAYOUT.numel)
    with pytest.raises(ValueError, match=r"update of Short\(.* gradient, \(15,\), not \(14,\)"):
        run(pool, params, pool.initial_state(params[0]), gradients(1, 1))
