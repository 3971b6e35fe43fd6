"""``choice_step``: plain PyTorch, and the compiled kernels that are held to it."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import assert_as_accurate, flat, seeds_of_draws
from machine_code import assert_cuda_within, assert_within, budgets, costs_of
from places import by_triton, compiled, compiled_once
from student_cases import moved
from torch import Tensor

from amalgam.layout import Layout
from amalgam.operations import registry
from amalgam.ops import KINDS, ChoiceSettings, ChoiceState, choice_step, teacher_step
from amalgam.policies import Choice, ChoiceConfig, Teacher

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
    return make_ranks(n), list(range(k)), *columns, 7, 20.0, 0.7


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


@pytest.mark.parametrize("output", range(6))
@pytest.mark.parametrize("index", [0, 5, len(make_inputs(0)) - 1])
def test_unused_outputs_and_inputs_without_gradient(index: int, output: int) -> None:
    """Moments do not depend on weights, and cells do not depend on the head's bias."""
    inputs = make_inputs(5)

    def gradient(path: Any) -> Tensor | None:
        changed = [t.clone().requires_grad_(i == index) for i, t in enumerate(inputs)]
        loss = path(*changed)[output].sum()
        if not loss.requires_grad:
            return None
        return torch.autograd.grad(loss, changed[index], allow_unused=True)[0]

    hand, theirs = gradient(through_op), gradient(direct)
    independent = {5: (1, 2), len(inputs) - 1: (1, 2, 3, 4)}.get(index, ())
    assert (theirs is None) == (output in independent)
    assert hand is not None
    theirs = torch.zeros_like(inputs[index]) if theirs is None else theirs
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


# --- The compiled backends, held to the reference by the rule of accuracy.py ---

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
GOLDEN = Path(__file__).parents[1] / "golden"
POOLS = {1: [3], 2: [2, 3], 6: [0, 1, 2, 3, 4, 5], 8: [7, 6, 5, 4, 3, 2, 1, 0]}


def pool(n: int, k: int) -> tuple[Any, ...]:
    """The operator's arguments after the weights."""
    columns = ([column[kind] for kind in POOLS[k]] for column in SETTINGS[1:5])
    return make_ranks(n), POOLS[k], *columns, 7, 20.0, 0.7


def skewed_arguments(
    n: int, layers: int, hidden: int, k: int, dtype: torch.dtype, seed: int = 0
) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Arguments and gradients in the outputs; gradients over eight decades, zeros among them."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    decades = 10 ** (8 * torch.rand(n, dtype=torch.float64, generator=generator) - 6)
    grad = values(n) * decades
    grad[::7] = 0
    state = [
        values(k, n) * decades,
        values(k, n).square() * decades.square(),
        values(layers, hidden, n).tanh(),
        values(layers, hidden, n),
    ]
    weights = [w.to(dtype) for w in make_weights(layers, hidden, k)]
    inputs = [t.to(dtype) for t in (grad, *state)]
    upstream = [values(*t.shape).to(dtype) for t in (*inputs, inputs[1])]
    return (*inputs, weights, *pool(n, k)), upstream


@compiled
@dtypes
@pytest.mark.parametrize(
    ("layers", "hidden", "k"), [(2, 20, 2), (2, 20, 6), (1, 4, 1), (3, 5, 8), (1, 64, 2), (1, 1, 6)]
)
@pytest.mark.parametrize("size", [0, 1, 31, 64, 65, 1000])
def test_compiled_step(
    backend: str, size: int, layers: int, hidden: int, k: int, dtype: torch.dtype
) -> None:
    forward, backward = [], []
    # One coordinate has one error, which takes more draws to average.
    draws = 1 if dtype == torch.float64 or not size else 16 if size > 1 else 100
    for seed in range(draws):
        arguments, upstream = skewed_arguments(size, layers, hidden, k, dtype, seed)
        forward.append(arguments)
        backward.append((upstream, *arguments))
    assert_as_accurate(torch.ops.amalgam.choice_step, forward, backend)
    assert_as_accurate(torch.ops.amalgam.choice_step_backward, backward, backend)


