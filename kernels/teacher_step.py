"""One step of a pool of analytical teachers; formulas: amalgam/operations/teacher_step.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from amalgam.kernels.launch import on_device_of
from amalgam.ops import KINDS

BYTES = 2048  # that a program reads of a row: four floats a thread, by one load
# Fusion is named because Triton 3.10 turns it off by default.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}

SGD = tl.constexpr(KINDS.index("sgd"))
MOMENTUM = tl.constexpr(KINDS.index("momentum"))
RMSPROP = tl.constexpr(KINDS.index("rmsprop"))
ADAM = tl.constexpr(KINDS.index("adam"))
POWERSIGN = tl.constexpr(KINDS.index("powersign"))
ADAPTIVE_POWERSIGN = tl.constexpr(KINDS.index("adaptive_powersign"))
ADAPTIVE_ADDSIGN = tl.constexpr(KINDS.index("adaptive_addsign"))

# A teacher's row of the table that the kernels read, in their dtype.
COLUMNS = (
    "kind",
    "lr",
    "beta1",
    "beta2",
    "eps",
    "1 - beta1",
    "1 - beta2",
    "1 / (1 - beta1)",
    "1 / (1 - beta2)",
)
WIDTH = tl.constexpr(len(COLUMNS))


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
def has_m(kind):
    """Whether the kind steps its first moment."""
    return (kind != SGD) & (kind != RMSPROP)


@triton.jit
def has_v(kind):
    """Whether the kind steps its second moment."""
    return (kind != SGD) & (kind != MOMENTUM)


@triton.jit
def is_power(kind):
    """Whether the agreement of g and m enters by exp."""
    return (kind == POWERSIGN) | (kind == ADAPTIVE_POWERSIGN)


@triton.jit
def is_adaptive(kind):
    """Whether the kind divides g by the root of v."""
    return (kind == ADAPTIVE_POWERSIGN) | (kind == ADAPTIVE_ADDSIGN)


@triton.jit
def settings_of(teacher):
    """The numbers of COLUMNS, from where the teacher's row of the table begins."""
    return (
        tl.load(teacher).to(tl.int32),
        tl.load(teacher + 1),
        tl.load(teacher + 2),
        tl.load(teacher + 3),
        tl.load(teacher + 4),
        tl.load(teacher + 5),
        tl.load(teacher + 6),
        tl.load(teacher + 7),
        tl.load(teacher + 8),
    )


@triton.jit
def moments(kind, g, m, v, beta1, beta2, rest1, rest2):
    """The moments that have seen g; those that the kind lacks are the old ones.

    Which of two products is not rounded is said, here and below: a compiler takes one or the other,
    and a coordinate's bits would depend on how it is loaded.
    """
    if has_m(kind):
        m = tl.fma(beta1, m, rest1 * g)
    if has_v(kind):
        v = tl.fma(beta2, v, rest2 * (g * g))
    return m, v


@triton.jit
def update_of(kind, g, m, v, lr, eps, inverse1, inverse2):
    """The update, from moments that have seen g."""
    if kind == SGD:
        update = lr * g
    elif kind == MOMENTUM:
        update = lr * m
    elif kind == RMSPROP:
        update = _ratio(lr * g, _root(v + eps))
    elif kind == ADAM:
        update = _ratio(lr * (m * inverse1), _root(v * inverse2 + eps))
    else:
        scale = _reciprocal(_root(v + eps))
        along = g * scale
        agreement = _tanh_product(along, m * scale)
        bracket = _exp(agreement) if is_power(kind) else 1.0 + agreement
        if not is_adaptive(kind):
            along = g
        update = lr * (bracket * along)
    return update


