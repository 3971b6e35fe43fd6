"""The functional step of the RNNProp student; formulas: amalgam/operations/student_step.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from amalgam.kernels import lstm, lstm_weights
from amalgam.kernels.configurations import configuration
from amalgam.kernels.launch import on_device_of, on_nvidia, processors, wide
from amalgam.kernels.lstm import (
    add,
    cell_gradients,
    column,
    exp,
    of_gate,
    recurrent_gradients,
    rows_of,
    sizes_of,
)
from amalgam.kernels.student_network import (
    constants_of,
    features_of,
    plan_of,
    precision_of,
    step_of_block,
    student_cell,
    with_inputs,
)
from amalgam.operations.student_forms import StepSettings

PROGRAMS_PER_PROCESSOR = 2


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
    result = step_of_block(
        packed, other, g, inside, at, n, m, v, h, c, new_m, new_v, new_h, new_c, 0,
        alpha, beta1, beta2, one_minus_beta1, one_minus_beta2, eps,
        LAYERS, HIDDEN, FEATURES, UNITS, FOLDED, BLOCK, PRECISION, PTX, APPROXIMATE, False,
    )  # fmt: skip
    tl.store(update + at, result, mask=inside)


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


@triton.jit
def _lower_layers(
    packed,
    other,
    outputs,  # (LAYERS, UNITS, BLOCK) out: the layers' new h
    here,  # (UNITS, BLOCK) places in one layer of it
    used,  # (UNITS, BLOCK) which rows exist
    at,  # (BLOCK,)
    n,
    h,  # (LAYERS, HIDDEN, N)
    c,  # (LAYERS, HIDDEN, N)
    m_feature,  # (BLOCK,)
    g_feature,  # (BLOCK,)
    LAYERS: tl.constexpr,
    HIDDEN: tl.constexpr,
    FEATURES: tl.constexpr,
    UNITS: tl.constexpr,
    FOLDED: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):
    """Writes what every layer but the last gives to the one above, and returns the last of these.

    The last layer's own new h comes with its gates, when gradients are computed.
    """
    x = tl.zeros((UNITS, BLOCK), tl.float32)
    for layer in tl.static_range(LAYERS - 1):
        rows = rows_of(layer, HIDDEN, UNITS, at, n)
        old_h = tl.load(h + rows, mask=used, other=0.0)
        old_c = tl.load(c + rows, mask=used, other=0.0)
        if FOLDED:
            old_h = with_inputs(old_h, m_feature, g_feature, layer, HIDDEN, UNITS)
        _i, _f, _a, o, _c, squashed = student_cell(
            packed, other, x, old_h, old_c, m_feature, g_feature,
            layer, FEATURES, UNITS, FOLDED, PRECISION, PTX, False,
        )  # fmt: skip
        x = o * squashed
        tl.store(outputs + layer * UNITS * BLOCK + here, x)
    # Other threads of this program read what these wrote.
    tl.debug_barrier()
    return x


@triton.jit
def _feature_gradients(
    g,  # (BLOCK,)
    m_hat,  # (BLOCK,) the new m over 1 - beta1
    scale,  # (BLOCK,) the features' factor
    d_m_feature,  # (BLOCK,)
    d_g_feature,  # (BLOCK,)
    d_new_m,  # (N,)
    d_new_v,  # (N,)
    d_grad,  # (N,) out
    d_m,  # (N,) out
    d_v,  # (N,) out
    at,  # (BLOCK,)
    inside,  # (BLOCK,) which of them exist
    beta1,
    beta2,
    one_minus_beta1,
    one_minus_beta2,
):
    """Writes the gradients in grad, m and v, from those in the features and in the new moments."""
    d_scale = d_m_feature * m_hat + d_g_feature * g
    d_fresh_m = tl.load(d_new_m + at, mask=inside, other=0.0)
    d_fresh_m += d_m_feature * scale / one_minus_beta1
    d_fresh_v = tl.load(d_new_v + at, mask=inside, other=0.0)
    d_fresh_v -= 0.5 * d_scale * (scale * scale * scale) / one_minus_beta2
    of_moments = one_minus_beta1 * d_fresh_m + 2.0 * one_minus_beta2 * g * d_fresh_v
    tl.store(d_grad + at, d_g_feature * scale + of_moments, mask=inside)
    tl.store(d_m + at, beta1 * d_fresh_m, mask=inside)
    tl.store(d_v + at, beta2 * d_fresh_v, mask=inside)


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
        fresh_m, _fresh_v, scale = features_of(
            g, old_m, old_v, beta1, beta2, one_minus_beta1, one_minus_beta2, eps
        )
        m_hat = fresh_m / one_minus_beta1
        m_feature = m_hat * scale
        g_feature = g * scale

        x = _lower_layers(
            packed, other, outputs, here, used, at, n, h, c, m_feature, g_feature,
            LAYERS, HIDDEN, FEATURES, UNITS, FOLDED, BLOCK, PRECISION, PTX,
        )  # fmt: skip

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
                old_h = with_inputs(old_h, m_feature, g_feature, layer, HIDDEN, UNITS)
            i, f, a, o, _c, squashed = student_cell(
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

            d_i, d_f, d_a, d_o = cell_gradients(
                d_x, d_new_h, d_new_c, d_c, rows, used, old_c, i, f, a, o, squashed
            )
            d_x = tl.zeros((UNITS, BLOCK), tl.float32)
            d_old_h = tl.zeros((UNITS, BLOCK), tl.float32)
            for gate in tl.range(4, num_stages=1):
                d_gate = of_gate(gate, d_i, d_f, d_a, d_o)
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

        _feature_gradients(
            g, m_hat, scale, d_m_feature, d_g_feature, d_new_m, d_new_v, d_grad, d_m, d_v,
            at, inside, beta1, beta2, one_minus_beta1, one_minus_beta2,
        )  # fmt: skip


def student_step(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    settings: StepSettings,
    precision: str | None,
    approximate: bool,
) -> tuple[Tensor, ...]:
    """Launch the functional step.

    Args:
        inputs: grad, m, v (N,), h and c (layers, hidden, N), all contiguous and float32.
        weights: As the operation has them.
        settings: The student's constants.
        precision: Of the matrix products: "ieee", "3xtf32", "tf32" or "bf16"; ``None`` for the
            fastest that errs as float32 does.
        approximate: Whether tanh and sigmoid are NVIDIA's tanh.approx.

    Returns:
        The update (N,), and the new m, v, h, c.
    """
    grad, _, _, h, _ = inputs
    results = tuple(map(torch.empty_like, inputs))
    n = grad.numel()
    precision = precision_of(precision, h)
    plan, shape = plan_of(h)
    chosen = configuration("student_step", h.shape[0], h.shape[1], precision)
    if n:
        with on_device_of(grad):
            forward[(triton.cdiv(n, chosen.block),)](
                *lstm_weights.packed(weights, plan, precision, approximate),
                *(*inputs, *results, n, *constants_of(settings)),
                **shape,
                BLOCK=chosen.block,
                PRECISION=precision,
                PTX=on_nvidia(),
                APPROXIMATE=approximate,
                WIDE=wide(h),
                **chosen.options,
            )
    return results


def student_step_backward(
    grads_out: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    settings: StepSettings,
    precision: str | None,
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Launch the backward of the functional step.

    Args:
        grads_out: Gradients in the update and in the new m, v, h, c, contiguous, float32.
        inputs: As in :func:`student_step`.
        weights: As the operation has them.
        settings: The student's constants.
        precision: As in :func:`student_step`; activations are precise.

    Returns:
        Gradients in grad, m, v, h, c, and in the weights. The weights' are summed in an order that
        depends on n and the device alone.
    """
    grad, _, _, h, _ = inputs
    results = tuple(map(torch.empty_like, inputs))
    n = grad.numel()
    precision = lstm.precision_of(precision)
    plan, shape = plan_of(h)
    chosen = configuration("student_step_backward", h.shape[0], h.shape[1], precision)
    blocks = triton.cdiv(n, chosen.block)
    programs = min(blocks, PROGRAMS_PER_PROCESSOR * processors(grad.device))
    size = plan.places.numel()
    partials = grad.new_empty((programs, size), dtype=torch.float64)
    if n:
        outputs = grad.new_empty((programs, shape["LAYERS"], plan.units, chosen.block))
        with on_device_of(grad):
            backward[(programs,)](
                *lstm_weights.packed(weights, plan, precision),
                *(*inputs, *grads_out, *results, partials, outputs, n, blocks, size),
                *constants_of(settings),
                **shape,
                BLOCK=chosen.block,
                PRECISION=precision,
                PTX=on_nvidia(),
                WIDE=wide(h),
                **chosen.options,
            )
    return results, lstm_weights.unpack(partials.sum(0), weights, plan)
