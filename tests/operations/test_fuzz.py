"""Hypothesis drives every operation of the ``cpu`` backend; the reference in float64 is the truth.

The rule is that of accuracy.py, of one draw. Its unit is FEW times what the exact result moves by
where every operation of the reference rounds at random to the dtype's digits: it grows where terms
cancel, and only there. Of some thousand results none needed a FEW beyond 2.5 where elements are
judged together, nor beyond 5.4 where each is judged alone.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from accuracy import (
    Together,
    assert_at_most_twice,
    doubled,
    errors_of,
    flat,
    of_a_coordinate,
    of_a_row,
    of_a_tensor,
    what_rounding_costs,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from amalgam.backends import cpu
from amalgam.operations import choice_step, registry, student_step
from amalgam.operations.teacher_distance import DistanceArguments
from amalgam.operations.teacher_step import PoolSettings
from amalgam.ops import KINDS, StepSettings, StudentState

EXAMPLES = 30
FEW = 8
HALVES = (torch.float32, torch.bfloat16, torch.float16)

Results = list[Tensor]
Function = Callable[..., Any]

fuzz = settings(deadline=None, max_examples=EXAMPLES, derandomize="CI" in os.environ)
seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from((torch.float32, torch.float64))
layouts = st.sampled_from(("dense", "sliced", "offset", "transposed", "expanded"))
contents = st.sampled_from(("normal", "decades", "zeros", "denormals", "duplicates", "mixed"))
architectures = st.sampled_from(((1, 1), (1, 4), (1, 8), (2, 4), (2, 20), (3, 5)))


def sizes(power: int) -> st.SearchStrategy[int]:
    """Sizes from 0 to 300, and those beside the powers of two up to ``2**power``."""
    near = [2**p + d for p in range(3, power + 1) for d in (-1, 0, 1)]
    return st.integers(0, 300) | st.sampled_from(near)


def needs(*operations: str) -> Any:
    missing = [each for each in operations if each not in cpu.backend.kernels]
    return pytest.mark.skipif(bool(missing), reason=f"the cpu backend has no {missing} yet")


class Draws:
    """Tensors of a seed, in all values and layouts, exact in ``dtype``."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def values(self, content: str, *shape: int) -> Tensor:
        normal = self.normal(*shape)
        uniform = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        kinds = {
            "normal": normal,
            "decades": normal * 10 ** (8 * uniform - 4),
            "zeros": torch.zeros(shape, dtype=torch.float64),
            "denormals": normal * (torch.finfo(self.dtype).tiny / 8),
            "duplicates": (2 * normal).round() / 4,
        }
        if content == "mixed":
            which = (uniform * len(kinds)).long()
            parts = torch.stack([*kinds.values()])
            return parts.gather(0, which[None])[0].to(self.dtype)
        return kinds[content].to(self.dtype)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The values in other strides; expanding repeats the first column."""
    if layout == "sliced":
        spread = values.new_full((*values.shape[:-1], 2 * values.shape[-1]), math.nan)
        spread[..., ::2] = values
        return spread[..., ::2]
    if layout == "offset":
        spread = values.new_full((values.numel() + 1,), math.nan)
        spread[1:] = values.reshape(-1)
        return spread[1:].view(values.shape)
    if layout == "transposed":
        order = tuple(reversed(range(values.dim())))
        return values.permute(order).contiguous().permute(order)
    if layout == "expanded" and values.shape[-1]:
        return values[..., :1].expand(values.shape)
    return values


def mapped(change: Callable[[Tensor], Tensor], arguments: Sequence[Any]) -> list[Any]:
    return [
        change(each)
        if isinstance(each, Tensor)
        else mapped(change, each)
        if isinstance(each, (list, tuple))
        else each
        for each in arguments
    ]


def tensors_in(argument: Any) -> Results:
    if isinstance(argument, (list, tuple)):
        return [tensor for each in argument for tensor in tensors_in(each)]
    return [argument] if isinstance(argument, Tensor) else []


def operation(name: str, backend: str) -> Function:
    overload = getattr(torch.ops.amalgam, name)
    return lambda *arguments: overload(*arguments, backend)


def reference_of(name: str) -> Function:
    """The reference of an operation as plain Python, into which modes of PyTorch see."""
    kernel = registry.reference.kernels[name].function
    structured = {
        "student_step": lambda *flat: student_step._structured(*flat, "")[:-1],
        "choice_step": lambda *flat: choice_step._structured(*flat, "")[:-1],
        "teacher_step": lambda grads, m, v, *pool: (grads, m, v, PoolSettings(*pool)),
    }.get(name.removesuffix("_backward"))
    if name == "student_unroll_backward":
        return lambda grads, adjoints, m, v, h, c, weights, *settings: kernel(
            *(grads, adjoints, StudentState(m, v, h, c), weights, StepSettings(*settings))
        )
    if name == "teacher_distance":
        return lambda *flat: [each.squeeze(0) for each in kernel(one_row(*flat))]
    if name == "teacher_distance_backward":
        return lambda grad, student, teachers, total, eps, delta, need_teachers: of_one_row(
            kernel(grad[None], total[None], one_row(student, teachers, eps, delta), need_teachers)
        )
    assert structured is not None, name
    if name.endswith("_backward"):
        upstream = {
            "student_step_backward": lambda d, *state: (d, StudentState(*state)),
            "choice_step_backward": lambda d, *rest: (d, StudentState(*rest[:4]), rest[4]),
            "teacher_step_backward": lambda *grads_out: (grads_out,),
        }[name]
        return lambda grads_out, *flat: kernel(*upstream(*grads_out), *structured(*flat))
    return lambda *flat: kernel(*structured(*flat))


def assert_accurate(
    name: str, arguments: Sequence[Any], dtype: torch.dtype, together: Together = of_a_row
) -> None:
    """The cpu backend's kernel against the reference.

    Args:
        name: The operation.
        arguments: The kernel's.
        dtype: What it computes in.
        together: Takes errors to the largest of those elements that share their intermediates.
    """
    reference = reference_of(name)
    before = mapped(torch.clone, arguments)
    ours = flat(operation(name, "cpu")(*arguments))
    for now, was in zip(tensors_in(arguments), tensors_in(before), strict=True):
        assert torch.equal(now, was)
    compare(name, ours, flat(reference(*arguments)), reference, arguments, dtype, together)


def compare(
    name: str,
    ours: Results,
    plain: Results,
    reference: Function,
    arguments: Sequence[Any],
    dtype: torch.dtype,
    together: Together,
) -> None:
    truth = flat(reference(*doubled(arguments)))
    costs = what_rounding_costs(reference, arguments, truth, dtype)
    for index, (found, rival, true, cost) in enumerate(zip(ours, plain, truth, costs, strict=True)):
        unit = FEW * (cost + torch.finfo(found.dtype).smallest_normal)
        errors = errors_of(found, rival, true, unit, together)
        assert_at_most_twice(f"{name}, result {index}", [errors])


# --- teacher_distance ---


def one_row(
    student: Tensor, teachers: Tensor, eps: float, huber_delta: float | None
) -> DistanceArguments:
    return DistanceArguments(student[None], teachers[:, None], eps, huber_delta)


def of_one_row(gradients: tuple[Tensor, Tensor]) -> Results:
    in_students, in_teachers = gradients
    return [
        in_students.squeeze(0),
        in_teachers.squeeze(1) if in_teachers.dim() > 1 else in_teachers,
    ]


@needs("teacher_distance", "teacher_distance_backward")
@fuzz
@given(
    n=sizes(14),
    k=st.integers(0, 7),
    dtype=dtypes,
    layout=st.tuples(layouts, layouts),
    content=st.tuples(contents, contents),
    twins=st.booleans(),
    huber_delta=st.sampled_from((None, 0.01, 1.0)),
    seed=seeds,
)
def test_teacher_distance(
    n: int,
    k: int,
    dtype: torch.dtype,
    layout: tuple[str, str],
    content: tuple[str, str],
    twins: bool,
    huber_delta: float | None,
    seed: int,
) -> None:
    draws = Draws(seed, dtype)
    student = laid_out(draws.values(content[0], n), layout[0])
    teachers = draws.values(content[1], k, n)
    if twins and k:
        teachers[0] = student
    teachers = laid_out(teachers, layout[1])
    constants = 1e-10, huber_delta

    assert_accurate("teacher_distance", (student, teachers, *constants), dtype)
    total = reference_of("teacher_distance")(student, teachers, *constants)
    grad = laid_out(draws.values("normal", k), layout[0]) if k else student.new_empty(0)
    backward = grad, student, teachers, total[1], *constants
    for need_teachers in (False, True):
        assert_accurate("teacher_distance_backward", (*backward, need_teachers), dtype)


# --- teacher_step ---


def pool_constants(draws: Draws, k: int) -> list[list[float]]:
    of_each = zip(*((0.1, 0.9, 0.999, 1e-10), (0.01, 0.5, 0.9, 1e-6)), strict=True)
    uniform = torch.randint(0, 2, (4, k), generator=draws.generator).tolist()
    return [[pair[i] for i in row] for pair, row in zip(of_each, uniform, strict=True)]


def moments(draws: Draws, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Moments as gradients of about this size leave them; they are zero where it is zero."""
    sizes = torch.rand((2, *grad.shape), generator=draws.generator, dtype=torch.float64) + 0.1
    m, v = draws.normal(*grad.shape) * grad.double(), sizes[1] * grad.double().square()
    return m.to(draws.dtype), v.to(draws.dtype)


