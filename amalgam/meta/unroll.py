"""Unrolls: windows of steps through which the meta-gradient flows.

Students and teachers are those of :mod:`amalgam.meta.episode`, which says what an episode is.
Source: Optimizer Amalgamation (ICLR 2022), sections 3.2 and 3.3, in the form of the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from amalgam.meta.episode import MECHANISMS, NORMALISERS, Amalgamation, Rows, Trajectories
from amalgam.meta.window import Draws, Noise, Recording, through
from amalgam.tasks import Batch


@dataclass(frozen=True)
class Window:
    """What one window of T steps gave.

    Attributes:
        meta_loss: Each student's mean log improvement of the loss over the window's start, shape
            (S,), in the graph.
        imitation_loss: Its mean reduced distance to the teachers, shape (S,), in the graph.
        end: Where everybody stands after it, outside the graph.
        losses: Losses before each step, shape (T, R, 1 + K), the student's first.
        distances: Log distances to the teachers after each step, shape (T, R, K).
        skipped: Steps that a non-finite value made each trajectory skip, shape (R, 1 + K), the
            student's first.
    """

    meta_loss: Tensor
    imitation_loss: Tensor
    end: Trajectories
    losses: Tensor
    distances: Tensor
    skipped: Tensor


class Unroll(Rows):
    """Runs episodes of one task, student and pool; its arguments are those of :class:`Rows`."""

    def window(
        self,
        begin: Trajectories,
        batches: Sequence[Batch],
        weights: Sequence[Sequence[Tensor]] | None = None,
        noise: Noise | None = None,
        draws: Draws | None = None,
        input_noise: float = 0.0,
    ) -> Window:
        """Everybody takes a step on each batch; the losses' graph reaches the students' weights.

        A step whose gradient or update is not finite leaves that trajectory and its state as they
        were and is counted; its loss, which has no usable gradient, is left out of the meta-loss.

        Args:
            begin: Where everybody stands; not changed.
            batches: One a step, each tensor (R, samples, ...).
            weights: Each student's weights to use in place of its own.
            noise: What is added to them at each step, as a constant; the same whenever it is
                called for the same step.
            draws: Where the noise comes from that some policies train with, and input noise: of
                ``"policy"`` or ``"input"``, a step and a row, a generator that begins anew
                whenever it is called.
            input_noise: Standard deviation of what is added to the gradients that students see.
        """
        chosen = [list(s.weights()) for s in self.students] if weights is None else weights
        recording = Recording(self, begin, batches, chosen, noise, draws, input_noise)
        meta_loss, imitation_loss = through(recording, chosen)
        return Window(
            meta_loss,
            imitation_loss,
            recording.end,
            recording.losses,
            recording.distances,
            recording.skipped,
        )


__all__ = ["MECHANISMS", "NORMALISERS", "Amalgamation", "Trajectories", "Unroll", "Window"]
