"""``teacher_step`` in plain PyTorch: the truth that the other backends are held to."""

import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import amalgam  # noqa: F401  registers the operations
from amalgam.ops import KINDS, teacher_step

SIZES = [0, 1, 31, 33, 1000]
K = len(KINDS)
LR = [0.2, 0.5, 0.005, 0.01, 0.1, 0.3, 0.02, 0.03]
BETA1 = [0.9, 0.8, 0.7, 0.9, 0.5, 0.0, 0.95, 0.6]
BETA2 = [0.99, 0.9, 0.8, 0.95, 0.7, 0.9, 0.0, 0.5]
EPS = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-3, 1e-4, 1e-5]
NUMBERS = (LR, BETA1, BETA2, EPS)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def make_inputs(size: int, kinds: int = K) -> tuple[Tensor, Tensor, Tensor]:
    return draw(kinds, size), draw(kinds, size, seed=1), draw(kinds, size, seed=2).square()


def wanting(*tensors: Tensor) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


def op_settings(kinds: Sequence[str] = KINDS) -> tuple[Any, ...]:
    chosen = [KINDS.index(kind) for kind in kinds]
    return chosen, *([numbers[k] for k in chosen] for numbers in NUMBERS)


def through_op(*inputs: Tensor, kinds: Sequence[str] = KINDS) -> tuple[Tensor, ...]:
    return torch.ops.amalgam.teacher_step(*inputs, *op_settings(kinds), "reference")


def direct(*inputs: Tensor, kinds: Sequence[str] = KINDS) -> tuple[Tensor, ...]:
    _, *settings = op_settings(kinds)
    return teacher_step(*inputs, kinds, *settings, backend="reference")


