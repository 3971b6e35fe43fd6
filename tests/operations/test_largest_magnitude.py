"""``largest_magnitudes`` against PyTorch's norms, whose bits it gives."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from places import compiled
from torch import Tensor

from amalgam.ops import largest_magnitudes

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
of_dtypes = pytest.mark.parametrize("dtype", DTYPES)


def memory_cases(dtype: torch.dtype) -> Iterator[tuple[list[Tensor]]]:
    """Arguments of the kernel, for tests/sanitize_core.py."""
    for n in (0, 1, 7, 16, 17, 33, 257, 1 << 18):
        spread = draw(max(2 * n - 1, 0), dtype=dtype)
        yield ([draw(n, dtype=dtype), draw(0, dtype=dtype), spread[::2]],)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@compiled
@of_dtypes
def test_it_is_the_largest_of_all(backend: str, dtype: torch.dtype) -> None:
    """Of empty, small, strided and large tensors, wherever it stands."""
    for place in range(6):
        shapes = [(0,), (), (7, 9), (33,), (1 << 18,), (3, 5)]
        tensors = [draw(*shape, dtype=dtype, seed=n) for n, shape in enumerate(shapes)]
        tensors[5] = tensors[5].T
        if tensors[place].numel():
            tensors[place].reshape(-1)[-1] = -100.5
            tensors[5] = tensors[5].clone() if place == 5 else tensors[5]
        (found,) = largest_magnitudes(tensors, backend=backend)
        (expected,) = largest_magnitudes(tensors, backend="reference")
        assert found.dtype == dtype
        assert found.shape == ()
        assert torch.equal(found, expected)


@compiled
@of_dtypes
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, -math.nan])
@pytest.mark.parametrize("place", [0, 17, 4000])
def test_what_is_not_finite_is_found(
    backend: str, dtype: torch.dtype, value: float, place: int
) -> None:
    tensors = [draw(5, dtype=dtype), draw(4001, dtype=dtype)]
    tensors[1][place] = value
    (found,) = largest_magnitudes(tensors, backend=backend)
    assert not found.isfinite()
    assert bool(found.isnan()) == math.isnan(value)


@compiled
@of_dtypes
def test_the_least_numbers_count(backend: str, dtype: torch.dtype) -> None:
    least = torch.finfo(dtype).smallest_normal / 2
    zeros = torch.zeros(100, dtype=dtype)
    assert largest_magnitudes([zeros, -zeros], backend=backend)[0] == 0
    zeros[3] = -least
    assert largest_magnitudes([zeros], backend=backend)[0] == least


def test_kinds_are_apart() -> None:
    tensors = [draw(4, dtype=dtype, seed=n) for n, dtype in enumerate(DTYPES)]
    tensors += [torch.empty(0), draw(2, dtype=torch.float32, seed=9) * 50]
    found = largest_magnitudes(tensors)
    assert [each.dtype for each in found] == DTYPES
    assert found[1] == tensors[-1].abs().max()
    assert largest_magnitudes([]) == []
    assert largest_magnitudes([torch.empty(0)]) == []


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match="tensors must be a floating-point tensor, not torch.int64"):
        largest_magnitudes([torch.arange(3)])
