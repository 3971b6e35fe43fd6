"""One step of the RNNProp student; amalgam/operations/student_step.py has the formulas."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from amalgam.backends import table
from amalgam.kernels import lstm
from amalgam.kernels.configurations import FEW, configuration
from amalgam.kernels.launch import on_device_of, on_nvidia, processors, wide
from amalgam.kernels.lstm import (
    add,
    cell,
    column,
    exp,
    recurrent_gradients,
    rows_of,
    sigmoid,
    sizes_of,
    tanh,
)
from amalgam.kernels.rounding import key_of, random_bits, rounded_stochastically
from amalgam.operations.student_step_in_place import InPlaceStep

FEATURES = 2
FEW_UNITS = tl.constexpr(FEW)
COLUMNS = tl.constexpr(table.COLUMNS)
PROGRAMS_PER_PROCESSOR = 2


@triton.jit
def _features(g, m, v, beta1, beta2, one_minus_beta1, one_minus_beta2, eps):
    """The new moments, and the two features of them."""
    # Which product is not rounded is said: a compiler takes another one for other dtypes' kernels.
    m = tl.fma(beta1, m, one_minus_beta1 * g)
    v = tl.fma(beta2, v, one_minus_beta2 * (g * g))
    scale = 1.0 / tl.sqrt_rn(v / one_minus_beta2 + eps)
    return m, v, scale


@triton.jit
def _first_sums(
    packed, a, b, GATE: tl.constexpr, UNITS: tl.constexpr, FEATURES: tl.constexpr
):  # a, b (BLOCK,)
    """What the first layer's gate takes of the features, (UNITS, BLOCK)."""
    weights = packed + GATE * FEATURES * UNITS
    of_a = column(weights, UNITS)[:, None] * a[None, :]
    return of_a + column(weights + UNITS, UNITS)[:, None] * b[None, :]


