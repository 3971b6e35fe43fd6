"""A short fingerprint of tensors, the same for the same bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from torch import Tensor


def digest_of(tensors: Iterable[Tensor]) -> str:
    """The hexadecimal BLAKE2b digest, of 8 bytes, of the tensors' bytes one after the other."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
