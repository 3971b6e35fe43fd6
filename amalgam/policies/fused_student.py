"""Base class of the students: the policies whose steps are one fused operation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amalgam import ops
from amalgam.layout import Layout
from amalgam.ops import StepSettings, StudentState
from amalgam.policies.lstm_policy import MomentConfig, MomentPolicy
from amalgam.policies.orthogonal import orthogonalized_rows

NormsOf = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def norms_of(params: Sequence[Tensor]) -> Sequence[Tensor]:
    """The 2-norm of each tensor, float64 of shape ()."""
    # In float64, as a float32 sum of millions of squares loses what it adds.
    norms: Sequence[Tensor] = ()
    return torch._foreach_norm(list(params), 2, dtype=torch.float64) if params else norms


class TensorContext(NamedTuple):
    """What a student is told of whole tensors in one step.

    In T steps, or where S students are told, the tensors have a first dimension more.

    Attributes:
        inputs: What enters the first layer, shape (tensors, inputs).
        corrections: Those of Adam's moments, and a factor on its steps, shape (tensors, 3).
        sizes: How many coordinates each tensor has.
        pace: The logarithm of the pace, which the next step begins from, shape (tensors,).
    """

    inputs: Tensor
    corrections: Tensor
    sizes: Sequence[int]
    pace: Tensor | None = None


class ContextConstants(NamedTuple):
    """What a context takes of tensors that stays as it is from step to step.

    Attributes:
        of_shapes: What the first layer sees of their shapes, a tensor (tensors,) an input's name.
        roots: The square roots of their sizes, of empty ones 1, shape (tensors,).
        shares: Which share of a whole step each takes, shape (tensors,).
        sizes: How many coordinates each has.
    """

    of_shapes: dict[str, Tensor]
    roots: Tensor
    shares: Tensor
    sizes: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class FusedConfig(MomentConfig):
    """The size of a student's LSTM, and its constants."""

    @property
    def settings(self) -> StepSettings:
        """The constants of :func:`amalgam.ops.student_step`, but for a step's corrections."""
        raise NotImplementedError


class FusedStudent(MomentPolicy):
    """Base of the students: :func:`amalgam.ops.student_step` computes their steps.

    A subclass says how its weights become the operation's. If it is told of whole tensors beside
    gradients, it says what (:meth:`context_of`), and how that enters the weights
    (:meth:`with_context`, :meth:`unfolded`).
    """

    config: FusedConfig

    def context(
        self,
        state: Any,
        params: Tensor | None,
        layout: Layout | None,
        grad: Tensor,
        left: float | Tensor = 1.0,
    ) -> TensorContext | None:
        """What the student is told in the step after a state; ``None`` if nothing.

        Args:
            state: The state before the step, of one or more optimizees of this layout, one's
                coordinates after another's.
            params: Their parameters, shape (N,); outside any graph.
            layout: Which tensors an optimizee's coordinates are; where absent, one vector.
            grad: Their gradients, shape (N,); outside any graph.
            left: As :meth:`context_of` takes it.

        Raises:
            ValueError: ``params`` or ``layout`` does not fit the state, or is absent and needed.
        """
        return None

    def constants_of(self, shapes: Sequence[torch.Size], like: Tensor) -> ContextConstants | None:
        """What :meth:`context_of` takes of tensors that stays; ``None`` if it takes nothing.

        Args:
            shapes: The tensors' shapes.
            like: A tensor of the dtype and device to say it in.
        """
        return None

    @property
    def paced(self) -> bool:
        """Whether it has a pace for each tensor, a factor on its steps that adapts."""
        return False

    @property
    def orthogonal(self) -> bool:
        """Whether the updates of whole matrices are orthogonalised."""
        return False

    @property
    def sees_shapes(self) -> bool:
        """Whether it is told of tensors what whoever has parts of them alone can't say."""
        return False

    def context_of(
        self,
        constants: ContextConstants | None,
        steps: Tensor,
        params: Sequence[Tensor],
        norms: NormsOf = norms_of,
        pace: Tensor | None = None,
        agreements: Callable[[], Tensor] | None = None,
        left: float | Tensor = 1.0,
    ) -> TensorContext | None:
        """What the student is told of tensors in their next step; ``None`` if nothing.

        Args:
            constants: What :meth:`constants_of` made of them.
            steps: How many steps each has taken, shape (tensors,), of the weights' dtype.
            params: The tensors themselves, of any floating-point dtype; constants.
            norms: Gives their 2-norms, where the student is told of these.
            pace: The logarithms of the paces that they have had so far, shape (tensors,), where the
                student has a pace.
            agreements: Gives what :func:`amalgam.ops.sign_agreements` says of their gradients and
                first moments, likewise.
            left: What a schedule has left of the learning rate, as a share of its peak, in [0, 1]:
                a number, or of shape () or (tensors,). A step that it makes shorter than a pace
                does is not made shorter by the pace, too.
        """
        return None

    @abstractmethod
    def operation_weights(self, weights: Sequence[Tensor]) -> Sequence[Tensor]:
        """The operation's weights, as far as they do not depend on a context."""

    def with_context(
        self,
        operation_weights: Sequence[Tensor],
        weights: Sequence[Tensor],
        context: TensorContext | None,
    ) -> tuple[Sequence[Tensor], StepSettings]:
        """The operation's weights and settings in a context.

        Args:
            operation_weights: What :meth:`operation_weights` made of ``weights``.
            weights: The student's own.
            context: What it is told.
        """
        return operation_weights, self.config.settings

    def folded(
        self, weights: Sequence[Tensor], context: TensorContext | None
    ) -> tuple[Sequence[Tensor], StepSettings]:
        """The operation's weights and settings, differentiable in ``weights``."""
        return self.with_context(self.operation_weights(weights), weights, context)

    @abstractmethod
    def unfolded(self, found: Sequence[Tensor], context: TensorContext | None) -> list[Tensor]:
        """Gradients in the policy's weights, of those in the operation's."""

    @abstractmethod
    def carried(self, new: StudentState, before: Any, context: TensorContext | None) -> Any:
        """The state after a step, of what the operation gave, the state before, and the context."""

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
        left: float = 1.0,
    ) -> tuple[Tensor, Any]:
        """One differentiable step.

        Args:
            grad: The optimizee's gradient, shape (N,).
            state: The carried state.
            weights: Weights to use in place of its own.
            layout: Which tensors the coordinates are, of one or more optimizees; where absent, one
                vector.
            generator: Not used: nothing is random.
            backend: As in :func:`amalgam.ops.student_step`.
            params: The parameters, shape (N,), for students that are told of them; constants.
            left: What a schedule has left of the learning rate, as :meth:`context_of` takes it.

        Returns:
            The update (N,), to be subtracted, and the new state.

        Raises:
            ValueError: Shapes, dtypes or devices do not fit, or the backend's name is unknown; or
                ``params`` is absent and needed.
            RuntimeError: The backend asked for can't compute this here.
        """
        given = None if params is None else params.detach()
        context = self.context(state, given, layout, grad.detach(), left)
        folded, settings = self.folded(self.weights() if weights is None else weights, context)
        before = StudentState(*state[:4])
        update, new = ops.student_step(grad, before, folded, settings, backend=backend)
        if self.orthogonal and layout is not None and layout.numel:
            rows = update.view(-1, layout.numel)
            update = orthogonalized_rows(rows, layout).reshape(-1)
        return update, self.carried(new, state, context)
