"""The meta-loss: of all steps or of the last, on their own batches or on held-out samples."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from runs import linear_task, metrics, policies, resumes_to_the_same_bits, tiny_student, trainer
from test_nominal_window import learners as nominal_students
from test_window import (
    POOL,
    ROW_BYTES,
    STEPS,
    Net,
    assert_same,
    conditions_of,
    gradients_of,
    students,
    task_of,
)
from torch import Tensor, nn

from amalgam import recipes
from amalgam.meta import (
    Amalgamation,
    Conditions,
    Memory,
    MetaBatch,
    PersistentEvolution,
    Stage,
    Stages,
    Training,
    Unroll,
    validation,
)
from amalgam.meta.conditions import LR_DECAYS
from amalgam.meta.periods import UnrollSettings
from amalgam.meta.reference import window as naive_window
from amalgam.meta.sampling import split, stacked_batches
from amalgam.policies import NominalConfig, NominalStudent
from amalgam.recipes import RecipeError
from amalgam.seeding import generator_for
from amalgam.tasks import Task


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def dropping_task() -> Task:
    x, y = task_of(Net).train
    build = lambda: Dropping().double()  # noqa: E731
    return Task("dropping", build, (x, y), (x, y), batch_size=8)


def held_out_episode(unroll: Unroll) -> tuple[Any, Any, Any]:
    """Where the second window of an episode begins, its batches, and those held out."""
    rows = range(unroll.rows)
    begin = unroll.begin(*(generator_for(row, "episode") for row in rows))
    parts = split(unroll.task, 0.3, [generator_for(row, "split") for row in rows])

    def drawn(part: str, steps: int) -> Any:
        generators = [generator_for(row, part, steps) for row in rows]
        return stacked_batches(unroll.task, generators, steps, getattr(parts, part))

    with torch.no_grad():
        end = unroll.window(begin, drawn("trained", 3)).end
    return end, drawn("trained", STEPS), drawn("held_out", STEPS)


def assert_is_autograds(unroll: Unroll, on_held_out: bool = True, **how: Any) -> None:
    """Both losses and the meta-gradient of a window against plain autograd's."""
    begin, batches, others = held_out_episode(unroll)
    held_out = others if on_held_out else None
    conditions = how.get("conditions")
    weights = [student.weights() for student in unroll.students]
    window = unroll.window(begin, batches, held_out=held_out, **how)
    loss = (window.meta_loss + 0.3 * window.imitation_loss).sum()
    total = torch.zeros((), dtype=torch.float64)
    for row in range(unroll.rows):
        s = row // unroll.optimizees
        meta, imitation, params = naive_window(
            unroll.task, unroll.students[s], unroll.pool, unroll.amalgamation, begin, batches,
            [weights[s]] * STEPS, row, conditions, held_out=held_out,
        )  # fmt: skip
        total = total + (meta + 0.3 * imitation) / unroll.optimizees
        assert torch.allclose(params, window.end.params[row], rtol=1e-12, atol=1e-14)
    assert loss.item() == pytest.approx(total.item(), rel=1e-11)
    assert_same(gradients_of(loss, weights), gradients_of(total, weights), 1e-9)
    with torch.no_grad():
        again = unroll.window(begin, batches, held_out=held_out, **how)
    assert torch.allclose(again.meta_loss, window.meta_loss, rtol=1e-12)
    if on_held_out:
        with torch.no_grad():
            own = unroll.window(begin, batches, **how)
        assert not torch.allclose(own.meta_loss, window.meta_loss)
        assert torch.equal(own.losses, again.losses)
        assert torch.equal(own.end.params, again.end.params)


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize(
    ("objective", "on_held_out", "variant", "of_students", "optimizees"),
    [
        ("mean", True, {}, 2, 2),
        ("mean", True, {"log_objective": False, "normaliser": "every-batch"}, 1, 1),
        ("final", True, {"log_objective": False, "normaliser": "every-batch"}, 1, 2),
        ("final", True, {}, 1, 1),
        ("final", False, {"mechanism": "mean"}, 2, 1),
    ],
    ids=str,
)
def test_every_objective_is_differentiated(
    second_order: bool,
    objective: Any,
    on_held_out: bool,
    variant: Any,
    of_students: int,
    optimizees: int,
) -> None:
    how = Amalgamation(second_order=second_order, scale_spread=1.0, objective=objective, **variant)
    memory = Memory(segment=3) if optimizees > 1 else Memory()
    unroll = Unroll(
        task_of(Net), students(of_students), POOL, how, memory=memory, optimizees=optimizees
    )
    assert_is_autograds(unroll, on_held_out, conditions=conditions_of(unroll.rows))


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize(
    ("kind", "objective"),
    [("nominal", "mean"), ("dropout", "final"), ("noise", "final")],
)
def test_every_objective_is_differentiated_for(
    kind: str, objective: Any, second_order: bool
) -> None:
    """A student that is told of tensors, an optimizee that draws, steps with noise."""
    how = Amalgamation(second_order=second_order, scale_spread=1.0, objective=objective)
    task = dropping_task() if kind == "dropout" else task_of(Net)
    learners = nominal_students(1) if kind == "nominal" else students(1)
    unroll = Unroll(task, learners, POOL, how, memory=Memory(segment=3), optimizees=2)
    nothing = [[torch.zeros_like(w) for w in learners[0].weights()]]
    assert_is_autograds(unroll, **({"noise": lambda t: nothing} if kind == "noise" else {}))


