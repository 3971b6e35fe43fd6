"""What the trainer can be asked to run: every policy, strategy, estimator, perturbation, task."""

import math
from dataclasses import dataclass, replace
from itertools import count, pairwise

import numpy as np
import pytest
import torch
from runs import (
    linear_task,
    metrics,
    perturbation_of,
    policies,
    resumes_to_the_same_bits,
    tiny_student,
    trainer,
)
from torch import Tensor

from amalgam import weight_files
from amalgam.meta import (
    Curriculum,
    PersistentEvolution,
    Repeat,
    Stage,
    Stages,
    Trainer,
    Training,
    Truncation,
    Unroll,
    validation,
)
from amalgam.meta.curriculum import choice_strategy, simple
from amalgam.meta.estimators import ESTIMATORS
from amalgam.meta.objective import Amalgamation
from amalgam.meta.periods import INITIAL, Finish, Period, UnrollSettings
from amalgam.meta.perturbation import AdaptivePGD, Gaussian
from amalgam.meta.run_folder import PERIODS
from amalgam.meta.sampling import begin_episode, stacked_batches
from amalgam.policies import (
    PolicyTeacher,
    Pool,
    TorchTeacher,
)
from amalgam.seeding import generator_for
from amalgam.tasks.task import Batches

EVERY_STEP = Training(validate_every=2, validation_steps=4, validation_seeds=1, checkpoint_every=1)


@pytest.mark.parametrize("kind", policies())
def test_every_policy_is_trained_and_resumes(kind, tmp_path) -> None:
    before = policies()[kind].weights()

    def run(folder):
        return trainer(
            folder, policies()[kind], training=EVERY_STEP, strategy=Stages((Stage(1, 2, 0.1),), 3)
        )

    rows = resumes_to_the_same_bits(run, tmp_path)
    assert [row["skipped_meta_steps"] for row in rows] == [0, 0]
    trained = type(policies()[kind]).load(tmp_path / "whole" / "student.safetensors")
    assert not all(map(torch.equal, before, trained.weights()))


def test_teachers_of_all_kinds_resume(tmp_path) -> None:
    """A choice counts its steps, Muon has a momentum, AdamW a step count for biases alone."""
    muon = TorchTeacher("torch.optim.Muon", lr=0.02, others=("torch.optim.AdamW", {"lr": 0.01}))
    pool = ["adam", muon, PolicyTeacher(policies()["choice"])]

    def run(folder):
        return trainer(
            folder, pool=pool, training=EVERY_STEP, strategy=Stages((Stage(2, 2, 0.1),), 3)
        )

    rows = resumes_to_the_same_bits(run, tmp_path)
    assert set(rows[0]["loss"]) == {"student", "adam", "Muon", "choice"}


# ---- strategies


@dataclass(frozen=True)
class There:
    """Goes back to the period before, and to the initial weights, and keeps the third period."""

    goes_back = True
    meta_steps = None

    def next(self, records):
        unrolls = UnrollSettings(3, 2, 1, 1, 0.05)
        script = [
            (0, 0, INITIAL),
            (1, 0, "stage_0.0.0"),
            (1, 1, "stage_0.0.0"),
            (2, 0, INITIAL),
        ]
        if len(records) == len(script):
            return Finish("stage_0.1.1")
        period, repeat, begin_from = script[len(records)]
        return Period(0, period, repeat, begin_from, unrolls, 0.1, replace(unrolls, windows=1))