@triton.jit
def update_gradients(kind, d, g, m, v, lr, eps, inverse1, inverse2):
    """Gradients of the update's d-th part in g and in the moments that have seen it."""
    d = lr * d
    in_g = tl.zeros_like(g)
    in_m = tl.zeros_like(g)
    in_v = tl.zeros_like(g)
    if kind == SGD:
        in_g = d
    elif kind == MOMENTUM:
        in_m = d
    elif kind == RMSPROP:
        scale = _reciprocal(_root(v + eps))
        in_g = d * scale
        in_v = -0.5 * (in_g * g) * (scale * scale)
    elif kind == ADAM:
        scale = _reciprocal(_root(v * inverse2 + eps))
        in_m = d * scale * inverse1
        in_v = -0.5 * (in_m * m) * (scale * scale) * inverse2
    else:
        scale = _reciprocal(_root(v + eps))
        tanh_g, slope_g = _tanh_and_slope(g * scale)
        tanh_m, slope_m = _tanh_and_slope(m * scale)
        agreement = tanh_g * tanh_m
        d_scale = tl.zeros_like(g)
        bracket = _exp(agreement) if is_power(kind) else 1.0 + agreement
        if is_adaptive(kind):
            d_scale = d * bracket * g
            d = d * scale
        d_agreement = d * g
        if is_power(kind):
            d_agreement = d_agreement * bracket
        d_scaled_g = d_agreement * tanh_m * slope_g
        d_scaled_m = d_agreement * tanh_g * slope_m
        d_scale += tl.fma(d_scaled_g, g, d_scaled_m * m)
        in_g = tl.fma(d, bracket, d_scaled_g * scale)
        in_m = d_scaled_m * scale
        in_v = -0.5 * (d_scale * scale) * (scale * scale)
    return in_g, in_m, in_v


@triton.jit
def forward(
    table,  # (K, WIDTH)
    grads,  # (K, N)
    m,  # (K, N)
    v,  # (K, N)
    updates,  # (K, N) out
    new_m,  # (K, N) out
    new_v,  # (K, N) out
    n,
    BLOCK: tl.constexpr,
):
    """Program (p, k) takes the p-th block of teacher k's coordinates."""
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    at += row * n
    kind, lr, beta1, beta2, eps, rest1, rest2, inverse1, inverse2 = settings_of(table + row * WIDTH)
    g = tl.load(grads + at, mask=inside, other=0.0)
    old_m = tl.load(m + at, mask=inside, other=0.0)
    old_v = tl.load(v + at, mask=inside, other=0.0)
    now_m, now_v = moments(kind, g, old_m, old_v, beta1, beta2, rest1, rest2)
    tl.store(new_m + at, now_m, mask=inside)
    tl.store(new_v + at, now_v, mask=inside)
    update = update_of(kind, g, now_m, now_v, lr, eps, inverse1, inverse2)
    tl.store(updates + at, update, mask=inside)


@triton.jit
def gradients(
    table,  # (K, WIDTH)
    d_updates,  # (K, N)
    d_m,  # (K, N) gradient in the new m
    d_v,  # (K, N) gradient in the new v
    grads,  # (K, N)
    m,  # (K, N)
    v,  # (K, N)
    in_grads,  # (K, N) out
    in_m,  # (K, N) out
    in_v,  # (K, N) out
    n,
    BLOCK: tl.constexpr,
):
    """Program (p, k) takes the p-th block of teacher k's coordinates."""
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    at += row * n
    kind, lr, beta1, beta2, eps, rest1, rest2, inverse1, inverse2 = settings_of(table + row * WIDTH)
    g = tl.load(grads + at, mask=inside, other=0.0)
    old_m = tl.load(m + at, mask=inside, other=0.0)
    old_v = tl.load(v + at, mask=inside, other=0.0)
    d = tl.load(d_updates + at, mask=inside, other=0.0)
    now_m, now_v = moments(kind, g, old_m, old_v, beta1, beta2, rest1, rest2)
    of_g, of_m, of_v = update_gradients(kind, d, g, now_m, now_v, lr, eps, inverse1, inverse2)
    of_m += tl.load(d_m + at, mask=inside, other=0.0)
    of_v += tl.load(d_v + at, mask=inside, other=0.0)
    if has_m(kind):
        of_g = tl.fma(rest1, of_m, of_g)
        of_m = beta1 * of_m
    if has_v(kind):
        of_g = tl.fma(2.0 * rest2 * g, of_v, of_g)
        of_v = beta2 * of_v
    tl.store(in_grads + at, of_g, mask=inside)
    tl.store(in_m + at, of_m, mask=inside)
    tl.store(in_v + at, of_v, mask=inside)


