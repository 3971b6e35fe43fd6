"""Backend ``cuda``: hand-written CUDA kernels in the compiled core."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from amalgam.backends import core
from amalgam.backends.pointers import checked, dtype_name
from amalgam.ops.registry import register_backend

NO_HUBER = -1.0


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
    student = checked("student", student, (n,), student)
    teachers = checked("teachers", teachers, (k, n), student)
    module, dtype = core.core().cuda, dtype_name(student)
    distances, totals = student.new_empty(k), student.new_empty(k)
    count = getattr(module, f"teacher_distance_partials_{dtype}")(n)
    partials = student.new_empty((k, count), dtype=torch.float64)
    with torch.cuda.device(student.device):
        getattr(module, f"teacher_distance_{dtype}")(
            student.data_ptr(),
            teachers.data_ptr(),
            distances.data_ptr(),
            totals.data_ptr(),
            partials.data_ptr(),
            n=n,
            k=k,
            eps=eps,
            huber_delta=NO_HUBER if huber_delta is None else huber_delta,
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
    student = checked("student", student, (n,), student)
    teachers = checked("teachers", teachers, (k, n), student)
    grad = checked("grad", grad, (k,), student)
    total = checked("total", total, (k,), student)
    in_student = student.new_empty(n)
    in_teachers = student.new_empty((k, n) if need_teachers else (0,))
    function = getattr(core.core().cuda, f"teacher_distance_backward_{dtype_name(student)}")
    with torch.cuda.device(student.device):
        function(
            grad.data_ptr(),
            student.data_ptr(),
            teachers.data_ptr(),
            total.data_ptr(),
            in_student.data_ptr(),
            in_teachers.data_ptr() if need_teachers else 0,
            n=n,
            k=k,
            eps=eps,
            huber_delta=NO_HUBER if huber_delta is None else huber_delta,
            device=student.get_device(),
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return in_student, in_teachers
