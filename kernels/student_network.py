"""The RNNProp student's network on blocks of coordinates, for the kernels of its step.

The formulas are in amalgam/operations/student_step.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from amalgam.kernels import lstm, lstm_weights
from amalgam.kernels.configurations import FEW
from amalgam.kernels.lstm import cell, column, rows_of, sigmoid, sizes_of, tanh
from amalgam.kernels.rounding import random_bits, rounded_stochastically
from amalgam.operations.student_forms import StepSettings

FEATURES = 2
FEW_UNITS = tl.constexpr(FEW)


@triton.jit
def features_of(g, m, v, beta1, beta2, one_minus_beta1, one_minus_beta2, eps):
    """The new moments, and the two features of them."""
    # fma says which product is not rounded: the compiler would choose differently by dtype.
    m = tl.fma(beta1, m, one_minus_beta1 * g)
    v = tl.fma(beta2, v, one_minus_beta2 * (g * g))
    scale = 1.0 / tl.sqrt_rn(v / one_minus_beta2 + eps)
    return m, v, scale


@triton.jit
def first_sums(
    packed, a, b, GATE: tl.constexpr, UNITS: tl.constexpr, FEATURES: tl.constexpr
):  # a, b (BLOCK,)
    """What the first layer's gate takes of the features, (UNITS, BLOCK)."""
    weights = packed + GATE * FEATURES * UNITS
    of_a = column(weights, UNITS)[:, None] * a[None, :]
    return of_a + column(weights + UNITS, UNITS)[:, None] * b[None, :]


@triton.jit
def with_inputs(
    h,  # (UNITS, BLOCK)
    m_feature,  # (BLOCK,)
    g_feature,  # (BLOCK,)
    LAYER: tl.constexpr,
    HIDDEN: tl.constexpr,
    UNITS: tl.constexpr,
):
    """The old h with what FOLDED weights multiply in the rows that are no unit's."""
    unit = tl.arange(0, UNITS)[:, None]
    rest = (unit == HIDDEN).to(tl.float32)
    if LAYER == 0:
        features = tl.where(unit == HIDDEN + 1, m_feature[None, :], g_feature[None, :])
        rest = tl.where((unit == HIDDEN + 1) | (unit == HIDDEN + 2), features, rest)
    return tl.where(unit < HIDDEN, h, rest)


