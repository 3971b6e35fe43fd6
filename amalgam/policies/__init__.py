"""What turns gradients into updates: the student, and the teachers it learns from."""

from amalgam.policies.student import Student, StudentConfig
from amalgam.policies.teachers import LEARNING_RATES, Pool, PoolState, Teacher

__all__ = ["LEARNING_RATES", "Pool", "PoolState", "Student", "StudentConfig", "Teacher"]
