"""How the meta-gradient of a window is come by: back-propagation through it, or evolution.

Both see the same unrolls and give the same kind of answer, so a recipe changes one word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from amalgam.meta import distributed
from amalgam.meta.perturbation import AdversarialPerturbation, Perturbation
from amalgam.meta.unroll import Trajectories, Unroll, Window
from amalgam.seeding import normal_like
from amalgam.tasks import Batch

KINDS = ("truncation", "pes")

# A student, a purpose and perhaps numbers -> random numbers for it, anew at every call; the same in
# every process.
Generators = Callable[..., torch.Generator]


@dataclass(frozen=True)
class Estimator:
    """Which estimator.

    Attributes:
        kind: ``"truncation"``: back-propagation through each window, states carried into it being
            constants. ``"pes"``: persistent evolution strategies (Vicol et al., ICML 2021), which
            differentiates nothing, and whose truncation is without bias.
        std: Of PES, the standard deviation of a window's perturbation of every weight.
        pairs: Of PES, antithetic pairs of particles; a particle is a student beside the others.
    """

    kind: Literal["truncation", "pes"] = "truncation"
    std: float = 0.01
    pairs: int = 8

    def __post_init__(self) -> None:
        """Refuse what can't be estimated."""
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, not {self.kind!r}")
        if not 0 < self.std < math.inf:
            raise ValueError(f"std must be positive and finite, not {self.std}")
        if self.pairs < 1:
            raise ValueError(f"pairs must be 1 or more, not {self.pairs}")

    @property
    def particles(self) -> int:
        """Copies of a student that an unroll has to run."""
        return 2 * self.pairs if self.kind == "pes" else 1


class Estimate(NamedTuple):
    """What came of one window.

    Attributes:
        window: What it gave.
        loss: Each student's loss, outside any graph, shape (S,).
        grads: The meta-gradient in each student's weights; ``None`` where the loss does not reach
            them.
        carried: Of PES, each pair's perturbation so far in this episode; else nothing.
    """

    window: Window
    loss: Tensor
    grads: list[list[Tensor]] | None
    carried: list[Tensor]


def through_window(
    unroll: Unroll,
    begin: Trajectories,
    batches: Sequence[Batch],
    coefficients: tuple[float, float],
    generators: Generators,
    perturbation: Perturbation | None = None,
    input_noise: float = 0.0,
) -> Estimate:
    """Truncated back-propagation, at the students' weights or at perturbed ones.

    Args:
        unroll: Runs the window.
        begin: Where everybody stands.
        batches: One a step.
        coefficients: Weights of meta-loss and imitation loss.
        generators: Where random numbers come from.
        perturbation: Moves the weights that the gradient is taken at (paper, section 4).
        input_noise: Standard deviation of noise on the gradients that students see.
    """
    weights = [list(student.weights()) for student in unroll.students]
    meta, imitation = coefficients

    def draws(purpose: str, step: int, row: int) -> torch.Generator:
        student, index = divmod(row, unroll.optimizees)
        return generators(student, purpose, step, distributed.rank() * unroll.optimizees + index)

    def window_at(
        moved: list[list[Tensor]], noise: Callable[[int], list[list[Tensor]]] | None = None
    ) -> tuple[Window, Tensor]:
        window = unroll.window(
            begin, batches, moved, noise=noise, draws=draws, input_noise=input_noise
        )
        return window, meta * window.meta_loss + imitation * window.imitation_loss

    moved, noise = weights, None
    if isinstance(perturbation, AdversarialPerturbation):
        psi = [perturbation.start(of) for of in weights]
        for _ in range(perturbation.steps):
            at = _added(weights, psi)
            leaves = [[w.detach().requires_grad_() for w in of] for of in at]
            _, loss = window_at(leaves)
            # Where the loss does not reach the weights there is nowhere to climb to.
            grads = _gradients(loss, leaves) or [[torch.zeros_like(w) for w in of] for of in at]
            psi = [
                perturbation.ascend(one, of, distributed.average(slopes))
                for one, of, slopes in zip(psi, weights, grads, strict=True)
            ]
        moved = _added(weights, psi)
    elif perturbation is not None:

        def drawn(*purpose: int) -> list[list[Tensor]]:
            return [
                perturbation.draw(of, generators(s, "perturbation", *purpose))
                for s, of in enumerate(weights)
            ]

        if perturbation.fresh_each_step:
            noise = drawn
        else:
            moved = _added(weights, drawn())
    window, loss = window_at(moved, noise)
    return Estimate(window, loss.detach(), _gradients(loss, weights), [])


def by_evolution(
    unroll: Unroll,
    begin: Trajectories,
    batches: Sequence[Batch],
    coefficients: tuple[float, float],
    generators: Generators,
    how: Estimator,
    carried: Sequence[Tensor],
) -> Estimate:
    """Persistent evolution strategies with antithetic pairs.

    With xi a particle's perturbation summed over the episode's windows so far, and L its loss in
    this one, the estimate is mean(xi L) / std^2 (Vicol et al. 2021, eq. 10).

    Args:
        unroll: Runs the particles: its students are one, ``how.particles`` times.
        begin: Where the particles stand.
        batches: One a step, the same for all.
        coefficients: Weights of meta-loss and imitation loss.
        generators: Where random numbers come from.
        how: Standard deviation and pairs.
        carried: For each weight the pairs' perturbations so far, (pairs, ...); none at an
            episode's beginning.
    """
    weights = [w.detach() for w in unroll.students[0].weights()]
    generator = generators(0, "particles", distributed.rank())
    fresh = [how.std * normal_like(w, generator, (how.pairs, *w.shape)) for w in weights]
    total = [old + new for old, new in zip(carried, fresh, strict=True)] if carried else fresh
    particles = [
        [w + sign * xi[pair] for w, xi in zip(weights, fresh, strict=True)]
        for pair in range(how.pairs)
        for sign in (1, -1)
    ]
    with torch.no_grad():
        window = unroll.window(begin, batches, particles)
    losses = coefficients[0] * window.meta_loss + coefficients[1] * window.imitation_loss
    slopes = (losses[::2] - losses[1::2]) / (2 * how.pairs * how.std**2)
    grads = [torch.tensordot(slopes, xi, 1) for xi in total]
    window = replace(
        window,
        meta_loss=window.meta_loss.mean(0, keepdim=True),
        imitation_loss=window.imitation_loss.mean(0, keepdim=True),
    )
    return Estimate(window, losses.mean(0, keepdim=True), [grads], total)


def _added(weights: list[list[Tensor]], psi: list[list[Tensor]]) -> list[list[Tensor]]:
    return [
        [w + z for w, z in zip(of, moves, strict=True)]
        for of, moves in zip(weights, psi, strict=True)
    ]


def _gradients(loss: Tensor, weights: list[list[Tensor]]) -> list[list[Tensor]] | None:
    """Gradients of the students' losses (S,), each in its own student's weights."""
    if not loss.requires_grad:
        return None
    found = torch.autograd.grad(loss.sum(), [w for of in weights for w in of])
    each = len(weights[0])
    return [list(found[at : at + each]) for at in range(0, len(found), each)]
