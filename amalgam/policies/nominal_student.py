"""The nominal student: an LSTM that scales and corrects Adam's step, coordinate by coordinate."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amalgam.hints import did_you_mean
from amalgam.layout import Layout
from amalgam.ops import StepSettings, StudentState
from amalgam.policies.fused_student import FusedConfig, FusedStudent, Told
from amalgam.policies.policy import check_fields, zero_head

_FEATURES = 3  # what the operation's nominal form sees of a coordinate
_TIMES = (10.0, 100.0, 1000.0)  # steps after which a time input has risen to tanh(1)
_FLOOR = 1e-3  # added to a tensor's RMS before its logarithm is taken

INPUTS = {"time": len(_TIMES), "rank": 1, "fan_in": 1, "rms": 1}
"""What a nominal student may be told of a tensor, and how many numbers each is."""


@dataclass(frozen=True, kw_only=True)
class NominalConfig(FusedConfig):
    """Architecture and constants of a nominal student.

    Attributes:
        layers: LSTM layers, 1 or more.
        hidden: Units in each.
        lr: The learning rate of Adam that it begins from.
        gain: Factor on the head's first output, the logarithm of the factor on Adam's step.
        inputs: What it is told of a tensor as a whole, any of :data:`INPUTS`: the number of its
            ``"time"`` step t, as tanh(t / 10), tanh(t / 100) and tanh(t / 1000); its ``"rank"``;
            its ``"fan_in"``, the product of its dimensions but the first, as a logarithm; the
            logarithm of its parameters' ``"rms"``.
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        eps: Added to the root of the second moment; so small, the loss's scale does not matter.
        warmup_steps: Steps of SGD before the student acts, in meta-training and after; it needs
            none.
        warmup_lr: The learning rate of those steps.
    """

    layers: int = 1
    hidden: int = 8
    lr: float = 0.005
    gain: float = 2.0
    inputs: tuple[str, ...] = tuple(INPUTS)
    eps: float = 1e-15
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        """Make inputs a tuple, and refuse what can't be computed."""
        super().__post_init__()
        check_fields(self, positive=("lr", "gain"))
        object.__setattr__(self, "inputs", tuple(self.inputs))
        for name in self.inputs:
            if name not in INPUTS:
                raise ValueError(
                    f"inputs must be of {list(INPUTS)}, not {name!r}{did_you_mean(name, INPUTS)}"
                )
        if len(set(self.inputs)) != len(self.inputs):
            raise ValueError(f"inputs must be named once each, not {list(self.inputs)}")

    @property
    def settings(self) -> StepSettings:
        """The constants of :func:`amalgam.ops.student_step`; corrections come with every step."""
        return StepSettings(self.lr, self.beta1, self.beta2, self.eps)


class NominalState(NamedTuple):
    """What a nominal student carries from step to step, for N coordinates of some tensors.

    Attributes:
        m: First moment of the gradient, shape (N,).
        v: Second moment, shape (N,).
        h: Outputs of the LSTM layers, shape (layers, hidden, N).
        c: Their cells, shape (layers, hidden, N).
        t: How many steps each tensor that is not empty has taken, shape (tensors,).
    """

    m: Tensor
    v: Tensor
    h: Tensor
    c: Tensor
    t: Tensor


