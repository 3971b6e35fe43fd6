"""The kinds of analytical teachers: the update that each makes of a gradient g and its moments.

The moments have seen g, and the update is lr times the direction::

    m <- beta1 m + (1 - beta1) g             v <- beta2 v + (1 - beta2) g^2

    sgd                  g
    momentum             m
    rmsprop              g / sqrt(v + eps)
    adam                 m / (1 - beta1) / sqrt(v / (1 - beta2) + eps)
    powersign            exp(s) g                    s = tanh(g / r) tanh(m / r)
    addsign              (1 + s) g                   r = sqrt(v + eps)
    adaptive_powersign   exp(s) g / r
    adaptive_addsign     (1 + s) g / r

No bias correction depends on time, and sign() is a tanh: the forms of the authors' code of
Optimizer Amalgamation (ICLR 2022), which the student's input distribution presumes. They differ
from torch.optim's: Adam's step here is its first step's size at first and falls to 0.316 of it.

A new kind is an entry of :data:`TEACHER_KINDS`, at its end, a struct in csrc/cpu/teacher_kinds.h
and a branch in kernels/teacher_kinds.py: compiled code knows kinds by their place in the table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Coefficients(NamedTuple):
    """A teacher's settings that its direction depends on.

    Attributes:
        beta1: Decay of m, in [0, 1).
        beta2: Decay of v, in [0, 1).
        eps: What is added to v inside the root.
    """

    beta1: float
    beta2: float
    eps: float


Gradients = tuple[Tensor, Tensor, Tensor]


class TeacherKind(NamedTuple):
    """What a kind of teacher computes, and its default settings.

    Attributes:
        has_m: Whether it steps the first moment.
        has_v: Whether it steps the second moment.
        direction: Makes the update over the learning rate of g, m, v and the coefficients. Tensors
            are of one shape, and the moments have seen g.
        gradients: Makes, of the gradient in the direction and of the same arguments, the gradients
            in g, m and v, as formulas of their own: second derivatives are taken of them.
        lr: The paper's learning rate; for the adaptive sign kinds, which it does not rate,
            RMSProp's.
        beta2: Default decay of v.
    """

    has_m: bool
    has_v: bool
    direction: Callable[[Tensor, Tensor, Tensor, Coefficients], Tensor]
    gradients: Callable[[Tensor, Tensor, Tensor, Tensor, Coefficients], Gradients]
    lr: float
    beta2: float = 0.999

    def moments(self, g: Tensor, m: Tensor, v: Tensor, by: Coefficients) -> tuple[Tensor, Tensor]:
        """The moments that have seen g; one that the kind does not step is returned as it is."""
        if self.has_m:
            m = by.beta1 * m + (1 - by.beta1) * g
        if self.has_v:
            v = by.beta2 * v + (1 - by.beta2) * g.square()
        return m, v


def _sgd(g: Tensor, m: Tensor, v: Tensor, by: Coefficients) -> Tensor:
    return g


def _sgd_gradients(d: Tensor, g: Tensor, m: Tensor, v: Tensor, by: Coefficients) -> Gradients:
    return d, torch.zeros_like(d), torch.zeros_like(d)


def _momentum(g: Tensor, m: Tensor, v: Tensor, by: Coefficients) -> Tensor:
    return m


def _momentum_gradients(d: Tensor, g: Tensor, m: Tensor, v: Tensor, by: Coefficients) -> Gradients:
    return torch.zeros_like(d), d, torch.zeros_like(d)


def _rmsprop(g: Tensor, m: Tensor, v: Tensor, by: Coefficients) -> Tensor:
    return g / (v + by.eps).sqrt()


def _rmsprop_gradients(d: Tensor, g: Tensor, m: Tensor, v: Tensor, by: Coefficients) -> Gradients:
    scale = (v + by.eps).rsqrt()
    return d * scale, torch.zeros_like(d), -0.5 * d * g * scale.pow(3)


def _adam(g: Tensor, m: Tensor, v: Tensor, by: Coefficients) -> Tensor:
    return m / (1 - by.beta1) / (v / (1 - by.beta2) + by.eps).sqrt()


def _adam_gradients(d: Tensor, g: Tensor, m: Tensor, v: Tensor, by: Coefficients) -> Gradients:
    scale = (v / (1 - by.beta2) + by.eps).rsqrt()
    d_scale = d * m / (1 - by.beta1)
    d_v = -0.5 * d_scale * scale.pow(3) / (1 - by.beta2)
    return torch.zeros_like(d), d * scale / (1 - by.beta1), d_v


def _sign(power: bool, adaptive: bool, g: Tensor, m: Tensor, v: Tensor, by: Coefficients) -> Tensor:
    root = (v + by.eps).sqrt()
    agreement = (g / root).tanh() * (m / root).tanh()
    bracket = agreement.exp() if power else 1 + agreement
    return bracket * g / root if adaptive else bracket * g


def _sign_gradients(
    power: bool, adaptive: bool, d: Tensor, g: Tensor, m: Tensor, v: Tensor, by: Coefficients
) -> Gradients:
    scale = (v + by.eps).rsqrt()
    tanh_g, tanh_m = (g * scale).tanh(), (m * scale).tanh()
    agreement = tanh_g * tanh_m
    bracket = agreement.exp() if power else 1 + agreement
    d_scale = torch.zeros_like(d)
    if adaptive:
        d_scale = d * bracket * g
        d = d * scale
    d_agreement = d * g * bracket if power else d * g
    d_scaled_g = d_agreement * tanh_m * (1 - tanh_g.square())
    d_scaled_m = d_agreement * tanh_g * (1 - tanh_m.square())
    d_scale = d_scale + d_scaled_g * g + d_scaled_m * m
    return (
        d * bracket + d_scaled_g * scale,
        d_scaled_m * scale,
        -0.5 * d_scale * scale.pow(3),
    )


def _sign_kind(*, power: bool, adaptive: bool, lr: float) -> TeacherKind:
    """PowerSign (``power``) or AddSign; ``adaptive`` divides g by the root of v."""
    direction = functools.partial(_sign, power, adaptive)
    return TeacherKind(
        True, True, direction, functools.partial(_sign_gradients, power, adaptive), lr
    )


TEACHER_KINDS = {
    "sgd": TeacherKind(False, False, _sgd, _sgd_gradients, lr=0.2),
    "momentum": TeacherKind(True, False, _momentum, _momentum_gradients, lr=0.5),
    "rmsprop": TeacherKind(False, True, _rmsprop, _rmsprop_gradients, lr=0.005, beta2=0.9),
    "adam": TeacherKind(True, True, _adam, _adam_gradients, lr=0.005),
    "powersign": _sign_kind(power=True, adaptive=False, lr=0.1),
    "addsign": _sign_kind(power=False, adaptive=False, lr=0.1),
    "adaptive_powersign": _sign_kind(power=True, adaptive=True, lr=0.005),
    "adaptive_addsign": _sign_kind(power=False, adaptive=True, lr=0.005),
}
KINDS = tuple(TEACHER_KINDS)
