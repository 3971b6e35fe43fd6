"""Weights files: whole or not at all, bit for bit, and nothing unpickled."""

import dataclasses
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from amalgam import weight_files
from amalgam.policies import FusedStudent, Student, StudentConfig, load_policy

CONFIG = StudentConfig(
    layers=1, hidden=3, alpha=0.3, beta1=0.8, beta2=0.9, eps=1e-7, warmup_steps=4, warmup_lr=0.2
)


def student(seed: int = 0, **about: Any) -> Student:
    return Student(CONFIG, generator=torch.Generator().manual_seed(seed), provenance=about)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def bits(module: Student) -> list[bytes]:
    return [w.detach().numpy().tobytes() for w in module.weights()]


def put(path: Path, tensors: dict[str, torch.Tensor], **metadata: Any) -> None:
    safetensors.torch.save_file(tensors, path, metadata or None)


def state(**change: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(student().state_dict()) | change


def about(**config: Any) -> str:
    known = {"layers": 1, "hidden": 3}
    return described({"config": known | config, "provenance": {}})


def described(about: Any, kind: str = "student") -> str:
    return json.dumps({"kind": kind, "about": about})


def test_the_same_student_is_the_same_file(tmp_path: Path) -> None:
    """Once two metadata keys came in an order of chance, and files of one run differed."""
    for index in range(8):
        student(run="a").save(tmp_path / f"{index}.safetensors")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_round_trip_is_bit_exact(tmp_path: Path) -> None:
    ours = student(run="a", steps=[1, 2], nested={"é": None})
    with torch.no_grad():
        ours.head.bias.fill_(-0.0)
        ours.cells[0].bias[:3] = torch.tensor([1e-45, 3.4e38, 1 / 3])
    ours.save(tmp_path / "deep" / "er" / "s.safetensors")
    back = Student.load(str(tmp_path / "deep" / "er" / "s.safetensors"))
    assert bits(back) == bits(ours)
    assert back.config == CONFIG
    assert back.provenance == {"run": "a", "steps": [1, 2], "nested": {"é": None}}
    assert all(w.requires_grad for w in back.weights())
    assert names(tmp_path / "deep" / "er") == ["s.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_student_keeps_its_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    ours = student().to(dtype)
    with torch.no_grad():
        ours.head.bias.fill_(1 / 3)
    ours.save(tmp_path / "s.safetensors")
    back = load_policy(tmp_path / "s.safetensors")
    for theirs, weight in zip(back.weights(), ours.weights(), strict=True):
        assert theirs.dtype == dtype
        assert theirs.requires_grad
        assert torch.equal(theirs, weight)


def test_strided_and_half_tensors_round_trip(tmp_path: Path) -> None:
    tensors = {
        "strided": torch.arange(12.0).view(3, 4).T[1:],
        "half": torch.tensor([1.5, float("inf")], dtype=torch.bfloat16),
        "count": torch.tensor(2**62),
        "none": torch.zeros(0, 3),
        "leaf": torch.ones(2, requires_grad=True),
    }
    weight_files.write(tmp_path / "t", "choice", tensors, {"k": 1})
    back, facts = weight_files.read(tmp_path / "t", "choice")
    assert facts == {"k": 1}
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor)
        assert back[name].dtype == tensor.dtype


def test_every_truncation_is_a_value_error(tmp_path: Path) -> None:
    student().save(tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    lengths = {*range(0, 24), *range(24, len(content), 37), len(content) - 1}
    for length in lengths:
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(ValueError, match="cut' is not a whole safetensors file"):
            Student.load(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(content)
    assert bits(Student.load(tmp_path / "cut")) == bits(student())


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_pickles_are_not_opened(tmp_path: Path, how: str) -> None:
    path = tmp_path / "s.safetensors"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    else:
        torch.save(Bomb(), path)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        Student.load(path)


@pytest.mark.parametrize(
    ("metadata", "why"),
    [
        ({}, "that amalgam did not write"),
        ({"format": "pt"}, "that amalgam did not write"),
        ({"amalgam": described({}, "choice")}, "must be an amalgam student, but is .* choice"),
        ({"amalgam": "student"}, "does not say what it holds"),
        ({"amalgam": "{}"}, "does not say what it holds"),
        ({"amalgam": "[]"}, "does not say what it holds"),
        ({"amalgam": described([])}, "describe itself with an object"),
        ({"amalgam": described({})}, "usable student: 'config'"),
        ({"amalgam": described({"config": {}})}, "usable student"),
        ({"amalgam": about(hidden=4)}, "must have shape .16, 2. .*, not shape .12, 2."),
        ({"amalgam": about(layers=2)}, "cells.1.weight_ih"),
        ({"amalgam": about(layers=0)}, "layers must be 1 or more"),
        ({"amalgam": about(layers="2")}, "usable student"),
        ({"amalgam": about(depth=2)}, "depth"),
        ({"amalgam": about(alpha=math.inf)}, "alpha must be positive and finite"),
    ],
)
def test_foreign_files_are_named(tmp_path: Path, metadata: dict[str, str], why: str) -> None:
    """A file without "about" once ended in a KeyError: only files of our own had been tried."""
    put(tmp_path / "foreign", state(), **metadata)
    with pytest.raises(ValueError, match=f"foreign'.*(?s:.*){why}"):
        Student.load(tmp_path / "foreign")


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        (state(extra=torch.zeros(1)), "extra"),
        ({k: v for k, v in state().items() if k != "head.bias"}, "head.bias"),
        (state(**{"head.bias": torch.tensor([float("nan")])}), "head.bias holds non-finite"),
        (state(**{"head.bias": torch.tensor([float("-inf")])}), "head.bias holds non-finite"),
        (state(**{"head.bias": torch.zeros(2)}), "head.bias"),
        (state(**{"head.bias": torch.zeros(1, dtype=torch.int64)}), "head.bias.*int64"),
    ],
)
def test_unfit_weights_are_named(
    tmp_path: Path, tensors: dict[str, torch.Tensor], why: str
) -> None:
    put(tmp_path / "unfit", tensors, amalgam=about())
    with pytest.raises(ValueError, match=f"unfit' does not hold a usable student(?s:.*){why}"):
        Student.load(tmp_path / "unfit")


def test_missing_file_lists_what_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "SHIPPED", tmp_path)
    student(seed=1).save(tmp_path / "b.safetensors")
    student(seed=2).save(tmp_path / "a.safetensors")
    (tmp_path / "notes.txt").write_text("x")
    assert weight_files.shipped() == ("a", "b")
    assert bits(Student.load("b")) == bits(student(seed=1))
    with pytest.raises(FileNotFoundError, match=r"'c' is neither a file.*\['a', 'b'\]$"):
        Student.load("c")
    student(seed=1).save(tmp_path / "standard.safetensors")
    with pytest.raises(FileNotFoundError, match="; did you mean 'standard'\\?$"):
        Student.load("standrd")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        weight_files.read(tmp_path / "nowhere", "student")
    with pytest.raises(FileNotFoundError, match="neither a file"):
        Student.load(tmp_path)


