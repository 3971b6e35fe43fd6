"""``step()`` on the parameters of ResNet-50, GPT-2 small and ViT-B/16, beside AdamW's.

python -m pytest bench/bench_optimizer_models.py [--benchmark-json=rows.json]

The optimizers step the same parameters with the same random gradients, in turn, so that noise hits
all. On GPT-2 small all but the paper's student take some 18 GB together, and that one 41 GB more:
an optimizer whose state does not fit into what is free is left out, and the row says what it would
have taken. With ``AMALGAM_BENCH_QUICK=1`` each dimension is a sixteenth.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import QUICK, memory, need, seconds, temporary_bytes, threads_of_each
from model_shapes import MODELS, Shapes
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from amalgam import (
    AmalgamatedOptimizer,
    Student,
    StudentConfig,
    estimate_memory,
)
from amalgam.meta.memory import free_bytes

ROUNDS = 3 if QUICK else 10
COORDINATEWISE = "standard, orthogonal=False"
SPARE_BYTES = 1 << 30  # left to everything else on the machine


def shrunk(shapes: Shapes) -> Shapes:
    return [tuple(-(-size // 16) for size in shape) for shape in shapes]


def students() -> dict[str, dict[str, Any]]:
    """Settings by name: of those that ship, and of the paper's of random weights."""
    generator = torch.Generator().manual_seed(0)
    return {
        "standard": {"student": "standard"},
        "compact": {"student": "compact"},
        "the paper's 2x20": {"student": Student(StudentConfig(), generator=generator)},
    }


def parameters_of(shapes: Shapes) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    return params


def step_coordinatewise(optimizer: Optimizer) -> None:
    """A step whose updates are not orthogonalised, of an optimizer whose others are."""
    (group,) = optimizer.param_groups
    group["orthogonal"] = False
    optimizer.step()
    group["orthogonal"] = True


def state_bytes(optimizer: Optimizer) -> int:
    """What the tensors of an optimizer's state take."""
    tensors = [value for entry in optimizer.state.values() for value in entry.values()]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def check_steps(shapes: Shapes) -> None:
    """Raise unless, on small shapes, steps are the reference's."""
    for settings in students().values():
        ours, theirs = parameters_of(shrunk(shapes)), parameters_of(shrunk(shapes))
        for backend, params in (("cpu", ours), ("reference", theirs)):
            optimizer = AmalgamatedOptimizer(params, backend=backend, warmup_steps=0, **settings)
            for _ in range(2):
                optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.timeout(3600)  # GPT-2 by the paper's student takes longer than tests may
@pytest.mark.parametrize("model", MODELS)
@threads_of_each
def test_models_alternating(benchmark: Any, threads: int, model: str) -> None:
    """The least time of some steps in turn, the state's bytes, and those a step takes besides."""
    need("cpu", "student_step_")
    make, numbers, tensors = MODELS[model]
    shapes = make()
    assert (sum(map(math.prod, shapes)), len(shapes)) == (numbers, tensors)
    params = parameters_of(shrunk(shapes) if QUICK else shapes)
    check_steps(shapes)

    makers: dict[str, Callable[[], Optimizer]] = {
        "AdamW(foreach)": lambda: AdamW(params, foreach=True),
        "AdamW(fused)": lambda: AdamW(params, fused=True),
    }
    takes = dict.fromkeys(makers, 8 * sum(param.numel() for param in params))
    for name, settings in students().items():
        makers[name] = lambda settings=settings: AmalgamatedOptimizer(  # type: ignore[misc]
            params, backend="cpu", warmup_steps=0, **settings
        )
        told = estimate_memory(params, **settings)
        takes[name] = told.state_bytes + told.update_bytes
    steps, left_out = {}, {}
    facts: dict[str, dict[str, int]] = {}
    for name, maker in makers.items():
        if takes[name] + SPARE_BYTES > free_bytes(torch.device("cpu")):
            left_out[name] = takes[name]
            continue
        optimizer = maker()
        optimizer.step()
        held = temporary_bytes(optimizer.step)
        facts[name] = {"state_bytes": state_bytes(optimizer)}
        if held is not None:
            facts[name]["temporary_bytes"] = held
        steps[name] = optimizer.step
        if name == "standard":
            steps[COORDINATEWISE] = functools.partial(step_coordinatewise, optimizer)
    least = dict.fromkeys(steps, float("inf"))
    for _ in range(ROUNDS):
        for name, step in steps.items():
            least[name] = min(least[name], seconds(step, repeats=1))
    benchmark.pedantic(steps["AdamW(foreach)"], rounds=3)
    foreach = least["AdamW(foreach)"]
    benchmark.extra_info |= {
        "threads": threads,
        "model": model,
        "parameters": sum(param.numel() for param in params),
        "tensors": len(params),
        "quick": QUICK,
        "least_ms": {name: round(1e3 * t, 3) for name, t in least.items()},
        "over_adamw_foreach": {name: round(t / foreach, 3) for name, t in least.items()},
        "memory": facts,
        "left_out_for_state_bytes": left_out,
        "resident_bytes_at_the_end": memory("VmRSS"),
    }
