"""State of teachers and policies as optimizers, saved in one precision and loaded in another."""

import io
from typing import Any

import pytest
import torch
from torch import nn

from amalgam import PolicyOptimizer, TeacherOptimizer, TorchTeacher
from amalgam.policies import AdamLR, DynamicRateConfig, Teacher

LOW = (torch.float16, torch.bfloat16)
TEACHERS: dict[str, Any] = {
    "adam": Teacher("adam", 0.01),
    "powersign": Teacher("powersign", 0.01),
    "adamw": TorchTeacher(torch.optim.AdamW, lr=0.01),
    "nadam": TorchTeacher(torch.optim.NAdam, lr=0.01),
}
POLICY = AdamLR(DynamicRateConfig(hidden=3, layers=1), generator=torch.Generator().manual_seed(0))


def made(which: str, dtype: torch.dtype) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    param = nn.Parameter(torch.ones(3, 2, dtype=dtype))
    if which == "policy":
        return param, PolicyOptimizer([param], POLICY, warmup_steps=0)
    return param, TeacherOptimizer([param], TEACHERS[which])


def run(param: nn.Parameter, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        # Its square is less than the least that float16 holds.
        param.grad = torch.full_like(param, 1e-4 * (step + 1))
        optimizer.step()


def loaded(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    found: dict[str, Any] = torch.load(file, weights_only=True)
    return found


@pytest.mark.parametrize("which", [*TEACHERS, "policy"])
@pytest.mark.parametrize("dtype", [*LOW, torch.float32, torch.float64])
@pytest.mark.parametrize("to", [*LOW, torch.float32, torch.float64])
def test_state_goes_from_any_precision_to_any(
    which: str, dtype: torch.dtype, to: torch.dtype
) -> None:
    param, optimizer = made(which, dtype)
    run(param, optimizer, 3)
    other, resumed = made(which, to)
    with torch.no_grad():
        other.copy_(param)
    resumed.load_state_dict(loaded(optimizer))
    run(param, optimizer, 3)
    run(other, resumed, 3)
    assert other.isfinite().all()
    if to == dtype:
        assert torch.equal(other, param)
    else:
        ours, theirs = other.double(), param.double()
        coarser = max(torch.finfo(dtype).eps, torch.finfo(to).eps)
        assert torch.allclose(ours, theirs, rtol=0, atol=3 * coarser)


def test_state_of_another_teacher_is_refused() -> None:
    for theirs, ours in (("adam", "powersign"), ("adamw", "nadam"), ("adam", "adamw")):
        param, optimizer = made(theirs, torch.float32)
        run(param, optimizer, 2)
        _, other = made(ours, torch.float32)
        with pytest.raises(ValueError, match="belongs to another teacher"):
            other.load_state_dict(loaded(optimizer))
        assert not other.state
    decays = [
        TeacherOptimizer([nn.Parameter(torch.ones(1))], Teacher("adam", beta1=b))
        for b in (0.9, 0.8)
    ]
    with pytest.raises(ValueError, match="beta1=0.9.*beta1=0.8"):
        decays[1].load_state_dict(decays[0].state_dict())


def test_state_goes_to_the_same_teacher_at_another_rate() -> None:
    param, optimizer = made("adam", torch.float32)
    run(param, optimizer, 2)
    state = loaded(optimizer)
    other = TeacherOptimizer([param], Teacher("adam", 0.5))
    other.load_state_dict(state)
    assert other.param_groups[0]["lr"] == 0.01
    for group in state["param_groups"]:
        del group["teacher"]
    TeacherOptimizer([param], Teacher("adam", 0.5)).load_state_dict(state)