@triton.jit
def student_cell(
    packed,
    other,
    x,  # (UNITS, BLOCK) the layer below's new h; unused by the first layer
    h,  # (UNITS, BLOCK); of FOLDED weights, with its inputs
    c,  # (UNITS, BLOCK)
    m_feature,  # (BLOCK,)
    g_feature,  # (BLOCK,)
    LAYER: tl.constexpr,
    FEATURES: tl.constexpr,
    UNITS: tl.constexpr,
    FOLDED: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """A layer's gates, its new c, and the tanh of that."""
    if LAYER == 0 and not FOLDED:
        i = first_sums(packed, m_feature, g_feature, 0, UNITS, FEATURES)
        f = first_sums(packed, m_feature, g_feature, 1, UNITS, FEATURES)
        a = first_sums(packed, m_feature, g_feature, 2, UNITS, FEATURES)
        o = first_sums(packed, m_feature, g_feature, 3, UNITS, FEATURES)
    else:
        i = tl.zeros_like(h)
        f = tl.zeros_like(h)
        a = tl.zeros_like(h)
        o = tl.zeros_like(h)
    return cell(
        packed, other, x, h, c, i, f, a, o,
        LAYER, FEATURES, UNITS, FOLDED, PRECISION, PTX, APPROXIMATE, False,
    )  # fmt: skip


@triton.jit
def wait_for_loads():
    """Makes threads wait until all of the program have loaded what the next stores may overwrite.

    Several warps need the same numbers for matrix products, and each may load them itself.
    """
    tl.debug_barrier()


@triton.jit
def stored(value, bits, TYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Float32 as it is stored; to bfloat16 rounded by 16 bits if STOCHASTIC."""
    if STOCHASTIC and tl.bfloat16 == TYPE:
        return rounded_stochastically(value, bits)
    else:
        return value.to(TYPE)


@triton.jit
def _plain_sum(packed, x, h, m_feature, g_feature, FIRST, LAYER, HIDDEN, UNITS, FEATURES):
    """A gate's sum of one unit, (BLOCK,); FIRST is where the row of its weights begins."""
    W_IH, W_HH, _B, _END = sizes_of(LAYER, FEATURES, UNITS, True)
    row = packed + W_HH + FIRST
    total = tl.load(row + HIDDEN) + tl.load(row) * h[0]
    for k in tl.static_range(1, HIDDEN):
        total += tl.load(row + k) * h[k]
    if LAYER == 0:
        total += tl.load(row + HIDDEN + 1) * m_feature
        total += tl.load(row + HIDDEN + 2) * g_feature
    else:
        for k in tl.static_range(HIDDEN):
            total += tl.load(packed + W_IH + FIRST + k) * x[k]
    return total


@triton.jit
def _small_layers(
    packed,
    inside,
    at,
    n,
    h,
    c,
    new_h,
    new_c,
    m_feature,
    g_feature,
    key,
    LAYERS: tl.constexpr,
    HIDDEN: tl.constexpr,
    FEATURES: tl.constexpr,
    UNITS: tl.constexpr,
    PTX: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """The layers of few units, without tensor cores; returns the head's sum, (BLOCK,).

    A thread computes whole coordinates. Padded to the 16 units that tensor cores take, four or
    eight would cost several times as much.
    """
    TYPE: tl.constexpr = new_h.dtype.element_ty
    x = (m_feature,)  # unused by the first layer
    for layer in tl.static_range(LAYERS):
        old_h = ()
        old_c = ()
        # All loads come before the first store, since none may move ahead of it.
        for unit in tl.static_range(HIDDEN):
            here = at + tl.full((), layer * HIDDEN + unit, at.dtype) * n
            old_h = old_h + (tl.load(h + here, mask=inside, other=0.0).to(tl.float32),)
            old_c = old_c + (tl.load(c + here, mask=inside, other=0.0).to(tl.float32),)
        outputs = ()
        for unit in tl.static_range(HIDDEN):
            here = at + tl.full((), layer * HIDDEN + unit, at.dtype) * n
            i = _plain_sum(
                packed, x, old_h, m_feature, g_feature, unit * UNITS,
                layer, HIDDEN, UNITS, FEATURES,
            )  # fmt: skip
            f = _plain_sum(
                packed, x, old_h, m_feature, g_feature, (UNITS + unit) * UNITS,
                layer, HIDDEN, UNITS, FEATURES,
            )  # fmt: skip
            a = _plain_sum(
                packed, x, old_h, m_feature, g_feature, (2 * UNITS + unit) * UNITS,
                layer, HIDDEN, UNITS, FEATURES,
            )  # fmt: skip
            o = _plain_sum(
                packed, x, old_h, m_feature, g_feature, (3 * UNITS + unit) * UNITS,
                layer, HIDDEN, UNITS, FEATURES,
            )  # fmt: skip
            entering = sigmoid(i, PTX, APPROXIMATE) * tanh(a, PTX, APPROXIMATE)
            cell = tl.fma(sigmoid(f, PTX, APPROXIMATE), old_c[unit], entering)
            output = sigmoid(o, PTX, APPROXIMATE) * tanh(cell, PTX, APPROXIMATE)
            outputs = outputs + (output,)
            bits = at
            if STOCHASTIC:
                bits = random_bits(key, tl.full((), layer * HIDDEN + unit, tl.int32), at)
            tl.store(new_h + here, stored(output, bits >> 16, TYPE, STOCHASTIC), mask=inside)
            tl.store(new_c + here, stored(cell, bits & 0xFFFF, TYPE, STOCHASTIC), mask=inside)
        x = outputs
    _W_IH, _W_HH, _B, HEAD = sizes_of(LAYERS - 1, FEATURES, UNITS, True)
    top = tl.load(packed + HEAD + UNITS) + tl.load(packed + HEAD) * x[0]
    for unit in tl.static_range(1, HIDDEN):
        top += tl.load(packed + HEAD + unit) * x[unit]
    return top


@triton.jit
def _layers(
    packed,
    other,
    inside,
    at,
    n,
    h,
    c,
    new_h,
    new_c,
    m_feature,
    g_feature,
    key,
    LAYERS: tl.constexpr,
    HIDDEN: tl.constexpr,
    FEATURES: tl.constexpr,
    UNITS: tl.constexpr,
    FOLDED: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """Writes the new h and c and returns the head's sum, (BLOCK,)."""
    TYPE: tl.constexpr = new_h.dtype.element_ty
    unit = tl.arange(0, UNITS)
    used = (unit < HIDDEN)[:, None] & inside[None, :]
    x = tl.zeros((UNITS, BLOCK), tl.float32)
    for layer in tl.static_range(LAYERS):
        rows = rows_of(layer, HIDDEN, UNITS, at, n)
        old_h = tl.load(h + rows, mask=used, other=0.0).to(tl.float32)
        old_c = tl.load(c + rows, mask=used, other=0.0).to(tl.float32)
        if FOLDED:
            old_h = with_inputs(old_h, m_feature, g_feature, layer, HIDDEN, UNITS)
        _i, _f, _a, o, new_cell, squashed = student_cell(
            packed, other, x, old_h, old_c, m_feature, g_feature,
            layer, FEATURES, UNITS, FOLDED, PRECISION, PTX, APPROXIMATE,
        )  # fmt: skip
        x = o * squashed
        bits = rows
        if STOCHASTIC:
            bits = random_bits(key, (layer * HIDDEN + unit)[:, None], at[None, :])
        wait_for_loads()
        tl.store(new_h + rows, stored(x, bits >> 16, TYPE, STOCHASTIC), mask=used)
        tl.store(new_c + rows, stored(new_cell, bits & 0xFFFF, TYPE, STOCHASTIC), mask=used)

    _W_IH, _W_HH, _B, HEAD = sizes_of(LAYERS - 1, FEATURES, UNITS, FOLDED)
    return tl.sum(column(packed + HEAD, UNITS)[:, None] * x, 0) + tl.load(packed + HEAD + UNITS)


@triton.jit
def step_of_block(
    packed,
    other,
    g,  # (BLOCK,) float32
    inside,  # (BLOCK,) whether there is such a coordinate
    at,  # (BLOCK,) its place in rows of n
    n,
    m,  # (N,)
    v,  # (N,)
    h,  # (LAYERS, HIDDEN, N)
    c,  # (LAYERS, HIDDEN, N)
    new_m,  # (N,) out, and so on: may be the old ones
    new_v,
    new_h,
    new_c,
    key,  # of random bits, where rounding is STOCHASTIC
    alpha,
    beta1,
    beta2,
    one_minus_beta1,
    one_minus_beta2,
    eps,
    LAYERS: tl.constexpr,
    HIDDEN: tl.constexpr,
    FEATURES: tl.constexpr,
    UNITS: tl.constexpr,
    FOLDED: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """Writes a block's new state and returns its update, (BLOCK,)."""
    old_m = tl.load(m + at, mask=inside, other=0.0)
    old_v = tl.load(v + at, mask=inside, other=1.0)
    fresh_m, fresh_v, scale = features_of(
        g, old_m, old_v, beta1, beta2, one_minus_beta1, one_minus_beta2, eps
    )
    if LAYERS * HIDDEN > FEW_UNITS:
        wait_for_loads()
    tl.store(new_m + at, fresh_m, mask=inside)
    tl.store(new_v + at, fresh_v, mask=inside)
    m_feature = fresh_m / one_minus_beta1 * scale
    g_feature = g * scale
    if LAYERS * HIDDEN <= FEW_UNITS:
        top = _small_layers(
            packed, inside, at, n, h, c, new_h, new_c, m_feature, g_feature, key,
            LAYERS, HIDDEN, FEATURES, UNITS, PTX, APPROXIMATE, STOCHASTIC,
        )  # fmt: skip
    else:
        top = _layers(
            packed, other, inside, at, n, h, c, new_h, new_c, m_feature, g_feature, key,
            LAYERS, HIDDEN, FEATURES, UNITS, FOLDED, BLOCK, PRECISION, PTX, APPROXIMATE, STOCHASTIC,
        )  # fmt: skip
    return alpha * tanh(top, PTX, APPROXIMATE)


def constants_of(settings: StepSettings) -> tuple[float, ...]:
    """Kernels' arguments alpha to eps."""
    alpha, beta1, beta2, eps = settings.constants
    return alpha, beta1, beta2, 1 - beta1, 1 - beta2, eps


def plan_of(h: Tensor) -> tuple[lstm_weights.Packing, dict[str, int]]:
    """How the weights are packed, and the constants of a kernel that depend on the network alone.

    Args:
        h: Shape (layers, hidden, ...), on the device where the weights are.
    """
    layers, hidden = h.shape[:2]
    plan = lstm_weights.packing(layers, hidden, FEATURES, 1, h.device)
    return plan, {
        "LAYERS": layers,
        "HIDDEN": hidden,
        "FEATURES": FEATURES,
        "UNITS": plan.units,
        "FOLDED": plan.folded,
    }


def precision_of(precision: str | None, h: Tensor) -> str:
    """The precision to compute a step with: of few units, whose sums take whole weights, ieee.

    Args:
        precision: The one asked for, or ``None`` for the fastest that errs as float32 does.
        h: Shape (layers, hidden, ...).
    """
    few = h.shape[0] * h.shape[1] <= FEW
    return "ieee" if few else lstm.precision_of(precision)
