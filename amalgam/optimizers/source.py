"""Where an optimizer's student comes from: an object, a name, a file, or another's state_dict."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from amalgam.policies import POLICIES, FusedStudent, load_policy

EXTRA = "amalgam"
"""The key of a state_dict under which it holds the student and the count of skipped steps."""


def student_of(student: FusedStudent | str | os.PathLike[str] | Mapping[str, Any]) -> FusedStudent:
    """A student, or the one of that name, in that file or in that state_dict.

    Default dtypes, devices and modes that surround it do not matter, and it draws no random number.

    Raises:
        TypeError: It is none of these.
        FileNotFoundError: It is a string or path, but neither a shipped student's name nor a file.
        ValueError: The file or the state_dict holds no student, or is not usable.
    """
    if isinstance(student, FusedStudent):
        return student
    if not isinstance(student, (str, os.PathLike, Mapping)):
        raise TypeError(
            "student must be a Student, a NominalStudent, a name, a path, or a state_dict, not "
            f"{student!r}"
        )
    with undisturbed():
        if isinstance(student, Mapping):
            return _student_in(student)
        found = load_policy(student)
    if not isinstance(found, FusedStudent):
        raise ValueError(
            f"student must be a Student or a NominalStudent, but {str(student)!r} holds a "
            f"{found.kind}; PolicyOptimizer takes any policy"
        )
    return found


def described(student: FusedStudent) -> dict[str, Any]:
    """A student as a state_dict holds it: kind, configuration, provenance and weights."""
    # Not undisturbed, which is the whole process's: checkpoints may be taken by another thread.
    with _disable_current_modes():
        weights = dict(student.state_dict())
    return {
        "kind": student.kind,
        "config": asdict(student.config),
        "provenance": student.provenance,
        "weights": weights,
    }


def _student_in(state_dict: Mapping[str, Any]) -> FusedStudent:
    held = state_dict.get(EXTRA, {}).get("student")
    if held is None:
        raise ValueError(
            f"student must be a state_dict that holds one, but this one, of {list(state_dict)}, "
            "does not: include_student was False, or what saved it keeps torch's two keys alone"
        )
    kind = POLICIES.get(held["kind"])
    if kind is None or not issubclass(kind, FusedStudent):
        raise ValueError(f"student must be one of a known kind, which {held['kind']!r} is not")
    try:
        student = kind(kind.config_type(**held["config"]), provenance=held["provenance"])
        student.load_state_dict(held["weights"])
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"student in the state_dict is not usable: {error}") from error
    return student


@contextmanager
def undisturbed() -> Iterator[None]:
    """Float32 on the CPU, outside modes, and with torch's random numbers as they were after it."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.random.fork_rng(devices=[]), _disable_current_modes(), torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)
