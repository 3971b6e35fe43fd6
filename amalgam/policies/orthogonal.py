"""Updates in flat vectors whose matrices are orthogonalised."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from amalgam.layout import Layout
from amalgam.operations.orthogonal import is_matrix, orthogonalized, orthogonalized_backward


def orthogonalized_rows(updates: Tensor, layout: Layout) -> Tensor:
    """Rows of updates with each matrix orthogonalised; differentiable.

    Args:
        updates: The updates, shape (R, N).
        layout: Which tensors the N coordinates of a row are.
    """
    pieces, matrices = _pieces(updates, layout)
    for index, found in zip(matrices, orthogonalized(list(matrices.values())), strict=True):
        pieces[index] = found.reshape(len(updates), -1)
    return torch.cat(pieces, -1)


def orthogonalized_rows_backward(grads_out: Tensor, updates: Tensor, layout: Layout) -> Tensor:
    """The gradient with respect to the updates that :func:`orthogonalized_rows` was given.

    Args:
        grads_out: The gradient with respect to what it returned, shape (R, N).
        updates: What it was given, shape (R, N).
        layout: As it was given.
    """
    pieces, outer = _pieces(grads_out, layout)
    _, inner = _pieces(updates, layout)
    found = orthogonalized_backward(list(outer.values()), list(inner.values()))
    for index, gradient in zip(inner, found, strict=True):
        pieces[index] = gradient.reshape(len(updates), -1)
    return torch.cat(pieces, -1)


def _pieces(rows: Tensor, layout: Layout) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Rows (R, N) as tensors (R, size), and by index the matrices (R, rows, columns) of them."""
    pieces = list(rows.split(layout.sizes, -1))
    matrices = {
        index: pieces[index].reshape(len(rows), shape[0], math.prod(shape[1:]))
        for index, shape in enumerate(layout.shapes.values())
        if is_matrix(shape)
    }
    return pieces, matrices