@pytest.mark.parametrize("objective", ["mean", "final"])
def test_the_budget_counts_the_gradients_of_held_out_samples(objective: Any) -> None:
    point = (3 + 4 * 5) * ROW_BYTES[Net]
    taped = (2 * STEPS + (STEPS if objective == "mean" else 1)) * ROW_BYTES[Net]
    how = Amalgamation(objective=objective)
    found = []
    for more in (point, 4 * point, -1):
        memory = Memory(budget=taped + 3 * point + more)
        unroll = Unroll(task_of(Net), students(1), POOL, how, memory=memory)
        begin, batches, held_out = held_out_episode(unroll)
        if more < 0:
            with pytest.raises(ValueError, match="budget must be"):
                unroll.window(begin, batches, held_out=held_out)
        else:
            window = unroll.window(begin, batches, held_out=held_out)
            weights = [unroll.students[0].weights()]
            found.append(gradients_of(window.meta_loss.sum(), weights))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("second_order", [True, False])
def test_a_held_out_loss_that_is_not_finite_counts_as_zero(second_order: bool) -> None:
    (learner,) = students(1)
    how = Amalgamation(second_order=second_order, scale_spread=1.0)
    unroll = Unroll(task_of(Net), learner, POOL, how, memory=Memory(segment=3))
    begin, batches, held_out = held_out_episode(unroll)
    weights = [learner.weights()]

    def with_finite(*steps: int) -> Any:
        given = [(x if t in steps else x * math.nan, y) for t, (x, y) in enumerate(held_out)]
        return unroll.window(begin, batches, held_out=given)

    kept = (1, 4, 7)
    window = with_finite(*kept)
    assert window.skipped.sum() == 0
    assert window.counted[:, 0].nonzero().flatten().tolist() == list(kept)
    losses = []
    for t in kept:
        params = unroll.window(begin, batches[:t]).end.params * begin.scale
        losses.append(unroll.task.objectives(params[:, None], held_out[t])[0, 0])
    terms = [(loss / losses[0]).log() for loss in losses]
    assert window.meta_loss.item() == pytest.approx(sum(terms).item() / STEPS)
    # A window in which one loss alone is finite has that term's meta-gradient.
    alone = [gradients_of(with_finite(t).meta_loss.sum(), weights) for t in kept]
    each = [sum(parts) for parts in zip(*alone, strict=True)]
    assert_same(gradients_of(window.meta_loss.sum(), weights), each, 1e-9)
    nothing = with_finite()
    assert not nothing.counted.any()
    assert nothing.meta_loss.item() == 0
    assert not any(grad.any() for grad in gradients_of(nothing.meta_loss.sum(), weights))


