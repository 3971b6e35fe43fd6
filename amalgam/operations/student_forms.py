"""The two forms of a student's step: what its LSTM sees, and what its head's outputs mean.

Both have the moments m and v, the LSTM (:mod:`amalgam.operations.lstm`) and its state in common.

*RNNProp* (Lv et al. 2017, as the authors of Optimizer Amalgamation, ICLR 2022, use it; no bias
correction that depends on time) is the paper's student::

    scale = 1 / sqrt(v / (1 - beta2) + eps)
    x = [ m / (1 - beta1) * scale,  g * scale ]
    update = alpha tanh(o)

*Nominal* scales and corrects Adam's step and does not replace it (a nominal term: Harrison et al.
2022, "A closer look at learned optimization and its generalization"). With c1 = 1 / (1 - beta1^t),
c2 = 1 / (1 - beta2^t) of the tensor's t steps, and the tensor's pace::

    r = 1 / (sqrt(c2 v) + eps), but 0 where v is 0
    a = c1 m r               b = g r
    x = [ |a|,  tanh(a b),  tanh |b| ]
    update = alpha pace exp(clamp(o1, -7, 4)) (a + o2 b / (1 + |b| / 3))

Every input is even in the gradient's sign and every output multiplies something odd in it. So the
mirrored gradients give the mirrored updates, no gradient gives no update, and, but for eps, the
loss's scale does not matter. The first layer's bias is one a tensor: what a student is told of a
tensor as a whole enters there.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from amalgam.operations.checks import check_like

LEAST_LOG, MOST_LOG = -7.0, 4.0  # of the factor on the nominal form's step
SOFT = 3.0  # where its b is clipped to: b / (1 + |b| / SOFT)


class StepSettings(NamedTuple):
    """A student's constants; and of the nominal form, what it is given of each tensor.

    Attributes:
        alpha: RNNProp: the largest update of a coordinate in one step. Nominal: the learning rate
            of Adam that it begins from.
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        eps: RNNProp: added to the second moment inside the root. Nominal: added to the root.
        corrections: Makes it the nominal form: 1 / (1 - beta1^t), 1 / (1 - beta2^t) and the
            factor on the steps of each tensor in this one, its t-th, such as a pace, shape
            (tensors, 3), of the weights' dtype and device.
        sizes: How many coordinates each of them has, in the nominal form: in all, N.
    """

    alpha: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-10
    corrections: Tensor | None = None
    sizes: Sequence[int] = ()

    @property
    def constants(self) -> tuple[float, float, float, float]:
        """alpha, beta1, beta2 and eps."""
        return self[:4]

    @property
    def form(self) -> Form:
        """The form of the step."""
        return RNNPROP if self.corrections is None else NOMINAL


class Form(Protocol):
    """A form of the step, in plain PyTorch.

    Attributes:
        name: The form's name.
        features: Inputs of the first layer, F.
        outputs: Outputs of the head, O.
    """

    name: str
    features: int
    outputs: int

    def seen(
        self, grad: Tensor, m: Tensor, v: Tensor, settings: StepSettings
    ) -> tuple[Tensor, Any]:
        """What the LSTM sees (F, N), of the gradient and the new moments (N,).

        Beside it: what the other functions take as ``kept``.
        """

    def update(self, o: Tensor, kept: Any, settings: StepSettings) -> Tensor:
        """The update (N,), of the head's outputs (O, N)."""

    def back_to_outputs(
        self, d_update: Tensor, o: Tensor, kept: Any, settings: StepSettings
    ) -> tuple[Tensor, Any]:
        """Gradients in the head's outputs (O, N), and what :meth:`back_to_moments` wants beside."""

    def back_to_moments(
        self, d_x: Tensor, beside: Any, grad: Tensor, m: Tensor, v: Tensor, kept: Any,
        settings: StepSettings,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients in grad, and in the new m and v, by what the LSTM and the head see of them."""


class _RNNProp:
    name, features, outputs = "RNNProp", 2, 1

    def seen(
        self, grad: Tensor, m: Tensor, v: Tensor, settings: StepSettings
    ) -> tuple[Tensor, Tensor]:
        scale = (v / (1 - settings.beta2) + settings.eps).rsqrt()
        return torch.stack((m / (1 - settings.beta1) * scale, grad * scale)), scale

    def update(self, o: Tensor, kept: Tensor, settings: StepSettings) -> Tensor:
        return settings.alpha * o.tanh().squeeze(0)

    def back_to_outputs(
        self, d_update: Tensor, o: Tensor, kept: Tensor, settings: StepSettings
    ) -> tuple[Tensor, None]:
        return d_update * settings.alpha * (1 - o.tanh().square()), None

    def back_to_moments(
        self, d_x: Tensor, beside: None, grad: Tensor, m: Tensor, v: Tensor, kept: Tensor,
        settings: StepSettings,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        scale, one_minus_beta1 = kept, 1 - settings.beta1
        d_scale = d_x[0] * (m / one_minus_beta1) + d_x[1] * grad
        d_v = -0.5 * d_scale * scale.pow(3) / (1 - settings.beta2)
        return d_x[1] * scale, d_x[0] * scale / one_minus_beta1, d_v


class _Step(NamedTuple):
    """Of the nominal form: the root, r, a, b, and c1, c2 and the pace, (N,) each."""

    root: Tensor
    r: Tensor
    a: Tensor
    b: Tensor
    c1: Tensor
    c2: Tensor
    pace: Tensor


class _Nominal:
    name, features, outputs = "nominal", 3, 2

    def seen(
        self, grad: Tensor, m: Tensor, v: Tensor, settings: StepSettings
    ) -> tuple[Tensor, _Step]:
        assert settings.corrections is not None
        c1, c2, pace = by_coordinate(settings.corrections, settings.sizes)
        some = v > 0
        # Where v is 0 the root has no slope; nothing may be multiplied by that.
        root = torch.where(some, v * c2, 1).sqrt()
        r = torch.where(some, 1 / (root + settings.eps), 0)
        a, b = m * c1 * r, grad * r
        return torch.stack((a.abs(), (a * b).tanh(), b.abs().tanh())), _Step(
            root, r, a, b, c1, c2, pace
        )

    def update(self, o: Tensor, kept: _Step, settings: StepSettings) -> Tensor:
        factor = settings.alpha * kept.pace * o[0].clamp(LEAST_LOG, MOST_LOG).exp()
        return factor * (kept.a + o[1] * (kept.b / (1 + kept.b.abs() / SOFT)))

    def back_to_outputs(
        self, d_update: Tensor, o: Tensor, kept: _Step, settings: StepSettings
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        inside = (o[0] >= LEAST_LOG) & (o[0] <= MOST_LOG)
        factor = settings.alpha * kept.pace * o[0].clamp(LEAST_LOG, MOST_LOG).exp()
        below = 1 + kept.b.abs() / SOFT
        soft = kept.b / below
        d_scaled = d_update * factor
        d_log = torch.where(inside, d_scaled * (kept.a + o[1] * soft), 0)
        d_o = torch.stack((d_log, d_scaled * soft))
        return d_o, (d_scaled, d_scaled * o[1] / below.square())

    def back_to_moments(
        self, d_x: Tensor, beside: tuple[Tensor, Tensor], grad: Tensor, m: Tensor, v: Tensor,
        kept: _Step, settings: StepSettings,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        root, r, a, b, c1, c2, _ = kept
        d_a, d_b = beside
        d_product = d_x[1] * (1 - (a * b).tanh().square())
        d_a = d_a + d_x[0] * a.sign() + d_product * b
        d_b = d_b + d_product * a + d_x[2] * (1 - b.abs().tanh().square()) * b.sign()
        d_r = d_a * m * c1 + d_b * grad
        d_v = -(d_r * r) * r * (0.5 * c2 / root)
        return d_b * r, d_a * c1 * r, d_v


RNNPROP, NOMINAL = _RNNProp(), _Nominal()


def by_coordinate(corrections: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """c1, c2 and pace of each coordinate, (N,) each, of those of each tensor (tensors, 3).

    Of one tensor alone, three numbers.
    """
    found = corrections[0] if len(sizes) == 1 else _repeated(corrections, sizes).T
    c1, c2, pace = found
    return c1, c2, pace


def bias_by_coordinate(bias: Tensor, settings: StepSettings) -> Tensor:
    """The first layer's bias of each coordinate, (4 hidden, N) or (4 hidden, 1).

    Args:
        bias: Shape (4 hidden,), or of the nominal form (tensors, 4 hidden).
        settings: With the tensors' sizes.
    """
    if settings.corrections is None:
        return bias[:, None]
    return bias.T if len(settings.sizes) == 1 else _repeated(bias, settings.sizes).T


def _repeated(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """Each row as many times as its tensor has coordinates."""
    counts = torch.tensor(list(sizes), dtype=torch.int64, device="cpu").to(rows.device)
    # A size that is known spares a GPU's answer.
    return rows.repeat_interleave(counts, 0, output_size=sum(sizes))


def by_tensor(d_gates: Tensor, sizes: Sequence[int]) -> Tensor:
    """The sums over each tensor's coordinates, (tensors, 4 hidden), of (4 hidden, N)."""
    parts = d_gates.split(list(sizes), 1)
    return torch.stack([part.sum(1) for part in parts])


def tensors_of_part(sizes: Sequence[int], part: slice) -> tuple[slice, list[int]]:
    """The tensors that have coordinates in a part of all, and how many each has there.

    Args:
        sizes: How many coordinates each tensor has.
        part: Which coordinates; one or more.
    """
    ends = list(itertools.accumulate(sizes))
    first = bisect.bisect_right(ends, part.start)
    last = bisect.bisect_left(ends, part.stop)
    inside = [
        min(part.stop, ends[tensor]) - max(part.start, ends[tensor] - sizes[tensor])
        for tensor in range(first, last + 1)
    ]
    return slice(first, last + 1), inside


def check_tensors(settings: StepSettings, bias: Tensor, n: int | None, like: Tensor) -> None:
    """Raise ValueError unless what the nominal form is given of tensors fits together.

    Args:
        settings: With corrections; of a step in place without sizes, of an unroll with a leading
            dimension of steps.
        bias: The first layer's, whose shape has been checked against the corrections'.
        n: How many coordinates there are; ``None`` where tensors are not cut from one vector.
        like: A tensor of the dtype and device.
    """
    if settings.corrections is None:
        if len(settings.sizes):
            raise ValueError(f"sizes must be empty without corrections, not {settings.sizes}")
        return
    check_like("corrections", settings.corrections, (*bias.shape[:-1], 3), like)
    if n is None:
        return
    sizes, tensors = settings.sizes, bias.shape[-2]
    if len(sizes) != tensors or min(sizes, default=0) < 0 or sum(sizes) != n:
        raise ValueError(
            f"sizes must be those of {tensors} tensors, 0 or more and {n} in all, not {list(sizes)}"
        )
