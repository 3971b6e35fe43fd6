"""The student: RNNProp, an LSTM that turns a coordinate's gradients into its updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from amalgam.ops import StepSettings, StudentState
from amalgam.policies.fused_student import FusedConfig, FusedStudent, TensorContext
from amalgam.ranges import check_fields


@dataclass(frozen=True, kw_only=True)
class StudentConfig(FusedConfig):
    """Architecture and constants of a student.

    Attributes:
        layers: LSTM layers, 1 or more.
        hidden: Units in each.
        alpha: Largest update of a coordinate in one step.
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        eps: Added to the second moment inside the root.
        warmup_steps: Steps of SGD before the student acts, in meta-training and after.
        warmup_lr: The learning rate of those steps.
    """

    alpha: float = 0.1

    def __post_init__(self) -> None:
        """Refuse what can't be computed."""
        super().__post_init__()
        check_fields(self, positive=("alpha",))

    @property
    def settings(self) -> StepSettings:
        """The constants of :func:`amalgam.ops.student_step`."""
        return StepSettings(self.alpha, self.beta1, self.beta2, self.eps)


class Student(FusedStudent):
    """The learned optimizer (RNNProp as in Optimizer Amalgamation, ICLR 2022, section 3).

    Its initial weights are drawn as those of the authors' Keras cells: Glorot-uniform input kernels
    and head, orthogonal recurrent kernels, zero biases but for the forget gates' ones.

    Args:
        config: Its architecture and constants.
        generator: Source of its initial weights; torch's global one where absent.
        provenance: Where its weights come from, JSON-serialisable; kept by :meth:`save`.
    """

    kind = "student"
    config_type = StudentConfig
    config: StudentConfig

    def build(self, generator: torch.Generator | None) -> None:
        """Make an LSTM that sees two features, and its head."""
        self.build_lstm(2, generator)

    def operation_weights(self, weights: Sequence[Tensor]) -> Sequence[Tensor]:
        """Its weights themselves."""
        return weights

    def unfolded(self, found: Sequence[Tensor], context: TensorContext | None) -> list[Tensor]:
        """See :class:`FusedStudent`."""
        return list(found)

    def carried(
        self, new: StudentState, before: StudentState, context: TensorContext | None
    ) -> StudentState:
        """See :class:`FusedStudent`."""
        return new
