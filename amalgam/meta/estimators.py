"""Estimators: how the meta-gradient of one window is computed.

:class:`Truncation` back-propagates through the window. :class:`PersistentEvolution` compares
perturbed copies of the student. Both run windows of the same engine and return an
:class:`Estimate`. A new estimator is a class that follows the protocol :class:`Estimator`, and an
entry in :data:`ESTIMATORS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from amalgam import distributed
from amalgam.meta.conditions import StepConditions
from amalgam.meta.episode import Trajectories
from amalgam.meta.perturbation import AdversarialPerturbation, Perturbation
from amalgam.meta.teaching import Teaching
from amalgam.meta.unroll import Unroll
from amalgam.meta.window import Window, WindowInputs
from amalgam.ranges import check_fields
from amalgam.seeding import normal_like
from amalgam.tasks import Batch

# Called with a student's number, a purpose and perhaps further numbers. Returns the generator for
# this draw in its initial state; it is the same in every process.
Generators = Callable[..., torch.Generator]

# Each student's weights, or something added to them.
Weights = list[list[Tensor]]


class Estimate(NamedTuple):
    """What an estimator found in one window, for S students.

    Attributes:
        window: What the window gave. With particles, its ``meta_loss`` and ``imitation_loss`` are
            means over them, and its rows are all particles'.
        loss: Each student's loss of the window, outside any graph, shape (S,): the sum of
            meta-loss and imitation loss by ``coefficients``. With particles, their mean.
        grads: The meta-gradient: the gradient of each student's loss with respect to its weights.
            ``None`` if the losses do not depend on the weights.
        carried: Tensors that the estimator gets back in the episode's next window.
    """

    window: Window
    loss: Tensor
    grads: Weights | None
    carried: list[Tensor]


@runtime_checkable
class Estimator(Protocol):
    """Runs one window and computes its meta-gradient.

    Its ``repr`` says all that decides what it does: a run resumes only with the same one.
    """

    @property
    def particles(self) -> int:
        """How many copies of each student, its particles, run side by side on one optimizee."""
        ...

    def check(
        self,
        *,
        students: int,
        optimizees: int,
        perturbation: Perturbation | None,
        input_noise: float,
    ) -> None:
        """Refuse a run that this estimator can't serve.

        Args:
            students: How many students (replicates) are trained.
            optimizees: How many optimizees each student has in each process.
            perturbation: Perturbs the weights at which the meta-gradient is computed.
            input_noise: Standard deviation of the noise on the gradients that students see.

        Raises:
            ValueError: This estimator can't serve the run; the message says what it takes.
        """
        ...

    def estimate(
        self,
        unroll: Unroll,
        begin: Trajectories,
        batches: Sequence[Batch],
        coefficients: tuple[float, float],
        generators: Generators,
        *,
        carried: Sequence[Tensor] = (),
        perturbation: Perturbation | None = None,
        input_noise: float = 0.0,
        conditions: StepConditions | None = None,
        teaching: Teaching | None = None,
        held_out: Sequence[Batch] | None = None,
    ) -> Estimate:
        """Run one window and estimate its meta-gradient.

        Args:
            unroll: The engine. Its students are the run's, all of them :attr:`particles` times.
            begin: Where students and teachers stand.
            batches: One batch per step.
            coefficients: The weights of the meta-loss and of the imitation loss.
            generators: Returns a generator for a student and a purpose.
            carried: ``Estimate.carried`` of the episode's window before; empty in its first window.
            perturbation: Perturbs the weights at which the meta-gradient is computed (paper,
                section 4).
            input_noise: Standard deviation of the noise on the gradients that students see.
            conditions: Learning rates, weight decay and loss scales of the students' steps.
            teaching: The teachers' decaying rates, and on-policy teachers' part in the steps.
            held_out: One batch per step of samples that no step trains on, on which the meta-loss
                is taken; where ``None``, on the steps' own batches.
        """
        ...


@dataclass(frozen=True)
class Truncation:
    """Back-propagation through each window; what it begins from counts as constant."""

    @property
    def particles(self) -> int:
        """See :class:`Estimator`."""
        return 1

    def check(
        self,
        *,
        students: int,
        optimizees: int,
        perturbation: Perturbation | None,
        input_noise: float,
    ) -> None:
        """See :class:`Estimator`; serves any run."""

    def estimate(
        self,
        unroll: Unroll,
        begin: Trajectories,
        batches: Sequence[Batch],
        coefficients: tuple[float, float],
        generators: Generators,
        *,
        carried: Sequence[Tensor] = (),
        perturbation: Perturbation | None = None,
        input_noise: float = 0.0,
        conditions: StepConditions | None = None,
        teaching: Teaching | None = None,
        held_out: Sequence[Batch] | None = None,
    ) -> Estimate:
        """See :class:`Estimator`."""
        weights = [list(student.weights()) for student in unroll.students]

        def draws(purpose: str, step: int, row: int) -> torch.Generator:
            student, index = divmod(row, unroll.optimizees)
            first = distributed.rank() * unroll.optimizees
            return generators(student, purpose, step, first + index)

        given = WindowInputs(
            begin,
            batches,
            weights,
            draws=draws,
            input_noise=input_noise,
            conditions=conditions,
            teaching=teaching,
            held_out=held_out,
        )
        if isinstance(perturbation, AdversarialPerturbation):
            given = given._replace(weights=_climbed(unroll, given, coefficients, perturbation))
        elif perturbation is not None:

            def drawn(*purpose: int) -> Weights:
                return [
                    perturbation.draw(ours, generators(student, "perturbation", *purpose))
                    for student, ours in enumerate(weights)
                ]

            if perturbation.fresh_each_step:
                given = given._replace(noise=drawn)
            else:
                given = given._replace(weights=_added(weights, drawn()))
        # What is added to the weights is constant, so the gradients are those in the weights.
        window, loss, grads = unroll.meta_gradient(given, coefficients)
        return Estimate(window, loss, grads, [])


@dataclass(frozen=True)
class PersistentEvolution:
    """Persistent evolution strategies (Vicol et al., ICML 2021), with antithetic pairs.

    It differentiates nothing, and cutting episodes into windows does not bias it. A *particle* is a
    copy of the student with its own trajectory. Each pair of particles draws a perturbation for
    each window; one particle's weights are the student's plus the perturbation, the other's minus.
    Let xi be a particle's perturbation summed over the episode's windows so far, and L its loss in
    this one. The estimate is mean(xi * L) / std^2 (eq. 10). From window to window it carries each
    pair's xi: for every tensor of weights, a tensor of shape (pairs, ...).

    The particles' order is pair by pair: plus, minus, plus, minus, and so on. The estimator refuses
    runs with several replicates, with several optimizees per student, with a perturbation, or with
    input noise.

    Attributes:
        std: Standard deviation of the perturbation of each weight in one window.
        pairs: Number of pairs of particles.
    """

    std: float = 0.01
    pairs: int = 8

    def __post_init__(self) -> None:
        """Refuse what can't be estimated."""
        check_fields(self, counts=("pairs",), positive=("std",))

    @property
    def particles(self) -> int:
        """See :class:`Estimator`."""
        return 2 * self.pairs

    def check(
        self,
        *,
        students: int,
        optimizees: int,
        perturbation: Perturbation | None,
        input_noise: float,
    ) -> None:
        """See :class:`Estimator`."""
        if students > 1 or optimizees > 1:
            raise ValueError("estimator 'pes' takes one student with one optimizee")
        if perturbation is not None or input_noise:
            raise ValueError("estimator 'pes' perturbs weights itself; give no other noise")

    def estimate(
        self,
        unroll: Unroll,
        begin: Trajectories,
        batches: Sequence[Batch],
        coefficients: tuple[float, float],
        generators: Generators,
        *,
        carried: Sequence[Tensor] = (),
        perturbation: Perturbation | None = None,
        input_noise: float = 0.0,
        conditions: StepConditions | None = None,
        teaching: Teaching | None = None,
        held_out: Sequence[Batch] | None = None,
    ) -> Estimate:
        """See :class:`Estimator`."""
        weights = [w.detach() for w in unroll.students[0].weights()]
        generator = generators(0, "particles", distributed.rank())
        fresh = [self.std * normal_like(w, generator, (self.pairs, *w.shape)) for w in weights]
        total = [old + new for old, new in zip(carried, fresh, strict=True)] if carried else fresh
        particles = [
            [w + sign * xi[pair] for w, xi in zip(weights, fresh, strict=True)]
            for pair in range(self.pairs)
            for sign in (1, -1)
        ]
        given = WindowInputs(
            begin,
            batches,
            particles,
            conditions=conditions,
            teaching=teaching,
            held_out=held_out,
        )
        with torch.no_grad():
            window, losses, _ = unroll.meta_gradient(given, coefficients)
        slopes = (losses[::2] - losses[1::2]) / (2 * self.pairs * self.std**2)
        grads = [torch.tensordot(slopes, xi, 1) for xi in total]
        window = replace(
            window,
            meta_loss=window.meta_loss.mean(0, keepdim=True),
            imitation_loss=window.imitation_loss.mean(0, keepdim=True),
        )
        return Estimate(window, losses.mean(0, keepdim=True), [grads], total)


ESTIMATORS: dict[str, type] = {"truncation": Truncation, "pes": PersistentEvolution}
"""The estimators by their ``kind`` in recipes; each is an :class:`Estimator`."""


def _climbed(
    unroll: Unroll,
    given: WindowInputs,
    coefficients: tuple[float, float],
    adversary: AdversarialPerturbation,
) -> Weights:
    """The weights plus a perturbation by which an adversary raises the losses (S,) of a window."""
    weights = given.weights
    psi = [adversary.start(ours) for ours in weights]
    for _ in range(adversary.steps):
        moved = given._replace(weights=_added(weights, psi))
        _, _, grads = unroll.meta_gradient(moved, coefficients)
        # A loss that does not depend on the weights has a gradient of zero.
        slopes = grads or [[torch.zeros_like(w) for w in ours] for ours in weights]
        psi = [
            adversary.ascend(one, ours, distributed.average(found))
            for one, ours, found in zip(psi, weights, slopes, strict=True)
        ]
    return _added(weights, psi)


def _added(weights: Sequence[Sequence[Tensor]], psi: Weights) -> Weights:
    return [
        [w + z for w, z in zip(ours, moves, strict=True)]
        for ours, moves in zip(weights, psi, strict=True)
    ]
