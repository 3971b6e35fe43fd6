"""Runs every compiled CPU kernel in a core built with AMALGAM_SANITIZE=1; .ci/run starts it.

Under AddressSanitizer PyTorch's tensors end where their malloc'd block ends, so the first element
read or written beyond one stops the process. Each instruction set has a process of its own, which
first proves by two deliberate faults that this is so here.
"""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import amalgam  # noqa: F401  registers the operations
from amalgam.backends import core, cpu
from amalgam.operations import registry
from amalgam.operations.choice_step import ChoiceArguments
from amalgam.operations.registry import Numerics
from amalgam.operations.student_forms import StepSettings
from amalgam.operations.student_step import StudentState
from amalgam.operations.student_step_in_place import InPlaceStep, StudentTensors
from amalgam.operations.teacher_distance import DistanceArguments
from amalgam.operations.teacher_step import KINDS, PoolSettings

SIZES = [0, 1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 65, 127, 257, 1000, 1025]
MANY = 22003  # coordinates that busy a second thread, of six teachers too
ARCHITECTURES = [(1, 1), (1, 4), (1, 8), (1, 16), (2, 20), (3, 5)]
HALVES = (torch.float32, torch.bfloat16, torch.float16)
SETTINGS = StepSettings(0.1, 0.9, 0.999, 1e-10)
# Of kernels that take it; where the CPU has no products of bfloat16, all are the first.
PERMITTED = [Numerics(), Numerics("bf16"), Numerics("bf16", True)]

Arguments = tuple[Any, ...]


