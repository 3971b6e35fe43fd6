"""Optimizer amalgamation for PyTorch: teachers in, one fused learned optimizer out."""

from amalgam import ops  # isort: skip
from amalgam import backends as _backends  # noqa: F401  registers them with ops
from amalgam import tasks
from amalgam.optimizers import (
    AmalgamatedOptimizer,
    PolicyOptimizer,
    TeacherOptimizer,
    estimate_memory,
)
from amalgam.policies import (
    NominalConfig,
    NominalStudent,
    Pool,
    Student,
    StudentConfig,
    Teacher,
    TorchTeacher,
    load_policy,
)
from amalgam.version import __version__

__all__ = [
    "AmalgamatedOptimizer",
    "NominalConfig",
    "NominalStudent",
    "PolicyOptimizer",
    "Pool",
    "Student",
    "StudentConfig",
    "Teacher",
    "TeacherOptimizer",
    "TorchTeacher",
    "__version__",
    "estimate_memory",
    "load_policy",
    "ops",
    "tasks",
]
