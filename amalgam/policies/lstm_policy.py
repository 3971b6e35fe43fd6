"""Base classes of the policies that are an LSTM with a linear head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from amalgam import ops
from amalgam.layout import Layout
from amalgam.ops import StepSettings, StudentState
from amalgam.policies.policy import Policy, PolicyConfig, glorot_head
from amalgam.ranges import check_fields


@dataclass(frozen=True, kw_only=True)
class LSTMConfig(PolicyConfig):
    """The size of an LSTM.

    Attributes:
        layers: LSTM layers, 1 or more.
        hidden: Units in each.
    """

    layers: int = 2
    hidden: int = 20

    def __post_init__(self) -> None:
        """Refuse what can't be computed."""
        super().__post_init__()
        check_fields(self, units=("hidden",), layers=("layers",))


@dataclass(frozen=True, kw_only=True)
class MomentConfig(LSTMConfig):
    """The size of an LSTM, and the constants of the moments that it sees.

    Attributes:
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        eps: Added to the second moment inside the root.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-10

    def __post_init__(self) -> None:
        """Refuse what can't be computed."""
        super().__post_init__()
        check_fields(self, decays=("beta1", "beta2"), positive=("eps",))


class Cell(nn.Module):
    """Weights of one LSTM layer, gates in the order input, forget, candidate, output.

    Initialised as Keras does: Glorot-uniform input kernel, orthogonal recurrent kernel, zero
    biases but for the forget gate's ones.
    """

    def __init__(self, inputs: int, hidden: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden, inputs))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden, hidden))
        self.bias = nn.Parameter(torch.zeros(4 * hidden))
        nn.init.xavier_uniform_(self.weight_ih, generator=generator)
        nn.init.orthogonal_(self.weight_hh, generator=generator)
        with torch.no_grad():
            self.bias[hidden : 2 * hidden] = 1.0


class LSTMPolicy(Policy):
    """Base of the policies whose weights are those of LSTM layers and a linear head.

    Attributes:
        cells: The layers, each a :class:`Cell`.
        head: The head.
    """

    config: LSTMConfig
    cells: nn.ModuleList
    head: nn.Linear

    def build_cells(
        self, features: int, generator: torch.Generator | None, beside: int = 0
    ) -> None:
        """Make the layers.

        Args:
            features: Inputs of the first layer.
            generator: Source of the initial weights.
            beside: Inputs of every other layer beside the output of the one before it.
        """
        hidden = self.config.hidden
        self.cells = nn.ModuleList(
            Cell(hidden + beside if layer else features, hidden, generator)
            for layer in range(self.config.layers)
        )

    def build_lstm(
        self, features: int, generator: torch.Generator | None, outputs: int = 1
    ) -> None:
        """Make the layers, and a head with a Glorot-uniform kernel.

        Args:
            features: Inputs of the first layer.
            generator: Source of the initial weights.
            outputs: The head's outputs.
        """
        self.build_cells(features, generator)
        self.head = glorot_head(self.config.hidden, outputs, generator)

    def zeros(self, like: Tensor, *shape: int) -> Tensor:
        """Zeros in the weights' dtype, of a shape that ends in that of the coordinates."""
        dtype = self.head.weight.dtype
        return torch.zeros((*shape, *like.shape), dtype=dtype, device=like.device)

    def zero_cells(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The layers' outputs and cells before the first step, (layers, hidden, N) each."""
        shape = (self.config.layers, self.config.hidden)
        return self.zeros(like, *shape), self.zeros(like, *shape)


class MomentPolicy(LSTMPolicy):
    """Base of the LSTMs that see the moments of the gradient and carry the student's state.

    A subclass may carry more, in a named tuple that begins with the fields of that state.
    """

    config: MomentConfig

    def initial_state(self, like: Tensor, layout: Layout | None = None) -> Any:
        """The zero state for coordinates like these, shape (N,)."""
        return StudentState(self.zeros(like), self.zeros(like), *self.zero_cells(like))

    def warm_up(self, grad: Tensor, state: Any, *, layout: Layout | None = None) -> Any:
        """The state after a warm-up step's gradient: the moments move, the LSTM does not."""
        m, v = self.moments(grad, state)
        return state._replace(m=m, v=v)

    def moments(self, grad: Tensor, state: Any) -> tuple[Tensor, Tensor]:
        """The new first and second moment, (N,) each."""
        config = self.config
        settings = StepSettings(beta1=config.beta1, beta2=config.beta2, eps=config.eps)
        return ops.update_moments(grad, state.m, state.v, settings)
