"""A window as anybody would write it, by plain autograd: the truth for the unroll engine.

Slow, and its memory grows with every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from amalgam.meta.unroll import Amalgamation, Trajectories
from amalgam.ops import teacher_distance
from amalgam.policies import Pool, Student
from amalgam.tasks import Batch, Task


def window(
    task: Task,
    student: Student,
    pool: Pool,
    how: Amalgamation,
    begin: Trajectories,
    batches: Sequence[Batch],
    weights: Sequence[Sequence[Tensor]],
    row: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """One row's meta-loss, imitation loss and final parameters.

    Args:
        task: Its task.
        student: Whose step it is.
        pool: The teachers.
        how: The losses.
        begin: Where everybody stands; of one student, or of one a row.
        batches: One a step, each tensor (R, samples, ...).
        weights: What the student steps with at each step.
        row: Which row.

    Returns:
        Two scalars in the weights' graph, and parameters of shape (N,).
    """
    scale, n = begin.scale[row], begin.scale.shape[1]
    params = begin.params[row].detach().requires_grad_()
    each = len(begin.params) // len(begin.states)
    mine = slice(row % each * n, row % each * n + n)
    state: Any = begin.states[row // each]
    state = type(state)(*(t[..., mine] for t in state))
    teachers = begin.teacher_params[:, row]
    mine = slice(row * n, row * n + n)
    (teacher_state,) = begin.teacher_state
    teacher_state = type(teacher_state)(*(t[..., mine] for t in teacher_state))
    meta = imitation = params.new_zeros(())
    start = None
    for t, stacked in enumerate(batches):
        batch = tuple(tensor[row] for tensor in stacked)
        loss = task.objective(params * scale, batch)
        (grad,) = torch.autograd.grad(loss, params, create_graph=True)
        if not how.second_order:
            grad = grad.detach()
        if start is None or how.normaliser == "every-batch":
            start = task.objective(begin.params[row] * scale, batch).detach()
        if how.log_objective:
            meta = meta + ((loss + how.eps).log() - (start + how.eps).log()) / len(batches)
        else:
            meta = meta + loss / (start + how.eps) / len(batches)
        update, state = student.step(grad, state, weights[t], backend="reference")
        params = params - update

        grads = []
        for teacher in teachers:
            leaf = teacher.detach().requires_grad_()
            (of,) = torch.autograd.grad(task.objective(leaf * scale, batch), leaf)
            grads.append(of if how.scale_teachers else of / scale)
        with torch.no_grad():
            updates, teacher_state = pool.step(
                torch.stack(grads), teacher_state, backend="reference"
            )
            teachers = teachers - (updates if how.scale_teachers else updates / scale)
        distance = teacher_distance(
            params, teachers, eps=how.eps, huber_delta=how.huber_delta, backend="reference"
        )
        reduced = distance.mean() if how.mechanism == "mean" else distance.max()
        imitation = imitation + (reduced if how.log_objective else reduced.exp()) / len(batches)
    return meta, imitation, params
