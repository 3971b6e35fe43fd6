"""How each backend computes ``student_step_in_place``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from amalgam.backends import core, cpu, cuda, triton
from amalgam.backends.cuda_weights import pack, pack_nominal
from amalgam.backends.memory import (
    contiguous,
    dense_in_place,
    dtype_name,
)
from amalgam.backends.student_step import run_on_cpu, table_fields
from amalgam.operations.cell_codes import units_of
from amalgam.operations.kept import kept
from amalgam.operations.registry import Numerics
from amalgam.operations.rounding import key_of
from amalgam.operations.student_forms import NOMINAL
from amalgam.operations.student_step import StudentState
from amalgam.operations.student_step_in_place import InPlaceStep
from amalgam.operations.table import addresses, launches
from amalgam.operations.warm_up import warm_up_


@cpu.backend.kernel("student_step_", takes_numerics=True)
def _cpu_student_step_in_place(step: InPlaceStep, *, numerics: Numerics) -> None:
    keep, lr, warm_rate = 1 - step.lr * step.weight_decay, step.lr, 0.0
    if step.control is not None:
        keep, lr, warm_rate, skip = step.control.tolist()
        if skip:
            return
    params, grads, put_back = dense_in_place(step)
    table = _in_place_table(step, params, grads)
    no_step = torch.zeros((), device="cpu")
    keys = [
        key_of(seed, step.steps[i] if step.steps else no_step) for i, seed in enumerate(step.seeds)
    ]
    if keys:
        table[:, _column("key")] = torch.tensor([int(key) for key in keys], device="cpu")
    tensors = step.tensors
    layers, hidden = units_of(tensors.h[0]).shape[:2]
    counts = torch.stack(step.steps).tolist() if step.warmup_steps else []
    warming = {index for index, count in enumerate(counts) if count < step.warmup_steps}
    for index in warming:
        param, grad, m, v = params[index], grads[index], tensors.m[index], tensors.v[index]
        key = keys[index] if keys else None
        warm_up_(param, grad, m, v, step.settings, keep, warm_rate, key, layers * hidden)
    kinds = list(zip(map(_dtype, grads), map(_dtype, params), strict=True))
    rows_of: dict[tuple[torch.dtype, torch.dtype], Sequence[int]] = {kinds[0]: range(len(kinds))}
    if warming or len(set(kinds)) > 1:
        rows_of = {
            kind: [i for i, one in enumerate(kinds) if one == kind and i not in warming]
            for kind in set(kinds)
        }
    for (grad_dtype, param_dtype), rows in rows_of.items():
        run_on_cpu(
            table if len(rows) == len(table) else table[list(rows)],
            step.weights,
            step.settings,
            grad=grad_dtype,
            moments=tensors.m[0].dtype,
            cells=tensors.h[0].dtype,
            out=param_dtype,
            in_place=True,
            keep=keep,
            lr=lr,
            stochastic=bool(keys),
            bfloat16=numerics.precision == "bf16",
            approximate=numerics.approximate,
        )
    put_back()


def _in_place_table(step: InPlaceStep, params: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """A row for each parameter, of ``table_fields()``; kept with the tensors until one moves."""
    tensors, moving = step.tensors, {"grad": addresses(grads)}
    if params is not tensors.params:
        moving["out"] = addresses(params)  # copies
    if "cpu" not in tensors.made:
        columns = {name: addresses(getattr(tensors, name)) for name in StudentState._fields}
        columns |= {f"new_{name}": column for name, column in columns.items()}
        sizes = [param.numel() for param in params]
        columns |= {"numel": sizes, "stride": sizes, "index": list(range(len(params)))}
        columns["out"] = addresses(params)
        empty = [0] * len(params)
        values = [columns.get(name, empty) for name in table_fields()]
        with torch.inference_mode(False):  # steps outside it write to the table, too
            tensors.made["cpu"] = torch.tensor(values, device="cpu").T.contiguous(), {}
    table: Tensor
    table, written = tensors.made["cpu"]
    if written != moving:
        tensors.made["cpu"] = table, {}  # until all is written
        for name, column in moving.items():
            table[:, _column(name)] = torch.tensor(column, device="cpu")
        tensors.made["cpu"] = table, moving
    return table


_dtype = attrgetter("dtype")


@functools.cache
def _column(name: str) -> int:
    return table_fields().index(name)


SPLIT = "3xtf32"


STORED = frozenset({torch.float32, torch.bfloat16, torch.float16})


@functools.cache
def _blocks(nominal: bool) -> dict[tuple[int, int], int]:
    """How many coordinates a block takes, by layers and units of the students compiled in."""
    blocks: dict[tuple[int, int], int] = core.core().cuda.student_step_blocks(nominal=nominal)
    return blocks


def _accepts(step: InPlaceStep, *, numerics: Numerics) -> str | None:
    if step.tensors.h[0].dtype == torch.int8:
        return (
            "it keeps cells in float32, float64 or bfloat16, these are int8; "
            "backend='triton' computes any"
        )
    nominal = step.settings.form is NOMINAL
    layers, hidden = step.tensors.h[0].shape[:2]
    if (layers, hidden) not in _blocks(nominal):
        sizes = ", ".join(f"{layers}x{hidden}" for layers, hidden in sorted(_blocks(nominal)))
        return (
            f"it has kernels for students of {sizes} (layers x units) of the form "
            f"{step.settings.form.name}, this one is {layers}x{hidden}; backend='triton' computes "
            "any"
        )
    moments, cells = step.tensors.m[0].dtype, step.tensors.h[0].dtype
    if moments != (cells if nominal else torch.float32):
        alike = "as the cells" if nominal else "in float32"
        return (
            f"of the form {step.settings.form.name} it keeps moments {alike}, these are {moments} "
            f"beside cells of {cells}; backend='triton' computes either"
        )
    if numerics.precision == "ieee" and _words(nominal, layers, hidden, SPLIT):
        return (
            f"its kernels for students of {layers}x{hidden} compute products on tensor cores, "
            "backend='triton:ieee' does not; without 'ieee' it errs no more than float32 may"
        )
    stored = {tensor.dtype for tensor in (*step.tensors.params, *step.grads)}
    if strange := stored - STORED:
        return f"it reads and writes float32, bfloat16 and float16, not {strange.pop()}"
    return None


@cuda.backend.kernel(
    "student_step_", dtypes=frozenset({torch.float32}), takes_numerics=True, accepts=_accepts
)
def _cuda_student_step_in_place(step: InPlaceStep, *, numerics: Numerics) -> None:
    tensors, control = step.tensors, step.control
    weights, corrections = contiguous(step.weights), step.settings.corrections
    nominal = corrections is not None
    held = contiguous([] if corrections is None else [corrections])
    params, grads, put_back = dense_in_place(step)
    moments, cells = tensors.m[0], tensors.h[0]
    layers, hidden = cells.shape[:2]
    device = cells.device
    with torch.cuda.device(device):
        block = _blocks(nominal)[layers, hidden]
        kind = functools.partial(_kind, nominal)
        for launch in launches(step, params, grads, block, kind, "cuda"):
            param_dtype, grad_dtype, aligned = launch.kind
            how = _numerics_of(nominal, layers, hidden, cells.dtype, aligned, numerics)
            packed = _packed(weights, nominal, hidden, how)
            core.core().cuda.student_step_in_place(
                weights=packed.data_ptr(),
                biases=weights[2].data_ptr() if nominal else 0,
                corrections=held[0].data_ptr() if nominal else 0,
                places=launch.places.data_ptr() if nominal else 0,
                table=launch.table.data_ptr(),
                first_block=launch.first_block.data_ptr(),
                control=0 if control is None else control.data_ptr(),
                count=launch.tensors,
                blocks=launch.blocks,
                nominal=nominal,
                layers=layers,
                hidden=hidden,
                constants=step.settings.constants,
                param=dtype_name(param_dtype),
                grad=dtype_name(grad_dtype),
                moments=dtype_name(moments),
                cells=dtype_name(cells),
                keep=1 - step.lr * step.weight_decay,
                lr=step.lr,
                warmup_steps=step.warmup_steps,
                stochastic=bool(step.seeds),
                aligned=aligned,
                products=how.precision,
                approximate=how.approximate,
                **cuda.place_of(cells),
            )
    put_back()


def _kind(nominal: bool, row: Sequence[Tensor]) -> tuple[torch.dtype, torch.dtype, bool]:
    """What tensors of one launch have in common: two dtypes, and whether rows are aligned.

    Of tensor cores' kernels alone, where rows of h and c begin at multiples of 16 bytes; the others
    look for themselves.
    """
    param, grad, _, _, h, c = row
    layers, hidden = h.shape[:2]
    if not _words(nominal, layers, hidden, SPLIT):
        return param.dtype, grad.dtype, False
    row_bytes = param.numel() * h.element_size()
    aligned = (h.data_ptr() | c.data_ptr() | row_bytes) % 16 == 0
    return param.dtype, grad.dtype, aligned


@functools.cache
def _words(nominal: bool, layers: int, hidden: int, products: str) -> int:
    """How many words the weights for tensor cores take; none where kernels use none."""
    if nominal:
        return 0
    words: int = core.core().cuda.packed_student_words(layers, hidden, products)
    return words


def _numerics_of(
    nominal: bool,
    layers: int,
    hidden: int,
    cells: torch.dtype,
    aligned: bool,
    permitted: Numerics,
) -> Numerics:
    """What the kernel makes of what is permitted: it is used where it makes a step faster."""
    if not _words(nominal, layers, hidden, SPLIT):
        return Numerics(SPLIT, permitted.approximate)
    if permitted.precision in (None, SPLIT) or not aligned:
        return Numerics(SPLIT, False)
    if cells == torch.bfloat16:
        return permitted if permitted == Numerics("bf16", True) else Numerics("tf32", False)
    return Numerics("tf32", permitted.approximate)


def _packed(weights: Sequence[Tensor], nominal: bool, hidden: int, how: Numerics) -> Tensor:
    """The weights as csrc/cuda/student_step.h has them, from before where their owner keeps it."""
    key = "student_step_", weights[0].device, *how
    if nominal:  # whose first bias, a tensor's own, is another in every step
        shared = [*weights[:2], *weights[3:]]
        return kept(key, shared, lambda: (pack_nominal(shared, how.approximate),))[0]
    layers = len(weights) // 3
    words = _words(nominal, layers, hidden, how.precision)
    if not words:
        return kept(key, weights, lambda: (pack(weights, how.approximate),))[0]
    return kept(key, weights, lambda: (_pack_for_tensor_cores(weights, words, how),))[0]


def _pack_for_tensor_cores(weights: Sequence[Tensor], words: int, how: Numerics) -> Tensor:
    packed = weights[0].new_empty(words, dtype=torch.int32)
    core.core().cuda.pack_student(
        addresses(weights),
        packed.data_ptr(),
        layers=len(weights) // 3,
        products=how.precision,
        approximate=how.approximate,
        **cuda.place_of(weights[0]),
    )
    return packed


@triton.backend.kernel("student_step_", dtypes=triton.SINGLE, takes_numerics=True)
def _triton_student_step_in_place(step: InPlaceStep, *, numerics: Numerics) -> None:
    from amalgam.kernels import student_step_in_place as kernels

    params, grads, put_back = dense_in_place(step)
    step = step._replace(weights=contiguous(step.weights))
    kernels.student_step_in_place(step, params, grads, *numerics)
    put_back()
