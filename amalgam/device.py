"""Which device a run is on."""

from __future__ import annotations

import os
import re

import torch


def resolve(device: str | torch.device = "auto") -> torch.device:
    """The device that a name stands for, a GPU with its number.

    Args:
        device: ``"auto"`` for a CUDA GPU where PyTorch sees one, else the CPU; ``"cpu"``;
            ``"cuda"`` for this process's GPU, which under ``torchrun`` is the one that its
            ``LOCAL_RANK`` counts, else PyTorch's current one; ``"cuda:1"`` for one by number; or a
            ``torch.device``.

    Raises:
        ValueError: There is no such device, or none is left for this process.
    """
    if isinstance(device, str) and not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:NUMBER', not {device!r}")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = torch.device(("cuda" if gpus else "cpu") if device == "auto" else device)
    if found.type != "cuda":
        return found
    own = str(found) == "cuda"
    index = _own_gpu() if own else found.index
    if index < gpus:
        return torch.device("cuda", index)
    works = ["'auto'", "'cpu'", *(f"'cuda:{number}'" for number in range(gpus))]
    seen = f"PyTorch sees {gpus} CUDA GPU{'s' * (gpus != 1)} here"
    if gpus and own:
        seen += f", and this process has LOCAL_RANK {index}"
        works.remove("'auto'")
    raise ValueError(f"device must be one of {', '.join(works)}, not {str(device)!r}: {seen}")


def _own_gpu() -> int:
    """The number of the GPU that is this process's, whether it is there or not."""
    local = os.environ.get("LOCAL_RANK")
    if local is not None:
        return int(local)
    return torch.cuda.current_device() if torch.cuda.is_available() else 0
