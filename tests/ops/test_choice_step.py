"""``choice_step`` in plain PyTorch: the truth that other backends will be held to."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import amalgam  # noqa: F401  registers the operations
from amalgam.ops import KINDS, ChoiceSettings, ChoiceState, choice_step, teacher_step

K = len(KINDS)
SIZES = [0, 1, 31, 33, 1000]
SETTINGS = ChoiceSettings(
    KINDS,
    lr=[0.2, 0.5, 0.005, 0.01, 0.1, 0.3, 0.02, 0.03],
    beta1=[0.9, 0.8, 0.7, 0.9, 0.5, 0.0, 0.95, 0.6],
    beta2=[0.99, 0.9, 0.8, 0.95, 0.7, 0.9, 0.0, 0.5],
    eps=[1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-3, 1e-4, 1e-5],
    time_scale=20.0,
    learning_rate=0.7,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def make_weights(layers: int = 2, hidden: int = 4, k: int = K) -> list[Tensor]:
    weights = []
    for layer in range(layers):
        inputs = hidden if layer else k + 4
        weights += [
            draw(4 * hidden, inputs, seed=layer) / 2,
            draw(4 * hidden, hidden, seed=layer) / 2,
            draw(4 * hidden, seed=layer),
        ]
    return [*weights, draw(k, hidden), draw(k)]


def make_state(n: int, layers: int = 2, hidden: int = 4, k: int = K) -> ChoiceState:
    return ChoiceState(
        draw(k, n, seed=1),
        draw(k, n, seed=2).square(),
        draw(layers, hidden, n, seed=3).tanh(),
        draw(layers, hidden, n, seed=4),
        steps=7,
    )


def make_ranks(n: int) -> Tensor:
    return torch.arange(n) % 5


def wanting(*tensors: Tensor) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


def constants(n: int, k: int = K) -> tuple[Any, ...]:
    columns = [list(column[:k]) for column in SETTINGS[1:5]]
    return make_ranks(n), list(range(k)), *columns, 7 / 20.0, 0.7


def through_op(grad: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    *state, weights = *rest[:4], list(rest[4:])
    k = len(weights[-1])
    return torch.ops.amalgam.choice_step(
        grad, *state, weights, *constants(len(grad), k), "reference"
    )


def direct(grad: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    k = len(rest[-1])
    settings = SETTINGS._replace(
        **{name: getattr(SETTINGS, name)[:k] for name in SETTINGS._fields[:5]}
    )
    update, state, mixture = choice_step(
        grad, ChoiceState(*rest[:4], steps=7), rest[4:], make_ranks(len(grad)), settings,
        backend="reference",
    )  # fmt: skip
    return update, *state[:4], mixture


def make_inputs(n: int, layers: int = 2, hidden: int = 4, k: int = K) -> list[Tensor]:
    state = make_state(n, layers, hidden, k)
    return [draw(n), *state[:4], *make_weights(layers, hidden, k)]


def by_coordinate(n: int, grad: Tensor, *rest: Tensor) -> tuple[float, list[float]]:
    """Update and mixture of one coordinate in scalar Python, from the docstring's formulas."""
    m, v, h, c = (t[..., n] for t in rest[:4])
    numbers = [w.tolist() for w in rest[4:]]
    sigmoid = lambda z: 1 / (1 + math.exp(-z))  # noqa: E731
    u = teacher_step(
        grad[n].expand(K, 1), m[:, None], v[:, None], *SETTINGS[:5], backend="reference"
    )[0][:, 0].tolist()
    rank = n % 5
    x = [*u, 7 / 20.0, float(rank == 1), float(rank == 2), float(rank == 3)]
    layers, hidden = h.shape
    for layer in range(layers):
        w_ih, w_hh, b = numbers[3 * layer : 3 * layer + 3]
        z = [
            sum(a * y for a, y in zip(w_ih[row], x, strict=True))
            + sum(a * y for a, y in zip(w_hh[row], h[layer].tolist(), strict=True))
            + b[row]
            for row in range(4 * hidden)
        ]
        x = []
        for unit in range(hidden):
            i, f, a, o = (z[gate * hidden + unit] for gate in range(4))
            cell = sigmoid(f) * c[layer, unit].item() + sigmoid(i) * math.tanh(a)
            x.append(sigmoid(o) * math.tanh(cell))
    logits = [
        sum(a * y for a, y in zip(row, x, strict=True)) + b
        for row, b in zip(*numbers[-2:], strict=True)
    ]
    total = sum(math.exp(z) for z in logits) + 1e-10
    mixture = [math.exp(z) / total for z in logits]
    return 0.7 * sum(w * y for w, y in zip(mixture, u, strict=True)), mixture


