"""The optimal choice: an LSTM that mixes a pool's updates, coordinate by coordinate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from amalgam import ops
from amalgam.hints import did_you_mean
from amalgam.layout import Layout
from amalgam.operations import lstm
from amalgam.operations.choice_step import pool_inputs, soft_mixture
from amalgam.ops import ChoiceSettings, ChoiceState
from amalgam.policies.lstm_policy import LSTMConfig, LSTMPolicy
from amalgam.policies.policy import reference_only, zero_head
from amalgam.policies.teachers import Teacher, step_together
from amalgam.ranges import check_fields

# In the authors' choice pools only RMSProp keeps the eps of its class.
_SHALLOW_SMALL = (Teacher("rmsprop", 0.005, eps=1e-7), Teacher("adam", 0.02))
_LARGE = ("sgd", "momentum", "rmsprop", "adam", "powersign", "addsign")
POOLS: dict[str, tuple[Teacher, ...]] = {
    "small": (Teacher("rmsprop"), Teacher("adam")),
    "large": tuple(Teacher(kind) for kind in _LARGE),
    "small-shallow": _SHALLOW_SMALL,
    "large-shallow": (
        Teacher("sgd", 2.0),
        Teacher("momentum", 2.0),
        *_SHALLOW_SMALL,
        Teacher("powersign", 1.0),
        Teacher("addsign", 1.0),
    ),
    "adam-sgd": (Teacher("sgd", 0.2), Teacher("adam", 0.02)),
}
"""Pools to choose from, by name.

``small`` and ``large`` have the paper's learning rates, which its teachers and the authors' runs of
May 2021 have too. The ``-shallow`` pools have the learning rates of the authors' code since
September 2021, two of which lie beyond the paper's grid. ``adam-sgd`` is the pool that the authors
added in review.
"""


@dataclass(frozen=True, kw_only=True)
class ChoiceConfig(LSTMConfig):
    """Architecture and constants of a choice, and the pool that it chooses from.

    Attributes:
        teachers: The pool it chooses from: teachers, or their kinds for those with default
            settings, or a name from :data:`POOLS`.
        layers: LSTM layers, 1 or more.
        hidden: Units in each.
        time_scale: Steps that make the time feature one.
        learning_rate: Factor on the mixture of the teachers' updates.
        hardness: 0 to mix softly. Otherwise one teacher is chosen, and training replaces the
            choice by a Gumbel-softmax of temperature 1 / hardness.
        lr_multiplier_scale: Where not 0, each teacher's update is multiplied by a learned
            factor between exp(-scale) and exp(scale).
        warmup_steps: Steps of SGD before the policy acts, in meta-training and after.
        warmup_lr: The learning rate of those steps.
    """

    teachers: tuple[Teacher | str, ...] | str = field(default=("rmsprop", "adam"), kw_only=False)
    time_scale: float = 2000.0
    learning_rate: float = 1.0
    hardness: float = 0.0
    lr_multiplier_scale: float = 0.0

    def __post_init__(self) -> None:
        """Fill in the pool, and refuse what can't be computed."""
        object.__setattr__(self, "teachers", _pool(self.teachers))
        if not self.teachers:
            raise ValueError("teachers must be one or more, not none")
        super().__post_init__()
        check_fields(
            self,
            positive=("time_scale", "learning_rate"),
            not_negative=("hardness", "lr_multiplier_scale"),
        )

    @property
    def pool(self) -> tuple[Teacher, ...]:
        """The teachers, as :meth:`__post_init__` has made them."""
        return cast(tuple[Teacher, ...], self.teachers)

    @property
    def settings(self) -> ChoiceSettings:
        """The constants of :func:`amalgam.ops.choice_step`."""

        def column(name: str) -> list[Any]:
            return [getattr(teacher, name) for teacher in self.pool]

        return ChoiceSettings(
            kinds=column("kind"),
            lr=column("lr"),
            beta1=column("beta1"),
            beta2=column("beta2"),
            eps=column("eps"),
            time_scale=self.time_scale,
            learning_rate=self.learning_rate,
        )


def _pool(
    teachers: str | Sequence[Teacher | str | Mapping[str, Any]],
) -> tuple[Teacher, ...]:
    """A pool from its name, or from teachers, their kinds, or their fields as JSON keeps them."""
    if isinstance(teachers, str):
        if teachers not in POOLS:
            hint = did_you_mean(teachers, POOLS)
            raise ValueError(f"teachers must be one of {list(POOLS)}, not {teachers!r}{hint}")
        return POOLS[teachers]
    given = [Teacher(**t) if isinstance(t, Mapping) else t for t in teachers]
    for teacher in given:
        if not isinstance(teacher, Teacher | str):
            raise TypeError(
                f"teachers must be analytical, whose updates are differentiable, not {teacher!r}"
            )
    return tuple(t if isinstance(t, Teacher) else Teacher(t) for t in given)


