"""Checks of the operations' arguments that several backends make."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from amalgam.backends.pointers import checked, distinct, in_place
from amalgam.operations import lstm
from amalgam.operations.choice_step import features
from amalgam.ops import KINDS


def checked_pool(names: Sequence[str], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, contiguous, all of the first one's shape, dtype and device.

    Args:
        names: What to call them in errors.
        tensors: As many.

    Raises:
        ValueError: One has another shape, dtype, device or layout.
    """
    like = tensors[0]
    pairs = zip(names, tensors, strict=True)
    return [checked(name, tensor, like.shape, like) for name, tensor in pairs]


def checked_teachers(
    k: int, kinds: Sequence[int], *columns: Sequence[float]
) -> dict[str, Sequence[float]]:
    """The settings of a pool of teachers by name, if they are those of K teachers.

    Args:
        k: How many teachers there are.
        kinds: Their kinds, as indices into ``KINDS``.
        *columns: Their lr, beta1, beta2 and eps.

    Raises:
        ValueError: There is no such kind, or there are not K numbers of each.
    """
    if any(not 0 <= kind < len(KINDS) for kind in kinds):
        raise ValueError(f"kinds must be numbers below {len(KINDS)}, not {list(kinds)}")
    settings = dict(zip(("kinds", "lr", "beta1", "beta2", "eps"), (kinds, *columns), strict=True))
    for name, values in settings.items():
        if len(values) != k:
            raise ValueError(f"{name} must hold {k} numbers, one a row, not {len(values)}")
    return settings


def checked_weights(weights: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """The weights, contiguous, in a tensor's dtype and on its device.

    Raises:
        ValueError: One is not.
    """
    return [checked(f"weights[{i}]", w, w.shape, like) for i, w in enumerate(weights)]


def checked_state(
    tensors: Sequence[Tensor], like: Tensor | None = None, shapes: Sequence[Tensor] | None = None
) -> tuple[Tensor, ...]:
    """A gradient (or update) and a student's state, contiguous.

    Args:
        tensors: grad, m, v of shape (N,) and h, c of shape (layers, hidden, N).
        like: Whose dtype and device they must have; of the first one by default.
        shapes: Tensors whose shapes they must have; their own by default.

    Raises:
        ValueError: One has another shape, dtype, device or layout.
    """
    like = tensors[0] if like is None else like
    return tuple(
        checked(name, tensor, shaped.shape, like)
        for name, tensor, shaped in zip("gmvhc", tensors, shapes or tensors, strict=True)
    )


def written_state(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A gradient (or update) and a state that are to be written, each like its counterpart.

    Raises:
        ValueError: One has another shape, dtype, device or is not contiguous, or two share memory.
    """
    distinct("outputs", tensors)
    return tuple(
        in_place(name, tensor, shaped.shape, shaped)
        for name, tensor, shaped in zip("gmvhc", tensors, like, strict=True)
    )


def checked_in_place(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    h: Sequence[Tensor],
    c: Sequence[Tensor],
) -> tuple[list[tuple[Tensor, ...]], Callable[[], None]]:
    """What a student's step in place writes to, and its gradients, ready for compiled code.

    Args:
        params: Parameters, each of any dtype and strides.
        grads: Their gradients, likewise.
        m: Their states, which must be contiguous; all m and v alike, and all h and c.
        v: Likewise.
        h: Likewise.
        c: Likewise.

    Returns:
        A row (param, grad, m, v, h, c) a parameter, all contiguous: copies of strided parameters
        and gradients. And what to call after the step, which brings the copies back.

    Raises:
        ValueError: A state is not contiguous or unlike the first one, a gradient is unlike its
            parameter, or two tensors that are written to share memory.
    """
    distinct("params and states", [*params, *m, *v, *h, *c])
    rows: list[tuple[Tensor, ...]] = []
    copies: list[tuple[Tensor, Tensor]] = []
    likes = (m[0], m[0], h[0], h[0])
    for param, grad, *state in zip(params, grads, m, v, h, c, strict=True):
        state = [
            in_place(name, tensor, tensor.shape, like)
            for name, tensor, like in zip("mvhc", state, likes, strict=True)
        ]
        dense = param.contiguous()
        if dense is not param:
            copies.append((param, dense))
        rows.append((dense, checked("grads", grad, param.shape, grad), *state))

    def put_back() -> None:
        for param, dense in copies:
            param.copy_(dense)

    return rows, put_back


def checked_choice(
    k: int, tensors: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """A choice's inputs and weights, contiguous.

    Args:
        k: How many teachers it has.
        tensors: grad, m, v, h, c and ranks, as the operation has them.
        weights: As the operation has them.

    Returns:
        The inputs, ranks as int64, and the weights.

    Raises:
        ValueError: One has another shape, dtype, device or layout.
    """
    grad, m, v, h, c, ranks = tensors
    n = grad.numel()
    lstm.check_weights(weights, h, grad, features(k), k)
    cells = *h.shape[:2], n
    shapes = (n,), (k, n), (k, n), cells, cells
    inputs = [
        checked(name, tensor, shape, grad)
        for name, tensor, shape in zip("gmvhc", (grad, m, v, h, c), shapes, strict=True)
    ]
    ranks = ranks.to(torch.int64)
    inputs.append(checked("ranks", ranks, (n,), grad.new_empty(0, dtype=torch.int64)))
    return inputs, checked_weights(weights, grad)