@compiled
def test_compiled_weight_gradients_of_many_coordinates(backend: str) -> None:
    draws = []
    for seed in range(3):
        arguments, upstream = skewed_arguments(2**14 + 1, 2, 20, 2, torch.float32, seed)
        draws.append((upstream, *arguments))
    assert_as_accurate(torch.ops.amalgam.choice_step_backward, draws, backend)


@compiled
@dtypes
@pytest.mark.parametrize("shift", [-900.0, -30.0, -23.0, 0.0, 100.0, 900.0])
def test_compiled_mixture_for_any_logits(backend: str, shift: float, dtype: torch.dtype) -> None:
    arguments, upstream = skewed_arguments(70, 1, 4, 6, dtype)
    arguments[5][-2].zero_()  # so that the logits are the bias
    arguments[5][-1].add_(shift)
    mixture = torch.ops.amalgam.choice_step(*arguments, backend)[-1]
    expected = torch.ops.amalgam.choice_step(*arguments, "reference")[-1]
    assert torch.allclose(mixture, expected, rtol=1e-5, atol=1e-30)
    found = flat(torch.ops.amalgam.choice_step_backward(upstream, *arguments, backend))
    assert all(t.isfinite().all() for t in found)


@compiled_once
@pytest.mark.parametrize(("layers", "size", "k"), [(1, 3, 1), (2, 2, 2), (1, 2, 6), (2, 1, 8)])
def test_compiled_gradcheck(backend: str, layers: int, size: int, k: int) -> None:
    def step(*inputs: Tensor) -> tuple[Tensor, ...]:
        rest = list(inputs[5:]), *pool(size, k)
        return torch.ops.amalgam.choice_step(*inputs[:5], *rest, backend)

    assert torch.autograd.gradcheck(step, wanting(*make_inputs(size, layers, 2, k)))


@compiled_once
@pytest.mark.parametrize("size", [0, 3])
def test_compiled_opcheck(backend: str, size: int) -> None:
    inputs = make_inputs(size, 1, 2)
    grads_out = [draw(*t.shape, seed=7) for t in (*inputs[:5], inputs[1])]
    rest = *constants(size), backend
    backward = (grads_out, *inputs[:5], inputs[5:], *rest)
    torch.library.opcheck(torch.ops.amalgam.choice_step_backward, backward)
    inputs = wanting(*inputs)
    torch.library.opcheck(torch.ops.amalgam.choice_step, (*inputs[:5], inputs[5:], *rest))


@compiled
def test_compiled_differentiating_twice_is_refused(backend: str) -> None:
    inputs = wanting(*make_inputs(3))
    state = ChoiceState(*inputs[1:5], steps=7)
    update, _, _ = choice_step(
        inputs[0], state, inputs[5:], make_ranks(3), SETTINGS, backend=backend
    )
    (grad,) = torch.autograd.grad(update.sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once.*backend='reference'"):
        torch.autograd.grad(grad.sum(), inputs[0])


@compiled
def test_compiled_inputs_may_be_strided(backend: str) -> None:
    def spread(values: Any) -> Any:
        if isinstance(values, Tensor):
            return torch.stack((values, values), -1)[..., 0]
        tensors = isinstance(values, list) and isinstance(values[0], Tensor)
        return [spread(value) for value in values] if tensors else values

    arguments, upstream = skewed_arguments(70, 2, 4, 6, torch.float64)
    strided = [spread(value) for value in arguments]
    assert not strided[1].is_contiguous()
    for operation, before in (("choice_step", []), ("choice_step_backward", [upstream])):
        run = getattr(torch.ops.amalgam, operation)
        ours = flat(run(*map(spread, before), *strided, backend))
        expected = flat(run(*before, *arguments, backend))
        assert all(map(torch.equal, ours, expected))


@compiled
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int32])
def test_compiled_ranks_of_any_integers(backend: str, dtype: torch.dtype) -> None:
    arguments, _ = skewed_arguments(70, 2, 4, 2, torch.float64)
    before, after = arguments[:6], arguments[7:]
    ranks = make_ranks(70).to(dtype)
    ours = torch.ops.amalgam.choice_step(*before, ranks, *after, backend)
    expected = torch.ops.amalgam.choice_step(*before, ranks.long(), *after, backend)
    assert all(map(torch.equal, ours, expected))


