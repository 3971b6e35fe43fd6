"""``teacher_step``: plain PyTorch, and the compiled kernels that are held to it."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import Errors, assert_at_most_twice, errors_of, kept, largest, of_a_row
from machine_code import (
    MachineCode,
    assert_cuda_within,
    assert_within,
    budgets,
    compile_kernel,
)
from places import INTERPRETED, ON_CPU, ON_CPU_ONCE, ON_HOST, at, compiled, on_gpus
from torch import Tensor

from amalgam.backends import core
from amalgam.ops import KINDS, teacher_step

BUDGETS, CUDA_BUDGETS = budgets("teacher_step")
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
    """An update takes a dozen roundings at most, and each moves it by about a unit."""
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


# --- The compiled kernels ---

everywhere = at(*ON_CPU, *on_gpus("triton", "cuda"), *INTERPRETED, *ON_HOST)
# The interpreter takes minutes for numerical gradients; one instruction set is enough for them.
compiled_once = at(*ON_CPU_ONCE, *on_gpus("triton", "cuda"))
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
Long = np.longdouble
OUTPUTS = ("updates", "m", "v", "in_grads", "in_m", "in_v")


def stepped(*inputs: Tensor, kinds: Sequence[str] = KINDS, backend: str) -> list[Tensor]:
    return list(torch.ops.amalgam.teacher_step(*inputs, *op_settings(kinds), backend))


def gradients(
    grads_out: Sequence[Tensor], *inputs: Tensor, kinds: Sequence[str] = KINDS, backend: str
) -> list[Tensor]:
    return list(
        torch.ops.amalgam.teacher_step_backward(
            list(grads_out), *inputs, *op_settings(kinds), backend
        )
    )


def both(grads_out: Sequence[Tensor], *inputs: Tensor, backend: str) -> list[Tensor]:
    kinds = [KINDS[k % K] for k in range(len(inputs[0]))]
    forward = stepped(*inputs, kinds=kinds, backend=backend)
    return forward + gradients(grads_out, *inputs, kinds=kinds, backend=backend)


def truth(grads_out: Sequence[Tensor], *inputs: Tensor) -> list[np.ndarray]:
    """Updates, moments and the three gradients in the platform's long double."""
    d_u, d_m, d_v, g, m, v = (t.cpu().double().numpy().astype(Long) for t in (*grads_out, *inputs))
    rows = []
    for k, kind in enumerate(KINDS[: len(g)]):
        lr, b1, b2, eps = (Long(column[k]) for column in NUMBERS)
        rows.append(true_row(kind, lr, b1, b2, eps, d_u[k], d_m[k], d_v[k], g[k], m[k], v[k]))
    return [np.stack(column) for column in zip(*rows, strict=True)]


def yardsticks(
    draws: Sequence[tuple[list[Tensor], list[Tensor]]],
) -> list[tuple[list[Tensor], list[np.ndarray]]]:
    """Plain PyTorch's results of each draw, and the truth."""
    return [
        (both(grads_out, *inputs, backend="reference"), truth(grads_out, *inputs))
        for grads_out, inputs in draws
    ]


