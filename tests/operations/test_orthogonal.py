"""Orthogonalised updates against the same polynomial of singular values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from amalgam.layout import Layout
from amalgam.operations.orthogonal import is_matrix, orthogonalized, orthogonalized_backward
from amalgam.policies.orthogonal import orthogonalized_rows, orthogonalized_rows_backward

SHAPES = [(1, 2, 2), (3, 5, 7), (2, 7, 5), (1, 40, 3), (4, 1, 6), (2, 33, 33)]


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def by_singular_values(u: Tensor) -> Tensor:
    left, s, right = torch.linalg.svd(u.double(), full_matrices=False)
    norm = s.square().sum(-1, keepdim=True).sqrt()
    s = s / norm
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    s = s * norm / s.square().sum(-1, keepdim=True).sqrt()
    return left @ torch.diag_embed(s) @ right


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_is_a_polynomial_of_singular_values(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    u = drawn(*shape, dtype=dtype)
    (found,) = orthogonalized([u])
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(found.double(), by_singular_values(u), rtol=0, atol=tolerance * 10)
    torch.testing.assert_close(found.norm(dim=(1, 2)), u.norm(dim=(1, 2)), rtol=1e-5, atol=0)


def test_singular_values_become_alike() -> None:
    left, _, right = torch.linalg.svd(drawn(1, 20, 30), full_matrices=False)
    u = left @ torch.diag_embed(torch.logspace(0, -2, 20, dtype=torch.float64)[None]) @ right
    before, after = (torch.linalg.svdvals(each) for each in (u, *orthogonalized([u])))
    assert before.max() / before.min() > 99
    assert after.max() / after.min() < 2


def test_gradients_are_right() -> None:
    inputs = [drawn(*shape).requires_grad_() for shape in SHAPES[:4]]
    assert torch.autograd.gradcheck(lambda *u: tuple(orthogonalized(u)), inputs)
    outer = [drawn(*shape[::-1]).permute(2, 1, 0) for shape in SHAPES[:4]]
    expected = torch.autograd.grad(orthogonalized(inputs), inputs, outer)
    found = orthogonalized_backward(outer, [each.detach() for each in inputs])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_bits_are_the_matrixs_own(shape: tuple[int, ...]) -> None:
    u = drawn(*shape, dtype=torch.float32)
    together = orthogonalized([u, drawn(3, *shape[:0:-1], dtype=torch.float32), drawn(2, 4, 9)[:0]])
    for index in range(len(u)):
        assert torch.equal(orthogonalized([u[index : index + 1]])[0][0], together[0][index])


def test_it_is_odd_and_does_not_see_the_scale() -> None:
    u = drawn(2, 6, 9, dtype=torch.float32)
    (found,) = orthogonalized([u])
    assert torch.equal(orthogonalized([-u])[0], -found)
    assert torch.equal(orthogonalized([u * 2.0**-80])[0], found * 2.0**-80)
    assert torch.equal(orthogonalized([u * 2.0**60])[0], found * 2.0**60)


def test_zeros_stay_zeros_and_have_a_gradient() -> None:
    u = drawn(1, 6, 9)
    u[0, 2], u[0, :, 4], u[0, 0, 0] = 0, 0, 0
    leaf = torch.cat((u, torch.zeros_like(u))).requires_grad_()
    (found,) = orthogonalized([leaf])
    assert torch.equal(found == 0, leaf == 0)
    found.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert not leaf.grad[1].any()


def test_what_is_not_finite_stays_in_its_matrix() -> None:
    u = drawn(3, 6, 9)
    u[1, 0, 0] = torch.inf
    (found,) = orthogonalized([u])
    assert not found[1].isfinite().all()
    assert found[[0, 2]].isfinite().all()


def test_matrices_are_tensors_of_two_dimensions_or_more() -> None:
    shapes = [(), (7,), (1, 5), (5, 1), (5, 1, 1), (0, 3), (3, 0), (2, 2), (4, 1, 3, 3), (2, 1, 2)]
    assert [is_matrix(shape) for shape in shapes] == [False] * 7 + [True] * 3


def test_rows_of_flat_vectors() -> None:
    shapes = {"bias": (3,), "kernel": (4, 2, 3, 3), "none": (0, 2), "one": (1, 5), "last": (5, 2)}
    layout = Layout(shapes)
    rows = drawn(3, layout.numel)
    found = orthogonalized_rows(rows, layout)
    for row, ours in zip(rows, found, strict=True):
        own, theirs = layout.unflatten(row), layout.unflatten(ours)
        for name in ("bias", "none", "one"):
            assert torch.equal(own[name], theirs[name])
        for name in ("kernel", "last"):
            matrix = own[name].reshape(1, len(own[name]), -1)
            (expected,) = orthogonalized([matrix])
            torch.testing.assert_close(theirs[name].reshape(matrix.shape), expected)
    outer = drawn(3, layout.numel)
    leaf = rows.clone().requires_grad_()
    (expected,) = torch.autograd.grad(orthogonalized_rows(leaf, layout), leaf, outer)
    torch.testing.assert_close(orthogonalized_rows_backward(outer, rows, layout), expected)
