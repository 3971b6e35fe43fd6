"""Launches whose arguments differ in counts alone share a compiled kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

# A process of its own: the stand-in for a GPU stays until the process ends.
VARYING = """
import compile_only
import torch
from amalgam.operations import registry
from amalgam.operations.teacher_distance import distances_and_slope
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
for sizes in ([5, 3], [4], [1] * 17, [16, 32, 7], [0, 49]):
    n, count = sum(sizes), len(sizes)
    own = [torch.zeros(*s) for s in ((16, 3), (16, 4), (count, 16), (2, 4), (2,))]
    grad, state = torch.zeros(n), initial_state(torch.zeros(n), own)
    settings = StepSettings(corrections=torch.ones(count, 3), sizes=sizes)
    op("student_step_backward", [grad, *state], grad, *state, own, *settings)
for k in (1, 2, 3, 16, 17):
    student, teachers = torch.zeros(100 * k + 1), torch.zeros(k, 100 * k + 1)
    total = op("teacher_distance", student, teachers, 1e-10, None)[1]
    op("teacher_distance_backward", total, student, teachers, total, 1e-10, None, True)
    pool = [torch.zeros(k, 101) for _ in range(3)]
    op("teacher_step", *pool, [0] * k, *[[0.5] * k] * 4)
for rows, teacher_rows in ((1, 1), (2, 1), (4, 2), (16, 16), (17, 17)):
    students, teachers = torch.zeros(rows, 101), torch.zeros(2, teacher_rows, 101)
    distances_and_slope(students, teachers, torch.zeros_like, backend="triton")
assert compile_only.launches == {}
for each in compile_only.compilations:
    print(each)
kernels = [each.kernel.rpartition("kernels.")[2] for each in compile_only.compilations]
assert sorted(kernels) == [
    "student_step.backward",
    "student_step.backward",  # of the nominal form, where tensors begin at multiples of 16
    "student_step.backward",  # and anywhere
    "student_step_in_place.in_place",  # without control
    "student_step_in_place.in_place",
    "teacher_distance.finish",
    "teacher_distance.gradients",  # in students alone
    "teacher_distance.gradients",
    "teacher_distance.sum_blocks",
    "teacher_step.forward",
], kernels
"""


def test_counts_and_warm_up_compile_nothing_anew() -> None:
    """Tensors, blocks, rows, teachers, steps of warm-up: one, many, multiples of 16."""
    pytest.importorskip("triton")
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", VARYING],
        env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
