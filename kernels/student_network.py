"""The student's network on blocks of coordinates, for the kernels of its step.

The formulas are in amalgam/operations/student_step.py, those of its forms in
kernels/student_forms.py. In the nominal form the first layer's bias is a tensor's own: it is not
among the packed weights, whose place for it holds zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from amalgam.kernels import lstm, lstm_weights
from amalgam.kernels.cell_codes import coded, exponents_of, inverses_of, magnitude_of, scales_of
from amalgam.kernels.configurations import FEW, FEW_OF_NOMINAL, PLAIN
from amalgam.kernels.lstm import (
    cell,
    column,
    four,
    rows_of,
    scaled_sigmoid,
    scaled_tanh,
    sigmoid,
    sizes_of,
    tanh,
)
from amalgam.kernels.rounding import random_bits, rounded_stochastically
from amalgam.kernels.student_forms import (
    corrected,
    fresh_moments,
    scale_of,
    seen,
    update_of,
)
from amalgam.operations.student_forms import NOMINAL, Form, StepSettings

OF_SIGMOID = tl.constexpr(lstm_weights.OF_SIGMOID)
OF_TANH = tl.constexpr(lstm_weights.OF_TANH)


@triton.jit
def tensor_of(first_block, count, depth, block):
    """Which tensor a block is of, int32; tensors without coordinates have none."""
    tensor = tl.zeros((), tl.int32)
    after = tensor + count
    for _ in range(depth):
        middle = (tensor + after) // 2
        before = tl.load(first_block + middle) <= block
        tensor = tl.where(before, middle, tensor)
        after = tl.where(before, after, middle)
    return tensor


@triton.jit
def first_sums(packed, features, GATE: tl.constexpr, UNITS: tl.constexpr, FEATURES: tl.constexpr):
    """What the first layer's gate takes of the features, (UNITS, BLOCK)."""
    weights = packed + GATE * FEATURES * UNITS
    sums = column(weights, UNITS)[:, None] * features[0][None, :]
    for k in tl.static_range(1, FEATURES):
        sums += column(weights + k * UNITS, UNITS)[:, None] * features[k][None, :]
    return sums


