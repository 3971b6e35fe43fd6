"""Perturbations of a student's weights in meta-training, which make the student more stable.

Stability-aware amalgamation (Optimizer Amalgamation, ICLR 2022) computes the meta-gradient at
phi + psi, the weights phi plus a perturbation psi, and applies it to phi. A *random* psi is drawn.
An *adversarial* psi climbs the window's loss::

    psi = perturbation.start(weights)
    for _ in range(perturbation.steps):
        grads = gradients of the window's loss with respect to the weights, at weights + psi
        psi = perturbation.ascend(psi, weights, grads)

Norms, means and clipping are of each tensor of weights on its own. Where the paper and its authors'
code differ, both forms are here, and the docstrings say which is which. :class:`InputNoise` is not
a perturbation of weights but noise on the gradients that the student sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from amalgam.hints import did_you_mean
from amalgam.ranges import check_fields
from amalgam.seeding import normal_like

NORMS = ("l2", "scale", "inf")


@runtime_checkable
class RandomPerturbation(Protocol):
    """A perturbation that is drawn at random."""

    @property
    def fresh_each_step(self) -> bool:
        """Whether every step of a window has its own draw; if not, the window has one."""
        ...

    def draw(self, weights: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
        """A perturbation psi of these weights, to be added to them; outside any graph."""
        ...


@runtime_checkable
class AdversarialPerturbation(Protocol):
    """A perturbation that climbs the loss."""

    @property
    def steps(self) -> int:
        """How often it climbs. Each climb runs the window once more, forward and backward."""
        ...

    def start(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """The perturbation before the first climb: zeros."""
        ...

    def ascend(
        self, psi: Sequence[Tensor], weights: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> list[Tensor]:
        """One climb.

        Args:
            psi: The perturbation so far; not changed.
            weights: The weights phi, unperturbed.
            grads: Gradients of the loss with respect to the weights, at phi + psi.

        Returns:
            The new perturbation, outside any graph.
        """
        ...


Perturbation = RandomPerturbation | AdversarialPerturbation


@dataclass(frozen=True)
class Gaussian:
    """Independent Gaussian noise on every weight.

    Relative noise has std^2 times the mean square of the tensor of weights as its variance (paper,
    eq. 5); the authors' code adds 1e-8 to the mean square. That code draws anew at every step, and
    for every tensor of the optimizee. Here all coordinates of the optimizee share a step's draw, as
    they share the weights.

    Attributes:
        std: Standard deviation of the noise; if ``relative``, as a multiple of the root mean square
            of the tensor of weights.
        relative: Whether the noise is relative to the weights.
        fresh_each_step: Whether every step of a window has its own draw (the authors' ``Random``).
            If not, the window has one (their ``PersistentRandom``).
        floor: Added to the mean square if ``relative``; 0 for the paper's form.
    """

    std: float = 0.01
    relative: bool = False
    fresh_each_step: bool = True
    floor: float = 1e-8

    def __post_init__(self) -> None:
        """Refuse what can't be drawn."""
        check_fields(self, positive=("std",), not_negative=("floor",))

    @torch.no_grad()
    def draw(self, weights: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
        """See :meth:`RandomPerturbation.draw`."""
        drawn = []
        for weight in weights:
            std: float | Tensor = self.std
            if self.relative:
                std = self.std * (weight.square().mean() + self.floor).sqrt()
            drawn.append(std * normal_like(weight, generator))
        return drawn


class _FromZero:
    """An adversarial perturbation that begins at zero."""

    def start(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """See :meth:`AdversarialPerturbation.start`."""
        return [torch.zeros_like(weight, requires_grad=False) for weight in weights]


@dataclass(frozen=True)
class FGSM(_FromZero):
    """The fast gradient sign method (Goodfellow et al. 2015): psi += step_size * sign(grad).

    Attributes:
        step_size: How far every weight moves.
    """

    step_size: float = 0.01

    def __post_init__(self) -> None:
        """Refuse what does not climb."""
        check_fields(self, positive=("step_size",))

    @property
    def steps(self) -> int:
        """One climb."""
        return 1

    @torch.no_grad()
    def ascend(
        self, psi: Sequence[Tensor], weights: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> list[Tensor]:
        """See :meth:`AdversarialPerturbation.ascend`."""
        return [p + self.step_size * g.sign() for p, g in zip(psi, grads, strict=True)]


@dataclass(frozen=True)
class PGD(_FromZero):
    """Projected gradient descent (Madry et al. 2018), in the form of the authors' code or paper.

    The code projects the sum so far: psi = project(psi + lr * grad). The paper clips each
    gradient: psi += lr * project(grad). Both project onto a ball given by ``norm`` and
    ``magnitude``.

    Attributes:
        steps: How often it climbs.
        magnitude: Radius of the ball.
        norm: The ball's norm. ``"l2"`` is the Euclidean norm of a tensor. ``"scale"`` is the same
            with the radius times the tensor's number of weights. ``"inf"`` clamps each weight.
        lr: Factor on the gradients.
        clip_gradient: Whether gradients are clipped, as in the paper. If not, psi is projected.
    """

    steps: int = 1
    magnitude: float = 0.01
    norm: Literal["l2", "scale", "inf"] = "l2"
    lr: float = 0.005
    clip_gradient: bool = False

    def __post_init__(self) -> None:
        """Refuse what can't be computed, or does not climb."""
        check_fields(self, counts=("steps",), positive=("magnitude", "lr"))
        if self.norm not in NORMS:
            raise ValueError(
                f"norm must be one of {list(NORMS)}, not {self.norm!r}"
                f"{did_you_mean(self.norm, NORMS)}"
            )

    @torch.no_grad()
    def ascend(
        self, psi: Sequence[Tensor], weights: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> list[Tensor]:
        """See :meth:`AdversarialPerturbation.ascend`."""
        pairs = zip(psi, grads, strict=True)
        if self.clip_gradient:
            return [p + self.lr * self._project(g) for p, g in pairs]
        return [self._project(p + self.lr * g) for p, g in pairs]

    def _project(self, x: Tensor) -> Tensor:
        if self.norm == "inf":
            return x.clamp(-self.magnitude, self.magnitude)
        factor = x.numel() if self.norm == "scale" else 1
        return _clip_norm(x, torch.full_like(x.norm(), self.magnitude * factor))


@dataclass(frozen=True)
class AdaptivePGD(_FromZero):
    """Steps in proportion to the weights: psi += magnitude * ||phi|| * grad / ||grad|| (eq. 6).

    Attributes:
        steps: How often it climbs.
        magnitude: Length of a step, as a multiple of the norm of the tensor of weights.
        normalise: Whether every step has that length, as in the paper. If not, it is the largest
            length, and shorter gradients are added as they are, as in the authors' code ("CGD").
    """

    steps: int = 1
    magnitude: float = 0.005
    normalise: bool = True

    def __post_init__(self) -> None:
        """Refuse what does not climb."""
        check_fields(self, counts=("steps",), positive=("magnitude",))

    @torch.no_grad()
    def ascend(
        self, psi: Sequence[Tensor], weights: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> list[Tensor]:
        """See :meth:`AdversarialPerturbation.ascend`."""
        climbed = []
        for p, weight, grad in zip(psi, weights, grads, strict=True):
            length = self.magnitude * weight.norm()
            if self.normalise:
                norm = grad.norm()
                # A gradient of zero has no direction, so psi stays.
                climbed.append(p + grad * torch.where(norm > 0, length / norm, 0))
            else:
                climbed.append(p + _clip_norm(grad, length))
        return climbed


def _clip_norm(x: Tensor, longest: Tensor) -> Tensor:
    """``x``, shortened where its norm is larger than ``longest``."""
    norm = x.norm()
    return torch.where(norm > longest, x * (longest / norm), x)


@dataclass(frozen=True)
class InputNoise:
    """Gaussian noise on the gradients that the student sees in training (paper, appendix E.3).

    It is added before the student updates its moments. The paper found that it prevents
    convergence.

    Attributes:
        std: Standard deviation of the noise.
    """

    std: float

    def __post_init__(self) -> None:
        """Refuse what can't be drawn."""
        check_fields(self, positive=("std",))

    def add(self, grad: Tensor, generator: torch.Generator) -> Tensor:
        """A gradient of any shape plus noise drawn from ``generator``; autograd passes through."""
        return grad + self.std * normal_like(grad, generator)


KINDS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "gaussian": (Gaussian, {"relative": False, "fresh_each_step": True}),
    "gaussian_rel": (Gaussian, {"relative": True, "fresh_each_step": True}),
    "persistent_gaussian": (Gaussian, {"relative": False, "fresh_each_step": False}),
    "persistent_gaussian_rel": (Gaussian, {"relative": True, "fresh_each_step": False}),
    "fgsm": (FGSM, {}),
    "pgd": (PGD, {"clip_gradient": False}),
    "pgd_clipped_gradient": (PGD, {"clip_gradient": True}),
    "adaptive_pgd": (AdaptivePGD, {"normalise": True}),
    "cgd": (AdaptivePGD, {"normalise": False}),
}
"""The perturbations by ``kind`` in recipes: a class, and the fields that this kind settles."""