@triton.jit
def _with_inputs(
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
def _cell(
    packed,
    other,
    x,  # (UNITS, BLOCK) the layer below's new h; not looked at by the first layer
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
        i = _first_sums(packed, m_feature, g_feature, 0, UNITS, FEATURES)
        f = _first_sums(packed, m_feature, g_feature, 1, UNITS, FEATURES)
        a = _first_sums(packed, m_feature, g_feature, 2, UNITS, FEATURES)
        o = _first_sums(packed, m_feature, g_feature, 3, UNITS, FEATURES)
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
def _wait_for_loads():
    """No thread of this program goes on before all have loaded what the next stores may overwrite.

    Matrix products want the same numbers in several warps, each of which may load them for itself.
    """
    tl.debug_barrier()


@triton.jit
def _stored(value, bits, TYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
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
    """Of few units, without tensor cores: a thread has whole coordinates. Returns the head's sum.

    Padded to the 16 units that tensor cores take, four or eight would cost several times as much.
    """
    TYPE: tl.constexpr = new_h.dtype.element_ty
    x = (m_feature,)  # not looked at by the first layer
    for layer in tl.static_range(LAYERS):
        old_h = ()
        old_c = ()
        # All before the first store, behind which no load may move forward.
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
            tl.store(new_h + here, _stored(output, bits >> 16, TYPE, STOCHASTIC), mask=inside)
            tl.store(new_c + here, _stored(cell, bits & 0xFFFF, TYPE, STOCHASTIC), mask=inside)
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
            old_h = _with_inputs(old_h, m_feature, g_feature, layer, HIDDEN, UNITS)
        _i, _f, _a, o, new_cell, squashed = _cell(
            packed, other, x, old_h, old_c, m_feature, g_feature,
            layer, FEATURES, UNITS, FOLDED, PRECISION, PTX, APPROXIMATE,
        )  # fmt: skip
        x = o * squashed
        bits = rows
        if STOCHASTIC:
            bits = random_bits(key, (layer * HIDDEN + unit)[:, None], at[None, :])
        _wait_for_loads()
        tl.store(new_h + rows, _stored(x, bits >> 16, TYPE, STOCHASTIC), mask=used)
        tl.store(new_c + rows, _stored(new_cell, bits & 0xFFFF, TYPE, STOCHASTIC), mask=used)

    _W_IH, _W_HH, _B, HEAD = sizes_of(LAYERS - 1, FEATURES, UNITS, FOLDED)
    return tl.sum(column(packed + HEAD, UNITS)[:, None] * x, 0) + tl.load(packed + HEAD + UNITS)


@triton.jit
def _step(
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
    fresh_m, fresh_v, scale = _features(
        g, old_m, old_v, beta1, beta2, one_minus_beta1, one_minus_beta2, eps
    )
    if LAYERS * HIDDEN > FEW_UNITS:
        _wait_for_loads()
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


@triton.jit
def forward(
    packed,
    other,
    grad,  # (N,)
    m,  # (N,)
    v,  # (N,)
    h,  # (LAYERS, HIDDEN, N)
    c,  # (LAYERS, HIDDEN, N)
    update,  # (N,) out
    new_m,  # (N,) out
    new_v,  # (N,) out
    new_h,  # (LAYERS, HIDDEN, N) out
    new_c,  # (LAYERS, HIDDEN, N) out
    n,
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
    WIDE: tl.constexpr,
):
    """The functional step: program p takes the p-th block of coordinates."""
    at = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    g = tl.load(grad + at, mask=inside, other=0.0)
    result = _step(
        packed, other, g, inside, at, n, m, v, h, c, new_m, new_v, new_h, new_c, 0,
        alpha, beta1, beta2, one_minus_beta1, one_minus_beta2, eps,
        LAYERS, HIDDEN, FEATURES, UNITS, FOLDED, BLOCK, PRECISION, PTX, APPROXIMATE, False,
    )  # fmt: skip
    tl.store(update + at, result, mask=inside)


@triton.jit(
    do_not_specialize=["count", "depth", "warmup_steps"],
    do_not_specialize_on_alignment=["table", "first_block", "control"],
)
def in_place(
    packed,
    other,
    table,  # (count, COLUMNS) int64, as amalgam/backends/table.py has it
    first_block,  # (count,) int64: the first block of each tensor
    count,
    depth,  # ceil(log2(count)): steps of the search
    control,  # (4,) float64: keep, lr, the learning rate of warm-up, and whether to skip the step
    warmup_steps,
    keep,  # 1 - lr weight_decay, and lr, where there is no CONTROL
    lr,
    alpha,
    beta1,
    beta2,
    one_minus_beta1,
    one_minus_beta2,
    eps,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    CELLS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    CONTROL: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    LAYERS: tl.constexpr,
    HIDDEN: tl.constexpr,
    FEATURES: tl.constexpr,
    UNITS: tl.constexpr,
    FOLDED: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """One launch for all tensors: program p finds the tensor that its block belongs to."""
    if CONTROL:
        keep = tl.load(control).to(tl.float32)
        lr = tl.load(control + 1).to(tl.float32)
        if tl.load(control + 3) != 0.0:
            return
    block = tl.program_id(0).to(tl.int64)
    tensor = tl.zeros((), tl.int32)
    after = tensor + count
    for _ in range(depth):
        middle = (tensor + after) // 2
        before = tl.load(first_block + middle) <= block
        tensor = tl.where(before, middle, tensor)
        after = tl.where(before, after, middle)
    entry = table + tensor.to(tl.int64) * COLUMNS
    param = tl.load(entry).to(tl.pointer_type(PARAM))
    grad = tl.load(entry + 1).to(tl.pointer_type(GRAD))
    m = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
    v = tl.load(entry + 3).to(tl.pointer_type(tl.float32))
    h = tl.load(entry + 4).to(tl.pointer_type(CELLS))
    c = tl.load(entry + 5).to(tl.pointer_type(CELLS))
    n = tl.load(entry + 6)
    if ALIGNED:  # as Triton knows of arguments, and not of what it loads
        param = tl.multiple_of(param, 16)
        grad = tl.multiple_of(grad, 16)
        m = tl.multiple_of(m, 16)
        v = tl.multiple_of(v, 16)
        h = tl.multiple_of(h, 16)
        c = tl.multiple_of(c, 16)
        n = tl.multiple_of(n, 16)

    first = (block - tl.load(first_block + tensor)) * BLOCK
    if not WIDE:
        first = first.to(tl.int32)
        n = n.to(tl.int32)
    at = first + tl.arange(0, BLOCK)
    inside = at < n
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    old = tl.load(param + at, mask=inside, other=0.0).to(tl.float32)
    key = 0
    bits = at
    if CONTROL:
        step = tl.load(tl.load(entry + 7).to(tl.pointer_type(tl.float32)))
        if STOCHASTIC:
            key = key_of(tl.load(entry + 8), step)
            bits = random_bits(key, tl.full((), LAYERS * HIDDEN, tl.int32), at) >> 16
        if step < warmup_steps:
            old_m = tl.load(m + at, mask=inside, other=0.0)
            old_v = tl.load(v + at, mask=inside, other=1.0)
            fresh_m, fresh_v, _scale = _features(
                g, old_m, old_v, beta1, beta2, one_minus_beta1, one_minus_beta2, eps
            )
            tl.store(m + at, fresh_m, mask=inside)
            tl.store(v + at, fresh_v, mask=inside)
            moved = tl.fma(keep, old, -tl.load(control + 2).to(tl.float32) * g)
            tl.store(param + at, _stored(moved, bits, PARAM, STOCHASTIC), mask=inside)
            return
    update = _step(
        packed, other, g, inside, at, n, m, v, h, c, m, v, h, c, key,
        alpha, beta1, beta2, one_minus_beta1, one_minus_beta2, eps,
        LAYERS, HIDDEN, FEATURES, UNITS, FOLDED, BLOCK, PRECISION, PTX, APPROXIMATE, STOCHASTIC,
    )  # fmt: skip
    moved = tl.fma(keep, old, -lr * update)
    tl.store(param + at, _stored(moved, bits, PARAM, STOCHASTIC), mask=inside)


@triton.jit
def _gate_gradients(
    packed,
    other,
    partials,  # this program's sums, as the packed weights
    d_gate,  # (UNITS, BLOCK) of the gate's sum
    x,  # (UNITS, BLOCK)
    h,  # (UNITS, BLOCK)
    m_feature,  # (BLOCK,)
    g_feature,  # (BLOCK,)
    d_x,  # (UNITS, BLOCK) gradients in x so far
    d_h,  # (UNITS, BLOCK) and in h
    d_m_feature,  # (BLOCK,) and in the features
    d_g_feature,  # (BLOCK,)
    later,
    gate,
    LAYER: tl.constexpr,
    FEATURES: tl.constexpr,
    UNITS: tl.constexpr,
    FOLDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One gate's part of all gradients; the weights' are added to the program's sums."""
    d_x, d_h = recurrent_gradients(
        packed, other, partials, d_gate, x, h, d_x, d_h, later, gate,
        LAYER, FEATURES, UNITS, FOLDED, PRECISION,
    )  # fmt: skip
    if LAYER == 0 and not FOLDED:
        unit = tl.arange(0, UNITS)
        w_m = gate * FEATURES * UNITS
        w_g = w_m + UNITS
        add(partials + w_m + unit, tl.sum(d_gate * m_feature[None, :], 1), later)
        add(partials + w_g + unit, tl.sum(d_gate * g_feature[None, :], 1), later)
        d_m_feature += tl.sum(column(packed + w_m, UNITS)[:, None] * d_gate, 0)
        d_g_feature += tl.sum(column(packed + w_g, UNITS)[:, None] * d_gate, 0)
    return d_x, d_h, d_m_feature, d_g_feature


@triton.jit(do_not_specialize=["blocks", "size"])
def backward(
    packed,
    other,
    grad,  # (N,)
    m,  # (N,)
    v,  # (N,)
    h,  # (LAYERS, HIDDEN, N)
    c,  # (LAYERS, HIDDEN, N)
    d_update,  # (N,)
    d_new_m,  # (N,)
    d_new_v,  # (N,)
    d_new_h,  # (LAYERS, HIDDEN, N)
    d_new_c,  # (LAYERS, HIDDEN, N)
    d_grad,  # (N,) out
    d_m,  # (N,) out
    d_v,  # (N,) out
    d_h,  # (LAYERS, HIDDEN, N) out
    d_c,  # (LAYERS, HIDDEN, N) out
    partials,  # (P, size) float64 out, P programs' gradients in the packed weights
    outputs,  # (P, LAYERS, UNITS, BLOCK) scratch: the layers' new h
    n,
    blocks,
    size,
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
    WIDE: tl.constexpr,
):
    """Program p takes blocks p, p + P, ...: the step again, then its gradients backwards."""
    program = tl.program_id(0)
    partials += program.to(tl.int64) * size
    unit = tl.arange(0, UNITS)
    here = unit[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    outputs += program.to(tl.int64) * LAYERS * UNITS * BLOCK
    _W_IH, _W_HH, _B, HEAD = sizes_of(LAYERS - 1, FEATURES, UNITS, FOLDED)
    head = column(packed + HEAD, UNITS)
    head_bias = tl.load(packed + HEAD + UNITS)
    programs = tl.num_programs(0)
    for turn in range(tl.cdiv(blocks - program, programs)):
        later = turn > 0
        block = program.to(tl.int64 if WIDE else tl.int32) + turn * programs
        at = block * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        used = (unit < HIDDEN)[:, None] & inside[None, :]
        g = tl.load(grad + at, mask=inside, other=1.0)
        old_m = tl.load(m + at, mask=inside, other=0.0)
        old_v = tl.load(v + at, mask=inside, other=1.0)
        fresh_m, _fresh_v, scale = _features(
            g, old_m, old_v, beta1, beta2, one_minus_beta1, one_minus_beta2, eps
        )
        m_hat = fresh_m / one_minus_beta1
        m_feature = m_hat * scale
        g_feature = g * scale

        # What the upper layers see; the last layer's own comes with its gates below.
        x = tl.zeros((UNITS, BLOCK), tl.float32)
        for layer in tl.static_range(LAYERS - 1):
            rows = rows_of(layer, HIDDEN, UNITS, at, n)
            old_h = tl.load(h + rows, mask=used, other=0.0)
            old_c = tl.load(c + rows, mask=used, other=0.0)
            if FOLDED:
                old_h = _with_inputs(old_h, m_feature, g_feature, layer, HIDDEN, UNITS)
            _i, _f, _a, o, _c, squashed = _cell(
                packed, other, x, old_h, old_c, m_feature, g_feature,
                layer, FEATURES, UNITS, FOLDED, PRECISION, PTX, False,
            )  # fmt: skip
            x = o * squashed
            tl.store(outputs + layer * UNITS * BLOCK + here, x)
        # Other threads of this program read what these wrote.
        tl.debug_barrier()

        d_m_feature = tl.zeros((BLOCK,), tl.float32)
        d_g_feature = tl.zeros((BLOCK,), tl.float32)
        d_x = tl.zeros((UNITS, BLOCK), tl.float32)
        for layer in tl.static_range(LAYERS - 1, -1, -1):
            if layer > 0:
                x = tl.load(outputs + (layer - 1) * UNITS * BLOCK + here)
            rows = rows_of(layer, HIDDEN, UNITS, at, n)
            old_h = tl.load(h + rows, mask=used, other=0.0)
            old_c = tl.load(c + rows, mask=used, other=0.0)
            if FOLDED:
                old_h = _with_inputs(old_h, m_feature, g_feature, layer, HIDDEN, UNITS)
            i, f, a, o, _c, squashed = _cell(
                packed, other, x, old_h, old_c, m_feature, g_feature,
                layer, FEATURES, UNITS, FOLDED, PRECISION, PTX, False,
            )  # fmt: skip
            if layer == LAYERS - 1:
                top_h = o * squashed
                top = tl.sum(head[:, None] * top_h, 0) + head_bias
                # tanh's slope as 4 t / (1 + t)^2: 1 - tanh^2 would cancel.
                t = exp(-2.0 * tl.abs(top), PTX)
                d_top = tl.load(d_update + at, mask=inside, other=0.0) * alpha
                d_top *= 4.0 * t / ((1.0 + t) * (1.0 + t))
                add(partials + HEAD + unit, tl.sum(top_h * d_top[None, :], 1), later)
                add(partials + HEAD + UNITS, tl.sum(d_top, 0), later)
                d_x = head[:, None] * d_top[None, :]

            d_out = d_x + tl.load(d_new_h + rows, mask=used, other=0.0)
            d_cell = tl.load(d_new_c + rows, mask=used, other=0.0)
            d_cell += d_out * o * (1.0 - squashed * squashed)
            tl.store(d_c + rows, d_cell * f, mask=used)
            d_x = tl.zeros((UNITS, BLOCK), tl.float32)
            d_old_h = tl.zeros((UNITS, BLOCK), tl.float32)
            d_i = d_cell * a * i * (1.0 - i)
            d_f = d_cell * old_c * f * (1.0 - f)
            d_a = d_cell * i * (1.0 - a * a)
            d_o = d_out * squashed * o * (1.0 - o)
            for gate in tl.range(4, num_stages=1):
                d_gate = tl.where(gate == 0, d_i, tl.where(gate == 1, d_f, d_a))
                d_gate = tl.where(gate == 3, d_o, d_gate)
                d_x, d_old_h, d_m_feature, d_g_feature = _gate_gradients(
                    packed, other, partials, d_gate, x, old_h, m_feature, g_feature,
                    d_x, d_old_h, d_m_feature, d_g_feature, later, gate,
                    layer, FEATURES, UNITS, FOLDED, PRECISION,
                )  # fmt: skip
            tl.store(d_h + rows, d_old_h, mask=used)
            if FOLDED and layer == 0:
                of_m, of_g = (unit == HIDDEN + 1)[:, None], (unit == HIDDEN + 2)[:, None]
                d_m_feature = tl.sum(tl.where(of_m, d_old_h, 0.0), 0)
                d_g_feature = tl.sum(tl.where(of_g, d_old_h, 0.0), 0)
        # The next block's layers overwrite what these read.
        tl.debug_barrier()

        d_scale = d_m_feature * m_hat + d_g_feature * g
        d_fresh_m = tl.load(d_new_m + at, mask=inside, other=0.0)
        d_fresh_m += d_m_feature * scale / one_minus_beta1
        d_fresh_v = tl.load(d_new_v + at, mask=inside, other=0.0)
        d_fresh_v -= 0.5 * d_scale * (scale * scale * scale) / one_minus_beta2
        of_moments = one_minus_beta1 * d_fresh_m + 2.0 * one_minus_beta2 * g * d_fresh_v
        tl.store(d_grad + at, d_g_feature * scale + of_moments, mask=inside)
        tl.store(d_m + at, beta1 * d_fresh_m, mask=inside)
        tl.store(d_v + at, beta2 * d_fresh_v, mask=inside)


def _constants(alpha: float, beta1: float, beta2: float, eps: float) -> tuple[float, ...]:
    return alpha, beta1, beta2, 1 - beta1, 1 - beta2, eps


def _plan(h: Tensor) -> tuple[lstm.Packing, dict[str, int]]:
    layers, hidden = h.shape[:2]
    plan = lstm.packing(layers, hidden, FEATURES, 1, h.device)
    return plan, {
        "LAYERS": layers,
        "HIDDEN": hidden,
        "FEATURES": FEATURES,
        "UNITS": plan.units,
        "FOLDED": plan.folded,
    }


def _precision_of(precision: str | None, h: Tensor) -> str:
    """Of a step; one without tensor cores wants the weights whole."""
    few = h.shape[0] * h.shape[1] <= FEW
    return "ieee" if few else lstm.precision_of(precision)


def student_step(
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    h: Tensor,
    c: Tensor,
    weights: Sequence[Tensor],
    settings: Sequence[float],
    precision: str | None,
    approximate: bool,
) -> tuple[Tensor, ...]:
    """Launch the functional step.

    Args:
        grad: Shape (N,), contiguous, float32, as all that follows.
        m: Shape (N,).
        v: Shape (N,).
        h: Shape (layers, hidden, N).
        c: Shape (layers, hidden, N).
        weights: As the operation has them.
        settings: alpha, beta1, beta2, eps.
        precision: Of the matrix products: "ieee", "3xtf32", "tf32" or "bf16"; ``None`` for the
            fastest that errs as float32 does.
        approximate: Whether tanh and sigmoid are NVIDIA's tanh.approx.

    Returns:
        The update (N,), and the new m, v, h, c.
    """
    results = tuple(torch.empty_like(tensor) for tensor in (grad, m, v, h, c))
    n = grad.numel()
    precision = _precision_of(precision, h)
    plan, shape = _plan(h)
    chosen = configuration("student_step", *h.shape[:2], precision)
    if n:
        with on_device_of(grad):
            forward[(triton.cdiv(n, chosen.block),)](
                *lstm.packed(weights, plan, precision, approximate),
                *(grad, m, v, h, c, *results, n, *_constants(*settings)),
                **shape,
                BLOCK=chosen.block,
                PRECISION=precision,
                PTX=on_nvidia(),
                APPROXIMATE=approximate,
                WIDE=wide(h),
                **chosen.options,
            )
    return results


def student_step_in_place(
    step: InPlaceStep,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    precision: str | None,
    approximate: bool,
) -> None:
    """Launch the step in place: once for all tensors that are alike in dtypes and alignment.

    Args:
        step: The step; parameters and gradients are float32, bfloat16 or float16, m and v float32,
            h and c all float32 or all bfloat16, weights contiguous.
        params: Its parameters, contiguous.
        grads: Its gradients, contiguous.
        precision: As in :func:`student_step`.
        approximate: As in :func:`student_step`.
    """
    m, h, control, steps = step.tensors.m[0], step.tensors.h[0], step.control, step.steps
    keep = 1 - step.lr * step.weight_decay
    if control is None and step.seeds:
        control = m.new_tensor((keep, step.lr, 0, 0), dtype=torch.float64)
    if control is not None and not steps:
        step = step._replace(steps=[m.new_zeros(())] * len(params))
    precision = _precision_of(precision, h)
    plan, shape = _plan(h)
    chosen = configuration("student_step_", *h.shape[:2], precision)
    with on_device_of(m):
        packed, other = lstm.packed(step.weights, plan, precision, approximate)
        for launch in table.launches(step, params, grads, chosen.block, _kind, "triton"):
            param_dtype, grad_dtype, aligned, is_wide = launch.kind
            in_place[(launch.blocks,)](
                packed,
                other,
                launch.table,
                launch.first_block,
                launch.tensors,
                (launch.tensors - 1).bit_length(),
                control,
                step.warmup_steps,
                keep,
                step.lr,
                *_constants(*step.settings),
                PARAM=_TYPES[param_dtype],
                GRAD=_TYPES[grad_dtype],
                CELLS=_TYPES[h.dtype],
                ALIGNED=aligned,
                WIDE=is_wide,
                CONTROL=control is not None,
                STOCHASTIC=bool(step.seeds),
                **shape,
                BLOCK=chosen.block,
                PRECISION=precision,
                PTX=on_nvidia(),
                APPROXIMATE=approximate,
                **chosen.options,
            )


def _kind(row: Sequence[Tensor]) -> tuple[torch.dtype, torch.dtype, bool, bool]:
    """What tensors of one launch have in common: two dtypes, alignment, and whether WIDE."""
    numbers = (*map(Tensor.data_ptr, row), row[0].numel())
    aligned = functools.reduce(operator.or_, numbers) % 16 == 0
    return row[0].dtype, row[1].dtype, aligned, wide(row[4])


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def student_step_backward(
    grads_out: Sequence[Tensor],
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    h: Tensor,
    c: Tensor,
    weights: Sequence[Tensor],
    settings: Sequence[float],
    precision: str | None,
) -> tuple[Tensor | list[Tensor], ...]:
    """Launch the backward of the functional step.

    Args:
        grads_out: Gradients in the update and in the new m, v, h, c, contiguous, float32.
        grad: As in :func:`student_step`, and so on.
        m: Shape (N,).
        v: Shape (N,).
        h: Shape (layers, hidden, N).
        c: Shape (layers, hidden, N).
        weights: As the operation has them.
        settings: alpha, beta1, beta2, eps.
        precision: As in :func:`student_step`; activations are precise.

    Returns:
        Gradients in grad, m, v, h, c, and in the weights. The weights' are summed in an order that
        depends on n and the device alone.
    """
    results = tuple(torch.empty_like(tensor) for tensor in (grad, m, v, h, c))
    n = grad.numel()
    precision = lstm.precision_of(precision)
    plan, shape = _plan(h)
    chosen = configuration("student_step_backward", *h.shape[:2], precision)
    blocks = triton.cdiv(n, chosen.block)
    programs = min(blocks, PROGRAMS_PER_PROCESSOR * processors(grad.device))
    size = plan.places.numel()
    partials = grad.new_empty((programs, size), dtype=torch.float64)
    if n:
        outputs = grad.new_empty((programs, shape["LAYERS"], plan.units, chosen.block))
        with on_device_of(grad):
            backward[(programs,)](
                *lstm.packed(weights, plan, precision),
                *(grad, m, v, h, c, *grads_out, *results, partials, outputs, n, blocks, size),
                *_constants(*settings),
                **shape,
                BLOCK=chosen.block,
                PRECISION=precision,
                PTX=on_nvidia(),
                WIDE=wide(h),
                **chosen.options,
            )
    return *results, lstm.unpack(partials.sum(0), weights, plan)
