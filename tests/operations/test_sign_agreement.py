"""``sign_agreements`` against counts by hand, of every pair of dtypes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from machine_code import assert_cuda_within, budgets
from places import ON_CPU, ON_HOST, at, on_gpus
from torch import Tensor

from amalgam.ops import sign_agreements

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ODD = [1.0, -2.0, 0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan, 1e-45, -6e-8]


def memory_cases(dtype: torch.dtype) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Arguments of the kernel, for tests/sanitize_core.py."""
    for n in (0, 1, 7, 17, 33, 257, 1 << 17):
        spread = draw(2 * n + 1, dtype=dtype)[::2][:n]
        for other in DTYPES:
            pair = [draw(n, dtype=other, seed=2), draw(n, dtype=other, seed=3)]
            yield ([draw(n, dtype=dtype), spread], pair)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def by_hand(one: Tensor, other: Tensor) -> list[float]:
    def sign(value: float) -> int:
        return (value > 0) - (value < 0)

    pairs = zip(one.reshape(-1).tolist(), other.reshape(-1).tolist(), strict=True)
    products = [sign(a) * sign(b) for a, b in pairs]
    return [float(products.count(1)), float(products.count(-1))]


everywhere = at(*ON_CPU, *on_gpus("cuda", "reference"), *ON_HOST)


def agreements(
    first: list[Tensor], second: list[Tensor], backend: str, device: str
) -> list[list[float]]:
    ones, others = ([tensor.to(device) for tensor in tensors] for tensors in (first, second))
    found = sign_agreements(ones, others, backend=backend)
    assert found.dtype == torch.float64
    assert found.device.type == device
    return found.tolist()


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
def test_every_pair_of_numbers_counts(
    backend: str, device: str, dtype: torch.dtype, other: torch.dtype
) -> None:
    """Zeros and NaN have no sign, the smallest numbers and infinities have one."""
    pairs = torch.tensor(list(itertools.product(ODD, ODD)), dtype=torch.float64)
    first = [pairs[:, 0].to(dtype), draw(5, 7, dtype=dtype), torch.empty(0, dtype=dtype)]
    first += [draw(9, 4, dtype=dtype, seed=4).T, draw(dtype=dtype), draw(1 << 16, dtype=dtype)]
    second = [pairs[:, 1].to(other), draw(35, dtype=other, seed=1), torch.empty(0, dtype=other)]
    second += [draw(4, 9, dtype=other, seed=5), draw(dtype=other, seed=6)]
    second += [draw(1 << 16, dtype=other, seed=7)]
    found = agreements(first, second, backend, device)
    assert found == [by_hand(a, b) for a, b in zip(first, second, strict=True)]


@everywhere
def test_dtypes_may_be_mixed(backend: str, device: str) -> None:
    first = [draw(50, dtype=dtype, seed=n) for n, dtype in enumerate(DTYPES)]
    second = [draw(50, dtype=dtype, seed=9) for dtype in reversed(DTYPES)]
    found = agreements(first, second, backend, device)
    assert found == [by_hand(a, b) for a, b in zip(first, second, strict=True)]


@everywhere
def test_more_pairs_than_a_launch_takes_and_empty_ones_among_them(
    backend: str, device: str
) -> None:
    sizes = [n % 4 for n in range(300)]
    first = [draw(n, dtype=torch.float32, seed=at) for at, n in enumerate(sizes)]
    second = [draw(n, dtype=torch.bfloat16, seed=at + 1000) for at, n in enumerate(sizes)]
    found = agreements(first, second, backend, device)
    assert found == [by_hand(a, b) for a, b in zip(first, second, strict=True)]
    nothing = [torch.empty(0)] * 3
    assert agreements(nothing, nothing, backend, device) == [[0.0, 0.0]] * 3


@everywhere
def test_counts_are_exact_over_several_blocks(backend: str, device: str) -> None:
    n = 3 * (1 << 16) + 5
    ones = torch.ones(n)
    ones[-1] = -1
    (found,) = agreements([ones], [torch.ones(n)], backend, device)
    assert found == [n - 1, 1]


def test_lists_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match=r"second must be tensors of \[3\] elements, .* of \[2\]"):
        sign_agreements([torch.ones(3)], [torch.ones(2)])
    with pytest.raises(ValueError, match="one or more"):
        sign_agreements([], [])
    with pytest.raises(TypeError, match=r"second must be a floating-point tensor, not torch.int64"):
        sign_agreements([torch.ones(3)], [torch.arange(3)])
    with pytest.raises(TypeError, match="first must be a floating-point tensor, not list"):
        sign_agreements([[1.0]], [torch.ones(1)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="all must be on cpu, as first is, not meta"):
        sign_agreements([torch.ones(3)], [torch.ones(3, device="meta")])


def test_cudas_kernel_keeps_to_its_budget() -> None:
    _, rows = budgets("sign_agreement")
    assert_cuda_within(rows, {"cuda agree sm_90": "5agreeE"})