SHORT = {"unroll": 3, "episodes": 1}
ONE = UnrollSettings(3, 1, 1, 1, 0.05)
STRATEGIES = {
    "back": There(),
    "curriculum": Curriculum(
        **SHORT, num_stages=2, num_periods=1, num_chances=1, windows=(1, 2), imitation_weight=0.1
    ),
    "repeat": Repeat(**SHORT, num_periods=2, windows=(1, 2), validation=ONE),
    "simple": simple(**SHORT, num_periods=2, windows=2, validation=ONE),
    "choice": replace(choice_strategy(), **SHORT, num_periods=3, validation=ONE),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_resume(name, tmp_path) -> None:
    def run(folder):
        return trainer(folder, training=EVERY_STEP, strategy=STRATEGIES[name])

    rows = resumes_to_the_same_bits(run, tmp_path)
    periods = [row["period"] for row in rows if "period" in row]
    folder = tmp_path / "whole" / PERIODS
    assert {path.stem for path in folder.iterdir()} == {*periods, INITIAL}
    assert all(math.isfinite(row["meta_validation"]) for row in rows if "period" in row)


def test_a_strategy_goes_back(tmp_path) -> None:
    student = trainer(tmp_path, training=EVERY_STEP, strategy=There()).run()

    def kept(name: str) -> dict[str, Tensor]:
        return weight_files.read(tmp_path / PERIODS / f"{name}.safetensors", "period")[0]

    names = [INITIAL, "stage_0.0.0", "stage_0.1.0", "stage_0.1.1", "stage_0.2.0"]
    steps = [kept(name).get("optimizer.0.step", torch.zeros(())).item() for name in names]
    assert steps == [0, 2, 4, 4, 2]
    head = "student.head.weight"
    assert not torch.equal(kept("stage_0.1.0")[head], kept("stage_0.1.1")[head])
    assert torch.equal(student.head.weight, kept("stage_0.1.1")[head])
    assert student.provenance["kept_meta_step"] == "stage_0.1.1"


def test_a_curriculum_that_only_ever_gave_nan_keeps_the_initial_weights(
    tmp_path, monkeypatch
) -> None:
    run = trainer(tmp_path, training=EVERY_STEP, strategy=STRATEGIES["curriculum"])
    monkeypatch.setattr(validation, "by_meta_loss", lambda *of, **how: math.nan)
    before = [w.clone() for w in run.student.weights()]
    assert all(map(torch.equal, before, run.run().weights()))
    assert {row["meta_validation"] for row in metrics(tmp_path) if "period" in row} == {None}


def period_score(run) -> float:
    """What the strategy's first period would score now."""
    unrolls = run.strategy.next([]).validation
    return validation.by_meta_loss(
        run.student, run.tasks, unrolls, run.amalgamation, run.training, seed=run.seed
    )


def test_meta_validation_is_on_the_data_asked_for(tmp_path) -> None:
    def score(task, data: str) -> float:
        training = replace(EVERY_STEP, validation_data=data)
        run = trainer(tmp_path, tasks=task, training=training, strategy=STRATEGIES["curriculum"])
        return period_score(run)

    task = linear_task()
    assert score(task, "train") != score(task, "validation")
    same = replace(task, validation=task.train)
    assert score(same, "train") == score(same, "validation") == score(task, "train")


def broken_task():
    """A third of its batches hold a sample that is not finite."""
    task = linear_task()
    task.train[0][0] = math.nan
    return task


FAILING = {
    "stages": Stages((Stage(2, 4, 0.1),), 1),
    "simple": simple(unroll=1, episodes=1, num_periods=2, windows=4, validation=ONE),
}


@pytest.mark.parametrize("name", FAILING)
def test_an_episode_that_fails_makes_room_for_another(name, tmp_path) -> None:
    """A window of one step fails if its batch does; the next episode has the windows left."""

    training = Training(validate_every=0, checkpoint_every=1)

    def run(folder):
        return trainer(folder, tasks=broken_task(), training=training, strategy=FAILING[name])

    rows = resumes_to_the_same_bits(run, tmp_path)
    assert len(rows) == 8
    failed = [0, *(row["failed_episodes"] for row in rows)]
    assert 0 < failed[-1] < 8
    assert [row["skipped_meta_steps"] for row in rows] == failed[1:]
    for number, (row, following) in enumerate(pairwise(rows), 1):
        fails = failed[number] > failed[number - 1]
        assert fails == (row["skipped_steps"]["student"] == 1)
        over = fails or number == 4
        expected = (row["episode"] + over, 0 if over else row["window"] + 1)
        assert (following["episode"], following["window"]) == expected


def test_a_meta_validation_in_which_an_episode_fails_is_infinite(tmp_path) -> None:
    unrolls = UnrollSettings(1, 6, 1, 0, 0.0)
    how = Amalgamation(scale_spread=1.0, backend="reference")

    def score(task, data):
        training = Training(validation_data=data)
        return validation.by_meta_loss(tiny_student(7), [task], unrolls, how, training, seed=7)

    assert score(broken_task(), "train") == math.inf
    assert math.isfinite(score(broken_task(), "validation"))
    assert math.isfinite(score(linear_task(), "train"))


def test_the_episodes_of_a_meta_validation_are_those_that_each_runs_alone() -> None:
    unrolls, how = UnrollSettings(3, 2, 4, 1, 0.05), Amalgamation(scale_spread=1.0)
    task, student = linear_task(), tiny_student(7)

    def alone(number: int) -> list[float]:
        def generators(*purpose: str | int) -> list[torch.Generator]:
            return [generator_for(5, "validation", number, *purpose)]

        unroll, losses = Unroll(task, student, Pool([]), how), []
        warmup = stacked_batches(task, generators("warm-up"), 3)
        where = begin_episode(unroll, generators(), warmup, unrolls.warmup_lr)
        for window in range(unrolls.windows):
            ran = unroll.window(where, stacked_batches(task, generators(window), unrolls.unroll))
            losses.append(ran.meta_loss.item())
            where = ran.end
        return losses

    score = validation.by_meta_loss(
        student, [task], unrolls, how, Training(validation_data="train"), seed=5
    )
    losses = [loss for number in range(unrolls.episodes) for loss in alone(number)]
    assert len(set(losses)) == 8
    assert score == pytest.approx(sum(losses) / 8, rel=1e-6)


# ---- replicates


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"perturbation": Gaussian(0.01, relative=True)},
        {"perturbation": AdaptivePGD(2, 0.01)},
        {"training": Training(input_noise=0.1, optimizees=2, validate_every=0)},
    ],
    ids=["plain", "gaussian", "adversarial", "input-noise"],
)
def test_replicates_are_single_runs(changes, tmp_path) -> None:
    how = {"strategy": Stages((Stage(2, 2, 0.1),), 3)} | changes
    together = trainer(tmp_path / "all", [tiny_student(s) for s in (7, 8, 9)], **how)
    together.run()
    rows = metrics(tmp_path / "all")
    assert [row["replicate"] for row in rows] == [0, 1, 2] * 4
    for index, seed in enumerate((7, 8, 9)):
        alone = trainer(tmp_path / str(seed), seed=seed, **how).run()
        for one, other in zip(together.students[index].weights(), alone.weights(), strict=True):
            assert torch.allclose(one, other, atol=2e-5)
        saved = type(alone).load(tmp_path / "all" / f"replicate-{index}" / "student.safetensors")
        assert saved.provenance["seed"] == seed
        own = [row for row in rows if row["replicate"] == index]
        for row, single in zip(own, metrics(tmp_path / str(seed)), strict=True):
            for key in ("meta_loss", "imitation_loss", "grad_norm"):
                assert row[key] == pytest.approx(single[key], rel=2e-3, abs=1e-4)
            assert row["loss"] == pytest.approx(single["loss"], rel=1e-4)
            assert ("validation" in row) == ("validation" in single)