@triton.jit
def own_bias(
    bias,
    GATE: tl.constexpr,
    HIDDEN: tl.constexpr,
    UNITS: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """A tensor's own bias of a gate, (UNITS, 1); with APPROXIMATE as packed weights have it."""
    unit = tl.arange(0, UNITS)
    own = tl.load(bias + GATE * HIDDEN + unit, mask=unit < HIDDEN, other=0.0)
    if APPROXIMATE and GATE != 2:
        own *= 0.5
    return own[:, None]


@triton.jit
def begun_sums(
    packed,
    bias,
    features,
    like,  # (UNITS, BLOCK)
    GATE: tl.constexpr,
    LAYER: tl.constexpr,
    HIDDEN: tl.constexpr,
    FEATURES: tl.constexpr,
    UNITS: tl.constexpr,
    FOLDED: tl.constexpr,
    NOMINAL: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """What a gate's sums begin with, (UNITS, BLOCK)."""
    if LAYER == 0 and not FOLDED:
        sums = first_sums(packed, features, GATE, UNITS, FEATURES)
    else:
        sums = tl.zeros_like(like)
    if NOMINAL and LAYER == 0:
        sums += own_bias(bias, GATE, HIDDEN, UNITS, APPROXIMATE)
    return sums


@triton.jit
def with_inputs(
    h,  # (UNITS, BLOCK)
    features,  # FEATURES of (BLOCK,)
    LAYER: tl.constexpr,
    HIDDEN: tl.constexpr,
    FEATURES: tl.constexpr,
    UNITS: tl.constexpr,
):
    """The old h with what FOLDED weights multiply in the rows that are no unit's."""
    unit = tl.arange(0, UNITS)[:, None]
    rest = (unit == HIDDEN).to(tl.float32)
    if LAYER == 0:
        first_two = tl.where(unit == HIDDEN + 1, features[0][None, :], features[1][None, :])
        rest = tl.where((unit == HIDDEN + 1) | (unit == HIDDEN + 2), first_two, rest)
        for k in tl.static_range(2, FEATURES):
            rest = tl.where(unit == HIDDEN + 1 + k, features[k][None, :], rest)
    return tl.where(unit < HIDDEN, h, rest)


@triton.jit
def student_cell(
    packed,
    other,
    x,  # (UNITS, BLOCK) the layer below's new h; unused by the first layer
    h,  # (UNITS, BLOCK); of FOLDED weights, with its inputs
    c,  # (UNITS, BLOCK)
    features,  # FEATURES of (BLOCK,)
    bias,  # (4 HIDDEN,) the first layer's, of NOMINAL
    LAYER: tl.constexpr,
    HIDDEN: tl.constexpr,
    FEATURES: tl.constexpr,
    UNITS: tl.constexpr,
    FOLDED: tl.constexpr,
    NOMINAL: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """A layer's gates, its new c, and the tanh of that."""
    # Of the nominal form, |a| has no bound but what the state makes it.
    RESTS: tl.constexpr = NOMINAL and LAYER == 0
    i = begun_sums(
        packed, bias, features, h, 0,
        LAYER, HIDDEN, FEATURES, UNITS, FOLDED, NOMINAL, APPROXIMATE,
    )  # fmt: skip
    f = begun_sums(
        packed, bias, features, h, 1,
        LAYER, HIDDEN, FEATURES, UNITS, FOLDED, NOMINAL, APPROXIMATE,
    )  # fmt: skip
    a = begun_sums(
        packed, bias, features, h, 2,
        LAYER, HIDDEN, FEATURES, UNITS, FOLDED, NOMINAL, APPROXIMATE,
    )  # fmt: skip
    o = begun_sums(
        packed, bias, features, h, 3,
        LAYER, HIDDEN, FEATURES, UNITS, FOLDED, NOMINAL, APPROXIMATE,
    )  # fmt: skip
    return cell(
        packed, other, x, h, c, i, f, a, o,
        LAYER, FEATURES, UNITS, FOLDED, PRECISION, PTX, APPROXIMATE, RESTS,
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
def store_moments(
    to_m, to_v, m, v, at, inside, key, ROWS: tl.constexpr, STOCHASTIC: tl.constexpr
):  # fmt: skip
    """Stores moments, (BLOCK,); their random bits are of the row after cells' and parameter's."""
    TYPE: tl.constexpr = to_m.dtype.element_ty
    bits = at
    if STOCHASTIC and tl.bfloat16 == TYPE:
        bits = random_bits(key, tl.full((), ROWS + 1, tl.int32), at)
    tl.store(to_m + at, stored(m, bits >> 16, TYPE, STOCHASTIC), mask=inside)
    tl.store(to_v + at, stored(v, bits & 0xFFFF, TYPE, STOCHASTIC), mask=inside)


@triton.jit
def _plain_sum(
    packed,
    x,
    h,
    features,
    GATE: tl.constexpr,
    UNIT: tl.constexpr,
    LAYER: tl.constexpr,
    HIDDEN: tl.constexpr,
    FEATURES: tl.constexpr,
    UNITS: tl.constexpr,
):
    """A gate's sum of one unit, (BLOCK,)."""
    W_IH, W_HH, _B, _END = sizes_of(LAYER, FEATURES, UNITS, True)
    FIRST: tl.constexpr = (GATE * UNITS + UNIT) * UNITS
    row = packed + W_HH + FIRST
    total = tl.load(row + HIDDEN) + tl.load(row) * h[0]
    for k in tl.static_range(1, HIDDEN):
        total += tl.load(row + k) * h[k]
    if LAYER == 0:
        for k in tl.static_range(FEATURES):
            total += tl.load(row + HIDDEN + 1 + k) * features[k]
    else:
        for k in tl.static_range(HIDDEN):
            total += tl.load(packed + W_IH + FIRST + k) * x[k]
    return total


@triton.jit
def _numbers(packed, COUNT: tl.constexpr, PTX: tl.constexpr):
    """So many packed numbers at least, from a multiple of four on, as a tuple."""
    numbers = ()
    for k in tl.static_range((COUNT + 3) // 4):
        numbers = numbers + four(packed + 4 * k, PTX)
    return numbers


@triton.jit
def _scaled_sum(
    packed,
    bias,
    x,
    h,
    features,
    GATE: tl.constexpr,
    UNIT: tl.constexpr,
    LAYER: tl.constexpr,
    HIDDEN: tl.constexpr,
    FEATURES: tl.constexpr,
    UNITS: tl.constexpr,
    PTX: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """The same of the nominal form, of scaled weights."""
    W_IH, W_HH, _B, _END = sizes_of(LAYER, FEATURES, UNITS, True)
    FIRST: tl.constexpr = (GATE * UNITS + UNIT) * UNITS
    if LAYER == 0:
        weights = _numbers(packed + W_HH + FIRST, HIDDEN + 1 + FEATURES, PTX)
        total = tl.load(bias + GATE * HIDDEN + UNIT)
        if not APPROXIMATE:
            total *= OF_TANH if GATE == 2 else OF_SIGMOID
        elif GATE != 2:
            total *= 0.5
        for k in tl.static_range(FEATURES):
            total += weights[HIDDEN + 1 + k] * features[k]
    else:
        weights = _numbers(packed + W_HH + FIRST, HIDDEN + 1, PTX)
        total = weights[HIDDEN]
        to_x = _numbers(packed + W_IH + FIRST, HIDDEN, PTX)
        for k in tl.static_range(HIDDEN):
            total += to_x[k] * x[k]
    for k in tl.static_range(HIDDEN):
        total += weights[k] * h[k]
    return total


@triton.jit
def _small_cell(
    packed,
    bias,
    x,
    h,
    c,  # (BLOCK,)
    features,
    UNIT: tl.constexpr,
    LAYER: tl.constexpr,
    HIDDEN: tl.constexpr,
    FEATURES: tl.constexpr,
    UNITS: tl.constexpr,
    NOMINAL: tl.constexpr,
    PTX: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """One unit's new h and c, (BLOCK,)."""
    if NOMINAL:
        i = _scaled_sum(
            packed, bias, x, h, features, 0, UNIT,
            LAYER, HIDDEN, FEATURES, UNITS, PTX, APPROXIMATE,
        )  # fmt: skip
        f = _scaled_sum(
            packed, bias, x, h, features, 1, UNIT,
            LAYER, HIDDEN, FEATURES, UNITS, PTX, APPROXIMATE,
        )  # fmt: skip
        a = _scaled_sum(
            packed, bias, x, h, features, 2, UNIT,
            LAYER, HIDDEN, FEATURES, UNITS, PTX, APPROXIMATE,
        )  # fmt: skip
        o = _scaled_sum(
            packed, bias, x, h, features, 3, UNIT,
            LAYER, HIDDEN, FEATURES, UNITS, PTX, APPROXIMATE,
        )  # fmt: skip
        entering = scaled_sigmoid(i, PTX, APPROXIMATE) * scaled_tanh(a, PTX, APPROXIMATE)
        cell = tl.fma(scaled_sigmoid(f, PTX, APPROXIMATE), c, entering)
        squashed = scaled_tanh(cell if APPROXIMATE else cell * OF_TANH, PTX, APPROXIMATE)
        return scaled_sigmoid(o, PTX, APPROXIMATE) * squashed, cell
    else:
        i = _plain_sum(packed, x, h, features, 0, UNIT, LAYER, HIDDEN, FEATURES, UNITS)
        f = _plain_sum(packed, x, h, features, 1, UNIT, LAYER, HIDDEN, FEATURES, UNITS)
        a = _plain_sum(packed, x, h, features, 2, UNIT, LAYER, HIDDEN, FEATURES, UNITS)
        o = _plain_sum(packed, x, h, features, 3, UNIT, LAYER, HIDDEN, FEATURES, UNITS)
        entering = sigmoid(i, PTX, APPROXIMATE) * tanh(a, PTX, APPROXIMATE)
        cell = tl.fma(sigmoid(f, PTX, APPROXIMATE), c, entering)
        return sigmoid(o, PTX, APPROXIMATE) * tanh(cell, PTX, APPROXIMATE), cell


@triton.jit
def _store_codes(
    new_h,
    new_c,
    h,  # HIDDEN of (BLOCK,)
    c,
    inside,
    at,
    n,
    key,
    LAYER: tl.constexpr,
    HIDDEN: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """Stores a layer's h and c as codes."""
    largest_h = magnitude_of(h[0])
    largest_c = magnitude_of(c[0])
    for unit in tl.static_range(1, HIDDEN):
        largest_h = tl.maximum(largest_h, magnitude_of(h[unit]))
        largest_c = tl.maximum(largest_c, magnitude_of(c[unit]))
    inverse_h = inverses_of(largest_h)
    inverse_c = inverses_of(largest_c)
    for unit in tl.static_range(HIDDEN):
        here = at + tl.full((), LAYER * (HIDDEN + 1) + unit, at.dtype) * n
        bits = at
        if STOCHASTIC:
            bits = random_bits(key, tl.full((), LAYER * HIDDEN + unit, tl.int32), at)
        tl.store(new_h + here, coded(h[unit], inverse_h, bits >> 16, STOCHASTIC), mask=inside)
        tl.store(new_c + here, coded(c[unit], inverse_c, bits & 0xFFFF, STOCHASTIC), mask=inside)
    scale_at = at + tl.full((), LAYER * (HIDDEN + 1) + HIDDEN, at.dtype) * n
    tl.store(new_h + scale_at, exponents_of(largest_h), mask=inside)
    tl.store(new_c + scale_at, exponents_of(largest_c), mask=inside)


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
    features,
    bias,
    key,
    LAYERS: tl.constexpr,
    HIDDEN: tl.constexpr,
    FEATURES: tl.constexpr,
    UNITS: tl.constexpr,
    NOMINAL: tl.constexpr,
    PTX: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """The layers of few units, without tensor cores; returns the head's outputs, of (BLOCK,)."""
    TYPE: tl.constexpr = new_h.dtype.element_ty
    CODES: tl.constexpr = tl.int8 == TYPE
    ROWS: tl.constexpr = HIDDEN + 1 if CODES else HIDDEN
    x = features  # unused by the first layer
    for layer in tl.static_range(LAYERS):
        scale_at = at + tl.full((), layer * ROWS + HIDDEN, at.dtype) * n
        if CODES:
            scale_h = scales_of(tl.load(h + scale_at, mask=inside, other=0))
            scale_c = scales_of(tl.load(c + scale_at, mask=inside, other=0))
        old_h = ()
        old_c = ()
        # All loads come before the first store, since none may move ahead of it.
        for unit in tl.static_range(HIDDEN):
            here = at + tl.full((), layer * ROWS + unit, at.dtype) * n
            unit_h = tl.load(h + here, mask=inside, other=0.0).to(tl.float32)
            unit_c = tl.load(c + here, mask=inside, other=0.0).to(tl.float32)
            if CODES:
                unit_h *= scale_h
                unit_c *= scale_c
            old_h = old_h + (unit_h,)
            old_c = old_c + (unit_c,)
        outputs = ()
        cells = ()
        for unit in tl.static_range(HIDDEN):
            here = at + tl.full((), layer * ROWS + unit, at.dtype) * n
            output, cell = _small_cell(
                packed, bias, x, old_h, old_c[unit], features, unit,
                layer, HIDDEN, FEATURES, UNITS, NOMINAL, PTX, APPROXIMATE,
            )  # fmt: skip
            outputs = outputs + (output,)
            if CODES:
                cells = cells + (cell,)
            else:
                bits = at
                if STOCHASTIC:
                    bits = random_bits(key, tl.full((), layer * HIDDEN + unit, tl.int32), at)
                tl.store(new_h + here, stored(output, bits >> 16, TYPE, STOCHASTIC), mask=inside)
                tl.store(new_c + here, stored(cell, bits & 0xFFFF, TYPE, STOCHASTIC), mask=inside)
        if CODES:
            _store_codes(
                new_h, new_c, outputs, cells, inside, at, n, key,
                layer, HIDDEN, STOCHASTIC,
            )  # fmt: skip
        x = outputs
    _W_IH, _W_HH, _B, HEAD = sizes_of(LAYERS - 1, FEATURES, UNITS, True)
    OUTPUTS: tl.constexpr = 2 if NOMINAL else 1
    o = ()
    for output in tl.static_range(OUTPUTS):
        row = HEAD + output * UNITS
        top = tl.load(packed + HEAD + OUTPUTS * UNITS + output) + tl.load(packed + row) * x[0]
        for unit in tl.static_range(1, HIDDEN):
            top += tl.load(packed + row + unit) * x[unit]
        o = o + (top,)
    return o


@triton.jit
def head_columns(packed, HEAD: tl.constexpr, UNITS: tl.constexpr, OUTPUTS: tl.constexpr):
    """The head's weights, OUTPUTS of (UNITS,)."""
    columns = ()
    for output in tl.static_range(OUTPUTS):
        columns = columns + (column(packed + HEAD + output * UNITS, UNITS),)
    return columns


@triton.jit
def head_biases(packed, HEAD: tl.constexpr, UNITS: tl.constexpr, OUTPUTS: tl.constexpr):
    """The head's biases, OUTPUTS of ()."""
    biases = ()
    for output in tl.static_range(OUTPUTS):
        biases = biases + (tl.load(packed + HEAD + OUTPUTS * UNITS + output),)
    return biases


@triton.jit
def head_sums(columns, x, OUTPUTS: tl.constexpr):
    """What the head's weights make of x (UNITS, BLOCK): OUTPUTS of (BLOCK,)."""
    sums = ()
    for output in tl.static_range(OUTPUTS):
        sums = sums + (tl.sum(columns[output][:, None] * x, 0),)
    return sums


@triton.jit
def with_biases(sums, biases, OUTPUTS: tl.constexpr):
    """The head's outputs, OUTPUTS of (BLOCK,)."""
    o = ()
    for output in tl.static_range(OUTPUTS):
        o = o + (sums[output] + biases[output],)
    return o


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
    features,
    bias,
    key,
    LAYERS: tl.constexpr,
    HIDDEN: tl.constexpr,
    FEATURES: tl.constexpr,
    UNITS: tl.constexpr,
    FOLDED: tl.constexpr,
    NOMINAL: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """Writes the new h and c and returns the head's outputs, of (BLOCK,)."""
    TYPE: tl.constexpr = new_h.dtype.element_ty
    CODES: tl.constexpr = tl.int8 == TYPE
    ROWS: tl.constexpr = HIDDEN + 1 if CODES else HIDDEN
    unit = tl.arange(0, UNITS)
    used = (unit < HIDDEN)[:, None] & inside[None, :]
    x = tl.zeros((UNITS, BLOCK), tl.float32)
    for layer in tl.static_range(LAYERS):
        rows = rows_of(layer, ROWS, UNITS, at, n)
        scale_at = at + tl.full((), layer * ROWS + HIDDEN, at.dtype) * n
        old_h = tl.load(h + rows, mask=used, other=0.0).to(tl.float32)
        old_c = tl.load(c + rows, mask=used, other=0.0).to(tl.float32)
        if CODES:
            old_h *= scales_of(tl.load(h + scale_at, mask=inside, other=0))[None, :]
            old_c *= scales_of(tl.load(c + scale_at, mask=inside, other=0))[None, :]
        if FOLDED:
            old_h = with_inputs(old_h, features, layer, HIDDEN, FEATURES, UNITS)
        _i, _f, _a, o, new_cell, squashed = student_cell(
            packed, other, x, old_h, old_c, features, bias,
            layer, HIDDEN, FEATURES, UNITS, FOLDED, NOMINAL, PRECISION, PTX, APPROXIMATE,
        )  # fmt: skip
        x = o * squashed
        bits = rows
        if STOCHASTIC:
            bits = random_bits(key, (layer * HIDDEN + unit)[:, None], at[None, :])
        wait_for_loads()
        if CODES:
            largest_h = tl.max(tl.where(used, magnitude_of(x), 0), 0)
            largest_c = tl.max(tl.where(used, magnitude_of(new_cell), 0), 0)
            codes_h = coded(x, inverses_of(largest_h)[None, :], bits >> 16, STOCHASTIC)
            codes_c = coded(new_cell, inverses_of(largest_c)[None, :], bits & 0xFFFF, STOCHASTIC)
            tl.store(new_h + rows, codes_h, mask=used)
            tl.store(new_c + rows, codes_c, mask=used)
            tl.store(new_h + scale_at, exponents_of(largest_h), mask=inside)
            tl.store(new_c + scale_at, exponents_of(largest_c), mask=inside)
        else:
            tl.store(new_h + rows, stored(x, bits >> 16, TYPE, STOCHASTIC), mask=used)
            tl.store(new_c + rows, stored(new_cell, bits & 0xFFFF, TYPE, STOCHASTIC), mask=used)

    _W_IH, _W_HH, _B, HEAD = sizes_of(LAYERS - 1, FEATURES, UNITS, FOLDED)
    OUTPUTS: tl.constexpr = 2 if NOMINAL else 1
    sums = head_sums(head_columns(packed, HEAD, UNITS, OUTPUTS), x, OUTPUTS)
    return with_biases(sums, head_biases(packed, HEAD, UNITS, OUTPUTS), OUTPUTS)


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
    h,  # (LAYERS, HIDDEN, N); as codes, int8, (LAYERS, HIDDEN + 1, N)
    c,  # likewise
    new_m,  # (N,) out, and so on: may be the old ones
    new_v,
    new_h,
    new_c,
    key,  # of random bits, where rounding is STOCHASTIC
    bias,  # of NOMINAL: (4 HIDDEN,) this tensor's, of the first layer; and its corrections
    correction1,
    correction2,
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
    NOMINAL: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """Writes a block's new state and returns its update and its new v, (BLOCK,) each."""
    old_m = tl.load(m + at, mask=inside, other=0.0).to(tl.float32)
    old_v = tl.load(v + at, mask=inside, other=1.0).to(tl.float32)
    fresh_m, fresh_v = fresh_moments(
        g, old_m, old_v, beta1, beta2, one_minus_beta1, one_minus_beta2
    )
    scale, _root = scale_of(fresh_v, one_minus_beta2, eps, correction2, NOMINAL, PTX)
    if PRECISION != "plain":
        wait_for_loads()
    store_moments(new_m, new_v, fresh_m, fresh_v, at, inside, key, LAYERS * HIDDEN, STOCHASTIC)
    a = corrected(fresh_m, one_minus_beta1, correction1, NOMINAL) * scale
    b = g * scale
    features = seen(a, b, NOMINAL, PTX, APPROXIMATE)
    if PRECISION == "plain":
        o = _small_layers(
            packed, inside, at, n, h, c, new_h, new_c, features, bias, key,
            LAYERS, HIDDEN, FEATURES, UNITS, NOMINAL, PTX, APPROXIMATE, STOCHASTIC,
        )  # fmt: skip
    else:
        o = _layers(
            packed, other, inside, at, n, h, c, new_h, new_c, features, bias, key,
            LAYERS, HIDDEN, FEATURES, UNITS, FOLDED, NOMINAL,
            BLOCK, PRECISION, PTX, APPROXIMATE, STOCHASTIC,
        )  # fmt: skip
    return update_of(o, a, b, alpha, NOMINAL, PTX, APPROXIMATE), fresh_v


def constants_of(settings: StepSettings) -> tuple[float, ...]:
    """Kernels' arguments alpha to eps."""
    alpha, beta1, beta2, eps = settings.constants
    return alpha, beta1, beta2, 1 - beta1, 1 - beta2, eps


def plan_of(h: Tensor, form: Form, precision: str) -> tuple[lstm_weights.Packing, dict[str, int]]:
    """How the weights are packed, and the constants of a kernel that depend on the student alone.

    Args:
        h: Shape (layers, hidden, ...), on the device where the weights are.
        form: The form of its step.
        precision: What it is computed with.
    """
    layers, hidden = h.shape[:2]
    nominal = form is NOMINAL
    plan = lstm_weights.packing(
        *(layers, hidden, form.features, form.outputs, h.device),
        own_bias=nominal,
        always_folded=precision == PLAIN,
    )
    return plan, {
        "LAYERS": layers,
        "HIDDEN": hidden,
        "FEATURES": form.features,
        "UNITS": plan.units,
        "FOLDED": plan.folded,
        "NOMINAL": nominal,
    }


def packed_for_step(
    weights: Sequence[Tensor],
    form: Form,
    plan: lstm_weights.Packing,
    precision: str,
    approximate: bool,
) -> tuple[Tensor, ...]:
    """The packed weights, and their other form, that step_of_block takes."""
    scaled = form is NOMINAL and precision == PLAIN
    return lstm_weights.packed(to_pack(weights, form), plan, precision, approximate, scaled)


def to_pack(weights: Sequence[Tensor], form: Form) -> Sequence[Tensor]:
    """The weights that are packed: all but the bias that is a tensor's own.

    It is another in every step, and the others are packed once.
    """
    return [*weights[:2], *weights[3:]] if form is NOMINAL else weights


def precision_of(precision: str | None, h: Tensor, form: Form) -> str:
    """The precision to compute a step with: of few units, whose sums take whole weights, PLAIN.

    Args:
        precision: The one asked for, or ``None`` for the fastest that errs as float32 does.
        h: Shape (layers, hidden, ...).
        form: The form of its step.
    """
    precise = precision in (None, "ieee", "3xtf32")
    most = FEW_OF_NOMINAL if form is NOMINAL and precise else FEW
    return PLAIN if h.shape[0] * h.shape[1] <= most else lstm.precision_of(precision)
