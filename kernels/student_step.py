"""One step of the RNNProp student; amalgam/ops/student_step.py has the formulas."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from amalgam.kernels import lstm
from amalgam.kernels.launch import on_device_of, on_nvidia, processors, stream_of
from amalgam.kernels.lstm import (
    add,
    cell,
    column,
    exp,
    recurrent_gradients,
    rows_of,
    sizes_of,
    tanh,
)

FEATURES = 2
BLOCK = 64
BACKWARD_BLOCK = 64
PROGRAMS_PER_PROCESSOR = 2
# Fusion is named because Triton 3.10 turns it off by default.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
BACKWARD_OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


@triton.jit
def _features(g, m, v, beta1, beta2, one_minus_beta1, one_minus_beta2, eps):
    """The new moments, and the two features of them."""
    m = beta1 * m + one_minus_beta1 * g
    v = beta2 * v + one_minus_beta2 * (g * g)
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
def _cell(
    packed,
    low,
    x,  # (UNITS, BLOCK) the layer below's new h; not looked at by the first layer
    h,  # (UNITS, BLOCK)
    c,  # (UNITS, BLOCK)
    m_feature,  # (BLOCK,)
    g_feature,  # (BLOCK,)
    LAYER: tl.constexpr,
    FEATURES: tl.constexpr,
    UNITS: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """A layer's gates, its new c, and the tanh of that."""
    if LAYER == 0:
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
        packed, low, x, h, c, i, f, a, o, LAYER, FEATURES, UNITS, PRECISION, PTX, APPROXIMATE
    )


