"""The optimal choice's network on blocks of coordinates, for the kernels of its step.

The formulas are in amalgam/operations/choice_step.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from amalgam.kernels.lstm import cell, column
from amalgam.kernels.teacher_kinds import has_m, has_v, moments, of_kind
from amalgam.kernels.teacher_step import WIDTH, settings_of
from amalgam.operations.choice_step import IDLE_LOGIT as _IDLE_LOGIT

RANKS = tl.constexpr(3)  # features that say whether a coordinate's rank is 1, 2 or 3
IDLE_LOGIT = tl.constexpr(_IDLE_LOGIT)


@triton.jit
def row_of(tile, k, POOL: tl.constexpr):
    """Row k of (POOL, BLOCK)."""
    return tl.sum(tl.where(tl.arange(0, POOL)[:, None] == k, tile, 0.0), 0)


@triton.jit
def with_row(tile, k, row, POOL: tl.constexpr):
    """(POOL, BLOCK) with another row k."""
    return tl.where(tl.arange(0, POOL)[:, None] == k, row[None, :], tile)


@triton.jit
def teachers_updates(table, g, m, v, at, inside, n, K: tl.constexpr, POOL: tl.constexpr):
    """The teachers' updates, (POOL, BLOCK), zeros in the rows that are none."""
    result = tl.zeros((POOL, at.shape[0]), tl.float32)
    place = at  # goes on by n: a product k n would need 64 bits
    for k in range(K):
        kind, lr, beta1, beta2, eps, rest1, rest2, inverse1, inverse2 = settings_of(
            table + k * WIDTH
        )
        old_m = tl.load(m + place, mask=inside, other=0.0)
        old_v = tl.load(v + place, mask=inside, other=1.0)
        now_m, now_v = moments(kind, g, old_m, old_v, beta1, beta2, rest1, rest2)
        row = of_kind(kind, 0.0, g, now_m, now_v, lr, eps, inverse1, inverse2, False)
        result = with_row(result, k, row, POOL)
        place += n
    return result


@triton.jit
def teachers_gradients(
    table,  # (K, WIDTH)
    g,  # (BLOCK,)
    m,  # (K, N)
    v,  # (K, N)
    d_updates,  # (POOL, BLOCK)
    d_new_m,  # (K, N)
    d_new_v,  # (K, N)
    d_m,  # (K, N) out
    d_v,  # (K, N) out
    at,  # (BLOCK,)
    inside,  # (BLOCK,) which of them exist
    n,
    K: tl.constexpr,
    POOL: tl.constexpr,
):
    """Writes the gradients in the moments, and returns the one in grad, (BLOCK,)."""
    d_g = tl.zeros(at.shape, tl.float32)
    place = at  # goes on by n: a product k n would need 64 bits
    for k in range(K):
        kind, lr, beta1, beta2, eps, rest1, rest2, inverse1, inverse2 = settings_of(
            table + k * WIDTH
        )
        old_m = tl.load(m + place, mask=inside, other=0.0)
        old_v = tl.load(v + place, mask=inside, other=1.0)
        now_m, now_v = moments(kind, g, old_m, old_v, beta1, beta2, rest1, rest2)
        d_row = row_of(d_updates, k, POOL)
        of_g, of_m, of_v = of_kind(kind, d_row, g, now_m, now_v, lr, eps, inverse1, inverse2, True)
        of_m += tl.load(d_new_m + place, mask=inside, other=0.0)
        of_v += tl.load(d_new_v + place, mask=inside, other=0.0)
        if has_m(kind):
            of_g += rest1 * of_m
            of_m = beta1 * of_m
        if has_v(kind):
            of_g += 2.0 * rest2 * g * of_v
            of_v = beta2 * of_v
        tl.store(d_m + place, of_m, mask=inside)
        tl.store(d_v + place, of_v, mask=inside)
        d_g += of_g
        place += n
    return d_g


