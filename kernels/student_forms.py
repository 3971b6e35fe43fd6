"""The two forms of a student's step on blocks of coordinates, for the kernels of its step.

The formulas are in amalgam/operations/student_forms.py. Both have a direction of the first moment,
a, and one of the gradient, b, which are the moment and the gradient times a scale; RNNProp calls
them its features.
"""

from __future__ import annotations

import triton
import triton.language as tl

from amalgam.kernels.lstm import exp, exp2, reciprocal, sqrt, tanh
from amalgam.operations import student_forms

LEAST_LOG = tl.constexpr(student_forms.LEAST_LOG)
MOST_LOG = tl.constexpr(student_forms.MOST_LOG)
SOFT = tl.constexpr(student_forms.SOFT)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def fresh_moments(g, m, v, beta1, beta2, one_minus_beta1, one_minus_beta2):
    """The new moments."""
    # fma says which product is not rounded: the compiler would choose differently by dtype.
    m = tl.fma(beta1, m, one_minus_beta1 * g)
    v = tl.fma(beta2, v, one_minus_beta2 * (g * g))
    return m, v


@triton.jit
def scale_of(v, one_minus_beta2, eps, correction2, NOMINAL: tl.constexpr, PTX: tl.constexpr):
    """What moment and gradient are multiplied by, and of the nominal form the root in it."""
    if NOMINAL:
        root = sqrt(v * correction2, PTX)
        return tl.where(v > 0.0, reciprocal(root + eps, PTX), 0.0), root
    else:
        return 1.0 / tl.sqrt_rn(v / one_minus_beta2 + eps), 0.0


@triton.jit
def corrected(m, one_minus_beta1, correction1, NOMINAL: tl.constexpr):
    """The first moment without the share that its beginning at zero takes from it."""
    if NOMINAL:
        return m * correction1
    else:
        return m / one_minus_beta1


@triton.jit
def seen(a, b, NOMINAL: tl.constexpr, PTX: tl.constexpr, APPROXIMATE: tl.constexpr):
    """The LSTM's features, FEATURES of (BLOCK,)."""
    if NOMINAL:
        return tl.abs(a), tanh(a * b, PTX, APPROXIMATE), tanh(tl.abs(b), PTX, APPROXIMATE)
    else:
        return a, b


@triton.jit
def _factor(alpha, log, PTX: tl.constexpr):
    """Alpha times the exponential of a head's output, within bounds; NaN stays."""
    log = tl.clamp(log, LEAST_LOG, MOST_LOG, propagate_nan=tl.PropagateNan.ALL)
    if PTX:
        power = log * LOG2_E
        # What that product has lost, for exp2 errs by as much of its result.
        lost = tl.fma(log, LOG2_E, -power)
        factor = exp2(power, PTX)
        return alpha * tl.fma(factor, lost * LN_2, factor)
    else:
        return alpha * tl.exp(log)


@triton.jit
def update_of(
    o,  # the head's outputs, OUTPUTS of (BLOCK,)
    a,  # (BLOCK,)
    b,
    alpha,
    NOMINAL: tl.constexpr,
    PTX: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """The update, (BLOCK,)."""
    if NOMINAL:
        soft = b * reciprocal(1.0 + tl.abs(b) * (1.0 / SOFT), PTX)
        return _factor(alpha, o[0], PTX) * (a + o[1] * soft)
    else:
        return alpha * tanh(o[0], PTX, APPROXIMATE)


@triton.jit
def output_gradients(
    d_update,  # (BLOCK,) where it lies
    inside,  # (BLOCK,) which of it exist
    o,  # the head's outputs, OUTPUTS of (BLOCK,)
    a,  # (BLOCK,)
    b,
    alpha,
    NOMINAL: tl.constexpr,
    PTX: tl.constexpr,
):
    """Gradients in the head's outputs, and those in a and b that are not by way of the LSTM."""
    if NOMINAL:
        within = (o[0] >= LEAST_LOG) & (o[0] <= MOST_LOG)
        below = 1.0 + tl.abs(b) * (1.0 / SOFT)
        soft = b / below
        d_scaled = tl.load(d_update, mask=inside, other=0.0) * _factor(alpha, o[0], PTX)
        d_log = tl.where(within, d_scaled * (a + o[1] * soft), 0.0)
        return (d_log, d_scaled * soft), d_scaled, d_scaled * o[1] / (below * below)
    else:
        # tanh's slope as 4 t / (1 + t)^2: 1 - tanh^2 would cancel.
        t = exp(-2.0 * tl.abs(o[0]), PTX)
        d_top = tl.load(d_update, mask=inside, other=0.0) * alpha
        d_top *= 4.0 * t / ((1.0 + t) * (1.0 + t))
        return (d_top,), 0.0, 0.0


@triton.jit
def _sign(x):
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x))


@triton.jit
def direction_gradients(d_x, d_a, d_b, a, b, x, NOMINAL: tl.constexpr):
    """Gradients in a and b, of those in the features x and of what else there is of them."""
    if NOMINAL:
        d_product = d_x[1] * (1.0 - x[1] * x[1])
        d_a += d_x[0] * _sign(a) + d_product * b
        d_b += d_product * a + d_x[2] * (1.0 - x[2] * x[2]) * _sign(b)
        return d_a, d_b
    else:
        return d_x[0], d_x[1]


@triton.jit
def m_gradient(d_a, scale, one_minus_beta1, correction1, NOMINAL: tl.constexpr):
    """The gradient in the new m, of that in a."""
    if NOMINAL:
        return d_a * correction1 * scale
    else:
        return d_a * scale / one_minus_beta1


@triton.jit
def v_descent(d_scale, scale, root, one_minus_beta2, correction2, NOMINAL: tl.constexpr):
    """The gradient in the new v, negated, of that in the scale."""
    if NOMINAL:
        # Where v is 0 so is the scale, and the root has no slope.
        return (d_scale * scale) * scale * (0.5 * correction2 / tl.where(scale > 0.0, root, 1.0))
    else:
        return 0.5 * d_scale * (scale * scale * scale) / one_minus_beta2
