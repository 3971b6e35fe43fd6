"""Policies as ``torch.optim`` optimizers: the student, other learned ones, and the teachers."""

from __future__ import annotations

from typing import Any

from amalgam.optimizers.policy import PolicyOptimizer
from amalgam.optimizers.student import DEFAULT_STUDENT, AmalgamatedOptimizer
from amalgam.optimizers.teacher import TeacherOptimizer
from amalgam.policies import Policy, Student


def optimizer_of(
    params: Any, policy: Policy, backend: str = "auto"
) -> AmalgamatedOptimizer | PolicyOptimizer:
    """A learned policy as an optimizer: the student by its fused step, others by their own.

    Args:
        params: Parameters or groups, floating point.
        policy: The policy.
        backend: What computes the steps.
    """
    if isinstance(policy, Student):
        return AmalgamatedOptimizer(params, student=policy, backend=backend)
    return PolicyOptimizer(params, policy, backend=backend)


__all__ = [
    "DEFAULT_STUDENT",
    "AmalgamatedOptimizer",
    "PolicyOptimizer",
    "TeacherOptimizer",
    "optimizer_of",
]
