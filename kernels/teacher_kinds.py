"""The kinds of analytical teachers; formulas: amalgam/operations/teacher_kinds.py.

A new kind is a branch of :func:`of_kind`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from amalgam.operations.teacher_kinds import TEACHER_KINDS

NUMBERS = {name: k for k, name in enumerate(TEACHER_KINDS)}
_WITHOUT_M = tuple(k for k, kind in enumerate(TEACHER_KINDS.values()) if not kind.has_m)
_WITHOUT_V = tuple(k for k, kind in enumerate(TEACHER_KINDS.values()) if not kind.has_v)
WITHOUT_M, COUNT_M = tl.constexpr(_WITHOUT_M), tl.constexpr(len(_WITHOUT_M))
WITHOUT_V, COUNT_V = tl.constexpr(_WITHOUT_V), tl.constexpr(len(_WITHOUT_V))


@triton.constexpr_function
def number(name):
    """The kind's place in KINDS, by which the table of teachers knows it."""
    return NUMBERS[name]


@triton.jit
def _root(x):
    """Correctly rounded: of float32, tl.sqrt is an approximation."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _ratio(x, y):
    """Correctly rounded: of float32, x / y is an approximation."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def _reciprocal(x):
    return _ratio(tl.full(x.shape, 1.0, x.dtype), x)


@triton.jit
def _exponential(x):
    """A power of two t and a rest, exp(x) = t (1 + rest), for x <= 1; t is 0 where exp underflows.

    tl.exp(x) - 1 would cancel near zero, and of float32 tl.exp is an approximation. The bits of
    x log2(e) + 1.5 2^23 (of float64 2^52) end in that product, rounded to a whole number.
    """
    if x.dtype == tl.float64:
        x = tl.where(x < -709.0, -709.0, x)
        shifted = x * 1.4426950408889634 + 6755399441055744.0
        n = shifted - 6755399441055744.0
        t = ((shifted.to(tl.int64, bitcast=True) + 1023) << 52).to(tl.float64, bitcast=True)
        r = (x - n * 0.6931471803691238) - n * 1.9082149292705877e-10
        # Taylor's, whose first term left out is below 2^-56 at |r| <= log(2) / 2.
        p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0
        p = p * r + 1.0 / 39916800.0
        p = p * r + 1.0 / 3628800.0
        p = p * r + 1.0 / 362880.0
        p = p * r + 1.0 / 40320.0
        p = p * r + 1.0 / 5040.0
        p = p * r + 1.0 / 720.0
        p = p * r + 1.0 / 120.0
        p = p * r + 1.0 / 24.0
        p = p * r + 1.0 / 6.0
        p = p * r + 0.5
    else:
        x = tl.where(x < -88.0, -88.0, x)
        shifted = x * 1.4426950216293335 + 12582912.0
        n = shifted - 12582912.0
        t = ((shifted.to(tl.int32, bitcast=True) + 127) << 23).to(tl.float32, bitcast=True)
        r = (x - n * 0.693145751953125) - n * 1.428606765330187e-06
        # The minimax polynomial of csrc/cpu/activations.h.
        p = r * 0.0013882516650483012 + 0.008366547524929047
        p = p * r + 0.04166720062494278
        p = p * r + 0.1666654348373413
        p = p * r + 0.4999999701976776
    return t, (p * r) * r + r


@triton.jit
def _exp(x):
    """For x <= 1."""
    t, rest = _exponential(x)
    return t * rest + t


@triton.jit
def _tanh_parts(x):
    """With e = exp(-2|x|): e - 1 without cancellation, e, 1 + e, and the latter's relative error.

    That error, corrected for, halves those of the quotients; it takes few bits of 1 / (1 + e).
    """
    t, rest = _exponential(-2.0 * tl.abs(x))
    e = t * rest + t
    below = 1.0 + e
    return t * rest + (t - 1.0), e, below, (e - (below - 1.0)) * (1.5 - 0.5 * below)


@triton.jit
def _tanh_product(x, y):
    """tanh(x) tanh(y), by one division for both."""
    above_x, _, below_x, error_x = _tanh_parts(x)
    above_y, _, below_y, error_y = _tanh_parts(y)
    size = _ratio(above_x * above_y, below_x * below_y)
    size -= size * (error_x + error_y)
    return tl.where((x < 0) != (y < 0), -size, size)


@triton.jit
def _tanh_and_slope(x):
    """tanh(x) and 1 - tanh(x)^2, as 4 e / (1 + e)^2: that difference would cancel."""
    above, e, below, error = _tanh_parts(x)
    size = _ratio(above, below)
    size -= size * error
    slope = _ratio(4.0 * e, below * below)
    slope -= slope * (2.0 * error)
    return tl.where(x < 0, size, -size), slope


