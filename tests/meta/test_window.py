"""Meta-gradients of the unroll engine, whatever it keeps, against plain autograd."""

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amalgam.meta import Amalgamation, Memory, Unroll
from amalgam.meta.conditions import Drawn, StepConditions
from amalgam.meta.reference import window as naive_window
from amalgam.policies import Pool, Student, StudentConfig
from amalgam.seeding import generator_for
from amalgam.tasks import Task

POOL = Pool(["adam", "rmsprop", "sgd"])
STEPS = 8


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.Conv2d(1, 2, 2)
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.max_pool2d(self.kernels(x).relu(), 2).flatten(1))


@functools.cache
def task_of(kind: type[nn.Module], dtype: torch.dtype = torch.float64) -> Task:
    generator = torch.Generator().manual_seed(1)
    shape = (40, 3) if kind is Net else (40, 1, 3, 3)
    x = torch.randn(shape, generator=generator).to(dtype)
    y = torch.randint(2, (40,), generator=generator)
    return Task("net", lambda: kind().to(dtype), (x, y), (x, y), batch_size=8)


def students(count: int, dtype: torch.dtype = torch.float64) -> list[Student]:
    config = StudentConfig(hidden=5, warmup_steps=2)
    return [
        Student(config, generator=torch.Generator().manual_seed(2 + s)).to(dtype)
        for s in range(count)
    ]


def episode(unroll: Unroll, steps: int = STEPS) -> tuple[Any, list[Any]]:
    """The second window of an episode, where teachers are apart, on batches of each row's own."""
    rows = range(unroll.rows)
    begin = unroll.begin(*(generator_for(row, "episode") for row in rows))
    by_row = [unroll.task.batches(generator_for(row, "batches"), steps + 3) for row in rows]
    batches = [
        tuple(torch.stack(parts) for parts in zip(*step, strict=True))
        for step in zip(*by_row, strict=True)
    ]
    with torch.no_grad():
        return unroll.window(begin, batches[:3]).end, batches[3:]


def row_of(begin: Any, batches: list[Any], row: int) -> tuple[Any, list[Any]]:
    """One row's share of trajectories and batches, as an engine of its own has them."""
    rows = len(begin.params)

    def part(tensor: Tensor) -> Tensor:
        width = tensor.shape[-1] // rows
        return tensor[..., row * width : row * width + width]

    only = begin._replace(
        scale=begin.scale[row : row + 1],
        params=begin.params[row : row + 1],
        state=type(begin.state)(*map(part, begin.state)),
        teacher_params=begin.teacher_params[:, row : row + 1],
        teacher_state=tuple(s._replace(m=part(s.m), v=part(s.v)) for s in begin.teacher_state),
    )
    return only, [tuple(t[row : row + 1] for t in batch) for batch in batches]


def gradients_of(loss: Tensor, weights: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [w for of in weights for w in of]))


def assert_same(ours: list[Tensor], theirs: list[Tensor], rel: float) -> None:
    for our, their in zip(ours, theirs, strict=True):
        assert (our - their).abs().max() <= rel * their.abs().max()


def memories(row_bytes: int, rows: int = 1) -> dict[str, Memory]:
    """Every way to plan: all that is free, segments by hand, and room for so many points.

    Args:
        row_bytes: Of one number a coordinate.
        rows: Rows.
    """
    record, point = 2 * STEPS * row_bytes * rows, (3 + 4 * 5) * row_bytes * rows
    return {
        "free": Memory(),
        **{f"segment {length}": Memory(segment=length) for length in (1, 3, 7, STEPS)},
        **{f"points {n}": Memory(budget=record + (3 + n) * point) for n in (1, 2, 4)},
    }


ROW_BYTES = {Net: 8 * 26, Convolutional: 8 * 16}


STACKS = [(1, 1), (1, 3), (2, 2)]