def fitting(layout: Sequence[str]) -> list[str]:
    """Let moments expand only where the gradient does; otherwise they differ by decades."""
    grad, *rest = layout
    alone = [how if how != "expanded" or how == grad else "sliced" for how in rest[:2]]
    return [grad, *alone, *rest[2:]]


@needs("teacher_step", "teacher_step_backward")
@fuzz
@given(
    n=sizes(12),
    kinds=st.lists(st.integers(0, len(KINDS) - 1), max_size=9),
    dtype=dtypes,
    layout=st.tuples(layouts, layouts, layouts),
    content=contents,
    seed=seeds,
)
def test_teacher_step(
    n: int, kinds: list[int], dtype: torch.dtype, layout: Sequence[str], content: str, seed: int
) -> None:
    draws, k = Draws(seed, dtype), len(kinds)
    grads = draws.values(content, k, n)
    m, v = moments(draws, grads)
    inputs = [laid_out(t, how) for t, how in zip((grads, m, v), fitting(layout), strict=True)]
    constants = kinds, *pool_constants(draws, k)

    assert_accurate("teacher_step", (*inputs, *constants), dtype)
    grads_out = [laid_out(draws.values("normal", k, n), how) for how in layout]
    assert_accurate("teacher_step_backward", (grads_out, *inputs, *constants), dtype)


