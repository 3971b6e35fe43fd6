"""The public operations under ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import flat
from nominal_cases import nominal_settings, nominal_weights
from student_cases import SETTINGS, draw, make_state, make_weights, wanting
from torch import Tensor
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounter

from amalgam.ops import (
    KINDS,
    ChoiceSettings,
    ChoiceState,
    StudentState,
    choice_step,
    largest_magnitudes,
    sign_agreements,
    student_step,
    student_step_,
    student_unroll_backward,
    teacher_distance,
    teacher_step,
)

N, K = 5, 3
STATE, WEIGHTS = make_state(N, layers=1), make_weights(1)
POOL: Any = (KINDS[-K:], *([number] * K for number in (0.1, 0.9, 0.99, 1e-6)))
CHOICE = [draw(4 * 4, K + 4), draw(4 * 4, 4), draw(4 * 4), draw(K, 4), draw(K)]
PAIR = draw(K, N), draw(K, N, seed=1).square()


def _choice(grad: Tensor, m: Tensor, v: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> Any:
    state, ranks = ChoiceState(m, v, h, c, 7), torch.arange(N)
    update, new, mixture = choice_step(grad, state, weights, ranks, ChoiceSettings(*POOL))
    return update, new[:4], mixture


def _nominal(grad: Tensor, m: Tensor, v: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> Any:
    settings = nominal_settings([2, 3])
    return student_step(grad, StudentState(m, v, h, c), weights, settings)


def _student(grad: Tensor, m: Tensor, v: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> Any:
    return student_step(grad, StudentState(m, v, h, c), weights, SETTINGS)


def _unroll(grads: Tensor, adjoints: Tensor, *rest: Tensor) -> Any:
    return student_unroll_backward(grads, adjoints, StudentState(*rest[:4]), rest[4:], SETTINGS)


def _in_place(param: Tensor, grad: Tensor, *rest: Tensor) -> Any:
    param, *state = (tensor.clone() for tensor in (param, *rest[:4]))
    student_step_([param], [grad], [StudentState(*state)], rest[4:], SETTINGS, lr=0.5)
    return param, state


CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "teacher_step": (lambda *inputs: teacher_step(*inputs, *POOL), (draw(K, N, seed=2), *PAIR)),
    "teacher_distance": (teacher_distance, (draw(N), draw(K, N))),
    "student_step": (_student, (draw(N), *STATE, *WEIGHTS)),
    "student_step, nominal": (_nominal, (draw(N), *STATE, *nominal_weights(2))),
    "choice_step": (_choice, (draw(N), *PAIR, *STATE[2:], *CHOICE)),
    "student_unroll_backward": (_unroll, (draw(2, N), draw(2, N, seed=1), *STATE, *WEIGHTS)),
    "student_step_": (_in_place, (draw(N, seed=3), draw(N), *STATE, *WEIGHTS)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_call_is_one_operator_and_the_same(case: str) -> None:
    """Forward, and backward where there is one: ``"auto"`` takes the kernels that eager takes."""
    function, inputs = CASES[case]
    name = case.partition(",")[0]
    differentiable = name in ("teacher_step", "teacher_distance", "student_step", "choice_step")

    def results(of: Callable[..., Any]) -> list[Tensor]:
        given = wanting(*inputs) if differentiable else inputs
        found = flat(of(*given))
        if not differentiable:
            return found
        upstream = [draw(*each.shape, seed=4) for each in found]
        return [*found, *torch.autograd.grad(found, given, upstream)]

    torch.compiler.reset()
    recorded = AotEagerAndRecordGraphs()
    compiled = torch.compile(function, fullgraph=True, backend=recorded)
    assert all(map(torch.equal, results(compiled), results(function)))
    (graph,) = recorded.graphs
    assert getattr(torch.ops.amalgam, name) in {node.target for node in graph.graph.nodes}


def test_lists_of_tensors_are_looked_at_in_plain_pytorch() -> None:
    """These two are no operators: kernels take addresses, which nothing has that is traced."""

    def found(*tensors: Tensor) -> list[Tensor]:
        return [*largest_magnitudes(tensors), sign_agreements(tensors, tensors[::-1])]

    def by_name(tensor: Tensor) -> list[Tensor]:
        return largest_magnitudes([tensor], backend="cpu")

    tensors = draw(4), draw(2, 2, seed=1).float(), draw(4, seed=2)
    compiled = torch.compile(found, fullgraph=True, backend="eager")
    assert all(map(torch.equal, compiled(*tensors), found(*tensors)))
    with pytest.raises(Exception, match="can't compute 'largest_magnitude' in torch.compile"):
        torch.compile(by_name, fullgraph=True, backend="eager")(tensors[0])


def test_a_choice_is_not_compiled_anew_for_every_step() -> None:
    counter = CompileCounter()
    compiled = torch.compile(choice_step, fullgraph=True, backend=counter)
    ours = theirs = ChoiceState(*PAIR, *STATE[2:])
    ranks, settings = torch.arange(N), ChoiceSettings(*POOL)
    for step in range(5):
        grad = draw(N, seed=step)
        _, ours, ours_mixed = compiled(grad, ours, CHOICE, ranks, settings)
        _, theirs, theirs_mixed = choice_step(grad, theirs, CHOICE, ranks, settings)
        assert torch.equal(ours_mixed, theirs_mixed)
    assert ours.steps == 5
    assert counter.frame_count <= 3  # numbers 0 and 1 may have graphs of their own


def test_compiled_calls_have_the_reference_tangents() -> None:
    """Of a call that was compiled without tangents, too: an operator would drop them in silence."""
    along = draw(K, N, seed=5)

    def tangents(function: Callable[..., Any]) -> Tensor:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(draw(N), along[0])
            return torch.autograd.forward_ad.unpack_dual(function(dual, draw(K, N))).tangent

    compiled = torch.compile(teacher_distance, fullgraph=True, backend="aot_eager")
    compiled(draw(N), draw(K, N))
    torch.testing.assert_close(tangents(compiled), tangents(teacher_distance))


def test_a_compiled_call_refuses_a_backend_when_it_runs() -> None:
    compiled = torch.compile(teacher_distance, fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match="did you mean 'cpu'"):
        compiled(draw(N), draw(K, N), backend="cpuu")
    with pytest.raises(RuntimeError, match="backend='cuda' can't compute 'teacher_distance' here"):
        compiled(draw(N), draw(K, N), backend="cuda")