class Choice(LSTMPolicy):
    """The optimal-choice policy (Optimizer Amalgamation, ICLR 2022, section 2.3).

    :func:`amalgam.ops.choice_step` computes the soft mixture without rate multipliers, on any
    backend; plain PyTorch computes what ``hardness`` and ``lr_multiplier_scale`` add::

        factor_k = exp(lr_multiplier_scale tanh(lr_head . LSTM + lr_head_bias))
        w = softmax(hardness (z + Gumbel noise))   with a generator (in training)
        w = one-hot of the largest z               without a generator
        update = learning_rate sum_k w_k factor_k u_k

    Its initial weights are drawn as those of the authors' Keras cells: Glorot-uniform input kernels
    and head, orthogonal recurrent kernels, zero biases but for the forget gates' ones. The
    multipliers begin at one.

    Args:
        config: Its pool, architecture and constants.
        generator: Source of its initial weights; torch's global one where absent.
        provenance: Where its weights come from, JSON-serialisable; kept by :meth:`save`.
    """

    kind = "choice"
    config_type = ChoiceConfig
    config: ChoiceConfig

    def build(self, generator: torch.Generator | None) -> None:
        """Make an LSTM that sees the pool's updates and four features, and a head for the pool."""
        k = len(self.config.teachers)
        self.build_lstm(k + 4, generator, outputs=k)
        if self.config.lr_multiplier_scale:
            self.lr_head = zero_head(self.config.hidden, k)

    def initial_state(self, like: Tensor, layout: Layout | None = None) -> ChoiceState:
        """The zero state, in the weights' dtype, for coordinates like these, of shape (N,)."""
        k = len(self.config.teachers)
        return ChoiceState(self.zeros(like, k), self.zeros(like, k), *self.zero_cells(like))

    def step(
        self,
        grad: Tensor,
        state: ChoiceState,
        weights: Sequence[Tensor] | None = None,
        *,
        layout: Layout | None = None,
        generator: torch.Generator | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, ChoiceState]:
        """One differentiable step: that of :meth:`mix`, without the mixture."""
        update, new_state, _ = self.mix(
            grad, state, weights, layout=layout, generator=generator, backend=backend
        )
        return update, new_state

    def mix(
        self,
        grad: Tensor,
        state: ChoiceState,
        weights: Sequence[Tensor] | None = None,
        *,
        layout: Layout | None = None,
        generator: torch.Generator | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, ChoiceState, Tensor]:
        """One differentiable step, with the mixture that was chosen.

        Args:
            grad: The optimizee's gradient, shape (N,).
            state: The carried state.
            weights: Weights to use in place of its own.
            layout: Which tensors the coordinates are; their ranks are a feature. Where absent, one
                vector.
            generator: Source of the noise where ``hardness`` is not 0; without a generator there
                is no noise and the choice is hard. A soft choice is the same with and without.
            backend: As in :func:`amalgam.ops.choice_step`; ``"reference"`` or ``"auto"`` where
                ``hardness`` or ``lr_multiplier_scale`` is not 0.

        Returns:
            The update (N,), to be subtracted, the new state, and the mixture (K, N).

        Raises:
            ValueError: Shapes do not fit together, or ``layout`` does not fit the gradient.
            RuntimeError: The backend asked for can't compute this here.
        """
        chosen = self.weights() if weights is None else list(weights)
        if layout is None:
            layout = Layout({"": grad.shape})
        if layout.numel != grad.numel():
            raise ValueError(
                f"layout must have as many coordinates as grad, {grad.numel()}, not {layout.numel}"
            )
        ranks = layout.ranks(grad.device)
        if not self.config.hardness and not self.config.lr_multiplier_scale:
            settings = self.config.settings
            return ops.choice_step(grad, state, chosen, ranks, settings, backend=backend)
        reference_only("choice with hardness or lr_multiplier_scale", backend)
        return self._extended(grad, state, chosen, ranks, generator)

    def _extended(
        self,
        grad: Tensor,
        state: ChoiceState,
        weights: list[Tensor],
        ranks: Tensor,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, ChoiceState, Tensor]:
        config, settings = self.config, self.config.settings
        lr_head = []
        if config.lr_multiplier_scale:
            weights, lr_head = weights[:-2], weights[-2:]
        u, m, v, x = pool_inputs(
            *(grad, state.m, state.v, ranks, state.steps / config.time_scale, settings.pool())
        )
        out, h, c = lstm.step(x, state.h, state.c, weights)
        logits = torch.addmm(weights[-1][:, None], weights[-2], out)
        if not config.hardness:
            mixture = soft_mixture(logits)
        elif generator is None:
            winner = functional.one_hot(logits.argmax(0), logits.shape[0])
            mixture = winner.T.to(logits.dtype)
        else:
            uniform = torch.rand(
                logits.shape, generator=generator, dtype=logits.dtype, device=generator.device
            )
            tiny = torch.finfo(logits.dtype).tiny
            gumbel = -(-uniform.clamp_min(tiny).log()).log()
            mixture = (config.hardness * (logits + gumbel.to(logits.device))).softmax(0)
        if lr_head:
            factor = torch.addmm(lr_head[1][:, None], lr_head[0], out).tanh()
            u = u * (config.lr_multiplier_scale * factor).exp()
        update = config.learning_rate * (mixture * u).sum(0)
        return update, ChoiceState(m, v, h, c, state.steps + 1), mixture

    def warm_up(
        self, grad: Tensor, state: ChoiceState, *, layout: Layout | None = None
    ) -> ChoiceState:
        """The state after a warm-up step's gradient: moments and time move, the LSTM does not."""
        _, m, v = step_together(
            self.config.pool, grad.expand_as(state.m), state.m, state.v, backend="reference"
        )
        return state._replace(m=m, v=v, steps=state.steps + 1)