@pytest.mark.parametrize(
    ("second_order", "plan", "perturbed", "backend"),
    [
        *((True, plan, plan == "segment 3", "cpu") for plan in memories(1)),
        (True, "segment 3", False, "reference"),
        (False, "free", False, "cpu"),
        (False, "free", True, "reference"),
    ],
)
@pytest.mark.parametrize(("replicates", "optimizees"), STACKS)
def test_meta_gradient_is_autograds(
    second_order: bool,
    replicates: int,
    optimizees: int,
    perturbed: bool,
    plan: str,
    backend: str,
) -> None:
    memory = memories(ROW_BYTES[Net], replicates * optimizees)[plan]
    learners = students(replicates)
    how = Amalgamation(second_order=second_order, scale_spread=1.0, backend=backend)
    unroll = Unroll(task_of(Net), learners, POOL, how, memory=memory, optimizees=optimizees)
    begin, batches = episode(unroll)
    weights = [
        [w.detach() + 0.01 * perturbed * w.norm() for w in learner.weights()]
        for learner in learners
    ]
    for w in (w for of in weights for w in of):
        w.requires_grad_()
    window = unroll.window(begin, batches, weights)
    ours = gradients_of((window.meta_loss + 0.3 * window.imitation_loss).sum(), weights)

    total = torch.zeros((), dtype=torch.float64)
    for row in range(unroll.rows):
        s = row // optimizees
        meta, imitation, params = naive_window(
            unroll.task, learners[s], POOL, how, begin, batches, [weights[s]] * STEPS, row
        )
        total = total + (meta + 0.3 * imitation) / optimizees
        assert torch.allclose(params, window.end.params[row], rtol=1e-12, atol=1e-14)
    assert (window.meta_loss + 0.3 * window.imitation_loss).sum().item() == pytest.approx(
        total.item(), rel=1e-11
    )
    assert_same(ours, gradients_of(total, weights), 1e-9)


def conditions_of(rows: int, dtype: torch.dtype = torch.float64) -> StepConditions:
    """The second of three windows: every row has another rate, decay, schedule and scale."""
    drawn = [
        Drawn(0.02, 1.3, "cosine", 100.0),
        Drawn(0.1, 0.7, "linear", 0.01),
        Drawn(0.0, 2.0, "cosine", 3.0),
        Drawn(0.3, 1.0, "constant", 1.0),
    ]
    return StepConditions.of(drawn[:rows], STEPS, STEPS, 3 * STEPS, torch.zeros((), dtype=dtype))


@pytest.mark.parametrize(
    ("second_order", "noisy", "backend"),
    [
        (True, False, "cpu"),
        (True, False, "reference"),
        (False, False, "cpu"),
        (False, False, "reference"),
        (False, True, "cpu"),
    ],
    ids=str,
)
@pytest.mark.parametrize(("replicates", "optimizees"), [(1, 1), (2, 2)])
def test_conditions_are_differentiated(
    second_order: bool, noisy: bool, backend: str, replicates: int, optimizees: int
) -> None:
    """By steps and, in first order without noise, coordinate by coordinate."""
    learners = students(replicates)
    how = Amalgamation(second_order=second_order, scale_spread=1.0, backend=backend)
    unroll = Unroll(
        task_of(Net), learners, POOL, how, memory=Memory(segment=3), optimizees=optimizees
    )
    begin, batches = episode(unroll)
    conditions = conditions_of(unroll.rows)
    weights = [learner.weights() for learner in learners]
    nothing = [[torch.zeros_like(w) for w in ours] for ours in weights]
    noise = (lambda t: nothing) if noisy else None
    window = unroll.window(begin, batches, noise=noise, conditions=conditions)
    ours = gradients_of((window.meta_loss + 0.3 * window.imitation_loss).sum(), weights)
    total = torch.zeros((), dtype=torch.float64)
    for row in range(unroll.rows):
        s = row // optimizees
        meta, imitation, params = naive_window(
            unroll.task, learners[s], POOL, how, begin, batches, [weights[s]] * STEPS, row,
            conditions,
        )  # fmt: skip
        total = total + (meta + 0.3 * imitation) / optimizees
        assert torch.allclose(params, window.end.params[row], rtol=1e-12, atol=1e-14)
    assert_same(ours, gradients_of(total, weights), 1e-9)
    plain = unroll.window(begin, batches)
    assert not torch.allclose(plain.end.params, window.end.params)
    assert torch.equal(plain.end.teacher_params, window.end.teacher_params)
    assert torch.equal(plain.losses[0], window.losses[0])


def test_conditions_without_effect_leave_the_meta_gradient() -> None:
    for second_order in (True, False):
        (learner,) = students(1)
        how = Amalgamation(second_order=second_order, scale_spread=1.0)
        unroll = Unroll(task_of(Net), learner, POOL, how)
        begin, batches = episode(unroll)
        nothing = StepConditions.of(
            [Drawn(0.0, 1.0, "constant", 1.0)], 0, STEPS, STEPS, begin.params
        )
        plain, same = (
            gradients_of(
                unroll.window(begin, batches, conditions=conditions).meta_loss,
                [learner.weights()],
            )
            for conditions in (None, nothing)
        )
        assert all(map(torch.equal, plain, same))


