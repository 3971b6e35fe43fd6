"""What backends make of weights that stay as they are, kept from call to call by their owner."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextvars import ContextVar, Token
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Entry(NamedTuple):
    stamp: list[tuple[int, int]]
    weights: list[Tensor]  # as long as it lies here, no other tensor has its address
    made: tuple[Tensor, ...]


class Kept:
    """A context in which operations keep what they make of their weights alone, as packed copies.

    For one list of weights at a time, by its owner, who must not write to them behind PyTorch's
    back (``weight.data.add_(1)``): a change that it counts, and other memory in a tensor's place,
    have the copies made anew. Copies of this object, and pickled ones, begin empty.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, _Entry] = {}
        self._tokens: list[Token[Kept | None]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def __enter__(self) -> None:
        self._tokens.append(_current.set(self))

    def __exit__(self, *_: object) -> None:
        _current.reset(self._tokens.pop())

    def get(
        self, key: Hashable, weights: Sequence[Tensor], make: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """What was made of these weights before, or is now; as :func:`kept` has it."""
        stamp = [(weight.data_ptr(), weight._version) for weight in weights]
        entry = self._entries.get(key)
        if entry is not None and entry.stamp == stamp:
            return entry.made
        return self._anew(key, stamp, weights, make)

    def _anew(
        self,
        key: Hashable,
        stamp: list[tuple[int, int]],
        weights: Sequence[Tensor],
        make: Callable[[], tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        entry = self._entries.get(key)
        on_cuda = weights[0].is_cuda
        if on_cuda and torch.cuda.is_current_stream_capturing():
            return make()  # in the graph's memory, and not before it is replayed
        with torch.inference_mode(False), torch.no_grad():
            made = make()
            if entry is not None:  # whose memory graphs may read
                for old, new in zip(entry.made, made, strict=True):
                    old.copy_(new)
                made = entry.made
            held = [weight.detach() for weight in weights]
        if on_cuda:  # another stream's next step reads it
            torch.cuda.current_stream(weights[0].device).synchronize()
        self._entries[key] = _Entry(stamp, held, made)
        return made


class KeptOfOneStream(Kept):
    """Kept by who takes all steps on one stream; in a graph that is captured, all or none of them.

    So nothing waits for another stream, and what is made inside a capture is kept as well.
    """

    def _anew(
        self,
        key: Hashable,
        stamp: list[tuple[int, int]],
        weights: Sequence[Tensor],
        make: Callable[[], tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        made = make()
        self._entries[key] = _Entry(stamp, [weight.detach() for weight in weights], made)
        return made


_current: ContextVar[Kept | None] = ContextVar("kept", default=None)


def owner() -> Kept | None:
    """The owner whose step runs; ``None`` where no owner called the operation."""
    return _current.get()


def kept(
    key: Hashable, weights: Sequence[Tensor], make: Callable[[], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """What an operation makes of weights, from before if its caller has it kept.

    Args:
        key: Tells apart what is made of the same weights.
        weights: What it depends on beside.
        make: Makes it, always of the same shapes for a key.
    """
    owner = _current.get()
    # Of inference tensors, PyTorch counts no changes.
    if owner is None or any(weight.is_inference() for weight in weights):
        return make()
    return owner.get(key, weights, make)
