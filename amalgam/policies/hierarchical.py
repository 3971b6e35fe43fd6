"""The hierarchical learned optimizer: recurrent networks for coordinates, tensors and the whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from amalgam.layout import Layout
from amalgam.policies.policy import PolicyConfig, ReferencePolicy, zero_head
from amalgam.ranges import check_fields

_LOGIT_09 = math.log(0.9 / 0.1)
_LOGIT_0999 = math.log(0.999 / 0.001)


class ScaleState(NamedTuple):
    """The state of a :class:`ScaleHierarchical`, for S timescales, N coordinates, T tensors.

    Attributes:
        m: Means of the gradient over every timescale, shape (S, N).
        v: Means of its square, likewise.
        eta: Running log learning rates, shape (N,).
        eta_rel: The last log learning rates, less their tensor's mean, shape (N,).
        h: Output of the coordinates' GRU, shape (param_units, N).
        tensor: Output of the tensors' GRU, shape (tensor_units, T).
        whole: Output of the GRU of the whole, shape (global_units, 1).
    """

    m: Tensor
    v: Tensor
    eta: Tensor
    eta_rel: Tensor
    h: Tensor
    tensor: Tensor
    whole: Tensor


@dataclass(frozen=True, kw_only=True)
class ScaleHierarchicalConfig(PolicyConfig):
    """Architecture and constants of a :class:`ScaleHierarchical`.

    Attributes:
        param_units: Units of the coordinates' GRU.
        tensor_units: Units of the tensors' GRU.
        global_units: Units of the whole's GRU.
        timescales: Number of running means of the gradient, each of twice the decay time of the
            one before it.
        initial_lr: Learning rate of every coordinate at first.
        lr_offset: Added to all learning rates.
        eps: Added to the second moments inside the root.
        warmup_steps: Steps of SGD before the policy acts, in meta-training and after.
        warmup_lr: The learning rate of those steps.
    """

    param_units: int = 20
    tensor_units: int = 10
    global_units: int = 10
    timescales: int = 4
    initial_lr: float = 1e-3
    lr_offset: float = 1e-2
    eps: float = 1e-10

    def __post_init__(self) -> None:
        """Refuse what can't be computed."""
        super().__post_init__()
        check_fields(
            self,
            units=("param_units", "tensor_units", "global_units", "timescales"),
            positive=("initial_lr", "eps"),
            not_negative=("lr_offset",),
        )


