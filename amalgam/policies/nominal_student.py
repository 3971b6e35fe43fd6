"""The nominal student: an LSTM that scales and corrects Adam's step, coordinate by coordinate."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amalgam.device import put, read_by_graphs
from amalgam.hints import did_you_mean
from amalgam.layout import Layout
from amalgam.operations.checks import check_like
from amalgam.operations.sign_agreement import sign_agreements
from amalgam.operations.student_forms import NOMINAL
from amalgam.ops import StepSettings, StudentState
from amalgam.policies.fused_student import (
    ContextConstants,
    FusedConfig,
    FusedStudent,
    NormsOf,
    TensorContext,
    norms_of,
)
from amalgam.policies.policy import zero_head
from amalgam.ranges import check_fields

_TIMES = (10.0, 100.0, 1000.0)  # steps after which a time input has risen to tanh(1)
PACE_BOUND = 4.0  # of the logarithm of a pace, below and, whatever a student may do, above
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
        rate_warmup: Steps over which the rate rises to lr, as t / rate_warmup of it in step t of a
            tensor: the first gradients of a network say little of later ones, and steps that are
            good later may spoil it. Those of ``warmup_steps`` count, and those whose gradients are
            0. ``None`` for whole steps from the first on.
        gain: Factor on the head's first output, the logarithm of the factor on Adam's step.
        pacing: How fast a tensor's pace, a factor on its steps, adapts. In each step its logarithm
            grows by this times the agreement of the gradient with the first moment: the share of
            coordinates whose signs are the same, less the share whose signs differ. 0 leaves it 1.
        pacing_steps: For so many steps it adapts so fast; in step t after them by pacing_steps / t
            of that. What signs say of noise is never quite nothing, and a pace that followed it at
            one speed would have steps grow shorter without end. ``None`` for one speed.
        steady_agreement: The agreement at which a pace stays as it is, as a share of the
            coordinates that have both signs. Gradients that are noise agree with nothing, so that
            steps grow shorter there.
        most_pace: What that logarithm rises to at most, up to 4. A tensor whose gradients keep
            their signs for reasons of their own, as a head's over symbols that hardly occur,
            reaches it.
        orthogonal: Whether the updates of whole matrices are orthogonalised, as long as they are:
            :mod:`amalgam.operations.orthogonal`. Kernels of convolutions count as matrices, too.
        full_width: Up to which width, the smaller of a matrix's dimensions, steps are whole: of its
            first dimension, and the product of the others. Of a wider one they are the share
            full_width / width, as the rate that suits Adam falls with the width of a network's
            layers (Yang et al. 2022, "Tensor Programs V", table 3); of a longer vector the root of
            full_width / length. Their paces adapt slower, by the share's root. ``None`` for whole
            steps at every width. Without a layout all is one vector, and of a stack of matrices
            the number of matrices counts as its first dimension.
        inputs: What it is told of a tensor as a whole; nothing, or any of :data:`INPUTS`: its
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
    rate_warmup: int | None = None
    gain: float = 2.0
    pacing: float = 0.0
    pacing_steps: int | None = None
    steady_agreement: float = 0.0
    most_pace: float = PACE_BOUND
    orthogonal: bool = False
    full_width: int | None = None
    inputs: tuple[str, ...] = ()
    eps: float = 1e-15
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        """Make inputs a tuple, and refuse what can't be computed."""
        super().__post_init__()
        check_fields(
            self,
            counts=("full_width", "pacing_steps", "rate_warmup"),
            positive=("lr", "gain"),
            not_negative=("pacing", "most_pace"),
            decays=("steady_agreement",),
        )
        if self.most_pace > PACE_BOUND:
            raise ValueError(f"most_pace must be at most {PACE_BOUND}, not {self.most_pace}")
        if not isinstance(self.orthogonal, bool):
            raise ValueError(f"orthogonal must be true or false, not {self.orthogonal!r}")
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
        pace: The logarithm of each one's pace, shape (tensors,).
    """

    m: Tensor
    v: Tensor
    h: Tensor
    c: Tensor
    t: Tensor
    pace: Tensor


class NominalStudent(FusedStudent):
    """A learned optimizer that scales and corrects Adam's step, in place of replacing it.

    Where it has seen no gradient but zero it does not move; mirrored gradients give the mirrored
    run; and the loss's scale does not matter. Untrained it is Adam, bias-corrected, at
    ``lr``, but for what the configuration makes of whole tensors' steps.
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
    per_tensor = ("t", "pace")
    sees_params = True

    def build(self, generator: torch.Generator | None) -> None:
        """Make an LSTM that sees coordinates and tensors, and a head of zeros."""
        inputs = sum(INPUTS[name] for name in self.config.inputs)
        self.build_cells(NOMINAL.features + inputs, generator)
        self.head = zero_head(self.config.hidden, NOMINAL.outputs)

    def initial_state(self, like: Tensor, layout: Layout | None = None) -> NominalState:
        """The zero state for coordinates like these, shape (N,)."""
        shapes, _ = _filled(like, layout)
        t = torch.zeros(len(shapes), dtype=self.head.weight.dtype, device=like.device)
        begin: StudentState = super().initial_state(like, layout)
        return NominalState(*begin, t, torch.zeros_like(t))

    def warm_up(self, grad: Tensor, state: Any, *, layout: Layout | None = None) -> Any:
        """The state after a warm-up step's gradient: moments and steps move, the LSTM does not."""
        return super().warm_up(grad, state, layout=layout)._replace(t=state.t + 1)

    def context(
        self,
        state: Any,
        params: Tensor | None,
        layout: Layout | None,
        grad: Tensor,
        left: float | Tensor = 1.0,
    ) -> TensorContext:
        """See :class:`FusedStudent`."""
        shapes, sizes = _filled(state.m, layout)
        repeats = len(state.t) // max(1, len(sizes))
        if repeats * sum(sizes) != len(state.m) or repeats * len(sizes) != len(state.t):
            raise ValueError(
                f"layout must be the state's, of {len(state.t)} tensors and {len(state.m)} "
                f"coordinates, not of {len(sizes)} and {sum(sizes)}"
            )
        parts: Sequence[Tensor] = ()
        if self._sees_rms:
            if params is None:
                raise ValueError(
                    "params must be given to a nominal student that is told of its tensors' RMS, "
                    "not None"
                )
            check_like("params", params, state.m.shape, state.m)
            parts = params.split(sizes * repeats)
        # What a mode has made, of fake tensors say, is not for those who come after it.
        made = _constants if torch._C._len_torch_dispatch_stack() else _cached_constants
        constants = read_by_graphs(
            made(self.config, shapes * repeats, state.t.dtype, state.t.device)
        )
        agreements: Callable[[], Tensor] | None = None
        if self.paced and repeats * len(sizes):
            of_each = (tensor.split(sizes * repeats) for tensor in (grad, state.m))
            agreements = functools.partial(sign_agreements, *of_each)
        return self.context_of(
            *(constants, state.t, parts), pace=state.pace, agreements=agreements, left=left
        )

    @property
    def _sees_rms(self) -> bool:
        return "rms" in self.config.inputs

    def constants_of(self, shapes: Sequence[torch.Size], like: Tensor) -> ContextConstants:
        """See :class:`FusedStudent`."""
        return _constants(self.config, tuple(shapes), like.dtype, like.device)

    @property
    def paced(self) -> bool:
        """See :class:`FusedStudent`."""
        return self.config.pacing > 0

    @property
    def orthogonal(self) -> bool:
        """See :class:`FusedStudent`."""
        return self.config.orthogonal

    @property
    def sees_shapes(self) -> bool:
        """See :class:`FusedStudent`."""
        told = not {"rank", "fan_in", "rms"}.isdisjoint(self.config.inputs)
        return told or self.config.full_width is not None

    def context_of(
        self,
        constants: ContextConstants | None,
        steps: Tensor,
        params: Sequence[Tensor],
        norms: NormsOf = norms_of,
        pace: Tensor | None = None,
        agreements: Callable[[], Tensor] | None = None,
        left: float | Tensor = 1.0,
    ) -> TensorContext:
        """See :class:`FusedStudent`."""
        assert constants is not None
        now, config = steps + 1, self.config
        columns: list[Tensor] = []
        for name in config.inputs:
            if name == "time":
                columns += [(now / scale).tanh() for scale in _TIMES]
            elif name == "rms":
                found = norms(params)
                rms = torch.stack(list(found)) / constants.roots if found else constants.roots
                columns.append((rms.to(steps.dtype) + _FLOOR).log() / 4)
            else:
                columns.append(constants.of_shapes[name])
        inputs = torch.stack(columns, 1) if columns else steps.new_empty((len(steps), 0))
        # In float64, as float32 would lose half of its bits in 1 - beta^t.
        exact = now.double()
        columns = [1 / (1 - beta**exact) for beta in (config.beta1, config.beta2)]
        shares = constants.shares.double()
        factor = shares
        if config.rate_warmup is not None:
            factor = factor * (exact / config.rate_warmup).clamp(max=1)
        if agreements is not None and pace is not None:
            agree, disagree = agreements().unbind(1)
            rise = agree - disagree - config.steady_agreement * (agree + disagree)
            speed = config.pacing * shares.sqrt() / constants.roots.double().square()
            if config.pacing_steps is not None:
                speed = speed * (config.pacing_steps / exact).clamp(max=1)
            grown = pace + speed * rise
            pace = grown.clamp(-PACE_BOUND, config.most_pace).to(pace.dtype)
            paced = pace.double().exp()
            if isinstance(left, Tensor) and left.device != paced.device:
                # A host that did not wait for a GPU's would compute with what it has not got yet.
                here = left.device.type == "cpu"
                left = put(left, paced.device) if here else left.to(paced.device)
            if isinstance(left, Tensor) or left < 1:
                # The shorter of the two steps; a pace above 1 stays.
                paced = torch.maximum(paced, (paced / left).clamp(max=1))
            factor = factor * paced
        corrections = torch.stack([*columns, factor], 1).to(steps.dtype)
        return TensorContext(inputs, corrections, constants.sizes, pace)

    def operation_weights(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """See :class:`FusedStudent`; the first bias is still without inputs."""
        w_ih, *rest, head, head_bias = weights
        # A copy that stays: what backends make of weights, they keep by their memory.
        first = w_ih[..., : NOMINAL.features].contiguous()
        return [first, *rest, *self._gained(head, head_bias)]

    def with_context(
        self,
        operation_weights: Sequence[Tensor],
        weights: Sequence[Tensor],
        context: TensorContext | None,
    ) -> tuple[list[Tensor], StepSettings]:
        """See :class:`FusedStudent`; the inputs are folded into the first bias, one a tensor."""
        assert context is not None
        bias = weights[2].unsqueeze(-2) + context.inputs @ weights[0][..., NOMINAL.features :].mT
        folded = [*operation_weights[:2], bias, *operation_weights[3:]]
        settings = self.config.settings
        return folded, settings._replace(corrections=context.corrections, sizes=context.sizes)

    def unfolded(self, found: Sequence[Tensor], context: TensorContext | None) -> list[Tensor]:
        """See :class:`FusedStudent`."""
        assert context is not None
        d_w_ih, d_w_hh, d_bias, *rest, d_head, d_head_bias = found
        d_inputs = d_bias.mT @ context.inputs
        d_first = [torch.cat((d_w_ih, d_inputs), -1), d_w_hh, d_bias.sum(-2)]
        return [*d_first, *rest, *self._gained(d_head, d_head_bias)]

    def _gained(self, head: Tensor, bias: Tensor) -> list[Tensor]:
        """The head with its first output times ``gain``; the same of gradients."""
        gain = self.config.gain
        parts = ((head, -2), (bias, -1))
        return [
            torch.stack((gain * part.select(dim, 0), part.select(dim, 1)), dim)
            for part, dim in parts
        ]

    def carried(
        self, new: StudentState, before: Any, context: TensorContext | None
    ) -> NominalState:
        """See :class:`FusedStudent`."""
        assert context is not None
        pace = before.pace if context.pace is None else context.pace
        return NominalState(*new, before.t + 1, pace)


def _filled(like: Tensor, layout: Layout | None) -> tuple[tuple[torch.Size, ...], tuple[int, ...]]:
    """Shapes and sizes of the tensors that are not empty; without a layout, of one vector."""
    if layout is None:
        return (like.shape,), (like.numel(),)
    pairs = zip(layout.shapes.values(), layout.sizes, strict=True)
    filled = [(shape, size) for shape, size in pairs if size]
    return tuple(shape for shape, _ in filled), tuple(size for _, size in filled)


def _constants(
    config: NominalConfig,
    shapes: tuple[torch.Size, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> ContextConstants:
    sizes = tuple(math.prod(shape) for shape in shapes)
    of_each: dict[str, list[float]] = {
        "rank": [len(shape) / 2 for shape in shapes],
        "fan_in": [math.log(max(1, math.prod(shape[1:]))) / 4 for shape in shapes],
    }
    shares = [_share(config, shape) for shape in shapes]
    roots = [math.sqrt(max(1, size)) for size in sizes]
    with torch.inference_mode(False):  # steps outside it read them, too

        def on_device(values: list[float]) -> Tensor:
            return put(torch.tensor(values, dtype=dtype, device="cpu"), device)

        found = {name: on_device(of_each[name]) for name in config.inputs if name in of_each}
        return ContextConstants(found, on_device(roots), on_device(shares), sizes)


def _share(config: NominalConfig, shape: torch.Size) -> float:
    """Which share of a whole step a tensor of that shape takes."""
    if config.full_width is None or not shape:
        return 1.0
    width = shape[0] if len(shape) == 1 else min(shape[0], math.prod(shape[1:]))
    share = min(1.0, config.full_width / max(1, width))
    return math.sqrt(share) if len(shape) == 1 else share


_cached_constants = functools.lru_cache(maxsize=64)(_constants)
