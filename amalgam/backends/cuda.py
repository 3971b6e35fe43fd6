"""Backend ``cuda``: hand-written CUDA kernels in the compiled core."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from amalgam.backends import core
from amalgam.backends.memory import contiguous, dense_in_place, dtype_name
from amalgam.operations.kept import kept
from amalgam.operations.registry import Numerics, register_backend
from amalgam.operations.student_step_in_place import InPlaceStep
from amalgam.operations.table import addresses, launches

SPLIT = "3xtf32"
STORED = frozenset({torch.float32, torch.bfloat16, torch.float16})


@functools.cache
def _probe() -> str | None:
    module, problem = core.load()
    if module is None:
        return problem
    if module.cuda is None:
        return core.NO_CUDA
    try:
        count = module.cuda.device_count()
    except RuntimeError as error:
        return f"no CUDA GPU that works here ({error}); it needs an NVIDIA GPU and its driver"
    if count == 0:
        return "this machine has no CUDA GPU, or CUDA_VISIBLE_DEVICES hides it"
    if not torch.cuda.is_available():
        return (
            f"this PyTorch ({torch.__version__}) can't use the GPU that is here; install a CUDA "
            "build of PyTorch"
        )
    oldest = min(int(arch) for arch in module.cuda.archs.split(";"))
    capabilities = [torch.cuda.get_device_capability(index) for index in range(count)]
    too_old = [major * 10 + minor for major, minor in capabilities if major * 10 + minor < oldest]
    if too_old:
        return (
            f"its kernels are built for sm_{module.cuda.archs}, a GPU here is sm_{min(too_old)}; "
            f"reinstall with AMALGAM_CUDA_ARCHS={min(too_old)}"
        )
    return None


backend = register_backend(
    "cuda",
    rank=30,
    devices=frozenset({"cuda"}),
    probe=_probe,
    about="hand-written CUDA kernels in the compiled core, on NVIDIA GPUs",
)


@backend.kernel("teacher_distance")
def _teacher_distance(
    student: Tensor, teachers: Tensor, eps: float, huber_delta: float | None
) -> tuple[Tensor, Tensor]:
    k, n = teachers.shape
    student, teachers = contiguous((student, teachers))
    module, dtype = core.core().cuda, dtype_name(student)
    distances, totals = student.new_empty(k), student.new_empty(k)
    count = getattr(module, f"teacher_distance_partials_{dtype}")(n)
    partials = student.new_empty((k, count), dtype=torch.float64)
    with torch.cuda.device(student.device):
        getattr(module, f"teacher_distance_{dtype}")(
            *addresses((student, teachers, distances, totals, partials)),
            n=n,
            k=k,
            eps=eps,
            huber_delta=core.NO_HUBER if huber_delta is None else huber_delta,
            device=student.get_device(),
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return distances, totals


@backend.kernel("teacher_distance_backward")
def _teacher_distance_backward(
    grad: Tensor,
    student: Tensor,
    teachers: Tensor,
    total: Tensor,
    eps: float,
    huber_delta: float | None,
    need_teachers: bool,
) -> tuple[Tensor, Tensor]:
    k, n = teachers.shape
    grad, student, teachers, total = contiguous((grad, student, teachers, total))
    in_student = student.new_empty(n)
    in_teachers = student.new_empty((k, n) if need_teachers else (0,))
    function = getattr(core.core().cuda, f"teacher_distance_backward_{dtype_name(student)}")
    with torch.cuda.device(student.device):
        function(
            *addresses((grad, student, teachers, total, in_student)),
            in_teachers.data_ptr() if need_teachers else 0,
            n=n,
            k=k,
            eps=eps,
            huber_delta=core.NO_HUBER if huber_delta is None else huber_delta,
            device=student.get_device(),
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return in_student, in_teachers


@functools.cache
def _blocks() -> dict[tuple[int, int], int]:
    """How many coordinates a block takes, by layers and units of the students compiled in."""
    blocks: dict[tuple[int, int], int] = core.core().cuda.student_step_blocks()
    return blocks


def _accepts(step: InPlaceStep, *, numerics: Numerics) -> str | None:
    layers, hidden = step.tensors.h[0].shape[:2]
    if (layers, hidden) not in _blocks():
        sizes = ", ".join(f"{layers}x{hidden}" for layers, hidden in sorted(_blocks()))
        return (
            f"it has kernels for students of {sizes} (layers x units), this one is "
            f"{layers}x{hidden}; backend='triton' computes any"
        )
    if numerics.precision == "ieee" and _words(layers, hidden, SPLIT):
        return (
            f"its kernels for students of {layers}x{hidden} compute products on tensor cores, "
            "backend='triton:ieee' does not; without 'ieee' it errs no more than float32 may"
        )
    stored = {tensor.dtype for tensor in (*step.tensors.params, *step.grads)}
    if strange := stored - STORED:
        return f"it reads and writes float32, bfloat16 and float16, not {strange.pop()}"
    return None


@backend.kernel(
    "student_step_", dtypes=frozenset({torch.float32}), takes_numerics=True, accepts=_accepts
)
def _student_step_in_place(step: InPlaceStep, *, numerics: Numerics) -> None:
    tensors, control = step.tensors, step.control
    weights = contiguous(step.weights)
    params, grads, put_back = dense_in_place(step)
    cells = tensors.h[0]
    layers, hidden = cells.shape[:2]
    device = cells.device
    with torch.cuda.device(device):
        block = _blocks()[layers, hidden]
        for launch in launches(step, params, grads, block, _kind, "cuda"):
            param_dtype, grad_dtype, aligned = launch.kind
            how = _numerics_of(layers, hidden, cells.dtype, aligned, numerics)
            packed = _packed(weights, hidden, how)
            core.core().cuda.student_step_in_place(
                weights=packed.data_ptr(),
                table=launch.table.data_ptr(),
                first_block=launch.first_block.data_ptr(),
                control=0 if control is None else control.data_ptr(),
                count=launch.tensors,
                blocks=launch.blocks,
                layers=layers,
                hidden=hidden,
                constants=step.settings,
                param=dtype_name(param_dtype),
                grad=dtype_name(grad_dtype),
                cells=dtype_name(cells),
                keep=1 - step.lr * step.weight_decay,
                lr=step.lr,
                warmup_steps=step.warmup_steps,
                stochastic=bool(step.seeds),
                aligned=aligned,
                products=how.precision,
                approximate=how.approximate,
                device=cells.get_device(),
                stream=torch.cuda.current_stream().cuda_stream,
            )
    put_back()


def _kind(row: Sequence[Tensor]) -> tuple[torch.dtype, torch.dtype, bool]:
    """What tensors of one launch have in common: two dtypes, and whether rows are aligned.

    Of tensor cores' kernels alone, where rows of h and c begin at multiples of 16 bytes; the others
    look for themselves.
    """
    param, grad, _, _, h, c = row
    layers, hidden = h.shape[:2]
    if not _words(layers, hidden, SPLIT):
        return param.dtype, grad.dtype, False
    row_bytes = param.numel() * h.element_size()
    aligned = (h.data_ptr() | c.data_ptr() | row_bytes) % 16 == 0
    return param.dtype, grad.dtype, aligned


@functools.cache
def _words(layers: int, hidden: int, products: str) -> int:
    """How many words the weights for tensor cores take; none where kernels use none."""
    words: int = core.core().cuda.packed_student_words(layers, hidden, products)
    return words


def _numerics_of(
    layers: int, hidden: int, cells: torch.dtype, aligned: bool, permitted: Numerics
) -> Numerics:
    """What the kernel makes of what is permitted: it is used where it makes a step faster."""
    if not _words(layers, hidden, SPLIT):
        return Numerics(SPLIT, permitted.approximate)
    if permitted.precision in (None, SPLIT) or not aligned:
        return Numerics(SPLIT, False)
    if cells == torch.bfloat16:
        return permitted if permitted == Numerics("bf16", True) else Numerics("tf32", False)
    return Numerics("tf32", permitted.approximate)


def _packed(weights: Sequence[Tensor], hidden: int, how: Numerics) -> Tensor:
    """The weights as csrc/cuda/student_step.h has them, from before where their owner keeps it."""
    layers = len(weights) // 3
    words = _words(layers, hidden, how.precision)
    pack = _pack_for_tensor_cores if words else _pack
    key = "student_step_", weights[0].device, *how
    return kept(key, weights, lambda: (pack(weights, hidden, how),))[0]


def _pack_for_tensor_cores(weights: Sequence[Tensor], hidden: int, how: Numerics) -> Tensor:
    layers = len(weights) // 3
    packed = weights[0].new_empty(_words(layers, hidden, how.precision), dtype=torch.int32)
    core.core().cuda.pack_student(
        addresses(weights),
        packed.data_ptr(),
        layers=layers,
        products=how.precision,
        approximate=how.approximate,
        device=weights[0].get_device(),
        stream=torch.cuda.current_stream().cuda_stream,
    )
    return packed


def _pack(weights: Sequence[Tensor], hidden: int, how: Numerics) -> Tensor:
    # What activations would multiply their sums by: see csrc/cuda/activations.cuh.
    of_sigmoid, of_tanh = -math.log2(math.e), 2 * math.log2(math.e)
    if how.approximate:
        of_sigmoid, of_tanh = 0.5, 1.0
    parts = []
    for w_ih, w_hh, b in zip(weights[0:-2:3], weights[1:-2:3], weights[2:-2:3], strict=True):
        gates = torch.cat((b[:, None], w_ih, w_hh), 1).double().chunk(4)
        scales = (of_sigmoid, of_sigmoid, of_tanh, of_sigmoid)
        scaled = [scale * gate for scale, gate in zip(scales, gates, strict=True)]
        parts.append(torch.stack(scaled, -1).flatten())  # (hidden, 1 + inputs + hidden, 4)
    flat = torch.cat([*parts, *(part.double().flatten() for part in weights[-2:])])
    return torch.nn.functional.pad(flat, (0, -len(flat) % 4)).float()