def true_row(
    kind: str,
    lr: Any,
    b1: Any,
    b2: Any,
    eps: Any,
    d: Any,
    d_m: Any,
    d_v: Any,
    g: Any,
    m: Any,
    v: Any,
) -> tuple[np.ndarray, ...]:
    has_m, has_v = kind not in ("sgd", "rmsprop"), kind not in ("sgd", "momentum")
    m = b1 * m + (1 - b1) * g if has_m else m
    v = b2 * v + (1 - b2) * g * g if has_v else v
    d = lr * d
    d_g = np.zeros_like(g)
    if kind == "sgd":
        update, d_g = g, d
    elif kind == "momentum":
        update, d_m = m, d_m + d
    elif kind == "adam":
        scale = 1 / np.sqrt(v / (1 - b2) + eps)
        update = m / (1 - b1) * scale
        d_m = d_m + d * scale / (1 - b1)
        d_v = d_v - d * update * scale**2 / (2 * (1 - b2))
    else:
        scale = 1 / np.sqrt(v + eps)
        along = g * scale if kind == "rmsprop" or "adaptive" in kind else g
        slope = scale if kind == "rmsprop" or "adaptive" in kind else 1
        if kind == "rmsprop":
            bracket, d_bracket = Long(1), Long(0)
        else:
            agreement = np.tanh(g * scale) * np.tanh(m * scale)
            bracket = np.exp(agreement) if "power" in kind else 1 + agreement
            d_bracket = d * along * (bracket if "power" in kind else 1)
        update = bracket * along
        in_g = d_bracket * np.tanh(m * scale) * (1 - np.tanh(g * scale) ** 2)
        in_m = d_bracket * np.tanh(g * scale) * (1 - np.tanh(m * scale) ** 2)
        d_g = d * bracket * slope + in_g * scale
        d_m = d_m + in_m * scale
        d_scale = in_g * g + in_m * m + (d * bracket * g if along is not g else 0)
        d_v = d_v - d_scale * scale**3 / 2
    if has_m:
        d_g, d_m = d_g + (1 - b1) * d_m, b1 * d_m
    if has_v:
        d_g, d_v = d_g + 2 * (1 - b2) * g * d_v, b2 * d_v
    return lr * update, m, v, d_g, d_m, d_v