@compiled
def test_compiled_steps_pass_nan_on(backend: str) -> None:
    arguments, _ = skewed_arguments(70, 2, 4, 6, torch.float32)
    grad, m, v, _, c = arguments[:5]
    grad[3], grad[5], m[4, 40], v[3, 50], c[0, 0, 66] = math.nan, math.inf, *[math.nan] * 3
    ours = torch.ops.amalgam.choice_step(*arguments, backend)
    plain = torch.ops.amalgam.choice_step(*arguments, "reference")
    for one, other in zip(ours, plain, strict=True):
        assert torch.equal(one.isnan(), other.isnan())


@compiled
@pytest.mark.parametrize("size", [1, 5, 65])
def test_compiled_zero_eps_divides_only_where_asked(backend: str, size: int) -> None:
    """What fills the last tile up must not divide zero by zero into the weights' gradients."""
    arguments, upstream = skewed_arguments(size, 2, 4, 8, torch.float64)
    arguments[0].copy_(draw(size))
    arguments = (*arguments[:10], [0.0] * 8, *arguments[11:])
    ours = flat(torch.ops.amalgam.choice_step_backward(upstream, *arguments, backend))
    plain = flat(torch.ops.amalgam.choice_step_backward(upstream, *arguments, "reference"))
    for one, other in zip(ours, plain, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12 * other.abs().max().item())


