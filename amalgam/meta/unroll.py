"""Unrolls: episodes, and windows of steps through which the meta-gradient flows.

:class:`Unroll` puts together :mod:`amalgam.meta.episode`, which begins episodes, and
:mod:`amalgam.meta.window`, which runs windows of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from amalgam.meta.episode import Episodes, Trajectories
from amalgam.meta.student_steps import Draws, WeightNoise
from amalgam.meta.window import Window, run_window
from amalgam.tasks import Batch


class Unroll(Episodes):
    """Runs episodes of one task, student and pool.

    Arguments are those of :class:`amalgam.meta.episode.Episodes`.
    """

    def window(
        self,
        begin: Trajectories,
        batches: Sequence[Batch],
        weights: Sequence[Sequence[Tensor]] | None = None,
        noise: WeightNoise | None = None,
        draws: Draws | None = None,
        input_noise: float = 0.0,
    ) -> Window:
        """Everybody takes a step on each batch; the losses' graph reaches the students' weights.

        A step whose gradient or update is not finite leaves that trajectory and its state as they
        were and is counted. Its loss, which has no usable gradient, is left out of the meta-loss.

        Args:
            begin: Where everybody stands; not changed.
            batches: One a step, each tensor (R, samples, ...).
            weights: Each student's weights to use in place of its own.
            noise: What is added to them at each step, as a constant; it must be the same whenever
                it is called for the same step.
            draws: Where random numbers come from: given the purpose (``"policy"`` for the noise
                that some policies train with, ``"input"`` for input noise), a step and a row, a
                generator that begins anew whenever it is called.
            input_noise: Standard deviation of what is added to the gradients that students see.
        """
        chosen = [list(s.weights()) for s in self.students] if weights is None else weights
        return run_window(self, begin, batches, chosen, noise, draws, input_noise)