def teacher_table(
    like: Tensor,
    kinds: Sequence[int],
    lr: Sequence[float],
    beta1: Sequence[float],
    beta2: Sequence[float],
    eps: Sequence[float],
) -> Tensor:
    """The teachers' settings where kernels can read them.

    A tensor, because a program can't index scalar arguments by its row, and those of a tuple are
    float32. One for all, so that it takes one copy; from pinned memory, which waits for nothing and
    which PyTorch keeps for a CUDA graph that captured it. It is made anew in each call: one kept
    from before could be freed while another stream, or a graph, still reads it.

    Args:
        like: A tensor of the dtype and device wanted.
        kinds: The K teachers' kinds, as indices into ``KINDS``.
        lr: Their learning rates.
        beta1: Their decays of m.
        beta2: Their decays of v.
        eps: What they add to v inside the root.

    Returns:
        Shape (K, WIDTH), the columns those of ``COLUMNS``, each rounded once.
    """
    rows = [
        (kind, rate, b1, b2, e, 1 - b1, 1 - b2, 1 / (1 - b1), 1 / (1 - b2))
        for kind, rate, b1, b2, e in zip(kinds, lr, beta1, beta2, eps, strict=True)
    ]
    table = torch.tensor(rows, dtype=like.dtype, pin_memory=like.is_cuda)
    return table.to(like.device, non_blocking=True)


def teacher_step(
    grads: Tensor,
    m: Tensor,
    v: Tensor,
    kinds: Sequence[int],
    lr: Sequence[float],
    beta1: Sequence[float],
    beta2: Sequence[float],
    eps: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward.

    Args:
        grads: Each teacher's gradient, shape (K, N), contiguous, float32 or float64.
        m: First moments, likewise, same dtype and device.
        v: Second moments, likewise.
        kinds: The K teachers' kinds, as indices into ``KINDS``; K is at most 65535.
        lr: Their learning rates.
        beta1: Their decays of m.
        beta2: Their decays of v.
        eps: What they add to v inside the root.

    Returns:
        The updates and the new m and v, each (K, N).
    """
    k, n = grads.shape
    updates, new_m, new_v = (tensor.new_empty((k, n)) for tensor in (grads, m, v))
    if k == 0 or n == 0:
        return updates, new_m, new_v
    block = BYTES // grads.element_size()
    with on_device_of(grads):
        forward[(triton.cdiv(n, block), k)](
            teacher_table(grads, kinds, lr, beta1, beta2, eps),
            grads,
            m,
            v,
            updates,
            new_m,
            new_v,
            n,
            BLOCK=block,
            **OPTIONS,
        )
    return updates, new_m, new_v


def teacher_step_backward(
    grads_out: Sequence[Tensor],
    grads: Tensor,
    m: Tensor,
    v: Tensor,
    kinds: Sequence[int],
    lr: Sequence[float],
    beta1: Sequence[float],
    beta2: Sequence[float],
    eps: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward.

    Args:
        grads_out: Gradients in the updates and the new m and v, each as ``grads``.
        grads: As in the forward, and so the others.
        m: The moments before the step.
        v: Likewise.
        kinds: As in the forward.
        lr: As in the forward.
        beta1: As in the forward.
        beta2: As in the forward.
        eps: As in the forward.

    Returns:
        Gradients in ``grads``, m and v, each (K, N).
    """
    k, n = grads.shape
    in_grads, in_m, in_v = (tensor.new_empty((k, n)) for tensor in (grads, m, v))
    if k == 0 or n == 0:
        return in_grads, in_m, in_v
    block = BYTES // grads.element_size()
    with on_device_of(grads):
        gradients[(triton.cdiv(n, block), k)](
            teacher_table(grads, kinds, lr, beta1, beta2, eps),
            *grads_out,
            grads,
            m,
            v,
            in_grads,
            in_m,
            in_v,
            n,
            BLOCK=block,
            **OPTIONS,
        )
    return in_grads, in_m, in_v
