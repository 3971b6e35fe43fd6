"""Weight norm whose second derivatives are right.

Those of PyTorch's fused one are not, of 2.13 too: ``torch.autograd.gradgradcheck`` refuses it. Here
it is what its definition says, v g / ||v||, an operation after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@contextmanager
def plain(kernels: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Inside, weight norm is plain, and kernels are these."""
    with kernels(), Plain():
        yield


class Plain(TorchFunctionMode):
    """Inside, weight norm is plain; what intercepts every call is for those that have it.

    Attributes:
        taken: How often weights were normed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.taken = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch._weight_norm:
            self.taken += 1
            func = _normed
        return func(*args, **(kwargs or {}))


def _normed(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """As ``torch._weight_norm``, to which a dimension of -1 means the norm of all of v."""
    others = [at for at in range(v.dim()) if at != dim]
    squares = v.square()
    of_each = squares.sum() if dim == -1 else squares.sum(others, keepdim=True)
    return v * (g / of_each.sqrt())
