"""The table of what kernels are compiled with, and its override."""

import pytest

from amalgam.kernels.configurations import (
    FEW,
    OPERATIONS,
    VARIABLE,
    Configuration,
    configuration,
)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_architecture_has_one(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    for precision in ("plain", "ieee", "3xtf32", "tf32", "bf16"):
        for hidden in (4, FEW, 16, 20, 32, 64):
            if precision == "plain" and operation == "choice_step":
                continue
            for nominal in (False, True):
                block, warps = configuration(operation, 1, hidden, precision, nominal)
                assert block >= 16
                assert block & block - 1 == warps & warps - 1 == 0


def test_the_environment_overrides_what_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "student_step_=256x8,choice_step=32x2")
    assert configuration("student_step_", 2, 20, "tf32") == Configuration(256, 8)
    assert configuration("choice_step", 1, 4, "ieee") == Configuration(32, 2)
    assert configuration("student_step", 2, 20, "tf32") != Configuration(256, 8)


@pytest.mark.parametrize("text", ["student_step_=64", "step=64x4", "student_step=48x4", "x"])
def test_overrides_that_are_none_are_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ValueError, match=r"AMALGAM_TRITON must be OPERATION=BLOCKxWARPS.*not "):
        configuration("student_step", 2, 20, "tf32")
