"""One step of the optimal choice; amalgam/operations/choice_step.py has the formulas."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from amalgam.kernels import lstm, lstm_weights
from amalgam.kernels.choice_network import (
    RANKS,
    choice_cell,
    mixture_of,
    row_of,
    teachers_gradients,
    teachers_updates,
    with_inputs,
    with_row,
)
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
from amalgam.kernels.teacher_kinds import moments
from amalgam.kernels.teacher_step import WIDTH, settings_of, teacher_table
from amalgam.operations.teacher_step import PoolSettings

PROGRAMS_PER_PROCESSOR = 2


@triton.jit
def forward(
    packed,
    other,
    table,  # (K, WIDTH)
    grad,  # (N,)
    ranks,  # (N,) int64
    m,  # (K, N)
    v,  # (K, N)
    h,  # (LAYERS, HIDDEN, N)
    c,  # (LAYERS, HIDDEN, N)
    update,  # (N,) out
    new_m,  # (K, N) out
    new_v,  # (K, N) out
    new_h,  # (LAYERS, HIDDEN, N) out
    new_c,  # (LAYERS, HIDDEN, N) out
    mixture,  # (K, N) out
    n,
    time,
    learning_rate,
    K: tl.constexpr,
    POOL: tl.constexpr,
    LAYERS: tl.constexpr,
    HIDDEN: tl.constexpr,
    UNITS: tl.constexpr,
    FOLDED: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Program p takes the p-th block of coordinates."""
    at = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    g = tl.load(grad + at, mask=inside, other=1.0)
    rank = tl.load(ranks + at, mask=inside, other=0)
    place = at  # goes on by n: a product k n would need 64 bits
    for k in range(K):
        kind, _lr, beta1, beta2, _eps, rest1, rest2, _inverse1, _inverse2 = settings_of(
            table + k * WIDTH
        )
        old_m = tl.load(m + place, mask=inside, other=0.0)
        old_v = tl.load(v + place, mask=inside, other=1.0)
        now_m, now_v = moments(kind, g, old_m, old_v, beta1, beta2, rest1, rest2)
        tl.store(new_m + place, now_m, mask=inside)
        tl.store(new_v + place, now_v, mask=inside)
        place += n
    updates = teachers_updates(table, g, m, v, at, inside, n, K, POOL)

    used = (tl.arange(0, UNITS) < HIDDEN)[:, None] & inside[None, :]
    x = tl.zeros((UNITS, BLOCK), tl.float32)
    for layer in tl.static_range(LAYERS):
        rows = rows_of(layer, HIDDEN, UNITS, at, n)
        old_h = tl.load(h + rows, mask=used, other=0.0)
        old_c = tl.load(c + rows, mask=used, other=0.0)
        if FOLDED:
            old_h = with_inputs(old_h, updates, time, rank, layer, K, POOL, HIDDEN, UNITS)
        _i, _f, _a, o, new_cell, squashed = choice_cell(
            packed, other, x, old_h, old_c, updates, time, rank,
            layer, K, POOL, UNITS, FOLDED, PRECISION, PTX, APPROXIMATE,
        )  # fmt: skip
        x = o * squashed
        tl.store(new_h + rows, x, mask=used)
        tl.store(new_c + rows, new_cell, mask=used)

    _W_IH, _W_HH, _B, HEAD = sizes_of(LAYERS - 1, K + 1 + RANKS, UNITS, FOLDED)
    shares = mixture_of(packed + HEAD, x, K, POOL, UNITS)
    pool = tl.arange(0, POOL)
    real = (pool < K)[:, None] & inside[None, :]
    tl.store(mixture + pool.to(at.dtype)[:, None] * n + at[None, :], shares, mask=real)
    tl.store(update + at, learning_rate * tl.sum(shares * updates, 0), mask=inside)


