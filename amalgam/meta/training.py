"""The settings of meta-training that hold for any strategy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from amalgam.meta.objective import MODES


@dataclass(frozen=True)
class Training:
    """How meta-training proceeds.

    Attributes:
        optimizees: How many a student trains at once, in each process.
        il_mode: What a window trains for, ``"sum"``, ``"switch"``, ``"imitation"`` or ``"meta"``;
            see :func:`amalgam.meta.objective.loss_weights`.
        input_noise: Standard deviation of noise on the gradients that students see in training.
        meta_lr: Learning rate of Adam on the student's weights.
        clip_ratio: Largest norm of a weight's meta-gradient over the weight's own
            (adaptive gradient clipping).
        clip_floor: Weights of smaller norm count as having this one.
        checkpoint_every: Meta-steps between checkpoints.
        validate_every: Meta-steps between meta-validations, the best of which decides the student
            that is kept; 0 for none, and the last student. Only for strategies that do not go back
            to earlier weights; the others validate each period.
        validation_steps: Steps of a meta-validation's runs, without the warm-up's.
        validation_seeds: Runs of a meta-validation.
        validation_data: What the validation of a period trains its optimizees on: the tasks'
            ``"validation"`` data, or ``"train"``, as the authors do.
    """

    optimizees: int = 1
    il_mode: Literal["sum", "switch", "imitation", "meta"] = "sum"
    input_noise: float = 0.0
    meta_lr: float = 1e-3
    clip_ratio: float = 0.1
    clip_floor: float = 1e-3
    checkpoint_every: int = 10
    validate_every: int = 20
    validation_steps: int = 400
    validation_seeds: int = 2
    validation_data: Literal["validation", "train"] = "validation"

    def __post_init__(self) -> None:
        """Refuse what can't be run."""
        for name in ("optimizees", "checkpoint_every", "validation_steps", "validation_seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
        for name in ("validate_every", "input_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        for name in ("meta_lr", "clip_ratio", "clip_floor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name, known in (("il_mode", MODES), ("validation_data", ("validation", "train"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, not {getattr(self, name)!r}")
