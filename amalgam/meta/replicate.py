"""A replicate: one student in training, with its meta-optimizer and its best weights so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from amalgam import nests
from amalgam.meta.clipping import clip_adaptively
from amalgam.meta.training import Training
from amalgam.policies import Policy

# Torch's eps stands beside the bias-corrected root, as Keras's nearly does; this is Keras's value.
_META_EPS = 1e-7


class Replicate:
    """One student of a run, its meta-optimizer, and its weights of the best meta-validation.

    Args:
        student: The student, which is trained in place.
        training: Of it ``meta_betas``, ``clip_ratio``, ``clip_floor`` and ``average`` are read.

    Attributes:
        student: The student, with the weights that are trained.
        skipped_meta_steps: How many meta-steps left the weights as they were; see :meth:`update`.
        best_score: The lowest score of its meta-validations so far; infinite before the first.
        best_meta_step: The meta-step after which it had that score.
    """

    def __init__(self, student: Policy, training: Training) -> None:
        self.student = student
        self.skipped_meta_steps = 0
        self.best_score = math.inf
        self.best_meta_step = 0
        self._training = training
        self._best = _weights_of(student)
        self._average = None
        if training.average:
            self._average = AveragedModel(student, multi_avg_fn=_moving_average(training.average))
        self._optimizer = torch.optim.Adam(
            student.parameters(), lr=training.meta_lr, betas=training.meta_betas, eps=_META_EPS
        )

    @property
    def judged(self) -> Policy:
        """The policy to meta-validate and keep: the student, or one with its averaged weights."""
        if self._average is None:
            return self.student
        averaged = self._average.module
        assert isinstance(averaged, Policy)
        return averaged

    def update(self, grads: Sequence[Tensor], norm: float, loss: float, rate: float) -> None:
        """Clip a meta-gradient, step the meta-optimizer, and average the weights if asked to.

        The step is skipped if the gradient's norm or the loss is not finite.

        Args:
            grads: The meta-gradient, averaged over the processes or the slots.
            norm: Its norm over all weights; NaN if the student took no step of any window, or had
                no finite loss in any.
            loss: The student's loss, averaged alike.
            rate: The meta-optimizer's learning rate.
        """
        weights = self.student.weights()
        if not math.isfinite(norm) or not math.isfinite(loss):
            self.skipped_meta_steps += 1
            return
        clipped = clip_adaptively(
            weights, grads, ratio=self._training.clip_ratio, floor=self._training.clip_floor
        )
        for weight, grad in zip(weights, clipped, strict=True):
            weight.grad = grad.detach()
        (group,) = self._optimizer.param_groups
        group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._average is not None:
            self._average.update_parameters(self.student)

    def note_score(self, score: float, meta_step: int) -> None:
        """Remember the weights if a meta-validation's score is the lowest so far."""
        if score < self.best_score:
            self.best_score = score
            self.best_meta_step = meta_step
            self._best = _weights_of(self.judged)

    def take_best(self) -> None:
        """Give the student the weights of its best meta-validation."""
        self.student.load_state_dict(self._best)

    def take_average(self) -> None:
        """Give the student its averaged weights, if they are averaged."""
        self.student.load_state_dict(_weights_of(self.judged))

    def tensors(self) -> dict[str, Tensor]:
        """The weights, the best and the averaged ones, and the meta-optimizer's state, by name."""
        named = nests.prefixed("student", _weights_of(self.student))
        named |= nests.prefixed("best", self._best)
        if self._average is not None:
            named |= nests.prefixed("average", self._average.state_dict())
        for number, state in self._optimizer.state_dict()["state"].items():
            named |= nests.prefixed(f"optimizer.{number}", state)
        return named

    def load_tensors(self, named: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`tensors` gave."""
        self.student.load_state_dict(nests.under("student", named))
        self._best = nests.under("best", named)
        if self._average is not None:
            self._average.load_state_dict(nests.under("average", named))
        state = nests.by_number(nests.under("optimizer", named))
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})

    def to_json(self) -> dict[str, Any]:
        """What :meth:`tensors` leaves out, as JSON can hold it."""
        return {
            "skipped_meta_steps": self.skipped_meta_steps,
            "best_score": repr(self.best_score),
            "best_meta_step": self.best_meta_step,
        }

    def load_json(self, stored: Mapping[str, Any]) -> None:
        """Take over what :meth:`to_json` gave."""
        self.skipped_meta_steps = stored["skipped_meta_steps"]
        self.best_score = float(stored["best_score"])
        self.best_meta_step = stored["best_meta_step"]


def _moving_average(
    decay: float,
) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    """An exponential moving average with bias correction, as :class:`AveragedModel` takes it."""

    @torch.no_grad()
    def move(averages: Sequence[Tensor], weights: Sequence[Tensor], averaged: Tensor | int) -> None:
        # The corrected average moves by this share: all of the way at first, 1 - decay in the end.
        share = (1 - decay) / (1 - decay ** (int(averaged) + 1))
        torch._foreach_lerp_(list(averages), list(weights), share)

    return move


def _weights_of(policy: Policy) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in policy.state_dict().items()}
