"""Checks of the operations' arguments, made once: by the operation itself, before any backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import add, attrgetter, gt

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless this is a tensor of a floating-point dtype."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = getattr(tensor, "dtype", type(tensor).__name__)
        raise TypeError(f"{name} must be a floating-point tensor, not {kind}")


def check_all_floating(name: str, tensors: Sequence[Tensor]) -> None:
    """:func:`check_floating` of each, at once where they are many."""
    plain = {Tensor, nn.Parameter}.issuperset(map(type, tensors))
    if not (plain and all(map(Tensor.is_floating_point, tensors))):
        for tensor in tensors:
            check_floating(name, tensor)


def check_like(name: str, tensor: Tensor, shape: Sequence[int], like: Tensor) -> None:
    """Raise ValueError unless a tensor is dense, of this shape, and of another's dtype and device.

    Args:
        name: What to call it in errors.
        tensor: The tensor.
        shape: The shape that it must have.
        like: The tensor whose dtype and device it must have.
    """
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, not {tuple(tensor.shape)}")
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise ValueError(
            f"{name} must be {like.dtype} on {like.device}, not {tensor.dtype} on {tensor.device}"
        )
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, not {tensor.layout}")


def check_distinct(what: str, tensors: Sequence[Tensor], name_of: Callable[[int], str]) -> None:
    """Refuse tensors to be written to that have memory in common.

    Args:
        what: What to call all of them in errors.
        tensors: The tensors.
        name_of: What to call one of them, by its place.

    Raises:
        ValueError: Two of them do, or one's elements; threads would write to it at once.
    """
    found = overlap(tensors)
    if found is None:
        return
    one, other = map(name_of, found)
    itself = found[0] == found[1]
    how = f"{one} is expanded, or overlaps itself" if itself else f"{one} and {other} do"
    raise ValueError(f"{what} must not share memory: each place may be written once, but {how}")


def overlap(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """Two tensors that have memory in common, by their places, or twice one whose elements have.

    Those without memory, empty or on the meta device, have none in common.
    """
    begins = list(map(Tensor.data_ptr, tensors))
    if not all(begins):
        filled = [index for index, begin in enumerate(begins) if begin]
        found = overlap([tensors[index] for index in filled]) if filled else None
        return None if found is None else (filled[found[0]], filled[found[1]])
    dense = all(map(Tensor.is_contiguous, tensors))
    ends = list(map(add, begins, map(_nbytes if dense else _reach, tensors)))
    # Stretches lie apart where, in order, each ends before the next begins.
    if dense and not any(map(gt, sorted(ends), sorted(begins)[1:])):
        return None
    cluster: list[int] = []
    for index in sorted(range(len(tensors)), key=begins.__getitem__):
        if cluster and begins[index] >= max(ends[each] for each in cluster):
            if found := _in_cluster(tensors, cluster):
                return found
            cluster = []
        cluster.append(index)
    return _in_cluster(tensors, cluster) if cluster else None


_nbytes = attrgetter("nbytes")


def _reach(tensor: Tensor) -> int:
    """Bytes from the first of a tensor that has elements to its last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in steps)) * tensor.element_size()


def _in_cluster(tensors: Sequence[Tensor], cluster: Sequence[int]) -> tuple[int, int] | None:
    """:func:`overlap` of tensors whose stretches of memory meet; they are ordered by address.

    Each writes numbers of its own where its elements lie, in a map of the memory, and reads them.
    """
    if len(cluster) == 1 and _surely_apart(tensors[cluster[0]]):
        return None
    base = tensors[cluster[0]].data_ptr()
    sizes = [tensors[index].element_size() for index in cluster]
    offsets = [tensors[index].data_ptr() - base for index in cluster]
    unit = math.gcd(*sizes, *offsets)
    end = max(at + _reach(tensors[index]) for at, index in zip(offsets, cluster, strict=True))
    memory = torch.zeros(end // unit, dtype=torch.int64, device="cpu")
    written, first = [], 0
    for index, size, at in zip(cluster, sizes, offsets, strict=True):
        shape, strides, units = tensors[index].shape, tensors[index].stride(), size // unit
        if any(stride == 0 and size > 1 for size, stride in zip(shape, strides, strict=True)):
            return index, index
        strides = (*(stride * units for stride in strides), 1)
        place = memory.as_strided((*shape, units), strides, at // unit)
        numbers = torch.arange(first, first + place.numel(), device="cpu").view(place.shape)
        place.copy_(numbers)
        written.append((index, place, numbers))
        first += place.numel()
    for index, place, numbers in written:
        if not torch.equal(place, numbers):
            number = place[place != numbers][0]
            return index, next(other for other, _, own in written if number <= own.max())
    return None


def _surely_apart(tensor: Tensor) -> bool:
    """Whether each stride steps over all that smaller ones reach, as those of permutations do."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return False
        reach += (size - 1) * stride
    return True


def hollow(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and no numbers: on the meta device, or a fake one.

    Other subclasses of tensors may say that they are on the meta device, and have numbers.
    """
    if isinstance(tensor, FakeTensor):
        return True
    return tensor.is_meta and type(tensor) in (Tensor, nn.Parameter)
