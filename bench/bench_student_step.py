"""``student_step`` beside plain PyTorch and AdamW, as a share of a matrix product.

python -m pytest bench/bench_student_step.py [--benchmark-json=rows.json]

The rivals in place:

- ``eager``: the functional reference under no_grad, one call over all coordinates, and the update
  subtracted: what a user of eager PyTorch would write.
- ``compiled``: the same function through ``torch.compile``.
- ``reference``: the in-place reference, which takes chunks that stay in cache.

``test_nominal_alternating`` has the small networks of the nominal form beside the paper's student
and AdamW, all in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import (
    QUICK,
    assert_close,
    kernel,
    lstm_flop,
    lstm_weights,
    measure,
    need,
    seconds,
    sizes,
    temporary_bytes,
    threads_of_each,
)
from torch import Tensor

from amalgam import AmalgamatedOptimizer, Student, StudentConfig
from amalgam.backends import core
from amalgam.operations.student_step_in_place import StudentTensors, step_tensors_
from amalgam.ops import StepSettings, StudentState, initial_state
from amalgam.ops import student_step_ as in_place

LAYERS, HIDDEN = 2, 20
FLOP = lstm_flop(2, HIDDEN, LAYERS, 1)
SETTINGS = StepSettings()
LARGEST_GRAPH = 1 << 20  # of more coordinates, PyTorch's intermediates take tens of gigabytes
FEW = 4099  # coordinates on which results are compared first

Run = Callable[[], Any]


def make_weights(layers: int = LAYERS, hidden: int = HIDDEN) -> list[Tensor]:
    return lstm_weights(2, hidden, layers, 1)


def make_vectors(n: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(n)
    param, grad = (torch.randn(n, generator=generator, device=device) for _ in range(2))
    return param, grad


def whole_step(
    rival: str, param: Tensor, grad: Tensor, state: StudentState, weights: list[Tensor]
) -> None:
    function = kernel("student_step", "reference" if rival == "eager" else rival)
    with torch.no_grad():
        update, new = function(grad, state, weights, SETTINGS)
        param -= update
        for old, value in zip(state, new, strict=True):
            old.copy_(value)


def stepper(
    rival: str, param: Tensor, grad: Tensor, state: StudentState, weights: list[Tensor]
) -> Run:
    if rival in ("eager", "compiled"):
        return lambda: whole_step(rival, param, grad, state, weights)
    return lambda: in_place([param], [grad], [state], weights, SETTINGS, backend=rival)


@pytest.mark.parametrize("n", sizes(10**3, 10**4, 10**5, 1 << 20, 10**7))
@threads_of_each
@pytest.mark.parametrize("rival", ["eager", "compiled", "reference", "cpu"])
def test_in_place(benchmark: Any, rival: str, threads: int, n: int) -> None:
    need(rival, "student_step_")
    if rival in ("eager", "compiled") and n > LARGEST_GRAPH:
        pytest.skip(f"{rival} holds whole intermediates: not beyond {LARGEST_GRAPH} coordinates")
    weights, (param, grad) = make_weights(), make_vectors(n)

    few = min(n, FEW)
    ours = param[:few].clone(), grad[:few], initial_state(param[:few], weights)
    theirs = param[:few].clone(), grad[:few], initial_state(param[:few], weights)
    for _ in range(2):
        stepper(rival, *ours, weights)()
        stepper("reference", *theirs, weights)()
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(tuple(ours[2]), tuple(theirs[2]))

    call = stepper(rival, param, grad, initial_state(param, weights), weights)
    call()
    facts = {}
    if n >= LARGEST_GRAPH:  # of fewer coordinates, too little to be seen in the process's pages
        held = temporary_bytes(call)
        if held is not None:
            facts["temporary_bytes_per_coordinate"] = round(held / n, 2)
    measure(
        benchmark,
        call,
        operation="student_step_",
        backend=rival,
        n=n,
        threads=threads,
        flop=n * FLOP,
        **facts,
    )


PERMITTED = ["cpu", "cpu:bf16", "cpu:bf16,approximate"]


def errors_of_ten_steps(backend: str, weights: list[Tensor]) -> dict[str, float]:
    """The largest errors of h and of updates, which both lie in [-1, 1] but for alpha."""

    def run(backend: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        of_dtype = [w.to(dtype) for w in weights]
        generator = torch.Generator().manual_seed(0)
        param = torch.zeros(FEW, dtype=dtype)
        state = initial_state(param, of_dtype)
        for _ in range(10):
            param.zero_()
            grad = torch.randn(FEW, generator=generator).to(dtype)
            stepper(backend, param, grad, state, of_dtype)()
        return param.double() / SETTINGS.alpha, state.h.double()

    found = zip(run(backend, torch.float32), run("reference", torch.float64), strict=True)
    update, h = ((one - other).abs().max().item() for one, other in found)
    return {"update": update, "h": h}


@pytest.mark.parametrize(("layers", "hidden"), [(1, 4), (1, 8), (1, 16), (2, 20), (2, 32)])
@threads_of_each
def test_permitted_alternating(benchmark: Any, threads: int, layers: int, hidden: int) -> None:
    """What "bf16" permits, in turn with float32, so that noise hits all; the errors beside."""
    need("cpu", "student_step_")
    if not core.core().cpu.multiplies_bfloat16():
        pytest.skip("the CPU kernels have no products of bfloat16 here")
    weights, n = make_weights(layers, hidden), 10**4 if QUICK else 1 << 20
    param, grad = make_vectors(n)
    steps = {
        name: stepper(name, param.clone(), grad, initial_state(param, weights), weights)
        for name in PERMITTED
    }
    least = dict.fromkeys(steps, float("inf"))
    for _ in range(3 if QUICK else 15):
        for name, step in steps.items():
            least[name] = min(least[name], seconds(step, repeats=1))
    benchmark.pedantic(steps["cpu:bf16"], rounds=3)
    benchmark.extra_info |= {
        "threads": threads,
        "student": f"{layers}x{hidden}",
        "n": n,
        "least_ns_per_coordinate": {name: round(1e9 * t / n, 2) for name, t in least.items()},
        "largest_errors_of_ten_steps": {
            name: errors_of_ten_steps(name, weights) for name in PERMITTED
        },
    }


@pytest.mark.parametrize("n", sizes(10**3, 10**4, 10**5, 1 << 20))
@threads_of_each
@pytest.mark.parametrize("backend", ["reference", "compiled", "cpu"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_functional(benchmark: Any, direction: str, backend: str, threads: int, n: int) -> None:
    name = "student_step" if direction == "forward" else "student_step_backward"
    need(backend, name)
    if backend != "cpu" and n > 10**5:
        pytest.skip("PyTorch holds whole intermediates: not beyond 100,000 coordinates")
    weights = make_weights()

    def arguments(n: int) -> tuple[Any, ...]:
        param, grad = make_vectors(n)
        state = initial_state(param, weights)._replace(v=grad.square())
        step = (grad, state, weights, SETTINGS)
        if direction == "forward":
            return step
        return (torch.ones_like(grad), StudentState(*map(torch.ones_like, state)), *step)

    function, few = kernel(name, backend), arguments(min(n, FEW))
    # Of the sums over coordinates, float32 keeps the digits that their scale leaves.
    assert_close(function(*few), kernel(name, "reference")(*few), rtol=1e-3, of_scale=1e-4)

    whole = arguments(n)
    # The backward's products are twice the forward's, and the forward's come again.
    measure(
        benchmark,
        lambda: function(*whole),
        operation=f"student_step {direction}",
        backend=backend,
        n=n,
        threads=threads,
        flop=n * FLOP * (1 if direction == "forward" else 3),
    )


@threads_of_each
@pytest.mark.parametrize("rival", ["adamw_foreach", "reference", "cpu", "cpu_at_once", "optimizer"])
def test_a_thousand_parameters(benchmark: Any, rival: str, threads: int) -> None:
    """``cpu_at_once`` has them in one tensor: the arithmetic without what each tensor costs.

    ``optimizer`` is ``AmalgamatedOptimizer.step()``, which keeps from step to step what ``cpu``,
    the operation called by itself, finds out anew.
    """
    need("cpu" if rival == "optimizer" else rival, "student_step_")
    count, each = 1000, 100
    weights, (values, slopes) = make_weights(), make_vectors(count * each)
    part = count * each if rival == "cpu_at_once" else each
    params = [of.clone().requires_grad_() for of in values.split(part)]
    grads = [of.clone() for of in slopes.split(part)]
    if rival == "adamw_foreach":
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        call: Run = torch.optim.AdamW(params, foreach=True).step
    elif rival == "optimizer":
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        student = Student(StudentConfig(), generator=torch.Generator().manual_seed(0))
        call = AmalgamatedOptimizer(params, student=student, backend="cpu", warmup_steps=0).step
    else:
        backend = "cpu" if rival == "cpu_at_once" else rival
        states = [initial_state(param, weights) for param in params]

        def call() -> None:
            with torch.no_grad():
                in_place(params, grads, states, weights, SETTINGS, backend=backend)

        expected = values.clone()
        state = initial_state(values, weights)
        in_place([expected], [slopes], [state], weights, SETTINGS, backend="reference")
        call()
        torch.testing.assert_close(torch.cat(params).detach(), expected)
    measure(
        benchmark,
        call,
        operation="a step of 1,000 tensors",
        backend=rival,
        n=count * each,
        threads=threads,
        flop=0 if rival == "adamw_foreach" else count * each * FLOP,
    )


@threads_of_each
def test_a_thousand_parameters_alternating(benchmark: Any, threads: int) -> None:
    """The least time of each of 100 steps that optimizers take in turn, so that noise hits all."""
    values, slopes = make_vectors(100_000)
    student = Student(StudentConfig(), generator=torch.Generator().manual_seed(0))

    def stepper_of(part: int, kind: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Run:
        params = [each.clone().requires_grad_() for each in values.split(part)]
        for param, grad in zip(params, slopes.split(part), strict=True):
            param.grad = grad.clone()
        return kind(params).step

    def amalgamated(params: list[Tensor]) -> torch.optim.Optimizer:
        return AmalgamatedOptimizer(params, student=student, backend="cpu", warmup_steps=0)

    def adamw(params: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, foreach=True)

    steps = {
        "optimizer": stepper_of(100, amalgamated),
        "adamw_foreach": stepper_of(100, adamw),
        "optimizer_at_once": stepper_of(100_000, amalgamated),
    }
    least = dict.fromkeys(steps, float("inf"))
    for _ in range(100):
        for name, step in steps.items():
            least[name] = min(least[name], seconds(step, repeats=1))
    benchmark.pedantic(steps["optimizer"], rounds=10)
    benchmark.extra_info |= {"threads": threads, "least_ms": {n: 1e3 * t for n, t in least.items()}}


# Units, and the dtypes of h, c and of m, v.
NOMINAL = [
    (hidden, *kinds)
    for hidden in (4, 8, 16)
    for kinds in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.int8, torch.float32),
    )
]


def nominal_weights(hidden: int) -> list[Tensor]:
    weights = lstm_weights(3, hidden, 1, 2)
    weights[2] = weights[2][None]
    return weights


def stepper_of_nominal(
    hidden: int, cells: torch.dtype, moments: torch.dtype, backend: str, param: Tensor, grad: Tensor
) -> Run:
    """Steps in place of one tensor, which is kept from step to step as optimizers keep theirs."""
    corrections = torch.tensor([[2.0, 5.0]])
    settings = StepSettings(0.005, 0.9, 0.99, 1e-15, corrections)
    weights = nominal_weights(hidden)
    tensors = StudentTensors([param], [initial_state(param, weights, cells, moments)])

    def step() -> None:
        with torch.no_grad():
            step_tensors_(tensors, [grad], weights, settings, backend=backend)

    return step


@pytest.mark.parametrize("n", sizes(10**4, 1 << 20, 10**7))
@threads_of_each
def test_nominal_alternating(benchmark: Any, threads: int, n: int) -> None:
    """The least time of each of some steps that optimizers take in turn, so that noise hits all."""
    values, slopes = make_vectors(n)
    for network in NOMINAL:
        few = [values[:FEW].clone() for _ in range(2)]
        for backend, param in zip(("cpu", "reference"), few, strict=True):
            step = stepper_of_nominal(*network, backend, param, slopes[:FEW])
            for _ in range(2):
                step()
        torch.testing.assert_close(*few, rtol=1e-5, atol=1e-4)  # a narrow state's last bit

    def adamw(**how: bool) -> Run:
        param = values.clone().requires_grad_()
        param.grad = slopes
        return torch.optim.AdamW([param], **how).step

    steps = {"adamw_foreach": adamw(foreach=True), "adamw_fused": adamw(fused=True)}
    for hidden, cells, moments in NOMINAL:
        name = f"nominal 1x{hidden}, cells {cells}, moments {moments}".replace("torch.", "")
        steps[name] = stepper_of_nominal(hidden, cells, moments, "cpu", values.clone(), slopes)
    weights, param = make_weights(), values.clone()
    state = initial_state(param, weights)
    steps["RNNProp 2x20"] = stepper("cpu", param, slopes, state, weights)
    least = dict.fromkeys(steps, float("inf"))
    for _ in range(100 if n < 10**5 else 30 if n < 10**7 else 8):
        for name, step in steps.items():
            least[name] = min(least[name], seconds(step, repeats=1))
    benchmark.pedantic(steps["adamw_foreach"], rounds=5)
    benchmark.extra_info |= {
        "threads": threads,
        "n": n,
        "least_ns_per_coordinate": {name: round(1e9 * t / n, 3) for name, t in least.items()},
    }
