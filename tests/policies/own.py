"""A policy and teachers as a user would write them, in a module of one's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from amalgam.policies import Policy, PolicyConfig, ReferencePolicy


class SignState(NamedTuple):
    m: Tensor
    steps: int


@dataclass(frozen=True, kw_only=True)
class SignConfig(PolicyConfig):
    beta: float = 0.9


class LearnedSign(ReferencePolicy):
    """A moment's soft sign at a learned rate."""

    config_type = SignConfig
    config: SignConfig

    def build(self, generator: torch.Generator | None) -> None:
        self.rate = nn.Parameter(0.1 * torch.rand(1, generator=generator))

    def initial_state(self, like: Tensor, layout: Any = None) -> SignState:
        return SignState(torch.zeros_like(like, dtype=self.rate.dtype), 0)

    def compute(
        self, grad: Tensor, state: SignState, weights: Any, layout: Any
    ) -> tuple[Tensor, SignState]:
        m = self.config.beta * state.m + (1 - self.config.beta) * grad
        return weights[0] * (10 * m).tanh(), SignState(m, state.steps + 1)

    def warm_up(self, grad: Tensor, state: SignState, *, layout: Any = None) -> SignState:
        return self.step(grad, state)[1]


class Unfinished(Policy):
    """Lacks most of what a policy does."""

    def build(self, generator: torch.Generator | None) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Averaging:
    """SGD along the mean of the last two gradients, with a state of every form there is."""

    lr: float | None = 0.1
    kind: str = "averaging"
    policy: None = None

    @property
    def label(self) -> str:
        return f"{self.lr:g}"

    def at(self, lr: float) -> Averaging:
        return Averaging(lr)

    def initial_state(self, like: Tensor, layout: Any = None) -> Any:
        return {"last": [torch.zeros_like(like)], "counts": (0, 0.0), "name": "it", "none": None}

    def step(
        self, params: Tensor, grad: Tensor, state: Any, layout: Any, backend: str = "auto"
    ) -> tuple[Tensor, Any]:
        last, (steps, norm) = state["last"][-1].to(grad.device), state["counts"]
        new = {
            **state,
            "last": [last, grad.clone()],
            "counts": (steps + 1, norm / 3 + grad.norm().item()),
        }
        rate = 1.0 if self.lr is None else self.lr
        return 0.5 * rate * (last + grad) + 0.01 * params, new

    def warm_up(self, params: Tensor, grad: Tensor, state: Any, layout: Any) -> Any:
        return self.step(params, grad, state, layout)[1]
