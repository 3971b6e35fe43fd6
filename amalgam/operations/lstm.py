"""The LSTM with a linear head that the learned optimizers share: its shapes, steps and gradients.

For each layer, coordinates last::

    i, f, a, o = W_ih x + W_hh h + b                (a: the candidate)
    c <- sigmoid(f) c + sigmoid(i) tanh(a);  x = h <- sigmoid(o) tanh(c)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from amalgam.operations.checks import check_like


class Trace(NamedTuple):
    """What a step's gradients need of it, a list entry a layer.

    Attributes:
        inputs: What each layer saw, and last what the top layer gave, (inputs or hidden, N).
        gates: Input, forget, candidate and output gate, (hidden, N) each.
        cells: The new cells, (hidden, N).
    """

    inputs: list[Tensor]
    gates: list[tuple[Tensor, ...]]
    cells: list[Tensor]


def architecture(weights: Sequence[Tensor]) -> tuple[int, int]:
    """(layers, hidden) of a list of weights."""
    if len(weights) < 5 or (len(weights) - 2) % 3:
        raise ValueError(
            f"weights must hold three tensors a layer and two of the head, not {len(weights)}"
        )
    if weights[-2].dim() != 2:
        raise ValueError(
            f"weights[-2], the head, must have shape (outputs, hidden), "
            f"not {tuple(weights[-2].shape)}"
        )
    return (len(weights) - 2) // 3, weights[-2].shape[-1]


def check_weights(
    weights: Sequence[Tensor],
    h: Tensor,
    like: Tensor,
    features: int,
    outputs: int,
    biases: Sequence[int] = (),
) -> None:
    """Raise ValueError unless the weights fit each other, the state h and a tensor's dtype.

    Args:
        weights: The weights.
        h: The state's h, shape (layers, hidden, ...).
        like: A tensor of their dtype and device.
        features: Inputs of the first layer.
        outputs: Outputs of the head.
        biases: The dimensions before the first layer's bias's own; none, or what there are several
            biases for.
    """
    layers, hidden = architecture(weights)
    expected: list[tuple[int, ...]] = []
    for layer in range(layers):
        inputs, several = (hidden, ()) if layer else (features, tuple(biases))
        expected += [(4 * hidden, inputs), (4 * hidden, hidden), (*several, 4 * hidden)]
    expected += [(outputs, hidden), (outputs,)]
    for index, (weight, shape) in enumerate(zip(weights, expected, strict=True)):
        check_like(f"weights[{index}]", weight, shape, like)
    if tuple(h.shape[:2]) != (layers, hidden):
        raise ValueError(
            f"state.h must begin with (layers, hidden) = {(layers, hidden)} to fit the weights, "
            f"not with {tuple(h.shape[:2])}"
        )


def layer_step(
    x: Tensor, h: Tensor, c: Tensor, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """One layer: x (inputs, N), h, c (hidden, N) -> its output, new cell, gates i, f, a, o.

    The bias may be one a coordinate, (4 hidden, N).
    """
    w_ih, w_hh, bias = weights
    columns = bias if bias.dim() == 2 else bias[:, None]
    i, f, a, o = (torch.addmm(columns, w_ih, x) + w_hh @ h).chunk(4)
    i, f, a, o = i.sigmoid(), f.sigmoid(), a.tanh(), o.sigmoid()
    cell = f * c + i * a
    return o * cell.tanh(), cell, (i, f, a, o)


def step(
    x: Tensor, h: Tensor, c: Tensor, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x (inputs, N), h and c (layers, hidden, N): the top layer's output, new h, new c."""
    new_h, new_c = [], []
    for layer in range(h.shape[0]):
        x, cell, _ = layer_step(x, h[layer], c[layer], weights[3 * layer : 3 * layer + 3])
        new_h.append(x)
        new_c.append(cell)
    return x, torch.stack(new_h), torch.stack(new_c)


def trace(x: Tensor, h: Tensor, c: Tensor, weights: Sequence[Tensor]) -> Trace:
    """The same step, kept for :func:`backward`."""
    inputs, gates, cells = [x], [], []
    for layer in range(h.shape[0]):
        x, cell, of_layer = layer_step(x, h[layer], c[layer], weights[3 * layer : 3 * layer + 3])
        inputs.append(x)
        gates.append(of_layer)
        cells.append(cell)
    return Trace(inputs, gates, cells)


def backward(
    traced: Trace,
    d_x: Tensor,
    d_h: Tensor,
    d_c: Tensor,
    h: Tensor,
    c: Tensor,
    weights: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The step's vector-Jacobian product.

    Args:
        traced: What :func:`trace` kept of the step.
        d_x: Gradient in the top layer's output, beside what `d_h` says of it, (hidden, N).
        d_h: Gradient in the new h, (layers, hidden, N).
        d_c: Gradient in the new c, likewise.
        h: The state that the step began with.
        c: Its cells.
        weights: The layers' weights; what follows them is not looked at.

    Returns:
        Gradients in x, h, c, and in the layers' weights; where the first layer's bias was one a
        coordinate, in each of these.
    """
    inputs, gates, cells = traced
    d_weights: list[Tensor] = []
    in_h, in_c = [], []
    for layer in reversed(range(h.shape[0])):
        w_ih, w_hh, bias = weights[3 * layer : 3 * layer + 3]
        i, f, a, o = gates[layer]
        squashed = cells[layer].tanh()
        d_out = d_x + d_h[layer]
        d_cell = d_c[layer] + d_out * o * (1 - squashed.square())
        d_gates = torch.cat(
            (
                d_cell * a * i * (1 - i),
                d_cell * c[layer] * f * (1 - f),
                d_cell * i * (1 - a.square()),
                d_out * squashed * o * (1 - o),
            )
        )
        d_bias = d_gates.sum(1) if bias.dim() == 1 else d_gates
        d_weights[:0] = [d_gates @ inputs[layer].T, d_gates @ h[layer].T, d_bias]
        in_h.append(w_hh.T @ d_gates)
        in_c.append(d_cell * f)
        d_x = w_ih.T @ d_gates
    return d_x, torch.stack(in_h[::-1]), torch.stack(in_c[::-1]), d_weights