# --- student_step and choice_step ---


def lstm_weights(
    draws: Draws, layers: int, hidden: int, features: int = 2, outputs: int = 1
) -> list[Tensor]:
    weights = []
    for layer in range(layers):
        inputs = hidden if layer else features
        weights += [
            draws.normal(4 * hidden, inputs) / inputs**0.5,
            draws.normal(4 * hidden, hidden) / hidden**0.5,
            draws.normal(4 * hidden),
        ]
    weights += [draws.normal(outputs, hidden) / hidden**0.5, draws.normal(outputs)]
    return [weight.to(draws.dtype) for weight in weights]


def cells(draws: Draws, layers: int, hidden: int, n: int) -> list[Tensor]:
    h, c = draws.normal(layers, hidden, n).tanh(), draws.normal(layers, hidden, n)
    return [h.to(draws.dtype), c.to(draws.dtype)]


def of_form(
    draws: Draws,
    nominal: bool,
    sizes: Sequence[int],
    layers: int,
    hidden: int,
    steps: Sequence[int] = (),
) -> tuple[Results, list[Any]]:
    """A student's weights of either form, and its corrections and sizes, perhaps each step's."""
    if not nominal:
        return lstm_weights(draws, layers, hidden), [None, []]
    weights = lstm_weights(draws, layers, hidden, features=3, outputs=2)
    several = (*steps, len(sizes))
    weights[2] = draws.normal(*several, 4 * hidden).to(draws.dtype)
    corrections = 1 + draws.normal(*several, 3).square()
    return weights, [corrections.to(draws.dtype), list(sizes)]


def between(cuts: Sequence[float], n: int) -> list[int]:
    """The sizes of tensors that n coordinates are cut into."""
    places = [0, *sorted(round(cut * n) for cut in cuts), n]
    return [stop - start for start, stop in itertools.pairwise(places)]


