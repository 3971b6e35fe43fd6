"""Learned baselines that treat coordinates alike: DM, extended RNNProp, learned rates of two kinds.

They have the forms of the code of the authors of Optimizer Amalgamation (ICLR 2022), on the LSTM of
:mod:`amalgam.operations.lstm`. One more baseline is :mod:`amalgam.policies.hierarchical`.
"Stronger Baselines" (Chen et al. 2020) needs no policy of its own: it is :class:`amalgam.Student`,
trained by a curriculum and imitation. All compute in plain PyTorch, differentiable to any order.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from amalgam.layout import Layout
from amalgam.operations import lstm
from amalgam.ops import StudentState
from amalgam.policies.lstm_policy import LSTMConfig, LSTMPolicy, MomentConfig, MomentPolicy
from amalgam.policies.policy import ReferencePolicy, zero_head
from amalgam.ranges import check_fields


class DMState(NamedTuple):
    """The state of a :class:`DM`, for N coordinates.

    Attributes:
        h: Outputs of the LSTM layers, shape (layers, hidden, N).
        c: Their cells, likewise.
    """

    h: Tensor
    c: Tensor


@dataclass(frozen=True, kw_only=True)
class DMConfig(LSTMConfig):
    """Architecture and constants of a :class:`DM`: those of :class:`LSTMConfig`, and one more.

    Attributes:
        learning_rate: Factor on the head's output.
    """

    learning_rate: float = 0.1

    def __post_init__(self) -> None:
        """Refuse what can't be computed."""
        super().__post_init__()
        check_fields(self, positive=("learning_rate",))


class DM(LSTMPolicy, ReferencePolicy):
    """Learning to learn by gradient descent by gradient descent (Andrychowicz et al. 2016).

    ``update = learning_rate (head . LSTM(g) + head_bias)``, on raw gradients.

    It takes the arguments of :class:`Policy`.
    """

    kind = "dm"
    config_type = DMConfig
    config: DMConfig

    def build(self, generator: torch.Generator | None) -> None:
        """Make an LSTM that sees the gradient, and its head."""
        self.build_lstm(1, generator)

    def initial_state(self, like: Tensor, layout: Layout | None = None) -> DMState:
        """The zero state for coordinates like these, shape (N,)."""
        return DMState(*self.zero_cells(like))

    def compute(
        self, grad: Tensor, state: DMState, weights: Sequence[Tensor], layout: Layout | None
    ) -> tuple[Tensor, DMState]:
        """One step; see :meth:`amalgam.policies.ReferencePolicy.compute`."""
        out, h, c = lstm.step(grad[None], state.h, state.c, weights)
        update = torch.addmm(weights[-1][:, None], weights[-2], out)[0]
        return self.config.learning_rate * update, DMState(h, c)

    def warm_up(self, grad: Tensor, state: DMState, *, layout: Layout | None = None) -> DMState:
        """The state after a warm-up step's gradient: all of it moves."""
        return self.step(grad, state)[1]


@dataclass(frozen=True, kw_only=True)
class DynamicRateConfig(MomentConfig):
    """Architecture and constants of an :class:`AdamLR` or :class:`RMSPropLR`.

    They are those of :class:`MomentConfig`, and one more.

    Attributes:
        alpha: Learning rate where the LSTM's output is 0; the LSTM multiplies it by a factor
            between 1/e and e.
    """

    alpha: float = 0.1

    def __post_init__(self) -> None:
        """Refuse what can't be computed."""
        super().__post_init__()
        check_fields(self, positive=("alpha",))


@dataclass(frozen=True, kw_only=True)
class RNNPropExtConfig(MomentConfig):
    """Architecture and constants of an :class:`RNNPropExt`.

    They are those of :class:`MomentConfig`, and one more.

    Attributes:
        learning_rate: Largest update of a coordinate in one step.
    """

    learning_rate: float = 0.001

    def __post_init__(self) -> None:
        """Refuse what can't be computed."""
        super().__post_init__()
        check_fields(self, positive=("learning_rate",))