class _GRU(nn.Module):
    """Weights of a GRU, gates in the order update, reset, candidate, as Keras initialises them.

    The biases are two rows: one is added to what the inputs give, the other to what the last output
    gives, before the reset gate multiplies that.
    """

    def __init__(self, inputs: int, hidden: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.weight_ih = nn.Parameter(torch.empty(3 * hidden, inputs))
        self.weight_hh = nn.Parameter(torch.empty(3 * hidden, hidden))
        self.bias = nn.Parameter(torch.zeros(2, 3 * hidden))
        nn.init.xavier_uniform_(self.weight_ih, generator=generator)
        nn.init.orthogonal_(self.weight_hh, generator=generator)


def _gru(x: Tensor, h: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """One step of x (inputs, N) and h (hidden, N): the new h."""
    w_ih, w_hh, bias = weights
    from_input = torch.addmm(bias[0, :, None], w_ih, x).chunk(3)
    from_state = torch.addmm(bias[1, :, None], w_hh, h).chunk(3)
    update = (from_input[0] + from_state[0]).sigmoid()
    reset = (from_input[1] + from_state[1]).sigmoid()
    candidate = (from_input[2] + reset * from_state[2]).tanh()
    return update * h + (1 - update) * candidate


def _head(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """A linear head of one output on x (inputs, N): shape (N,)."""
    return torch.addmm(weights[1][:, None], weights[0], x)[0]


class ScaleHierarchical(ReferencePolicy):
    """Learned Optimizers that Scale and Generalize (Wichrowska et al. 2017).

    Per coordinate, with h its GRU's output before the step, for timescale s = 0, 1, ..::

        b1 = sigmoid(head(h))^(2^-s)      b2 likewise                        (eq. 13)
        m_s <- b1 m_s + (1 - b1) g        v_s <- b2 v_s + (1 - b2) g^2       (eq. 1, 2)
        a_s = m_s / sqrt(v_s + eps)       l_s = log(v_s + eps) - mean over s (eq. 3, 4)
        h <- GRU([a, l, eta_rel, tensor, whole], h)                          (eq. 10)
        tensor <- GRU([mean of h over the tensor, whole], tensor)            (eq. 11)
        eta_now = eta + head(h)           eta_rel <- eta_now - its mean over the tensor
        eta <- c eta + (1 - c) eta_now    c = sigmoid(gamma)                 (eq. 7, 8)
        update = (exp(eta_now) + lr_offset) (head(h) + head(a))              (eq. 5, app. B.1, D.3)
        whole <- GRU(mean of tensor over tensors, whole)                     (eq. 12)

    Every head begins with a zero kernel, so that the first updates are zero. All of an optimizee's
    tensors are stepped together; a layout says which they are, and without one they are one tensor.

    It takes the arguments of :class:`Policy`.
    """

    kind = "scale-hierarchical"
    config_type = ScaleHierarchicalConfig
    coordinatewise = False
    per_tensor = ("tensor",)
    shared = ("whole",)
    config: ScaleHierarchicalConfig

    def build(self, generator: torch.Generator | None) -> None:
        """Make the three GRUs, then the heads, which draw nothing."""
        config = self.config
        units = config.param_units
        inputs = 2 * config.timescales + 1 + config.tensor_units + config.global_units
        self.param_gru = _GRU(inputs, units, generator)
        self.tensor_gru = _GRU(units + config.global_units, config.tensor_units, generator)
        self.global_gru = _GRU(config.tensor_units, config.global_units, generator)
        self.direction = zero_head(units, 1)
        self.rate = zero_head(units, 1)
        self.decay_m = zero_head(units, 1, _LOGIT_09)
        self.decay_v = zero_head(units, 1, _LOGIT_0999)
        self.shortcut = zero_head(config.timescales, 1)
        self.gamma = nn.Parameter(torch.tensor(3.2))

    def weights(self) -> list[Tensor]:
        """Those of the GRUs (coordinates, tensors, whole), those of the heads, and gamma."""
        modules = (self.param_gru, self.tensor_gru, self.global_gru, self.direction, self.rate)
        heads = (self.decay_m, self.decay_v, self.shortcut)
        return [*(w for module in (*modules, *heads) for w in module.parameters()), self.gamma]

    def initial_state(self, like: Tensor, layout: Layout | None = None) -> ScaleState:
        """The state before the first step, of coordinates like these, shape (N,)."""
        config, n = self.config, like.numel()

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=self.gamma.dtype, device=like.device)

        return ScaleState(
            m=zeros(config.timescales, n),
            v=zeros(config.timescales, n),
            eta=torch.full_like(zeros(n), math.log(config.initial_lr)),
            eta_rel=zeros(n),
            h=zeros(config.param_units, n),
            tensor=zeros(config.tensor_units, len(_sizes(like, layout))),
            whole=zeros(config.global_units, 1),
        )

    def compute(
        self, grad: Tensor, state: ScaleState, weights: Sequence[Tensor], layout: Layout | None
    ) -> tuple[Tensor, ScaleState]:
        """One step; see :meth:`amalgam.policies.ReferencePolicy.compute`.

        Raises:
            ValueError: ``layout`` does not fit the gradient, or the state.
        """
        sizes, config = _sizes(grad, layout), self.config
        if state.tensor.shape[1] != len(sizes):
            raise ValueError(
                f"layout must have the {state.tensor.shape[1]} tensors that the state was made "
                f"for, not {len(sizes)}"
            )
        gamma, heads = weights[-1], [weights[i : i + 2] for i in range(9, 19, 2)]
        direction, rate, decay_m, decay_v, shortcut = heads

        powers = torch.tensor([0.5**s for s in range(config.timescales)], dtype=grad.dtype)
        powers = powers.to(grad.device)[:, None]
        beta1 = _head(state.h, decay_m).sigmoid() ** powers
        beta2 = _head(state.h, decay_v).sigmoid() ** powers
        m = beta1 * state.m + (1 - beta1) * grad
        v = beta2 * state.v + (1 - beta2) * grad.square()
        average = m * (v + config.eps).rsqrt()
        magnitude = (v + config.eps).log()
        magnitude = magnitude - magnitude.mean(0)

        x = torch.cat(
            (
                average,
                magnitude,
                state.eta_rel[None],
                _to_coordinates(state.tensor, sizes),
                state.whole.expand(-1, grad.numel()),
            )
        )
        h = _gru(x, state.h, weights[0:3])
        tensor_inputs = torch.cat((_to_tensors(h, sizes), state.whole.expand(-1, len(sizes))))
        tensor = _gru(tensor_inputs, state.tensor, weights[3:6])

        eta_now = state.eta + _head(h, rate)
        keep = gamma.sigmoid()
        eta = keep * state.eta + (1 - keep) * eta_now
        mean_eta = _to_coordinates(_to_tensors(eta_now[None], sizes), sizes)[0]
        update = (eta_now.exp() + config.lr_offset) * (
            _head(h, direction) + _head(average, shortcut)
        )
        whole = state.whole
        if sizes:
            whole = _gru(tensor.mean(1, keepdim=True), whole, weights[6:9])
        return update, ScaleState(m, v, eta, eta_now - mean_eta, h, tensor, whole)

    def warm_up(
        self, grad: Tensor, state: ScaleState, *, layout: Layout | None = None
    ) -> ScaleState:
        """The state after a warm-up step's gradient: all of it moves, as in the authors' code."""
        return self.step(grad, state, layout=layout)[1]


def _sizes(like: Tensor, layout: Layout | None) -> list[int]:
    """The number of coordinates of each tensor that has any."""
    sizes = [like.numel()] if layout is None else layout.sizes
    if sum(sizes) != like.numel():
        raise ValueError(
            f"layout must have as many coordinates as there are, {like.numel()}, not {sum(sizes)}"
        )
    return [size for size in sizes if size]


def _to_tensors(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Means over each tensor's coordinates: (units, N) -> (units, T)."""
    if not sizes:
        return x.new_zeros(x.shape[0], 0)
    return torch.stack([part.mean(1) for part in x.split(list(sizes), 1)], 1)


def _to_coordinates(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Each tensor's values, repeated for each of its coordinates: (units, T) -> (units, N)."""
    # On a GPU a gather's gradient is summed in a random order; an expansion's is not.
    if not sizes:
        return x.new_zeros(x.shape[0], 0)
    return torch.cat([x[:, t, None].expand(-1, size) for t, size in enumerate(sizes)], 1)