@triton.jit
def _step(
    packed,
    low,
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
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """Writes a block's new state and returns its update, (BLOCK,)."""
    old_m = tl.load(m + at, mask=inside, other=0.0)
    old_v = tl.load(v + at, mask=inside, other=1.0)
    fresh_m, fresh_v, scale = _features(
        g, old_m, old_v, beta1, beta2, one_minus_beta1, one_minus_beta2, eps
    )
    tl.store(new_m + at, fresh_m, mask=inside)
    tl.store(new_v + at, fresh_v, mask=inside)
    m_feature = fresh_m / one_minus_beta1 * scale
    g_feature = g * scale

    used = (tl.arange(0, UNITS) < HIDDEN)[:, None] & inside[None, :]
    x = tl.zeros((UNITS, BLOCK), tl.float32)
    for layer in tl.static_range(LAYERS):
        rows = rows_of(layer, HIDDEN, UNITS, at, n)
        old_h = tl.load(h + rows, mask=used, other=0.0).to(tl.float32)
        old_c = tl.load(c + rows, mask=used, other=0.0).to(tl.float32)
        _i, _f, _a, o, new_cell, squashed = _cell(
            packed, low, x, old_h, old_c, m_feature, g_feature,
            layer, FEATURES, UNITS, PRECISION, PTX, APPROXIMATE,
        )  # fmt: skip
        x = o * squashed
        tl.store(new_h + rows, x.to(new_h.dtype.element_ty), mask=used)
        tl.store(new_c + rows, new_cell.to(new_c.dtype.element_ty), mask=used)

    _W_IH, _W_HH, _B, HEAD = sizes_of(LAYERS - 1, FEATURES, UNITS)
    top = tl.sum(column(packed + HEAD, UNITS)[:, None] * x, 0)
    return alpha * tanh(top + tl.load(packed + HEAD + UNITS), PTX, APPROXIMATE)


@triton.jit
def forward(
    packed,
    low,
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
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """The functional step: program p takes the p-th block of coordinates."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    g = tl.load(grad + at, mask=inside, other=0.0)
    result = _step(
        packed, low, g, inside, at, n, m, v, h, c, new_m, new_v, new_h, new_c,
        alpha, beta1, beta2, one_minus_beta1, one_minus_beta2, eps,
        LAYERS, HIDDEN, FEATURES, UNITS, BLOCK, PRECISION, PTX, APPROXIMATE,
    )  # fmt: skip
    tl.store(update + at, result, mask=inside)


@triton.jit
def in_place(
    packed,
    low,
    table,  # (count, 7) int64: addresses of parameter, gradient, m, v, h, c, and how many
    first_block,  # (count,) int64: the first block of each tensor
    count,
    depth,  # ceil(log2(count)): steps of the search
    keep,  # 1 - lr * weight_decay
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
    LAYERS: tl.constexpr,
    HIDDEN: tl.constexpr,
    FEATURES: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """One launch for all tensors: program p finds the tensor that its block belongs to."""
    block = tl.program_id(0).to(tl.int64)
    tensor = tl.zeros((), tl.int32)
    after = tensor + count
    for _ in range(depth):
        middle = (tensor + after) // 2
        before = tl.load(first_block + middle) <= block
        tensor = tl.where(before, middle, tensor)
        after = tl.where(before, after, middle)
    entry = table + tensor.to(tl.int64) * 7
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

    at = (block - tl.load(first_block + tensor)) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    update = _step(
        packed, low, g, inside, at, n, m, v, h, c, m, v, h, c,
        alpha, beta1, beta2, one_minus_beta1, one_minus_beta2, eps,
        LAYERS, HIDDEN, FEATURES, UNITS, BLOCK, PRECISION, PTX, APPROXIMATE,
    )  # fmt: skip
    moved = keep * tl.load(param + at, mask=inside, other=0.0).to(tl.float32) - lr * update
    tl.store(param + at, moved.to(PARAM), mask=inside)


@triton.jit
def _gate_gradients(
    packed,
    low,
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
    GATE: tl.constexpr,
    LAYER: tl.constexpr,
    FEATURES: tl.constexpr,
    UNITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One gate's part of all gradients; the weights' are added to the program's sums."""
    d_x, d_h = recurrent_gradients(
        packed,
        low,
        partials,
        d_gate,
        x,
        h,
        d_x,
        d_h,
        later,
        GATE,
        LAYER,
        FEATURES,
        UNITS,
        PRECISION,
    )
    if LAYER == 0:
        unit = tl.arange(0, UNITS)
        w_m = GATE * FEATURES * UNITS
        w_g = w_m + UNITS
        add(partials + w_m + unit, tl.sum(d_gate * m_feature[None, :], 1), later)
        add(partials + w_g + unit, tl.sum(d_gate * g_feature[None, :], 1), later)
        d_m_feature += tl.sum(column(packed + w_m, UNITS)[:, None] * d_gate, 0)
        d_g_feature += tl.sum(column(packed + w_g, UNITS)[:, None] * d_gate, 0)
    return d_x, d_h, d_m_feature, d_g_feature


@triton.jit
def backward(
    packed,
    low,
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
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):
    """Program p takes blocks p, p + P, ...: the step again, then its gradients backwards."""
    program = tl.program_id(0)
    partials += program.to(tl.int64) * size
    unit = tl.arange(0, UNITS)
    here = unit[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    outputs += program.to(tl.int64) * LAYERS * UNITS * BLOCK
    _W_IH, _W_HH, _B, HEAD = sizes_of(LAYERS - 1, FEATURES, UNITS)
    head = column(packed + HEAD, UNITS)
    head_bias = tl.load(packed + HEAD + UNITS)
    programs = tl.num_programs(0)
    for turn in range(tl.cdiv(blocks - program, programs)):
        later = turn > 0
        at = (program.to(tl.int64) + turn * programs) * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        used = (unit < HIDDEN)[:, None] & inside[None, :]
        g = tl.load(grad + at, mask=inside, other=0.0)
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
            _i, _f, _a, o, _c, squashed = _cell(
                packed, low, x, old_h, old_c, m_feature, g_feature,
                layer, FEATURES, UNITS, PRECISION, PTX, False,
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
            i, f, a, o, _c, squashed = _cell(
                packed, low, x, old_h, old_c, m_feature, g_feature,
                layer, FEATURES, UNITS, PRECISION, PTX, False,
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
            d_x, d_old_h, d_m_feature, d_g_feature = _gate_gradients(
                packed, low, partials, d_i, x, old_h, m_feature, g_feature,
                d_x, d_old_h, d_m_feature, d_g_feature, later,
                0, layer, FEATURES, UNITS, PRECISION,
            )  # fmt: skip
            d_x, d_old_h, d_m_feature, d_g_feature = _gate_gradients(
                packed, low, partials, d_f, x, old_h, m_feature, g_feature,
                d_x, d_old_h, d_m_feature, d_g_feature, later,
                1, layer, FEATURES, UNITS, PRECISION,
            )  # fmt: skip
            d_x, d_old_h, d_m_feature, d_g_feature = _gate_gradients(
                packed, low, partials, d_a, x, old_h, m_feature, g_feature,
                d_x, d_old_h, d_m_feature, d_g_feature, later,
                2, layer, FEATURES, UNITS, PRECISION,
            )  # fmt: skip
            d_x, d_old_h, d_m_feature, d_g_feature = _gate_gradients(
                packed, low, partials, d_o, x, old_h, m_feature, g_feature,
                d_x, d_old_h, d_m_feature, d_g_feature, later,
                3, layer, FEATURES, UNITS, PRECISION,
            )  # fmt: skip
            tl.store(d_h + rows, d_old_h, mask=used)
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
    }


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
    precision = lstm.precision_of(precision)
    plan, shape = _plan(h)
    if n:
        with on_device_of(grad):
            forward[(triton.cdiv(n, BLOCK),)](
                *lstm.pack(weights, plan, precision),
                *(grad, m, v, h, c, *results, n, *_constants(*settings)),
                **shape,
                BLOCK=BLOCK,
                PRECISION=precision,
                PTX=on_nvidia(),
                APPROXIMATE=approximate,
                **OPTIONS,
            )
    return results


def student_step_in_place(
    tensors: Sequence[Sequence[Tensor]],
    weights: Sequence[Tensor],
    settings: Sequence[float],
    lr: float,
    weight_decay: float,
    precision: str | None,
    approximate: bool,
) -> None:
    """Launch the step in place: once for all tensors that are alike in dtypes and alignment.

    Args:
        tensors: A row (param, grad, m, v, h, c) a parameter, all contiguous: parameters and
            gradients float32, bfloat16 or float16, m and v float32, h and c of (layers, hidden,
            *shape) all float32 or all bfloat16.
        weights: As the operation has them.
        settings: alpha, beta1, beta2, eps.
        lr: Factor on every update.
        weight_decay: A parameter becomes p (1 - lr weight_decay) - lr update.
        precision: As in :func:`student_step`.
        approximate: As in :func:`student_step`.
    """
    _, _, m, _, h, _ = tensors[0]
    alike: dict[tuple[torch.dtype, torch.dtype, bool], list[tuple[int, ...]]] = {}
    for param, grad, *state in tensors:
        if param.numel():
            row = (*(t.data_ptr() for t in (param, grad, *state)), param.numel())
            aligned = all(number % 16 == 0 for number in row)
            alike.setdefault((param.dtype, grad.dtype, aligned), []).append(row)
    precision = lstm.precision_of(precision)
    plan, shape = _plan(h)
    with on_device_of(m):
        packed, low = lstm.pack(weights, plan, precision)
        for (param_dtype, grad_dtype, aligned), rows in alike.items():
            table, first_block, blocks = _table(tuple(rows), m.device, stream_of(m))
            in_place[(blocks,)](
                packed,
                low,
                table,
                first_block,
                len(rows),
                (len(rows) - 1).bit_length(),
                1 - lr * weight_decay,
                lr,
                *_constants(*settings),
                PARAM=_TYPES[param_dtype],
                GRAD=_TYPES[grad_dtype],
                CELLS=_TYPES[h.dtype],
                ALIGNED=aligned,
                **shape,
                BLOCK=BLOCK,
                PRECISION=precision,
                PTX=on_nvidia(),
                APPROXIMATE=approximate,
                **OPTIONS,
            )


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@functools.lru_cache(maxsize=32)
def _table(
    rows: tuple[tuple[int, ...], ...], device: torch.device, stream: int
) -> tuple[Tensor, Tensor, int]:
    """Addresses and sizes on the device, each tensor's first block, and how many blocks there are.

    Kept while tensors stay where they are: a table is a function of its addresses. A stream has its
    own: another one's copy might not have arrived, and would be freed while this one reads it.
    """
    first_block, blocks = [], 0
    for row in rows:
        first_block.append(blocks)
        blocks += triton.cdiv(row[-1], BLOCK)

    def on_device(values: Sequence[object]) -> Tensor:
        tensor = torch.tensor(values)
        if device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(device, non_blocking=True)

    return on_device(rows), on_device(first_block), blocks


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
    blocks = triton.cdiv(n, BACKWARD_BLOCK)
    programs = min(blocks, PROGRAMS_PER_PROCESSOR * processors(grad.device))
    size = plan.places.numel()
    partials = grad.new_empty((programs, size), dtype=torch.float64)
    if n:
        outputs = grad.new_empty((programs, shape["LAYERS"], plan.units, BACKWARD_BLOCK))
        with on_device_of(grad):
            backward[(programs,)](
                *lstm.pack(weights, plan, precision),
                *(grad, m, v, h, c, *grads_out, *results, partials, outputs, n, blocks, size),
                *_constants(*settings),
                **shape,
                BLOCK=BACKWARD_BLOCK,
                PRECISION=precision,
                PTX=on_nvidia(),
                **BACKWARD_OPTIONS,
            )
    return *results, lstm.unpack(partials.sum(0), weights, plan)