class _NormalisedPolicy(MomentPolicy, ReferencePolicy):
    """Base of the policies that see the moment and the gradient in units of the gradient's size."""

    def normalised(
        self, grad: Tensor, state: StudentState
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The new m and v, then m and the gradient divided by the root of v, (N,) each."""
        m, v = self.moments(grad, state)
        scale = (v / (1 - self.config.beta2) + self.config.eps).rsqrt()
        return m, v, m / (1 - self.config.beta1) * scale, grad * scale


class RNNPropExt(_NormalisedPolicy):
    """RNNProp that also sees the gradient itself, and shows its inputs to every layer.

    With x0 = [g, m~, g~], where m~ = m / (1 - beta1) / r, g~ = g / r and
    r = sqrt(v / (1 - beta2) + eps), every layer and the head see their predecessor's output and
    x0: ``update = learning_rate tanh(head . [LSTM, x0] + head_bias)``. The head begins at zero.

    It takes the arguments of :class:`Policy`.
    """

    kind = "rnnprop-ext"
    config_type = RNNPropExtConfig
    config: RNNPropExtConfig

    def build(self, generator: torch.Generator | None) -> None:
        """Make an LSTM that sees three features in every layer, and a head of zeros."""
        self.build_cells(3, generator, beside=3)
        self.head = zero_head(self.config.hidden + 3, 1)

    def compute(
        self, grad: Tensor, state: StudentState, weights: Sequence[Tensor], layout: Layout | None
    ) -> tuple[Tensor, StudentState]:
        """One step; see :meth:`amalgam.policies.ReferencePolicy.compute`."""
        m, v, m_tilde, g_tilde = self.normalised(grad, state)
        features = x = torch.stack((grad, m_tilde, g_tilde))
        h, c = [], []
        for layer in range(self.config.layers):
            out, cell, _ = lstm.layer_step(
                x, state.h[layer], state.c[layer], weights[3 * layer : 3 * layer + 3]
            )
            h.append(out)
            c.append(cell)
            x = torch.cat((out, features))
        update = torch.addmm(weights[-1][:, None], weights[-2], x)[0].tanh()
        new_state = StudentState(m, v, torch.stack(h), torch.stack(c))
        return self.config.learning_rate * update, new_state


class _DynamicRate(_NormalisedPolicy):
    """Base of the policies whose direction is given and whose learning rate RNNProp's LSTM sets."""

    config_type = DynamicRateConfig
    config: DynamicRateConfig

    def build(self, generator: torch.Generator | None) -> None:
        """Make an LSTM that sees two features, and its head."""
        self.build_lstm(2, generator)

    def compute(
        self, grad: Tensor, state: StudentState, weights: Sequence[Tensor], layout: Layout | None
    ) -> tuple[Tensor, StudentState]:
        """One step; see :meth:`amalgam.policies.ReferencePolicy.compute`."""
        m, v, m_tilde, g_tilde = self.normalised(grad, state)
        out, h, c = lstm.step(torch.stack((m_tilde, g_tilde)), state.h, state.c, weights)
        rate = torch.addmm(weights[-1][:, None], weights[-2], out)[0].tanh().exp()
        update = self.config.alpha * rate * self.direction(m_tilde, g_tilde)
        return update, StudentState(m, v, h, c)

    @abstractmethod
    def direction(self, m_tilde: Tensor, g_tilde: Tensor) -> Tensor:
        """The direction of the update (N,), from the two features, (N,) each."""


class AdamLR(_DynamicRate):
    """Adam's direction at a learned rate: ``update = alpha exp(tanh(head . LSTM + bias)) m~``.

    The LSTM sees [m~, g~], as the student's does: m~ = m / (1 - beta1) / r, g~ = g / r and
    r = sqrt(v / (1 - beta2) + eps).

    It takes the arguments of :class:`Policy`.
    """

    kind = "adam-lr"

    def direction(self, m_tilde: Tensor, g_tilde: Tensor) -> Tensor:
        """Adam's: m~."""
        return m_tilde


class RMSPropLR(_DynamicRate):
    """RMSProp's direction at a learned rate: :class:`AdamLR` with g~ where that has m~.

    It takes the arguments of :class:`Policy`.
    """

    kind = "rmsprop-lr"

    def direction(self, m_tilde: Tensor, g_tilde: Tensor) -> Tensor:
        """RMSProp's: g~."""
        return g_tilde
