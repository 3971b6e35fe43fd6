"""The student's step in place, by one launch for tensors that are alike.

Formulas: amalgam/operations/student_step.py; the table of tensors: amalgam/operations/table.py.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from amalgam.kernels.configurations import configuration
from amalgam.kernels.launch import on_device_of, on_nvidia, wide
from amalgam.kernels.rounding import key_of, random_bits
from amalgam.kernels.student_forms import fresh_moments
from amalgam.kernels.student_network import (
    constants_of,
    packed_for_step,
    plan_of,
    precision_of,
    step_of_block,
    store_moments,
    stored,
    tensor_of,
)
from amalgam.operations import table
from amalgam.operations.cell_codes import units_of
from amalgam.operations.student_forms import NOMINAL
from amalgam.operations.student_step_in_place import InPlaceStep

COLUMNS = tl.constexpr(table.COLUMNS)
_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
}


@triton.jit(
    do_not_specialize=["count", "depth", "warmup_steps"],
    do_not_specialize_on_alignment=[
        "table",
        "first_block",
        "places",
        "biases",
        "corrections",
        "control",
    ],
)
def in_place(
    packed,
    other,
    table,  # (count, COLUMNS) int64, as amalgam/operations/table.py has it
    first_block,  # (count,) int64: the first block of each tensor
    places,  # of NOMINAL: (count,) int64: each tensor's place among biases and corrections
    biases,  # of NOMINAL: (tensors, 4 HIDDEN)
    corrections,  # of NOMINAL: (tensors, 3)
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
    MOMENTS: tl.constexpr,
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
    NOMINAL: tl.constexpr,
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
    tensor = tensor_of(first_block, count, depth, block)
    entry = table + tensor.to(tl.int64) * COLUMNS
    param = tl.load(entry).to(tl.pointer_type(PARAM))
    grad = tl.load(entry + 1).to(tl.pointer_type(GRAD))
    m = tl.load(entry + 2).to(tl.pointer_type(MOMENTS))
    v = tl.load(entry + 3).to(tl.pointer_type(MOMENTS))
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
            old_m = tl.load(m + at, mask=inside, other=0.0).to(tl.float32)
            old_v = tl.load(v + at, mask=inside, other=1.0).to(tl.float32)
            fresh_m, fresh_v = fresh_moments(
                g, old_m, old_v, beta1, beta2, one_minus_beta1, one_minus_beta2
            )
            store_moments(m, v, fresh_m, fresh_v, at, inside, key, LAYERS * HIDDEN, STOCHASTIC)
            moved = tl.fma(keep, old, -tl.load(control + 2).to(tl.float32) * g)
            tl.store(param + at, stored(moved, bits, PARAM, STOCHASTIC), mask=inside)
            return
    bias = biases
    correction1 = 1.0
    correction2 = 1.0
    pace = 1.0
    if NOMINAL:
        place = tl.load(places + tensor)
        bias += place * (4 * HIDDEN)
        correction1 = tl.load(corrections + 3 * place)
        correction2 = tl.load(corrections + 3 * place + 1)
        pace = tl.load(corrections + 3 * place + 2)
    update, fresh_v = step_of_block(
        packed, other, g, inside, at, n, m, v, h, c, m, v, h, c, key,
        bias, correction1, correction2,
        alpha * pace, beta1, beta2, one_minus_beta1, one_minus_beta2, eps,
        LAYERS, HIDDEN, FEATURES, UNITS, FOLDED, NOMINAL,
        BLOCK, PRECISION, PTX, APPROXIMATE, STOCHASTIC,
    )  # fmt: skip
    if not NOMINAL:  # of which this is the formula's
        update = tl.where(fresh_v == 0.0, 0.0, update)
    moved = tl.fma(keep, old, -lr * update)
    tl.store(param + at, stored(moved, bits, PARAM, STOCHASTIC), mask=inside)


def student_step_in_place(
    step: InPlaceStep,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    precision: str | None,
    approximate: bool,
) -> None:
    """Launch the step in place: once for all tensors that are alike in dtypes and alignment.

    Args:
        step: The step; parameters and gradients are float32, bfloat16 or float16; m and v, and h
            and c, all float32 or all bfloat16, or h and c codes; weights contiguous.
        params: Its parameters, contiguous.
        grads: Its gradients, contiguous.
        precision: As in :func:`amalgam.kernels.student_step.student_step`.
        approximate: Likewise.
    """
    m, h, control = step.tensors.m[0], units_of(step.tensors.h[0]), step.control
    keep = 1 - step.lr * step.weight_decay
    if control is None and step.seeds:
        control = m.new_tensor((keep, step.lr, 0, 0), dtype=torch.float64)
    if control is not None and not step.steps:
        step = step._replace(steps=[m.new_zeros((), dtype=torch.float32)] * len(params))
    settings, form = step.settings, step.settings.form
    precision = precision_of(precision, h, form)
    plan, shape = plan_of(h, form, precision)
    own: tuple[Tensor | None, Tensor | None] = None, None
    if settings.corrections is not None:
        own = step.weights[2], settings.corrections.contiguous()
    # Codes need all units of a coordinate at once: of eight coordinates a thread has no room.
    coded = step.tensors.h[0].dtype == torch.int8
    eight_a_thread = form is NOMINAL and not coded
    chosen = configuration("student_step_", h.shape[0], h.shape[1], precision, eight_a_thread)
    with on_device_of(m):
        packed, other = packed_for_step(step.weights, form, plan, precision, approximate)
        for launch in table.launches(step, params, grads, chosen.block, _kind, "triton"):
            param_dtype, grad_dtype, aligned, is_wide = launch.kind
            in_place[(launch.blocks,)](
                packed,
                other,
                launch.table,
                launch.first_block,
                launch.places if form is NOMINAL else None,
                *own,
                launch.tensors,
                (launch.tensors - 1).bit_length(),
                control,
                step.warmup_steps,
                keep,
                step.lr,
                *constants_of(settings),
                PARAM=_TYPES[param_dtype],
                GRAD=_TYPES[grad_dtype],
                MOMENTS=_TYPES[m.dtype],
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