def through_backward(grads_out: list[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.amalgam.teacher_step_backward(grads_out, *inputs, *op_settings(), "reference")


def scalar_rule(
    kind: str, g: float, m: float, v: float, lr: float, beta1: float, beta2: float, eps: float
) -> tuple[float, float, float]:
    """One coordinate, straight from the docstring's table."""
    if kind not in ("sgd", "rmsprop"):
        m = beta1 * m + (1 - beta1) * g
    if kind not in ("sgd", "momentum"):
        v = beta2 * v + (1 - beta2) * g * g
    root = math.sqrt(v + eps)
    s = math.tanh(g / root) * math.tanh(m / root)
    update = {
        "sgd": lambda: g,
        "momentum": lambda: m,
        "rmsprop": lambda: g / root,
        "adam": lambda: m / (1 - beta1) / math.sqrt(v / (1 - beta2) + eps),
        "powersign": lambda: math.exp(s) * g,
        "addsign": lambda: (1 + s) * g,
        "adaptive_powersign": lambda: math.exp(s) * g / root,
        "adaptive_addsign": lambda: (1 + s) * g / root,
    }[kind]()
    return lr * update, m, v


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_step_is_its_formula(kind: str, backend: str) -> None:
    k = KINDS.index(kind)
    numbers = [column[k] for column in NUMBERS]
    inputs = make_inputs(9, 1)
    found = teacher_step(*inputs, [kind], *([x] for x in numbers), backend=backend)
    rows = [scalar_rule(kind, *values, *numbers) for values in torch.cat(inputs).T.tolist()]
    for ours, theirs in zip(found, zip(*rows, strict=True), strict=True):
        expected = torch.tensor([theirs], dtype=torch.float64)
        assert torch.allclose(ours, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("size", SIZES)
def test_op_and_direct_path_agree(size: int) -> None:
    inputs = make_inputs(size)
    before = [t.clone() for t in inputs]
    for ours, theirs in zip(through_op(*inputs), direct(*inputs), strict=True):
        assert ours.shape == (K, size)
        assert torch.equal(ours, theirs)
    assert all(torch.equal(now, was) for now, was in zip(inputs, before, strict=True))


def test_outputs_are_no_views_of_the_inputs() -> None:
    inputs = make_inputs(4)
    before = [t.clone() for t in inputs]
    for output in (*through_op(*inputs), *direct(*inputs)):
        output.fill_(5)
    assert all(torch.equal(now, was) for now, was in zip(inputs, before, strict=True))


def test_moments_that_a_kind_lacks_pass_through() -> None:
    grads, m, v = make_inputs(5)
    _, new_m, new_v = direct(grads, m, v)
    for k, kind in enumerate(KINDS):
        assert torch.equal(new_m[k], m[k]) == (kind in ("sgd", "rmsprop"))
        assert torch.equal(new_v[k], v[k]) == (kind in ("sgd", "momentum"))


def test_a_pool_is_its_rows() -> None:
    order = [3, 0, 3, 7, 1, 2, 6, 5, 4]
    inputs = make_inputs(33, len(order))
    kinds = [KINDS[k] for k in order]
    together = direct(*inputs, kinds=kinds)
    for row, kind in enumerate(kinds):
        alone = direct(*(t[row : row + 1] for t in inputs), kinds=[kind])
        for ours, theirs in zip(together, alone, strict=True):
            assert torch.equal(ours[row], theirs[0])


def test_strided_rows_count_as_values() -> None:
    inputs = make_inputs(6)
    turned = [t.T.contiguous().T for t in inputs]
    assert not turned[0].is_contiguous()
    for path in (through_op, direct):
        assert all(torch.equal(a, b) for a, b in zip(path(*turned), path(*inputs), strict=True))


@pytest.mark.parametrize("path", [through_op, direct])
def test_no_kinds_is_nothing(path: Any) -> None:
    inputs = wanting(*make_inputs(4, 0))
    outputs = path(*inputs, kinds=[])
    assert all(t.shape == (0, 4) for t in outputs)
    grads = torch.autograd.grad(sum(t.sum() for t in outputs), inputs)
    assert all(t.shape == (0, 4) for t in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_errs_as_rounding_does(dtype: torch.dtype) -> None:
    """A dozen roundings at most stand between inputs and update, at conditions of order one."""
    inputs = [t.to(dtype) for t in make_inputs(1000)]
    truth = direct(*(t.double() for t in inputs))
    for ours, theirs in zip(direct(*inputs), truth, strict=True):
        assert ours.dtype == dtype
        error = (ours.double() - theirs).abs().amax(1)
        assert (error <= 12 * torch.finfo(dtype).eps * theirs.abs().amax(1)).all()
        assert error.max() > 0


# --- Derivatives ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", [through_op, direct])
def test_gradcheck(path: Any, kind: str) -> None:
    inputs = wanting(*make_inputs(4, 1))
    assert torch.autograd.gradcheck(lambda *t: path(*t, kinds=[kind]), inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_differentiable_twice(kind: str) -> None:
    inputs = wanting(*make_inputs(3, 1))
    assert torch.autograd.gradgradcheck(
        lambda *t: tuple(x.square() for x in direct(*t, kinds=[kind])), inputs
    )


@pytest.mark.parametrize("size", SIZES)
def test_hand_written_backward_is_autograds(size: int) -> None:
    inputs = wanting(*make_inputs(size))
    grads_out = [draw(K, size, seed=seed) for seed in (7, 8, 9)]
    theirs = torch.autograd.grad(direct(*inputs), inputs, grads_out)
    hand = through_backward(grads_out, *(t.detach() for t in inputs))
    wired = torch.autograd.grad(through_op(*inputs), inputs, grads_out)
    for ours, expected, automatic in zip(hand, theirs, wired, strict=True):
        assert ours.shape == (K, size)
        assert torch.equal(ours, automatic)
        if size:
            scale = expected.abs().amax(1, keepdim=True)
            assert ((ours - expected).abs() <= 1e-12 * scale).all()


def test_backward_over_eight_decades_and_zeros() -> None:
    """Each coordinate is held to its own terms' magnitude: they differ by as many decades."""
    grads = torch.logspace(-4, 4, 41, dtype=torch.float64).repeat(K, 1)
    grads[:, ::4] *= -1
    grads[:, ::5] = 0
    inputs = wanting(grads, 0.3 * grads, grads.square() / 2)
    outputs = direct(*inputs)
    assert all(t.isfinite().all() for t in outputs)
    grads_out = [draw(K, 41, seed=seed) for seed in (7, 8, 9)]
    theirs = torch.autograd.grad(outputs, inputs, grads_out)
    hand = through_backward(grads_out, *(t.detach() for t in inputs))
    for ours, expected in zip(hand, theirs, strict=True):
        assert expected.isfinite().all()
        assert torch.allclose(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("eps", [1e-10, 1e-3])
def test_zero_gradients_from_zero_state_move_nothing(eps: float) -> None:
    zeros = torch.zeros(K, 33, dtype=torch.float64)
    found = teacher_step(zeros, zeros, zeros, KINDS, LR, BETA1, BETA2, [eps] * K)
    assert not any(t.any() for t in found)


def test_unused_outputs() -> None:
    for output in range(3):
        inputs = wanting(*make_inputs(5))
        ours = torch.autograd.grad(through_op(*inputs)[output].sum(), inputs[0])[0]
        theirs = torch.autograd.grad(direct(*inputs)[output].sum(), inputs[0])[0]
        assert theirs.any()
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-15)


# --- The operators' contracts ---


@pytest.mark.parametrize("size", [0, 3])
@pytest.mark.parametrize("kinds", [KINDS, ()])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_step(size: int, kinds: Sequence[str], requires_grad: bool) -> None:
    inputs = list(make_inputs(size, len(kinds)))
    arguments = (*(wanting(*inputs) if requires_grad else inputs), *op_settings(kinds))
    torch.library.opcheck(torch.ops.amalgam.teacher_step, (*arguments, "reference"))


@pytest.mark.parametrize("size", [0, 3])
def test_opcheck_backward(size: int) -> None:
    inputs = make_inputs(size)
    grads_out = [draw(K, size, seed=seed) for seed in (7, 8, 9)]
    torch.library.opcheck(
        torch.ops.amalgam.teacher_step_backward,
        (grads_out, *inputs, *op_settings(), "reference"),
    )


def test_compile_traces_the_operator_whole() -> None:
    @torch.compile(backend="eager", fullgraph=True)
    def compiled(grads: Tensor, m: Tensor, v: Tensor) -> Tensor:
        return 2 * torch.ops.amalgam.teacher_step(grads, m, v, *op_settings(), "reference")[0]

    inputs = make_inputs(5)
    assert torch.equal(compiled(*inputs), 2 * direct(*inputs)[0])


# --- Errors ---

ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"grads": [[0.0]]}, TypeError, "grads must be a floating-point tensor, not list"),
    (
        {"grads": torch.zeros(2, 3, dtype=torch.int64)},
        TypeError,
        "grads must be a floating-point tensor, not torch.int64",
    ),
    ({"grads": draw(3)}, ValueError, "grads must have shape (2, N), a row a kind, not (3,)"),
    ({"grads": draw(3, 3)}, ValueError, "grads must have shape (2, N), a row a kind, not (3, 3)"),
    ({"grads": draw(2, 3, 1)}, ValueError, "grads must have shape (2, N)"),
    ({"kinds": ["adam"]}, ValueError, "grads must have shape (1, N)"),
    ({"kinds": ["adam", "adamw"]}, ValueError, "kinds must be among"),
    ({"lr": [0.1]}, ValueError, "lr must hold 2 numbers, one a kind, not 1"),
    ({"beta1": [0.1] * 3}, ValueError, "beta1 must hold 2 numbers, one a kind, not 3"),
    ({"beta2": []}, ValueError, "beta2 must hold 2 numbers, one a kind, not 0"),
    ({"eps": [0.1]}, ValueError, "eps must hold 2 numbers, one a kind, not 1"),
    ({"m": draw(2, 4)}, ValueError, "m must have the shape of grads, (2, 3), not (2, 4)"),
    ({"v": draw(1, 3)}, ValueError, "v must have the shape of grads, (2, 3), not (1, 3)"),
    ({"m": draw(2, 3).float()}, ValueError, "m must be torch.float64 on cpu as grads is"),
    ({"v": draw(2, 3).to("meta")}, ValueError, "not torch.float64 on meta"),
    ({"backend": "cpp"}, ValueError, "backend must be one of"),
]


@pytest.mark.parametrize(("change", "kind", "why"), ERRORS)
def test_errors_name_the_argument(change: dict[str, Any], kind: type[Exception], why: str) -> None:
    arguments = {
        "grads": draw(2, 3),
        "m": draw(2, 3),
        "v": draw(2, 3).square(),
        "kinds": ["adam", "sgd"],
        "lr": [0.1, 0.1],
        "beta1": [0.9, 0.9],
        "beta2": [0.9, 0.9],
        "eps": [1e-8, 1e-8],
    } | change
    with pytest.raises(kind, match=re.escape(why)):
        teacher_step(**arguments)
