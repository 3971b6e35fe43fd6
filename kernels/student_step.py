"""The functional step of students; formulas: amalgam/operations/student_step.py.

S students step side by side, each with weights of its own: all tensors have a first dimension of S,
and the second one of the grid is the student.

In the nominal form the coordinates are those of several tensors, one after another. A block is of
one of them: which, says a table of where each begins.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from amalgam.device import read_by_graphs
from amalgam.kernels import lstm, lstm_weights
from amalgam.kernels.configurations import configuration
from amalgam.kernels.launch import on_device_of, on_nvidia, processors, wide
from amalgam.kernels.lstm import (
    add,
    cell_gradients,
    column,
    of_gate,
    recurrent_gradients,
    rows_of,
    sizes_of,
)
from amalgam.kernels.student_forms import (
    corrected,
    direction_gradients,
    fresh_moments,
    m_gradient,
    output_gradients,
    scale_of,
    seen,
    v_descent,
)
from amalgam.kernels.student_network import (
    constants_of,
    head_biases,
    head_columns,
    head_sums,
    packed_for_step,
    plan_of,
    precision_of,
    step_of_block,
    student_cell,
    tensor_of,
    to_pack,
    with_biases,
    with_inputs,
)
from amalgam.operations.student_forms import NOMINAL, StepSettings

PROGRAMS_PER_PROCESSOR = 2


@triton.jit
def _place_of(
    bounds,
    biases,
    corrections,
    count,
    depth,
    block,
    n,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    NOMINAL: tl.constexpr,
):
    """Which coordinates a block is of, which of these exist, and what there is of their tensor.

    That is its number, its bias and corrections, and which of its blocks this one is.
    """
    if NOMINAL:
        tensor = tensor_of(bounds, count, depth, block)
        number = block - tl.load(bounds + tensor).to(block.dtype)
        ends = bounds + count + tensor
        first = tl.load(ends).to(block.dtype)
        if ALIGNED:
            first = tl.multiple_of(first, 16)
        at = first + number * BLOCK + tl.arange(0, BLOCK)
        bias = biases + tensor.to(tl.int64) * (4 * HIDDEN)
        correction1 = tl.load(corrections + 3 * tensor)
        correction2 = tl.load(corrections + 3 * tensor + 1)
        pace = tl.load(corrections + 3 * tensor + 2)
        return at, at < tl.load(ends + 1), bias, correction1, correction2, pace, tensor, number
    else:
        at = block * BLOCK + tl.arange(0, BLOCK)
        # No bias: Triton before 3.9 compiles no function that returns None.
        return at, at < n, 0, 1.0, 1.0, 1.0, 0, block


@triton.jit
def _of_student(student, m, v, h, c, n, LAYERS: tl.constexpr, HIDDEN: tl.constexpr):
    """Where a student's state lies."""
    cells = student * n * (LAYERS * HIDDEN)
    return m + student * n, v + student * n, h + cells, c + cells