@compiled
def test_compiled_same_bits_for_any_number_of_threads(backend: str) -> None:
    arguments, upstream = skewed_arguments(3001, 2, 20, 6, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            forward = torch.ops.amalgam.choice_step(*arguments, backend)
            backward = torch.ops.amalgam.choice_step_backward(upstream, *arguments, backend)
            results.append(flat((forward, backward)))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


UNFIT: list[tuple[int, Any, str]] = [
    (1, draw(2, 4), "m must have shape (2, 5), not (2, 4)"),
    (4, draw(2, 4, 4), "c must have shape (2, 4, 5), not (2, 4, 4)"),
    (5, make_weights(k=3), "weights[0] must have shape (16, 6), not (16, 7)"),
    (5, make_weights(k=2)[1:], "weights must hold three tensors a layer"),
    (6, make_ranks(4), "ranks must have shape (5,) on cpu as grad has, not (4,) on cpu"),
    (7, [0, 8], "kinds must be numbers below 8, not [0, 8]"),
    (8, [0.1], "lr must hold 2 numbers, one a kind, not 1"),
]


@compiled
@pytest.mark.parametrize(("index", "value", "why"), UNFIT)
def test_compiled_checks_before_it_takes_pointers(
    backend: str, index: int, value: Any, why: str
) -> None:
    arguments, upstream = skewed_arguments(5, 2, 4, 2, torch.float64)
    changed = (*arguments[:index], value, *arguments[index + 1 :], backend)
    with pytest.raises(ValueError, match=re.escape(why)):
        torch.ops.amalgam.choice_step(*changed)
    with pytest.raises(ValueError, match=re.escape(why)):
        torch.ops.amalgam.choice_step_backward(upstream, *changed)
    for place in range(6):
        with pytest.raises(ValueError, match=re.escape(f"grads_out[{place}] must have shape")):
            torch.ops.amalgam.choice_step_backward(
                [t[..., :-1] if i == place else t for i, t in enumerate(upstream)],
                *arguments,
                backend,
            )


GOLDEN_SMALL = (Teacher("rmsprop", 0.005, eps=1e-7), Teacher("adam", 0.02))
GOLDEN_LARGE = (
    *(Teacher("sgd", 2.0), Teacher("momentum", 2.0), *GOLDEN_SMALL),
    *(Teacher("powersign", 1.0), Teacher("addsign", 1.0)),
)


golden_choices = pytest.mark.parametrize(
    ("name", "teachers"), [("choice_small", GOLDEN_SMALL), ("choice_large", GOLDEN_LARGE)]
)


def golden_updates(
    name: str, teachers: tuple[Teacher, ...], backend: str, dtype: torch.dtype
) -> tuple[Any, Tensor, Choice, Tensor]:
    """The authors' record, and the gradients, the policy and the updates that we make of it."""
    data = np.load(GOLDEN / f"{name}.npz")
    choice = Choice(ChoiceConfig(teachers)).to(dtype)
    keys = [key for key in data.files if key.startswith("weight.")]
    for weight, key in zip(choice.weights(), keys, strict=True):
        values = torch.from_numpy(data[key])
        weight.data.copy_(values.T if weight.dim() == 2 else values)
    grads = torch.from_numpy(data["grads"]).to(dtype).requires_grad_()
    state, updates, layout = choice.initial_state(grads[0]), [], Layout({"weight": (4, 9)})
    for grad in grads:
        update, state = choice.step(grad, state, layout=layout, backend=backend)
        updates.append(update)
    return data, grads, choice, torch.stack(updates)


def assert_close(ours: Tensor, theirs: np.ndarray) -> None:
    bound = 1e-5 * np.abs(theirs).max()
    assert np.abs(ours.detach().double().numpy() - theirs).max() <= bound


@compiled
@dtypes
@golden_choices
def test_compiled_updates_match_the_authors(
    backend: str, name: str, teachers: tuple[Teacher, ...], dtype: torch.dtype
) -> None:
    data, _, _, updates = golden_updates(name, teachers, backend, dtype)
    assert_close(updates, data["updates"])


@compiled
@golden_choices
def test_compiled_gradients_match_the_authors(
    backend: str, name: str, teachers: tuple[Teacher, ...]
) -> None:
    """In float64: in float32 gradients of a sum that cancels are no yardstick."""
    data, grads, choice, updates = golden_updates(name, teachers, backend, torch.float64)
    loss = (torch.from_numpy(data["loss_coefficients"]) * updates).sum()
    in_grads, *in_weights = torch.autograd.grad(loss, [grads, *choice.weights()])
    assert_close(in_grads, data["grad_of_loss.grads"])
    for index, found in enumerate(in_weights):
        theirs = data[f"grad_of_loss.weight.{index}"]
        assert_close(found.T if found.dim() == 2 else found, theirs)


@by_triton
@pytest.mark.parametrize(
    ("layers", "hidden", "k", "size"),
    # Of three layers and eight teachers Triton compiles for a minute and more.
    [
        *[(2, 20, 2, 0), (2, 20, 2, 70), (2, 20, 6, 129), (1, 4, 1, 33)],
        *[(3, 5, 2, 64), (1, 5, 8, 64), (1, 33, 6, 5)],
    ],
)
def test_triton_choice(device: str, size: int, layers: int, hidden: int, k: int) -> None:
    forward, backward = [], []
    for seed in seeds_of_draws(device, 6):
        drawn = skewed_arguments(size, layers, hidden, k, torch.float32, seed)
        arguments, upstream = moved(drawn, device)
        forward.append(arguments)
        backward.append((upstream, *arguments))
    assert_as_accurate(torch.ops.amalgam.choice_step, forward, "triton")
    assert_as_accurate(torch.ops.amalgam.choice_step_backward, backward, "triton")


@by_triton
@pytest.mark.parametrize("shift", [-900.0, -23.0, 900.0])
def test_triton_mixture_for_any_logits(device: str, shift: float) -> None:
    arguments, upstream = skewed_arguments(70, 1, 4, 6, torch.float32)
    arguments[5][-2].zero_()
    arguments[5][-1].add_(shift)
    arguments, upstream = moved((arguments, upstream), device)
    mixture = torch.ops.amalgam.choice_step(*arguments, "triton")[-1]
    expected = torch.ops.amalgam.choice_step(*arguments, "reference")[-1]
    assert torch.allclose(mixture, expected, rtol=1e-5, atol=1e-30)
    found = flat(torch.ops.amalgam.choice_step_backward(upstream, *arguments, "triton"))
    assert all(t.isfinite().all() for t in found)


@by_triton
def test_triton_choice_approximates(device: str) -> None:
    """The interpreter has no approximate instruction and computes tanh precisely."""
    bound = 1e-2 if device == "cuda" else 1e-5
    arguments = moved(skewed_arguments(70, 2, 20, 2, torch.float32)[0], device)
    ours = torch.ops.amalgam.choice_step(*arguments, "triton:ieee,approximate")
    theirs = torch.ops.amalgam.choice_step(*arguments, "reference")
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=bound, atol=bound)


