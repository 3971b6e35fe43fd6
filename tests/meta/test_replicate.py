"""A replicate's averaged weights: what they are, who looks at them, and what a run keeps."""

import math
from typing import Any

import pytest
import torch
from runs import Killed, killer, metrics, resumes_to_the_same_bits, tiny_student, trainer
from test_runs import There
from torch import Tensor

from amalgam import recipes, weight_files
from amalgam.meta import MetaBatch, Stage, Stages, Training, validation
from amalgam.meta.replicate import Replicate
from amalgam.meta.run_folder import CHECKPOINT, PERIODS
from amalgam.policies import Policy
from amalgam.seeding import generator_for, normal_like


def averaged(decay: float, history: list[list[Tensor]]) -> list[Tensor]:
    """The bias-corrected moving average of weights, written out in float64."""
    n = len(history)
    shares = [(1 - decay) * decay ** (n - 1 - i) / (1 - decay**n) for i in range(n)]
    assert sum(shares) == pytest.approx(1)
    return [
        sum(share * w.double() for share, w in zip(shares, of_one, strict=True))  # type: ignore[misc]
        for of_one in zip(*history, strict=True)
    ]


def copies(policy: Policy) -> list[Tensor]:
    return [w.detach().clone() for w in policy.weights()]


def assert_close(policy: Policy, weights: list[Tensor]) -> None:
    for one, other in zip(policy.weights(), weights, strict=True):
        assert torch.allclose(one.double(), other.double(), rtol=1e-6, atol=1e-7)


def test_the_average_is_corrected_for_its_beginning() -> None:
    student = tiny_student(3)
    replicate = Replicate(student, Training(average=0.9))
    assert_close(replicate.judged, copies(student))
    history = []
    for step in range(6):
        grads = [normal_like(w, generator_for(step), w.shape) for w in student.weights()]
        replicate.update(grads, 1.0, 1.0 if step != 3 else math.nan, 0.01)
        if step != 3:  # a meta-step that is skipped is none
            history.append(copies(student))
        assert_close(replicate.judged, averaged(0.9, history))
    assert replicate.skipped_meta_steps == 1
    assert not torch.allclose(replicate.judged.weights()[0], student.weights()[0], rtol=1e-3)


def test_without_an_average_the_student_is_judged() -> None:
    student = tiny_student(3)
    replicate = Replicate(student, Training())
    assert replicate.judged is student
    assert not any(name.startswith("average") for name in replicate.tensors())


HOW: dict[str, Any] = {"strategy": Stages((Stage(2, 2, 0.1),), 3)}


def run_of(folder: Any, average: float, every: int = 0, **how: Any) -> tuple[Any, list[Any]]:
    """A run that is over, and the weights that were trained, after each meta-step."""
    training = Training(
        average=average, validate_every=every, validation_steps=4, validation_seeds=1
    )
    run = trainer(folder, training=training, **(HOW | how))
    history: list[Any] = []
    run.run(report=lambda row: history.append([copies(one) for one in run.students]))
    return run, history


def test_a_run_trains_the_weights_and_keeps_their_average(tmp_path) -> None:
    run, history = run_of(tmp_path / "averaged", 0.8)
    plain, others = run_of(tmp_path / "plain", 0.0)
    assert len(history) == 4
    for ours, theirs in zip(history, others, strict=True):
        assert all(map(torch.equal, ours[0], theirs[0]))
    assert metrics(tmp_path / "averaged") == metrics(tmp_path / "plain")
    assert_close(run.student, averaged(0.8, [step[0] for step in history]))
    assert run.student.provenance["kept_meta_step"] == 4
    saved = type(run.student).load(tmp_path / "averaged" / "student.safetensors")
    assert all(map(torch.equal, saved.weights(), run.student.weights()))
    assert not torch.allclose(plain.student.weights()[0], saved.weights()[0], rtol=1e-4)
    stored, _ = weight_files.read(tmp_path / "averaged" / CHECKPOINT, "checkpoint")
    assert torch.equal(stored["student.head.weight"], history[-1][0][-2].view_as(saved.head.weight))
    assert torch.equal(stored["average.module.head.weight"], saved.head.weight)


def test_meta_validations_are_of_the_average(tmp_path) -> None:
    run, history = run_of(tmp_path, 0.8, every=1)
    scores = [row["validation"] for row in metrics(tmp_path)]
    best = min(range(4), key=scores.__getitem__)
    assert run.student.provenance["kept_meta_step"] == best + 1
    for step, score in enumerate(scores):
        kept = averaged(0.8, [of[0] for of in history[: step + 1]])
        if step == best:
            assert_close(run.student, kept)
        student = tiny_student(7)
        with torch.no_grad():
            for weight, value in zip(student.weights(), kept, strict=True):
                weight.copy_(value)
        again = validation.of_student(
            student, run.tasks, run.training, run.amalgamation, seed=7, device=run.device
        )
        assert score == pytest.approx(again, rel=1e-5)


def test_replicates_have_averages_of_their_own(tmp_path) -> None:
    run, history = run_of(tmp_path, 0.8, students=[tiny_student(7), tiny_student(8)])
    for index, student in enumerate(run.students):
        assert_close(student, averaged(0.8, [step[index] for step in history]))


AVERAGED = Training(
    average=0.7, validate_every=2, validation_steps=2, validation_seeds=1, checkpoint_every=1
)


def test_runs_resume(tmp_path) -> None:
    def run(folder):
        students = [tiny_student(7), tiny_student(8)]
        strategy = MetaBatch(3, slots=2, unroll=2, shortest=2, longest=4)
        return trainer(folder, students, training=AVERAGED, strategy=strategy)

    resumes_to_the_same_bits(run, tmp_path)


def test_going_back_goes_back_to_the_average(tmp_path) -> None:
    def run(folder):
        return trainer(folder, training=AVERAGED, strategy=There())

    student = run(tmp_path / "whole").run()
    with pytest.raises(Killed):
        run(tmp_path / "cut").run(report=killer(5))
    resumed = run(tmp_path / "cut").run(resume=True)
    assert all(map(torch.equal, student.weights(), resumed.weights()))
    periods = tmp_path / "whole" / PERIODS
    kept, _ = weight_files.read(periods / "stage_0.1.1.safetensors", "period")
    assert torch.equal(student.head.weight, kept["average.module.head.weight"])
    assert not torch.equal(student.head.weight, kept["student.head.weight"])
    # Two meta-steps came before this period, and two are its own; the one from the beginning has 2.
    counts = [
        weight_files.read(periods / f"stage_0.{name}.safetensors", "period")[0][
            "average.n_averaged"
        ].item()
        for name in ("0.0", "1.1", "2.0")
    ]
    assert counts == [2, 4, 2]


@pytest.mark.parametrize("wrong", [1.0, -0.5, float("nan")])
def test_a_decay_that_averages_nothing_is_named(wrong) -> None:
    with pytest.raises(ValueError, match=r"average must be in \[0, 1\), not"):
        Training(average=wrong)


def test_a_recipe_averages() -> None:
    task = {"name": "digits-mlp", "batch_size": 16}
    recipe = recipes.from_dict({"task": task, "teachers": [], "training": {"average": 0.99}})
    assert recipe.training.average == 0.99
    assert recipes.from_dict(recipe.as_dict()) == recipe
