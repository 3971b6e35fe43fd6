"""How many kernels are compiled: for the tests that need a GPU, and for arguments that vary.

Nothing is compiled here: processes of their own count keys (see compile_only.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from amalgam.backends import triton

TESTS = Path(__file__).parents[1]
FILES = (
    *(
        f"operations/test_{name}.py"
        for name in ("student_step", "choice_step", "student_unroll_backward")
    ),
    *("operations/test_teacher_distance.py", "test_optimizer.py"),
)
# Left out: what takes 14 GB, what repeats others' kernels slowly.
SELECTION = (
    "not need_64_bits and not opcheck and not gradcheck and not 65537 and not same_bits_again"
)

# A kernel more is seconds more of a GPU's time, in every process's first run. Those of a step in
# place are of its dtypes, of alignment, control, rounding and students.
BUDGETS = {
    "student_step.forward": 16,
    "student_step.backward": 10,
    "student_step_in_place.in_place": 31,
    "choice_step.forward": 8,
    "choice_step.backward": 6,
    "teacher_distance.sum_blocks": 13,
    "teacher_distance.finish": 2,
    "teacher_distance.gradients": 15,
}

pytestmark = pytest.mark.skipif(triton.INTERPRETING, reason="interpreted kernels are not compiled")


def run(*command: str) -> None:
    pytest.importorskip("triton")
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), *sys.path])
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_gpu_tests_compile_few_kernels(tmp_path: Path) -> None:
    """No more than the budget; fewer, and it is to be lowered."""
    out = tmp_path / "compilations.jsonl"
    options = f"-q -p no:cacheprovider -p compile_only --keys-only --compilations={out}".split()
    run("-m", "pytest", *options, "-k", SELECTION, *(str(TESTS / name) for name in FILES))
    rows = map(json.loads, out.read_text().splitlines())
    found = Counter(row["kernel"].removeprefix("amalgam.kernels.") for row in rows)
    assert found == BUDGETS


VARYING = """
import compile_only
import torch
from amalgam.operations import registry
from amalgam.ops import StepSettings, StudentState, initial_state, student_step_
from amalgam.policies import Student, StudentConfig

compile_only.install(compile=False, results=False)
weights = [w.detach() for w in Student(StudentConfig(hidden=4)).weights()]


def op(name, *arguments):
    return getattr(torch.ops.amalgam, name)(*arguments, "triton")


for count in (1, 2, 3, 4, 15, 16, 17, 32, 33):
    params = [torch.zeros(5) for _ in range(count)]
    states = [initial_state(param, weights) for param in params]
    steps = [torch.zeros(()) for _ in params]
    student_step_(params, params, states, weights, backend="triton")
    for warmup in (0, 1, 2, 16, 100):
        student_step_(params, params, states, weights, backend="triton", steps=steps,
                      warmup_steps=warmup, warmup_lr=0.1)
for n in (5, 127, 129, 16 * 128 - 1, 16 * 128 + 1):
    grad = torch.zeros(n)
    state = initial_state(grad, weights)
    op("student_step_backward", [grad, *state], grad, *state, weights, *StepSettings())
for k in (1, 2, 3, 16, 17):
    student, teachers = torch.zeros(100 * k + 1), torch.zeros(k, 100 * k + 1)
    total = op("teacher_distance", student, teachers, 1e-10, None)[1]
    op("teacher_distance_backward", total, student, teachers, total, 1e-10, None, True)
    pool = [torch.zeros(k, 101) for _ in range(3)]
    op("teacher_step", *pool, [0] * k, *[[0.5] * k] * 4)
assert compile_only.launches == {}
for each in compile_only.compilations:
    print(each)
kernels = [each.kernel.rpartition("kernels.")[2] for each in compile_only.compilations]
assert sorted(kernels) == [
    "student_step.backward",
    "student_step_in_place.in_place",  # without control
    "student_step_in_place.in_place",
    "teacher_distance.finish",
    "teacher_distance.gradients",
    "teacher_distance.sum_blocks",
    "teacher_step.forward",
], kernels
"""


def test_counts_and_warm_up_compile_nothing_anew() -> None:
    """Tensors, blocks, teachers, steps of warm-up: one, many, multiples of 16."""
    run("-c", VARYING)