def kernel_inputs(
    size: int,
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
    skewed: bool = False,
    rows: int = K,
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients in the outputs, and inputs; skewed gradients span eight decades, a tenth is 0."""
    generator = torch.Generator().manual_seed(1000 * seed + size)

    def values() -> Tensor:
        return torch.randn(rows, size, dtype=torch.float64, generator=generator)

    grads_out = [values() for _ in range(3)]
    g, m, v = values(), values(), values().square()
    if skewed:
        uniform = torch.rand(rows, size, dtype=torch.float64, generator=generator)
        factor = 10 ** (8 * uniform - 4) * (uniform > 0.1)
        g, m, v = g * factor, m * factor, v * factor.square()
    return [t.to(device, dtype) for t in grads_out], [t.to(device, dtype) for t in (g, m, v)]


def both_of_each(
    draws: Sequence[tuple[list[Tensor], list[Tensor]]], backend: str
) -> list[Sequence[Tensor]]:
    """Both of each draw. GPUs' kernels take all in one call: stand-ins for a GPU start slowly."""
    if backend not in ("triton", "cuda"):
        return [both(grads_out, *inputs, backend=backend) for grads_out, inputs in draws]
    flat = [(*grads_out, *inputs) for grads_out, inputs in draws]
    joined = [torch.cat(column, 1) for column in zip(*flat, strict=True)]
    found = both(joined[:3], *joined[3:], backend=backend)
    return list(zip(*(t.split(flat[0][0].shape[1], 1) for t in found), strict=True))


def relative_errors(
    ours: Tensor, plain: Tensor, exact: np.ndarray, largest_of_rows: np.ndarray
) -> Errors:
    """Of a result's rows, over each row's largest value; half a unit in its last place is granted.

    It is what writing the value down costs.
    """
    scale = torch.from_numpy(largest_of_rows.astype(np.float64))
    errors = errors_of(ours, plain, exact, 0.0, of_a_row)
    unit = torch.full_like(errors.ours, torch.finfo(ours.dtype).eps / 2)
    return Errors(errors.ours / scale, errors.plain / scale, unit)


COMPILED = (*ON_CPU, *on_gpus("triton", "cuda"))


@pytest.mark.parametrize(
    ("backend", "device", "size", "seeds"),
    [
        pytest.param(*place.values, size, seeds, id=f"{place.id}-{size}", marks=place.marks)
        for places, sizes in (
            (COMPILED, ((31, 200), (33, 200), (1000, 40), (1025, 40), (65537, 2))),
            ((*INTERPRETED, *ON_HOST), ((33, 40),)),  # where coordinates take seconds
        )
        for size, seeds in sizes
        for place in places
    ],
    indirect=["backend"],
)
@dtypes
@pytest.mark.parametrize("skewed", [False, True])
def test_accuracy(
    backend: str, device: str, dtype: torch.dtype, skewed: bool, size: int, seeds: int
) -> None:
    """Every row's largest error over many seeds is at most twice PyTorch's."""
    draws = [kernel_inputs(size, dtype, device, seed, skewed) for seed in range(seeds)]
    errors: list[list[Errors]] = [[] for _ in OUTPUTS]
    for found, known in zip(both_of_each(draws, backend), kept(yardsticks, draws), strict=True):
        assert all(t.dtype == dtype and t.isfinite().all() for t in found)
        for output, ours, theirs, exact in zip(errors, found, *known, strict=True):
            scale = np.abs(exact).max(1)  # of beta2 = 0 some gradients are zero, exactly
            scale = np.where(scale > 0, scale, 1)
            output.append(relative_errors(ours, theirs, exact, scale))
    for name, output in zip(OUTPUTS, errors, strict=True):
        assert len(output) == seeds
        assert_at_most_twice(f"{name} of {KINDS}", [largest(output)])


@everywhere
@dtypes
def test_zeros(backend: str, device: str, dtype: torch.dtype) -> None:
    grads_out, inputs = kernel_inputs(33, dtype, device)
    zeros = [torch.zeros_like(t) for t in inputs]
    plain = both(grads_out, *zeros, backend="reference")
    for ours, theirs in zip(both(grads_out, *zeros, backend=backend), plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=4 * torch.finfo(dtype).eps)
    assert not any(t.any() for t in stepped(*zeros, backend=backend))


@everywhere
@dtypes
def test_copies_the_moments_that_a_kind_lacks(
    backend: str, device: str, dtype: torch.dtype
) -> None:
    grads_out, inputs = kernel_inputs(1025, dtype, device)
    _, m, v, _, in_m, in_v = both(grads_out, *inputs, backend=backend)
    for k, kind in enumerate(KINDS):
        if kind in ("sgd", "rmsprop"):
            assert torch.equal(m[k], inputs[1][k])
            assert torch.equal(in_m[k], grads_out[1][k])
        if kind in ("sgd", "momentum"):
            assert torch.equal(v[k], inputs[2][k])
            assert torch.equal(in_v[k], grads_out[2][k])


@everywhere
@dtypes
@pytest.mark.parametrize("rows", [0, 1, 6])
def test_pools_of_any_size_leave_their_inputs_alone(
    backend: str, device: str, dtype: torch.dtype, rows: int
) -> None:
    grads_out, inputs = kernel_inputs(1025, dtype, device, rows=rows)
    before = [t.clone() for t in (*grads_out, *inputs)]
    for t in both(grads_out, *inputs, backend=backend):
        assert t.shape == (rows, 1025)
        assert t.isfinite().all()
    assert all(map(torch.equal, (*grads_out, *inputs), before))


@everywhere
@dtypes
def test_result_does_not_depend_on_the_place(backend: str, device: str, dtype: torch.dtype) -> None:
    """A coordinate alone, in the padded tail or at an odd address gets the bits it gets elsewhere.

    So the accuracy of few coordinates is that of many, where it can be judged.
    """
    grads_out, inputs = kernel_inputs(1025, dtype, device, skewed=True)
    whole = both(grads_out, *inputs, backend=backend)
    for start, stop in ((0, 0), (0, 1), (5, 6), (3, 36), (1, 1024), (1024, 1025)):
        parts = [[t[:, start:stop] for t in ts] for ts in (grads_out, inputs)]
        found = both(parts[0], *parts[1], backend=backend)
        for ours, expected in zip(found, whole, strict=True):
            assert torch.equal(ours, expected[:, start:stop])


@everywhere
@dtypes
def test_strided_inputs(backend: str, device: str, dtype: torch.dtype) -> None:
    grads_out, inputs = kernel_inputs(33, dtype, device)
    expected = both(grads_out, *inputs, backend=backend)
    turned = [[t.T.contiguous().T for t in ts] for ts in (grads_out, inputs)]
    spread = [
        [torch.stack((t, t), -1).flatten(1)[:, ::2] for t in ts] for ts in (grads_out, inputs)
    ]
    for outs, ins in (turned, spread):
        assert not ins[0].is_contiguous()
        assert all(map(torch.equal, both(outs, *ins, backend=backend), expected))
    row = [t[:1].expand(K, -1) for t in inputs]
    expected = both(grads_out, *(t.clone() for t in row), backend=backend)
    assert all(map(torch.equal, both(grads_out, *row, backend=backend), expected))


@everywhere
@dtypes
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_inputs_propagate_as_in_pytorch(
    backend: str, device: str, dtype: torch.dtype, which: int, bad: float
) -> None:
    for where in (0, 40):
        grads_out, inputs = kernel_inputs(41, dtype, device, seed=3)
        inputs[which][:, where] = bad
        plain = both(grads_out, *inputs, backend="reference")
        for ours, theirs in zip(both(grads_out, *inputs, backend=backend), plain, strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True)


@compiled_once
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_gradcheck(backend: str, device: str, kind: str) -> None:
    inputs = wanting(*(t.to(device) for t in make_inputs(35, 1)))
    assert torch.autograd.gradcheck(
        lambda *t: tuple(stepped(*t, kinds=[kind], backend=backend)), inputs
    )


@at(*ON_CPU_ONCE, *on_gpus("triton", "cuda"), *INTERPRETED)
@pytest.mark.parametrize("size", [0, 33])
@pytest.mark.parametrize("kinds", [KINDS, ()])
def test_kernels_opcheck(backend: str, device: str, size: int, kinds: Sequence[str]) -> None:
    grads_out, inputs = kernel_inputs(size, torch.float32, device, rows=len(kinds))
    settings = (*op_settings(kinds), backend)
    torch.library.opcheck(torch.ops.amalgam.teacher_step, (*wanting(*inputs), *settings))
    torch.library.opcheck(torch.ops.amalgam.teacher_step_backward, (grads_out, *inputs, *settings))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@dtypes
@compiled
@pytest.mark.usefixtures("threads")
def test_same_bits_for_any_number_of_threads(backend: str, dtype: torch.dtype) -> None:
    grads_out, inputs = kernel_inputs(65537, dtype, "cpu", skewed=True)
    torch.set_num_threads(1)
    alone = both(grads_out, *inputs, backend=backend)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert all(map(torch.equal, both(grads_out, *inputs, backend=backend), alone))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"], indirect=True)
@dtypes
def test_same_bits_again_and_on_another_stream(backend: str, dtype: torch.dtype) -> None:
    grads_out, inputs = kernel_inputs(10**5 + 1, dtype, "cuda")
    first = both(grads_out, *inputs, backend=backend)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        again = both(grads_out, *inputs, backend=backend)
    torch.cuda.synchronize()
    assert all(map(torch.equal, first, again))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"], indirect=True)
def test_more_elements_than_32_bits_count(backend: str) -> None:
    n = 2**30 + 512
    if torch.cuda.mem_get_info()[0] < 40 * n:
        pytest.skip("needs 40 GiB of free GPU memory")
    ends = torch.tensor([[0.5, 2.0]], device="cuda")
    whole = torch.zeros(2, n, device="cuda")
    whole[1, :: n - 1] = ends
    kinds = ["sgd", "adaptive_powersign"]
    expected = stepped(*[ends] * 3, kinds=kinds[1:], backend=backend)
    for found, row in zip(
        stepped(*[whole] * 3, kinds=kinds, backend=backend), expected, strict=True
    ):
        assert torch.equal(found[1, :: n - 1], row[0])
        assert not found[0].any()
        assert not found[1, 1:-1].any()
    del found
    expected = gradients([ends] * 3, *[ends] * 3, kinds=kinds[1:], backend=backend)
    results = gradients([whole] * 3, *[whole] * 3, kinds=kinds, backend=backend)
    for found, row in zip(results, expected, strict=True):
        assert torch.equal(found[1, :: n - 1], row[0])
        assert not found[0].any()
        assert not found[1, 1:-1].any()


@everywhere
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"kinds": [8]}, "kinds must be numbers below 8, not [8]"),
        ({"kinds": [0, 1]}, "grads must have shape (2, N), a row a kind, not (1, 3)"),
        ({"eps": []}, "eps must hold 1 numbers, one a kind, not 0"),
        ({"m": torch.zeros(1, 2)}, "m must have shape (1, 3), not (1, 2)"),
    ],
)
def test_kernels_check_before_they_take_addresses(
    backend: str, device: str, change: dict[str, Any], why: str
) -> None:
    zeros, number = torch.zeros(1, 3, device=device), [0.5]
    arguments = {"grads": zeros, "m": zeros, "v": zeros, "kinds": [0], "lr": number,
                 "beta1": number, "beta2": number, "eps": number} | change  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(why)):
        torch.ops.amalgam.teacher_step(**arguments, backend=backend)


