"""The student: RNNProp, an LSTM that turns a coordinate's gradients into its updates."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from amalgam import ops, weights
from amalgam.ops import StepSettings, StudentState


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
        for name in ("layers", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)}")
        for name in ("eps", "alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, not {getattr(self, name)}")
        for name in ("warmup_steps", "warmup_lr"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more and finite, not {getattr(self, name)}")

    @property
    def settings(self) -> StepSettings:
        """The constants of :func:`amalgam.ops.student_step`."""
        return StepSettings(self.alpha, self.beta1, self.beta2, self.eps)


class _Cell(nn.Module):
    """Weights of one LSTM layer, gates in the order input, forget, candidate, output."""

    def __init__(self, inputs: int, hidden: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden, inputs))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden, hidden))
        self.bias = nn.Parameter(torch.zeros(4 * hidden))
        nn.init.xavier_uniform_(self.weight_ih, generator=generator)
        nn.init.orthogonal_(self.weight_hh, generator=generator)
        with torch.no_grad():
            self.bias[hidden : 2 * hidden] = 1.0


class Student(nn.Module):
    """The learned optimizer (RNNProp as in Optimizer Amalgamation, ICLR 2022, section 3).

    Initialised as the authors' Keras cells are: Glorot-uniform input kernels and head, orthogonal
    recurrent kernels, zero biases but for the forget gates' ones.

    Args:
        config: Its architecture and constants.
        generator: Source of its initial weights; torch's global one where absent.
        provenance: Where its weights come from, JSON-serialisable; kept by :meth:`save`.
    """

    def __init__(
        self,
        config: StudentConfig | None = None,
        *,
        generator: torch.Generator | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config = config or StudentConfig()
        self.provenance = dict(provenance or {})
        hidden = self.config.hidden
        self.cells = nn.ModuleList(
            _Cell(hidden if layer else 2, hidden, generator) for layer in range(self.config.layers)
        )
        self.head = nn.utils.skip_init(nn.Linear, hidden, 1)
        nn.init.xavier_uniform_(self.head.weight, generator=generator)
        nn.init.zeros_(self.head.bias)

    def weights(self) -> list[Tensor]:
        """The weights in the order that :func:`amalgam.ops.student_step` takes."""
        return list(self.parameters())

    def initial_state(self, like: Tensor) -> StudentState:
        """The zero state for coordinates like these; see :func:`amalgam.ops.initial_state`."""
        return ops.initial_state(like, self.weights())

    def step(
        self,
        grad: Tensor,
        state: StudentState,
        weights: Sequence[Tensor] | None = None,
        *,
        backend: str = "auto",
    ) -> tuple[Tensor, StudentState]:
        """One differentiable step.

        Args:
            grad: The optimizee's gradient, shape (N,).
            state: The carried state.
            weights: Weights to use in place of its own.
            backend: As in :func:`amalgam.ops.student_step`.

        Returns:
            The update (N,), to be subtracted, and the new state.
        """
        chosen = self.weights() if weights is None else weights
        return ops.student_step(grad, state, chosen, self.config.settings, backend=backend)

    def warm_up(self, grad: Tensor, state: StudentState) -> StudentState:
        """The state after a warm-up step's gradient: moments move, the LSTM waits."""
        m, v = ops.update_moments(grad, state.m, state.v, self.config.settings)
        return state._replace(m=m, v=v)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights, configuration and provenance to one safetensors file.

        Args:
            path: Where to; missing folders are made, the file appears whole or not at all.
        """
        about = {"config": asdict(self.config), "provenance": self.provenance}
        weights.write(path, "student", self.state_dict(), about)

    @classmethod
    def load(cls, name_or_path: str | os.PathLike[str]) -> Student:
        """Read a student that :meth:`save` wrote.

        Args:
            name_or_path: A shipped student's name, or a path.

        Raises:
            FileNotFoundError: It is neither.
            ValueError: The file is cut short, foreign, or its weights do not fit its
                configuration.
        """
        path = weights.locate(name_or_path)
        tensors, about = weights.read(path, "student")
        try:
            config = StudentConfig(**about["config"])
            student = cls(config, provenance=about["provenance"])
            for name, tensor in tensors.items():
                if not tensor.isfinite().all():
                    raise ValueError(f"{name} holds non-finite values")
            student.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{str(path)!r} does not hold a usable student: {error}") from error
        return student

    def extra_repr(self) -> str:
        """The configuration, for ``repr``."""
        return str(self.config)
