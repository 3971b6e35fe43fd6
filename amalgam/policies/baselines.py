"""Learned baselines whose coordinates are alike: DM, extended RNNProp, Adam and RMSProp with rates.

In the forms of the code of the authors of Optimizer Amalgamation (ICLR 2022), on the LSTM of
:mod:`amalgam.operations.lstm`. Beside these, :mod:`amalgam.policies.hierarchical`.
"Stronger Baselines" (Chen et al. 2020) needs no policy of its own: it is :class:`amalgam.Student`,
trained by a curriculum and imitation. All compute in plain PyTorch, differentiable to any order.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from amalgam import ops
from amalgam.layout import Layout
from amalgam.operations import lstm
from amalgam.ops import StepSettings, StudentState
from amalgam.policies.policy import (
    Cell,
    Policy,
    check_fields,
    glorot_head,
    reference_only,
    zero_head,
)


class DMState(NamedTuple):
    """What :class:`DM` carries, for N coordinates.

    Attributes:
        h: Outputs of the LSTM layers, shape (layers, hidden, N).
        c: Their cells, likewise.
    """

    h: Tensor
    c: Tensor


@dataclass(frozen=True)
class DMConfig:
    """What a :class:`DM` is, beside its weights.

    Attributes:
        layers: LSTM layers, 1 or more.
        hidden: Units in each.
        learning_rate: Factor on the head's output.
        warmup_steps: SGD steps that it is to follow on from.
        warmup_lr: Their learning rate.
    """

    layers: int = 2
    hidden: int = 20
    learning_rate: float = 0.1
    warmup_steps: int = 100
    warmup_lr: float = 0.05

    def __post_init__(self) -> None:
        """Refuse what can't be computed."""
        check_fields(self, counts=("layers", "hidden"), positive=("learning_rate",))


