"""The optimal choice of few units by CUDA, on GPUs and compiled for the host."""

import math
from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate, flat, seeds_of_draws
from places import ON_HOST, at, on_gpus
from student_cases import moved
from test_choice_step import skewed_arguments
from torch import Tensor

from amalgam.backends import choice_step as kernels
from amalgam.operations.choice_step import ChoiceArguments
from amalgam.operations.student_step import StudentState
from amalgam.operations.teacher_step import PoolSettings
from amalgam.ops import ChoiceSettings, ChoiceState, choice_step

FORWARD, BACKWARD = torch.ops.amalgam.choice_step, torch.ops.amalgam.choice_step_backward

somewhere = at(*on_gpus("cuda"), *ON_HOST)


def arguments_on(
    device: str, size: int, hidden: int, k: int, seed: int = 0
) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Arguments of a step, and gradients in what it gives."""
    arguments, upstream = skewed_arguments(size, 1, hidden, k, torch.float32, seed)
    return moved(arguments, device), moved(upstream, device)


@somewhere
@pytest.mark.parametrize(
    ("hidden", "k", "size"), [(4, 1, 33), (4, 2, 64), (4, 6, 31), (8, 2, 95), (8, 8, 65)]
)
def test_steps_and_gradients_err_as_float32_does(
    backend: str, device: str, size: int, hidden: int, k: int
) -> None:
    """Of pools for which gradients' kernels have rows to spare, and of full ones; all ranks."""
    forward, backward = [], []
    for seed in range(8):
        arguments, upstream = arguments_on(device, size, hidden, k, seed)
        forward.append(arguments)
        backward.append((upstream, *arguments))
    assert_as_accurate(FORWARD, forward, backend)
    assert_as_accurate(BACKWARD, backward, backend)


@somewhere
def test_warps_take_several_tiles(backend: str, device: str) -> None:
    """Weights' gradients are then sums of a warp's own, the same in every run."""
    draws = []
    for seed in seeds_of_draws(device, 2):
        arguments, upstream = arguments_on(device, 3001, 4, 2, seed)
        draws.append((upstream, *arguments))
    assert_as_accurate(BACKWARD, draws, backend)
    twice = [flat(BACKWARD(*draws[0], backend)) for _ in range(2)]
    assert all(map(torch.equal, *twice))


@somewhere
@pytest.mark.parametrize("size", [0, 1, 37])
def test_all_of_every_output_is_written(
    backend: str, device: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory that kernels are given holds NaN: none is left, nor any trace of one in a sum."""
    arguments, upstream = arguments_on(device, size, 4, 2)
    made = Tensor.new_empty
    monkeypatch.setattr(
        Tensor, "new_empty", lambda self, *shape, **how: made(self, *shape, **how).fill_(math.nan)
    )
    found = flat((FORWARD(*arguments, backend), BACKWARD(upstream, *arguments, backend)))
    assert all(result.isfinite().all() for result in found)
    if not size:
        assert not any(result.any() for result in found)


@somewhere
@pytest.mark.parametrize("shift", [-900.0, -30.0, -23.0, 0.0, 900.0])
def test_the_mixture_is_one_for_any_logits(backend: str, device: str, shift: float) -> None:
    arguments, upstream = arguments_on(device, 40, 4, 6)
    arguments[5][-2].zero_()  # so that the logits are the bias
    arguments[5][-1].add_(shift)
    mixture, expected = (FORWARD(*arguments, name)[-1] for name in (backend, "reference"))
    assert torch.allclose(mixture, expected, rtol=1e-5, atol=1e-30)
    assert all(t.isfinite().all() for t in flat(BACKWARD(upstream, *arguments, backend)))


@somewhere
def test_nan_passes_on_where_the_references_does(backend: str, device: str) -> None:
    arguments, upstream = arguments_on(device, 70, 4, 6)
    grad, m, v, _, c = arguments[:5]
    grad[3], grad[5], m[4, 40], v[3, 50], c[0, 0, 66] = math.nan, math.inf, *[math.nan] * 3
    for operation, given in ((FORWARD, arguments), (BACKWARD, (upstream, *arguments))):
        both = [flat(operation(*given, name)) for name in (backend, "reference")]
        for one, other in zip(*both, strict=True):
            assert torch.equal(one.isnan(), other.isnan())


@somewhere
def test_a_teacher_without_eps_divides_only_where_asked(backend: str, device: str) -> None:
    """Lanes beyond the last coordinate add nothing to weights' gradients, NaN neither."""
    arguments, upstream = arguments_on(device, 5, 4, 8)
    arguments[0][::7] = 0.5
    arguments = (*arguments[:10], [0.0] * 8, *arguments[11:])
    found = flat(BACKWARD(upstream, *arguments, backend))
    assert all(result.isfinite().all() for result in found)


@somewhere
def test_inputs_may_be_strided_and_ranks_any_integers(backend: str, device: str) -> None:
    arguments, upstream = arguments_on(device, 40, 4, 2)
    expected = flat((FORWARD(*arguments, backend), BACKWARD(upstream, *arguments, backend)))

    def spread(tensors: Any) -> list[Tensor]:
        return [torch.stack((t, t), -1)[..., 0] for t in tensors]

    strided = *spread(arguments[:5]), spread(arguments[5]), arguments[6].to(torch.int8)
    strided = *strided, *arguments[7:], backend
    found = flat((FORWARD(*strided), BACKWARD(spread(upstream), *strided)))
    assert all(map(torch.equal, found, expected))


@somewhere
def test_unknown_kinds_are_refused_before_anything_runs(backend: str, device: str) -> None:
    arguments, _ = arguments_on(device, 5, 4, 2)
    arguments = (*arguments[:7], [0, 8], *arguments[8:])
    with pytest.raises(ValueError, match=r"kinds must be numbers below 8, not \[0, 8\]"):
        FORWARD(*arguments, backend)


@somewhere
@pytest.mark.parametrize(
    ("layers", "hidden", "k", "reason"),
    [
        (2, 4, 2, "choices of 1x4, 1x8 .layers x units., this one is 2x4"),
        (1, 16, 2, "choices of 1x4, 1x8 .layers x units., this one is 1x16"),
        (1, 4, 9, "pools of 8 teachers or fewer, this one has 9"),
    ],
)
def test_what_has_no_kernel_is_refused_by_name(
    backend: str, device: str, layers: int, hidden: int, k: int, reason: str
) -> None:
    moments, cells = (torch.zeros(*s, 5, device=device) for s in ((k,), (layers, hidden)))
    state = ChoiceState(moments, moments, cells, cells)
    settings = ChoiceSettings(["sgd"] * k, *([0.5] * k for _ in range(4)))
    grad, ranks = torch.zeros(5, device=device), torch.zeros(5, dtype=torch.int64, device=device)
    with pytest.raises(RuntimeError, match=f"{reason}; backend='triton' computes any"):
        choice_step(grad, state, [], ranks, settings, backend=backend)
    arguments = ChoiceArguments(ranks, PoolSettings.of(*settings[:5]), 0.0, 1.0)
    assert kernels._accepts(grad, StudentState(*state[:4]), [], arguments)