@by_triton
def test_triton_choice_passes_nan_on(device: str) -> None:
    arguments, _ = skewed_arguments(70, 2, 4, 6, torch.float32)
    grad, m, v, _, c = arguments[:5]
    grad[3], m[4, 40], v[3, 50], c[0, 0, 66] = [math.nan] * 4
    arguments = moved(arguments, device)
    ours = torch.ops.amalgam.choice_step(*arguments, "triton")
    plain = torch.ops.amalgam.choice_step(*arguments, "reference")
    for one, other in zip(ours, plain, strict=True):
        assert torch.equal(one.isnan(), other.isnan())


@by_triton
def test_triton_choice_opcheck(device: str) -> None:
    inputs = wanting(*(t.to(device, torch.float32) for t in make_inputs(3, 1, 2)))
    rest = *moved(constants(3), device), "triton"
    torch.library.opcheck(torch.ops.amalgam.choice_step, (*inputs[:5], inputs[5:], *rest))


TYPES = {
    **{"ranks": "*i64", "n": "i32", "blocks": "i32", "size": "i32"},
    **{"time": "fp32", "learning_rate": "fp32", "partials": "*fp64"},
}
BUDGETS, CUDA_BUDGETS = budgets("choice_step")


def triton_costs(name: str, arch: int, k: int, numerics: str) -> dict[str, float]:
    """The costs of a choice of 2 x 20 units among k teachers."""
    from amalgam.kernels import choice_step as kernels
    from amalgam.kernels import lstm_weights
    from amalgam.kernels.configurations import configuration

    permitted = registry._parse(f"auto:{numerics}")[1]
    plan = lstm_weights.packing(2, 20, k + 4, k, torch.device("cpu"))
    operation = {"forward": "choice_step", "backward": "choice_step_backward"}[name]
    chosen = configuration(operation, 2, 20, permitted.precision)
    return costs_of(
        getattr(kernels, name),
        arch,
        TYPES,
        {
            **{"K": k, "POOL": 2 if k == 2 else 8, "LAYERS": 2, "HIDDEN": 20},
            **{"UNITS": plan.units, "FOLDED": plan.folded, "BLOCK": chosen.block},
            **{"PRECISION": permitted.precision, "APPROXIMATE": permitted.approximate},
            **{"PTX": True, "WIDE": False},
        },
        chosen.options,
        divisible=True,
    )


def costs_of_choice(case: str) -> dict[str, float]:
    name, arch, k, numerics = case.split()
    return triton_costs(name, int(arch.removeprefix("sm_")), int(k), numerics)


@pytest.mark.compiles(by=costs_of_choice)
@pytest.mark.parametrize("case", BUDGETS)
def test_kernels_keep_to_their_budgets(case: str, compilation: dict[str, float]) -> None:
    assert_within(compilation, BUDGETS[case])


CUDA_KERNELS = {
    "cuda forward sm_90 1x4": "choice_forwardILi4E",
    "cuda forward sm_90 1x8": "choice_forwardILi8E",
    "cuda backward sm_90 1x4 4": "choice_backwardILi4ELi4E",
    "cuda backward sm_90 1x4 8": "choice_backwardILi4ELi8E",
    "cuda backward sm_90 1x8 4": "choice_backwardILi8ELi4E",
    "cuda backward sm_90 1x8 8": "choice_backwardILi8ELi8E",
}
"""Fragments of the mangled names of CUDA's kernels; a backward is for so many teachers at most."""


def test_cuda_kernels_keep_to_their_budgets() -> None:
    assert_cuda_within(CUDA_BUDGETS, CUDA_KERNELS)
