"""Counts the kernels that the tests marked gpu compile; ends with an error where a count is new.

A kernel more is seconds more of a GPU's time, in every process's first run. Nothing is compiled
here and no GPU is needed: compile_only.py counts keys.

    python tests/count_compilations.py
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
for folder in (TESTS, TESTS.parent):
    sys.path.insert(0, str(folder))

import compile_only  # noqa: E402

FILES = (
    *(
        f"operations/test_{name}.py"
        for name in ("student_step_gpu", "nominal_triton", "choice_step", "student_unroll_backward")
    ),
    *("operations/test_teacher_distance.py", "test_optimizer.py"),
)
# Left out: what takes 14 GB, what repeats others' kernels slowly.
SELECTION = (
    "not need_64_bits and not opcheck and not gradcheck and not 65537 and not same_bits_again"
)

# Those of a step are of its form and students, of alignment, and in place of dtypes, control and
# rounding.
BUDGETS = {
    "student_step.forward": 26,
    "student_step.backward": 17,
    "student_step_in_place.in_place": 46,
    "choice_step.forward": 9,
    "choice_step.backward": 7,
    "teacher_distance.sum_blocks": 13,
    "teacher_distance.finish": 2,
    "teacher_distance.gradients": 18,
}


def main() -> int:
    """Run the tests on the stand-in; returns the process's exit status."""
    options = ["-q", "-rfE", "-p", "no:cacheprovider", "-p", "compile_only", "--keys-only"]
    status = pytest.main([*options, "-k", SELECTION, *(str(TESTS / name) for name in FILES)])
    found = Counter(
        each.kernel.removeprefix("amalgam.kernels.") for each in compile_only.compilations
    )
    wrong = {
        name: (found[name], BUDGETS.get(name, 0))
        for name in {*found, *BUDGETS}
        if found[name] != BUDGETS.get(name, 0)
    }
    for name, (count, budget) in sorted(wrong.items()):
        what = "find out why it compiles more" if count > budget else "lower the budget"
        print(f"{name} was compiled {count} times, its budget is {budget}: {what}")
    return int(status) or bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