several_cuts = st.lists(st.floats(0, 1), max_size=6)
constants_of_students = st.tuples(
    st.sampled_from((0.1, 1.0)),
    st.sampled_from((0.0, 0.9, 0.95)),
    st.sampled_from((0.0, 0.95, 0.999)),
    st.sampled_from((1e-10, 1e-6)),
)


@needs("student_step", "student_step_backward")
@fuzz
@given(
    n=sizes(8),
    architecture=architectures,
    dtype=dtypes,
    layout=st.lists(layouts, min_size=5, max_size=5),
    of_weights=st.sampled_from(("dense", "sliced", "transposed")),
    content=contents,
    cuts=several_cuts,
    constants=constants_of_students,
    nominal=st.booleans(),
    seed=seeds,
)
def test_student_step(
    n: int,
    architecture: tuple[int, int],
    dtype: torch.dtype,
    layout: list[str],
    of_weights: str,
    content: str,
    cuts: list[float],
    constants: tuple[float, ...],
    nominal: bool,
    seed: int,
) -> None:
    draws = Draws(seed, dtype)
    grad = draws.values(content, n)
    inputs = [grad, *moments(draws, grad), *cells(draws, *architecture, n)]
    inputs = [laid_out(t, how) for t, how in zip(inputs, fitting(layout), strict=True)]
    weights, given = of_form(draws, nominal, between(cuts, n), *architecture)
    rest = [laid_out(weight, of_weights) for weight in weights], *constants, *given
    assert_accurate("student_step", (*inputs, *rest), dtype, of_a_coordinate)
    grads_out = [
        laid_out(draws.normal(*t.shape).to(dtype), how)
        for t, how in zip(inputs, layout, strict=True)
    ]
    assert_accurate("student_step_backward", (grads_out, *inputs, *rest), dtype, of_a_tensor)


@needs("student_step_")
@fuzz
@given(
    n=sizes(8),
    architecture=architectures,
    dtype=dtypes,
    of_params=st.sampled_from(HALVES),
    of_grads=st.sampled_from(HALVES),
    layout=st.tuples(st.sampled_from(("dense", "sliced", "offset", "transposed")), layouts),
    content=contents,
    cuts=several_cuts,
    constants=constants_of_students,
    nominal=st.booleans(),
    seed=seeds,
)
def test_student_step_in_place(
    n: int,
    architecture: tuple[int, int],
    dtype: torch.dtype,
    of_params: torch.dtype,
    of_grads: torch.dtype,
    layout: tuple[str, str],
    content: str,
    cuts: list[float],
    constants: tuple[float, ...],
    nominal: bool,
    seed: int,
) -> None:
    """However the coordinates are split over tensors, the bits are those of one tensor."""
    draws, lr, decay = Draws(seed, dtype), 0.7, 0.1
    grad = laid_out(draws.values(content, n).to(of_grads), layout[1])
    param = draws.normal(n).to(of_params)
    state = [*moments(draws, grad), *cells(draws, *architecture, n)]
    weights, given = of_form(draws, nominal, [n], *architecture)

    def step(run: Function, counts: list[int], work: torch.dtype, how: str) -> Results:
        def parts(whole: Tensor) -> Results:
            return [part.clone() for part in whole.split(counts, -1)]

        params = [laid_out(p, how) for p in parts(param)]
        states = [parts(t.to(work)) for t in state]
        wide = [weight.to(work) for weight in weights]
        alike = None
        if nominal:
            wide[2] = wide[2].expand(len(counts), -1)
            alike = given[0].to(work).expand(len(counts), -1)
        grads, rest = list(grad.split(counts)), (lr, decay, None, [], 0, [])
        run(params, grads, *states, wide, *constants, alike, [], *rest)
        return [torch.cat(list(column), -1) for column in (params, *states)]

    ours, reference = (operation("student_step_", name) for name in ("cpu", "reference"))
    whole = step(ours, [n], dtype, "dense")
    split = step(ours, between(cuts, n), dtype, layout[0])
    for one, many in zip(whole, split, strict=True):
        assert torch.equal(one.to(many.dtype), many)

    def functional(param: Tensor, *rest: Any) -> Results:
        update, *new = flat(reference_of("student_step")(*rest))
        return [param * (1 - lr * decay) - lr * update, *new]

    arguments = (param, grad, *state, weights, *constants, *given)
    plain = step(reference, [n], dtype, "dense")
    compare("student_step_", whole, plain, functional, arguments, dtype, of_a_coordinate)


