"""The optimal choice: an LSTM that mixes a pool's updates, coordinate by coordinate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from amalgam import ops
from amalgam.ops import ChoiceSettings, ChoiceState
from amalgam.policies.student import _Cell
from amalgam.policies.teachers import Pool, Teacher


@dataclass(frozen=True)
class ChoiceConfig:
    """What a choice is, beside its weights.

    Attributes:
        teachers: The pool it chooses from: teachers, or their kinds for those with default
            settings.
        layers: LSTM layers, 1 or more.
        hidden: Units in each.
        time_scale: Steps that make the time feature one.
        learning_rate: Factor on the mixture of the teachers' updates.
    """

    teachers: tuple[Teacher | str, ...] = ("rmsprop", "adam")
    layers: int = 2
    hidden: int = 20
    time_scale: float = 2000.0
    learning_rate: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what can't be computed."""
        object.__setattr__(self, "teachers", Pool(self.teachers).teachers)
        if not self.teachers:
            raise ValueError("teachers must be one or more, not none")
        for name in ("layers", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
        for name in ("time_scale", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, not {getattr(self, name)}")

    @property
    def settings(self) -> ChoiceSettings:
        """The constants of :func:`amalgam.ops.choice_step`."""

        def column(name: str) -> list[Any]:
            return [getattr(teacher, name) for teacher in self.teachers]

        return ChoiceSettings(
            kinds=column("kind"),
            lr=column("lr"),
            beta1=column("beta1"),
            beta2=column("beta2"),
            eps=column("eps"),
            time_scale=self.time_scale,
            learning_rate=self.learning_rate,
        )


class Choice(nn.Module):
    """The optimal-choice policy (Optimizer Amalgamation, ICLR 2022, section 2.3), softly mixing.

    Initialised as the authors' Keras cells are: Glorot-uniform input kernels and head, orthogonal
    recurrent kernels, zero biases but for the forget gates' ones.

    Args:
        config: Its pool, architecture and constants.
        generator: Source of its initial weights; torch's global one where absent.
    """

    def __init__(
        self, config: ChoiceConfig | None = None, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.config = config or ChoiceConfig()
        k, hidden = len(self.config.teachers), self.config.hidden
        self.cells = nn.ModuleList(
            _Cell(hidden if layer else k + 4, hidden, generator)
            for layer in range(self.config.layers)
        )
        self.head = nn.utils.skip_init(nn.Linear, hidden, k)
        nn.init.xavier_uniform_(self.head.weight, generator=generator)
        nn.init.zeros_(self.head.bias)

    def weights(self) -> list[Tensor]:
        """The weights in the order that :func:`amalgam.ops.choice_step` takes."""
        return list(self.parameters())

    def initial_state(self, like: Tensor) -> ChoiceState:
        """The zero state, in the weights' dtype, for coordinates like these, of shape (N,)."""
        k, config, dtype = len(self.config.teachers), self.config, self.head.weight.dtype

        def zeros(*shape: int) -> Tensor:
            return torch.zeros((*shape, *like.shape), dtype=dtype, device=like.device)

        cells = (config.layers, config.hidden)
        return ChoiceState(zeros(k), zeros(k), zeros(*cells), zeros(*cells))

    def step(
        self, grad: Tensor, state: ChoiceState, ranks: Tensor, *, backend: str = "auto"
    ) -> tuple[Tensor, ChoiceState, Tensor]:
        """One differentiable step.

        Args:
            grad: The optimizee's gradient, shape (N,).
            state: The carried state.
            ranks: The rank of the parameter that each coordinate belongs to, shape (N,), integers:
                ``torch.cat([torch.full((p.numel(),), p.dim()) for p in parameters])``.
            backend: As in :func:`amalgam.ops.choice_step`.

        Returns:
            The update (N,), to be subtracted, the new state, and the mixture (K, N).
        """
        return ops.choice_step(
            grad, state, self.weights(), ranks, self.config.settings, backend=backend
        )

    def extra_repr(self) -> str:
        """The configuration, for ``repr``."""
        return str(self.config)