@triton.jit
def _gate_gradients(
    packed,
    other,
    partials,  # this program's sums, as the packed weights
    d_gate,  # (UNITS, BLOCK) of the gate's sum
    x,  # (UNITS, BLOCK)
    h,  # (UNITS, BLOCK)
    updates,  # (POOL, BLOCK)
    time,
    rank,  # (BLOCK,)
    d_x,  # (UNITS, BLOCK) gradients in x so far
    d_h,  # (UNITS, BLOCK) and in h
    d_updates,  # (POOL, BLOCK) and in the teachers' updates
    later,
    gate,
    LAYER: tl.constexpr,
    K: tl.constexpr,
    POOL: tl.constexpr,
    UNITS: tl.constexpr,
    FOLDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One gate's part of all gradients; the weights' are added to the program's sums."""
    d_x, d_h = recurrent_gradients(
        packed, other, partials, d_gate, x, h, d_x, d_h, later, gate,
        LAYER, K + 1 + RANKS, UNITS, FOLDED, PRECISION,
    )  # fmt: skip
    if LAYER == 0 and not FOLDED:
        first = gate * (K + 1 + RANKS) * UNITS
        to = partials + first + tl.arange(0, UNITS)
        add(to + K * UNITS, time * tl.sum(d_gate, 1), later)
        for r in tl.static_range(1, RANKS + 1):
            is_rank = (rank == r).to(tl.float32)
            add(to + (K + r) * UNITS, tl.sum(d_gate * is_rank[None, :], 1), later)
        for k in tl.static_range(K):
            row = row_of(updates, k, POOL)
            add(to + k * UNITS, tl.sum(d_gate * row[None, :], 1), later)
            d_row = tl.sum(column(packed + first + k * UNITS, UNITS)[:, None] * d_gate, 0)
            d_updates = with_row(d_updates, k, row_of(d_updates, k, POOL) + d_row, POOL)
    return d_x, d_h, d_updates


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
    updates,  # (POOL, BLOCK)
    time,
    rank,  # (BLOCK,)
    K: tl.constexpr,
    POOL: tl.constexpr,
    LAYERS: tl.constexpr,
    HIDDEN: tl.constexpr,
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
            old_h = with_inputs(old_h, updates, time, rank, layer, K, POOL, HIDDEN, UNITS)
        _i, _f, _a, o, _c, squashed = choice_cell(
            packed, other, x, old_h, old_c, updates, time, rank,
            layer, K, POOL, UNITS, FOLDED, PRECISION, PTX, False,
        )  # fmt: skip
        x = o * squashed
        tl.store(outputs + layer * UNITS * BLOCK + here, x)
    # Other threads of this program read what these wrote.
    tl.debug_barrier()
    return x


@triton.jit(do_not_specialize=["blocks", "size"])
def backward(
    packed,
    other,
    table,  # (K, WIDTH)
    grad,  # (N,)
    ranks,  # (N,) int64
    m,  # (K, N)
    v,  # (K, N)
    h,  # (LAYERS, HIDDEN, N)
    c,  # (LAYERS, HIDDEN, N)
    d_update,  # (N,)
    d_new_m,  # (K, N)
    d_new_v,  # (K, N)
    d_new_h,  # (LAYERS, HIDDEN, N)
    d_new_c,  # (LAYERS, HIDDEN, N)
    d_mixture,  # (K, N)
    d_grad,  # (N,) out
    d_m,  # (K, N) out
    d_v,  # (K, N) out
    d_h,  # (LAYERS, HIDDEN, N) out
    d_c,  # (LAYERS, HIDDEN, N) out
    partials,  # (P, size) float64 out, P programs' gradients in the packed weights
    outputs,  # (P, LAYERS, UNITS, BLOCK) scratch: the layers' new h
    n,
    blocks,
    size,
    time,
    learning_rate,
    K: tl.constexpr,
    POOL: tl.constexpr,
    LAYERS: tl.constexpr,
    HIDDEN: tl.constexpr,
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
    _W_IH, _W_HH, _B, HEAD = sizes_of(LAYERS - 1, K + 1 + RANKS, UNITS, FOLDED)
    pool = tl.arange(0, POOL)
    programs = tl.num_programs(0)
    for turn in range(tl.cdiv(blocks - program, programs)):
        later = turn > 0
        block = program.to(tl.int64 if WIDE else tl.int32) + turn * programs
        at = block * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        used = (unit < HIDDEN)[:, None] & inside[None, :]
        real = (pool < K)[:, None] & inside[None, :]
        of_pool = pool.to(at.dtype)[:, None] * n + at[None, :]
        g = tl.load(grad + at, mask=inside, other=1.0)
        rank = tl.load(ranks + at, mask=inside, other=0)
        updates = teachers_updates(table, g, m, v, at, inside, n, K, POOL)

        x = _lower_layers(
            packed, other, outputs, here, used, at, n, h, c, updates, time, rank,
            K, POOL, LAYERS, HIDDEN, UNITS, FOLDED, BLOCK, PRECISION, PTX,
        )  # fmt: skip

        d_updates = tl.zeros((POOL, BLOCK), tl.float32)
        d_x = tl.zeros((UNITS, BLOCK), tl.float32)
        for layer in tl.static_range(LAYERS - 1, -1, -1):
            if layer > 0:
                x = tl.load(outputs + (layer - 1) * UNITS * BLOCK + here)
            rows = rows_of(layer, HIDDEN, UNITS, at, n)
            old_h = tl.load(h + rows, mask=used, other=0.0)
            old_c = tl.load(c + rows, mask=used, other=0.0)
            if FOLDED:
                old_h = with_inputs(old_h, updates, time, rank, layer, K, POOL, HIDDEN, UNITS)
            i, f, a, o, _c, squashed = choice_cell(
                packed, other, x, old_h, old_c, updates, time, rank,
                layer, K, POOL, UNITS, FOLDED, PRECISION, PTX, False,
            )  # fmt: skip
            if layer == LAYERS - 1:
                top = o * squashed
                shares = mixture_of(packed + HEAD, top, K, POOL, UNITS)
                d_all = learning_rate * tl.load(d_update + at, mask=inside, other=0.0)
                d_shares = tl.load(d_mixture + of_pool, mask=real, other=0.0)
                d_shares += d_all[None, :] * updates
                d_updates = d_all[None, :] * shares
                d_logits = shares * (d_shares - tl.sum(shares * d_shares, 0)[None, :])
                for k in tl.static_range(K):
                    d_logit = row_of(d_logits, k, POOL)
                    of_head = HEAD + k * UNITS + unit
                    add(partials + of_head, tl.sum(top * d_logit[None, :], 1), later)
                    add(partials + HEAD + K * UNITS + k, tl.sum(d_logit, 0), later)
                    d_x += tl.load(packed + of_head)[:, None] * d_logit[None, :]

            d_i, d_f, d_a, d_o = cell_gradients(
                d_x, d_new_h, d_new_c, d_c, rows, used, old_c, i, f, a, o, squashed
            )
            d_x = tl.zeros((UNITS, BLOCK), tl.float32)
            d_old_h = tl.zeros((UNITS, BLOCK), tl.float32)
            for gate in tl.range(4, num_stages=1):
                d_gate = of_gate(gate, d_i, d_f, d_a, d_o)
                d_x, d_old_h, d_updates = _gate_gradients(
                    packed, other, partials, d_gate, x, old_h, updates, time, rank,
                    d_x, d_old_h, d_updates, later, gate,
                    layer, K, POOL, UNITS, FOLDED, PRECISION,
                )  # fmt: skip
            tl.store(d_h + rows, d_old_h, mask=used)
            if FOLDED and layer == 0:
                for k in tl.static_range(K):
                    of_k = (unit == HIDDEN + 1 + k)[:, None]
                    d_row = tl.sum(tl.where(of_k, d_old_h, 0.0), 0)
                    d_updates = with_row(d_updates, k, row_of(d_updates, k, POOL) + d_row, POOL)
        # The next block's layers overwrite what these read.
        tl.debug_barrier()

        d_g = teachers_gradients(
            table, g, m, v, d_updates, d_new_m, d_new_v, d_m, d_v, at, inside, n, K, POOL
        )
        tl.store(d_grad + at, d_g, mask=inside)


def _plan(k: int, h: Tensor) -> tuple[lstm_weights.Packing, dict[str, int]]:
    layers, hidden = h.shape[:2]
    plan = lstm_weights.packing(layers, hidden, k + 1 + RANKS.value, k, h.device)
    return plan, {
        "K": k,
        "POOL": triton.next_power_of_2(k),
        "LAYERS": layers,
        "HIDDEN": hidden,
        "UNITS": plan.units,
        "FOLDED": plan.folded,
    }


def choice_step(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    pool: PoolSettings,
    time: float,
    learning_rate: float,
    precision: str | None,
    approximate: bool,
) -> tuple[Tensor, ...]:
    """Launch the forward.

    Args:
        inputs: grad (N,), m and v (K, N), h and c (layers, hidden, N), all float32, and ranks (N,),
            int64; contiguous.
        weights: As the operation has them.
        pool: The teachers.
        time: The LSTM's feature.
        learning_rate: Factor on the update.
        precision: Of the matrix products: "ieee", "3xtf32", "tf32" or "bf16"; ``None`` for the
            fastest that errs as float32 does.
        approximate: Whether tanh and sigmoid are NVIDIA's tanh.approx.

    Returns:
        The update (N,), the new m, v, h, c, and the mixture (K, N).
    """
    grad, m, v, h, c, ranks = inputs
    results = tuple(torch.empty_like(tensor) for tensor in (grad, m, v, h, c, m))
    n = grad.numel()
    precision = lstm.precision_of(precision)
    plan, shape = _plan(len(m), h)
    chosen = configuration("choice_step", h.shape[0], h.shape[1], precision)
    if n:
        with on_device_of(grad):
            forward[(triton.cdiv(n, chosen.block),)](
                *lstm_weights.packed(weights, plan, precision, approximate),
                teacher_table(grad, pool),
                *(grad, ranks, m, v, h, c, *results, n, time, learning_rate),
                **shape,
                BLOCK=chosen.block,
                PRECISION=precision,
                PTX=on_nvidia(),
                WIDE=wide(m, h),
                APPROXIMATE=approximate,
                **chosen.options,
            )
    return results


def choice_step_backward(
    grads_out: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    pool: PoolSettings,
    time: float,
    learning_rate: float,
    precision: str | None,
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Launch the backward.

    Args:
        grads_out: Gradients in the update, the new m, v, h, c, and the mixture; contiguous.
        inputs: As in :func:`choice_step`, and so on.
        weights: As the operation has them.
        pool: The teachers.
        time: The LSTM's feature.
        learning_rate: Factor on the update.
        precision: As in :func:`choice_step`; activations are precise.

    Returns:
        Gradients in grad, m, v, h, c, and in the weights. The weights' are summed in an order that
        depends on n and the device alone.
    """
    grad, m, v, h, c, ranks = inputs
    results = tuple(torch.empty_like(tensor) for tensor in (grad, m, v, h, c))
    n = grad.numel()
    precision = lstm.precision_of(precision)
    plan, shape = _plan(len(m), h)
    chosen = configuration("choice_step_backward", h.shape[0], h.shape[1], precision)
    blocks = triton.cdiv(n, chosen.block)
    programs = min(blocks, PROGRAMS_PER_PROCESSOR * processors(grad.device))
    size = plan.places.numel()
    partials = grad.new_empty((programs, size), dtype=torch.float64)
    if n:
        outputs = grad.new_empty((programs, shape["LAYERS"], plan.units, chosen.block))
        with on_device_of(grad):
            backward[(programs,)](
                *lstm_weights.packed(weights, plan, precision),
                teacher_table(grad, pool),
                *(grad, ranks, m, v, h, c, *grads_out, *results, partials, outputs),
                *(n, blocks, size, time, learning_rate),
                **shape,
                BLOCK=chosen.block,
                PRECISION=precision,
                PTX=on_nvidia(),
                WIDE=wide(m, h),
                **chosen.options,
            )
    return results, lstm_weights.apart(lstm_weights.unpack(partials.sum(0), weights, plan))
