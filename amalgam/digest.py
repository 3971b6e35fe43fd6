"""Short fingerprints of tensors and of texts, the same for the same bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def digest_of(tensors: Iterable[Tensor]) -> str:
    """The hexadecimal BLAKE2b digest, of 8 bytes, of the tensors' bytes one after the other."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        # NumPy has no bfloat16 and no float8, but every tensor has bytes.
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def digest_of_text(text: str, size: int = 8) -> str:
    """The hexadecimal BLAKE2b digest, of so many bytes, of a text."""
    return hashlib.blake2b(text.encode(), digest_size=size).hexdigest()
