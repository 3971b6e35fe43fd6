"""Meta-training: unrolls, their meta-gradients, and the trainer with its run folder."""

from amalgam.meta.clipping import clip_adaptively
from amalgam.meta.curriculum import Curriculum, Repeat, Stage, Stages
from amalgam.meta.episode import Trajectories
from amalgam.meta.estimators import Estimator, PersistentEvolution, Truncation
from amalgam.meta.memory import Memory
from amalgam.meta.objective import MECHANISMS, Amalgamation
from amalgam.meta.periods import Strategy
from amalgam.meta.trainer import Trainer
from amalgam.meta.training import Training
from amalgam.meta.unroll import Unroll
from amalgam.meta.window import Window

__all__ = [
    "MECHANISMS",
    "Amalgamation",
    "Curriculum",
    "Estimator",
    "Memory",
    "PersistentEvolution",
    "Repeat",
    "Stage",
    "Stages",
    "Strategy",
    "Trainer",
    "Training",
    "Trajectories",
    "Truncation",
    "Unroll",
    "Window",
    "clip_adaptively",
]