@pytest.mark.parametrize(("layers", "hidden"), [(1, 1), (2, 4), (3, 5)])
def test_step_is_its_formula(layers: int, hidden: int) -> None:
    inputs = make_inputs(7, layers, hidden)
    update, m, v, h, c, mixture = direct(*inputs)
    for n in range(7):
        ours, weights = by_coordinate(n, *inputs)
        assert update[n].item() == pytest.approx(ours, rel=1e-11, abs=1e-14)
        assert mixture[:, n].tolist() == pytest.approx(weights, rel=1e-12)
    rows = inputs[0].expand(K, -1), inputs[1], inputs[2]
    _, expected_m, expected_v = teacher_step(*rows, *SETTINGS[:5], backend="reference")
    assert torch.equal(m, expected_m)
    assert torch.equal(v, expected_v)
    assert h.shape == c.shape == (layers, hidden, 7)


@pytest.mark.parametrize("size", SIZES)
def test_op_and_direct_path_agree(size: int) -> None:
    inputs = make_inputs(size)
    before = [t.clone() for t in inputs]
    for ours, theirs in zip(through_op(*inputs), direct(*inputs), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.isfinite().all()
    assert all(torch.equal(now, was) for now, was in zip(inputs, before, strict=True))


@pytest.mark.parametrize("shift", [-900.0, -100.0, -30.0, -23.0, 0.0, 100.0, 900.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixture_is_the_authors_for_any_logits(shift: float, dtype: torch.dtype) -> None:
    """The 1e-10 decides where all logits are small, and nothing overflows where they are large.

    Theirs as it stands is NaN in float32 for logits beyond 88.
    """
    inputs = [t.to(dtype) for t in make_inputs(3)]
    inputs[-2].zero_()
    inputs[-1] += shift
    logits = inputs[-1].tolist()
    terms = [math.exp(z - max(logits)) for z in logits]
    total = sum(terms) + 1e-10 * math.exp(min(-max(logits), 700.0))
    mixture = direct(*inputs)[-1]
    for column in mixture.T.tolist():
        assert column == pytest.approx([term / total for term in terms], rel=1e-5, abs=1e-30)


@pytest.mark.parametrize("path", [through_op, direct])
@pytest.mark.parametrize(("layers", "size", "k"), [(1, 3, 8), (2, 2, 8), (2, 1, 2), (1, 2, 1)])
def test_gradcheck(path: Any, layers: int, size: int, k: int) -> None:
    assert torch.autograd.gradcheck(path, wanting(*make_inputs(size, layers, 2, k)))


def test_reference_is_differentiable_twice() -> None:
    def scalar(*tensors: Tensor) -> Tensor:
        return sum((t.square().sum() for t in direct(*tensors)), torch.zeros(()))

    assert torch.autograd.gradgradcheck(scalar, wanting(*make_inputs(2, 1, 2, 5)))


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("size", SIZES)
def test_hand_written_backward_is_autograds(size: int, layers: int) -> None:
    inputs = wanting(*make_inputs(size, layers))
    outputs = direct(*inputs)
    grads_out = [draw(*t.shape, seed=7) for t in outputs]
    theirs = torch.autograd.grad(outputs, inputs, grads_out)
    plain = [t.detach() for t in inputs]
    *found, in_weights = torch.ops.amalgam.choice_step_backward(
        grads_out, *plain[:5], plain[5:], *constants(size), "reference"
    )
    wired = torch.autograd.grad(through_op(*inputs), inputs, grads_out)
    for ours, expected, automatic in zip((*found, *in_weights), theirs, wired, strict=True):
        assert ours.shape == expected.shape
        assert torch.equal(ours, automatic)
        if ours.numel():
            assert (ours - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_unused_outputs_and_inputs_without_gradient() -> None:
    inputs = make_inputs(5)
    for output in range(6):
        for index in (0, 5, len(inputs) - 1):
            changed = [
                t.clone().requires_grad_(i == index) for i, t in enumerate(inputs)
            ]  # one at a time
            pair = [path(*changed)[output].sum() for path in (through_op, direct)]
            if not pair[1].requires_grad:
                continue
            hand, theirs = (
                torch.autograd.grad(loss, changed[index], allow_unused=True)[0] for loss in pair
            )
            theirs = torch.zeros_like(changed[index]) if theirs is None else theirs
            assert torch.allclose(hand, theirs, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("size", [0, 3])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_step(size: int, requires_grad: bool) -> None:
    inputs = make_inputs(size, 1, 2)
    tensors = wanting(*inputs) if requires_grad else inputs
    torch.library.opcheck(
        torch.ops.amalgam.choice_step,
        (*tensors[:5], tensors[5:], *constants(size), "reference"),
    )


@pytest.mark.parametrize("size", [0, 3])
def test_opcheck_backward(size: int) -> None:
    inputs = make_inputs(size, 1, 2)
    grads_out = [draw(*t.shape, seed=7) for t in (*inputs[:5], inputs[1])]
    torch.library.opcheck(
        torch.ops.amalgam.choice_step_backward,
        (grads_out, *inputs[:5], inputs[5:], *constants(size), "reference"),
    )


def test_compile_traces_the_operator_whole() -> None:
    @torch.compile(backend="eager", fullgraph=True)
    def compiled(*inputs: Tensor) -> Tensor:
        return 2 * through_op(*inputs)[0]

    inputs = make_inputs(5)
    assert torch.equal(compiled(*inputs), 2 * direct(*inputs)[0])


# --- Errors ---

GOOD = make_state(5)
ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"grad": [0.0]}, TypeError, "grad must be a floating-point tensor, not list"),
    ({"grad": torch.zeros(5, dtype=torch.int64)}, TypeError, "grad must be a floating-point"),
    ({"grad": draw(5, 1)}, ValueError, "grad must have shape (N,), not (5, 1)"),
    ({"grad": draw(5).float()}, ValueError, "weights[0] must be torch.float32 on cpu"),
    ({"ranks": torch.ones(5)}, TypeError, "ranks must be a tensor of integers, not torch.float32"),
    ({"ranks": 2}, TypeError, "ranks must be a tensor of integers, not int"),
    ({"ranks": make_ranks(4)}, ValueError, "ranks must have shape (5,) on cpu as grad has"),
    ({"ranks": make_ranks(5).to("meta")}, ValueError, "not (5,) on meta"),
    ({"settings": SETTINGS._replace(kinds=["adamw"] * K)}, ValueError, "kinds must be among"),
    ({"settings": SETTINGS._replace(kinds=[])}, ValueError, "kinds must name one teacher or more"),
    ({"settings": SETTINGS._replace(lr=[0.1])}, ValueError, "lr must hold 8 numbers, one a kind"),
    ({"settings": SETTINGS._replace(beta2=[1.0] * K)}, ValueError, "beta2 must hold numbers in"),
    ({"settings": SETTINGS._replace(time_scale=0.0)}, ValueError, "time_scale must be positive"),
    ({"weights": make_weights()[1:]}, ValueError, "weights must hold three tensors a layer"),
    ({"weights": make_weights(k=3)}, ValueError, "weights[0] must have shape (16, 12), not (16, 7"),
    (
        {"weights": [*make_weights()[:-2], draw(1, 4), draw(1)]},
        ValueError,
        "weights[6] must have shape (8, 4), not (1, 4)",
    ),
    ({"weights": make_weights(1)}, ValueError, "state.h must begin with (layers, hidden) = (1, 4)"),
    ({"state": GOOD._replace(m=draw(5))}, ValueError, "state.m must have shape (8, 5), not (5,)"),
    ({"state": GOOD._replace(c=draw(2, 4))}, ValueError, "state.c must have shape (2, 4, 5)"),
    ({"state": GOOD._replace(v=draw(8, 5).float())}, ValueError, "state.v must be torch.float64"),
    ({"backend": "referense"}, ValueError, "did you mean 'reference'?"),
]


@pytest.mark.parametrize(("change", "kind", "why"), ERRORS)
def test_errors_name_the_argument(change: dict[str, Any], kind: type[Exception], why: str) -> None:
    arguments = {
        "grad": draw(5),
        "state": GOOD,
        "weights": make_weights(),
        "ranks": make_ranks(5),
        "settings": SETTINGS,
    } | change
    with pytest.raises(kind, match=re.escape(why)):
        choice_step(**arguments)