@triton.jit
def first_sums(
    packed,
    updates,  # (POOL, BLOCK)
    time,
    rank,  # (BLOCK,)
    GATE: tl.constexpr,
    K: tl.constexpr,
    POOL: tl.constexpr,
    UNITS: tl.constexpr,
):
    """What the first layer's gate takes of the features, (UNITS, BLOCK)."""
    weights = packed + GATE * (K + 1 + RANKS) * UNITS
    sums = (column(weights + K * UNITS, UNITS) * time)[:, None]
    for r in tl.static_range(1, RANKS + 1):
        is_rank = (rank == r).to(tl.float32)
        sums += column(weights + (K + r) * UNITS, UNITS)[:, None] * is_rank[None, :]
    for k in tl.static_range(K):
        sums += column(weights + k * UNITS, UNITS)[:, None] * row_of(updates, k, POOL)[None, :]
    return sums


@triton.jit
def with_inputs(
    h,  # (UNITS, BLOCK)
    updates,  # (POOL, BLOCK)
    time,
    rank,  # (BLOCK,)
    LAYER: tl.constexpr,
    K: tl.constexpr,
    POOL: tl.constexpr,
    HIDDEN: tl.constexpr,
    UNITS: tl.constexpr,
):
    """The old h with what FOLDED weights multiply in the rows that are no unit's."""
    unit = tl.arange(0, UNITS)[:, None]
    h = tl.where(unit < HIDDEN, h, (unit == HIDDEN).to(tl.float32))
    if LAYER == 0:
        for k in tl.static_range(K):
            h = tl.where(unit == HIDDEN + 1 + k, row_of(updates, k, POOL)[None, :], h)
        h = tl.where(unit == HIDDEN + 1 + K, time, h)
        of_rank = unit - (HIDDEN + 1 + K)
        is_rank = (of_rank > 0) & (of_rank <= RANKS) & (rank[None, :] == of_rank)
        h = tl.where(is_rank, 1.0, h)
    return h


@triton.jit
def choice_cell(
    packed,
    other,
    x,  # (UNITS, BLOCK) the layer below's new h; unused by the first layer
    h,  # (UNITS, BLOCK)
    c,  # (UNITS, BLOCK)
    updates,  # (POOL, BLOCK)
    time,
    rank,  # (BLOCK,)
    LAYER: tl.constexpr,
    K: tl.constexpr,
    POOL: tl.constexpr,
    UNITS: tl.constexpr,
    FOLDED: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """A layer's gates, its new c, and the tanh of that."""
    if LAYER == 0 and not FOLDED:
        i = first_sums(packed, updates, time, rank, 0, K, POOL, UNITS)
        f = first_sums(packed, updates, time, rank, 1, K, POOL, UNITS)
        a = first_sums(packed, updates, time, rank, 2, K, POOL, UNITS)
        o = first_sums(packed, updates, time, rank, 3, K, POOL, UNITS)
    else:
        i = tl.zeros_like(h)
        f = tl.zeros_like(h)
        a = tl.zeros_like(h)
        o = tl.zeros_like(h)
    # Teachers' updates have no bound.
    return cell(
        packed, other, x, h, c, i, f, a, o,
        LAYER, K + 1 + RANKS, UNITS, FOLDED, PRECISION, PTX, APPROXIMATE, LAYER == 0 and FOLDED,
    )  # fmt: skip


@triton.jit
def mixture_of(
    packed_head,
    top,  # (UNITS, BLOCK) the last layer's new h
    K: tl.constexpr,
    POOL: tl.constexpr,
    UNITS: tl.constexpr,
):
    """The teachers' shares, (POOL, BLOCK). The largest logit is subtracted: nothing overflows."""
    logits = tl.full((POOL, top.shape[1]), float("-inf"), tl.float32)
    for k in tl.static_range(K):
        logit = tl.sum(column(packed_head + k * UNITS, UNITS)[:, None] * top, 0)
        logits = with_row(logits, k, logit + tl.load(packed_head + K * UNITS + k), POOL)
    largest = tl.maximum(tl.max(logits, 0), IDLE_LOGIT)
    terms = tl.exp(logits - largest[None, :])
    # Rounded correctly, as gradients in logits cancel; / approximates.
    return tl.div_rn(terms, (tl.sum(terms, 0) + tl.exp(-largest + IDLE_LOGIT))[None, :])
