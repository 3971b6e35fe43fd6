"""The fused operations, as functions; each has a file in :mod:`amalgam.operations`.

Operations that have gradients, or that train models, are ``torch.library`` operators too, so
``torch.compile``, fake tensors and ``torch.library.opcheck`` work on them. The operator checks its
arguments and chooses the backend. ``torch.compile`` traces through ``"reference"``, which is plain
PyTorch, and through :func:`largest_magnitudes` and :func:`sign_agreements`, which are no operators
and are the reference's there.
"""

from amalgam.operations.choice_step import ChoiceSettings, ChoiceState, choice_step
from amalgam.operations.largest_magnitude import largest_magnitudes
from amalgam.operations.registry import BackendStatus, backends, check_backend
from amalgam.operations.sign_agreement import sign_agreements
from amalgam.operations.student_forms import StepSettings
from amalgam.operations.student_step import (
    StudentState,
    initial_state,
    student_step,
    update_moments,
)
from amalgam.operations.student_step_in_place import (
    StudentTensors,
    step_tensors_,
    student_step_,
)
from amalgam.operations.student_unroll_backward import student_unroll_backward
from amalgam.operations.teacher_distance import teacher_distance
from amalgam.operations.teacher_kinds import KINDS
from amalgam.operations.teacher_step import teacher_step
from amalgam.operations.warm_up import warm_up_

__all__ = [
    "KINDS",
    "BackendStatus",
    "ChoiceSettings",
    "ChoiceState",
    "StepSettings",
    "StudentState",
    "StudentTensors",
    "backends",
    "check_backend",
    "choice_step",
    "initial_state",
    "largest_magnitudes",
    "sign_agreements",
    "step_tensors_",
    "student_step",
    "student_step_",
    "student_unroll_backward",
    "teacher_distance",
    "teacher_step",
    "update_moments",
    "warm_up_",
]