@needs("student_unroll_backward")
@fuzz
@given(
    steps=st.integers(0, 12),
    n=sizes(8),
    architecture=architectures,
    dtype=dtypes,
    layout=st.lists(layouts, min_size=6, max_size=6),
    of_weights=st.sampled_from(("dense", "sliced", "transposed")),
    content=contents,
    cuts=several_cuts,
    constants=constants_of_students,
    nominal=st.booleans(),
    seed=seeds,
)
def test_student_unroll_backward(
    steps: int,
    n: int,
    architecture: tuple[int, int],
    dtype: torch.dtype,
    layout: list[str],
    of_weights: str,
    content: str,
    cuts: list[float],
    constants: tuple[float, ...],
    nominal: bool,
    seed: int,
) -> None:
    draws = Draws(seed, dtype)
    grads, adjoints = draws.values(content, steps, n), draws.normal(steps, n).to(dtype)
    state = [*moments(draws, draws.values(content, n)), *cells(draws, *architecture, n)]
    inputs = [laid_out(t, how) for t, how in zip((grads, adjoints, *state), layout, strict=True)]
    weights, given = of_form(draws, nominal, between(cuts, n), *architecture, [steps])
    weights = [laid_out(weight, of_weights) for weight in weights]

    arguments = (*inputs, weights, *constants, *given)
    assert_accurate("student_unroll_backward", arguments, dtype, of_a_tensor)


@needs("choice_step", "choice_step_backward")
@fuzz
@given(
    n=sizes(8),
    architecture=architectures,
    kinds=st.lists(st.integers(0, len(KINDS) - 1), min_size=1, max_size=8),
    dtype=dtypes,
    layout=st.lists(layouts, min_size=5, max_size=5),
    content=contents,
    seed=seeds,
)
@example(
    n=8,
    architecture=(1, 1),
    kinds=[0, 0, 5],
    dtype=torch.float32,
    layout=["dense"] * 5,
    content="decades",
    seed=120975,
)  # the terms of a weight's gradient cancel, and one draw shows it badly
def test_choice_step(
    n: int,
    architecture: tuple[int, int],
    kinds: list[int],
    dtype: torch.dtype,
    layout: list[str],
    content: str,
    seed: int,
) -> None:
    draws, k = Draws(seed, dtype), len(kinds)
    grad = draws.values(content, n)
    inputs = [grad, *moments(draws, grad.expand(k, n)), *cells(draws, *architecture, n)]
    inputs = [laid_out(t, how) for t, how in zip(inputs, fitting(layout), strict=True)]
    weights = lstm_weights(draws, *architecture, features=k + 4, outputs=k)
    ranks = torch.randint(0, 5, (n,), generator=draws.generator)
    rest = weights, ranks, kinds, *pool_constants(draws, k), 3, 10.0, 0.5
    assert_accurate("choice_step", (*inputs, *rest), dtype, of_a_coordinate)
    shapes = [*(t.shape for t in inputs), (k, n)]
    grads_out = [draws.normal(*shape).to(dtype) for shape in shapes]
    assert_accurate("choice_step_backward", (grads_out, *inputs, *rest), dtype, of_a_tensor)


@pytest.mark.parametrize("result", range(6))
def test_an_error_of_a_few_units_is_found(result: int) -> None:
    """A relative error of 2^-17, 64 units in the last place, in any result of a step fails."""
    draws = Draws(3, torch.float32)
    grad = draws.normal(100).float()
    inputs = [grad, *moments(draws, grad.expand(2, 100)), *cells(draws, 2, 4, 100)]
    weights = lstm_weights(draws, 2, 4, features=6, outputs=2)
    ranks = torch.randint(0, 5, (100,), generator=draws.generator)
    arguments = (*inputs, weights, ranks, [2, 3], *pool_constants(draws, 2), 3, 10.0, 0.5)
    reference = reference_of("choice_step")
    plain = flat(reference(*arguments))
    rest = reference, arguments, torch.float32, of_a_coordinate
    compare("choice_step", plain, plain, *rest)
    ours = [each * (1 + (index == result) * 2**-17) for index, each in enumerate(plain)]
    with pytest.raises(AssertionError, match=f"choice_step, result {result}"):
        compare("choice_step", ours, plain, *rest)
