"""Backend ``cuda``: hand-written CUDA kernels in the compiled core."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from amalgam.backends import core
from amalgam.operations.registry import register_backend


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


def place_of(tensor: Tensor) -> dict[str, int]:
    """Where the core is to compute, as its functions take it: device and current stream."""
    return {
        "device": tensor.get_device(),
        "stream": torch.cuda.current_stream(tensor.device).cuda_stream,
    }
