"""The student: RNNProp, an LSTM that turns a coordinate's gradients into its updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from amalgam import ops
from amalgam.layout import Layout
from amalgam.ops import StepSettings, StudentState
from amalgam.policies.policy import Cell, Policy, check_fields, glorot_head


@dataclass(frozen=True)
class StudentConfig:
    """What a student is, beside its weights.

    Attributes:
        layers: LSTM layers, 1 or more.
        hidden: Units in each.
        alpha: Largest update of a coordinate in one step.
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        eps: Added to the second moment inside the root.
        warmup_steps: SGD steps that it was meta-trained to follow on from.
        warmup_lr: Their learning rate.
    """

    layers: int = 2
    hidden: int = 20
    alpha: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-10
    warmup_steps: int = 100
    warmup_lr: float = 0.05

    def __post_init__(self) -> None:
        """Refuse what can't be computed."""
        check_fields(
            self,
            counts=("layers", "hidden"),
            decays=("beta1", "beta2"),
            positive=("eps", "alpha"),
        )

    @property
    def settings(self) -> StepSettings:
        """The constants of :func:`amalgam.ops.student_step`."""
        return StepSettings(self.alpha, self.beta1, self.beta2, self.eps)


class Student(Policy):
    """The learned optimizer (RNNProp as in Optimizer Amalgamation, ICLR 2022, section 3).

    Initialised as the authors' Keras cells are: Glorot-uniform input kernels and head, orthogonal
    recurrent kernels, zero biases but for the forget gates' ones.

    Args:
        config: Its architecture and constants.
        generator: Source of its initial weights; torch's global one where absent.
        provenance: Where its weights come from, JSON-serialisable; kept by :meth:`save`.
    """

    kind = "student"
    config_type = StudentConfig
    config: StudentConfig

    def __init__(
        self,
        config: StudentConfig | None = None,
        *,
        generator: torch.Generator | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(config, provenance=provenance)
        hidden = self.config.hidden
        self.cells = nn.ModuleList(
            Cell(hidden if layer else 2, hidden, generator) for layer in range(self.config.layers)
        )
        self.head = glorot_head(hidden, 1, generator)

    def initial_state(self, like: Tensor, layout: Layout | None = None) -> StudentState:
        """The zero state for coordinates like these; see :func:`amalgam.ops.initial_state`."""
        return ops.initial_state(like, self.weights())

    def step(
        self,
        grad: Tensor,
        state: StudentState,
        weights: Sequence[Tensor] | None = None,
        *,
        layout: Layout | None = None,
        generator: torch.Generator | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, StudentState]:
        """One differentiable step.

        Args:
            grad: The optimizee's gradient, shape (N,).
            state: The carried state.
            weights: Weights to use in place of its own.
            layout: Not looked at: all coordinates are alike.
            generator: Not looked at: nothing is random.
            backend: As in :func:`amalgam.ops.student_step`.

        Returns:
            The update (N,), to be subtracted, and the new state.
        """
        chosen = self.weights() if weights is None else weights
        return ops.student_step(grad, state, chosen, self.config.settings, backend=backend)

    def warm_up(
        self, grad: Tensor, state: StudentState, *, layout: Layout | None = None
    ) -> StudentState:
        """The state after a warm-up step's gradient: moments move, the LSTM waits."""
        m, v = ops.update_moments(grad, state.m, state.v, self.config.settings)
        return state._replace(m=m, v=v)
