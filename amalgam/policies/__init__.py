"""What turns gradients into updates: the student, the teachers it learns from, their mixture."""

from amalgam.policies.choice import Choice, ChoiceConfig
from amalgam.policies.student import Student, StudentConfig
from amalgam.policies.teachers import LEARNING_RATES, Pool, PoolState, Teacher

__all__ = [
    "LEARNING_RATES",
    "Choice",
    "ChoiceConfig",
    "Pool",
    "PoolState",
    "Student",
    "StudentConfig",
    "Teacher",
]