@pytest.mark.parametrize("second_order", [True, False])
def test_the_final_loss_is_the_last_that_is_finite(second_order: bool) -> None:
    (learner,) = students(1)
    how = Amalgamation(second_order=second_order, scale_spread=1.0, objective="final")
    unroll = Unroll(task_of(Net), learner, POOL, how, memory=Memory(segment=3))
    begin, batches, held_out = held_out_episode(unroll)
    weights = [learner.weights()]
    broken = [(x * math.nan if t > 5 else x, y) for t, (x, y) in enumerate(batches)]
    cut = unroll.window(begin, batches[:6])
    window = unroll.window(begin, broken)
    assert window.skipped[0, 0] == 2
    assert window.meta_loss.item() == pytest.approx(cut.meta_loss.item(), rel=1e-12)
    ours, theirs = (gradients_of(one.meta_loss.sum(), weights) for one in (window, cut))
    assert_same(ours, theirs, 1e-9)
    # Between the first and the last step nobody looks at held-out samples.
    unseen = [(x * math.nan if 0 < t < 7 else x, y) for t, (x, y) in enumerate(held_out)]
    whole, window = (unroll.window(begin, batches, held_out=one) for one in (held_out, unseen))
    assert torch.equal(whole.meta_loss, window.meta_loss)
    assert window.counted[:, 0].nonzero().flatten().tolist() == [0, 7]


@pytest.mark.parametrize("second_order", [True, False])
def test_a_window_of_one_step_has_a_constant_meta_loss(second_order: bool) -> None:
    """Its one loss comes before its one step, which only the imitation loss looks at."""
    for objective in ("mean", "final"):
        how = Amalgamation(second_order=second_order, objective=objective)
        unroll = Unroll(task_of(Net), students(1), POOL, how)
        begin, batches, held_out = held_out_episode(unroll)
        window = unroll.window(begin, batches[:1], held_out=held_out[:1])
        weights = [unroll.students[0].weights()]
        assert window.meta_loss.item() == 0
        whole = gradients_of((window.meta_loss + window.imitation_loss).sum(), weights)
        assert any(grad.any() for grad in whole)
        assert not any(grad.any() for grad in gradients_of(window.meta_loss.sum(), weights))


def test_held_out_batches_are_one_for_each_step() -> None:
    unroll = Unroll(task_of(Net), students(1), POOL, Amalgamation())
    begin, batches, held_out = held_out_episode(unroll)
    with pytest.raises(ValueError, match="held_out must hold 8 batches, one for each .* not 5"):
        unroll.window(begin, batches, held_out=held_out[:5])


# ---- which samples are held out


def numbered_task(samples: int = 40, batch_size: int = 8) -> Task:
    """A regression whose targets are the samples' numbers."""
    y = torch.arange(float(samples))[:, None]
    x = torch.cat((y / samples, torch.ones(samples, 1)), 1)
    loss = nn.functional.mse_loss
    build = lambda: nn.Linear(2, 1)  # noqa: E731
    return Task("numbered", build, (x, y), (x, y), loss=loss, batch_size=batch_size)


def numbers(batches: Any, row: int = 0) -> list[int]:
    """The samples in one row of some batches."""
    return [int(number) for batch in batches for number in batch[-1][row].flatten()]


