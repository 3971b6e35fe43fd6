"""Random numbers by purpose: each use gets a generator of its own, derived from the run's seed.

A use that is repeated (after a resume, say) sees the same numbers whatever ran before it, so no
generator's state ever has to be saved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from amalgam.device import put


def generator_for(seed: int, *path: str | int) -> torch.Generator:
    """A CPU generator for the purpose that ``path`` names, such as ``("episode", 3)``."""
    digest = hashlib.blake2b(repr((seed, *path)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def normal_like(
    like: Tensor, generator: torch.Generator, shape: Sequence[int] | None = None
) -> Tensor:
    """Standard normal numbers, the same on every device: drawn where the generator is, and moved.

    Args:
        like: Whose dtype and device they are of.
        generator: Where they come from.
        shape: Their shape; ``like``'s where absent.
    """
    drawn = torch.randn(
        like.shape if shape is None else shape,
        generator=generator,
        dtype=like.dtype,
        device=generator.device,
    )
    return put(drawn, like.device)


@contextmanager
def drawing(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's global generators draw by a seed; afterwards they are as they were before.

    Dropout takes its numbers from these, and so does all else that draws without a generator of its
    own.

    Args:
        seed: The seed, from 0 to 2^64 - 1.
        device: The device whose global generator is meant, beside the CPU's.
    """
    on_gpu = device.type == "cuda"
    index = torch.cuda.current_device() if on_gpu and device.index is None else device.index
    with torch.random.fork_rng(devices=[index] if on_gpu else []):
        # torch.manual_seed would seed every GPU, too.
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


def global_states(device: torch.device) -> list[Tensor]:
    """The states of torch's global generators, of the CPU's and of a device's."""
    states = [torch.default_generator.get_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states
