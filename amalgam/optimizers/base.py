"""What the optimizers share: closures, refusals, and steps taken whole or not at all."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from itertools import chain
from operator import attrgetter
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from amalgam.operations.largest_magnitude import largest_magnitudes

_grad, _is_sparse = attrgetter("grad"), attrgetter("is_sparse")


class StepOptimizer(Optimizer):
    """What the optimizers here share: closures, refusals, and steps taken whole or not at all."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self._skipped: int | Tensor = 0

    @property
    def skipped_steps(self) -> int:
        """Steps not taken because a gradient was not finite (or too large to be squared).

        Parameters and state stayed as they were. With ``capturable``, counted on the device: to
        read it waits for that.
        """
        return int(self._skipped)

    def __getstate__(self) -> dict[str, Any]:
        """All but hooks; torch's own keeps three attributes, and copies would lack the rest."""
        return {name: value for name, value in self.__dict__.items() if "hook" not in name}

    @overload
    def step(self, closure: None = ...) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; with ``capturable``, without waiting for a GPU.

        Args:
            closure: Computes the loss anew, with gradients, and returns it.

        Returns:
            What the closure returned, or ``None``.

        Raises:
            RuntimeError: A gradient is sparse; or a CUDA graph captures a step that can't be in
                one, or a first one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [
            grad
            for group in self.param_groups
            for grad in map(_grad, group["params"])
            if grad is not None
        ]
        if any(map(_is_sparse, gradients)):
            raise RuntimeError(
                f"{type(self).__name__} takes dense gradients only; for embeddings, sparse=False"
            )
        self._begin_step()
        if all(group.get("capturable") for group in self.param_groups):
            self._step_on_device(gradients)
            return loss
        if capturing():
            raise RuntimeError("a step in a CUDA graph needs all groups' capturable=True")
        if not all(map(finite, largest_magnitudes(gradients))):
            self._skipped += 1
            if self._skipped == 1:
                warnings.warn(
                    "a gradient was not finite: the step was skipped, parameters and state are "
                    "as they were. Further skips are counted in skipped_steps, without a word.",
                    RuntimeWarning,
                    stacklevel=3,
                )
            return loss
        for group in self.param_groups:
            self._step_group(group, [p for p in group["params"] if p.grad is not None])
        return loss

    def _begin_step(self) -> None:
        """What an optimizer does once a step, before any group's."""

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        raise NotImplementedError

    def _step_on_device(self, gradients: list[Tensor]) -> None:
        raise NotImplementedError


class LearnedOptimizer(StepOptimizer):
    """What the optimizers with learned weights share: whose weights they are, and their state."""

    _subject = "policy"

    def _policy_state(self, entry: dict[str, Any]) -> list[str]:
        """The names of a parameter's state that are the policy's."""
        return [name for name, value in entry.items() if name != "step" and torch.is_tensor(value)]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in :meth:`torch.optim.Optimizer.add_param_group`.

        Raises:
            TypeError: A parameter is not floating point.
            ValueError: A setting is out of range.
        """
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            check_group(group, ("lr", "weight_decay", "warmup_steps", "warmup_lr"))
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from another's :meth:`state_dict`.

        Args:
            state_dict: As an optimizer with the same policy gave it; not changed. State keeps
                the dtype it was saved in, whatever the parameters' is.

        Raises:
            ValueError: It comes from another policy, or its groups do not fit.
        """
        subject = self._subject
        for group in state_dict["param_groups"]:
            theirs, ours = group.get(subject), self.defaults[subject]
            if theirs != ours:
                raise ValueError(
                    f"state_dict belongs to another {subject} ({theirs}) than this optimizer's "
                    f"({ours}); load it into one made with that {subject}"
                )
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        own = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, param in zip(saved, own, strict=True):
            entry = state_dict["state"].get(index, {})
            for name in self._policy_state(entry):
                # Optimizer.load_state_dict casts state to the parameter's dtype.
                self.state[param][name] = entry[name].detach().to(param.device, copy=True)


def finite(largest: Tensor) -> Tensor:
    """Whether a magnitude is finite and small enough to be squared in float32."""
    return largest < math.sqrt(torch.finfo(computing_dtype(largest.dtype)).max)


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute and keep state in for parameters of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_group(group: dict[str, Any], names: Iterable[str]) -> None:
    """Raise unless these settings of a group are 0 or more and its parameters floating point."""
    for name in names:
        if not float(group[name]) >= 0:
            raise ValueError(f"{name} must be 0 or more, not {group[name]}")
    for param in group["params"]:
        if not param.is_floating_point():
            raise TypeError(f"params must be floating-point tensors, not {param.dtype}")


def capturing() -> bool:
    """Whether a CUDA graph captures what the current stream is given."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def check_before_capture() -> None:
    """Refuse to have a graph make state: every replay would make it anew."""
    if capturing():
        raise RuntimeError(
            "take a step with every parameter's gradient before capturing one in a CUDA graph, "
            "which would reset at every replay what its first step makes"
        )
