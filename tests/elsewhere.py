"""A second device where there is none: its tensors hold tensors of the CPU, and compute there.

What a GPU would refuse is refused, and all else gives the CPU's own bits: a run on it can be held
against one on the CPU. A :class:`Census` counts what a GPU would be asked to compute, and how often
the host would wait for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

# Of PyTorch's devices the one that takes any operation and whose tensors nothing else makes;
# `skip_init` does, so policies are to be made on the CPU and moved.
ELSEWHERE = torch.device("meta")

_BETWEEN_DEVICES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


_AS_IT_IS = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
    torch.ops.aten._unsafe_view,
    torch.ops.aten.lift_fresh,
}  # what launches nothing, beside views
READS = {
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.equal,
    torch.ops.aten.is_nonzero,
    torch.ops.aten.nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten.repeat_interleave,  # of a tensor of counts
}


class Census:
    """What is asked of the device while it is a mode's.

    Attributes:
        launches: How often each operation was, but for views and memory; an operation with a kernel
            of this package's counts once, whatever its backend asks for.
        waits: Where the host read from the device, or wrote to it and waited, in order.
    """

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.waits: list[str] = []
        self._paused = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing within the block."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    @contextmanager
    def one(self, name: str) -> Iterator[None]:
        """Count what is in the block as one launch."""
        if not self._paused:
            self.launches[name] += 1
        with self.paused():
            yield

    def note(self, func: Any, kwargs: dict[str, Any], from_there: bool, goes_there: bool) -> None:
        """Count a call of an operation."""
        if self._paused:
            return
        packet = func.overloadpacket
        between = func in _BETWEEN_DEVICES and from_there != goes_there
        if packet in READS or (between and not kwargs.get("non_blocking")):
            self.wait(str(packet))
        elif not func.is_view and packet not in _AS_IT_IS:
            self.launches[str(packet).removeprefix("aten.")] += 1

    def wait(self, name: str) -> None:
        """Count a wait; a subclass may refuse it."""
        if not self._paused:
            self.waits.append(name)


_censuses: list[Census] = []


class Elsewhere(TorchDispatchMode):
    """Inside, ELSEWHERE is a device like others.

    Args:
        census: What counts.
    """

    def __init__(self, census: Census | None = None) -> None:
        super().__init__()
        self._census = census

    def __enter__(self) -> Any:
        if self._census is not None:
            _censuses.append(self._census)
        return super().__enter__()

    def __exit__(self, *raised: Any) -> Any:
        if self._census is not None:
            _censuses.remove(self._census)
        return super().__exit__(*raised)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _computed(func, args, kwargs or {})


class _Held(Tensor):
    """A tensor there."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> _Held:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=ELSEWHERE,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _computed(func, args, kwargs or {})

    def tolist(self) -> Any:
        for census in _censuses:
            census.wait("tolist")
        return self.held.tolist()


def _computed(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    from_there = any(isinstance(tensor, _Held) for tensor in tensors)
    asked = kwargs.get("device")
    goes_there = from_there if asked is None else torch.device(asked) == ELSEWHERE
    if from_there or goes_there:
        _refuse(func, tensors, goes_there)
        for census in _censuses:
            census.note(func, kwargs, from_there, goes_there)
    if asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    on_cpu = tree_map_only(_Held, lambda tensor: tensor.held, (args, kwargs))
    out = func(*on_cpu[0], **on_cpu[1])
    if goes_there:
        out = tree_map_only(Tensor, _Held, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if from_there else out


def _refuse(func: Any, tensors: list[Tensor], goes_there: bool) -> None:
    """Raise where a GPU would, for an operation that takes from or gives to the device.

    Where it takes indices of the CPU, and waits for their copy, too.
    """
    if goes_there and torch.Tag.nondeterministic_seeded in func.tags:
        raise AssertionError(f"{func} draws on the device what no generator of the CPU repeats")
    strangers = [tensor for tensor in tensors if not isinstance(tensor, _Held)]
    if torch.Tag.pointwise in func.tags:
        strangers = [tensor for tensor in strangers if tensor.dim()]
    if strangers and len(strangers) < len(tensors) and func not in _BETWEEN_DEVICES:
        shapes = [tuple(tensor.shape) for tensor in strangers]
        raise AssertionError(f"{func} mixes devices: tensors of shapes {shapes} are on the CPU")
