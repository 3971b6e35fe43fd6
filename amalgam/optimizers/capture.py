"""What an optimizer may not do while a CUDA graph captures its step."""

from __future__ import annotations

import torch


def capturing() -> bool:
    """Whether a CUDA graph captures what the current stream is given."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def check_before_capture() -> None:
    """Refuse to have a graph make state: every replay would make it anew."""
    if capturing():
        raise RuntimeError(
            "take a step with every parameter's gradient before capturing one in a CUDA graph, "
            "which would reset at every replay what its first step makes"
        )