def test_replicates_resume(tmp_path) -> None:
    def run(folder):
        students = [tiny_student(s) for s in (7, 8)]
        return trainer(
            folder, students, training=EVERY_STEP, strategy=Stages((Stage(2, 2, 0.1),), 3)
        )

    resumes_to_the_same_bits(run, tmp_path)
    for cut in (1, 2):
        for index in (0, 1):
            name = f"replicate-{index}/student.safetensors"
            whole = (tmp_path / "whole" / name).read_bytes()
            assert (tmp_path / f"cut-{cut}" / name).read_bytes() == whole


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"strategy": simple()}, "strategy goes back .* 2 replicates"),
        ({"estimator": PersistentEvolution()}, "'pes' takes one student"),
        ({"task_weights": (1.0, 2.0)}, "task_weights must be 1 positive"),
    ],
)
def test_what_two_replicates_cannot_do_is_named(changes, named, tmp_path) -> None:
    with pytest.raises(ValueError, match=named):
        trainer(tmp_path, [tiny_student(7), tiny_student(8)], **changes)


def test_students_and_tasks_that_cannot_be_trained_are_named(tmp_path) -> None:
    one = tiny_student(7)
    with pytest.raises(ValueError, match="student must hold each replicate once"):
        trainer(tmp_path, [one, one])
    one.head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"but 'head.weight' requires none; student.requires_gr"):
        trainer(tmp_path, [one])
    with pytest.raises(ValueError, match="task must be one or more, not none"):
        Trainer(tiny_student(7), [], Pool(["adam"]), folder=tmp_path)
    two = [linear_task(4, "a"), linear_task(3, "b")]
    for weights in ((1.0, 1e39), (1.0, 1e-50), (1.0, math.nan)):
        with pytest.raises(ValueError, match="task_weights must be 2 positive numbers, a task"):
            trainer(tmp_path, tasks=two, task_weights=weights)
    trainer(tmp_path, tasks=two, task_weights=np.array([1, 3])).run()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"training": Training(optimizees=2)}, "'pes' takes one student with one optimizee"),
        ({"training": Training(input_noise=0.1)}, "'pes' perturbs weights itself"),
        ({"perturbation": Gaussian()}, "'pes' perturbs weights itself"),
    ],
)
def test_what_evolution_cannot_do_is_named(changes, named, tmp_path) -> None:
    with pytest.raises(ValueError, match=named):
        trainer(tmp_path, estimator=PersistentEvolution(), **changes)
    assert trainer(tmp_path, estimator=Truncation(), **changes).meta_step == 0


