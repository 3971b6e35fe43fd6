"""Meta-training: unrolls, losses, the trainer and its run folder."""

from amalgam.meta.clipping import clip_adaptively
from amalgam.meta.curriculum import Curriculum, Repeat
from amalgam.meta.estimators import Estimator
from amalgam.meta.memory import Memory
from amalgam.meta.trainer import Stage, Trainer, Training
from amalgam.meta.unroll import MECHANISMS, Amalgamation, Trajectories, Unroll, Window

__all__ = [
    "MECHANISMS",
    "Amalgamation",
    "Curriculum",
    "Estimator",
    "Memory",
    "Repeat",
    "Stage",
    "Trainer",
    "Training",
    "Trajectories",
    "Unroll",
    "Window",
    "clip_adaptively",
]
