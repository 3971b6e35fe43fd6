"""On-policy amalgamation: meta-gradients against plain autograd, its limits, and its runs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import (
    LinearFamily,
    linear_task,
    metrics,
    policies,
    resumes_to_the_same_bits,
    tiny_student,
    trainer,
)
from test_nominal_window import learners
from test_window import (
    POOL,
    STEPS,
    Net,
    assert_same,
    conditions_of,
    episode,
    gradients_of,
    students,
    task_of,
)
from torch import Tensor

from amalgam import recipes
from amalgam.experiment import Experiment
from amalgam.layout import Layout
from amalgam.meta import (
    Amalgamation,
    Conditions,
    Memory,
    MetaBatch,
    OnPolicy,
    PersistentEvolution,
    Stage,
    Stages,
    Training,
    Unroll,
)
from amalgam.meta.on_policy import Comparison
from amalgam.meta.periods import Period
from amalgam.meta.reference import window as naive_window
from amalgam.meta.run_state import EpisodeAt
from amalgam.meta.teaching import Teaching
from amalgam.meta.window import Window
from amalgam.policies import PolicyTeacher, Pool, Teacher, TorchTeacher
from amalgam.recipes import RecipeError
from amalgam.seeding import generator_for

HOW = OnPolicy(magnitude=0.3)


def teaching_of(rows: int, fade: float = 0.6) -> Teaching:
    executed = torch.tensor([2, 0, 1, 0][:rows])
    pool = Pool(POOL.teachers, ("constant", "linear", "cosine"))
    return Teaching.of(pool, STEPS, STEPS, 3 * STEPS, executed.double(), fade, executed)


def drawn(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# ---- the terms


def test_terms_are_means_over_tensors() -> None:
    layout = Layout({"matrix": (2, 3), "none": (0,), "vector": (3,)})
    updates, teachers = drawn((2, 9)), drawn((3, 2, 9), 2)
    found = Comparison(HOW, updates, teachers, layout)
    for row in range(2):
        for k in range(3):
            pairs = [(updates[row, p], teachers[k, row, p]) for p in (slice(6), slice(6, 9))]
            cosines = [torch.cosine_similarity(u, v, 0).item() for u, v in pairs]
            ratios = [math.log(u.norm() / v.norm()) for u, v in pairs]
            assert found.cosines[row, k].item() == pytest.approx(sum(cosines) / 2)
            assert found.log_ratios[row, k].item() == pytest.approx(sum(ratios) / 2)
            term = sum(1 - c + 0.3 * r**2 for c, r in zip(cosines, ratios, strict=True)) / 2
            assert found.terms[row, k].item() == pytest.approx(term)


def test_a_tensor_that_stands_still_does_not_count() -> None:
    layout = Layout({"first": (4,), "second": (5,)})
    updates, teachers = drawn((1, 9)), drawn((3, 1, 9), 2)
    alone = Comparison(HOW, updates[:, :4], teachers[..., :4], Layout({"first": (4,)}))
    updates[0, 4:] = 0
    teachers[2] = 0
    found = Comparison(HOW, updates, teachers, layout)
    assert torch.allclose(found.terms[0, :2], alone.terms[0, :2])
    assert found.terms[0, 2] == found.cosines[0, 2] == found.log_ratios[0, 2] == 0
    weights = torch.tensor([[0.5, 0.2, 0.3]], dtype=torch.float64)
    slopes = found.gradient(weights)
    assert not slopes[0, 4:].any()
    weights[0, 2] = 0
    assert torch.allclose(slopes[:, :4], alone.gradient(weights))


def test_the_terms_gradient_is_autograds() -> None:
    layout = Layout({"matrix": (2, 3), "vector": (3,)})
    updates, teachers = drawn((2, 9)).requires_grad_(), drawn((3, 2, 9), 2)
    weights = drawn((2, 3), 3)
    found = Comparison(HOW, updates, teachers, layout)
    (theirs,) = torch.autograd.grad((weights * found.terms).sum(), updates)
    with torch.no_grad():
        ours = Comparison(HOW, updates, teachers, layout).gradient(weights)
    assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)


# ---- windows


@pytest.mark.parametrize(
    ("kind", "second_order", "mechanism", "variant", "noisy"),
    [
        ("nominal", True, "mean", {}, False),
        ("paper", True, "min-max", {"log_objective": False, "scale_teachers": True}, False),
        ("nominal", False, "min-max", {}, False),
        ("paper", False, "mean", {"scale_teachers": True}, False),
        ("nominal", False, "mean", {}, True),
    ],
    ids=str,
)
def test_meta_gradient_is_autograds(
    kind: str, second_order: bool, mechanism: Any, variant: dict[str, Any], noisy: bool
) -> None:
    """By steps and, in first order without noise, coordinate by coordinate."""
    pupils: Any = learners(1) if kind == "nominal" else students(2)
    optimizees = 2 // len(pupils)
    how = Amalgamation(
        mechanism, second_order=second_order, scale_spread=1.0, on_policy=HOW, **variant
    )
    unroll = Unroll(
        task_of(Net), pupils, POOL, how, memory=Memory(segment=3), optimizees=optimizees
    )
    begin, batches = episode(unroll)
    assert torch.equal(begin.teacher_params, begin.params.expand_as(begin.teacher_params))
    weights = [pupil.weights() for pupil in pupils]
    noise = (lambda t: [[torch.zeros_like(w) for w in of] for of in weights]) if noisy else None
    conditions = conditions_of(2)
    window = unroll.window(
        begin, batches, noise=noise, conditions=conditions, teaching=teaching_of(2)
    )
    loss = (window.meta_loss + 0.3 * window.imitation_loss).sum()
    total = torch.zeros((), dtype=torch.float64)
    for row in range(2):
        pupil, own = pupils[row // optimizees], [weights[row // optimizees]] * STEPS
        meta, imitation, params = naive_window(
            unroll.task, pupil, POOL, how, begin, batches, own, row, conditions, teaching_of(2)
        )
        total = total + (meta + 0.3 * imitation) / optimizees
        assert torch.allclose(params, window.end.params[row], rtol=1e-11, atol=1e-13)
    assert loss.item() == pytest.approx(total.item(), rel=1e-11)
    assert_same(gradients_of(loss, weights), gradients_of(total, weights), 1e-9)
    assert window.losses.shape == (STEPS, 2, 1)
    assert window.cosines.shape == window.distances.shape == (STEPS, 2, 3)


@pytest.mark.parametrize("second_order", [True, False])
def test_off_policy_teachers_have_decaying_rates(second_order: bool) -> None:
    (pupil,) = learners(1)
    how = Amalgamation("mean", second_order=second_order, scale_spread=1.0)
    unroll = Unroll(task_of(Net), pupil, POOL, how)
    begin, batches = episode(unroll)
    decaying = teaching_of(1)._replace(fade=0.0, executed=None)
    window = unroll.window(begin, batches, teaching=decaying)
    weights = [pupil.weights()]
    _, imitation, _ = naive_window(
        unroll.task, pupil, POOL, how, begin, batches, weights * STEPS, teaching=decaying
    )
    assert window.imitation_loss.item() == pytest.approx(imitation.item(), rel=1e-11)
    ours = gradients_of(window.imitation_loss, weights)
    assert_same(ours, gradients_of(imitation, weights), 1e-9)
    plain = unroll.window(begin, batches)
    same, *others = (
        a == b for a, b in zip(plain.distances[0, 0], window.distances[0, 0], strict=True)
    )
    assert same
    assert not any(others)


def test_bits_do_not_depend_on_what_is_kept() -> None:
    (pupil,) = learners(1)
    pupil.float()
    found = []
    for memory in (Memory(), Memory(segment=1), Memory(segment=3), Memory(budget="9KB")):
        how = Amalgamation(scale_spread=1.0, on_policy=HOW)
        unroll = Unroll(task_of(Net, torch.float32), pupil, POOL, how, memory=memory)
        window = unroll.window(*episode(unroll), teaching=teaching_of(1))
        grads = gradients_of(window.meta_loss + window.imitation_loss, [pupil.weights()])
        found.append([*grads, window.end.params, *window.end.state])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_a_teacher_that_is_executed_alone_takes_its_own_trajectory() -> None:
    pool = Pool(["adam"])
    (pupil,) = learners(1)
    alone = Unroll(task_of(Net), pupil, pool, Amalgamation(scale_spread=1.0))
    led = Unroll(task_of(Net), pupil, pool, Amalgamation(scale_spread=1.0, on_policy=HOW))
    begin = alone.begin(generator_for(0))
    batches = [tuple(t[None] for t in b) for b in alone.task.batches(generator_for(1), 12)]
    with torch.no_grad():
        theirs = alone.window(begin, batches)
        ours = led.window(begin, batches, teaching=Teaching(1.0, torch.zeros(1, dtype=torch.long)))
    assert torch.allclose(ours.end.params, theirs.end.teacher_params[0], rtol=1e-12, atol=1e-14)
    assert torch.equal(ours.end.teacher_params[0], ours.end.params)
    assert torch.allclose(ours.end.teacher_state[0].v, theirs.end.teacher_state[0].v, rtol=1e-12)
    assert not torch.allclose(theirs.end.params[0], theirs.end.teacher_params[0])


def test_a_step_takes_one_gradient_of_the_optimizee(monkeypatch: pytest.MonkeyPatch) -> None:
    (pupil,) = students(1)
    counts = []
    for on_policy in (None, HOW):
        unroll = Unroll(task_of(Net), pupil, POOL, Amalgamation(on_policy=on_policy))
        begin, batches = episode(unroll)
        taken, gradients = [], unroll.gradients

        def count(params: Tensor, *rest: Any, taken: Any = taken, real: Any = gradients) -> Any:
            taken.append(params.shape[1])
            return real(params, *rest)

        monkeypatch.setattr(unroll, "gradients", count)
        with torch.no_grad():
            unroll.window(begin, batches)
        counts.append(sum(taken))
    assert counts == [STEPS * (1 + len(POOL)), STEPS]


def test_a_row_that_stands_still_imitates_nobody() -> None:
    (pupil,) = learners(1)
    found = []
    for second_order in (True, False):
        how = Amalgamation(second_order=second_order, scale_spread=1.0, on_policy=HOW)
        unroll = Unroll(task_of(Net), pupil, POOL, how, optimizees=2)
        begin, batches = episode(unroll)
        x, y = batches[4]
        batches[4] = (torch.stack((x[0], x[1] * math.nan)), y)
        window = unroll.window(begin, batches, teaching=Teaching(0.6, torch.tensor([2, 0])))
        assert window.skipped.tolist() == [[0] * 4, [1] * 4]
        assert not window.distances[4, 1].any()
        loss = window.imitation_loss.sum()
        weights = [pupil.weights()]
        found.append((window, gradients_of(loss, weights)))
        # Without the step, which counts in the mean all the same.
        rest = [tuple(t[1:] for t in b) for i, b in enumerate(batches) if i != 4]
    assert all(grad.isfinite().all() for _, grads in found for grad in grads)
    alone = Unroll(unroll.task, pupil, POOL, how)
    n = begin.params.shape[1]
    state, (pool,) = begin.state, begin.teacher_state
    only = begin._replace(
        scale=begin.scale[1:], params=begin.params[1:], teacher_params=begin.teacher_params[:, 1:],
        state=type(state)(*(t[..., t.shape[-1] // 2 :] for t in state)),
        teacher_state=(pool._replace(m=pool.m[:, n:], v=pool.v[:, n:]),),
    )  # fmt: skip
    other = alone.window(only, rest, teaching=Teaching(0.6, torch.tensor([0])))
    assert torch.allclose(window.end.params[1], other.end.params[0], rtol=1e-11)
    share = (STEPS - 1) / STEPS
    assert window.distances[:, 1].sum(0).tolist() == pytest.approx(
        (other.distances[:, 0].mean(0) * share * STEPS).tolist()
    )


def test_teachers_of_torch_act_where_the_student_is() -> None:
    """Each optimizer is given the student's parameters before every step."""
    teacher = TorchTeacher(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    (pupil,) = learners(1)
    unroll = Unroll(task_of(Net), pupil, Pool([teacher]), Amalgamation(on_policy=HOW))
    begin = unroll.begin(generator_for(0))
    batches = [tuple(t[None] for t in b) for b in unroll.task.batches(generator_for(1), 3)]
    leaf = torch.nn.Parameter(begin.params[0] * begin.scale[0])
    optimizer = torch.optim.AdamW([leaf], lr=0.01, weight_decay=0.1)
    where = begin
    for batch in batches:
        with torch.no_grad():
            window = unroll.window(where, [batch])
            params = where.params[0] * where.scale[0]
            leaf.copy_(params)
        leaf.grad = torch.autograd.grad(
            unroll.task.objective(leaf, tuple(t[0] for t in batch)), leaf
        )[0]
        optimizer.step()
        update = (params - leaf.detach()) / where.scale
        own = where.params - window.end.params
        expected = Comparison(HOW, own, update[None], unroll.task.layout)
        assert torch.allclose(window.distances[0], expected.terms, rtol=1e-9)
        where = window.end


# ---- runs

TINY = MetaBatch(4, slots=2, unroll=2, shortest=2, longest=6, imitation_weight=0.5)
RESUMED = Training(validate_every=0, checkpoint_every=1)
STAGES = Stages((Stage(2, 2, 0.5),), 3)
EPISODE = EpisodeAt(0, 0, 3, 0)
SOON = OnPolicy(anneal_steps=3, imitation_floor=0.2)


def on_policy(how: OnPolicy = SOON, **changes: Any) -> Amalgamation:
    return Amalgamation(scale_spread=1.0, backend="reference", on_policy=how, **changes)


RUNS: dict[str, dict[str, Any]] = {
    "batch": {"strategy": TINY, "tasks": [linear_task(), LinearFamily()]},
    "pes": {"strategy": STAGES, "estimator": PersistentEvolution(pairs=2)},
    "choice": {
        "strategy": STAGES,
        "students": lambda: policies()["choice"],
        "pool": (
            "adam",
            TorchTeacher(torch.optim.SGD, lr=0.1, momentum=0.9),
            PolicyTeacher(policies()["choice"]),
        ),
    },
    "replicates": {
        "strategy": STAGES,
        "students": lambda: [tiny_student(7), tiny_student(8)],
        "training": replace(RESUMED, optimizees=2, input_noise=0.01),
        "amalgamation": on_policy(SOON, second_order=False),
    },
}


def test_another_decay_is_another_run(tmp_path: Path) -> None:
    """And teachers' rates decay over the whole episode, not over a window."""
    how = {"training": RESUMED, "strategy": Stages((Stage(1, 2),), 3)}
    decaying = Pool(["sgd", "adam"], ["linear", "constant"])
    trainer(tmp_path / "run", pool=decaying, **how).run()
    trainer(tmp_path / "plain", pool=("sgd", "adam"), **how).run()
    (_, ours), (_, plain) = metrics(tmp_path / "run"), metrics(tmp_path / "plain")
    assert ours["loss"]["sgd"] != plain["loss"]["sgd"]
    assert ours["loss"]["adam"] == plain["loss"]["adam"]
    with pytest.raises(ValueError, match="belongs to a run with teachers = .*linear"):
        trainer(tmp_path / "run", pool=("sgd", "adam"), **how).run(resume=True)


@pytest.mark.parametrize("name", RUNS)
def test_runs_resume(name: str, tmp_path: Path) -> None:
    how = {"training": RESUMED, "amalgamation": on_policy()} | RUNS[name]
    make = how.pop("students", lambda: tiny_student(7))
    conditions = Conditions(weight_decay=(1e-3, 0.1), lr=(0.5, 2.0), lr_decays=("linear",))
    rows = resumes_to_the_same_bits(
        lambda folder: trainer(folder, make(), conditions=conditions, **how), tmp_path
    )
    assert {row["skipped_meta_steps"] for row in rows} == {0}
    fades = [1 - step / 3 for step in range(4)]
    assert sorted({row["fade"] for row in rows}, reverse=True) == pytest.approx(fades)
    for row in rows:
        assert set(row["cosine"]) == set(row["log_ratio"]) == set(row["distance"])
        assert set(row["loss"]) == {"student"}


def test_without_fade_and_imitation_a_run_is_that_of_the_meta_loss(tmp_path: Path) -> None:
    how = {"training": RESUMED, "strategy": replace(TINY, imitation_weight=0.0)}
    plain = trainer(tmp_path / "plain", pool=(), **how).run()
    ours = trainer(tmp_path / "ours", amalgamation=on_policy(OnPolicy(fade=0.0)), **how).run()
    assert all(map(torch.equal, plain.weights(), ours.weights()))


def test_the_imitation_weight_falls_to_its_floor() -> None:
    assert [SOON.imitation_at(step) for step in range(5)] == pytest.approx(
        [1.0, 0.2 + 0.8 * 2 / 3, 0.2 + 0.8 / 3, 0.2, 0.2]
    )
    assert [OnPolicy(fade=0.5, anneal_steps=2).fade_at(step) for step in range(4)] == [
        0.5, 0.25, 0.0, 0.0
    ]  # fmt: skip


def test_rows_draw_the_executed_teacher_by_episode(tmp_path: Path) -> None:
    run = trainer(tmp_path, pool=("adam", "sgd"), amalgamation=on_policy(), strategy=TINY)
    period = run.strategy.next([])
    assert isinstance(period, Period)

    def executed(number: int, window: int) -> float:
        found = run._meta_steps._teaching(replace(EPISODE, number=number), period, window).executed
        assert found is not None
        return found.item()

    chosen = [executed(number, 0) for number in range(40)]
    # 20 of 40 in the mean, with a standard deviation of 3.2.
    assert abs(sum(chosen) - 20) < 13
    assert [executed(number, 2) for number in range(40)] == chosen


def test_a_student_learns_to_imitate(tmp_path: Path) -> None:
    """On episodes that its meta-training does not see."""
    how = Amalgamation(scale_spread=1.0, on_policy=OnPolicy(imitation_floor=1.0, anneal_steps=20))
    pupil, task, found = tiny_student(7), linear_task(), []
    training = Training(validate_every=0, meta_lr=0.03, clip_ratio=1.0, il_mode="imitation")
    run = trainer(
        tmp_path, pupil, task, pool=("adam",), training=training, amalgamation=how,
        strategy=Stages((Stage(20, 1),), 5),
    )  # fmt: skip
    for train in (run.run, lambda: None):
        windows = []
        for number in range(4):
            unroll = Unroll(task, pupil, run.pool, how)
            batches = [tuple(t[None] for t in b) for b in task.batches(generator_for(number), 10)]
            with torch.no_grad():
                windows.append(unroll.window(unroll.begin(generator_for(9, number)), batches))
        found.append([sum(values) / 4 for values in zip(*map(measures, windows), strict=True)])
        train()
    (imitation, cosine, log_ratio), (lower, closer, nearer) = found
    assert lower < 0.6 * imitation
    assert closer > cosine
    assert abs(nearer) < 0.6 * abs(log_ratio)


def measures(window: Window) -> list[float]:
    means = (window.imitation_loss, window.cosines, window.log_ratios)
    return [tensor.mean().item() for tensor in means]


def test_on_policy_needs_teachers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pool must have teachers for on-policy .* not none"):
        trainer(tmp_path, pool=(), amalgamation=on_policy())


RECIPE: dict[str, Any] = {
    "task": {"name": "digits-mlp", "batch_size": 16},
    "teachers": [{"kind": "adam", "lr_decay": "linear"}, {"kind": "torch.optim.AdamW"}],
    "amalgamation": {"on_policy": {"fade": 0.5}},
}


def test_recipes_say_it(tmp_path: Path) -> None:
    recipe = recipes.from_dict(RECIPE)
    assert recipes.from_dict(recipe.as_dict()) == recipe
    assert recipe.amalgamation.on_policy == OnPolicy(fade=0.5)
    assert recipe.pool.lr_decays == ("linear", "constant")
    assert recipe.pool.teachers[0] == Teacher("adam")
    for table, named in (
        ({"fadee": 1.0}, "'amalgamation.on_policy.fadee'; the nearest is .*on_policy.fade'"),
        ({"fade": 2.0}, r"amalgamation.on_policy: fade must be in \[0, 1\], not 2.0"),
    ):
        with pytest.raises(RecipeError, match=named):
            recipes.from_dict({**RECIPE, "amalgamation": {"on_policy": table}})
    with pytest.raises(
        RecipeError, match="teachers.0.lr_decay: .*'linear' or 'cosine', not 'step'"
    ):
        recipes.from_dict({**RECIPE, "teachers": [{"kind": "adam", "lr_decay": "step"}]})
    with pytest.raises(ValueError, match="pool must have teachers for on-policy"):
        Experiment(recipes.from_dict({**RECIPE, "teachers": []}), tmp_path / "none")


def test_a_choice_that_is_trained_first_acts_on_policy(tmp_path: Path) -> None:
    once = {"kind": "stages", "unroll": 2, "stages": [{"episodes": 1}]}
    recipe = recipes.from_dict(
        {key: RECIPE[key] for key in ("task", "amalgamation")}
        | {
            "student": {"hidden": 2, "layers": 1, "warmup_steps": 0},
            "choice": {"policy": {"hidden": 2, "layers": 1, "warmup_steps": 0}, "strategy": once},
            "training": {"validate_every": 0}, "strategy": once, "threads": 1,
        }
    )  # fmt: skip
    run = Experiment(recipe, tmp_path)
    assert run._choice_trainer.amalgamation.on_policy is None
    run._choice = run._choice_trainer.student
    assert run.trainer.amalgamation.on_policy == OnPolicy(fade=0.5)
    assert run.trainer.pool.names == ("choice",)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"fade": 1.5}, r"fade must be in \[0, 1\], not 1.5"),
        ({"imitation_floor": -0.1}, r"imitation_floor must be in \[0, 1\], not -0.1"),
        ({"anneal_steps": 0}, "anneal_steps must be 1 or more, not 0"),
        ({"direction": -1.0}, "direction must be 0 or more and finite, not -1.0"),
        ({"magnitude": math.inf}, "magnitude must be 0 or more and finite, not inf"),
    ],
)
def test_bad_settings_are_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        OnPolicy(**fields)