@triton.jit(
    do_not_specialize=["count", "depth", "size"],
    do_not_specialize_on_alignment=["bounds", "biases", "corrections"],
)
def forward(
    packed,
    other,
    grad,  # (S, N)
    m,  # (S, N)
    v,  # (S, N)
    h,  # (S, LAYERS, HIDDEN, N)
    c,  # (S, LAYERS, HIDDEN, N)
    update,  # (S, N) out
    new_m,  # (S, N) out, and so on: may be the old ones
    new_v,  # (S, N) out
    new_h,  # (S, LAYERS, HIDDEN, N) out
    new_c,  # (S, LAYERS, HIDDEN, N) out
    bounds,  # of NOMINAL, as _bounds has them
    biases,  # of NOMINAL: (S, count, 4 HIDDEN)
    corrections,  # of NOMINAL: (S, count, 3)
    count,
    depth,
    n,
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
    NOMINAL: tl.constexpr,
    SEVERAL: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The functional step: program (p, s) takes the p-th block of student s's coordinates."""
    if SEVERAL:
        student = tl.program_id(1).to(tl.int64)
        packed += student * size
        other += student * size
        grad += student * n
        update += student * n
        m, v, h, c = _of_student(student, m, v, h, c, n, LAYERS, HIDDEN)
        new_m, new_v, new_h, new_c = _of_student(
            student, new_m, new_v, new_h, new_c, n, LAYERS, HIDDEN
        )
        if NOMINAL:
            biases += student * count * (4 * HIDDEN)
            corrections += student * count * 3
    block = tl.program_id(0).to(tl.int64 if WIDE else tl.int32)
    at, inside, bias, correction1, correction2, pace, _tensor, _number = _place_of(
        bounds, biases, corrections, count, depth, block, n, HIDDEN, BLOCK, ALIGNED, NOMINAL
    )
    g = tl.load(grad + at, mask=inside, other=0.0)
    result, _fresh_v = step_of_block(
        packed, other, g, inside, at, n, m, v, h, c, new_m, new_v, new_h, new_c, 0,
        bias, correction1, correction2,
        alpha * pace, beta1, beta2, one_minus_beta1, one_minus_beta2, eps,
        LAYERS, HIDDEN, FEATURES, UNITS, FOLDED, NOMINAL, BLOCK, PRECISION, PTX, APPROXIMATE, False,
    )  # fmt: skip
    tl.store(update + at, result, mask=inside)


@triton.jit
def _gate_gradients(
    packed,
    other,
    partials,  # this program's sums, as the packed weights
    d_bias,  # of NOMINAL: (4, UNITS) its sums of the tensor's own bias, and whether there are any
    bias_later,
    d_gate,  # (UNITS, BLOCK) of the gate's sum
    x,  # (UNITS, BLOCK)
    h,  # (UNITS, BLOCK)
    features,  # FEATURES of (BLOCK,)
    d_x,  # (UNITS, BLOCK) gradients in x so far
    d_h,  # (UNITS, BLOCK) and in h
    d_features,  # and in the features
    later,
    gate,
    LAYER: tl.constexpr,
    FEATURES: tl.constexpr,
    UNITS: tl.constexpr,
    FOLDED: tl.constexpr,
    NOMINAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One gate's part of all gradients; the weights' are added to the program's sums."""
    d_x, d_h = recurrent_gradients(
        packed, other, partials, d_gate, x, h, d_x, d_h, later, gate,
        LAYER, FEATURES, UNITS, FOLDED, PRECISION,
    )  # fmt: skip
    unit = tl.arange(0, UNITS)
    if NOMINAL and LAYER == 0:
        add(d_bias + gate * UNITS + unit, tl.sum(d_gate, 1), bias_later)
    if LAYER == 0 and not FOLDED:
        w_ih = gate * FEATURES * UNITS
        for k in tl.static_range(FEATURES):
            total = tl.sum(d_gate * features[k][None, :], 1)
            add(partials + w_ih + k * UNITS + unit, total, later)
        found = ()
        for k in tl.static_range(FEATURES):
            weights = column(packed + w_ih + k * UNITS, UNITS)
            found = found + (d_features[k] + tl.sum(weights[:, None] * d_gate, 0),)
        d_features = found
    return d_x, d_h, d_features


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
    features,  # FEATURES of (BLOCK,)
    bias,  # (4 HIDDEN,) of NOMINAL
    LAYERS: tl.constexpr,
    HIDDEN: tl.constexpr,
    FEATURES: tl.constexpr,
    UNITS: tl.constexpr,
    FOLDED: tl.constexpr,
    NOMINAL: tl.constexpr,
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
            old_h = with_inputs(old_h, features, layer, HIDDEN, FEATURES, UNITS)
        _i, _f, _a, o, _c, squashed = student_cell(
            packed, other, x, old_h, old_c, features, bias,
            layer, HIDDEN, FEATURES, UNITS, FOLDED, NOMINAL, PRECISION, PTX, False,
        )  # fmt: skip
        x = o * squashed
        tl.store(outputs + layer * UNITS * BLOCK + here, x)
    # Other threads of this program read what these wrote.
    tl.debug_barrier()
    return x


@triton.jit(
    do_not_specialize=["blocks", "size", "bias_rows", "count", "depth"],
    do_not_specialize_on_alignment=["bounds", "biases", "corrections"],
)
def backward(
    packed,
    other,
    grad,  # (S, N)
    m,  # (S, N)
    v,  # (S, N)
    h,  # (S, LAYERS, HIDDEN, N)
    c,  # (S, LAYERS, HIDDEN, N)
    d_update,  # (S, N)
    d_new_m,  # (S, N)
    d_new_v,  # (S, N)
    d_new_h,  # (S, LAYERS, HIDDEN, N)
    d_new_c,  # (S, LAYERS, HIDDEN, N)
    d_grad,  # (S, N) out
    d_m,  # (S, N) out
    d_v,  # (S, N) out
    d_h,  # (S, LAYERS, HIDDEN, N) out
    d_c,  # (S, LAYERS, HIDDEN, N) out
    partials,  # (S, P, size) float64 out, P programs' gradients in the packed weights
    outputs,  # (S, P, LAYERS, UNITS, BLOCK) scratch: the layers' new h
    bounds,  # of NOMINAL, as _bounds has them
    biases,  # of NOMINAL: (S, count, 4 HIDDEN)
    corrections,  # of NOMINAL: (S, count, 3)
    d_biases,  # of NOMINAL: (S, bias_rows, 4, UNITS) float64 out, programs' sums of tensors
    count,
    depth,
    n,
    blocks,
    size,
    bias_rows,
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
    SEVERAL: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Program (p, s) takes blocks p, p + P, ... of student s: the step again, then backwards."""
    program = tl.program_id(0)
    of_all = program.to(tl.int64)
    if SEVERAL:
        student = tl.program_id(1).to(tl.int64)
        packed += student * size
        other += student * size
        grad += student * n
        d_update += student * n
        d_grad += student * n
        m, v, h, c = _of_student(student, m, v, h, c, n, LAYERS, HIDDEN)
        d_new_m, d_new_v, d_new_h, d_new_c = _of_student(
            student, d_new_m, d_new_v, d_new_h, d_new_c, n, LAYERS, HIDDEN
        )
        d_m, d_v, d_h, d_c = _of_student(student, d_m, d_v, d_h, d_c, n, LAYERS, HIDDEN)
        if NOMINAL:
            biases += student * count * (4 * HIDDEN)
            corrections += student * count * 3
            d_biases += student * bias_rows * (4 * UNITS)
        of_all += student * tl.num_programs(0)
    partials += of_all * size
    unit = tl.arange(0, UNITS)
    here = unit[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    outputs += of_all * LAYERS * UNITS * BLOCK
    _W_IH, _W_HH, _B, HEAD = sizes_of(LAYERS - 1, FEATURES, UNITS, FOLDED)
    OUTPUTS: tl.constexpr = 2 if NOMINAL else 1
    head = head_columns(packed, HEAD, UNITS, OUTPUTS)
    head_bias = head_biases(packed, HEAD, UNITS, OUTPUTS)
    programs = tl.num_programs(0)
    for turn in range(tl.cdiv(blocks - program, programs)):
        later = turn > 0
        block = program.to(tl.int64 if WIDE else tl.int32) + turn * programs
        at, inside, bias, correction1, correction2, pace, tensor, number = _place_of(
            bounds, biases, corrections, count, depth, block, n, HIDDEN, BLOCK, ALIGNED, NOMINAL
        )
        d_bias = d_biases
        bias_later = later
        if NOMINAL:
            # Each program that has blocks of a tensor has one row of them.
            row = tl.load(bounds + 2 * count + 1 + tensor) + number % programs
            d_bias += row * (4 * UNITS)
            bias_later = number >= programs
        used = (unit < HIDDEN)[:, None] & inside[None, :]
        g = tl.load(grad + at, mask=inside, other=1.0)
        old_m = tl.load(m + at, mask=inside, other=0.0)
        old_v = tl.load(v + at, mask=inside, other=1.0)
        fresh_m, fresh_v = fresh_moments(
            g, old_m, old_v, beta1, beta2, one_minus_beta1, one_minus_beta2
        )
        scale, root = scale_of(fresh_v, one_minus_beta2, eps, correction2, NOMINAL, PTX)
        m_hat = corrected(fresh_m, one_minus_beta1, correction1, NOMINAL)
        a_direction = m_hat * scale
        b_direction = g * scale
        features = seen(a_direction, b_direction, NOMINAL, PTX, False)

        x = _lower_layers(
            packed, other, outputs, here, used, at, n, h, c, features, bias,
            LAYERS, HIDDEN, FEATURES, UNITS, FOLDED, NOMINAL, BLOCK, PRECISION, PTX,
        )  # fmt: skip

        d_features = ()
        for _ in tl.static_range(FEATURES):
            d_features = d_features + (tl.zeros((BLOCK,), tl.float32),)
        d_x = tl.zeros((UNITS, BLOCK), tl.float32)
        for layer in tl.static_range(LAYERS - 1, -1, -1):
            if layer > 0:
                x = tl.load(outputs + (layer - 1) * UNITS * BLOCK + here)
            rows = rows_of(layer, HIDDEN, UNITS, at, n)
            old_h = tl.load(h + rows, mask=used, other=0.0)
            old_c = tl.load(c + rows, mask=used, other=0.0)
            if FOLDED:
                old_h = with_inputs(old_h, features, layer, HIDDEN, FEATURES, UNITS)
            i, f, a, o, _c, squashed = student_cell(
                packed, other, x, old_h, old_c, features, bias,
                layer, HIDDEN, FEATURES, UNITS, FOLDED, NOMINAL, PRECISION, PTX, False,
            )  # fmt: skip
            if layer == LAYERS - 1:
                top_h = o * squashed
                top = with_biases(head_sums(head, top_h, OUTPUTS), head_bias, OUTPUTS)
                d_top, d_a_direction, d_b_direction = output_gradients(
                    d_update + at, inside, top, a_direction, b_direction, alpha * pace,
                    NOMINAL, PTX,
                )  # fmt: skip
                for output in tl.static_range(OUTPUTS):
                    row = HEAD + output * UNITS + unit
                    add(partials + row, tl.sum(top_h * d_top[output][None, :], 1), later)
                    end = HEAD + OUTPUTS * UNITS + output
                    add(partials + end, tl.sum(d_top[output], 0), later)
                d_x = head[0][:, None] * d_top[0][None, :]
                if NOMINAL:
                    d_x += head[1][:, None] * d_top[1][None, :]

            d_i, d_f, d_a, d_o = cell_gradients(
                d_x, d_new_h, d_new_c, d_c, rows, used, old_c, i, f, a, o, squashed
            )
            d_x = tl.zeros((UNITS, BLOCK), tl.float32)
            d_old_h = tl.zeros((UNITS, BLOCK), tl.float32)
            for gate in tl.range(4, num_stages=1):
                d_gate = of_gate(gate, d_i, d_f, d_a, d_o)
                d_x, d_old_h, d_features = _gate_gradients(
                    packed, other, partials, d_bias, bias_later, d_gate, x, old_h, features,
                    d_x, d_old_h, d_features, later, gate,
                    layer, FEATURES, UNITS, FOLDED, NOMINAL, PRECISION,
                )  # fmt: skip
            tl.store(d_h + rows, d_old_h, mask=used)
            if FOLDED and layer == 0:
                d_features = ()
                for k in tl.static_range(FEATURES):
                    of_feature = (unit == HIDDEN + 1 + k)[:, None]
                    found = tl.sum(tl.where(of_feature, d_old_h, 0.0), 0)
                    d_features = d_features + (found,)
        # The next block's layers overwrite what these read.
        tl.debug_barrier()

        d_a_direction, d_b_direction = direction_gradients(
            d_features, d_a_direction, d_b_direction, a_direction, b_direction, features, NOMINAL
        )
        d_scale = d_a_direction * m_hat + d_b_direction * g
        d_fresh_m = tl.load(d_new_m + at, mask=inside, other=0.0)
        d_fresh_m += m_gradient(d_a_direction, scale, one_minus_beta1, correction1, NOMINAL)
        d_fresh_v = tl.load(d_new_v + at, mask=inside, other=0.0)
        d_fresh_v -= v_descent(d_scale, scale, root, one_minus_beta2, correction2, NOMINAL)
        of_moments = one_minus_beta1 * d_fresh_m + 2.0 * one_minus_beta2 * g * d_fresh_v
        tl.store(d_grad + at, d_b_direction * scale + of_moments, mask=inside)
        tl.store(d_m + at, beta1 * d_fresh_m, mask=inside)
        tl.store(d_v + at, beta2 * d_fresh_v, mask=inside)


class _Bounds(NamedTuple):
    """Where the tensors lie that the coordinates are of.

    Attributes:
        blocks: How many blocks they take together.
        aligned: Whether all begin at a multiple of 16.
        table: Int64: the first block of each; where each begins, and where the last one ends; and
            the first of each one's rows of sums.
        rows: How many rows of sums there are.
        lengths: And how many of each tensor, int64 (tensors,).
    """

    blocks: int
    aligned: bool
    table: Tensor
    rows: int
    lengths: Tensor


@functools.lru_cache(maxsize=256)
def _bounds(sizes: tuple[int, ...], block: int, programs: int, device: torch.device) -> _Bounds:
    """Of tensors of these sizes, for blocks of this size by so many programs at most.

    They are kept: a step's are those of the next, and a copy to the device would wait for it.
    """
    blocks = [triton.cdiv(size, block) for size in sizes]
    rows = [min(count, programs) for count in blocks]
    first_block, begin, first_row = (
        list(itertools.accumulate(counts, initial=0)) for counts in (blocks, sizes, rows)
    )
    with torch.inference_mode(False):  # steps outside it read them, too
        table = torch.tensor([*first_block[:-1], *begin, *first_row[:-1]], device=device)
        lengths = torch.tensor(rows, device=device)
    aligned = all(place % 16 == 0 for place in begin[:-1])
    return _Bounds(first_block[-1], aligned, table, first_row[-1], lengths)


def _of_tensors(
    weights: Sequence[Tensor], settings: StepSettings, bounds: _Bounds | None
) -> tuple[tuple[Tensor | None, ...], tuple[int | None, ...]]:
    """Kernels' arguments bounds, biases and corrections; and count and depth."""
    if bounds is None or settings.corrections is None:
        return (None, None, None), (None, None)
    count = len(settings.sizes)
    given = bounds.table, weights[2].contiguous(), settings.corrections.contiguous()
    return given, (count, (count - 1).bit_length())


def student_step(
    results: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    settings: StepSettings,
    precision: str | None,
    approximate: bool,
) -> None:
    """Launch the functional step of S students.

    Args:
        results: Get the update (S, N), and the new m, v, h, c, which may be the old ones.
        inputs: grad, m, v (S, N), h and c (S, layers, hidden, N), all contiguous and float32.
        weights: As the operation has them, each with a first dimension of S.
        settings: The students' constants; corrections (S, tensors, 3).
        precision: Of the matrix products: "ieee", "3xtf32", "tf32" or "bf16"; ``None`` for the
            fastest that errs as float32 does.
        approximate: Whether tanh and sigmoid are NVIDIA's tanh.approx.
    """
    grad, _, _, h, _ = inputs
    students, n = grad.shape
    form = settings.form
    precision = precision_of(precision, h[0], form)
    plan, shape = plan_of(h[0], form, precision)
    chosen = configuration("student_step", h.shape[1], h.shape[2], precision, form is NOMINAL)
    bounds, blocks = None, triton.cdiv(n, chosen.block)
    if form is NOMINAL:
        bounds = read_by_graphs(_bounds(tuple(settings.sizes), chosen.block, 1, h.device))
        blocks = bounds.blocks
    tensors, counts = _of_tensors(weights, settings, bounds)
    if not n:
        return
    with on_device_of(grad):
        forward[(blocks, students)](
            *packed_for_step(weights, form, plan, precision, approximate),
            *(*inputs, *results, *tensors, *counts, n, plan.places.numel()),
            *constants_of(settings),
            **shape,
            SEVERAL=students > 1,
            ALIGNED=bounds is not None and bounds.aligned,
            BLOCK=chosen.block,
            PRECISION=precision,
            PTX=on_nvidia(),
            APPROXIMATE=approximate,
            WIDE=wide(h[0]),
            **chosen.options,
        )


def student_step_backward(
    results: Sequence[Tensor],
    grads_out: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    settings: StepSettings,
    precision: str | None,
) -> list[Tensor]:
    """Launch the backward of the functional step of S students.

    Args:
        results: Get the gradients in grad, m, v, h, c; in memory that is not ``grads_out``'s.
        grads_out: Gradients in the update and in the new m, v, h, c, contiguous, float32.
        inputs: As in :func:`student_step`.
        weights: As in :func:`student_step`.
        settings: As in :func:`student_step`.
        precision: As in :func:`student_step`; activations are precise.

    Returns:
        Gradients in the weights, which may share memory. They are summed in an order that depends
        on n, S and the device alone.
    """
    grad, _, _, h, _ = inputs
    students, n = grad.shape
    precision = lstm.precision_of(precision)
    form = settings.form
    plan, shape = plan_of(h[0], form, precision)
    chosen = configuration("student_step_backward", h.shape[1], h.shape[2], precision)
    # Of many students fewer programs each, as each has sums of its own of all weights.
    most = max(1, PROGRAMS_PER_PROCESSOR * processors(grad.device) // students)
    bounds, blocks = None, triton.cdiv(n, chosen.block)
    if form is NOMINAL:
        bounds = read_by_graphs(_bounds(tuple(settings.sizes), chosen.block, most, h.device))
        blocks = bounds.blocks
    tensors, counts = _of_tensors(weights, settings, bounds)
    programs = min(blocks, most)
    size = plan.places.numel()
    partials = grad.new_empty((students, programs, size), dtype=torch.float64)
    d_biases, rows = None, 0
    if bounds is not None:
        rows = bounds.rows
        d_biases = partials.new_empty((students, rows, 4, plan.units))
    if n:
        outputs = grad.new_empty((students, programs, shape["LAYERS"], plan.units, chosen.block))
        with on_device_of(grad):
            backward[(programs, students)](
                *lstm_weights.packed(to_pack(weights, form), plan, precision),
                *(*inputs, *grads_out, *results, partials, outputs),
                *(*tensors, d_biases, *counts, n, blocks, size, rows),
                *constants_of(settings),
                **shape,
                SEVERAL=students > 1,
                ALIGNED=bounds is not None and bounds.aligned,
                BLOCK=chosen.block,
                PRECISION=precision,
                PTX=on_nvidia(),
                WIDE=wide(h[0]),
                **chosen.options,
            )
    d_weights = lstm_weights.unpack(partials.sum(1), to_pack(weights, form), plan)
    if bounds is not None and d_biases is not None:
        gates = 4 * h.shape[2]
        by_row = d_biases[..., : h.shape[2]].flatten(2).transpose(0, 1).flatten(1)
        sums = torch.segment_reduce(by_row, "sum", lengths=bounds.lengths, unsafe=True)
        sums = sums.view(-1, students, gates).transpose(0, 1)
        d_weights.insert(2, sums.to(grad.dtype).contiguous())
    return d_weights
