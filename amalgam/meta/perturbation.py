"""Perturbations of a student's weights in training, which make the student more stable.

Stability-aware amalgamation (Optimizer Amalgamation, ICLR 2022) takes the meta-gradient at
phi + psi, weights and perturbation, and applies it to phi. A *random* psi is drawn; an
*adversarial* one climbs the window's loss::

    psi = perturbation.start(weights)
    for _ in range(perturbation.steps):
        grads = gradients of the window's loss at weights + psi
        psi = perturbation.ascend(psi, weights, grads)

Everything is per tensor of weights. Where the paper and its authors' code differ, both are here,
and the docstrings say which is which. :class:`InputNoise` is noise on the gradients that the
student sees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from amalgam.hints import did_you_mean
from amalgam.seeding import normal_like

NORMS = ("l2", "scale", "inf")


@runtime_checkable
class RandomPerturbation(Protocol):
    """A perturbation that is drawn."""

    @property
    def fresh_each_step(self) -> bool:
        """Whether every inner step has a draw of its own, or all of a window share one."""
        ...

    def draw(self, weights: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
        """A perturbation psi of these weights, to be added to them; outside any graph."""
        ...


@runtime_checkable
class AdversarialPerturbation(Protocol):
    """A perturbation that climbs the loss."""

    @property
    def steps(self) -> int:
        """How often it climbs; each costs one more unroll and its backward."""
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
            grads: Gradients of the loss at phi + psi.

        Returns:
            The new perturbation, outside any graph.
        """
        ...


Perturbation = RandomPerturbation | AdversarialPerturbation


def _check_positive(settings: Any, *names: str) -> None:
    for name in names:
        if not 0 < getattr(settings, name) < math.inf:
            raise ValueError(f"{name} must be positive and finite, not {getattr(settings, name)}")


def _check_steps(settings: Any) -> None:
    if settings.steps < 1:
        raise ValueError(f"steps must be 1 or more, not {settings.steps}")


@dataclass(frozen=True)
class Gaussian:
    """Independent Gaussian noise on every weight.

    Relative, its variance is std^2 times the tensor's mean square (paper, eq. 5), to which the
    authors' code adds 1e-8. That code draws anew in every inner step, and there even for every
    tensor of the optimizee; here all its coordinates share a step's draw, as they share weights.

    Attributes:
        std: Standard deviation; where relative, over the tensor's root mean square.
        relative: Whether the noise is.
        fresh_each_step: Whether every inner step has its own draw (the authors' ``Random``), or
            the window one (their ``PersistentRandom``).
        floor: Added to the mean square where relative; 0 for the paper's form.
    """

    std: float = 0.01
    relative: bool = False
    fresh_each_step: bool = True
    floor: float = 1e-8

    def __post_init__(self) -> None:
        """Refuse what can't be drawn."""
        _check_positive(self, "std")
        if not 0 <= self.floor < math.inf:
            raise ValueError(f"floor must be 0 or more and finite, not {self.floor}")

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
    """The fast gradient sign method (Goodfellow et al. 2015): psi += step_size sign(grad).

    Attributes:
        step_size: The step of every weight.
    """

    step_size: float = 0.01

    def __post_init__(self) -> None:
        """Refuse what does not climb."""
        _check_positive(self, "step_size")

    @property
    def steps(self) -> int:
        """One."""
        return 1

    @torch.no_grad()
    def ascend(
        self, psi: Sequence[Tensor], weights: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> list[Tensor]:
        """See :meth:`AdversarialPerturbation.ascend`."""
        return [p + self.step_size * g.sign() for p, g in zip(psi, grads, strict=True)]


@dataclass(frozen=True)
class PGD(_FromZero):
    """Projected gradient descent (Madry et al. 2018), as the code or the paper of the authors.

    The code projects the sum so far: psi <- project(psi + lr grad). The paper clips each
    gradient: psi += lr clip(grad). Both by ``norm`` and ``magnitude``.

    Attributes:
        steps: Climbs.
        magnitude: Radius of the ball to project on.
        norm: ``"l2"``; ``"scale"``, l2 with the radius times the tensor's number of weights; or
            ``"inf"``, each weight on its own.
        lr: Factor on the gradients.
        clip_gradient: Whether gradients are clipped, as in the paper, or psi is projected.
    """

    steps: int = 1
    magnitude: float = 0.01
    norm: Literal["l2", "scale", "inf"] = "l2"
    lr: float = 0.005
    clip_gradient: bool = False

    def __post_init__(self) -> None:
        """Refuse what can't be computed, or does not climb."""
        _check_steps(self)
        _check_positive(self, "magnitude", "lr")
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
    """Steps as long as the weights are: psi += magnitude ||phi|| grad / ||grad|| (paper, eq. 6).

    Attributes:
        steps: Climbs.
        magnitude: Length of a step over that of the tensor of weights.
        normalise: Whether every step has that length, as in the paper. Otherwise it is the
            longest, and shorter gradients are added as they are, as in the authors' code ("CGD").
    """

    steps: int = 1
    magnitude: float = 0.005
    normalise: bool = True

    def __post_init__(self) -> None:
        """Refuse what does not climb."""
        _check_steps(self)
        _check_positive(self, "magnitude")

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

    It is added before the moments. The paper found that it prevents convergence.

    Attributes:
        std: Its standard deviation.
    """

    std: float

    def __post_init__(self) -> None:
        """Refuse what can't be drawn."""
        _check_positive(self, "std")

    def add(self, grad: Tensor, generator: torch.Generator) -> Tensor:
        """A gradient of any shape, in its graph, with noise drawn from ``generator``."""
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
"""The perturbations by their names in recipes: a class, and the fields that the name settles."""