def test_a_shipped_name_goes_before_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shipped").mkdir()
    monkeypatch.setattr(weight_files, "SHIPPED", tmp_path / "shipped")
    student(seed=1).save(tmp_path / "shipped" / "same.safetensors")
    monkeypatch.chdir(tmp_path)
    student(seed=2).save(tmp_path / "same")
    assert bits(Student.load("same")) == bits(student(seed=1))
    assert bits(Student.load("./same")) == bits(student(seed=2))


def test_every_student_that_ships_loads() -> None:
    for name in weight_files.shipped():
        student = load_policy(name)
        assert isinstance(student, FusedStudent)
        assert all(w.isfinite().all() for w in student.weights())
        assert student.provenance["recipe"] == name
    assert weight_files.SHIPPED.name == "weights"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    student(seed=1).save(tmp_path / "s")
    before = (tmp_path / "s").read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weight_files.os, step, fail)
    for name in ("s", "new"):
        with pytest.raises(OSError, match="No space"):
            student(seed=2).save(tmp_path / name)
    assert names(tmp_path) == ["s"]
    assert (tmp_path / "s").read_bytes() == before


def test_what_json_cannot_hold_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        student(tensor=torch.zeros(1)).save(tmp_path / "s")
    assert names(tmp_path) == []


def test_the_file_appears_only_when_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    replace = weight_files.os.replace

    def watch(beside: Path, path: Path) -> None:
        seen.append((Path(path).exists(), Student.load(beside).config))
        replace(beside, path)

    monkeypatch.setattr(weight_files.os, "replace", watch)
    student().save(tmp_path / "s")
    assert seen == [(False, CONFIG)]
    assert names(tmp_path) == ["s"]


@pytest.mark.parametrize(
    "changes", [{"layers": 1000000000}, {"hidden": 4096, "layers": 100}, {"layers": 2}]
)
def test_a_file_that_claims_more_than_it_holds_takes_no_memory(
    changes: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = student().state_dict()
    config = dataclasses.asdict(student().config) | changes
    about = {"config": config, "provenance": {}}
    weight_files.write(tmp_path / "s", "student", tensors, about)
    built = []
    build = Student.build

    def watched(self: Student, generator: torch.Generator | None) -> None:
        build(self, generator)
        real = [weight for weight in self.weights() if weight.device.type != "meta"]
        built.append(sum(weight.numel() for weight in real))

    monkeypatch.setattr(Student, "build", watched)
    with pytest.raises(ValueError, match="layers must be at most|by its configuration, not"):
        Student.load(tmp_path / "s")
    assert sum(built) < 10_000


@pytest.mark.parametrize("byte", range(0, 200, 7))
def test_a_flipped_bit_of_a_student_is_refused(byte: int, tmp_path: Path) -> None:
    student(seed=1).save(tmp_path / "s")
    content = bytearray((tmp_path / "s").read_bytes())
    content[byte * len(content) // 200] ^= 1 << byte % 8
    (tmp_path / "s").write_bytes(content)
    with pytest.raises(ValueError, match="'.*s'"):
        Student.load(tmp_path / "s")


def test_a_file_from_before_checksums_is_read(tmp_path: Path) -> None:
    tensors = student(seed=1).state_dict()
    about = {"config": dataclasses.asdict(CONFIG), "provenance": {}}
    described = json.dumps({"kind": "student", "about": about})
    safetensors.torch.save_file(tensors, tmp_path / "s", {"amalgam": described})
    assert bits(Student.load(tmp_path / "s")) == bits(student(seed=1))


def test_facts_nested_too_deeply_are_refused(tmp_path: Path) -> None:
    nested = "[" * 100000 + "]" * 100000
    safetensors.torch.save_file(student().state_dict(), tmp_path / "s", {"amalgam": nested})
    with pytest.raises(ValueError, match="does not say what it holds"):
        Student.load(tmp_path / "s")
