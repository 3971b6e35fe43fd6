"""Base class of the students: the policies whose steps are one fused operation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amalgam import ops
from amalgam.layout import Layout
from amalgam.ops import StepSettings, StudentState
from amalgam.policies.lstm_policy import MomentConfig, MomentPolicy


class Told(NamedTuple):
    """What a student is told of tensors as a whole in one step; or in T, with a first dimension.

    Attributes:
        inputs: What enters the first layer, shape (tensors, inputs).
        corrections: Those of Adam's moments, shape (tensors, 2).
        sizes: How many coordinates each tensor has.
    """

    inputs: Tensor
    corrections: Tensor
    sizes: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class FusedConfig(MomentConfig):
    """The size of a student's LSTM, and its constants."""

    @property
    @abstractmethod
    def settings(self) -> StepSettings:
        """The constants of :func:`amalgam.ops.student_step`, without what a step is told."""


class FusedStudent(MomentPolicy):
    """Base of the students: :func:`amalgam.ops.student_step` computes their steps.

    A subclass says what a student is told of its tensors beside gradients (:meth:`told`), and how
    that and its weights become the operation's arguments (:meth:`folded`, :meth:`unfolded`).
    """

    config: FusedConfig

    @abstractmethod
    def told(self, state: Any, params: Tensor | None, layout: Layout | None) -> Told | None:
        """What the student is told of tensors in the step after a state; nothing if ``None``.

        Args:
            state: The state before the step, of one or more optimizees of this layout, one's
                coordinates after another's.
            params: Their parameters, shape (N,); outside any graph.
            layout: Which tensors an optimizee's coordinates are; where absent, one vector.
        """

    @abstractmethod
    def operation_weights(self, weights: Sequence[Tensor]) -> Sequence[Tensor]:
        """The operation's weights, as far as they do not depend on what the student is told."""

    @abstractmethod
    def folded(
        self, weights: Sequence[Tensor], told: Told | None
    ) -> tuple[Sequence[Tensor], StepSettings]:
        """The operation's weights and settings, differentiable in ``weights``."""

    @abstractmethod
    def unfolded(self, found: Sequence[Tensor], told: Told | None) -> list[Tensor]:
        """Gradients in the policy's weights, of those in the operation's."""

    @abstractmethod
    def carried(self, new: StudentState, before: Any) -> Any:
        """The state after a step, of what the operation gave and the state before it."""

    def step(
        self,
        grad: Tensor,
        state: Any,
        weights: Sequence[Tensor] | None = None,
        *,
        layout: Layout | None = None,
        generator: torch.Generator | None = None,
        backend: str = "auto",
        params: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """One differentiable step.

        Args:
            grad: The optimizee's gradient, shape (N,).
            state: The carried state.
            weights: Weights to use in place of its own.
            layout: Which tensors the coordinates are, for students that are told of them.
            generator: Not used: nothing is random.
            backend: As in :func:`amalgam.ops.student_step`.
            params: The parameters, shape (N,), for students that are told of them; constants.

        Returns:
            The update (N,), to be subtracted, and the new state.

        Raises:
            ValueError: Shapes, dtypes or devices do not fit, or the backend's name is unknown; or
                ``params`` is absent and needed.
            RuntimeError: The backend asked for can't compute this here.
        """
        given = None if params is None else params.detach()
        told = self.told(state, given, layout)
        folded, settings = self.folded(self.weights() if weights is None else weights, told)
        before = StudentState(*state[:4])
        update, new = ops.student_step(grad, before, folded, settings, backend=backend)
        return update, self.carried(new, state)