@pytest.mark.parametrize(
    ("samples", "share", "held_out"), [(40, 0.25, 10), (40, 0.999, 39), (40, 1e-6, 1), (2, 0.1, 1)]
)
def test_a_split_leaves_something_on_both_sides(samples: int, share: float, held_out: int) -> None:
    task = numbered_task(samples, batch_size=min(samples, 16))
    parts = task.split(generator_for(1), share)
    assert [len(part) for part in parts] == [samples - held_out, held_out]
    assert torch.cat(parts).sort().values.tolist() == list(range(samples))
    for part in parts:
        batches = stacked_batches(task, [generator_for(2)], 9, [part])
        size = min(task.batch_size, len(part))
        assert all(len(batch[0][0]) == size for batch in batches)
        assert set(numbers(batches)) <= set(part.tolist())
        epoch = numbers(batches[: len(part) // size])
        assert len(set(epoch)) == len(epoch) == len(part) // size * size


def test_one_sample_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="held_out must be 0 for task 'numbered', which has one"):
        numbered_task(1, 1).split(generator_for(1), 0.5)


def test_all_training_samples_are_the_same_batches_as_ever() -> None:
    task, everything = numbered_task(), torch.arange(40)
    plain, among = (task.batches(generator_for(1), 7, part) for part in (None, everything))
    for one, other in zip(plain, among, strict=True):
        assert all(map(torch.equal, one, other))
        assert one.seeds == other.seeds


@pytest.mark.parametrize("strategy", ["stages", "meta-batch"])
def test_no_step_of_an_episode_sees_what_the_meta_loss_is_taken_on(
    strategy, tmp_path, monkeypatch
) -> None:
    """Warm-up and windows that come before the first meta-step included."""
    seen: dict[tuple[float, ...], tuple[set[int], set[int]]] = {}
    window, meta_gradient, warm_up = Unroll.window, Unroll.meta_gradient, Unroll.warm_up

    def of(begin: Any, row: int) -> tuple[set[int], set[int]]:
        return seen.setdefault(tuple(begin.scale[row].tolist()), (set(), set()))

    def noting_warm_up(self, begin, batches, *more):
        for row in range(self.rows):
            of(begin, row)[0].update(numbers(batches, row))
        return warm_up(self, begin, batches, *more)

    def noting_window(self, begin, batches, **how):
        assert not torch.is_grad_enabled()
        for row in range(self.rows):
            of(begin, row)[0].update(numbers(batches, row))
        return window(self, begin, batches, **how)

    def noting_meta_gradient(self, given, coefficients):
        for row in range(self.rows):
            of(given.begin, row)[0].update(numbers(given.batches, row))
            of(given.begin, row)[1].update(numbers(given.held_out, row))
        return meta_gradient(self, given, coefficients)

    monkeypatch.setattr(Unroll, "window", noting_window)
    monkeypatch.setattr(Unroll, "meta_gradient", noting_meta_gradient)
    monkeypatch.setattr(Unroll, "warm_up", noting_warm_up)
    how = {
        "stages": Stages((Stage(3, 3, 0.1),), 4),
        "meta-batch": MetaBatch(4, slots=2, unroll=4, shortest=4, longest=16),
    }[strategy]
    amalgamation = Amalgamation(held_out=0.25, scale_spread=1.0, backend="reference")
    training = Training(validate_every=0, optimizees=2)
    run = trainer(
        tmp_path, tasks=numbered_task(), strategy=how, training=training, amalgamation=amalgamation
    )
    run.check()
    seen.clear()
    run.run()
    assert len(seen) >= 6
    assert all(not trained & held_out for trained, held_out in seen.values())
    complete = {tuple(held_out) for _, held_out in seen.values() if len(held_out) == 10}
    assert len(complete) > 3  # every row and episode has a split of its own


# ---- runs

HELD_OUT = Amalgamation(held_out=0.3, scale_spread=1.0, backend="reference")
CONDITIONS = Conditions(weight_decay=(1e-3, 0.1), lr=(0.5, 2.0), lr_decays=LR_DECAYS)
EVERY_STEP = Training(validate_every=2, validation_steps=4, validation_seeds=1, checkpoint_every=1)
BATCH = MetaBatch(2, slots=2, unroll=2, shortest=2, longest=6, imitation_weight=0.1)
SHORT = Stages((Stage(1, 2, 0.1),), 3)
RUNS: dict[str, dict[str, Any]] = {
    "meta-batch": {"strategy": BATCH, "amalgamation": replace(HELD_OUT, objective="final")},
    "pes": {"strategy": SHORT, "estimator": PersistentEvolution(pairs=1)},
    "choice": {"strategy": SHORT, "students": lambda: policies()["choice"], "pool": ()},
    "replicates": {
        "strategy": SHORT,
        "students": lambda: [tiny_student(7), tiny_student(8)],
        "training": replace(EVERY_STEP, optimizees=2, input_noise=0.01),
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_resume(name, tmp_path) -> None:
    how = {"training": EVERY_STEP, "conditions": CONDITIONS, "amalgamation": HELD_OUT} | RUNS[name]
    make = how.pop("students", lambda: tiny_student(7))

    def run(folder, **changes):
        return trainer(folder, make(), **how | changes)

    rows = resumes_to_the_same_bits(run, tmp_path)
    assert {row["skipped_meta_steps"] for row in rows} == {0}
    run(tmp_path / "without conditions", conditions=None).run()
    assert rows[0]["meta_loss"] != metrics(tmp_path / "without conditions")[0]["meta_loss"]


def test_replicates_hold_out_their_own_samples(tmp_path) -> None:
    how = {"training": Training(validate_every=0), "strategy": SHORT, "amalgamation": HELD_OUT}
    both = [tiny_student(7), tiny_student(8)]
    trainer(tmp_path / "both", both, **how).run()
    for seed, replicate in zip((7, 8), both, strict=True):
        alone = trainer(tmp_path / str(seed), tiny_student(seed), seed=seed, **how).run()
        for one, other in zip(alone.weights(), replicate.weights(), strict=True):
            assert torch.allclose(one, other, atol=1e-5)


def memorising_task() -> Task:
    """Random labels: whatever fits the training samples is wrong on others."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 60, generator=generator)
    y = torch.randint(2, (40,), generator=generator)
    return Task("random", lambda: nn.Linear(60, 2), (x, y), (x, y), batch_size=10)


def test_only_held_out_samples_show_that_nothing_generalises() -> None:
    """As the episode goes on, the steps' own losses fall, and those of held-out samples rise."""
    student = NominalStudent(NominalConfig(hidden=2, lr=0.05), generator=generator_for(0))
    own, others = (
        validation.by_meta_loss(
            student,
            [memorising_task()],
            UnrollSettings(20, 4, 1, 0, 0.0),
            Amalgamation(held_out=held_out, scale_spread=0.0),
            Training(validation_data="train"),
            seed=3,
        )
        for held_out in (0.0, 0.3)
    )
    assert own < -0.3 < 0.1 < others


def test_an_episode_without_a_finite_held_out_loss_fails(tmp_path) -> None:
    """Its steps can be taken, as far as they see: no batch of theirs holds what is not finite."""
    task = linear_task()
    plain = task.split

    def sorted_out(generator: Any, share: float) -> tuple[Tensor, Tensor]:
        plain(generator, share)
        return torch.arange(16, 48), torch.arange(16)

    task.split = sorted_out  # type: ignore[method-assign]
    task.train[0][:16] = math.nan
    strategy = MetaBatch(2, slots=2, unroll=2, shortest=8, longest=8)
    good = linear_task(3, "good")
    run = trainer(
        tmp_path, tasks=[task, good], strategy=strategy, amalgamation=HELD_OUT,
        training=Training(validate_every=0), pool=(),
    )  # fmt: skip
    run.run()
    rows = metrics(tmp_path)
    assert [row["failed_episodes"] for row in rows] == [1, 2]
    assert [row["skipped_steps"]["student"] for row in rows] == [0, 0]
    assert all(row["meta_loss"] is not None for row in rows)


@pytest.mark.parametrize("share", [1.0, -0.1, math.nan, "some"])
def test_a_share_that_leaves_nothing_is_named(share: Any) -> None:
    with pytest.raises(ValueError, match=r"held_out must be"):
        Amalgamation(held_out=share)


def test_a_recipe_says_what_the_meta_loss_is() -> None:
    task = {"name": "digits-mlp", "batch_size": 16}
    how = {"held_out": 0.25, "objective": "final"}
    recipe = recipes.from_dict({"task": task, "teachers": [], "amalgamation": how})
    assert (recipe.amalgamation.held_out, recipe.amalgamation.objective) == (0.25, "final")
    assert recipes.from_dict(recipe.as_dict()) == recipe
    with pytest.raises(RecipeError, match="amalgamation.objective: .*'mean' or 'final', not 'las"):
        recipes.from_dict(
            {"task": task, "teachers": [], "amalgamation": how | {"objective": "last"}}
        )
    with pytest.raises(ValueError, match="objective must be one of .* not 'last'"):
        Amalgamation(objective="last")  # type: ignore[arg-type]