@pytest.mark.parametrize("kind", [-1, K])
@pytest.mark.parametrize("name", ["teacher_step_float32", "teacher_step_backward_float32"])
def test_the_core_refuses_kinds_that_it_does_not_have(name: str, kind: int) -> None:
    """A core of an older build may know fewer kinds than Python does."""
    addresses = [0] * (9 if "backward" in name else 6)
    function = getattr(core.core().cpu, name)
    with pytest.raises(ValueError, match=f"kinds must be numbers below {K}, not {kind}"):
        function(*addresses, n=0, k=1, kinds=[kind], lr=[1.0], beta1=[0.5], beta2=[0.5], eps=[1.0],
                 threads=1)  # fmt: skip


def compiled_for(kernel: str, dtype: torch.dtype, arch: int) -> MachineCode:
    from amalgam.kernels import teacher_step as kernels

    function = getattr(kernels, kernel)
    pointer = "*fp32" if dtype == torch.float32 else "*fp64"
    types = dict.fromkeys(function.arg_names, pointer) | {"n": "i64"}
    constants = {"BLOCK": kernels.BYTES // dtype.itemsize}
    return compile_kernel(function, arch, types, constants, True, kernels.OPTIONS)


@pytest.mark.compiles(by=compiled_for)
@pytest.mark.parametrize("arch", [80, 90, 100])
@dtypes
@pytest.mark.parametrize("kernel", ["forward", "gradients"])
def test_triton_kernels_compile_without_spills(
    kernel: str, dtype: torch.dtype, arch: int, compilation: MachineCode
) -> None:
    from amalgam.kernels.teacher_step import BYTES, OPTIONS

    costs = compilation.costs(BYTES / dtype.itemsize / (32 * OPTIONS["num_warps"]))
    assert_within(costs, BUDGETS[f"{kernel} sm_{arch} {str(dtype).removeprefix('torch.')}"])
    wide = "v4" if dtype == torch.float32 else "v2"
    for access in ("ld", "st"):
        assert re.search(rf"{access}\.global\S*\.{wide}", compilation.ptx)
    assert not re.search(r"\b(ld|st)\.local", compilation.ptx)
    assert compilation.count("LDG") > 0
    assert compilation.count("LDL", "STL") == 0


CUDA_KERNELS = {
    f"cuda {name} sm_90 {dtype}": f"{kernel}I{letter}E"
    for name, kernel in (("forward", "teachers_forward"), ("gradients", "teachers_backward"))
    for dtype, letter in (("float32", "f"), ("float64", "d"))
}
"""Fragments of the mangled names of CUDA's kernels, which hold all kinds of teachers."""


def test_cuda_kernels_keep_to_their_budgets() -> None:
    assert_cuda_within(CUDA_BUDGETS, CUDA_KERNELS)


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
    ({"kinds": "adam"}, TypeError, "kinds must hold an entry a teacher, ['adam'], not 'adam'"),
    ({"lr": 0.1}, TypeError, "lr must hold an entry a teacher, [0.1], not 0.1"),
    ({"lr": [0.1]}, ValueError, "lr must hold 2 numbers, one a kind, not 1"),
    ({"beta1": [0.1] * 3}, ValueError, "beta1 must hold 2 numbers, one a kind, not 3"),
    ({"beta2": []}, ValueError, "beta2 must hold 2 numbers, one a kind, not 0"),
    ({"eps": [0.1]}, ValueError, "eps must hold 2 numbers, one a kind, not 1"),
    ({"m": draw(2, 4)}, ValueError, "m must have shape (2, 3), not (2, 4)"),
    ({"v": draw(1, 3)}, ValueError, "v must have shape (2, 3), not (1, 3)"),
    (
        {"m": draw(2, 3).float()},
        ValueError,
        "m must be torch.float64 on cpu, not torch.float32 on cpu",
    ),
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
