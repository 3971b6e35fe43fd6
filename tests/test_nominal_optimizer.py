"""AmalgamatedOptimizer with the nominal student: what is exact about it, and what it keeps."""

from __future__ import annotations

import copy
import io
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amalgam import (
    AmalgamatedOptimizer,
    NominalConfig,
    NominalStudent,
    PolicyOptimizer,
    Student,
    StudentConfig,
    estimate_memory,
)
from amalgam.policies import Choice
from amalgam.policies.nominal_student import INPUTS

SHAPES = [(3, 4), (), (5,), (2, 3, 2, 2), (0, 3), (70,)]
STEPS = 12

# Decay that shows within a few steps is what users are warned of.
pytestmark = pytest.mark.filterwarnings("ignore:weight_decay=")


def made(**config: Any) -> NominalStudent:
    """A student whose every part acts."""
    generator = torch.Generator().manual_seed(4)
    given = {"hidden": 4, "inputs": tuple(INPUTS), **config}
    student = NominalStudent(NominalConfig(**given), generator=generator)
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(0.4 * torch.randn(weight.shape, generator=generator))
    return student


def tensors(shapes: list[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def gradients(step: int, shapes: list[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def run(params: list[nn.Parameter], grads: Any = gradients, **how: Any) -> AmalgamatedOptimizer:
    optimizer = AmalgamatedOptimizer(params, **how)
    for step in range(STEPS):
        for param, grad in zip(params, grads(step), strict=True):
            param.grad = grad
        optimizer.step()
    return optimizer


def states(optimizer: AmalgamatedOptimizer) -> list[Tensor]:
    return [tensor for entry in optimizer.state.values() for tensor in entry.values()]


def test_untrained_it_is_bias_corrected_adam() -> None:
    ours, theirs = tensors(), tensors()
    run(ours, student=NominalStudent())
    adam = torch.optim.Adam(theirs, lr=0.005, eps=1e-15)
    for step in range(STEPS):
        for param, grad in zip(theirs, gradients(step), strict=True):
            param.grad = grad
        adam.step()
    for our, their in zip(ours, theirs, strict=True):
        assert torch.allclose(our, their, rtol=1e-6, atol=1e-7)


def test_no_gradient_no_update() -> None:
    """Parameters whose gradients have all been zero keep their bits, those of zeros' signs too."""
    params, some = tensors(), torch.arange(70) % 3 == 0
    with torch.no_grad():
        params[5][:2] = torch.tensor([0.0, -0.0])
    before = [param.detach().clone() for param in params]

    def grads(step: int) -> list[Tensor]:
        found = [torch.zeros(shape) for shape in SHAPES]
        found[5] = torch.where(some, gradients(step)[5], 0)
        found[5][:2] = 0
        return found

    run(params, grads, student=made())
    for param, was in zip(params[:5], before[:5], strict=True):
        assert torch.equal(param.view(torch.int32), was.view(torch.int32))
    some = some.clone()
    some[:2] = False
    bits = params[5].detach().view(torch.int32) == before[5].view(torch.int32)
    assert torch.equal(bits, ~some)


@pytest.mark.parametrize("inputs", [(), ("time", "rank", "fan_in", "rms")])
def test_mirrored_gradients_give_the_mirrored_run(inputs: tuple[str, ...]) -> None:
    student, ours, mirrored = made(inputs=inputs), tensors(), tensors()
    with torch.no_grad():
        for param in mirrored:
            param.neg_()
    one = run(ours, student=student)
    other = run(mirrored, lambda step: [-grad for grad in gradients(step)], student=student)
    for our, their in zip(ours, mirrored, strict=True):
        assert torch.equal(our, -their)
    for ours_of, theirs_of in zip(one.state.values(), other.state.values(), strict=True):
        assert torch.equal(ours_of["m"], -theirs_of["m"])
        for name in ("v", "h", "c"):
            assert torch.equal(ours_of[name], theirs_of[name])


@pytest.mark.parametrize("power", [-10, -1, 3, 10])
def test_the_losss_scale_changes_nothing(power: int) -> None:
    ours, scaled, student = tensors(), tensors(), made()
    run(ours, student=student)
    run(scaled, lambda step: [grad * 2.0**power for grad in gradients(step)], student=student)
    assert all(map(torch.equal, ours, scaled))


def test_the_losss_scale_changes_something_where_roots_are_near_eps() -> None:
    """eps, 1e-15, is the end of it: here gradients are some thousand times as large."""
    ours, scaled, student = tensors(), tensors(), made()
    run(ours, student=student)
    run(scaled, lambda step: [grad * 2.0**-40 for grad in gradients(step)], student=student)
    assert not all(map(torch.equal, ours, scaled))
    assert all(torch.allclose(a, b, atol=0.05) for a, b in zip(ours, scaled, strict=True))


def test_a_tensors_parts_step_as_the_whole() -> None:
    student, whole, parts = made(inputs=("time",)), tensors([(70,)]), tensors([(70,)])
    pieces = [nn.Parameter(part.clone()) for part in parts[0].detach().split([1, 0, 33, 36])]
    run(whole, lambda step: gradients(step, [(70,)]), student=student)

    def cut(step: int) -> list[Tensor]:
        (grad,) = gradients(step, [(70,)])
        return list(grad.split([1, 0, 33, 36]))

    run(pieces, cut, student=student)
    assert torch.equal(whole[0], torch.cat([piece.detach() for piece in pieces]))


def test_weight_decay_is_decoupled() -> None:
    ours, plain, student = tensors(), tensors(), made(inputs=("time",))
    run(ours, student=student, lr=0.5, weight_decay=0.1)
    optimizer = AmalgamatedOptimizer(plain, 0.5, student)
    for step in range(STEPS):
        for param, grad in zip(plain, gradients(step), strict=True):
            param.grad = grad
            param.data.mul_(1 - 0.5 * 0.1)
        optimizer.step()
    for our, their in zip(ours, plain, strict=True):
        assert torch.allclose(our, their, rtol=1e-5, atol=1e-6)


def test_steps_counted_on_the_device_give_the_same() -> None:
    ours, theirs, student = tensors(), tensors(), made()
    run(ours, student=student)
    run(theirs, student=student, capturable=True, lr=torch.tensor(1.0))
    for our, their in zip(ours, theirs, strict=True):
        assert torch.allclose(our, their, rtol=1e-6, atol=1e-7)


def test_parameters_join_later_with_their_own_steps() -> None:
    """A parameter without gradients takes no step; when it has some, its t is its own."""
    student = made(inputs=("time",))
    both, alone = tensors([(6,), (6,)]), tensors([(6,), (6,)])[1:]
    optimizer = AmalgamatedOptimizer(both, student=student)
    other = AmalgamatedOptimizer(alone, student=student)
    for step in range(STEPS):
        first, second = gradients(step, [(6,), (6,)])
        both[0].grad = first
        both[1].grad = second if step >= 4 else None
        optimizer.step()
        if step >= 4:
            alone[0].grad = second
            other.step()
    assert torch.equal(both[1], alone[0])


def test_warm_up_steps_count_in_the_corrections() -> None:
    student, ours, theirs = made(), tensors(), tensors()
    run(ours, student=student, warmup_steps=3, warmup_lr=0.01)
    optimizer = PolicyOptimizer(theirs, student, warmup_steps=3, warmup_lr=0.01)
    for step in range(STEPS):
        for param, grad in zip(theirs, gradients(step), strict=True):
            param.grad = grad
        optimizer.step()
    for our, their in zip(ours, theirs, strict=True):
        assert torch.allclose(our, their, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_groups_of_any_dtype_have_their_own_settings(dtype: torch.dtype) -> None:
    """Two groups, one of them grown later, as two optimizers; told of the same tensors."""
    student = made()
    together = [nn.Parameter(p.detach().to(dtype)) for p in tensors()]
    apart = [nn.Parameter(p.detach().clone()) for p in together]
    optimizer = AmalgamatedOptimizer(together[:3], student=student)
    optimizer.add_param_group({"params": together[3:], "lr": 0.5, "weight_decay": 0.1})
    others = [
        AmalgamatedOptimizer(apart[:3], student=student),
        AmalgamatedOptimizer(apart[3:], 0.5, student, weight_decay=0.1),
    ]
    for step in range(4):
        for params in (together, apart):
            for param, grad in zip(params, gradients(step), strict=True):
                param.grad = grad.to(dtype)
        for each in (optimizer, *others):
            each.step()
    assert all(map(torch.equal, together, apart))


def test_what_backends_make_of_weights_is_made_once() -> None:
    """A bias anew in every step must not have the other weights packed anew."""
    optimizer = AmalgamatedOptimizer(tensors(), student=made())
    seen = []
    whole = optimizer._student.with_context

    def noted(operation: Any, *rest: Any) -> Any:
        folded, settings = whole(operation, *rest)
        seen.append([w.data_ptr() for i, w in enumerate(folded) if i != 2])
        assert all(w.is_contiguous() for w in folded)
        return folded, settings

    optimizer._student.with_context = noted  # type: ignore[method-assign]
    for step in range(3):
        for param, grad in zip(optimizer.param_groups[0]["params"], gradients(step), strict=True):
            param.grad = grad
        optimizer.step()
    assert seen[0] == seen[1] == seen[2]


def test_rounding_is_checked_in_every_group() -> None:
    first, second = tensors([(4,), (4,)])
    narrow = {"moments_dtype": torch.bfloat16, "rounding": "stochastic", "student": made()}
    with pytest.raises(ValueError, match="needs rounding='stochastic'"):
        AmalgamatedOptimizer([{"params": [first], "rounding": "nearest"}], **narrow)
    optimizer = AmalgamatedOptimizer([first], **narrow)
    with pytest.raises(ValueError, match="rounding must be 'nearest' or 'stochastic'"):
        optimizer.add_param_group({"params": [second], "rounding": "nearst"})
    assert len(optimizer.param_groups) == 1
    wide = AmalgamatedOptimizer([second], student=narrow["student"])
    with pytest.raises(ValueError, match="needs rounding='stochastic'"):
        optimizer.load_state_dict(wide.state_dict())
    wide.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"cells_dtype": torch.bfloat16},
        {"narrow": True},
        {"cells_dtype": torch.int8, "rounding": "stochastic"},
    ],
)
def test_runs_resume_to_the_same_bits(how: dict[str, Any]) -> None:
    if how.pop("narrow", False):
        how = {
            "cells_dtype": torch.bfloat16,
            "moments_dtype": torch.bfloat16,
            "rounding": "stochastic",
        }
    student, straight, params = made(), tensors(), tensors()
    run(straight, student=student, **how)
    optimizer = AmalgamatedOptimizer(params, student=student, **how)
    for step in range(STEPS):
        for param, grad in zip(params, gradients(step), strict=True):
            param.grad = grad
        optimizer.step()
        if step == 4:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer = AmalgamatedOptimizer(params, student=student, **how)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
        if step == 7:
            optimizer = copy.deepcopy(optimizer)
            params = optimizer.param_groups[0]["params"]
    assert all(map(torch.equal, params, straight))


def test_moments_in_bfloat16_follow_those_in_float32() -> None:
    """v changes by less than bfloat16's last bit in a step: right on average, and no step is lost.

    Of 4,096 coordinates with gradients of one size, the mean of v is within a few of its own
    standard errors of the exact one.
    """
    params, student = tensors([(4096,)]), made(inputs=("time",))
    optimizer = AmalgamatedOptimizer(
        params, student=student, moments_dtype=torch.bfloat16, rounding="stochastic"
    )
    for _ in range(300):
        params[0].grad = torch.ones(4096)
        optimizer.step()
    (entry,) = optimizer.state.values()
    assert (entry["m"].dtype, entry["v"].dtype) == (torch.bfloat16, torch.bfloat16)
    assert entry["h"].dtype == torch.float32
    exact = 1 - 0.999**300
    assert entry["v"].float().mean().item() == pytest.approx(exact, rel=2e-3)
    assert entry["m"].float().mean().item() == pytest.approx(1.0, rel=2e-3)


@pytest.mark.parametrize(
    ("student", "how", "each"),
    [
        (NominalStudent(NominalConfig(hidden=4)), {}, 40),
        (NominalStudent(NominalConfig(hidden=4)), {"cells_dtype": torch.bfloat16}, 24),
        (
            NominalStudent(NominalConfig(hidden=4)),
            {"cells_dtype": torch.bfloat16, "moments_dtype": torch.bfloat16},
            20,
        ),
        (NominalStudent(), {"cells_dtype": torch.bfloat16}, 40),
        (NominalStudent(), {"cells_dtype": torch.int8}, 26),
        (Student(StudentConfig()), {}, 328),
        (Student(StudentConfig()), {"cells_dtype": torch.int8}, 92),
    ],
)
def test_the_estimate_of_memory_is_what_is_allocated(
    student: Any, how: dict[str, Any], each: int
) -> None:
    shapes = [(40, 30), (30,), (), (0, 2)]
    params = tensors(shapes)
    estimate = estimate_memory(params, student, **how)
    assert estimate.parameters == 1231
    assert estimate.bytes_a_parameter == each
    rounding = "stochastic" if "moments_dtype" in how else "nearest"
    optimizer = run(
        params,
        lambda step: gradients(step, shapes),
        student=student,
        rounding=rounding,
        warmup_steps=0,
        **how,
    )
    allocated = sum(t.numel() * t.element_size() for t in states(optimizer))
    assert estimate.state_bytes == allocated
    module = nn.Linear(30, 40).to("meta")
    assert estimate_memory(module, student, **how).bytes_a_parameter == each


def test_memory_of_float64_is_not_narrowed() -> None:
    params = [nn.Parameter(torch.zeros(10, dtype=torch.float64))]
    narrow = {"cells_dtype": torch.bfloat16, "moments_dtype": torch.bfloat16}
    student = NominalStudent(NominalConfig(hidden=4))
    assert estimate_memory(params, student, **narrow).bytes_a_parameter == 80
    optimizer = AmalgamatedOptimizer(params, student=student, rounding="stochastic", **narrow)
    params[0].grad = torch.ones(10, dtype=torch.float64)
    optimizer.step()
    assert sum(t.numel() * t.element_size() for t in states(optimizer)) == 804
    assert estimate_memory(params, student, cells_dtype=torch.int8).bytes_a_parameter == 80


def test_what_can_not_be_is_refused(tmp_path: Any) -> None:
    params = tensors()
    with pytest.raises(ValueError, match="needs rounding='stochastic'"):
        AmalgamatedOptimizer(params, student=made(), moments_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="moments_dtype must be float32, bfloat16 or None"):
        AmalgamatedOptimizer(params, student=made(), moments_dtype=torch.int8)
    with pytest.raises(ValueError, match="cells_dtype must be float32, bfloat16, int8 or None"):
        estimate_memory(params, made(), cells_dtype=torch.float16)
    with pytest.raises(TypeError, match=re.escape("params must be floating-point")):
        estimate_memory([torch.ones(2, dtype=torch.int64)], made())
    Choice().save(tmp_path / "choice.safetensors")
    with pytest.raises(ValueError, match="student must be a Student or a NominalStudent"):
        AmalgamatedOptimizer(params, student=tmp_path / "choice.safetensors")