def test_a_row_that_stands_still_does_not_decay() -> None:
    """A step that is not taken leaves the parameters, and passes all of their adjoint on."""
    (learner,) = students(1)
    how = Amalgamation(second_order=False, scale_spread=1.0)
    unroll = Unroll(task_of(Net), learner, POOL, how, memory=Memory(segment=3))
    begin, batches = episode(unroll)
    for at in (0, 3):
        batches[at] = (batches[at][0] * math.nan, batches[at][1])
    conditions = conditions_of(2)
    conditions = StepConditions(*(part[..., 1:] for part in conditions))
    weights = learner.weights()
    nothing = [[torch.zeros_like(w) for w in weights]]
    found = []
    for noise in (None, lambda t: nothing):  # by coordinates, and by steps
        window = unroll.window(begin, batches, noise=noise, conditions=conditions)
        assert window.skipped[0, 0] == 2
        found.append(gradients_of(window.meta_loss.sum(), [weights]))
    assert_same(*found, 1e-11)
    # Without the steps that were not taken, and as many steps in the mean.
    taken = [t for t in range(STEPS) if t not in (0, 3)]
    fewer = conditions._replace(
        lr=conditions.lr[taken], kept=conditions.kept[taken], left=conditions.left[taken]
    )
    other = unroll.window(begin, [batches[t] for t in taken], conditions=fewer)
    assert torch.equal(window.end.params, other.end.params)
    share = len(taken) / STEPS
    theirs = gradients_of(share * other.meta_loss.sum(), [weights])
    assert_same(found[0], theirs, 1e-9)


@pytest.mark.parametrize("second_order", [True, False])
def test_weights_may_be_perturbed_anew_at_every_step(second_order: bool) -> None:
    (learner,) = students(1)
    how = Amalgamation(second_order=second_order, scale_spread=1.0)
    unroll = Unroll(task_of(Net), learner, POOL, how, memory=Memory(segment=3))
    begin, batches = episode(unroll)
    weights = learner.weights()

    def noise(t: int) -> list[list[Tensor]]:
        generator = generator_for(7, "noise", t)
        return [[0.02 * torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights]]

    window = unroll.window(begin, batches, noise=noise)
    ours = gradients_of((window.meta_loss + window.imitation_loss).sum(), [weights])
    noisy = [[w + z for w, z in zip(weights, noise(t)[0], strict=True)] for t in range(STEPS)]
    meta, imitation, _ = naive_window(unroll.task, learner, POOL, how, begin, batches, noisy)
    assert_same(ours, gradients_of(meta + imitation, [weights]), 1e-9)