class DM(Policy):
    """Learning to learn by gradient descent by gradient descent (Andrychowicz et al. 2016).

    ``update = learning_rate (head . LSTM(g) + head_bias)``, on raw gradients.

    Args:
        config: Its architecture and constants.
        generator: Source of its initial weights; torch's global one where absent.
        provenance: Where its weights come from, JSON-serialisable; kept by :meth:`save`.
    """

    kind = "dm"
    config_type = DMConfig
    config: DMConfig

    def __init__(
        self,
        config: DMConfig | None = None,
        *,
        generator: torch.Generator | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(config, provenance=provenance)
        hidden = self.config.hidden
        self.cells = nn.ModuleList(
            Cell(hidden if layer else 1, hidden, generator) for layer in range(self.config.layers)
        )
        self.head = glorot_head(hidden, 1, generator)

    def initial_state(self, like: Tensor, layout: Layout | None = None) -> DMState:
        """The zero state for coordinates like these, shape (N,)."""
        shape = (self.config.layers, self.config.hidden, *like.shape)
        zeros = torch.zeros(shape, dtype=self.head.weight.dtype, device=like.device)
        return DMState(zeros, zeros.clone())

    def step(
        self,
        grad: Tensor,
        state: DMState,
        weights: Sequence[Tensor] | None = None,
        *,
        layout: Layout | None = None,
        generator: torch.Generator | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, DMState]:
        """One step; see :meth:`amalgam.policies.LearnedPolicy.step`."""
        reference_only(self.kind, backend)
        chosen = self.weights() if weights is None else weights
        out, h, c = lstm.step(grad[None], state.h, state.c, chosen)
        update = torch.addmm(chosen[-1][:, None], chosen[-2], out)[0]
        return self.config.learning_rate * update, DMState(h, c)

    def warm_up(self, grad: Tensor, state: DMState, *, layout: Layout | None = None) -> DMState:
        """The state after a warm-up step's gradient: its LSTM, which is all it has, follows."""
        return self.step(grad, state)[1]


@dataclass(frozen=True)
class DynamicRateConfig:
    """What an :class:`AdamLR` or :class:`RMSPropLR` is, beside its weights.

    Attributes:
        layers: LSTM layers, 1 or more.
        hidden: Units in each.
        alpha: Learning rate where the LSTM says nothing; it says a factor between 1/e and e.
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        eps: Added to the second moment inside the root.
        warmup_steps: SGD steps that it is to follow on from.
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
            self, counts=("layers", "hidden"), decays=("beta1", "beta2"), positive=("eps", "alpha")
        )


@dataclass(frozen=True)
class RNNPropExtConfig:
    """What an :class:`RNNPropExt` is, beside its weights.

    Attributes:
        layers: LSTM layers, 1 or more.
        hidden: Units in each.
        learning_rate: Largest update of a coordinate in one step.
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        eps: Added to the second moment inside the root.
        warmup_steps: SGD steps that it is to follow on from.
        warmup_lr: Their learning rate.
    """

    layers: int = 2
    hidden: int = 20
    learning_rate: float = 0.001
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
            positive=("eps", "learning_rate"),
        )


class _OnMoments(Policy):
    """What the policies share whose state is the student's: moments and an LSTM's."""

    config: DynamicRateConfig | RNNPropExtConfig
    cells: nn.ModuleList
    head: nn.Linear

    @property
    def _settings(self) -> StepSettings:
        how = self.config
        return StepSettings(beta1=how.beta1, beta2=how.beta2, eps=how.eps)

    def initial_state(self, like: Tensor, layout: Layout | None = None) -> StudentState:
        """The zero state for coordinates like these, shape (N,)."""
        how, dtype = self.config, self.head.weight.dtype

        def zeros(*shape: int) -> Tensor:
            return torch.zeros((*shape, *like.shape), dtype=dtype, device=like.device)

        cells = (how.layers, how.hidden)
        return StudentState(zeros(), zeros(), zeros(*cells), zeros(*cells))

    def warm_up(
        self, grad: Tensor, state: StudentState, *, layout: Layout | None = None
    ) -> StudentState:
        """The state after a warm-up step's gradient: moments move, the LSTM waits."""
        m, v = ops.update_moments(grad, state.m, state.v, self._settings)
        return state._replace(m=m, v=v)

    def _normalised(
        self, grad: Tensor, state: StudentState
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """New m and v, and m and the gradient over the root of v, (N,) each."""
        m, v = ops.update_moments(grad, state.m, state.v, self._settings)
        scale = (v / (1 - self.config.beta2) + self.config.eps).rsqrt()
        return m, v, m / (1 - self.config.beta1) * scale, grad * scale


class RNNPropExt(_OnMoments):
    """RNNProp that also sees the gradient itself, with its inputs handed to every layer.

    With x0 = [g, m~, g~], where m~ = m / (1 - beta1) / r, g~ = g / r and
    r = sqrt(v / (1 - beta2) + eps), every layer and the head see their predecessor's output and
    x0: ``update = learning_rate tanh(head . [LSTM, x0] + head_bias)``. The head begins at zero.

    Args:
        config: Its architecture and constants.
        generator: Source of its initial weights; torch's global one where absent.
        provenance: Where its weights come from, JSON-serialisable; kept by :meth:`save`.
    """

    kind = "rnnprop-ext"
    config_type = RNNPropExtConfig
    config: RNNPropExtConfig

    def __init__(
        self,
        config: RNNPropExtConfig | None = None,
        *,
        generator: torch.Generator | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(config, provenance=provenance)
        hidden = self.config.hidden
        self.cells = nn.ModuleList(
            Cell(hidden + 3 if layer else 3, hidden, generator)
            for layer in range(self.config.layers)
        )
        self.head = zero_head(hidden + 3, 1)

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
        """One step; see :meth:`amalgam.policies.LearnedPolicy.step`."""
        reference_only(self.kind, backend)
        chosen = self.weights() if weights is None else weights
        m, v, m_tilde, g_tilde = self._normalised(grad, state)
        features = x = torch.stack((grad, m_tilde, g_tilde))
        h, c = [], []
        for layer in range(self.config.layers):
            out, cell, _ = lstm.layer_step(
                x, state.h[layer], state.c[layer], chosen[3 * layer : 3 * layer + 3]
            )
            h.append(out)
            c.append(cell)
            x = torch.cat((out, features))
        update = torch.addmm(chosen[-1][:, None], chosen[-2], x)[0].tanh()
        new_state = StudentState(m, v, torch.stack(h), torch.stack(c))
        return self.config.learning_rate * update, new_state


class _DynamicRate(_OnMoments):
    """RNNProp's trunk, which here says the rate of a direction that is given."""

    config_type = DynamicRateConfig
    config: DynamicRateConfig

    def __init__(
        self,
        config: DynamicRateConfig | None = None,
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
        """One step; see :meth:`amalgam.policies.LearnedPolicy.step`."""
        reference_only(self.kind, backend)
        chosen = self.weights() if weights is None else weights
        m, v, m_tilde, g_tilde = self._normalised(grad, state)
        out, h, c = lstm.step(torch.stack((m_tilde, g_tilde)), state.h, state.c, chosen)
        rate = torch.addmm(chosen[-1][:, None], chosen[-2], out)[0].tanh().exp()
        update = self.config.alpha * rate * self._direction(m_tilde, g_tilde)
        return update, StudentState(m, v, h, c)

    @abstractmethod
    def _direction(self, m_tilde: Tensor, g_tilde: Tensor) -> Tensor:
        """Which way to go, of the two, (N,) each."""


class AdamLR(_DynamicRate):
    """Adam's direction at a learned rate: ``update = alpha exp(tanh(head . LSTM + bias)) m~``.

    The LSTM sees [m~, g~], as the student's does: m~ = m / (1 - beta1) / r, g~ = g / r and
    r = sqrt(v / (1 - beta2) + eps).

    Args:
        config: Its architecture and constants.
        generator: Source of its initial weights; torch's global one where absent.
        provenance: Where its weights come from, JSON-serialisable; kept by :meth:`save`.
    """

    kind = "adam-lr"

    def _direction(self, m_tilde: Tensor, g_tilde: Tensor) -> Tensor:
        return m_tilde


class RMSPropLR(_DynamicRate):
    """RMSProp's direction at a learned rate: :class:`AdamLR` with g~ where that has m~.

    Args:
        config: Its architecture and constants.
        generator: Source of its initial weights; torch's global one where absent.
        provenance: Where its weights come from, JSON-serialisable; kept by :meth:`save`.
    """

    kind = "rmsprop-lr"

    def _direction(self, m_tilde: Tensor, g_tilde: Tensor) -> Tensor:
        return g_tilde
