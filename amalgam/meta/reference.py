"""One window by plain autograd, against which :meth:`amalgam.meta.Unroll.window` is tested.

It is slow, and its memory grows with every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from amalgam.layout import Layout
from amalgam.meta.conditions import StepConditions
from amalgam.meta.episode import Trajectories
from amalgam.meta.objective import Amalgamation
from amalgam.meta.on_policy import OnPolicy
from amalgam.meta.teaching import Teaching
from amalgam.ops import teacher_distance
from amalgam.policies import FusedStudent, Pool
from amalgam.tasks import Batch, Task
from amalgam.tasks.task import row_of


def window(
    task: Task,
    student: FusedStudent,
    pool: Pool,
    how: Amalgamation,
    begin: Trajectories,
    batches: Sequence[Batch],
    weights: Sequence[Sequence[Tensor]],
    row: int = 0,
    conditions: StepConditions | None = None,
    teaching: Teaching | None = None,
    held_out: Sequence[Batch] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The meta-loss, the imitation loss and the final parameters of one row.

    Args:
        task: The task.
        student: The student whose steps are taken.
        pool: The teachers, all of which work coordinate by coordinate.
        how: Settings of the losses.
        begin: Where students and teachers stand.
        batches: One batch per step, each tensor of shape (R, samples, ...).
        weights: The student's weights at each step.
        row: The row's number.
        conditions: Learning rates, weight decay and loss scales of the student's steps.
        teaching: The teachers' decaying rates, and on-policy teachers' part in the steps.
        held_out: One batch per step, for the meta-loss; where ``None``, those of the steps.

    Returns:
        The two losses, scalars in the weights' graph, and the scaled parameters, shape (N,).
    """
    scale, n = begin.scale[row], begin.scale.shape[1]
    params = begin.params[row].detach().requires_grad_()
    each = len(begin.params) // len(begin.state.m)
    state: Any = type(begin.state)(*(tensor[row // each] for tensor in begin.state))

    def of_row(tensor: Tensor) -> Tensor:
        width = tensor.shape[-1] // each
        return tensor[..., row % each * width : (row % each + 1) * width]

    state = type(state)(*map(of_row, state))
    teachers = begin.teacher_params[:, row]
    in_pool = slice(row * n, row * n + n)
    (teacher_state,) = begin.teacher_state
    m, v = (moment[..., in_pool] for moment in (teacher_state.m, teacher_state.v))
    teacher_state = teacher_state._replace(m=m, v=v)
    imitation = params.new_zeros(())
    terms: list[Tensor] = []
    start = None
    for t, stacked in enumerate(batches):
        batch = row_of(stacked, row)
        loss = task.objective(params * scale, batch)
        (grad,) = torch.autograd.grad(loss, params, create_graph=True)
        if not how.second_order:
            grad = grad.detach()
        taken = batch
        if held_out is not None:
            taken = row_of(held_out[t], row)
            loss = task.objective(params * scale, taken)
        if start is None or how.normaliser == "every-batch":
            start = task.objective(begin.params[row] * scale, taken).detach()
        if how.log_objective:
            terms.append((loss + how.eps).log() - (start + how.eps).log())
        else:
            terms.append(loss / (start.abs() + how.eps))
        lr, kept, loss_scale = 1.0, 1.0, 1.0
        of_schedule: dict[str, Any] = {}
        if conditions is not None:
            lr, kept = (numbers[t, row].item() for numbers in conditions[:2])
            loss_scale = conditions.loss_scale[row].item()
            if isinstance(student, FusedStudent):
                of_schedule["left"] = conditions.left[t, row].item()
        update, state = student.step(
            grad * loss_scale, state, weights[t], layout=task.layout, params=params,
            backend="reference", **of_schedule,
        )  # fmt: skip

        grads = []
        for teacher in teachers:
            slope = grad.detach()
            if how.on_policy is None:
                leaf = teacher.detach().requires_grad_()
                (slope,) = torch.autograd.grad(task.objective(leaf * scale, batch), leaf)
            grads.append(slope if how.scale_teachers else slope / scale)
        with torch.no_grad():
            updates, teacher_state = pool.step(
                torch.stack(grads), teacher_state, backend="reference"
            )
            updates = updates if how.scale_teachers else updates / scale
            if teaching is not None and teaching.factors is not None:
                updates = updates * teaching.factors[t, :, None]
            teachers = teachers - updates
        executed = update
        if teaching is not None and teaching.executed is not None:
            executed = (1 - teaching.fade) * update + teaching.fade * updates[
                teaching.executed[row]
            ]
        params = params * kept - lr * executed
        if how.on_policy is None:
            distance = teacher_distance(
                params, teachers, eps=how.eps, huber_delta=how.huber_delta, backend="reference"
            )
        else:
            distance = _on_policy_terms(how.on_policy, update, updates, task.layout)
        reduced = distance.mean() if how.mechanism == "mean" else distance.max()
        imitation = imitation + (reduced.exp() if how.exp_distances else reduced) / len(batches)
    meta = terms[-1] if how.objective == "final" else torch.stack(terms).mean()
    return meta, imitation, params


def _on_policy_terms(how: OnPolicy, update: Tensor, updates: Tensor, layout: Layout) -> Tensor:
    """Each teacher's term in one step, shape (K,), of updates that move every tensor."""
    own, terms = layout.unflatten(update), []
    for teacher in updates:
        by_tensor = [
            how.direction * (1 - torch.cosine_similarity(own[name].flatten(), u.flatten(), 0))
            + how.magnitude * (own[name].norm() / u.norm()).log().square()
            for name, u in layout.unflatten(teacher).items()
        ]
        terms.append(torch.stack(by_tensor).mean())
    return torch.stack(terms)