@pytest.mark.parametrize(
    "variant",
    [
        {"mechanism": "mean"},
        {"log_objective": False},
        {"log_objective": False, "normaliser": "every-batch", "mechanism": "mean"},
        {"huber_delta": 0.01},
        {"scale_teachers": True},
        {"normaliser": "every-batch"},
        {"stack": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [Net, Convolutional])
def test_every_loss_is_differentiated(kind: type[nn.Module], variant: dict[str, Any]) -> None:
    (learner,) = students(1)
    how = Amalgamation(scale_spread=1.0, **variant)
    unroll = Unroll(task_of(kind), learner, POOL, how, memory=Memory(segment=3), optimizees=2)
    begin, batches = episode(unroll)
    window = unroll.window(begin, batches)
    loss = (window.meta_loss + 0.3 * window.imitation_loss).sum()
    ours = gradients_of(loss, [learner.weights()])
    pairs = [
        naive_window(
            unroll.task, learner, POOL, how, begin, batches, [learner.weights()] * STEPS, row
        )
        for row in range(2)
    ]
    total = sum(meta + 0.3 * imitation for meta, imitation, _ in pairs) / 2
    assert loss.item() == pytest.approx(total.item(), rel=1e-11)
    assert_same(ours, gradients_of(total, [learner.weights()]), 1e-9)


@pytest.mark.parametrize("kind", [Net, Convolutional])
def test_bits_do_not_depend_on_what_is_kept(kind: type[nn.Module]) -> None:
    (learner,) = students(1, torch.float32)
    found = []
    for memory in memories(ROW_BYTES[kind] // 2).values():
        how = Amalgamation(scale_spread=1.0)
        unroll = Unroll(task_of(kind, torch.float32), learner, POOL, how, memory=memory)
        begin, batches = episode(unroll)
        for _ in range(2):  # the second window steps in memory of the first
            window = unroll.window(begin, batches)
            grads = gradients_of(window.meta_loss + window.imitation_loss, [learner.weights()])
            found.append([*grads, window.end.params, *window.end.state])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_the_graph_may_be_kept_for_another_gradient() -> None:
    for second_order in (True, False):
        (learner,) = students(1)
        how = Amalgamation(second_order=second_order)
        unroll = Unroll(task_of(Net), learner, POOL, how)
        window = unroll.window(*episode(unroll))
        weights = learner.weights()
        both = [
            torch.autograd.grad(window.meta_loss, weights, retain_graph=True),
            torch.autograd.grad(window.imitation_loss, weights, retain_graph=True),
        ]
        whole = torch.autograd.grad(window.meta_loss + window.imitation_loss, weights)
        assert_same([a + b for a, b in zip(*both, strict=True)], list(whole), 1e-12)


def test_cells_kept_in_bfloat16_round_the_meta_gradient_a_little() -> None:
    (learner,) = students(1, torch.float32)
    found = []
    for memory in (Memory(), Memory(segment=3, cells="bfloat16")):
        unroll = Unroll(task_of(Net, torch.float32), learner, POOL, Amalgamation(), memory=memory)
        begin, batches = episode(unroll)
        window = unroll.window(begin, batches)
        found.append(
            torch.cat([g.flatten() for g in gradients_of(window.meta_loss, [learner.weights()])])
        )
        found.append(window.end.params)
    exact, params, rounded, same = found
    assert torch.equal(params, same)
    assert not torch.equal(exact, rounded)
    assert torch.cosine_similarity(exact, rounded, 0) > 0.95


def test_a_row_that_stands_still_leaves_the_others_alone() -> None:
    """One row's batch holds NaN: its step is skipped, and its gradients know nothing of it."""
    for second_order in (True, False):
        (learner,) = students(1)
        how = Amalgamation(second_order=second_order, scale_spread=1.0)
        unroll = Unroll(task_of(Net), learner, POOL, how, memory=Memory(segment=3), optimizees=2)
        begin, batches = episode(unroll)
        for at in (0, 4):
            x, y = batches[at]
            x = x.clone()
            x[1] = float("nan")
            batches[at] = (x, y)
        window = unroll.window(begin, batches)
        assert window.skipped[:, 0].tolist() == [0, 2]
        ours = gradients_of((window.meta_loss + window.imitation_loss).sum(), [learner.weights()])
        assert all(grad.isfinite().all() for grad in ours)
        alone = Unroll(unroll.task, learner, POOL, how)

        theirs: list[list[Tensor]] = []
        for row in range(2):
            one = alone.window(*row_of(begin, batches, row))
            assert torch.equal(one.end.params[0], window.end.params[row]) or torch.allclose(
                one.end.params[0], window.end.params[row], rtol=1e-12
            )
            theirs.append(
                gradients_of((one.meta_loss + one.imitation_loss).sum() / 2, [learner.weights()])
            )
        assert_same(ours, [a + b for a, b in zip(*theirs, strict=True)], 1e-9)


def test_an_update_that_is_not_finite_is_not_taken() -> None:
    """It shows only after the step, which was taken in place: the steps before it come again."""
    (learner,) = students(1)
    nothing = [torch.zeros_like(w) for w in learner.weights()]
    poison = [*nothing[:-1], nothing[-1] + math.nan]
    for memory in memories(ROW_BYTES[Net]).values():
        unroll = Unroll(task_of(Net), learner, POOL, Amalgamation(scale_spread=1.0), memory=memory)
        begin, batches = episode(unroll)
        window = unroll.window(begin, batches, noise=lambda t: [poison if t == 5 else nothing])
        assert window.skipped.tolist() == [[1, 0, 0, 0]]
        without = unroll.window(begin, batches[:5] + batches[6:])
        assert torch.equal(window.end.params, without.end.params)
        with torch.no_grad():
            again = unroll.window(begin, batches, noise=lambda t: [poison if t == 5 else nothing])
        assert torch.equal(window.end.params, again.end.params)
        assert all(map(torch.equal, window.end.state, without.end.state))
        loss = (window.meta_loss + window.imitation_loss).sum()
        assert all(g.isfinite().all() for g in gradients_of(loss, [learner.weights()]))


def test_teachers_by_row_that_share_all_run_once() -> None:
    """Students apart, on one optimizee and the same batches: as if each had teachers of its own."""
    learners = students(3)
    how = Amalgamation(scale_spread=1.0)
    found = []
    for shared in (False, True):
        unroll = Unroll(task_of(Net), learners, POOL, how, shared=shared)
        begin = unroll.begin(*(generator_for(0, "episode") for _ in learners))
        batches = [
            tuple(torch.stack([tensor] * 3) for tensor in batch)
            for batch in unroll.task.batches(generator_for(0, "batches"), STEPS)
        ]
        begin = unroll.warm_up(begin, batches[:2])
        window = unroll.window(begin, batches)
        weights = [learner.weights() for learner in learners]
        grads = gradients_of((window.meta_loss + window.imitation_loss).sum(), weights)
        found.append([*grads, window.losses, window.distances, window.skipped.double()])
        assert window.end.teacher_params.shape[1] == (1 if shared else 3)
    assert_same(found[0], found[1], 1e-12)