@triton.jit
def _is_power(kind):
    """Whether the agreement of g and m enters by exp: PowerSign's; else AddSign's."""
    return (kind == number("powersign")) | (kind == number("adaptive_powersign"))


@triton.jit
def _is_adaptive(kind):
    """Whether the kind divides g by the root of v."""
    return (kind == number("adaptive_powersign")) | (kind == number("adaptive_addsign"))


@triton.jit
def _sign(kind, g, m, v, eps):
    """The direction of PowerSign or AddSign."""
    scale = _reciprocal(_root(v + eps))
    along = g * scale
    agreement = _tanh_product(along, m * scale)
    bracket = _exp(agreement) if _is_power(kind) else 1.0 + agreement
    if not _is_adaptive(kind):
        along = g
    return bracket * along


@triton.jit
def _sign_gradients(kind, d, g, m, v, eps):
    """Gradients of the direction's d-th part in g, m and v."""
    scale = _reciprocal(_root(v + eps))
    tanh_g, slope_g = _tanh_and_slope(g * scale)
    tanh_m, slope_m = _tanh_and_slope(m * scale)
    agreement = tanh_g * tanh_m
    d_scale = tl.zeros_like(g)
    bracket = _exp(agreement) if _is_power(kind) else 1.0 + agreement
    if _is_adaptive(kind):
        d_scale = d * bracket * g
        d = d * scale
    d_agreement = d * g
    if _is_power(kind):
        d_agreement = d_agreement * bracket
    d_scaled_g = d_agreement * tanh_m * slope_g
    d_scaled_m = d_agreement * tanh_g * slope_m
    d_scale += tl.fma(d_scaled_g, g, d_scaled_m * m)
    in_g = tl.fma(d, bracket, d_scaled_g * scale)
    return in_g, d_scaled_m * scale, -0.5 * (d_scale * scale) * (scale * scale)


@triton.jit
def _is_none_of(kind, KINDS: tl.constexpr, COUNT: tl.constexpr):
    found = kind != KINDS[0]
    for k in tl.static_range(1, COUNT):
        found = found & (kind != KINDS[k])
    return found


@triton.jit
def has_m(kind):
    """Whether the kind steps its first moment."""
    return _is_none_of(kind, WITHOUT_M, COUNT_M)


@triton.jit
def has_v(kind):
    """Whether the kind steps its second moment."""
    return _is_none_of(kind, WITHOUT_V, COUNT_V)


@triton.jit
def moments(kind, g, m, v, beta1, beta2, rest1, rest2):
    """The moments that have seen g; those that the kind lacks are the old ones.

    The code says which of two products is not rounded, here and below: a compiler takes one or the
    other, and a coordinate's bits would depend on how it is loaded.
    """
    if has_m(kind):
        m = tl.fma(beta1, m, rest1 * g)
    if has_v(kind):
        v = tl.fma(beta2, v, rest2 * (g * g))
    return m, v


@triton.jit
def of_kind(kind, d, g, m, v, lr, eps, inverse1, inverse2, GRADIENTS: tl.constexpr):
    """A kind's update, from moments that have seen g, or gradients of it.

    Args:
        kind: Its number.
        d: Gradient in the update; unused without GRADIENTS.
        g: The gradient, (BLOCK,).
        m: The moments that have seen it.
        v: Likewise.
        lr: The learning rate.
        eps: What is added to v inside the root.
        inverse1: 1 / (1 - beta1).
        inverse2: 1 / (1 - beta2).
        GRADIENTS: Whether to return the gradients in place of the update.

    Returns:
        The update, or the gradients in g, m and v.
    """
    if GRADIENTS:
        d = lr * d
        in_g = tl.zeros_like(g)
        in_m = tl.zeros_like(g)
        in_v = tl.zeros_like(g)
    if kind == number("sgd"):
        if GRADIENTS:
            in_g = d
        else:
            update = lr * g
    elif kind == number("momentum"):
        if GRADIENTS:
            in_m = d
        else:
            update = lr * m
    elif kind == number("rmsprop"):
        if GRADIENTS:
            scale = _reciprocal(_root(v + eps))
            in_g = d * scale
            in_v = -0.5 * (in_g * g) * (scale * scale)
        else:
            update = _ratio(lr * g, _root(v + eps))
    elif kind == number("adam"):
        if GRADIENTS:
            scale = _reciprocal(_root(v * inverse2 + eps))
            in_m = d * scale * inverse1
            in_v = -0.5 * (in_m * m) * (scale * scale) * inverse2
        else:
            update = _ratio(lr * (m * inverse1), _root(v * inverse2 + eps))
    else:
        if GRADIENTS:
            in_g, in_m, in_v = _sign_gradients(kind, d, g, m, v, eps)
        else:
            update = lr * _sign(kind, g, m, v, eps)
    if GRADIENTS:
        return in_g, in_m, in_v
    else:
        return update
