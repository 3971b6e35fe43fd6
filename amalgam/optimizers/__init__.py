"""Policies as ``torch.optim`` optimizers: the student, other learned ones, and the teachers."""

from __future__ import annotations

from typing import Any

from amalgam.optimizers.memory import MemoryEstimate, estimate_memory
from amalgam.optimizers.policy import PolicyOptimizer
from amalgam.optimizers.state import separate_units
from amalgam.optimizers.stats import StepStats
from amalgam.optimizers.student import DEFAULT_STUDENT, AmalgamatedOptimizer
from amalgam.optimizers.teacher import TeacherOptimizer
from amalgam.policies import AnyTeacher, FusedStudent, Policy


def optimizer_of(
    params: Any, policy: Policy, backend: str = "auto"
) -> AmalgamatedOptimizer | PolicyOptimizer:
    """A learned policy as an optimizer: a student by its fused step, others by their own.

    Args:
        params: Parameters or groups, floating point.
        policy: The policy.
        backend: What computes the steps.
    """
    if isinstance(policy, FusedStudent):
        return AmalgamatedOptimizer(params, student=policy, backend=backend)
    return PolicyOptimizer(params, policy, backend=backend)


def optimizer_of_teacher(
    params: Any, teacher: AnyTeacher
) -> AmalgamatedOptimizer | PolicyOptimizer | TeacherOptimizer:
    """A teacher as an optimizer: a policy by :func:`optimizer_of`, others step by step.

    Args:
        params: Parameters or groups, floating point.
        teacher: The teacher.
    """
    if teacher.policy is not None:
        return optimizer_of(params, teacher.policy)
    return TeacherOptimizer(params, teacher)


__all__ = [
    "DEFAULT_STUDENT",
    "AmalgamatedOptimizer",
    "MemoryEstimate",
    "PolicyOptimizer",
    "StepStats",
    "TeacherOptimizer",
    "estimate_memory",
    "optimizer_of",
    "optimizer_of_teacher",
    "separate_units",
]