# ---- losses, tasks


def test_il_modes(tmp_path) -> None:
    number = count()

    def trained(mode: str, weight: float) -> list[Tensor]:
        return (
            trainer(
                tmp_path / f"{mode}-{weight}-{next(number)}",
                training=Training(validate_every=0, il_mode=mode),
                strategy=Stages((Stage(3, 1, weight),), 3),
            )
            .run()
            .weights()
        )

    def same(one, other) -> bool:
        return all(map(torch.equal, one, other))

    meta, imitation = trained("meta", 0.3), trained("imitation", 0.3)
    assert same(meta, trained("sum", 0.0))
    assert same(meta, trained("switch", 0.0))
    assert same(imitation, trained("switch", 1.0))
    assert not same(meta, imitation)
    assert not same(trained("sum", 0.3), meta)
    assert not same(trained("switch", 0.5), meta)
    assert not same(trained("switch", 0.5), imitation)


@pytest.mark.parametrize("kind", ["student", "nominal", "scale"])
def test_several_tasks(kind, tmp_path) -> None:
    """Also of several sizes, for a policy whose state depends on them."""

    def run(folder):
        return trainer(
            folder,
            policies()[kind],
            tasks=[linear_task(4, "four"), linear_task(3, "three")],
            task_weights=(1.0, 2.0),
            training=EVERY_STEP,
            strategy=Stages((Stage(5, 2, 0.1),), 3),
            seed=8,
        )

    rows = resumes_to_the_same_bits(run, tmp_path)
    taken = [row["task"] for row in rows]
    assert set(taken) == {"four", "three"}
    assert taken[::2] == taken[1::2]
    assert sum("validation" in row for row in rows) == 5


def test_tasks_are_taken_by_weight(tmp_path) -> None:
    run = trainer(
        tmp_path, tasks=[linear_task(4, "a"), linear_task(3, "b")], task_weights=(1.0, 3.0)
    )
    taken = [run._meta_steps._sampler.task_of(episode) for episode in range(400)]
    # 300 of 400 in the mean, with a standard deviation of 8.7.
    assert abs(sum(taken) - 300) < 35


# ---- estimators and perturbations


def one_window(student, particles: int = 1, pool=("adam",)):
    """An unroll and what a window of it needs."""
    unroll = Unroll(
        linear_task(),
        [student] * particles,
        Pool(pool),
        Amalgamation(scale_spread=0.5, backend="reference"),
    )
    begin = unroll.begin(*(generator_for(1) for _ in range(particles)))
    task = unroll.task
    batches = Batches.stack([task.batches(generator_for(2), 4) for _ in range(particles)])
    return unroll, begin, batches


def numbers(student: int, *purpose) -> torch.Generator:
    return generator_for(student, *purpose)


def through_window(student, perturbation=None):
    """Back-propagation through that window."""
    window = one_window(student)
    return Truncation().estimate(*window, (1.0, 0.1), numbers, perturbation=perturbation)


