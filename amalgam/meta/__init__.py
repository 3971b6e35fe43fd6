"""Meta-training: a student learns, from tasks and from teachers, how to train optimizees.

Start at :class:`Trainer`: it takes a student, tasks and a pool, and leaves a trained student in a
run folder. The words that this package uses:

* *optimizee*: a model that an optimizer trains; its N parameters are its *coordinates*.
* *policy*: an optimizer with learned weights, which turns gradients into updates.
* *student*: the policy that is meta-trained.
* *teacher*: an optimizer that the student learns from. The *pool* is all teachers of a run.
* *off-policy*, *on-policy*: whether teachers train optimizees of their own beside the student's, or
  act at the student's own parameters.
* *replicate*: one of several students of the same configuration that a run trains side by side,
  independently of each other.
* *particle*: a copy of a student with perturbed weights and its own trajectory, by which
  :class:`PersistentEvolution` estimates a meta-gradient.
* *row*: one student's optimizee (or one particle's), as an index into the tensors of all of them.
* *trajectory*: the parameters and the state of a student or a teacher in one row, step by step.
* *unroll*: the training of optimizees step by step. An :class:`Unroll` runs the episodes of one
  task; a strategy's ``unroll`` is the length of a window.
* *window*: a number of steps through which a meta-gradient is computed.
* *episode*: begins with new optimizees and a warm-up by SGD; a number of windows follow, each from
  where the one before ended.
* *period*: a number of episodes with the same settings, then perhaps a meta-validation.
* *stage*: periods with the same settings, in strategies that have stages.
* *strategy*: chooses the next period by how those before came out.
* *meta-step*: one window, its meta-gradient, and an update of the students' weights; with a
  *meta-batch* several windows, one of each *slot*. A slot runs one episode after another.
* *horizon*: the number of steps in all windows of an episode.
* *meta-loss* and *imitation loss*: what a window's student is trained to make small, its
  optimizees' losses and its distances to the teachers.
"""

from amalgam.meta.clipping import clip_adaptively
from amalgam.meta.conditions import Conditions
from amalgam.meta.curriculum import Curriculum, Repeat
from amalgam.meta.episode import Trajectories
from amalgam.meta.estimators import Estimator, PersistentEvolution, Truncation
from amalgam.meta.memory import Memory
from amalgam.meta.meta_batch import MetaBatch
from amalgam.meta.objective import MECHANISMS, Amalgamation
from amalgam.meta.on_policy import OnPolicy
from amalgam.meta.periods import Finish, Period, Record, Strategy, UnrollSettings
from amalgam.meta.perturbation import FGSM, PGD, AdaptivePGD, Gaussian, Perturbation
from amalgam.meta.stages import Stage, Stages
from amalgam.meta.trainer import NothingLearned, Trainer
from amalgam.meta.training import Training
from amalgam.meta.unroll import Unroll
from amalgam.meta.window import Window, WindowInputs

__all__ = [
    "FGSM",
    "MECHANISMS",
    "PGD",
    "AdaptivePGD",
    "Amalgamation",
    "Conditions",
    "Curriculum",
    "Estimator",
    "Finish",
    "Gaussian",
    "Memory",
    "MetaBatch",
    "NothingLearned",
    "OnPolicy",
    "Period",
    "PersistentEvolution",
    "Perturbation",
    "Record",
    "Repeat",
    "Stage",
    "Stages",
    "Strategy",
    "Trainer",
    "Training",
    "Trajectories",
    "Truncation",
    "Unroll",
    "UnrollSettings",
    "Window",
    "WindowInputs",
    "clip_adaptively",
]
