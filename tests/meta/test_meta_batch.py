"""Meta-batches: several episodes in every meta-step, each clipped on its own, staggered."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from runs import linear_task, metrics, policies, resumes_to_the_same_bits, tiny_student, trainer

from amalgam import recipes
from amalgam.experiment import Experiment
from amalgam.meta import (
    Amalgamation,
    Curriculum,
    MetaBatch,
    NothingLearned,
    PersistentEvolution,
    Stage,
    Stages,
    Training,
)
from amalgam.meta.perturbation import AdaptivePGD, Gaussian
from amalgam.meta.sampling import Sampler
from amalgam.meta.slot_means import SlotMeans
from amalgam.recipes import RecipeError

PLAIN = Training(validate_every=0)
RESUMED = Training(validate_every=3, validation_steps=4, validation_seeds=1, checkpoint_every=1)
TINY = MetaBatch(4, slots=2, unroll=2, shortest=2, longest=6, imitation_weight=0.1)


def tasks(count: int = 2) -> list[Any]:
    return [linear_task(3 + index, f"task-{index}") for index in range(count)]


def test_one_slot_is_stages(tmp_path) -> None:
    """Without clipping, and where all horizons are one, it takes the same episodes."""
    batch = MetaBatch(
        6, slots=1, unroll=3, shortest=9, longest=9, imitation_weight=0.1, slot_clip=math.inf
    )
    found = [
        trainer(tmp_path / str(number), tasks=tasks(), training=PLAIN, strategy=strategy).run()
        for number, strategy in enumerate((batch, Stages((Stage(2, 3, 0.1),), 3)))
    ]
    assert all(map(torch.equal, *(student.weights() for student in found)))


RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "first-order": {"amalgamation": Amalgamation(second_order=False, scale_spread=1.0)},
    "noise": {
        "perturbation": Gaussian(0.01, relative=True),
        "training": replace(RESUMED, input_noise=0.05, il_mode="switch", optimizees=2),
        "strategy": replace(TINY, imitation_weight=0.5),
    },
    "adversary": {"perturbation": AdaptivePGD(1, 0.01)},
    "pes": {"estimator": PersistentEvolution(pairs=2)},
    "replicates": {"students": lambda: [tiny_student(7), tiny_student(8)]},
    "choice": {"students": lambda: policies()["choice"], "pool": ()},
    "more slots than tasks": {"strategy": replace(TINY, slots=3)},
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_resume(name, tmp_path) -> None:
    how = {"training": RESUMED, "strategy": TINY} | RUNS[name]
    make = how.pop("students", lambda: tiny_student(7))
    strategy = replace(how.pop("strategy"), meta_steps=3)

    def run(folder):
        return trainer(folder, make(), tasks=tasks(), strategy=strategy, **how)

    rows = resumes_to_the_same_bits(run, tmp_path)
    assert {row["skipped_meta_steps"] for row in rows} == {0}
    assert len(rows[-1]["slots"]) == strategy.slots


def test_replicates_are_single_runs(tmp_path) -> None:
    both = [tiny_student(7), tiny_student(8)]
    how = {"tasks": tasks(), "training": PLAIN, "strategy": TINY}
    trainer(tmp_path / "both", both, **how).run()
    alone = trainer(tmp_path / "alone", tiny_student(7), **how).run()
    for one, other in zip(alone.weights(), both[0].weights(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_slots_are_apart_and_go_on(tmp_path) -> None:
    """Each slot's episode goes window by window to its horizon; no two slots share a task."""
    batch = MetaBatch(16, slots=3, unroll=2, shortest=4, longest=12)
    trainer(tmp_path, tasks=tasks(4), training=PLAIN, strategy=batch).run()
    rows = metrics(tmp_path)
    assert len(rows) == 16
    first = rows[0]["slots"]
    assert [slot["step"] for slot in first] == [
        2 * (k * slot["horizon"] // 2 // 3) for k, slot in enumerate(first)
    ]
    assert first[0]["step"] == 0 < first[2]["step"]
    begun = 0
    for row, following in pairwise(rows):
        assert [slot["slot"] for slot in row["slots"]] == [0, 1, 2]
        assert len({slot["task"] for slot in row["slots"]}) == 3
        for now, then in zip(row["slots"], following["slots"], strict=True):
            assert 4 <= now["horizon"] <= 12
            if now["step"] + 2 < now["horizon"]:
                expected = {"step": now["step"] + 2}
                expected |= {key: now[key] for key in ("episode", "task", "horizon")}
            else:
                expected = {"step": 0, "episode": now["episode"] + 3}
                begun += 1
            assert {key: then[key] for key in expected} == expected
    assert begun > 3
    assert {slot["task"] for row in rows for slot in row["slots"]} == {
        f"task-{n}" for n in range(4)
    }


def test_a_row_says_what_its_slots_found(tmp_path) -> None:
    trainer(tmp_path, tasks=tasks(), training=PLAIN, strategy=TINY).run()
    for row in metrics(tmp_path):
        slots = row["slots"]
        for key in ("meta_loss", "imitation_loss"):
            assert row[key] == pytest.approx(sum(slot[key] for slot in slots) / 2, rel=1e-5)
        for name in ("student", "adam", "sgd"):
            mean = sum(slot["last_loss"][name] for slot in slots) / 2
            assert row["last_loss"][name] == pytest.approx(mean)
        assert all(slot["grad_norm"] > 0 for slot in slots)
        assert row["grad_norm"] <= TINY.slot_clip * (1 + 1e-6)
        assert row["failed_episodes"] == 0


def test_horizons_are_log_uniform() -> None:
    sampler = Sampler(0, tasks(), (1.0, 1.0), replicates=1, particles=1, optimizees=1)
    horizons = torch.tensor(
        [50.0 * sampler.windows_of(number, 50, 100, 1600) for number in range(400)]
    )
    assert horizons.min() >= 100
    assert horizons.max() <= 1600
    # 200 of 400 lie below the geometric mean, 400 steps, with a standard deviation of 10.
    assert abs((horizons < 400).sum().item() + (horizons == 400).sum().item() / 2 - 200) < 35


def test_tasks_are_taken_by_weight_among_the_free() -> None:
    sampler = Sampler(0, tasks(3), (1.0, 3.0, 2.0), replicates=1, particles=1, optimizees=1)
    drawn = [sampler.task_of(number, [2]) for number in range(400)]
    # 300 of 400 in the mean, with a standard deviation of 8.7.
    assert abs(sum(drawn) - 300) < 35
    assert {sampler.task_of(number, [0, 1, 2]) for number in range(50)} == {0, 1, 2}


# ---- means and failures


def test_each_slot_is_clipped_and_then_the_mean_is_taken() -> None:
    student = tiny_student(3)
    grads = [torch.full_like(w, 1.0) for w in student.weights()]
    norm = math.sqrt(sum(g.numel() for g in grads))
    means = SlotMeans([student], 4)
    losses = torch.tensor([2.0, 3.0])
    how = {"stuck": False, "clip": 1.0}
    means.add(0, 0, grads, norm, losses, **how)
    means.add(1, 0, [0.01 * g for g in grads], 0.01 * norm, 2 * losses, **how)
    means.add(2, 0, [g * math.nan for g in grads], math.nan, losses, **how)
    means.add(3, 0, grads, norm, losses, **how | {"stuck": True})
    (mean,), (mean_norm,), mean_losses, failed = means.over_all()
    assert mean_norm == pytest.approx((1 + 0.01 * norm) / 4)
    for found in mean:
        assert torch.allclose(found, torch.full_like(found, (1 / norm + 0.01) / 4))
    assert mean_losses[:, 0].tolist() == [3.0, 4.5]
    assert failed == [False, False, True, True]


def test_an_episode_that_fails_makes_room_and_is_counted(tmp_path) -> None:
    good, bad = tasks()
    bad = replace(bad, loss=lambda out, target: out.sum() * math.nan)
    batch = MetaBatch(4, slots=2, unroll=2, shortest=8, longest=8)
    run = trainer(tmp_path, tasks=[good, bad], training=PLAIN, strategy=batch)
    before = [w.clone() for w in run.student.weights()]
    run.run()
    rows = metrics(tmp_path)
    assert [row["failed_episodes"] for row in rows] == [1, 2, 3, 4]
    assert [row["skipped_meta_steps"] for row in rows] == [0, 0, 0, 0]
    assert all(row["meta_loss"] is not None for row in rows)
    (at,) = {slot["slot"] for slot in rows[0]["slots"] if slot["task"] == bad.name}
    failed = [row["slots"][at] for row in rows]
    assert [slot["episode"] for slot in failed] == [at, at + 2, at + 4, at + 6]
    assert all(slot["step"] == 0 for slot in failed[1:])
    assert all(slot["grad_norm"] is None for slot in failed)
    assert not all(map(torch.equal, before, run.student.weights()))


def test_a_meta_step_in_which_every_slot_fails_is_skipped(tmp_path) -> None:
    bad = replace(linear_task(), loss=lambda out, target: out.sum() * math.nan)
    run = trainer(tmp_path, tasks=bad, training=PLAIN, strategy=TINY)
    before = [w.clone() for w in run.student.weights()]
    with pytest.raises(NothingLearned, match="all 4 meta-steps were skipped"):
        run.run()
    assert all(map(torch.equal, before, run.student.weights()))
    last = metrics(tmp_path)[-1]
    assert (last["skipped_meta_steps"], last["failed_episodes"]) == (4, 8)
    assert last["meta_loss"] is None
    assert last["grad_norm"] is None


# ---- the meta-optimizer's schedule


def test_the_rate_follows_its_schedule() -> None:
    constant = Training(meta_lr=0.5, meta_warmup=4)
    assert [constant.rate(step, None) for step in (0, 1, 3, 4, 999)] == [0.125, 0.25, 0.5, 0.5, 0.5]
    cosine = Training(meta_lr=0.5, meta_warmup=2, meta_schedule="cosine", meta_lr_end=0.1)
    assert [cosine.rate(step, 10) for step in (0, 1, 2, 6, 10, 50)] == pytest.approx(
        [0.25, 0.5, 0.5, 0.275, 0.05, 0.05]
    )
    assert replace(cosine, meta_schedule_steps=6).rate(4, 10) == pytest.approx(0.275)


@pytest.mark.parametrize("strategy", [TINY, Stages((Stage(2, 2, 0.1),), 3)], ids=["batch", "old"])
def test_the_meta_optimizer_has_the_schedules_rate_and_the_betas(strategy, tmp_path) -> None:
    training = replace(
        PLAIN, meta_betas=(0.8, 0.95), meta_schedule="cosine", meta_warmup=1, meta_lr=0.01
    )
    run = trainer(tmp_path, tasks=tasks(), training=training, strategy=strategy)
    (group,) = run._state.replicates[0]._optimizer.param_groups
    rates = []
    run.run(report=lambda row: rates.append(group["lr"]))
    assert rates == pytest.approx([0.01 * share for share in (1, 1, 0.75, 0.25)])
    assert group["betas"] == (0.8, 0.95)


def test_scheduled_runs_resume(tmp_path) -> None:
    training = replace(RESUMED, meta_schedule="cosine", meta_warmup=2, meta_lr_end=0.1)

    def run(folder):
        return trainer(folder, training=training, strategy=Stages((Stage(2, 2, 0.1),), 3))

    resumes_to_the_same_bits(run, tmp_path)


def test_a_cosine_needs_an_end(tmp_path) -> None:
    training = replace(PLAIN, meta_schedule="cosine")
    with pytest.raises(ValueError, match="meta_schedule_steps must be given for .* not None"):
        trainer(tmp_path, training=training, strategy=Curriculum())
    training = replace(training, meta_schedule_steps=100)
    assert trainer(tmp_path, training=training, strategy=Curriculum()).meta_step == 0


# ---- recipes

RECIPE: dict[str, Any] = {
    "tasks": [{"name": "digits-mlp", "batch_size": 16}, {"name": "digits-cnn", "batch_size": 8}],
    "teachers": [],
    "threads": 1,
    "student": {"hidden": 4, "layers": 1, "warmup_steps": 2},
    "training": {"validate_every": 0, "meta_schedule": "cosine", "meta_betas": [0.9, 0.99]},
    "strategy": {
        "kind": "meta-batch", "meta_steps": 3, "slots": 2, "unroll": 2, "shortest": 2, "longest": 6
    },
    "evaluation": {"tasks": ["digits-mlp"], "steps": 4, "seeds": 1},
}  # fmt: skip


def test_a_recipe_trains_by_meta_batches(tmp_path) -> None:
    recipe = recipes.from_dict(RECIPE)
    assert recipes.from_dict(recipe.as_dict()) == recipe
    assert recipe.strategy.settings.slot_clip == MetaBatch().slot_clip
    run = Experiment(recipe, tmp_path / "run")
    run.train()
    assert run.meta_steps == [3]
    rows = metrics(tmp_path / "run")
    assert {slot["task"] for row in rows for slot in row["slots"]} == {"digits-mlp", "digits-cnn"}
    assert (tmp_path / "run" / "plots" / "training.png").exists()


@pytest.mark.parametrize(
    ("table", "key", "value", "named"),
    [
        ("strategy", "slots", 0, "slots must be 1 or more, not 0"),
        ("strategy", "meta_steps", 0, "meta_steps must be 1 or more, not 0"),
        ("strategy", "shortest", 1, "shortest must be 2 or more, one window .*, not 1"),
        ("strategy", "longest", 1, "longest must be 2 or more, as shortest is, not 1"),
        ("strategy", "slot_clip", 0.0, "slot_clip must be positive and finite, not 0.0"),
        ("strategy", "imitation_weight", -1.0, "imitation_weight must be 0 or more and finite"),
        ("strategy", "slotz", 1, "'strategy.slotz'; the nearest is 'strategy.slots'"),
        ("training", "meta_betas", [0.9, 1.0], r"meta_betas must be in \[0, 1\)"),
        ("training", "meta_betas", [0.9], "meta_betas"),
        ("training", "meta_schedule", "linear", "meta_schedule: .*'constant' or 'cosine'"),
        ("training", "meta_warmup", -1, "meta_warmup must be 0 or more, not -1"),
        ("training", "meta_lr_end", -0.5, "meta_lr_end must be 0 or more and finite, not -0.5"),
        ("training", "meta_schedule_steps", 0, "meta_schedule_steps must be 1 or more, not 0"),
    ],
)
def test_bad_keys_are_named(table, key, value, named) -> None:
    with pytest.raises(RecipeError, match=named):
        recipes.from_dict({**RECIPE, table: {**RECIPE[table], key: value}})


def test_a_cosine_without_an_end_is_no_recipe() -> None:
    with pytest.raises(RecipeError, match="meta_schedule_steps must be given"):
        recipes.from_dict({**RECIPE, "strategy": {"kind": "curriculum"}})
