"""Meta-gradients of the nominal student, which is told of tensors, against plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_window import (
    POOL,
    STEPS,
    Net,
    assert_same,
    conditions_of,
    episode,
    gradients_of,
    row_of,
    task_of,
)
from torch import Tensor

from amalgam.meta import Amalgamation, Memory, Unroll
from amalgam.meta import tape as tape_module
from amalgam.meta.reference import window as naive_window
from amalgam.policies import NominalConfig, NominalStudent
from amalgam.policies.nominal_student import INPUTS
from amalgam.seeding import generator_for


def learners(count: int, **config: Any) -> list[NominalStudent]:
    """Students whose heads do something."""
    found = []
    for index in range(count):
        generator = torch.Generator().manual_seed(3 + index)
        given = {
            "hidden": 5,
            "inputs": tuple(INPUTS),
            "rate_warmup": 3,
            "pacing": 0.2,
            "steady_agreement": 0.1,
            "pacing_steps": 4,
            **config,
        }
        student = NominalStudent(NominalConfig(**given), generator=generator).double()
        with torch.no_grad():
            for weight in (student.head.weight, student.head.bias, student.cells[0].bias):
                noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
                weight.add_(0.4 * noise)
        found.append(student)
    return found


def total_of(
    unroll: Unroll, begin: Any, batches: Any, weights: list[list[Tensor]], **how: Any
) -> tuple[Tensor, list[Tensor]]:
    """Both losses by plain autograd, of all rows; and each row's final parameters."""
    total, params = torch.zeros((), dtype=torch.float64), []
    for row in range(unroll.rows):
        student = unroll.students[row // unroll.optimizees]
        own = [weights[row // unroll.optimizees]] * STEPS
        meta, imitation, after = naive_window(
            unroll.task, student, POOL, unroll.amalgamation, begin, batches, own, row, **how
        )
        total = total + (meta + 0.3 * imitation) / unroll.optimizees
        params.append(after)
    return total, params


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("memory", [Memory(), Memory(segment=3)], ids=["all", "segments"])
@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize(("replicates", "optimizees"), [(1, 1), (2, 2)])
def test_meta_gradient_is_autograds(
    scheduled: bool,
    orthogonal: bool,
    second_order: bool,
    memory: Memory,
    replicates: int,
    optimizees: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Parts that begin and end inside tensors.
    monkeypatch.setattr(tape_module, "_LEAST_CHUNK", 7)
    students = learners(replicates, orthogonal=orthogonal)
    how = Amalgamation(second_order=second_order, scale_spread=1.0)
    unroll = Unroll(task_of(Net), students, POOL, how, memory=memory, optimizees=optimizees)
    begin, batches = episode(unroll)
    assert (begin.state.t == 3).all()
    # A schedule has shortened the steps that a pace then does not.
    conditions = conditions_of(unroll.rows) if scheduled else None
    window = unroll.window(begin, batches, conditions=conditions)
    weights = [student.weights() for student in students]
    loss = (window.meta_loss + 0.3 * window.imitation_loss).sum()
    total, params = total_of(unroll, begin, batches, weights, conditions=conditions)
    for ours, theirs in zip(window.end.params, params, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-11, atol=1e-13)
    assert loss.item() == pytest.approx(total.item(), rel=1e-10)
    assert_same(gradients_of(loss, weights), gradients_of(total, weights), 1e-8)


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("second_order", [True, False])
def test_a_row_that_stands_still_counts_no_step(second_order: bool, orthogonal: bool) -> None:
    (student,) = learners(1, orthogonal=orthogonal)
    how = Amalgamation(second_order=second_order, scale_spread=1.0)
    unroll = Unroll(task_of(Net), student, POOL, how, memory=Memory(segment=3), optimizees=2)
    begin, batches = episode(unroll)
    for at in (0, 4):
        x, y = batches[at]
        x = x.clone()
        x[1] = float("nan")
        batches[at] = (x, y)
    window = unroll.window(begin, batches)
    assert window.skipped[:, 0].tolist() == [0, 2]
    tensors = len(unroll.task.layout.sizes)
    steps = 3 + STEPS
    assert window.end.state.t.tolist() == [[steps] * tensors + [steps - 2] * tensors]
    alone = Unroll(unroll.task, student, POOL, how)
    theirs = []
    for row in range(2):
        one = alone.window(*row_of(begin, batches, row))
        assert torch.allclose(one.end.params[0], window.end.params[row], rtol=1e-11)
        loss = (one.meta_loss + one.imitation_loss).sum() / 2
        theirs.append(gradients_of(loss, [student.weights()]))
    ours = gradients_of((window.meta_loss + window.imitation_loss).sum(), [student.weights()])
    assert_same(ours, [a + b for a, b in zip(*theirs, strict=True)], 1e-8)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_a_student_that_stands_still_for_a_window_has_no_gradient(orthogonal: bool) -> None:
    (student,) = learners(1, orthogonal=orthogonal)
    unroll = Unroll(task_of(Net), student, POOL, Amalgamation(second_order=False))
    begin, batches = episode(unroll)
    window = unroll.window(begin, [(x * float("nan"), y) for x, y in batches])
    grads = gradients_of(window.meta_loss.sum(), [student.weights()])
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("inputs", [(), ("rms",), ("rank", "time")])
def test_any_inputs_may_be_left_out(inputs: tuple[str, ...]) -> None:
    (student,) = learners(1, inputs=inputs)
    for second_order in (True, False):
        how = Amalgamation(second_order=second_order)
        unroll = Unroll(task_of(Net), student, POOL, how)
        begin, batches = episode(unroll)
        window = unroll.window(begin, batches)
        loss = (window.meta_loss + 0.3 * window.imitation_loss).sum()
        total, _ = total_of(unroll, begin, batches, [student.weights()])
        weights = [student.weights()]
        assert_same(gradients_of(loss, weights), gradients_of(total, weights), 1e-8)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_weights_may_be_perturbed_anew_at_every_step(orthogonal: bool) -> None:
    (student,) = learners(1, orthogonal=orthogonal)
    unroll = Unroll(task_of(Net), student, POOL, Amalgamation(second_order=False))
    begin, batches = episode(unroll)
    weights = student.weights()

    def noise(t: int) -> list[list[Tensor]]:
        generator = generator_for(7, "noise", t)
        return [[0.02 * torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights]]

    window = unroll.window(begin, batches, noise=noise)
    ours = gradients_of((window.meta_loss + window.imitation_loss).sum(), [weights])
    noisy = [[w + z for w, z in zip(weights, noise(t)[0], strict=True)] for t in range(STEPS)]
    how = unroll.amalgamation
    meta, imitation, _ = naive_window(unroll.task, student, POOL, how, begin, batches, noisy)
    assert_same(ours, gradients_of(meta + imitation, [weights]), 1e-8)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_bits_do_not_depend_on_what_is_kept(orthogonal: bool) -> None:
    (student,) = learners(1, orthogonal=orthogonal)
    student.float()
    found = []
    for memory in (Memory(), Memory(segment=1), Memory(segment=3)):
        unroll = Unroll(
            task_of(Net, torch.float32), student, POOL, Amalgamation(), memory=memory, optimizees=2
        )
        begin, batches = episode(unroll)
        for _ in range(2):  # the second window steps in memory of the first
            window = unroll.window(begin, batches)
            grads = gradients_of(window.meta_loss + window.imitation_loss, [student.weights()])
            found.append([*grads, window.end.params, *window.end.state])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("second_order", [True, False])
def test_a_window_of_no_steps_has_gradients_of_zero(second_order: bool) -> None:
    students = learners(1)
    how = Amalgamation(second_order=second_order, scale_spread=1.0)
    unroll = Unroll(task_of(Net), students, POOL, how)
    begin, _ = episode(unroll)
    window = unroll.window(begin, [])
    loss = (window.meta_loss + window.imitation_loss).sum()
    found = gradients_of(loss, [student.weights() for student in students])
    assert all(not gradient.any() for gradient in found)
