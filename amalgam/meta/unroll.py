"""The unroll engine, which begins episodes and runs their windows.

:class:`Unroll` puts together :mod:`amalgam.meta.episode`, which begins episodes and warms them up,
and :mod:`amalgam.meta.window`, which runs their windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from amalgam.device import put
from amalgam.meta.conditions import StepConditions
from amalgam.meta.cuda_graph import WindowGraphs
from amalgam.meta.episode import Episodes, Trajectories
from amalgam.meta.student_steps import Draws, WeightNoise
from amalgam.meta.teaching import Teaching
from amalgam.meta.window import Window, WindowInputs, meta_gradient, run_window
from amalgam.tasks import Batch


class Unroll(Episodes):
    """The engine for one task, its students and their pool; a run has one for each task.

    It begins and runs any number of episodes: :meth:`begin`, :meth:`warm_up`, then :meth:`window`
    again and again, each from where the one before ended (``Window.end``). It holds no episode
    itself. The arguments are those of :class:`amalgam.meta.episode.Episodes`.
    """

    def window(
        self,
        begin: Trajectories,
        batches: Sequence[Batch],
        weights: Sequence[Sequence[Tensor]] | None = None,
        noise: WeightNoise | None = None,
        draws: Draws | None = None,
        input_noise: float = 0.0,
        conditions: StepConditions | None = None,
        teaching: Teaching | None = None,
        held_out: Sequence[Batch] | None = None,
    ) -> Window:
        """Run a window: all students and teachers take one step on each batch.

        Autograd reaches the students' weights from the window's meta-losses and imitation losses.

        A trajectory skips a step whose loss, gradient or update is not finite: its parameters and
        state stay as they were, and ``Window.skipped`` counts the step. Where it is the student's
        loss or gradient, and no samples are held out, the step adds nothing to the meta-loss.

        Args:
            begin: Where students and teachers stand; not changed.
            batches: One batch per step, each tensor of shape (R, samples, ...); where optimizees
                draw random numbers, each a :class:`amalgam.tasks.SeededBatch` with R seeds.
            weights: Each student's weights to use in place of its own.
            noise: Called with a step's number, returns what is added to each student's weights in
                that step, as a constant. It must return the same for the same step.
            draws: Called with a purpose, a step's number and a row's number, returns a generator in
                its initial state. The purpose is ``"policy"`` for the noise that some policies
                train with, or ``"input"`` for ``input_noise``.
            input_noise: Standard deviation of the noise on the gradients that students see.
            conditions: Learning rates, weight decay and loss scales of the students' steps; where
                ``None``, a step is the student's update. Teachers do not see them.
            teaching: The teachers' decaying rates, and the part that on-policy teachers take in the
                executed steps; where ``None``, rates are constant and they take none.
            held_out: One batch per step of samples that no step trains on, on which the meta-loss
                is taken; where ``None``, on the steps' own batches. The settings' ``held_out`` is
                for who draws the batches, and has no effect here.

        Raises:
            ValueError: ``held_out`` has another length than ``batches``, the budget of memory is
                too small, or a log is wanted of a negative loss.
        """
        chosen = [list(s.weights()) for s in self.students] if weights is None else weights
        return run_window(
            self,
            WindowInputs(
                begin, batches, chosen, noise, draws, input_noise, conditions, teaching, held_out
            ),
        )

    def meta_gradient(
        self, given: WindowInputs, coefficients: tuple[float, float]
    ) -> tuple[Window, Tensor, list[list[Tensor]] | None]:
        """Run a window, and take the gradients of each student's loss with respect to its weights.

        On a GPU by one graph, where :attr:`cuda_graphs` can.

        Args:
            given: What :meth:`window` takes.
            coefficients: The weights of the meta-loss and of the imitation loss in the loss.

        Returns:
            What the window gave, the students' losses (S,), and their gradients, a list a student;
            ``None`` where no weight requires any. All of it is outside autograd's graph.

        Raises:
            ValueError: As :meth:`window`.
        """
        like = given.begin.params
        both = put(torch.tensor(coefficients, dtype=like.dtype), like.device)
        graphs = self.cuda_graphs
        found = None if graphs is None else graphs.meta_gradient(self, given, both)
        window, grads, _ = meta_gradient(self, given, both) if found is None else found
        return window, both[0] * window.meta_loss + both[1] * window.imitation_loss, grads

    @cached_property
    def cuda_graphs(self) -> WindowGraphs | None:
        """Its windows as CUDA graphs; ``None`` where its task is not on a GPU."""
        return WindowGraphs(self) if self.task.device.type == "cuda" else None