def test_pes_points_where_back_propagation_does() -> None:
    student = tiny_student(3, hidden=2)
    pes = PersistentEvolution(std=0.003, pairs=256)
    exact = through_window(student)
    unroll, begin, batches = one_window(student, pes.particles)
    guess = pes.estimate(unroll, begin, batches, (1.0, 0.1), numbers)
    one, other = (torch.cat([g.flatten() for g in e.grads[0]]) for e in (exact, guess))
    # 43 weights, 256 pairs: the estimate's own noise alone leaves sqrt(256 / 299) = 0.93.
    assert torch.cosine_similarity(one, other, dim=0) > 0.8
    assert 0.7 < other.norm() / one.norm() < 1.5
    assert guess.loss.item() == pytest.approx(exact.loss.item(), abs=0.01)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_have_names(name) -> None:
    estimator = ESTIMATORS[name]()
    assert estimator.particles == {"truncation": 1, "pes": 16}[name]
    window = one_window(tiny_student(3), estimator.particles)
    estimate = estimator.estimate(*window, (1.0, 0.1), numbers)
    assert len(estimate.carried) == (len(estimate.grads[0]) if name == "pes" else 0)
    assert all(grad.any() for grad in estimate.grads[0][-2:])


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"std": 0.0}, "std must be positive and finite, not 0.0"),
        ({"std": math.inf}, "std must be positive and finite, not inf"),
        ({"pairs": 0}, "pairs must be 1 or more, not 0"),
    ],
)
def test_evolution_that_cannot_be_run_is_named(wrong, named) -> None:
    with pytest.raises(ValueError, match=named):
        PersistentEvolution(**wrong)


def test_pes_sums_an_episodes_perturbations() -> None:
    student = tiny_student(3, hidden=2)
    pes = PersistentEvolution(std=0.01, pairs=2)
    unroll, begin, batches = one_window(student, pes.particles)
    first = pes.estimate(unroll, begin, batches, (1.0, 0.0), numbers)
    again = pes.estimate(unroll, begin, batches, (1.0, 0.0), numbers, carried=first.carried)
    for once, twice in zip(first.carried, again.carried, strict=True):
        assert torch.allclose(2 * once, twice)


@pytest.mark.parametrize("kind", ["student", "nominal"])
def test_pes_resumes(kind, tmp_path) -> None:
    def run(folder):
        return trainer(
            folder,
            policies()[kind],
            training=EVERY_STEP,
            strategy=Stages((Stage(2, 2, 0.1),), 3),
            estimator=PersistentEvolution(pairs=2),
        )

    rows = resumes_to_the_same_bits(run, tmp_path)
    assert rows[-1]["skipped_meta_steps"] == 0


@pytest.mark.parametrize("kind", ["fgsm", "pgd", "pgd_clipped_gradient", "adaptive_pgd", "cgd"])
def test_adversaries_raise_the_loss(kind) -> None:
    student = tiny_student(3)
    steps = {} if kind == "fgsm" else {"steps": 3}
    plain = through_window(student)
    moved = through_window(student, perturbation_of(kind, **steps))
    assert moved.loss.item() > plain.loss.item() + 1e-5
    assert not all(map(torch.equal, plain.grads[0], moved.grads[0]))


def test_fresh_noise_is_not_persistent_noise() -> None:
    student = tiny_student(3)
    plain, fresh, persistent = (
        through_window(student, noise).loss.item()
        for noise in (
            None,
            Gaussian(0.05, fresh_each_step=True),
            Gaussian(0.05, fresh_each_step=False),
        )
    )
    assert len({plain, fresh, persistent}) == 3
    again = through_window(student, Gaussian(0.05, fresh_each_step=False))
    assert again.loss.item() == persistent


@pytest.mark.parametrize("noise", [Gaussian(0.5), AdaptivePGD(1, 0.5)])
def test_validation_is_without_noise(noise, tmp_path) -> None:
    noisy = replace(EVERY_STEP, input_noise=1.0)

    def scores(training: Training, perturbation) -> tuple[float, float]:
        run = trainer(
            tmp_path,
            training=training,
            perturbation=perturbation,
            strategy=STRATEGIES["curriculum"],
        )
        return period_score(run), run._validate(0)

    assert scores(EVERY_STEP, None) == scores(noisy, noise)


@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        ("gaussian_rel", "student"),
        ("persistent_gaussian", "student"),
        ("persistent_gaussian", "nominal"),
        ("adaptive_pgd", "student"),
        ("adaptive_pgd", "nominal"),
    ],
)
def test_perturbed_runs_resume(kind, policy, tmp_path) -> None:
    def run(folder):
        training = replace(EVERY_STEP, input_noise=0.01)
        return trainer(
            folder,
            policies()[policy],
            training=training,
            strategy=Stages((Stage(2, 2, 0.1),), 3),
            perturbation=perturbation_of(kind),
        )

    resumes_to_the_same_bits(run, tmp_path)