def tensor(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def strided(n: int, dtype: torch.dtype) -> Tensor:
    """Every other element of a block that ends with the last of them."""
    return tensor(max(2 * n - 1, 0), dtype=dtype)[::2]


def teacher_distance(dtype: torch.dtype, backward: bool) -> Iterator[Arguments]:
    rows_of_both = (1, 1), (3, 3), (4, 2), (0, 1)
    for n, (rows, teacher_rows) in itertools.product((*SIZES, MANY), rows_of_both):
        for k in (0, 1, 6):
            inputs = tensor(rows, n, dtype=dtype), tensor(k, teacher_rows, n, dtype=dtype)
            grad, total = tensor(rows, k, dtype=dtype), tensor(rows, k, dtype=dtype).square()
            for huber_delta in (None, 0.5):
                arguments = DistanceArguments(*inputs, 1e-10, huber_delta)
                if not backward:
                    yield (arguments,)
                    continue
                for need_teachers in (False, True) if rows == 1 else (False,):
                    yield grad, total, arguments, need_teachers


def teacher_step(dtype: torch.dtype, backward: bool) -> Iterator[Arguments]:
    for n in (*SIZES, MANY):
        for kinds in (range(len(KINDS)), [3], []):
            k = len(kinds)
            grads, m, v, *grads_out = (tensor(k, n, dtype=dtype) for _ in range(6))
            inputs = grads, m, v.square(), pool_of(kinds)
            yield (grads_out, *inputs) if backward else inputs


def pool_of(kinds: Sequence[int]) -> PoolSettings:
    return PoolSettings(list(kinds), *([value] * len(kinds) for value in (0.1, 0.9, 0.999, 1e-10)))


def weights_of(
    layers: int, hidden: int, dtype: torch.dtype, features: int = 2, outputs: int = 1
) -> list[Tensor]:
    weights = []
    for layer in range(layers):
        inputs = hidden if layer else features
        shapes: list[tuple[int, ...]] = [(4 * hidden, inputs), (4 * hidden, hidden), (4 * hidden,)]
        weights += [tensor(*shape, dtype=dtype) for shape in shapes]
    return [*weights, tensor(outputs, hidden, dtype=dtype), tensor(outputs, dtype=dtype)]


def state_of(n: int, layers: int, hidden: int, dtype: torch.dtype) -> StudentState:
    cells = [tensor(layers, hidden, n, dtype=dtype) for _ in range(2)]
    return StudentState(tensor(n, dtype=dtype), tensor(n, dtype=dtype).square(), *cells)


def like(state: StudentState) -> StudentState:
    return StudentState(*(tensor(*part.shape, dtype=part.dtype) for part in state))


def students() -> Iterator[tuple[int, int, int]]:
    """(n, layers, hidden); many coordinates only of a quick one."""
    for layers, hidden in ARCHITECTURES:
        for n in SIZES:
            yield n, layers, hidden
    yield MANY, 1, 4


def of_form(
    nominal: bool,
    sizes: Sequence[int],
    layers: int,
    hidden: int,
    dtype: torch.dtype,
    steps: Sequence[int] = (),
) -> tuple[list[Tensor], StepSettings]:
    """A student's weights and settings, of either form; perhaps each step's."""
    if not nominal:
        return weights_of(layers, hidden, dtype), SETTINGS
    weights = weights_of(layers, hidden, dtype, features=3, outputs=2)
    several = (*steps, len(sizes))
    weights[2] = tensor(*several, 4 * hidden, dtype=dtype)
    corrections = 1 + tensor(*several, 3, dtype=dtype).square()
    return weights, SETTINGS._replace(corrections=corrections, sizes=list(sizes))


FORMS = (False, True)


def student_step(dtype: torch.dtype, backward: bool) -> Iterator[Arguments]:
    for n, layers, hidden in students():
        for nominal in FORMS:
            state = state_of(n, layers, hidden, dtype)
            form = of_form(nominal, [n // 3, 0, n - n // 3], layers, hidden, dtype)
            arguments = tensor(n, dtype=dtype), state, *form
            yield (tensor(n, dtype=dtype), like(state), *arguments) if backward else arguments


def student_step_into(dtype: torch.dtype, backward: bool) -> Iterator[Arguments]:
    """Into other memory, and into that of the state, whose gradients are always replaced."""
    for index, arguments in enumerate(student_step(dtype, False)):
        grad, state, weights, settings = arguments
        if settings.corrections is not None:
            settings = settings._replace(corrections=settings.corrections[None])
        state = StudentState(*(each[None] for each in state))
        several = grad[None], state, [weight[None] for weight in weights], settings
        if backward:
            yield tensor(1, len(grad), dtype=dtype), like(state), *several
        else:
            target = state if index % 2 == 0 else like(state)
            yield torch.empty_like(grad)[None], target, *several


def student_step_in_place(dtype: torch.dtype) -> Iterator[Arguments]:
    for index, (n, layers, hidden) in enumerate(students()):
        sizes = [n // 3, 0, n - n // 3 - n // 5, n // 5]
        of_param, of_grad = HALVES[index % 3], HALVES[index // 3 % 3]
        makers = (lambda size, dtype: tensor(size, dtype=dtype), strided)
        for make, nominal in itertools.product(makers, FORMS):
            params = [make(size, of_param) for size in sizes]
            grads = [make(size, of_grad) for size in sizes]
            states = [state_of(size, layers, hidden, dtype) for size in sizes]
            weights, settings = of_form(nominal, sizes, layers, hidden, dtype)
            settings = settings._replace(sizes=[])
            if dtype == torch.float32 and nominal and index % 5 < 2:
                of = (torch.bfloat16, torch.bfloat16, *[HALVES[index % 2]] * 2)
                states = [
                    StudentState(*(t.to(d) for t, d in zip(state, of, strict=True)))
                    for state in states
                ]
            seeds = list(range(len(sizes))) if index % 2 else []
            tensors = StudentTensors(params, states)
            yield (InPlaceStep(tensors, grads, weights, settings, 0.5, 0.1, None, [], 0, seeds),)


def student_unroll_backward(dtype: torch.dtype) -> Iterator[Arguments]:
    """Among them more steps than are kept of a tile."""
    cases = [(steps, *student) for steps in (0, 1, 3) for student in students()]
    for steps, n, layers, hidden in [*cases, (150, 65, 2, 20), (80, 33, 1, 64)]:
        for nominal in FORMS:
            form = of_form(nominal, [n // 3, 0, n - n // 3], layers, hidden, dtype, [steps])
            rest = state_of(n, layers, hidden, dtype), *form
            yield tensor(steps, n, dtype=dtype), tensor(steps, n, dtype=dtype), *rest
            # Columns of a block that ends with the last of them, and a row that stands for all.
            yield (
                tensor(steps, 2 * n, dtype=dtype)[:, n:],
                tensor(1, n, dtype=dtype).expand(steps, n),
                *rest,
            )


def choice_step(dtype: torch.dtype, backward: bool) -> Iterator[Arguments]:
    for n, layers, hidden in students():
        for kinds in (range(len(KINDS)), [3]):
            k = len(kinds)
            of_student = state_of(n, layers, hidden, dtype)
            moments = tensor(k, n, dtype=dtype), tensor(k, n, dtype=dtype).square()
            state = StudentState(*moments, of_student.h, of_student.c)
            weights = weights_of(layers, hidden, dtype, features=k + 4, outputs=k)
            choice = ChoiceArguments(torch.arange(n) % 5, pool_of(kinds), 0.1, 0.5)
            arguments = tensor(n, dtype=dtype), state, weights, choice
            upstream = tensor(n, dtype=dtype), like(state), tensor(k, n, dtype=dtype)
            yield (*upstream, *arguments) if backward else arguments


MAKERS: dict[str, Callable[[torch.dtype], Iterator[Arguments]]] = {
    "teacher_distance": lambda dtype: teacher_distance(dtype, False),
    "teacher_distance_backward": lambda dtype: teacher_distance(dtype, True),
    "teacher_step": lambda dtype: teacher_step(dtype, False),
    "teacher_step_backward": lambda dtype: teacher_step(dtype, True),
    "student_step": lambda dtype: student_step(dtype, False),
    "student_step_backward": lambda dtype: student_step(dtype, True),
    "student_step_into": lambda dtype: student_step_into(dtype, False),
    "student_step_backward_into": lambda dtype: student_step_into(dtype, True),
    "student_step_": student_step_in_place,
    "student_unroll_backward": student_unroll_backward,
    "choice_step": lambda dtype: choice_step(dtype, False),
    "choice_step_backward": lambda dtype: choice_step(dtype, True),
}


def maker_of(name: str) -> Callable[[torch.dtype], Iterator[Arguments]]:
    """What makes a kernel's arguments: of MAKERS, or ``memory_cases`` of the operation's tests."""
    if name in MAKERS:
        return MAKERS[name]
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "operations")]
    cases = getattr(importlib.import_module(f"test_{name}"), "memory_cases", None)
    if cases is None:
        sys.exit(f"tests/operations/test_{name}.py must define memory_cases(dtype)")
    found: Callable[[torch.dtype], Iterator[Arguments]] = cases
    return found


def expect_a_report(what: str, fault: Callable[[], None]) -> None:
    """Commit a fault in a forked process, and stop unless AddressSanitizer does."""
    with tempfile.TemporaryFile() as report:
        child = os.fork()
        if child == 0:
            os.dup2(report.fileno(), 2)
            fault()
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        report.seek(0)
        text = report.read().decode(errors="replace")
    if status == 0 or "AddressSanitizer" not in text:
        sys.exit(
            f"{core.core().__file__} let {what} pass; was it built with AMALGAM_SANITIZE=1?\n{text}"
        )


def one_too_many(reading: bool) -> None:
    """Pretend that vectors have an element more than they have."""
    n = 1000
    short, long = torch.ones(n), torch.ones(n + 1)
    one, out = torch.ones(1), torch.ones(n + 1)
    student, in_student = (short, out) if reading else (long, short)
    core.core().cpu.teacher_distance_backward_float32(
        *(t.data_ptr() for t in (one, student, long, one, in_student)),
        0, rows=1, teacher_rows=1, n=n + 1, k=1, eps=0.0, huber_delta=-1.0, threads=1,
    )  # fmt: skip


def run_here() -> None:
    """Everything, with the instruction set of this process."""
    # Before the first kernel: a forked process has none of OpenMP's threads.
    expect_a_report("a read behind the end", lambda: one_too_many(True))
    expect_a_report("a write behind the end", lambda: one_too_many(False))
    start, calls = time.monotonic(), 0
    for name, entry in cpu.backend.kernels.items():
        dtypes = entry.dtypes or registry.FLOATS
        ways: list[dict[str, Numerics]] = [{}]
        if entry.takes_numerics:
            ways = [{"numerics": permitted} for permitted in PERMITTED]
        for dtype in sorted(dtypes, key=str):
            for arguments in maker_of(name)(dtype):
                for threads, how in itertools.product((1, 2), ways):
                    torch.set_num_threads(threads)
                    entry.function(*arguments, **how)
                    calls += 1
    isa = core.core().cpu.isa()
    products = "with" if core.core().cpu.multiplies_bfloat16() else "without"
    print(
        f"{isa}, {products} products of bfloat16: {calls} calls clean in "
        f"{time.monotonic() - start:.1f} s",
        flush=True,
    )


def main(arguments: Sequence[str]) -> None:
    known = cpu.backend.kernels.keys()
    if arguments == ["here"]:
        run_here()
        return
    for name in known:
        maker_of(name)
    print(f"kernels: {', '.join(known)}; the cpu backend lacks {sorted(MAKERS.keys() - known)}")
    for isa in core.core().cpu.available_isas():
        done = subprocess.run(
            [sys.executable, __file__, "here"], env={**os.environ, "AMALGAM_CPU_ISA": isa}
        )
        if done.returncode != 0:
            sys.exit(f"{isa}: exit status {done.returncode}")


if __name__ == "__main__":
    main(sys.argv[1:])