class NominalStudent(FusedStudent):
    """A learned optimizer that scales and corrects Adam's step, in place of replacing it.

    Where it has seen no gradient but zero it does not move; mirrored gradients give the mirrored
    run; and the loss's scale does not matter. Untrained it is Adam, bias-corrected, at ``lr``.
    :mod:`amalgam.operations.student_forms` has the formulas. Source: a nominal term (Harrison et
    al. 2022, "A closer look at learned optimization and its generalization", section 4), with the
    per-tensor inputs of hierarchical learned optimizers folded into the first layer's bias.

    Args:
        config: Its architecture and constants.
        generator: Source of its initial weights; torch's global one where absent.
        provenance: Where its weights come from, JSON-serialisable; kept by :meth:`save`.
    """

    kind = "nominal"
    config_type = NominalConfig
    config: NominalConfig
    per_tensor = ("t",)
    sees_params = True

    def build(self, generator: torch.Generator | None) -> None:
        """Make an LSTM that sees coordinates and tensors, and a head of zeros."""
        told = sum(INPUTS[name] for name in self.config.inputs)
        self.build_cells(_FEATURES + told, generator)
        self.head = zero_head(self.config.hidden, 2)

    def initial_state(self, like: Tensor, layout: Layout | None = None) -> NominalState:
        """The zero state for coordinates like these, shape (N,)."""
        shapes, _ = _filled(like, layout)
        t = torch.zeros(len(shapes), dtype=self.head.weight.dtype, device=like.device)
        begin: StudentState = super().initial_state(like, layout)
        return NominalState(*begin, t)

    def warm_up(self, grad: Tensor, state: Any, *, layout: Layout | None = None) -> Any:
        """The state after a warm-up step's gradient: moments and steps move, the LSTM does not."""
        return super().warm_up(grad, state, layout=layout)._replace(t=state.t + 1)

    def told(self, state: Any, params: Tensor | None, layout: Layout | None) -> Told:
        """See :class:`FusedStudent`."""
        shapes, sizes = _filled(state.m, layout)
        repeats = len(state.t) // max(1, len(sizes))
        shapes, sizes = shapes * repeats, sizes * repeats
        rms = None
        if self.sees_rms:
            if params is None:
                raise ValueError(
                    "params must be given to a nominal student that is told of its tensors' RMS, "
                    "not None"
                )
            rms = _rms(params, sizes)
        return self.told_of(state.t, shapes, sizes, rms)

    @property
    def sees_rms(self) -> bool:
        """Whether it is told of its tensors' RMS."""
        return "rms" in self.config.inputs

    def told_of(
        self,
        t: Tensor,
        shapes: tuple[torch.Size, ...],
        sizes: Sequence[int],
        rms: Tensor | None,
    ) -> Told:
        """What it is told of tensors in their next step.

        Args:
            t: How many steps each has taken, shape (tensors,), of the weights' dtype.
            shapes: Their shapes.
            sizes: How many coordinates of each there are.
            rms: Their root mean squares, shape (tensors,), if it is told of them.
        """
        now, config = t + 1, self.config
        columns: list[Tensor] = []
        for name in config.inputs:
            if name == "time":
                columns += [(now / scale).tanh() for scale in _TIMES]
            elif name == "rms":
                assert rms is not None
                columns.append((rms + _FLOOR).log() / 4)
            else:
                columns.append(_of_shapes(name, shapes, t.dtype, t.device))
        inputs = torch.stack(columns, 1) if columns else t.new_empty((len(t), 0))
        # In float64, as float32 would lose half of its bits in 1 - beta^t.
        exact = now.double()
        corrections = [1 / (1 - beta**exact) for beta in (config.beta1, config.beta2)]
        return Told(inputs, torch.stack(corrections, 1).to(t.dtype), sizes)

    def operation_weights(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """See :class:`FusedStudent`; the first bias is still without inputs."""
        w_ih, *rest, head, head_bias = weights
        gain = head.new_tensor([self.config.gain, 1.0])
        return [w_ih[:, :_FEATURES], *rest, head * gain[:, None], head_bias * gain]

    def bias(self, weights: Sequence[Tensor], inputs: Tensor) -> Tensor:
        """The first layer's bias of each tensor, (..., tensors, 4 hidden), by its inputs."""
        return weights[2] + inputs @ weights[0][:, _FEATURES:].T

    def folded(
        self, weights: Sequence[Tensor], told: Told | None
    ) -> tuple[list[Tensor], StepSettings]:
        """See :class:`FusedStudent`."""
        assert told is not None
        folded = self.operation_weights(weights)
        folded[2] = self.bias(weights, told.inputs)
        settings = self.config.settings
        return folded, settings._replace(corrections=told.corrections, sizes=told.sizes)

    def unfolded(self, found: Sequence[Tensor], told: Told | None) -> list[Tensor]:
        """See :class:`FusedStudent`."""
        assert told is not None
        d_w_ih, d_w_hh, d_bias, *rest, d_head, d_head_bias = found
        of_tensors = d_bias.flatten(0, -2)
        d_told = of_tensors.T @ told.inputs.flatten(0, -2)
        gain = d_head.new_tensor([self.config.gain, 1.0])
        d_first = [torch.cat((d_w_ih, d_told), 1), d_w_hh, of_tensors.sum(0)]
        return [*d_first, *rest, d_head * gain[:, None], d_head_bias * gain]

    def carried(self, new: StudentState, before: Any) -> NominalState:
        """See :class:`FusedStudent`."""
        return NominalState(*new, before.t + 1)


def _filled(like: Tensor, layout: Layout | None) -> tuple[tuple[torch.Size, ...], tuple[int, ...]]:
    """Shapes and sizes of the tensors that are not empty; without a layout, of one vector."""
    if layout is None:
        return (like.shape,), (like.numel(),)
    pairs = zip(layout.shapes.values(), layout.sizes, strict=True)
    filled = [(shape, size) for shape, size in pairs if size]
    return tuple(shape for shape, _ in filled), tuple(size for _, size in filled)


def _rms(params: Tensor, sizes: Sequence[int]) -> Tensor:
    """The root mean square of each tensor, shape (tensors,); 0 of an empty one."""
    lengths = torch.tensor(sizes, dtype=torch.int64, device=params.device)
    sums = torch.segment_reduce(params.detach().square(), "sum", lengths=lengths, unsafe=True)
    return (sums / lengths.clamp_min(1)).sqrt()


@functools.lru_cache(maxsize=64)
def _of_shapes(
    name: str, shapes: tuple[torch.Size, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What a student is told of tensors' shapes, shape (tensors,)."""
    if name == "rank":
        values = [len(shape) / 2 for shape in shapes]
    else:
        values = [math.log(max(1, math.prod(shape[1:]))) / 4 for shape in shapes]
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)
